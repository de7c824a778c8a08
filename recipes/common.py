"""What the recipes share: devices, seeds, run folders, evaluation episodes."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.envs import EnvBase

from prelar_trl.checkpoint import (
    has_checkpoint,
    load_checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
)
from prelar_trl.checkpoint_files import LAST
from prelar_trl.config import named_modules
from prelar_trl.distributed import distribute
from prelar_trl.fast import CompileMode, compile_update, skip_on_device, use_tensor_cores
from prelar_trl.recipes.base_config import plain
from prelar_trl.recipes.processes import ALONE, Processes
from prelar_trl.recipes.resume import changed_settings
from prelar_trl.recipes.schema import RunConfig
from prelar_trl.recipes.signals import GROUP_SIGNALS
from prelar_trl.record import Logger, RunFolder, check_backends, wilson_interval
from prelar_trl.types import Backend
from prelar_trl.updates import Update
from prelar_trl.utils import atomic_write, hold_signals

FILM_FRAMES = 2_000  # of one episode in memory, 25 MB; an episode may have no end
MARGIN_BYTES = 64 * 2**20  # metrics, videos, pictures


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is a GPU; without a number, torchrun's processes take one each.

    That GPU becomes the current one, where what names no device goes, and may use its tensor cores
    for float32.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: torch sees no GPU here; use device=cpu")
    if device.index >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}: torch sees only {torch.cuda.device_count()} GPUs here")
    torch.cuda.set_device(device)
    use_tensor_cores(device)
    return device


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def chosen_loggers(logger: str | Sequence[str]) -> tuple[Backend, ...]:
    """The names of the loggers, each of which can be used."""
    loggers = (logger,) if isinstance(logger, str) else tuple(logger)
    check_backends(loggers)
    return cast(tuple[Backend, ...], loggers)


def open_run(
    cfg: RunConfig,
    module: nn.Module,
    data_bytes: int = 0,
    restart: bool = False,
    processes: Processes = ALONE,
) -> tuple[RunFolder, dict[str, Any] | None]:
    """The run folder, and the checkpoint to continue from (``resume=true``), or None.

    The folder is locked. There must be space for the checkpoints of ``module`` with Adam's two
    moments, the best and one that is being written among them, and for ``data_bytes`` of a replay.
    With ``restart`` a run that was stopped before its first checkpoint starts anew.
    The first of several processes makes or checks it, then the others follow.
    """
    if not processes.first:
        processes.wait()
        run = RunFolder.load(cfg.run)
        return run, load_newest_checkpoint(run.checkpoints / LAST) if cfg.resume else None
    opened = continue_run(cfg) if cfg.resume else make_run(cfg, module, data_bytes, restart)
    processes.wait()
    return opened


def make_run(
    cfg: RunConfig, module: nn.Module, data_bytes: int, restart: bool
) -> tuple[RunFolder, None]:
    """A new run folder, with space for what it will hold."""
    exists = (Path(cfg.run) / "config.yaml").exists()
    if exists and not restart:
        raise FileExistsError(
            f"run folder {cfg.run} already holds a run: continue it with resume=true, or "
            "choose another folder"
        )
    if exists:
        run = RunFolder.load(cfg.run)
        with locked(run):
            if run.config:  # empty: killed while it was written
                changed_settings(run, cfg)
            run.restart(plain(asdict(cfg)))
        return run, None
    state = sum(x.numel() * x.element_size() for x in module.state_dict().values())
    need = (cfg.keep + 2) * 3 * state + data_bytes + MARGIN_BYTES
    return RunFolder.create(cfg.run, plain(asdict(cfg)), need_bytes=need), None


def continue_run(cfg: RunConfig) -> tuple[RunFolder, dict[str, Any]]:
    """The run in the folder, and its checkpoint."""
    run = RunFolder.load(cfg.run)
    with locked(run):
        changed_settings(run, cfg)
        if not has_checkpoint(run.checkpoints / LAST):
            raise FileNotFoundError(
                f"the run in {cfg.run} was stopped before its first checkpoint: start it anew "
                "with resume=auto"
            )
        return run, load_newest_checkpoint(run.checkpoints / LAST)


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Locks a run, which stays locked unless what is inside fails."""
    run.lock()
    try:
        yield
    except BaseException:
        run.unlock()
        raise


