"""`EpisodeReplay`: finished episodes on disk, sampled as windows in DreamerV2's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer

from prelar_trl.data.episodes import EpisodeStorage, EpisodeWriter
from prelar_trl.data.storage import Prefetcher
from prelar_trl.data.windows import Strategy, WindowSampler
from prelar_trl.utils import check_integers


class EpisodeReplay:
    """A replay of whole episodes in a folder, a ring of frames that forgets the oldest episodes.

    An episode can be sampled from the moment it is finished. Opening the folder again finds every
    finished episode; one whose data do not agree with its checksums is named in a warning and not
    sampled. After `close` the folder is a clip store that `VideoClips` reads.

    Args:
        path: the folder; made if it is missing.
        window: frames T of a sampled row.
        batch_size: rows B of a batch.
        capacity: frames kept. Disk space is used as it is needed: 12 kB a frame at 64x64.
        seed: seed of the draws.
        device: where batches go; for CUDA through pinned memory, without blocking.
        strategy: how windows are drawn, default the official ``prioritize_ends``.
        min_length, pack: with ``prioritize_ends``, the shortest window, and whether shorter
            episodes are packed into rows; see `prelar_trl.data.windows`.
        prefetch: batches that a thread draws ahead. They are the same as without: what was drawn
            before an episode ended is drawn anew. Then go back by `load_state_dict`, not by the
            buffer's own, which knows nothing of them. Default: 0.

    Attributes:
        buffer: the TorchRL ``ReplayBuffer``, whose batch is flat ``[B * T]``: append transforms to
            it, give it to a collector, replace its sampler. A sampler with priorities needs
            TorchRL's compiled extension, which the releases that we pin cannot load.

    Raises:
        ValueError: the folder holds a replay of another capacity, or is no replay.
        StoreError: another process has it open.
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
        strategy: Strategy = "prioritize_ends",
        min_length: int | None = None,
        pack: bool = False,
        prefetch: int = 0,
    ) -> None:
        check_integers(window=window, batch_size=batch_size, capacity=capacity)
        if capacity < window:
            raise ValueError(f"capacity={capacity} frames is less than one window of {window}")
        self.path = Path(path)
        self.window, self.batch_size, self.capacity = window, batch_size, capacity
        self.device = torch.device(device)
        self.sampler = WindowSampler(
            window, strategy=strategy, seed=seed, min_length=min_length, pack=pack
        )
        self.storage = EpisodeStorage(self.path, capacity, pin_memory=self.device.type == "cuda")
        self._writer = EpisodeWriter()
        self.buffer = ReplayBuffer(
            storage=self.storage,
            sampler=self.sampler,
            writer=self._writer,
            collate_fn=lambda frames: frames,
            batch_size=batch_size * window,
        )
        self._prefetcher = Prefetcher(self.buffer, window, prefetch)

    @property
    def num_episodes(self) -> int:
        """Finished episodes that are kept."""
        return len(self._lengths)

    @property
    def num_frames(self) -> int:
        """Frames of the finished episodes that are kept."""
        return int(self._lengths.sum())

    @property
    def num_eligible(self) -> int:
        """Finished episodes that are long enough to be sampled."""
        return int((self._lengths >= self.sampler.shortest).sum())

    @property
    def _lengths(self) -> Tensor:
        return self.storage.episodes()["lengths"]

    def __len__(self) -> int:
        return self.num_frames

    def extend(self, data: TensorDictBase) -> Tensor:
        """Takes what a collector or ``env.rollout`` gives; the input is not changed.

        Time is the last batch dimension: batch ``[T]`` or ``[N, T]``, N environments. A single
        step of N environments, batch ``[N]``, goes to `add`. The data of one environment continue
        where its last call stopped; where ``("collector", "traj_ids")`` is there it tells which
        steps belong together, so that a multi-process collector's parts may come in any order,
        stacked or joined.

        Args:
            data: ``pixels`` uint8, ``action`` float32, ``next`` with ``pixels``, ``reward``,
                ``done`` and (else False) ``terminated``; ``vector`` in both places, or in none;
                ``is_first`` at the root (optional) breaks an unfinished episode off, which is then
                kept as truncated. An episode whose last step is ``dropped`` (under ``next``,
                optional) is forgotten.

        Returns:
            Indices int64 ``[M]`` of the frames of the episodes that were finished by this call.

        Raises:
            ValueError: a missing key, a wrong shape or dtype, NaN, padding (a collector's
                ``split_trajs``); nothing was taken then.
            OSError: no space is left; finished episodes are safe.
        """
        return self.buffer.extend(data)

    def add(self, data: TensorDictBase) -> Tensor:
        """Takes one step, batch ``[]`` or ``[N]``, of as many environments. Otherwise `extend`."""
        return self.buffer.extend(data.reshape(-1, 1))  # [N, 1]

    def drop(self, environment: int) -> None:
        """Forgets the unfinished episode of an environment, if there is one."""
        self._writer.pending.pop(environment, None)

    def sample(self) -> TensorDict:
        """Draws a batch.

        Returns:
            TensorDict ``[B, T]``: ``pixels`` uint8 ``[B, T, 3 V, H, W]`` of V pictures, ``vector``
            where it was given, ``action`` ``[B, T, A]`` (that led to the frame), ``reward``
            ``[B, T, 1]`` (that came with it), ``is_first`` (True at t = 0, and wherever a row goes
            on with another window), ``terminated``.

        Raises:
            RuntimeError: no finished episode is long enough.
        """
        if not self.num_eligible:
            raise RuntimeError(
                f"the replay has no finished episode of {self.window} frames yet "
                f"({self.num_episodes} episodes, longest {max(self._lengths.tolist(), default=0)} "
                f"frames, {len(self._writer.pending)} unfinished): collect more steps or lower the "
                "window"
            )
        batch = self._prefetcher.next().exclude("episode")
        return batch.to(self.device, non_blocking=True)

    def episode(self, number: int) -> TensorDict:
        """The whole kept episode ``number`` (0 the oldest), rows ``[L + 1]``."""
        return self.storage.episode(number)

    def close(self) -> None:
        """Finishes the store on the disk; opening it again continues."""
        self._prefetcher.discard()
        self.storage.close()

    def state_dict(self) -> dict[str, Any]:
        """Random state, the place in the stream of episodes, and the unfinished episodes."""
        sampler = {"sampler": self._prefetcher.state_dict()}
        return sampler | self.storage.state_dict() | self._writer.state_dict()

    def hold(self, state_dict: dict[str, Any], count: int = 1) -> None:
        """Keeps what a state of `state_dict` knows on the disk, so that one can go back to it.

        Call it when the state is saved; ``count`` states are held, this one (default) and those
        before it. It takes space beyond the capacity: for the frames that were written since the
        oldest state that is held.
        """
        self.storage.hold(state_dict, count)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was taken, over the same folder.

        Episodes that were finished later are dropped. Of those that have been overwritten since,
        which happens only when the ring was full, the ones of states that are held (`hold`) are
        still there. What else is gone, by damage too, a warning says.

        Raises:
            ValueError: the folder holds no episode, and the state tells of some.
        """
        self._prefetcher.discard()  # it reads what goes now
        self.storage.load_state_dict(state_dict)
        self._writer.load_state_dict(state_dict)
        self._prefetcher.load_state_dict(state_dict["sampler"])
