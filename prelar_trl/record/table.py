"""CSV files of numbers by step, and what is left of them after a loss of power."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prelar_trl.utils import atomic_write

logger = logging.getLogger(__name__)


class CsvTable:
    """A CSV file with a "step" column that grows by rows and, when new names come, by columns.

    Each row is in the file when :meth:`append` returns. What :func:`read_rows` drops is gone when
    the file is opened again.

    Args:
        path: the file; made when missing.
        resume_step: rows with a larger step are dropped.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self.path, self.columns, rows = path, ["step"], []
        if path.exists() and path.stat().st_size:
            self.columns, rows = read_rows(path)
        self._open([x for x in rows if resume_step is None or float(x["step"]) <= resume_step])

    def _open(self, rows: Iterable[Mapping[str, str]]) -> None:
        cells = ([row.get(name) for name in self.columns] for row in rows)
        write_csv(self.path, self.columns, cells, sync=True)
        self._file = open(self.path, "a", newline="", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; names that are missing in it stay empty."""
        new = [name for name in row if name not in self.columns]
        if new:
            self._file.close()
            _, rows = read_rows(self.path)
            self.columns += new
            self._open(rows)
        csv.DictWriter(self._file, self.columns).writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def write_csv(
    path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]], *, sync: bool = False
) -> None:
    """Write a whole CSV file, numbers with six digits, None as an empty cell.

    ``sync``: as in :func:`prelar_trl.utils.atomic_write`.
    """
    with (
        atomic_write(path, sync=sync) as part,
        open(part, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in row])


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a file of metrics.

    The half-written last line of a killed process is left out. So is, with a warning, a line that
    is no row of numbers, as a loss of power leaves them.

    Raises:
        ValueError: it has no column "step".
    """
    header, *lines = path.read_bytes().split(b"\n")[:-1] or [b""]
    columns: list[str] = []
    with suppress(csv.Error):  # no text at all
        columns = next(csv.reader([header.decode("utf-8", "replace")]), columns)
    if "step" not in columns:
        raise ValueError(f"{path} is not a file of metrics: it has no column step")
    rows = [row for line in lines if (row := _row(line, columns))]
    if len(rows) < len(lines):
        logger.warning("%s: left out %d damaged lines", path, len(lines) - len(rows))
    return columns, rows


def _row(line: bytes, columns: Sequence[str]) -> dict[str, str] | None:
    """The cells by column, if each is a number or empty, and the step is a number."""
    cells = line.decode("utf-8", "replace").rstrip("\r").split(",")
    try:
        row = dict(zip(columns, cells, strict=True))
        for cell in (row["step"], *filter(None, cells)):
            float(cell)
    except ValueError:
        return None
    return row
