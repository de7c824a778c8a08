"""Models to hand on: what an exported folder holds, who reads it, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from prelar_trl.hub import is_export, load_pretrained, push, read_export
from prelar_trl.models import Agent
from prelar_trl.modules import RSSMWorldModel
from prelar_trl.recipes.export import export
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.recipes.schema import ExportConfig
from tests.hub_server import REPOSITORY, hub
from tests.toy_runs import checkpoint, different, finetune_config, pretrain_config


@pytest.fixture(scope="module")
def made(clips, tmp_path_factory) -> SimpleNamespace:
    """A pre-training run with a probe, and its export."""
    folder = tmp_path_factory.mktemp("hub")
    pretrain(pretrain_config(clips, folder / "run"))
    values = {"contrast/accuracy": 0.625, "x": float("nan")}
    values |= dict.fromkeys(("action_r2/latent_action_0", "action_r2/latent_action_10"), 0.5)
    (folder / "run" / "probe.json").write_text(json.dumps({"values": values}))
    out = export(ExportConfig(run=str(folder / "run"), out=str(folder / "out")))
    return SimpleNamespace(folder=folder, run=folder / "run", out=out)


def test_a_folder_holds_weights_configuration_and_card_of_the_run(made):
    assert {path.name for path in made.out.iterdir()} == {
        *("model.safetensors", "config.json", "README.md")
    }
    weights = load_file(made.out / "model.safetensors")
    assert different(dict(checkpoint(made.run)["model"]), weights) == []
    config = json.loads((made.out / "config.json").read_text())
    assert (config["method"], config["size"], config["phase"]) == ("prelar", "tiny", "pretrain")
    assert config["overrides"]["deter"] == 16 and config["training"]["updates"] == 3


def test_nothing_in_it_names_a_place_on_this_machine(made, clips):
    for name in ("config.json", "README.md"):
        text = (made.out / name).read_text()
        assert str(made.folder) not in text and str(clips) not in text


def test_the_card_says_what_it_is_what_it_learned_and_how_to_load_it(made):
    card = (made.out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: prelar_trl\nlicense: mit\n")
    for text in ("`prelar`, size `tiny`", "3 updates, seed 0", "| data | clips |", "`latent_kl` 1"):
        assert text in card
    assert "| `contrast/accuracy` | 0.625 |" in card and "nan" not in card
    assert "r2/latent_action_" not in card  # one dimension of many
    assert 'load_pretrained("out")' in card and "pretrained=out method=prelar size=tiny" in card


def test_the_loaded_world_model_is_the_trained_one(made):
    model = load_pretrained(made.out)
    assert isinstance(model, RSSMWorldModel) and not model.training
    assert different(dict(checkpoint(made.run)["model"]), dict(model.state_dict())) == []


def test_fine_tuning_from_an_export_is_fine_tuning_from_its_run(made):
    for name, source in (("a", made.run), ("b", made.out)):
        run = made.folder / name
        finetune(finetune_config(run, pretrained=str(source), env_steps=30, eval_episodes=0))
    one, other = checkpoint(made.folder / "a"), checkpoint(made.folder / "b")
    assert different(one["agent"], other["agent"]) == []


def test_rehearsal_needs_the_run(made):
    cfg = finetune_config(made.folder / "c", pretrained=str(made.out), rehearse=0.5)
    with pytest.raises(ValueError, match="rehearse=0.5 needs the videos of a pre-training run"):
        finetune(cfg)


def test_an_agent_can_be_handed_on_too(made):
    run = made.folder / "agent"
    finetune(finetune_config(run, method="dreamerv2", env_steps=30, eval_episodes=0))
    agent = load_pretrained(export(ExportConfig(run=str(run), out=str(run / "out"))))
    assert isinstance(agent, Agent)
    assert different(dict(checkpoint(run)["agent"]), dict(agent.state_dict())) == []
    assert "fine-tuned on toy" in (run / "out" / "README.md").read_text()


# What is refused


def copy(made: SimpleNamespace, tmp_path: Path) -> Path:
    for file in made.out.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_folder_that_holds_something_is_not_written_over(made):
    with pytest.raises(FileExistsError, match="holds something already"):
        export(ExportConfig(run=str(made.run), out=str(made.run)))


def test_damage_and_other_folders_are_named(made, tmp_path):
    with pytest.raises(ValueError, match="is no exported model: config.json"):
        load_pretrained(made.run)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        load_pretrained(tmp_path / "nothing")
    folder = copy(made, tmp_path)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is no exported model: model.safetensors"):
        load_pretrained(folder)


def test_weights_of_another_size_do_not_fit(made, tmp_path):
    folder = copy(made, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["overrides"]["deter"] = 24
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"damaged: the checksum of config.json differs"):
        load_pretrained(folder)
    del config["config_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit this version's model: .* tensors differ"):
        load_pretrained(folder)


def edited(made: SimpleNamespace, tmp_path: Path, **changes: object) -> Path:
    """The export with other entries in its configuration; None takes one out."""
    folder = copy(made, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config = {k: x for k, x in {**config, **changes}.items() if x is not None}
    del config["config_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "1"}, "format is '1'"),
        ({"phase": ["pretrain"]}, r"phase is \['pretrain'\]"),
        ({"inputs": [64]}, r"inputs is \[64\]"),
        ({"training": None}, "KeyError.*training"),
        ({"overrides": None}, "KeyError.*overrides"),
    ],
)
def test_an_edited_configuration_is_refused_in_one_line(changes, message, made, tmp_path):
    folder = edited(made, tmp_path, **changes)
    with pytest.raises(ValueError, match=f"is no exported model: config.json: .*{message}"):
        load_pretrained(folder)


def named(made: SimpleNamespace, tmp_path: Path) -> Path:
    """The export with latent actions of a module that is not there."""
    overrides = json.loads((made.out / "config.json").read_text())["overrides"]
    overrides["latent_action"] = "no_such_module:Kind"
    return edited(made, tmp_path, overrides=overrides)


def test_code_of_others_runs_only_when_it_is_trusted(made, tmp_path):
    folder = named(made, tmp_path)
    with pytest.raises(ValueError, match="runs the code of that module: if you trust"):
        load_pretrained(folder)
    with pytest.raises((ImportError, ValueError), match="no_such_module"):
        load_pretrained(folder, trust_code=True)


def test_a_module_that_the_caller_names_itself_needs_no_trust(made, tmp_path):
    folder = named(made, tmp_path)
    assert (
        read_export(folder, typed={"latent_action": "no_such_module:Kind"})["phase"] == "pretrain"
    )
    with pytest.raises(ValueError, match="runs the code of that module: if you trust"):
        read_export(folder, typed={"latent_action": "another:Kind"})


def test_a_missing_package_is_named_with_its_extra(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"safetensors is missing: .*prelar_trl\[hub\]"):
        load_pretrained(made.out)


# The hub

SCRIPT = """
import os, sys
import torch
from prelar_trl.hub import load_pretrained, push
print(push(sys.argv[1], sys.argv[2]))
for name in (sys.argv[2], "hf://" + sys.argv[2]):
    model, local = load_pretrained(name).state_dict(), load_pretrained(sys.argv[1]).state_dict()
    print(all(torch.equal(model[name], local[name]) for name in local))
# What was pulled lies in the library's cache and needs the hub no more.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
    del sys.modules[name]  # so that it reads them
load_pretrained(sys.argv[2])
print("offline")
"""


def test_push_and_pull_speak_with_a_hub(made, tmp_path):
    with hub() as (address, files):
        known = {"HF_ENDPOINT": address, "HF_TOKEN": "secret", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", SCRIPT, str(made.out), REPOSITORY]
        environment = os.environ | known | {"HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = [f"{address}/{REPOSITORY}", "True", "True", "offline"]
    assert done.stdout.splitlines() == said, done.stderr
    assert files == {path.name: path.read_bytes() for path in made.out.iterdir()}


def test_only_exports_are_pushed(made):
    assert is_export(made.out) and is_export("hf://me/model")
    assert not is_export(made.run) and not is_export("runs/pretrain")
    with pytest.raises(ValueError, match="is no exported model"):
        push(made.run, REPOSITORY)
