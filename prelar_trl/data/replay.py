"""`EpisodeReplay`: finished episodes on disk, sampled as windows in DreamerV2's layout.

The shift between the two layouts lives here and nowhere else (`_rows`)::

    TorchRL, one step a column            DreamerV2, one frame a column
    step        0      1      2           frame         0      1      2      3
    pixels      x0     x1     x2          pixels        x0     x1     x2     x3
    action      a0     a1     a2          action        0      a0     a1     a2
    next:                                 reward        0      r1     r2     r3
      pixels    x1     x2     x3          is_first      1      0      0      0
      reward    r1     r2     r3          terminated    0      0      0      d3
      terminated 0     0      d3
                                          L steps give L + 1 frames, each stored once
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer, TensorStorage

from prelar_trl.data.windows import Law, WindowSampler

_KEYS = ("pixels", "action", ("next", "pixels"), ("next", "reward"), ("next", "done"))
_TRAJECTORY = ("collector", "traj_ids")


class FrameStorage(TensorStorage):
    """Memory-mapped rows; ``index_select`` reads them ten times faster than TorchRL's indexing."""

    def __init__(self, frames: TensorDictBase) -> None:
        super().__init__(frames)
        self.frames = frames

    def get(self, index: Tensor) -> TensorDict:
        """Rows at int64 indices ``[M]``."""
        items = {k: torch.index_select(v, 0, index) for k, v in self.frames.items()}
        return TensorDict(items, batch_size=[len(index)])


