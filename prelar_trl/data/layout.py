"""Between TorchRL's layouts of a trajectory and the one that the losses read."""

from __future__ import annotations

from typing import cast

import torch
from tensordict import TensorDict, TensorDictBase


def to_frames(steps: TensorDictBase) -> TensorDict:
    """Steps ``(x_t, a_t, next)`` as frames, each with the action and reward that led to it.

    ::

        steps       0      1      2           frames        0      1      2      3
        pixels      x0     x1     x2          pixels        x0     x1     x2     x3
        action      a0     a1     a2          action        0      a0     a1     a2
        next:                                 reward        0      r1     r2     r3
          pixels    x1     x2     x3          is_first      1      0      0      0
          reward    r1     r2     r3          terminated    0      0      0      d3
          terminated 0     0      d3

    Args:
        steps: ``[..., L]``, time last: one episode each, or a part of one, as ``env.rollout``
            gives it. ``pixels``, ``action``, ``next`` with ``pixels``, ``reward`` and (else False)
            ``terminated``, ``done``; by option ``vector``, in both places.

    Returns:
        ``[..., L+1]``: ``pixels``, ``action``, ``reward``, ``is_first``, ``terminated`` and, where
        it is there, ``vector``: what :class:`prelar_trl.objectives.RSSMWorldModelLoss` reads as
        ``[B, T]``. The input is not changed.

    Raises:
        KeyError: an entry is missing.
        TypeError, ValueError: one has another dtype or shape than a step has; there is no step; an
            episode ends before the last one: cut there first.
    """
    _check_steps(steps)
    time, following = steps.ndim - 1, cast(TensorDictBase, steps["next"])
    shape = (*steps.shape, 1)
    no = torch.zeros(shape, dtype=torch.bool, device=following["reward"].device)
    done = following.get("done", no).reshape(shape)
    if done.narrow(time, 0, shape[time] - 1).any():
        raise ValueError("an episode ends within the steps: cut them after each done")
    after = TensorDict(
        {
            "pixels": following["pixels"],
            "action": steps["action"],
            "reward": following["reward"].reshape(shape),
            "is_first": no,
            "terminated": following.get("terminated", no).reshape(shape),
        },
        batch_size=steps.shape,
    )
    if "vector" in steps.keys():
        after["vector"] = following["vector"]
    before = cast(TensorDict, torch.zeros_like(after.narrow(time, 0, 1)))
    for key in ("pixels", "vector"):
        if key in steps.keys():
            before[key] = steps[key].narrow(time, 0, 1)
    before["is_first"] = ~before["is_first"]
    return cast(TensorDict, TensorDict.cat([before, after], time))


def _check_steps(steps: TensorDictBase) -> None:
    """Refuse steps whose entries are missing, or are not those of one step each."""
    if not steps.ndim or not steps.numel():
        raise ValueError(f"steps of batch {list(steps.shape)}: time must be last, and not empty")
    keys = set(steps.keys(include_nested=True, leaves_only=True))
    observed = ["pixels", "vector"] if keys & {"vector", ("next", "vector")} else ["pixels"]
    for key in (*observed, "action", *(("next", key) for key in observed), ("next", "reward")):
        if key not in keys:
            raise KeyError(f"the steps lack {key}")
    for key in observed:
        now, then = steps[key], steps["next", key]
        if now.shape != then.shape:
            raise ValueError(f"{key} is {list(now.shape)}, but {list(then.shape)} in next")
        if now.dtype != then.dtype:
            raise TypeError(f"{key} is {now.dtype}, but {then.dtype} in next")
    if steps["action"].dim() != steps.ndim + 1:
        raise ValueError(f"action {list(steps['action'].shape)} must be {[*steps.shape, 'A']}")
    for name in ("reward", "done", "terminated"):
        value = steps.get(("next", name), None)
        if value is None:
            continue
        if value.is_floating_point() != (name == "reward") or value.is_complex():
            asked = "floating point" if name == "reward" else "bool"
            raise TypeError(f"next {name} is {value.dtype}; it must be {asked}")
        if value.numel() != steps.numel():
            raise ValueError(f"next {name} {list(value.shape)} must be {[*steps.shape, 1]}")


def check_frames(frames: TensorDictBase) -> None:
    """Raise ValueError for frames ``[L]`` that are none of one episode, as `to_frames` gives them.

    ``action``, ``reward`` and ``vector`` must be float32.
    """
    float32, flag = (torch.float32, 2), (torch.bool, 2)
    asked = {"pixels": (torch.uint8, 4), "action": float32, "reward": float32, "vector": float32}
    asked |= {"is_first": flag, "terminated": flag}
    for key in asked.keys() - {"vector"} - set(frames.keys()):
        raise ValueError(f"the frames lack {key}")
    for key, value in frames.items():
        dtype, dims = asked.get(key, (None, 0))
        if value.dtype != dtype or value.dim() != dims:
            raise ValueError(f"{key} is {value.dtype} {list(value.shape)}, which is no frame's")
        if value.shape[-1] != 1 and key in ("reward", "is_first", "terminated"):
            raise ValueError(f"{key} {list(value.shape)} must be {[len(frames), 1]}")


def to_dreamer_v3(frames: TensorDictBase, *, state_dim: int, belief_dim: int) -> TensorDict:
    """Frames ``[B, T]`` as TorchRL's DreamerV3 reads them: what led to a frame, and it as ``next``.

    ::

        frames       0    1    2        TorchRL      0    1    2
        pixels       x0   x1   x2       action       0    a0   a1
        action       0    a0   a1       is_init      1    0    0
        reward       0    r1   r2       next:
        is_first     1    0    0          pixels     x0   x1   x2
                                          reward     0    r1   r2

    ``state`` and ``belief``, the posterior before the first frame, are zero, where
    ``RSSMRolloutV3`` begins. A video has no reward: it is zero, to be given the weight 0.

    Args:
        frames: ``pixels``, ``is_first`` and, where known, ``action``, ``reward``, ``terminated``:
            a batch of :class:`VideoClips` or :class:`EpisodeReplay`. Not changed.
        state_dim: width S*K of the flat stochastic state.
        belief_dim: width D of the deterministic state.

    Returns:
        ``[B, T]``: ``state``, ``belief``, ``is_init``, ``action`` where known, and ``next`` with
        ``pixels``, ``reward``, ``terminated`` and ``done``, also true before an ``is_first``.
    """
    zeros = torch.zeros(*frames.shape, 1, device=frames["pixels"].device)
    first, terminated = frames["is_first"], frames.get("terminated", zeros.bool())
    following = {
        "pixels": frames["pixels"],
        "reward": frames.get("reward", zeros),
        "terminated": terminated,
        "done": terminated | torch.cat([first[:, 1:], torch.zeros_like(first[:, :1])], 1),
    }
    steps = {
        "state": zeros.expand(*frames.shape, state_dim),
        "belief": zeros.expand(*frames.shape, belief_dim),
        "is_init": first,
        "next": TensorDict(following, batch_size=frames.shape),
    }
    if "action" in frames.keys():
        steps["action"] = frames["action"]
    return TensorDict(steps, batch_size=frames.shape)
