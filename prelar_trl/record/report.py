"""One HTML file that shows what runs did: figures, curves, videos, settings.

The file holds everything itself, works offline and needs no script.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from prelar_trl.record.learning_curves import EvaluatedRun, write_learning_curves
from prelar_trl.record.plots import Series, plot_curves, read_metrics
from prelar_trl.record.run import RunFolder
from prelar_trl.utils import atomic_write, dotted, read_json

MAX_EMBED_MEBIBYTES = 24
# Metrics shown large at the top of a section, by the first name that a run has.
HEADLINES = (
    ("eval/success", "Evaluation success"),
    ("eval/return", "Evaluation return"),
    ("train/return", "Episode return"),
    ("psnr_openloop", "Open-loop PSNR, dB"),
    ("action_usage", "Use of latent actions, 0 is chance"),
    ("loss_image", "Image loss"),
)
ORDER = ("eval/", "train/", "psnr", "action_usage", "action_psnr_gap", "loss")  # of the curves
CAPTIONS = {"openloop": "Open-loop prediction", "eval": "Evaluation episode"}
STEP = re.compile(r"\d{6,}")  # of a training, in names of videos and pictures
BOUNDS = ("_low", "_high")  # of an interval: in metrics.csv, but no curve of their own


def html_report(
    path: str | os.PathLike[str],
    runs: Sequence[str | os.PathLike[str]],
    *,
    title: str = "Training report",
) -> Path:
    """Write the report of run folders, and each curve as a png in ``<name>_curves/`` beside it.

    Runs of one phase are compared in the same panels. Of each kind of video and picture the
    newest is shown, of predictions the first as well.

    Args:
        path: the HTML file; replaced when it exists.
        runs: run folders.
        title: the heading.

    Raises:
        ValueError: no runs.
        FileNotFoundError: a folder is missing or is not a run.
    """
    path = Path(path)
    if not runs:
        raise ValueError("a report needs at least one run folder")
    folders = [RunFolder.load(run) for run in runs]
    labels = _labels([folder.path for folder in folders])
    phases: dict[str, list[tuple[str, RunFolder]]] = {}
    for label, folder in zip(labels, folders, strict=True):
        phases.setdefault(_phase(folder.config), []).append((label, folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    curves = path.parent / f"{path.stem}_curves"
    return _write_page(
        path,
        "report.html.j2",
        title=title,
        num_runs=len(folders),
        max_mebibytes=MAX_EMBED_MEBIBYTES,
        sections=[_section(phase, members, curves) for phase, members in phases.items()],
    )


def curves_page(
    path: str | os.PathLike[str],
    runs: Sequence[EvaluatedRun],
    *,
    title: str = "Learning curves",
    at: Sequence[int] | None = None,
    baseline: str | None = None,
) -> Path:
    """Write the comparison of runs as one page; pictures and tables lie in ``<name>_curves/``.

    Args:
        path: the HTML file; replaced when it exists.
        runs: all of them, references too.
        title: the heading.
        at, baseline: as in :func:`write_learning_curves`, which raises as it does.
    """
    path = Path(path)
    folder = path.parent / f"{path.stem}_curves"
    sections = write_learning_curves(runs, folder, at=at, baseline=baseline)
    groups = list(dict.fromkeys(run.group for run in runs if not run.reference))
    return _write_page(
        path,
        "curves.html.j2",
        title=title,
        num_runs=sum(not run.reference for run in runs),
        groups=groups,
        references=list(dict.fromkeys(run.group for run in runs if run.reference)),
        sections=sections,
        baseline=baseline or ("dreamerv2" if "dreamerv2" in groups else groups[0]),
    )


def _write_page(path: Path, template: str, **values: Any) -> Path:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda file: base64.b64encode(file.read_bytes()).decode()
    environment.filters["text"] = _text
    now = datetime.now().strftime("%d %B %Y, %H:%M")
    html = environment.get_template(template).render(now=now, **values)
    with atomic_write(path) as part:
        part.write_text(html, encoding="utf-8")
    return path


def _section(phase: str, members: list[tuple[str, RunFolder]], curves: Path) -> dict[str, Any]:
    """What the template shows of the runs of one phase; the curves are drawn."""
    step_name = {"Pre-training": "update", "Fine-tuning": "environment step"}.get(phase, "step")
    runs = [_run(label, folder) for label, folder in members]
    metrics = {run["label"]: run["metrics"] for run in runs}
    names = {name for run in metrics.values() for name in run if not name.endswith(BOUNDS)}
    files = {}
    for name in sorted(names, key=_order):
        files[name] = curves / f"{_slug(phase)}_{_slug(name)}.png"
        plot_curves(metrics, files[name], [name], step_name=step_name)
    return {"phase": phase, "runs": runs, "curves": files}


def _run(label: str, folder: RunFolder) -> dict[str, Any]:
    metrics = read_metrics(folder.metrics) if folder.metrics.is_file() else {}
    evaluation = read_json(folder.path / "evaluation.json", missing_ok=True)
    versions = folder.versions
    git = versions.pop("git", None)
    if git:
        versions["commit"] = git["commit"] + (" with uncommitted changes" if git["dirty"] else "")
    versions["command"] = " ".join(versions.get("command", []))
    config = folder.config
    tables = {"Evaluation": evaluation, "Configuration": config, "Versions": versions}
    keys = ("method", "env", "size", "seed", "updates", "env_steps")
    facts = [f"{key} {config[key]}" for key in keys if isinstance(config.get(key), (str, int))]
    return {
        "label": label,
        "description": ", ".join([label, *facts]),
        "metrics": metrics,
        "not_finite": [name for name, x in metrics.items() if not np.isfinite(x.values).all()],
        "cards": _cards(metrics, evaluation),
        "media": _media(folder),
        "tables": {name: list(dotted(table).items()) for name, table in tables.items()},
    }


def _cards(metrics: dict[str, Series], evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """Up to four numbers that are shown large, and what they are."""
    cards = []
    if "success" in evaluation:
        interval = next((v for k, v in evaluation.items() if "success_interval" in k), None)
        note = "Success rate"
        if "episodes" in evaluation:
            note += f", {evaluation['episodes']} episodes"
        if isinstance(interval, list) and len(interval) == 2:
            note += f" (95%: {interval[0]:.2f} to {interval[1]:.2f})"
        cards.append((_text(evaluation["success"]), note))
    if "return" in evaluation:
        cards.append((_text(evaluation["return"]), "Return of an episode"))
    for name, text in HEADLINES:
        if name in metrics and len(cards) < 4:
            values = metrics[name].values
            first, last = _text(values[0]), _text(values[-1])
            cards.append((last if len(values) == 1 else f"{first} → {last}", text))
    return cards


def _media(folder: RunFolder) -> list[tuple[Path, str]]:
    """Pictures and videos with their captions."""
    data = folder.config.get("data")
    sheet = Path(str(data)) / "contact_sheet.png"
    shown = [(sheet, "Videos it learned from")] if data and sheet.is_file() else []
    return shown + _newest(folder.videos.glob("*.mp4")) + _newest(folder.pictures.glob("*.png"))


def _phase(config: dict[str, Any]) -> str:
    if "env_steps" in config:
        return "Fine-tuning"
    return "Pre-training" if "updates" in config else "Runs"


def _labels(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as it takes to tell them apart."""
    paths = [path.resolve() for path in paths]
    for depth in range(1, max(len(path.parts) for path in paths)):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _order(name: str) -> tuple[int, str]:
    places = (place for place, start in enumerate(ORDER) if name.startswith(start))
    return next(places, len(ORDER)), name


def _newest(files: Iterable[Path]) -> list[tuple[Path, str]]:
    """Of each ``<kind>_<step>`` the newest; of open-loop predictions the first before it."""
    kinds: dict[str, list[tuple[int, Path]]] = {}
    for file in files:
        kind, _, step = file.stem.rpartition("_")
        kind, number = (kind, int(step)) if STEP.fullmatch(step) else (file.stem, -1)
        kinds.setdefault(kind, []).append((number, file))
    shown = []
    for kind in sorted(kinds, key=lambda kind: (not kind.startswith("openloop"), kind)):
        members = sorted(kinds[kind])
        first = members[:1] if kind.startswith("openloop") and len(members) > 1 else []
        words = kind.replace("_", " ").replace("psnr", "PSNR")
        name = CAPTIONS.get(kind, words[:1].upper() + words[1:])
        for step, file in [*first, members[-1]]:
            shown.append((file, name if step < 0 else f"{name}, step {step:,}"))
    return shown


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    if np.isfinite(value) and value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