class EpisodeReplay:
    """A replay of whole episodes in a folder, a ring of frames that forgets the oldest episodes.

    An episode can be sampled from the moment it is finished. Opening the folder again finds every
    finished episode.

    Args:
        path: the folder; made if it is missing.
        window: frames T of a sampled row.
        batch_size: rows B of a batch.
        capacity: frames kept. Disk space is used as it is needed: 12 kB a frame at 64x64.
        seed: seed of the draws.
        device: where batches go; for CUDA through pinned memory, without blocking.
        law: how windows are drawn, default the official ``prioritize_ends``.
        min_length, pack: with ``prioritize_ends``, the shortest window, and whether shorter
            episodes are packed into rows; see `prelar_trl.data.windows`.

    Raises:
        ValueError: the folder holds a replay of another capacity, or is no replay.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        window: int = 50,
        batch_size: int = 50,
        capacity: int = 1_000_000,
        seed: int = 0,
        device: torch.device | str = "cpu",
        law: Law = "prioritize_ends",
        min_length: int | None = None,
        pack: bool = False,
    ) -> None:
        if capacity < window:
            raise ValueError(f"capacity={capacity} frames is less than one window of {window}")
        self.path = Path(path)
        self.window, self.batch_size, self.capacity = window, batch_size, capacity
        self.device = torch.device(device)
        self.sampler = WindowSampler(window, law=law, seed=seed, min_length=min_length, pack=pack)
        self.buffer: ReplayBuffer | None = None
        self._storage: FrameStorage | None = None
        self._begins: list[int] = []  # absolute frame number; place in the ring: modulo capacity
        self._lengths: list[int] = []
        self._end = 0  # absolute number of the next frame
        self._reserved = 0  # frames below this may have been written, so older ones are lost
        self._pending: dict[Hashable, list[TensorDict]] = {}
        self._stale = True
        self.path.mkdir(parents=True, exist_ok=True)
        self._journal = self.path / "episodes.jsonl"
        if self._journal.exists():
            self._reopen()
        elif any(self.path.iterdir()):
            raise ValueError(f"{str(path)!r} is not empty and holds no replay: name another folder")

    @property
    def num_episodes(self) -> int:
        """Finished episodes that are kept."""
        return len(self._lengths)

    @property
    def num_frames(self) -> int:
        """Frames of the finished episodes that are kept."""
        return sum(self._lengths)

    @property
    def num_eligible(self) -> int:
        """Finished episodes that are long enough to be sampled."""
        self._declare()
        return self.sampler.num_eligible

    def __len__(self) -> int:
        return self.num_frames

    def extend(self, data: TensorDictBase) -> int:
        """Takes what a collector or ``env.rollout`` gives; the input is not changed.

        Time is the last batch dimension: batch ``[T]`` or ``[N, T]``, N environments. A single
        step of N environments, batch ``[N]``, goes to `add`. The data of one environment continue
        where its last call stopped; ``("collector", "traj_ids")`` is respected when it is there.

        Args:
            data: ``pixels`` uint8, ``action`` float32, ``next`` with ``pixels``, ``reward``,
                ``done`` and (else False) ``terminated``; ``is_first`` at the root (optional)
                breaks an unfinished episode off, which is then kept as truncated.

        Returns:
            Episodes that were finished by this call.

        Raises:
            ValueError: a missing key, a wrong shape or dtype, NaN; nothing was taken then.
        """
        if not data.ndim:
            raise ValueError("extend needs a time dimension: use add for a single step")
        data = data.reshape(-1, data.shape[-1])  # [N, T]
        return self._take(data)

    def add(self, data: TensorDictBase) -> int:
        """Takes one step, batch ``[]`` or ``[N]``, of as many environments. Otherwise `extend`."""
        return self._take(data.reshape(-1, 1))  # [N, 1]

    def _take(self, data: TensorDictBase) -> int:
        self._check(data)
        finished = 0
        done = data["next", "done"].reshape(data.shape).cpu()  # [N, T]
        first = data.get("is_first", None)
        first = torch.zeros_like(done) if first is None else first.reshape(done.shape).cpu()
        ids = data.get(_TRAJECTORY, None)
        ids = None if ids is None else ids.reshape(done.shape).cpu()
        for worker in range(data.shape[0]):
            for begin, end in _pieces(done[worker], first[worker]):
                key = worker if ids is None else ("trajectory", int(ids[worker, begin]))
                if bool(first[worker, begin]) and key in self._pending:
                    self._finish(key)
                    finished += 1
                new = key not in self._pending
                rows = _rows(data[worker, begin:end], new)
                self._pending.setdefault(key, []).append(rows)
                if bool(done[worker, end - 1]):
                    self._finish(key)
                    finished += 1
        return finished

    def _check(self, data: TensorDictBase) -> None:
        keys = data.keys(include_nested=True, leaves_only=True)
        missing = [k for k in _KEYS if k not in keys]
        if missing:
            raise ValueError(f"the data lack {', '.join(map(str, missing))}")
        for key in ("pixels", ("next", "pixels")):
            pixels = data[key]
            if pixels.dtype != torch.uint8 or pixels.ndim != 5 or pixels.shape[2] != 3:
                raise ValueError(
                    f"{key} must be uint8 [3, H, W] per step, got {pixels.dtype} "
                    f"{list(pixels.shape[2:])}"
                )
        for key in ("action", ("next", "reward")):
            value = data[key]
            if not value.is_floating_point():
                raise ValueError(f"{key} must be floating point, got {value.dtype}")
            if not bool(value.isfinite().all()):
                worker, step = (~value.isfinite()).nonzero()[0, :2].tolist()
                raise ValueError(f"{key} is NaN or infinite at step {step} of environment {worker}")
        if self._storage is not None:
            for key in ("pixels", "action"):
                have, got = self._storage.frames[key].shape[1:], data[key].shape[2:]
                if have != got:
                    raise ValueError(
                        f"{key} has shape {list(got)} per step; the replay in {str(self.path)!r} "
                        f"holds {list(have)}"
                    )

    def _finish(self, key: Hashable) -> None:
        rows = torch.cat(self._pending.pop(key))
        length = len(rows)
        if length > self.capacity:
            raise ValueError(f"an episode of {length} frames exceeds capacity={self.capacity}")
        self._check_space(rows)
        if self._storage is None:
            self._note({"capacity": self.capacity})
            folder = self.path / "frames"
            rows[:1].expand(self.capacity).memmap_like(folder)
            self._open_storage()
        self._reserved = max(self._reserved, self._end + length)
        self._note({"reserved": self._reserved})
        self._forget()
        place = torch.arange(self._end, self._end + length) % self.capacity
        self._storage.set(place, rows)
        self._begins.append(self._end)
        self._lengths.append(length)
        self._end += length
        self._note({"begin": self._begins[-1], "frames": length})
        self._stale = True

    def _check_space(self, rows: TensorDict) -> None:
        """A full disk under a memory map kills the process without a word: look before."""
        need = rows.bytes() + 2**20
        free = shutil.disk_usage(self.path).free
        if free < need:
            raise OSError(
                errno.ENOSPC,
                f"no space left for the replay in {str(self.path)!r} ({free / 2**20:.0f} MiB free, "
                f"{need / 2**20:.0f} needed): {self.num_episodes} episodes are safe, free some",
            )

    def _forget(self) -> None:
        while self._begins and self._begins[0] < self._reserved - self.capacity:
            del self._begins[0], self._lengths[0]

    def _declare(self) -> None:
        if self._stale:
            self.sampler.set_episodes(
                torch.tensor(self._lengths, dtype=torch.int64),
                starts=torch.tensor(self._begins, dtype=torch.int64),
                capacity=self.capacity,
            )
            self._stale = False

    def sample(self) -> TensorDict:
        """Draws a batch.

        Returns:
            TensorDict ``[B, T]``: ``pixels`` uint8 ``[B, T, 3, H, W]``, ``action`` ``[B, T, A]``
            (that led to the frame), ``reward`` ``[B, T, 1]`` (that came with it), ``is_first``
            (True at t = 0, and wherever a row goes on with another window), ``terminated``.

        Raises:
            RuntimeError: no finished episode is long enough.
        """
        self._declare()
        if not self.sampler.num_eligible:
            raise RuntimeError(
                f"the replay has no finished episode of {self.window} frames yet "
                f"({self.num_episodes} episodes, longest {max(self._lengths, default=0)} frames, "
                f"{len(self._pending)} unfinished): collect more steps or lower the window"
            )
        batch, info = self.buffer.sample(return_info=True)
        batch["is_first"] = info["is_first"].unsqueeze(-1)
        batch = batch.reshape(self.batch_size, self.window)  # [B, T]
        if self.device.type == "cpu":
            return batch
        return batch.pin_memory().to(self.device, non_blocking=True)

    def episode(self, number: int) -> TensorDict:
        """The whole kept episode ``number`` (0 the oldest), rows ``[L + 1]``."""
        begin, frames = self._begins[number], self._lengths[number]
        return self._storage.get(torch.arange(begin, begin + frames) % self.capacity)

    def state_dict(self) -> dict[str, Any]:
        """Random state, the place in the stream of frames, and the unfinished episodes."""
        return {
            "sampler": self.sampler.state_dict(),
            "end": self._end,
            "pending": {key: torch.cat(rows) for key, rows in self._pending.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was taken, over the same folder.

        Episodes that were finished later are dropped. Those that have been overwritten since are
        gone, which happens only when the ring was full.

        Raises:
            ValueError: the folder holds less than the state tells of.
        """
        end = state_dict["end"]
        if end > self._end:
            raise ValueError(
                f"the replay in {str(self.path)!r} ends at frame {self._end}, the checkpoint at "
                f"{end}: it is another folder, or files of it are missing"
            )
        while self._begins and self._begins[-1] >= end:
            del self._begins[-1], self._lengths[-1]
        self._end = end
        if self._storage is not None:
            self._note({"rewind": end})
        self._pending = {key: [rows.clone()] for key, rows in state_dict["pending"].items()}
        self._stale = True
        self._declare()
        self.sampler.load_state_dict(state_dict["sampler"])

    def _note(self, record: dict[str, int]) -> None:
        with self._journal.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _open_storage(self) -> None:
        self._storage = FrameStorage(TensorDict.load_memmap(self.path / "frames"))
        self.buffer = ReplayBuffer(
            storage=self._storage, sampler=self.sampler, batch_size=self.batch_size * self.window
        )

    def _reopen(self) -> None:
        data = self._journal.read_bytes()
        whole = data.rfind(b"\n") + 1
        os.truncate(self._journal, whole)
        for line in data[:whole].splitlines():
            record = json.loads(line)
            if record.get("capacity", self.capacity) != self.capacity:
                raise ValueError(
                    f"the replay in {str(self.path)!r} was made with capacity="
                    f"{record['capacity']}, not {self.capacity}: use that, or another folder"
                )
            if "begin" in record:
                self._begins.append(record["begin"])
                self._lengths.append(record["frames"])
                self._end = record["begin"] + record["frames"]
            if "rewind" in record:
                self._end = record["rewind"]
                while self._begins and self._begins[-1] >= self._end:
                    del self._begins[-1], self._lengths[-1]
            self._reserved = max(self._reserved, record.get("reserved", 0))
            self._forget()
        if self._end:
            self._open_storage()