def read_run(
    path: str,
    *,
    trust_code: bool,
    checkpoint: str = LAST,
    typed: Mapping[str, Any] | None = None,
) -> tuple[RunFolder, dict[str, Any]]:
    """A run folder that may come from anybody, and a checkpoint of it.

    With ``trust_code`` its model may be made by a module that the folder names; what this command
    names itself, ``typed``, needs no trust.

    Raises:
        FileNotFoundError, ValueError: none, damage, or code that is not trusted.
    """
    run = RunFolder.load(path)
    state = load_checkpoint(run.checkpoints / checkpoint)
    for name, kind in named_modules(state.get("overrides", {})).items():
        trusted = trust_code or kind == (typed or {}).get(name)
        check_trust(path, f"model.{name}", kind, trusted)
    return run, state


def check_trust(run: str, name: str, value: Any, trust_code: bool) -> None:
    """Refuse a setting of a run folder that names a module, whose import would run its code."""
    if ":" in str(value) and not trust_code:
        raise ValueError(
            f"run folder {run} has {name}={value}, which runs the code of that module: if you "
            "trust it, add trust_code=true"
        )


def save_run(cfg: Any, run: RunFolder, state: dict[str, Any], before: int) -> None:
    """Write the newest checkpoint, and one that stays if a multiple of ``keep_every`` was passed.

    ``before`` is the step of the checkpoint before it; the state's own is ``state["step"]``.
    """
    keep = cfg.keep if state["step"] > before else None  # the same step again takes its own place
    path = save_checkpoint(run.checkpoints / LAST, state, keep=keep)
    if cfg.keep_every and crossed(before, state["step"], cfg.keep_every):
        place = path.with_name(checkpoint_file(f"step_{state['step']}"))
        with atomic_write(place, sync=True) as part:
            shutil.copyfile(path, part)


def checkpoint_file(name: str) -> str:
    """The file of the checkpoint ``last``, ``best`` or ``step_<number>``."""
    kind, _, number = name.partition("_")
    if kind == "step" and number.isdecimal():
        name = f"step_{int(number):08d}"
    return f"{name}.pt"


def crossed(before: int, now: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, now]."""
    return now // every > before // every


def prepare_update(
    update: Update, mode: CompileMode, processes: Processes, overlap: bool = True
) -> None:
    """Compile an update or, for several processes, let it train on their joint batches.

    Raises:
        ValueError: compiling is asked for with several processes, whose exchange is not traced.
    """
    skip_on_device(update)
    if processes.group is None:
        compile_update(update, mode)
        if mode == "on":  # the first Ctrl-C waits, too
            name = type(update).__name__
            print(f"compiling {name}: its first two calls take minutes; compile=off starts at once")
    elif mode == "on":
        raise ValueError("compile=on: several processes cannot compile yet; use compile=auto")
    distribute(update, processes.group, overlap=overlap)


def note_continuation(
    cfg: RunConfig,
    run: RunFolder,
    checkpoint: Mapping | None,
    processes: Processes = ALONE,
) -> None:
    """Note in its folder that a run goes on from a checkpoint, and with which other settings."""
    if checkpoint is not None and processes.first:
        run.note_continuation(checkpoint["step"], changed_settings(run, cfg))


def open_logger(
    run: RunFolder,
    loggers: tuple[Backend, ...],
    checkpoint: Mapping | None,
    processes: Processes = ALONE,
) -> Logger:
    """The run's logger; after a checkpoint it continues from its step.

    Of several processes only the first one's writes.
    """
    if not processes.first:
        return NoLogger(run)
    return Logger(run, loggers, resume_step=checkpoint["step"] if checkpoint else None)


class NoLogger(Logger):
    """Writes nothing: of the processes after the first."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def log(self, metrics: Mapping[str, Any], step: int) -> None: ...

    def log_times(self, times: Mapping[str, Any], step: int) -> None: ...

    def close(self) -> None: ...


