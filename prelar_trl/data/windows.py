"""Draws windows of T frames from episodes of given lengths.

`VideoClips` (pre-training video) and `EpisodeReplay` (fine-tuning) both draw with `WindowSampler`.

Strategies, for an episode of ``L`` frames and a window of ``T``::

    episodes         an episode uniformly, then one of its L - T + 1 starts uniformly
    frames           every window of the data is equally likely: an episode with weight L - T + 1
    epoch            every episode once in a shuffled order, then the next order; start uniform;
                     where other episodes are declared, the next order begins
    prioritize_ends  the official replay's: an episode uniformly; a length uniform in
                     (M - m, M], at least m, where M = min(L, T), m = min_length;
                     start = min(uniform{0 .. L - length + m}, L - length), so that the last
                     start has m + 1 times the probability of another

                     start                   0   1   2  ...  L-length-1   L-length
                     probability mass (~)    1   1   1  ...      1         1 + m

With ``prioritize_ends`` and a ``min_length`` below T a row may be shorter than T; it is then filled
with further windows, and each of them starts with ``is_first``. What does not fit is cut off.
With ``pack`` episodes shorter than m are drawn too: whole, m being their length for them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import Storage

from prelar_trl.data.storage import FrameStorage
from prelar_trl.tensor_files import read_tensors
from prelar_trl.utils import check_choice, check_integers

Strategy = Literal["episodes", "frames", "epoch", "prioritize_ends"]


class Windows(NamedTuple):
    """Contiguous pieces that fill ``rows`` rows of ``length`` frames, in row-major order.

    All are int64 ``[M]``, M >= rows (M == rows unless rows are filled by several windows).
    """

    episode: Tensor
    start: Tensor  # first frame, counted from the episode's beginning
    frames: Tensor
    offset: Tensor  # in the flattened [rows * length] batch


class StatefulSampler(Sampler):
    """A TorchRL sampler whose `state_dict` is all that a folder must hold of it."""

    def dumps(self, path: str | Path) -> None:
        """Writes `state_dict` as ``sampler.pt`` into the folder ``path``."""
        Path(path).mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), Path(path, "sampler.pt"))

    def loads(self, path: str | Path) -> None:
        """Reads what `dumps` wrote; ValueError if it is damaged or something else."""
        file = Path(path, "sampler.pt")
        state = read_tensors(file)
        try:
            self.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            wrong = f"holds no state of a {type(self).__name__} ({error!r})"
            raise ValueError(f"{file} {wrong}") from error


class WindowSampler(StatefulSampler):
    """Draws windows of ``length`` frames; a TorchRL sampler with its own random generator.

    A draw costs O(rows * log episodes), never O(frames).

    Args:
        length: frames T of a row.
        strategy: see the module docstring.
        seed: seed of the generator.
        min_length: for ``prioritize_ends`` only. Default: ``length``.
        pack: for ``prioritize_ends`` only: draw shorter episodes too, of two frames at least, and
            pack them into rows. The official replay leaves them out.
        rank, world_size: this process's share of one global stream. Row ``k`` of the stream goes to
            process ``k % world_size``, so processes with the same seed never share a row.

    Raises:
        ValueError: for an unknown strategy or impossible lengths.
    """

    def __init__(
        self,
        length: int,
        *,
        strategy: Strategy = "episodes",
        seed: int = 0,
        min_length: int | None = None,
        pack: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_choice("strategy", strategy, get_args(Strategy))
        check_integers(-(2**63), length=length)
        if length < 1:
            raise ValueError(f"window length {length} must be at least 1 frame")
        check_integers(1, 2**16, world_size=world_size)
        check_integers(0, rank=rank)
        check_integers(-(2**63), 2**63 - 1, seed=seed)
        if strategy != "prioritize_ends" and (min_length is not None or pack):
            raise ValueError(f"min_length and pack belong to prioritize_ends, not to {strategy!r}")
        if rank >= world_size:
            raise ValueError(f"rank={rank} must lie in 0..{world_size - 1} (world_size - 1)")
        self.length, self.strategy, self.pack = length, strategy, pack
        self.min_length = length if min_length is None else min_length
        check_integers(min_length=self.min_length)
        if self.min_length > length:
            raise ValueError(f"min_length={self.min_length} must not exceed the length {length}")
        self.rank, self.world_size = rank, world_size
        self.generator = torch.Generator().manual_seed(seed)
        self._shuffler = torch.Generator()
        self._order: Tensor | None = None  # of this epoch: places in _eligible
        self._order_rng = self.generator.get_state()  # that has shuffled it
        self._order_of: str | None = None  # the episodes, see _identity
        self._position = 0
        self._revision = -1
        self._empty()

    def set_episodes(
        self,
        lengths: Tensor,
        *,
        starts: Tensor | None = None,
        capacity: int | None = None,
        groups: Tensor | None = None,
        group_weights: Tensor | None = None,
    ) -> None:
        """Declares the episodes to draw from. O(episodes).

        Args:
            lengths: int64 ``[E]`` frames of each episode. Too short ones are never drawn.
            starts: int64 ``[E]`` storage index of each episode's first frame (for `sample`).
            capacity: the storage is a ring of that many frames (for `sample`).
            groups: int64 ``[E]`` group of each episode, e.g. its store.
            group_weights: ``[G]`` how often each group is drawn, in any unit; not for ``epoch``.
        """
        if lengths.dtype != torch.int64 or lengths.dim() != 1 or bool((lengths < 0).any()):
            raise ValueError(
                f"lengths {lengths.dtype} {list(lengths.shape)} must be int64 [E], none negative"
            )
        for name, x in (("starts", starts), ("groups", groups)):
            if x is not None and (x.dtype != torch.int64 or x.shape != lengths.shape):
                raise ValueError(f"{name} {x.dtype} {list(x.shape)} must be int64 {len(lengths)}")
        counts = (lengths - self.length + 1).clamp(min=0)
        weights = (counts if self.strategy == "frames" else lengths >= self.shortest).double()
        if groups is not None and group_weights is not None:
            if not bool((group_weights >= 0).all() & group_weights.isfinite().all()):
                raise ValueError("group_weights must be finite, none negative")
            if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < len(group_weights):
                raise ValueError(f"groups must lie in 0..{len(group_weights) - 1}")
            if self.strategy == "epoch":
                raise ValueError("strategy='epoch' takes every clip once: leave out the weights")
            share = torch.zeros(len(group_weights), dtype=torch.float64)
            share.index_add_(0, groups, weights)
            scale = torch.where(share > 0, group_weights.double() / share, 0.0)  # 0: none to draw
            weights = weights * scale[groups]
        self._lengths, self._counts = lengths, counts
        self._starts, self._capacity = starts, capacity
        self._cumulative = weights.cumsum(0)
        self._eligible = weights.nonzero().squeeze(-1)
        places = torch.zeros_like(lengths) if starts is None else starts
        drawn_from = torch.stack((places, lengths))[:, self._eligible]
        self._identity = hashlib.sha256(drawn_from.numpy().tobytes()).hexdigest()

    def sync(self, storage: Storage | None) -> None:
        """Declares the episodes of a `FrameStorage`, if they have changed."""
        if isinstance(storage, FrameStorage) and storage.revision != self._revision:
            self._revision = storage.revision
            self.set_episodes(**storage.episodes())

    @property
    def shortest(self) -> int:
        """Frames that an episode needs to be drawn from."""
        return 2 if self.pack else self.min_length

    @property
    def num_eligible(self) -> int:
        """Episodes that are long enough to be drawn."""
        return len(self._eligible)

    def draw(self, rows: int) -> Windows:
        """Draws ``rows`` rows.

        Raises:
            RuntimeError: when no episode is long enough.
        """
        check_integers(rows=rows)
        if not len(self._eligible):
            longest = int(self._lengths.max()) if len(self._lengths) else 0
            raise RuntimeError(
                f"no episode has {self.shortest} frames: {len(self._lengths)} episodes, "
                f"longest {longest}"
            )
        drawn = self._draw_all(rows * self.world_size)
        if self.world_size == 1:
            return drawn
        row, column = drawn.offset // self.length, drawn.offset % self.length
        own = Windows(*drawn[:3], row // self.world_size * self.length + column)
        return Windows(*(each[row % self.world_size == self.rank] for each in own))

    def sample(self, storage: Storage | None, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        """See TorchRL's ``Sampler``.

        Args:
            storage: a `FrameStorage` declares its episodes itself; for others see `set_episodes`.
            batch_size: frames of the whole batch, a multiple of ``length``.

        Returns:
            Storage indices int64 ``[batch_size]`` and ``{"is_first": bool [batch_size, 1]}``.
        """
        check_integers(batch_size=batch_size)
        if batch_size % self.length:
            raise ValueError(f"batch_size={batch_size} is no multiple of the window {self.length}")
        self.sync(storage)
        windows = self.draw(batch_size // self.length)
        if self._starts is None:
            raise ValueError("set_episodes was not told the starts of the episodes")
        first = self._starts[windows.episode] + windows.start - windows.offset
        index = first.repeat_interleave(windows.frames) + torch.arange(batch_size)
        if self._capacity is not None:
            index %= self._capacity
        is_first = torch.zeros(batch_size, 1, dtype=torch.bool)
        is_first[windows.offset] = True
        return index, {"is_first": is_first}

    def _uniform(self, upper: Tensor) -> Tensor:
        """One uniform integer in ``0 .. upper - 1`` each."""
        u = torch.rand(len(upper), dtype=torch.float64, generator=self.generator)
        return torch.minimum((u * upper).long(), upper - 1)

    def _draw_all(self, rows: int) -> Windows:
        if self.strategy == "prioritize_ends":
            return self._draw_prioritized(rows)
        episode = self._next_in_epoch(rows) if self.strategy == "epoch" else self._weighted(rows)
        start = self._uniform(self._counts[episode])
        frames = torch.full((rows,), self.length)
        return Windows(episode, start, frames, torch.arange(rows) * self.length)

    def _weighted(self, rows: int) -> Tensor:
        u = torch.rand(rows, dtype=torch.float64, generator=self.generator)
        episode = torch.searchsorted(self._cumulative, u * self._cumulative[-1], right=True)
        return episode.clamp(max=int(self._eligible[-1]))

    def _next_in_epoch(self, rows: int) -> Tensor:
        parts: list[Tensor] = []
        while rows:
            if self._order_of != self._identity or self._position >= len(self._eligible):
                self._order_rng, self._position = self.generator.get_state(), 0
                self._order, self._order_of = self._shuffled(), self._identity
                self.generator.set_state(self._shuffler.get_state())
            elif self._order is None:  # a loaded state
                self._order = self._shuffled()
            part = self._eligible[self._order[self._position : self._position + rows]]
            self._position += len(part)
            rows -= len(part)
            parts.append(part)
        return torch.cat(parts)

    def _shuffled(self) -> Tensor:
        self._shuffler.set_state(self._order_rng)
        return torch.randperm(len(self._eligible), generator=self._shuffler)

    def _draw_prioritized(self, rows: int) -> Windows:
        pieces: list[tuple[int, int, int, int]] = []
        end = rows * self.length
        offset = 0
        while offset < end:
            drawn = torch.stack(self._prioritized(rows), -1).tolist()
            for episode, start, frames in drawn:
                frames = min(frames, self.length - offset % self.length)
                pieces.append((episode, start, frames, offset))
                offset += frames
                if offset == end:
                    break
        return Windows(*torch.tensor(pieces).T.contiguous().unbind(0))

    def _prioritized(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        episode = self._weighted(count)
        total = self._lengths[episode]
        least = total.clamp(max=self.min_length)
        frames = torch.maximum(total.clamp(max=self.length) - self._uniform(least), least)
        last = total - frames
        start = torch.minimum(self._uniform(last + 1 + least), last)
        return episode, start, frames

    def state_dict(self) -> dict[str, Any]:
        """Everything the next draws depend on, the episodes apart."""
        return {
            "rng": self.generator.get_state(),
            "order_rng": self._order_rng,
            "order_of": self._order_of,
            "position": self._position,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, if the same episodes are declared.

        KeyError, TypeError, ValueError, RuntimeError for no such state; nothing has changed then.
        """
        rng, order_rng, position = (state_dict[name] for name in ("rng", "order_rng", "position"))
        check_integers(0, position=position)
        order_rng = rng if order_rng is None else order_rng  # of older states, without an order
        for state in (rng, order_rng):
            self._shuffler.set_state(state)  # raises for what is none
        self.generator.set_state(rng)
        self._order, self._order_rng, self._position = None, order_rng, position
        self._order_of = state_dict.get("order_of")  # without one the epoch begins anew

    def _empty(self) -> None:
        self.set_episodes(torch.zeros(0, dtype=torch.int64))


class FixedShareSampler(StatefulSampler):
    """Fills the first ``rows`` rows of a batch from one `WindowSampler`, the others from another.

    Their windows have one length, and the episodes of the first are declared by hand.
    """

    def __init__(self, first: WindowSampler, others: WindowSampler, rows: int) -> None:
        self.first, self.others, self.rows = first, others, rows

    def sample(self, storage: Storage, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        size = min(self.rows * self.first.length, batch_size)
        drawn = [self.first.sample(None, size)]
        if size < batch_size:
            drawn.append(self.others.sample(storage, batch_size - size))
        index, info = zip(*drawn, strict=True)
        return torch.cat(index), {"is_first": torch.cat([each["is_first"] for each in info])}

    def state_dict(self) -> dict[str, Any]:
        return {"labels": self.first.state_dict(), "sampler": self.others.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first.load_state_dict(state_dict["labels"])
        self.others.load_state_dict(state_dict["sampler"])

    def _empty(self) -> None:
        raise RuntimeError("the clips of a store cannot be emptied")