def _pieces(done: Tensor, first: Tensor) -> list[tuple[int, int]]:
    """Cuts ``[T]`` behind every ``done`` and before every ``first``."""
    cut = done.clone()
    cut[:-1] |= first[1:]
    ends = (cut.nonzero().squeeze(-1) + 1).tolist()
    if not ends or ends[-1] != len(done):
        ends.append(len(done))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _rows(steps: TensorDictBase, new: bool) -> TensorDict:
    """TorchRL's ``[L]`` steps as DreamerV2's rows: ``[L + 1]`` if an episode begins, else ``[L]``.

    See the drawing at the top of this module.
    """
    following = steps["next"]
    count = len(steps)
    flag = torch.zeros(count, 1, dtype=torch.bool)
    terminated = following.get("terminated", None)
    rows = TensorDict(
        {
            "pixels": following["pixels"],
            "action": steps["action"].float(),
            "reward": following["reward"].reshape(count, 1).float(),
            "is_first": flag,
            "terminated": flag if terminated is None else terminated.reshape(count, 1),
        },
        batch_size=[count],
    ).cpu()
    if not new:
        return rows.clone()
    first = torch.zeros_like(rows[:1])
    first["pixels"] = steps["pixels"][:1].cpu()
    first["is_first"] = torch.ones(1, 1, dtype=torch.bool)
    return torch.cat([first, rows])
