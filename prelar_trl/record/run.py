"""The folder of one run: where it lies, what made it, and what it needs."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import weakref
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from prelar_trl.utils import atomic_write, git_state, lock_folder, one_line, read_json, write_json

PACKAGES = ("prelar_trl", "torch", "torchrl", "tensordict", "numpy", "gymnasium", "metaworld")
PACKAGES += ("mujoco", "dm_control", "hydra-core", "wandb")
MEBIBYTE = 2**20
# Of a run folder, those with a number of further processes; config.yaml last, by which it is known.
CONTENTS = ("checkpoints", "videos", "pictures", "replay", "replay-*", "tensorboard", "wandb")
CONTENTS += ("metrics.csv", "times.csv", "not_finite.pt", "not_finite-*.pt")
CONTENTS += ("versions.json", "config.yaml")
CHECKPOINT = re.compile(r"last|(last|step)_\d+")  # name of one that a run can go on from


class RunFolder:
    """The folder of one run.

    Make one with :meth:`create`, open an existing one with :meth:`load`. Who writes into it locks
    it; ``with run:`` unlocks it at the end::

        run = RunFolder.load("runs/a")
        run.lock()
        with run: ...

    Attributes:
        path: the folder; ``config.yaml`` and ``versions.json`` in it say what made the run.
        config: the configuration that the run was started with.
        metrics: ``metrics.csv``.
        times: ``times.csv``, speed and where the time went (fine-tuning).
        checkpoints: their folder.
        videos: the folder of mp4 videos.
        pictures: the folder of png pictures.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config
        self.metrics, self.times = path / "metrics.csv", path / "times.csv"
        self.checkpoints, self.videos = path / "checkpoints", path / "videos"
        self.pictures = path / "pictures"
        self._unlock: weakref.finalize | None = None

    def lock(self) -> None:
        """Become the folder's only writer, until :meth:`unlock` or the end of the process.

        Raises:
            BlockingIOError: another run is writing there.
        """
        try:
            handle = lock_folder(self.path)
        except BlockingIOError:
            raise BlockingIOError(
                f"another process is writing to run folder {self.path}: wait for it or stop it"
            ) from None
        self._unlock = weakref.finalize(self, os.close, handle)

    def unlock(self) -> None:
        """Let others write."""
        if self._unlock is not None:
            self._unlock()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        need_bytes: int = 256 * MEBIBYTE,
    ) -> RunFolder:
        """Make a new run folder, lock it, and write what identifies the run.

        Args:
            path: the folder; it must not exist or be empty.
            config: plain values only (numbers, strings, lists, dicts), fully resolved.
            need_bytes: free space that the run will need. Default: 256 MiB.

        Raises:
            FileExistsError: the folder holds a run or other files.
            NotADirectoryError: the path, or one above it, is a file or a link to nothing.
            OSError: it cannot be written, or the disk has too little space.
            ValueError: the config holds something that YAML cannot.
        """
        path = Path(path).expanduser()
        _check_free(path)
        check_space(path, need_bytes)
        run = cls(path, {})
        run._write(config)
        run.lock()
        return run

    def restart(self, config: Mapping[str, Any]) -> None:
        """Make this folder that of a new run: what the run has put into it is deleted.

        What else lies there, such as a scheduler's log, stays.

        Raises:
            FileExistsError: the run has a checkpoint.
        """
        kept = [x for x in self.checkpoints.glob("*.pt") if CHECKPOINT.fullmatch(x.stem)]
        if kept:
            raise FileExistsError(
                f"run folder {self.path} holds checkpoints, so it is not started anew: copy "
                f"{max(kept).name} to checkpoints/last.pt to continue there, or remove the folder"
            )
        for place in [place for name in CONTENTS for place in self.path.glob(name)]:
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        self._write(config)

    def _write(self, config: Mapping[str, Any]) -> None:
        """What identifies a run; see `create`."""
        path, self.config = self.path, dict(config)
        try:
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
        except yaml.YAMLError as error:
            raise ValueError(
                f"config of run {path} holds a value that is not plain: {one_line(error)}"
            ) from None
        record = describe_session(self.config.get("seed"))
        try:
            path.mkdir(parents=True, exist_ok=True)
            with open(path / "config.yaml", "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            for folder in ("checkpoints", "videos", "pictures"):
                (path / folder).mkdir()
            write_json(path / "versions.json", record, sync=True)
        except FileExistsError:
            raise FileExistsError(f"run folder {path} was taken by another run just now") from None
        except OSError as error:
            raise type(error)(
                f"run folder {path} cannot be written ({error.strerror}): choose another folder"
            ) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Open the folder of an existing run; nothing is written.

        Raises:
            FileNotFoundError: no folder, or no ``config.yaml`` in it.
            ValueError: its ``config.yaml`` is damaged, or holds more than plain data.
        """
        path = Path(path).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"run folder {path} does not exist")
        if not (path / "config.yaml").is_file():
            raise FileNotFoundError(f"{path} is not a run folder: it has no config.yaml")
        try:
            config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path / 'config.yaml'} is damaged: {one_line(error)}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path / 'config.yaml'} is no configuration: it must be a mapping")
        return cls(path, config)

    def note_continuation(self, step: int, changed: Mapping[str, Any] | None = None) -> None:
        """Add to ``versions.json`` that a session continues this run after ``step`` steps.

        ``changed`` are settings that the session changes; ``config.yaml`` gets them too.
        """
        record = self.versions
        session = {"step": step, **describe_session(record.get("seed"))}
        if changed:
            session["changed"] = dict(changed)
            self.config = {**self.config, **changed}
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            with atomic_write(self.path / "config.yaml") as part:
                part.write_text(text, encoding="utf-8")
        record.setdefault("continued", []).append(session)
        write_json(self.path / "versions.json", record, sync=True)

    @property
    def versions(self) -> dict[str, Any]:
        """Package versions, git state, seed, command and start time of the run."""
        return read_json(self.path / "versions.json")


def describe_session(seed: int | None = None) -> dict[str, Any]:
    """What made this process: versions, git state, command line, machine, seed, UTC time."""
    packages = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {
        "seed": seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": git_state(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "packages": packages,
    }


def check_space(path: str | os.PathLike[str], need_bytes: int) -> None:
    """Raise OSError when the disk under ``path`` (which need not exist) has less free space."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    have = shutil.disk_usage(place).free
    if have < need_bytes:
        raise OSError(
            f"not enough space for {path}: need {need_bytes / MEBIBYTE:.0f} MiB, have "
            f"{have / MEBIBYTE:.0f} MiB; free some or choose another disk"
        )


def _check_free(path: Path) -> None:
    for place in (path, *path.absolute().parents):
        if os.path.lexists(place) and not place.is_dir():
            what = "a file" if place.exists() else "a link to nothing"
            raise NotADirectoryError(f"run folder {path}: {place} is {what}; choose another path")
    if (path / "config.yaml").exists():
        raise FileExistsError(f"run folder {path} already holds a run: choose another folder")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"folder {path} holds files of something else: choose another one")
