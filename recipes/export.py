"""Write a run's model as a folder to hand on: weights, configuration, model card.

python recipes/export.py run=runs/pretrain out=exported
python recipes/export.py run=runs/pretrain out=exported push=owner/name

``prelar_trl.hub.load_pretrained("exported")`` reads it, and
``finetune.py pretrained=exported`` starts from it; from the Hugging Face hub
``load_pretrained("owner/name")`` and ``pretrained=hf://owner/name``.
"""

from __future__ import annotations

import sys

from prelar_trl.recipes.entry import start

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(start("export"))

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

import prelar_trl
from prelar_trl.config import loss_settings
from prelar_trl.hub import HUB, push, write_export
from prelar_trl.recipes.base_config import overrides
from prelar_trl.recipes.common import read_run
from prelar_trl.recipes.schema import ExportConfig
from prelar_trl.record import RunFolder, read_metrics
from prelar_trl.utils import read_json, without_null

PLACES = (
    "run",
    "data",
    "pretrained",
    "official",
    "resume",
)  # of the machine, and of no use elsewhere
USE = """```python
from prelar_trl.hub import load_pretrained

model = load_pretrained("{}")
```"""
OF_ONE_DIMENSION = re.compile(r"_\d+$")  # a probe's value of one of many
SHOWN = ("eval/success", "eval/return", "psnr_openloop", "action_usage", "action_psnr_gap", "loss")


def export(cfg: ExportConfig) -> Path:
    """Write the folder ``cfg.out`` from the run ``cfg.run``; returns it."""
    run, checkpoint = read_run(cfg.run, trust_code=cfg.trust_code)
    training = {
        key: value
        for key, value in without_null(run.config).items()
        if key not in PLACES and value != {}
    }
    card = model_card(cfg, run, checkpoint)
    return write_export(cfg.out, checkpoint, training, card)


def model_card(cfg: ExportConfig, run: RunFolder, checkpoint: Mapping[str, Any]) -> str:
    """What the model is, what it has learned, and how to load it, in Markdown."""
    method, phase, config = checkpoint["method"], checkpoint["phase"], run.config
    head = {
        "library_name": "prelar_trl",
        "license": cfg.license,
        "tags": ["world-model", "reinforcement-learning", "latent-actions", "torchrl", method],
    }
    name = cfg.push.partition("/")[2] if cfg.push else Path(cfg.out).name
    kind = "world model, pre-trained on video without actions"
    if phase == "finetune":
        kind = f"agent (world model, actor, critic), fine-tuned on {config.get('env')}"
    source = cfg.push or Path(cfg.out).name
    place = f"{HUB}{cfg.push}" if cfg.push else source
    facts = {
        "method": f"`{method}`, size `{checkpoint['size']}`",
        "data": cfg.videos or data_names(config),
        **training_facts(run, checkpoint),
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        f"A {kind}, made with prelar_trl.",
        table(("", ""), facts.items()),
        "## Use",
        USE.format(source),
    ]
    if phase == "pretrain":
        parts.append(
            f"Fine-tuning starts from it with `finetune.py pretrained={place} method={method} "
            f"size={checkpoint['size']}`."
        )
    if run.metrics.is_file():
        metrics = read_metrics(run.metrics)
        last = [(f"`{k}`", f"{metrics[k].values[-1]:.4g}") for k in SHOWN if k in metrics]
        parts += ["## Last metrics", table(("metric", "value"), last)]
    probed = read_json(run.path / "probe.json", missing_ok=True).get("values", {})
    whole = {k: x for k, x in probed.items() if x == x and not OF_ONE_DIMENSION.search(k)}
    values = [(f"`{k}`", f"{x:.4g}") for k, x in whole.items()]
    if values:
        parts += ["## Probes", table(("probe", "value"), values)]
    return "\n\n".join(parts) + "\n"


def training_facts(run: RunFolder, checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """How long it was trained, by what; an imported run does not know."""
    config, phase = run.config, checkpoint["phase"]
    if config.get("official") is not None:
        return {"trained": "by the authors' code, imported"}
    settings = loss_settings(checkpoint["method"], phase, overrides(config.get("loss") or {}))
    weights = {name: x for name, x in settings.weights.items() if x is not None}
    commit = (run.versions.get("git") or {}).get("commit", "unknown")
    count = f"{checkpoint['step']:,} {'updates' if phase == 'pretrain' else 'steps'}"
    return {
        "trained": f"{count}, seed {config.get('seed')}",
        "losses": ", ".join(f"`{name}` {x:g}" for name, x in weights.items()),
        "code": f"prelar_trl {prelar_trl.__version__}, commit {commit[:12]}",
    }


def data_names(config: Mapping[str, Any]) -> str:
    """The names of the clip stores or of the environment; not where they lie."""
    data = config.get("data") or config.get("env") or "unknown"
    return ", ".join(Path(str(x)).name for x in ([data] if isinstance(data, str) else data))


def table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    """A table of two columns."""
    lines = [f"| {a} | {b} |" for a, b in (head, ("---", "---"), *rows)]
    return "\n".join(lines)


def main(cfg: ExportConfig) -> None:
    """Entry point."""
    folder = export(cfg)
    print(f"exported model: {folder}")
    if cfg.push is not None:
        print(f"on the hub: {push(folder, cfg.push, private=cfg.private)}")
