"""Evaluated runs from disk: run folders, what a sweep keeps of them, and files of others."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prelar_trl.record.learning_curves import EvaluatedRun
from prelar_trl.record.plots import read_metrics, to_series
from prelar_trl.record.run import RunFolder
from prelar_trl.utils import read_json

SCORES = ("success", "return")
CONFIG = "config.yaml"  # of a run folder


def read_runs(paths: Iterable[str | os.PathLike[str]], group: str) -> list[EvaluatedRun]:
    """The fine-tuning runs in some folders, in the order of their names.

    Args:
        paths: run folders; or folders at any depth in which such lie, or the ``<run>.json`` and
            ``<run>.csv`` that a sweep keeps of finished ones. Runs without an evaluation, such as
            those of pre-training, and what a checkout of code holds are left out.
        group: key of the configuration whose value says what a run is compared as, e.g. ``method``
            or ``model.latent_action``; ``variant`` for the runs of a sweep's results.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: no run was evaluated, or one has no such key.
    """
    runs, folders = [], [Path(path) for path in paths]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder")
    files = {file.resolve(): file for folder in folders for file in _run_files(folder)}
    for file in files.values():
        made = file.with_suffix(".json")
        if file.name == CONFIG:
            run = RunFolder.load(file.parent)
            metrics = read_metrics(run.metrics) if run.metrics.is_file() else {}
            scores = {x: metrics[f"eval/{x}"] for x in SCORES if f"eval/{x}" in metrics}
            config = run.config
        elif "config" in (known := read_json(made, missing_ok=True)):
            config = {**known["config"], "variant": known.get("variant")}
            scores = {x: y for x, y in read_metrics(file).items() if x in SCORES}
        else:
            continue
        if scores:
            task = str(config.get("env", "task")).rpartition("/")[2]
            runs.append(EvaluatedRun(_value(config, group, file), task, scores))
    if not runs:
        raise ValueError(f"no evaluated run in {', '.join(map(str, folders))}")
    return runs


def _run_files(folder: Path) -> list[Path]:
    """The ``config.yaml`` and CSV files in a folder, without those of checkouts that lie in it."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not Path(place, name, ".git").exists()]
        found += [Path(place, name) for name in names if name == CONFIG or name.endswith(".csv")]
    return sorted(found)


def _value(config: Mapping[str, Any], key: str, file: Path) -> str:
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"{file.parent} has no config key {key}")
        value = value[part]
    name = key.rpartition(".")[2]
    return value if isinstance(value, str) else f"{name}={value}"


def read_reference(path: str | os.PathLike[str], name: str) -> list[EvaluatedRun]:
    """Runs of others from a CSV file with the columns method, task, seed, env_step and scores.

    Args:
        path: the file; every further column is a score, such as ``success``.
        name: says in tables and legends whose they are; goes after the method.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, or a cell is no number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"reference {path} does not exist")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns, rows = list(reader.fieldnames or ()), list(reader)
    needed = ("method", "task", "seed", "env_step")
    missing = [column for column in needed if column not in columns]
    scores = [column for column in columns if column not in needed]
    if missing or not scores:
        raise ValueError(
            f"reference {path} has no column {missing[0] if missing else 'with a score'}: there "
            f"must be {', '.join(needed)} and scores such as success"
        )
    runs: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in (row for row in rows if any(row[score] for score in scores)):
        runs.setdefault((row["method"], row["task"], row["seed"]), []).append(row)
    try:
        found = []
        for (method, task, _), lines in runs.items():
            lines.sort(key=lambda line: float(line["env_step"]))
            series = to_series(lines, "env_step", scores)
            found.append(EvaluatedRun(f"{method} ({name})", task, series, reference=True))
        return found
    except ValueError as error:
        raise ValueError(f"reference {path}: {error}") from None
