"""The authors' checkpoints: into a run folder that fine-tunes, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prelar_trl.official import official_action_dim, read_official
from prelar_trl.recipes.export import export
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.import_official import export_official, import_official
from prelar_trl.recipes.schema import ExportConfig, FinetuneConfig, ImportOfficialConfig
from tests.parity import Fixture, fixtures
from tests.toy_runs import STEPS, checkpoint

SHARED = {"stoch", "classes", "deter", "hidden", "ensemble", "depth", "stages", "layers", "norm"}
SHARED |= {"head_units", "latent_action_size", "latent_action_deter", "latent_action_hidden"}


def official_folder(fixture: Fixture, path: Path) -> Path:
    """A checkpoint as the authors' code writes it: the fixture's weights."""
    path.mkdir()
    torch.save(fixture.group("weights"), path / "variables.pt")
    return path


def config(fixture: Fixture, official: Path, run: Path, **changes) -> ImportOfficialConfig:
    options = {"method": fixture.system, "phase": fixture.phase, **changes}
    return ImportOfficialConfig(
        official=str(official), run=str(run), model=fixture.overrides(), **options
    )


@pytest.fixture(params=fixtures(), ids=lambda path: path.stem)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return Fixture(request.param)


def test_import_then_export_gives_the_same_weights(fixture, tmp_path):
    official = official_folder(fixture, tmp_path / "official")
    run = import_official(config(fixture, official, tmp_path / "run"))
    export_official(str(run.path), str(tmp_path / "back"))
    theirs, back = read_official(official), read_official(tmp_path / "back")
    assert len(theirs) > 50
    missing = {name for name in theirs if name not in back}
    assert not missing, sorted(missing)[:5]
    for name, tensor in theirs.items():
        assert torch.equal(back[name], tensor.to(back[name].dtype)), name


def test_what_is_handed_on_says_that_it_was_imported_and_not_from_where(fixture, tmp_path):
    official = official_folder(fixture, tmp_path / "official")
    run = import_official(config(fixture, official, tmp_path / "run"))
    out = export(ExportConfig(run=str(run.path), out=str(tmp_path / "out")))
    card = (out / "README.md").read_text()
    assert "| trained | by the authors' code, imported |" in card
    assert "losses" not in card and "0 updates" not in card
    assert not any(
        str(tmp_path) in (out / name).read_text() for name in ("config.json", "README.md")
    )


@pytest.mark.parametrize("method", ["prelar", "apv", "contextwm"])
def test_an_imported_run_is_fine_tuned(method, tmp_path):
    path = next((p for p in fixtures() if p.stem == f"{method}-pretrain"), None)
    if path is None:
        pytest.skip(f"no fixture of {method}")
    fixture = Fixture(path)
    official = official_folder(fixture, tmp_path / "official")
    imported = import_official(config(fixture, official, tmp_path / "imported"))
    sizes = {k: v for k, v in fixture.overrides().items() if k in SHARED}
    finetune(
        FinetuneConfig(
            run=str(tmp_path / "run"),
            method=method,
            size="full",
            pretrained=str(imported.path),
            threads=1,
            model={**sizes, "bonus_memory": 64, "context_dropout": 0.0},
            **{**STEPS, "env_steps": 30, "eval_episodes": 0, "frozen_updates": 1_000},
        )
    )
    agent = checkpoint(tmp_path / "run")["agent"]
    rssm = "lower_rssm" if method != "prelar" else "rssm"
    weight = f"world_model.{rssm}.cell.linear.weight"
    theirs = fixture["weights/wm.rssm._cell._layer.weight"]
    assert torch.equal(agent[weight], theirs)  # frozen all along


def test_an_agent_brings_its_action_size(tmp_path):
    fixture = next((Fixture(p) for p in fixtures() if p.stem == "prelar-finetune"), None)
    if fixture is None:
        pytest.skip("no fixture of prelar fine-tuning")
    official = official_folder(fixture, tmp_path / "official")
    run = import_official(config(fixture, official, tmp_path / "run"))
    size = fixture["batch/action"].shape[-1]
    assert official_action_dim(official) == size == checkpoint(run.path)["action_dim"]
    assert run.config["camera"] == "corner"  # what evaluate.py reads


def test_what_does_not_fit_is_refused_before_a_run_folder_exists(fixture, tmp_path):
    official = official_folder(fixture, tmp_path / "official")
    cfg = config(fixture, official, tmp_path / "run")
    cfg.model["deter"] = 2 * fixture.overrides()["deter"]
    with pytest.raises(ValueError, match="does not fit"):
        import_official(cfg)
    assert not (tmp_path / "run").exists()


def test_missing_and_wrong_options_are_named(tmp_path):
    with pytest.raises(ValueError, match="official is not given"):
        import_official(ImportOfficialConfig(run=str(tmp_path / "run")))
    with pytest.raises(ValueError, match="phase='both'"):
        import_official(ImportOfficialConfig(run=str(tmp_path / "run"), phase="both"))
    with pytest.raises(FileNotFoundError, match="no official checkpoint"):
        import_official(ImportOfficialConfig(run="x", official=str(tmp_path), size="tiny"))
