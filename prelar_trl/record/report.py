"""One HTML file that shows what runs did: figures, curves, videos, settings.

The file holds everything itself, works offline and needs no script.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from prelar_trl.record.plots import Series, plot_curves, read_metrics
from prelar_trl.record.run import RunFolder

MAX_EMBED_BYTES = 24 * 2**20
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
CSS = """
:root { --ink: #20242a; --soft: #667080; --line: #dfe3e8; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 64rem; color: var(--ink);
  background: #fff; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; margin: 3rem 0 .25rem; padding-top: 1.25rem;
  border-top: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 2rem 0 .6rem; }
p, figcaption, .soft { color: var(--soft); margin: 0 0 .5rem; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.25rem 0; }
.card b { display: block; font-size: 1.7rem; line-height: 1.25; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
figure { margin: 0 0 1rem; }
figure img, figure video { display: block; max-width: 100%; height: auto; border-radius: 4px; }
.media { display: flex; flex-wrap: wrap; gap: 1.25rem; align-items: flex-start; }
.media figure { max-width: 100%; }
figcaption { font-size: .85rem; margin-top: .35rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem 1.25rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
td.value { overflow-wrap: anywhere; }
details { margin: .75rem 0; border-bottom: 1px solid var(--line); padding-bottom: .75rem; }
summary { cursor: pointer; font-weight: 600; }
details table { margin-top: .5rem; }
.warn { color: #a4262c; }
"""


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
    sections = [_section(phase, members, curves) for phase, members in phases.items()]
    now = datetime.now().strftime("%d %B %Y, %H:%M")
    html = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>"
        f"<h1>{escape(title)}</h1><p>{len(folders)} "
        f"{'run' if len(folders) == 1 else 'runs'}, written on {now}</p>"
        f"{''.join(sections)}</body></html>\n"
    )
    part = path.with_name(path.name + ".part")
    part.write_text(html, encoding="utf-8")
    os.replace(part, path)
    return path


def _section(phase: str, members: list[tuple[str, RunFolder]], curves: Path) -> str:
    step_name = {"Pre-training": "update", "Fine-tuning": "environment step"}.get(phase, "step")
    metrics = {label: _metrics(folder) for label, folder in members}
    html = [f"<h2>{escape(phase)}</h2>"]
    for label, folder in members:
        html.append(f"<p>{escape(_describe(label, folder.config))}</p>")
        html.append(_cards(metrics[label], _evaluation(folder)))
    for label, folder in members:
        html.append(_media(folder, label if len(members) > 1 else ""))
    names = {name for run in metrics.values() for name in run}
    names = sorted((name for name in names if not name.endswith(BOUNDS)), key=_order)
    if names:
        html.append(f'<h3>Curves</h3>{_bands_note(metrics)}<div class="grid">')
        for name in names:
            file = curves / f"{_slug(phase)}_{_slug(name)}.png"
            plot_curves(metrics, file, [name], step_name=step_name)
            html.append(f"<figure>{_image(file, name)}</figure>")
        html.append("</div>")
        html.append(_final_table(names, metrics))
    for label, folder in members:
        html.append(_details(label, folder))
    return "".join(html)


def _cards(metrics: dict[str, Series], evaluation: dict[str, Any]) -> str:
    cards = []
    if "success" in evaluation:
        interval = next((v for k, v in evaluation.items() if "success_interval" in k), None)
        note = "Success rate"
        if "episodes" in evaluation:
            note += f", {evaluation['episodes']} episodes"
        if isinstance(interval, list) and len(interval) == 2:
            note += f" (95%: {interval[0]:.2f} to {interval[1]:.2f})"
        cards.append((_number(evaluation["success"]), note))
    if "return" in evaluation:
        cards.append((_number(evaluation["return"]), "Return of an episode"))
    for name, text in HEADLINES:
        if name in metrics and len(cards) < 4:
            values = metrics[name].values
            first, last = _number(values[0]), _number(values[-1])
            cards.append((last if len(values) == 1 else f"{first} → {last}", text))
    body = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
        for value, text in cards
    )
    return f'<div class="cards">{body}</div>' if cards else ""


def _media(folder: RunFolder, label: str) -> str:
    data = folder.config.get("data")
    sheet = Path(str(data)) / "contact_sheet.png"
    figures = []
    if data and sheet.is_file():
        figures.append((_image(sheet, "contact sheet"), "Videos it learned from"))
    for file in _newest(sorted(folder.videos.glob("*.mp4"))):
        figures.append((_video(file), _caption(file)))
    for file in _newest(sorted(folder.pictures.glob("*.png"))):
        figures.append((_image(file, _caption(file)), _caption(file)))
    if not figures:
        return ""
    heading = f"Videos and pictures{': ' + label if label else ''}"
    body = "".join(
        f"<figure>{media}<figcaption>{escape(text)}</figcaption></figure>"
        for media, text in figures
    )
    return f'<h3>{escape(heading)}</h3><div class="media">{body}</div>'


def _final_table(names: Sequence[str], metrics: dict[str, dict[str, Series]]) -> str:
    head = "".join(f"<th>{escape(label)}: first</th><th>last</th>" for label in metrics)
    rows = []
    for name in names:
        cells = []
        for run in metrics.values():
            values = run[name].values if name in run else np.array([])
            ends = (values[0], values[-1]) if len(values) else ()
            cells += [f"<td>{_number(value)}</td>" for value in ends] or ["<td></td>"] * 2
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    return (
        "<details><summary>First and last values</summary>"
        f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div></details>'
    )


def _details(label: str, folder: RunFolder) -> str:
    versions = folder.versions
    git = versions.pop("git", None)
    if git:
        versions["commit"] = git["commit"] + (" with uncommitted changes" if git["dirty"] else "")
    versions["command"] = " ".join(versions.get("command", []))
    parts = [
        ("Evaluation", _evaluation(folder)),
        ("Configuration", folder.config),
        ("Versions", versions),
    ]
    return "".join(
        f"<details><summary>{name}: {escape(label)}</summary>{_table(_flatten(value))}</details>"
        for name, value in parts
        if value
    )


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    body = "".join(
        f'<tr><th>{escape(key)}</th><td class="value">{escape(_text(value))}</td></tr>'
        for key, value in rows
    )
    return f'<div class="wide"><table>{body}</table></div>'


def _flatten(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for key, item in value.items():
        if isinstance(item, dict):
            rows += _flatten(item, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", item))
    return rows


def _metrics(folder: RunFolder) -> dict[str, Series]:
    return read_metrics(folder.metrics) if folder.metrics.is_file() else {}


def _evaluation(folder: RunFolder) -> dict[str, Any]:
    file = folder.path / "evaluation.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _bands_note(metrics: dict[str, dict[str, Series]]) -> str:
    note = "<p>Moving mean; the band is one standard deviation of the values around it.</p>"
    for label, run in metrics.items():
        bad = [name for name, series in run.items() if not np.isfinite(series.values).all()]
        if bad:
            text = f"{label}: not drawn where not finite: {', '.join(bad)}"
            note += f'<p class="warn">{escape(text)}</p>'
    return note


def _phase(config: dict[str, Any]) -> str:
    if "env_steps" in config:
        return "Fine-tuning"
    return "Pre-training" if "updates" in config else "Runs"


def _describe(label: str, config: dict[str, Any]) -> str:
    keys = ("method", "env", "size", "seed", "updates", "env_steps")
    facts = [f"{key} {config[key]}" for key in keys if isinstance(config.get(key), (str, int))]
    return ", ".join([label, *facts])


def _labels(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as it takes to tell them apart."""
    paths = [path.resolve() for path in paths]
    for depth in range(1, max(len(path.parts) for path in paths)):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _order(name: str) -> tuple[int, str]:
    for place, start in enumerate(ORDER):
        if name.startswith(start):
            return place, name
    return len(ORDER), name


def _newest(files: Sequence[Path]) -> list[Path]:
    """Of each ``<kind>_<step>`` the newest; of open-loop predictions the first before it."""
    kinds: dict[str, list[Path]] = {}
    for file in files:
        kinds.setdefault(re.sub(r"_\d+$", "", file.stem), []).append(file)
    shown = []
    for kind in sorted(kinds, key=lambda kind: (not kind.startswith("openloop"), kind)):
        members = sorted(kinds[kind], key=_step)
        if kind.startswith("openloop") and len(members) > 1:
            shown.append(members[0])
        shown.append(members[-1])
    return shown


def _step(file: Path) -> int:
    match = re.search(r"_(\d+)$", file.stem)
    return int(match[1]) if match else 0


def _caption(file: Path) -> str:
    kind = re.sub(r"_\d+$", "", file.stem)
    name = {"openloop": "Open-loop prediction", "eval": "Evaluation episode"}.get(
        kind, _title(kind)
    )
    return f"{name}, step {_step(file):,}" if kind != file.stem else name


def _video(file: Path) -> str:
    size = file.stat().st_size
    if size > MAX_EMBED_BYTES:
        return f"<p>{escape(str(file))} ({size / 2**20:.0f} MiB) is too large to embed</p>"
    data = base64.b64encode(file.read_bytes()).decode()
    return (
        "<video controls autoplay loop muted playsinline "
        f'src="data:video/mp4;base64,{data}"></video>'
    )


def _image(file: Path, text: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'


def _text(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return "–" if value is None else str(value)


def _number(value: float) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if np.isfinite(value) and value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def _title(name: str) -> str:
    words = name.replace("_", " ").replace("psnr", "PSNR")
    return words[:1].upper() + words[1:]
