"""Turn a checkpoint of the authors' code into a run folder, or a run into such a checkpoint.

python recipes/import_official.py official=their/run method=prelar run=runs/imported
python recipes/finetune.py env=metaworld/drawer-open pretrained=runs/imported run=runs/finetune

python recipes/import_official.py export=their/folder run=runs/pretrain
"""

from __future__ import annotations

import sys

from prelar_trl.recipes.entry import start

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(start("import_official"))

from dataclasses import asdict
from typing import cast

from prelar_trl.checkpoint import save_checkpoint
from prelar_trl.checkpoint_files import LAST
from prelar_trl.config import Phase, model_settings
from prelar_trl.hub import STATE
from prelar_trl.models import make_model
from prelar_trl.official import (
    load_official_checkpoint,
    official_action_dim,
    save_official_checkpoint,
)
from prelar_trl.pretrained import load_weights
from prelar_trl.recipes.base_config import overrides, plain
from prelar_trl.recipes.common import read_run
from prelar_trl.recipes.schema import ImportOfficialConfig
from prelar_trl.record import RunFolder

AS_PUBLISHED = {"camera": "corner", "render_quality": "full", "action_repeat": 1, "max_steps": None}


def import_official(cfg: ImportOfficialConfig) -> RunFolder:
    """Make the run folder ``cfg.run`` from the folder ``cfg.official``.

    A pre-training run serves ``finetune.py pretrained=``, a fine-tuning run ``evaluate.py run=``.
    Neither can be continued: the authors' files hold no optimizer.
    """
    if cfg.official is None:
        raise ValueError("official is not given: add official=<folder of variables.pt>")
    state = {
        "phase": cfg.phase,
        "method": cfg.method,
        "size": cfg.size,
        "overrides": asdict(
            model_settings(cfg.method, cast(Phase, cfg.phase), cfg.size, overrides(cfg.model))
        ),
        "step": 0,  # theirs is not in the files
    }
    if cfg.phase == "finetune":
        state["action_dim"] = official_action_dim(cfg.official)
    model = make_model(state)
    load_official_checkpoint(cfg.official, model)
    config = plain(asdict(cfg))
    if cfg.phase == "finetune":
        config |= AS_PUBLISHED
    run = RunFolder.create(cfg.run, config)
    state[STATE[cfg.phase]] = model.state_dict()
    with run:
        save_checkpoint(run.checkpoints / LAST, state)
    return run


def export_official(run: str, folder: str, *, trust_code: bool = False) -> None:
    """Write the weights of a run as the authors' code reads them."""
    _, checkpoint = read_run(run, trust_code=trust_code)
    model = make_model(checkpoint)
    load_weights(model, checkpoint[STATE[checkpoint["phase"]]], f"run={run}")
    save_official_checkpoint(folder, model)


def main(cfg: ImportOfficialConfig) -> None:
    """Entry point."""
    if cfg.export is not None:
        export_official(cfg.run, cfg.export, trust_code=cfg.trust_code)
        print(f"official checkpoint: {cfg.export}/variables.pt")
        return
    run = import_official(cfg)
    use = "finetune.py pretrained=" if cfg.phase == "pretrain" else "evaluate.py run="
    print(f"imported {cfg.method}, {cfg.phase}: {run.path}, for {use}{run.path}")
