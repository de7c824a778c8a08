"""Every experiment file is a whole command; the command line wins over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException

from prelar_trl.config import model_settings
from prelar_trl.models import make_world_model, make_world_model_loss
from prelar_trl.recipes.base_config import overrides
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.pretrain import pretrain
from tests.toy_runs import FINETUNE_ARGS, PRETRAIN_ARGS, ROOT, TINY, configured

FOLDER = ROOT / "configs" / "experiment"
SWEEPS = sorted(path.stem for path in FOLDER.glob("*.yaml") if "# sweep.py:" in path.read_text())
FILES = sorted({path.stem for path in FOLDER.glob("*.yaml")} - set(SWEEPS))


PRIOR = {"prior_std": 1.2449187}


def recipe_of(name: str) -> str:
    return "finetune" if name.endswith(("_metaworld", "_atari")) else "pretrain"


def composed(name: str, *given: str) -> Any:
    return configured(recipe_of(name), f"experiment={name}", *given)


@pytest.mark.parametrize("name", FILES)
def test_an_experiment_is_a_whole_command_of_its_recipe(name):
    cfg = composed(name)
    model_settings(cfg.method, recipe_of(name), cfg.size, overrides(cfg.model))
    assert cfg.size == "full"
    assert cfg.run.startswith(f"runs/{name}")
    if recipe_of(name) == "finetune":
        pretrained = None if cfg.method == "dreamerv2" else composed(Path(cfg.pretrained).name)
        assert pretrained is None or pretrained.run == cfg.pretrained


def test_every_experiment_is_in_the_table():
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in FILES + SWEEPS if f"experiment={name}" not in table] == []


def test_the_command_line_wins_over_the_experiment_and_that_over_the_preset():
    plain = composed("prelar_rlbench")
    assert (plain.loss["consistency"], plain.model["latent_action_options"]) == ("sign", PRIOR)
    changed = composed("prelar_rlbench", "loss.consistency=soft", "size=tiny", "updates=7")
    assert (changed.loss["consistency"], changed.size, changed.updates) == ("soft", "tiny", 7)
    assert changed.model["latent_action_options"] == PRIOR
    assert composed("prelar_rlbench", "method=prelar_no_cl").method == "prelar_no_cl"


def test_differences_between_papers_and_commands():
    cfg = composed("apv_paper_rlbench")
    model = make_world_model("apv", "pretrain", action_dim=0, size="tiny", **TINY)
    loss = make_world_model_loss(cfg.method, "pretrain", model, **overrides(cfg.loss))
    assert loss.weights == {"image": 1.0, "kl": 0.1}
    assert composed("contextwm_paper_something").updates == 1_200_000
    assert composed("contextwm_paper_metaworld").model["augmentation"] == "erasing"


def test_an_unknown_experiment_is_refused():
    with pytest.raises(HydraException, match="nonsense"):
        composed("nonsense")


def test_a_published_command_runs_at_a_tiny_size(clips, tmp_path):
    runs = tmp_path / "runs"
    tiny = [*PRETRAIN_ARGS, f"data={clips}", f"run={runs}/a", "updates=1"]
    pretrain(composed("prelar_rlbench", *tiny))
    tiny = [*FINETUNE_ARGS, f"pretrained={runs}/a", f"run={runs}/b", "camera=null"]
    finetune(composed("prelar_metaworld", *tiny, "env_steps=30", "eval_episodes=0"))
    assert (runs / "b" / "checkpoints" / "last.pt").is_file()