def drop_unweighted(losses: TensorDictBase) -> dict[str, Tensor]:
    """The losses to log: ``loss_<term>`` once, without its unweighted copy ``<term>``.

    ``latent_kl`` stays: its weight may change, and free nats hide its value.
    """
    twins = {name for name in losses.keys() if f"loss_{name}" in losses.keys()} - {"latent_kl"}
    return {name: x for name, x in losses.items() if name not in twins}


def progress_metrics(losses: TensorDictBase) -> dict[str, Tensor]:
    """The losses for the progress bar, of those that the run has."""
    return {name: losses[name] for name in ("image", "kl") if name in losses.keys()}


class EpisodeTracker:
    """Watches the steps of N environments and reports the episodes that end.

    Success of an episode is success at any of its steps.
    """

    def __init__(self, workers: int) -> None:
        self.success = [False] * workers

    def update(self, after: TensorDictBase) -> list[dict[str, Any]]:
        """One record for each episode that ended.

        Args:
            after: the ``next`` entry of a step. An episode that is ``dropped`` does not count.
        """
        ended = []
        for worker, step in enumerate(after.reshape(-1)):
            if bool(step.get("dropped", False)):  # its worker has failed
                self.success[worker] = False
                continue
            self.success[worker] |= bool(step["success"])
            if bool(step["done"]):
                ended.append(
                    {
                        "worker": worker,
                        "return": float(step["episode_reward"]),
                        "success": self.success[worker],
                        "length": int(step["step_count"]),
                    }
                )
                self.success[worker] = False
        return ended


@torch.no_grad()
def play(
    env: EnvBase,
    policy: Callable[[TensorDictBase], TensorDictBase],
    episodes: int,
    videos: int = 1,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Play whole episodes in one environment or a batch of them.

    Args:
        stopped: asked after each step; once it says True, only the episodes so far are returned.

    Returns:
        A record of each episode (return, success, length), and the frames of the first
        ``videos``, uint8 ``[T, 3, H, W]`` each, :data:`FILM_FRAMES` at most.
    """
    with hold_signals(GROUP_SIGNALS):
        td = env.reset()
    workers = td.numel()
    quota = [episodes // workers + (i < episodes % workers) for i in range(workers)]
    tracker = EpisodeTracker(workers)
    frames = [[x] for x in images(td)]
    records, clips = [], []
    while any(quota) and not stopped():
        td, following = env.step_and_maybe_reset(policy(td))
        if len(clips) < videos:
            for film, image in zip(frames, images(td["next"]), strict=True):
                if len(film) < FILM_FRAMES:
                    film.append(image)
        first = images(following)
        for record in tracker.update(td["next"]):
            worker = record["worker"]
            if quota[worker]:
                quota[worker] -= 1
                records.append(record)
                if len(clips) < videos:
                    clips.append(torch.stack(frames[worker]))
        for worker in td["next", "done"].flatten().nonzero().flatten().tolist():
            frames[worker] = [first[worker]]
        td = following
    return records, clips


def images(td: TensorDictBase) -> Tensor:
    """The frames of all environments of a step, ``[N, 3, H, V W]``, on the CPU: views in a row."""
    frames = td["pixels"].reshape(-1, *td["pixels"].shape[-3:]).cpu()  # [N, 3 V, H, W]
    return torch.cat(frames.split(3, 1), -1)


def summarize(records: list[dict[str, Any]]) -> dict[str, float]:
    """Success rate with its 95% Wilson interval, and mean return."""
    successes = sum(record["success"] for record in records)
    low, high = wilson_interval(successes, len(records))
    return {
        "success": successes / len(records),
        "success_low": low,
        "success_high": high,
        "return": sum(record["return"] for record in records) / len(records),
    }
