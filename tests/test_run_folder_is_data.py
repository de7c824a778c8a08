"""A run folder is data: opening it never executes code that it holds or names."""

from __future__ import annotations

import ast
import contextlib
import json
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import prelar_trl
from prelar_trl.checkpoint import load_checkpoint, save_checkpoint
from prelar_trl.data import EpisodeReplay, VideoClips
from prelar_trl.data.sources import FrameOptions
from prelar_trl.data.sources.torchrl import TensorDictFolder
from prelar_trl.recipes.evaluate import evaluate
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.import_official import export_official
from prelar_trl.recipes.plot import main as plot
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.recipes.probe import probe
from prelar_trl.recipes.schema import EvaluateConfig, PlotConfig, ProbeConfig
from tests.test_checkpoint import Malicious
from tests.toy_runs import copy_run, finetune_config, make_clips, pretrain_config

PACKAGE = Path(prelar_trl.__file__).parent
MODULE = """
from pathlib import Path
Path({trace!r}).touch()
from prelar_trl.modules.latent_actions import LatentActions
class Kind(LatentActions):
    pass
"""
IMPORTERS = (
    *("importlib.import_module", "import_module", "pkgutil.resolve_name", "__import__"),
    "gymnasium.make",
)
# Where one of them is called with a name that is not written there, and why it is harmless.
IMPORTS = {
    "envs/registry.py": "env= of the command line, or trust_code",
    "hub.py": "optional packages, by the names in its calls",
    "envs/wrappers.py": "gymnasium.make: env= of the command line, or trust_code",
    "modules/latent_actions/base.py": "model.latent_action= of the command line, or trust_code",
    "recipes/entry.py": "the recipe",
}

