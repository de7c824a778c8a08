"""Metrics and videos of a run: CSV always, TensorBoard and Weights & Biases on request."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from prelar_trl.record.run import RunFolder
from prelar_trl.record.table import CsvTable
from prelar_trl.record.video import write_video
from prelar_trl.types import Backend

Scalar = float | int | bool | Tensor


class Logger:
    """Writes the metrics and videos of one run.

    ``metrics.csv`` always, in the run folder; ``tensorboard/`` and ``wandb/`` beside it. Speed goes
    to ``times.csv``, so that ``metrics.csv`` is the same for the same seed.
    Weights & Biases works offline unless an API key is set or ``WANDB_MODE`` says otherwise.

    Args:
        run: the run's folder.
        backends: "csv" and any of "tensorboard", "wandb". CSV is written in any case.
        resume_step: the run continues after this step: what an interrupted session logged
            beyond it is dropped. Default: keep all that is there.
        project: the Weights & Biases project. Default: "prelar_trl".

    Raises:
        ValueError: unknown backend.
        ModuleNotFoundError: the package of a backend is not installed.
    """

    def __init__(
        self,
        run: RunFolder,
        backends: Sequence[Backend] = ("csv",),
        *,
        resume_step: int | None = None,
        project: str = "prelar_trl",
    ) -> None:
        check_backends(backends)
        self.run, self._resume_step = run, resume_step
        self._csv = CsvTable(run.metrics, resume_step=resume_step)
        self._times: CsvTable | None = None
        self._tensorboard = None
        self._wandb = None
        if "tensorboard" in backends:
            # Not TorchRL's logger: it cannot purge steps after a resume.
            from torch.utils.tensorboard import SummaryWriter

            purge = None if resume_step is None else resume_step + 1
            self._tensorboard = SummaryWriter(str(run.path / "tensorboard"), purge_step=purge)
        if "wandb" in backends:
            self._wandb = _open_wandb(run, project)

    def log(self, metrics: Mapping[str, Scalar], step: int) -> None:
        """Log numbers or one-element tensors. A name like "eval/success" groups by its prefix.

        Raises:
            ValueError: a value is not a number.
        """
        self._write(self._csv, metrics, step)

    def log_times(self, times: Mapping[str, Scalar], step: int) -> None:
        """As :meth:`log`, for what differs between two runs with the same seed."""
        if self._times is None:
            self._times = CsvTable(self.run.times, resume_step=self._resume_step)
        self._write(self._times, times, step)

    def _write(self, table: CsvTable, metrics: Mapping[str, Scalar], step: int) -> None:
        values = to_floats(metrics)
        table.append({"step": step, **values})
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log_metrics(values, step=step)

    def log_video(self, name: str, frames: Tensor, step: int, fps: float = 10.0) -> Path:
        """Write ``videos/<name>_<step>.mp4`` and hand it to the other backends.

        Args:
            name: e.g. "openloop"; a slash becomes an underscore in the file's name.
            frames: uint8 [T, 3, H, W].
            step: the training step.
            fps: frames a second. Default: 10.
        """
        path = self.run.videos / f"{name.replace('/', '_')}_{step:06d}.mp4"
        write_video(path, frames, fps)
        if self._tensorboard is not None:
            _add_gif(self._tensorboard, name, frames, step, fps)
        if self._wandb is not None:
            import wandb

            # As a file: an array would need moviepy.
            video = wandb.Video(str(path), format="mp4")
            self._wandb.experiment.log({f"video/{name}": video, "video/step": step})
        return path

    def close(self) -> None:
        """Flush and close all backends."""
        self._csv.close()
        if self._times is not None:
            self._times.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.experiment.finish()

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_backends(backends: Sequence[str]) -> None:
    """Raise when a backend is unknown or its package is missing; call it before long work."""
    known = get_args(Backend)
    if isinstance(backends, str):
        raise ValueError(f"logger backends must be a list, got the string {backends!r}")
    for name in backends:
        if name not in known:
            raise ValueError(f"unknown logger {name!r}: choose from {', '.join(known)}")
        if name != "csv" and find_spec(name) is None:
            raise ModuleNotFoundError(f"logger {name} needs a package: pip install {name}")


def to_floats(metrics: Mapping[str, Scalar]) -> dict[str, float]:
    """Plain floats, all tensors of one device fetched together."""
    tensors = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"metric {name!r} must be one number, got {list(value.shape)}")
            tensors[name] = value.detach().reshape(()).double()
        elif not hasattr(value, "__float__"):
            raise ValueError(f"metric {name!r} must be a number, got {value!r}")
    fetched = torch.stack([*tensors.values()]).tolist() if tensors else []
    values = {**metrics, **dict(zip(tensors, fetched, strict=True))}
    return {name: float(value) for name, value in values.items()}


def _open_wandb(run: RunFolder, project: str) -> Any:
    # Imported here, like all of an optional backend: torchrl.record alone takes seconds.
    import wandb
    from torchrl.record.loggers.wandb import WandbLogger

    folder = run.path / "wandb"
    folder.mkdir(exist_ok=True)
    note = folder / "id.txt"  # a resumed run continues the same Weights & Biases run
    if not note.exists():
        note.write_text(secrets.token_hex(4), encoding="utf-8")
    mode = os.environ.get("WANDB_MODE")
    if mode is None:
        mode = "online" if wandb.login(prompt=False) else "offline"
    return WandbLogger(
        exp_name=run.path.name,
        offline=mode != "online",
        mode=mode,
        save_dir=str(run.path),
        id=note.read_text(encoding="utf-8").strip(),
        project=project,
        log_env_packages=False,
        config=run.config,
    )


def _add_gif(writer: Any, name: str, frames: Tensor, step: int, fps: float) -> None:
    """An animated picture for TensorBoard; ``SummaryWriter.add_video`` would need moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

    images = [
        Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in frames.cpu()
    ]
    buffer = io.BytesIO()
    images[0].save(
        buffer, "gif", save_all=True, append_images=images[1:], duration=1000 / fps, loop=0
    )
    picture = Summary.Image(
        height=images[0].height,
        width=images[0].width,
        colorspace=3,
        encoded_image_string=buffer.getvalue(),
    )
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=picture)]), step)