# What a program sends to its own processes; no file.
PIPES = {"envs/workers.py", "recipes/async_collection.py"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A clip store, a pre-training run and a fine-tuning run."""
    folder = tmp_path_factory.mktemp("made")
    clips = make_clips(folder / "clips", episodes=8)
    pretrain(pretrain_config(clips, folder / "pre", updates=1, keep=1))
    finetune(finetune_config(folder / "fine", env_steps=40, eval_episodes=0, keep=1))
    return SimpleNamespace(clips=clips, pre=folder / "pre", fine=folder / "fine")


@pytest.fixture
def trace(tmp_path, monkeypatch):
    """A file that importing the module ``evil`` makes."""
    path = tmp_path / "trace"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "evil.py").write_text(MODULE.format(trace=str(path)))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield path
    sys.modules.pop("evil", None)


def tampered(run: Path, to: Path, config: dict[str, Any], model: dict[str, Any]) -> str:
    """A copy of a run folder with other settings, in its config and in its checkpoint."""
    shutil.copytree(run, to)
    old = yaml.safe_load((to / "config.yaml").read_text())
    (to / "config.yaml").write_text(yaml.safe_dump(old | config))
    state = load_checkpoint(to / "checkpoints" / "last.pt")
    state["overrides"] |= model
    save_checkpoint(to / "checkpoints" / "last.pt", state)
    return str(to)


@pytest.mark.parametrize("name", ["latent_action", "action_code"])
@pytest.mark.parametrize("recipe", ["evaluate", "probe", "finetune", "export"])
def test_a_latent_action_that_a_run_folder_names_is_not_imported(
    recipe, name, made, tmp_path, trace
):
    source = made.fine if recipe == "evaluate" else made.pre
    run = tampered(source, tmp_path / "theirs", {}, {name: "evil:Kind"})
    opened = {
        "evaluate": lambda: evaluate(EvaluateConfig(run=run, device="cpu", episodes=1)),
        "probe": lambda: probe(ProbeConfig(run=run, device="cpu")),
        "finetune": lambda: finetune(
            finetune_config(tmp_path / "ours", pretrained=run, align_updates=1)
        ),
        "export": lambda: export_official(run, str(tmp_path / "out"), trust_code=False),
    }[recipe]
    message = rf"theirs has model.{name}=evil:Kind, .* add trust_code=true"
    with pytest.raises(ValueError, match=message):
        opened()
    assert not trace.exists()


def test_a_run_that_goes_on_imports_no_latent_action_that_its_folder_names(made, tmp_path, trace):
    model = yaml.safe_load((made.pre / "config.yaml").read_text())["model"]
    config = {"model": model | {"latent_action": "evil:Kind"}}
    run = tampered(made.pre, tmp_path / "theirs", config, {})
    cfg = pretrain_config(made.clips, run, updates=2, keep=1, resume=True)
    with pytest.raises(ValueError, match="was started with model={'latent_action': 'evil:Kind'}"):
        pretrain(cfg)
    assert not trace.exists()


@pytest.mark.parametrize("env", ["evil:make", "gym/evil:Any-v0"])
def test_an_environment_that_a_run_folder_names_is_not_imported(env, made, tmp_path, trace):
    run = tampered(made.fine, tmp_path / "theirs", {"env": env}, {})
    cfg = EvaluateConfig(run=run, device="cpu", episodes=1)
    with pytest.raises(ValueError, match=rf"theirs has env={env}, .* trust_code=true"):
        evaluate(cfg)
    assert not trace.exists()
    evaluate(EvaluateConfig(run=run, env="toy", device="cpu", episodes=1, video_episodes=0))
    assert not trace.exists()


def test_what_is_trusted_is_imported(made, tmp_path, trace):
    run = tampered(made.fine, tmp_path / "theirs", {"env": "gym/evil:Any-v0"}, {})
    cfg = EvaluateConfig(run=run, device="cpu", episodes=1, trust_code=True)
    with pytest.raises(ValueError, match="gymnasium cannot make"):
        evaluate(cfg)
    assert trace.exists()  # it was dangerous indeed


@pytest.mark.parametrize("phase", ["pre", "fine"])
def test_no_file_of_a_run_folder_runs_code(phase, made, tmp_path):
    """Every file, one after the other, is a pickle that would run a command."""
    trace, source = tmp_path / "trace", getattr(made, phase)
    code = pickle.dumps(Malicious(trace), protocol=2)
    torch.save({"format": 1, "step": 1, "weights": Malicious(trace)}, tmp_path / "code.pt")

    def resume(run):
        if phase == "pre":
            pretrain(pretrain_config(made.clips, run, updates=1, resume=True))
        else:
            finetune(finetune_config(run, env_steps=40, eval_episodes=0, resume=True))

    def evaluate_or_probe(run):
        if phase == "pre":
            probe(ProbeConfig(run=str(run), device="cpu", clips=2, batch_size=5))
        else:
            evaluate(EvaluateConfig(run=str(run), device="cpu", episodes=1, video_episodes=0))

    def report(run):
        plot(PlotConfig(runs=[str(run)], out=str(tmp_path / "report.html")))

    files = [x.relative_to(source) for x in sorted(source.rglob("*")) if x.is_file()]
    files = [x for x in files if x.suffix not in (".mp4", ".png")]
    files += [Path("replay/frames/other.pickle"), Path("replay/frames/meta.json")]
    assert len(files) >= 5
    openings = {".pt": evaluate_or_probe, ".csv": report, ".yaml": report}
    for number, file in enumerate(files):
        run = copy_run(source, tmp_path / str(number))
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        is_checkpoint = file.suffix == ".pt"
        (run / file).write_bytes((tmp_path / "code.pt").read_bytes() if is_checkpoint else code)
        for opening in {resume, openings.get(file.suffix, resume)}:
            with contextlib.suppress(ValueError, OSError):
                opening(run)
            assert not trace.exists(), file
        shutil.rmtree(run)
    pickle.loads(code)
    assert trace.exists()  # it was dangerous indeed


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Calls of a module by their dotted names."""
    return [(ast.unparse(x.func), x) for x in ast.walk(tree) if isinstance(x, ast.Call)]


def test_every_place_that_reads_a_file_reads_data_only():
    """No pickle, no YAML with tags, no numpy objects; imports by name only where listed."""
    importing = set()
    files = {*PACKAGE.rglob("*.py"), *(PACKAGE / "recipes").glob("*.py")}  # a link in a checkout
    for file in sorted(files):
        place = file.relative_to(PACKAGE).as_posix()
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            banned = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
            found = banned & {name.split(".")[0] for name in names}
            assert not found or place in PIPES, place
        for name, call in calls(tree):
            where = f"{place}:{call.lineno}: {name}"
            options = {x.arg: ast.unparse(x.value) for x in call.keywords}
            last = name.split(".")[-1]
            assert name not in ("eval", "exec", "compile"), where
            assert last not in ("load_memmap", "memmap_", "hub_load", "unsafe_load"), where
            if name == "torch.load":
                assert options.get("weights_only") == "True", where
            if name.startswith("yaml."):
                assert last in ("safe_load", "safe_dump"), where
            if last in ("read_array", "open_memmap") or name in ("np.load", "numpy.load"):
                assert options.get("allow_pickle") == "False", where
            if name in IMPORTERS and not isinstance(call.args[0], ast.Constant):
                importing.add(place)
    assert importing == set(IMPORTS)


def test_a_recorded_tensordict_holds_no_objects(tmp_path):
    """NumPy would take the bytes of such an entry for addresses in memory."""
    meta = {
        "shape": [4],
        "_type": "<class 'tensordict._td.TensorDict'>",
        "pixels": {"dtype": "torch.uint8", "shape": [4, 3, 8, 8]},
        "done": {"dtype": "torch.object_", "shape": [4, 1]},
        "episode": {"dtype": "O", "shape": [4]},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "pixels.memmap").write_bytes(bytes(4 * 3 * 8 * 8))
    for name in ("done", "episode"):
        (tmp_path / f"{name}.memmap").write_bytes(b"A" * 32)
    assert set(TensorDictFolder(tmp_path, FrameOptions()).entries) == {"pixels"}


def test_stores_and_replays_are_bytes_and_json(made):
    kinds = {x.suffix for x in (made.fine / "replay").rglob("*") if x.is_file()}
    kinds |= {x.suffix for x in made.clips.rglob("*") if x.is_file()}
    assert kinds <= {".bin", ".json", ".jsonl", ".png"}
    EpisodeReplay(made.fine / "replay", window=6, batch_size=2, capacity=1_000).close()
    VideoClips(made.clips, clip_len=6, batch_size=2).sample()
