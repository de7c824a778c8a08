"""Episodes that can be played again: each begins from a seed of its own."""

from __future__ import annotations

import numpy as np
from tensordict import TensorDictBase
from torch import Tensor, stack
from torchrl.envs import EnvBase
from torchrl.envs.utils import step_mdp


def episode_seed(seed: int, worker: int, episode: int) -> int:
    """The seed of the ``episode``-th episode (from 0) of a worker, below 2^31."""
    return int(np.random.SeedSequence((seed, worker, episode)).generate_state(1)[0]) >> 1


def begin_episode(env: EnvBase, seed: int) -> TensorDictBase:
    """Reset an environment without batch size, from a seed that alone decides what comes.

    Environments that reset when they are seeded (gymnasium's, dm_control's) do so twice.
    """
    env.set_seed(seed)
    return env.reset()


def repeat_episode(env: EnvBase, seed: int, actions: Tensor) -> tuple[TensorDictBase, Tensor]:
    """Play an episode of `begin_episode` again.

    A simulator holds more than can be read out of it and put back (contacts, solver state, Python
    attributes), so its state is reached as it was at first, by the same steps.

    Args:
        env: without batch size.
        seed: of the episode.
        actions: [L, A], all that it has made.

    Returns:
        What is known after the last action, at the root, and the frames, uint8 [L + 1, 3, H, W].
    """
    now = begin_episode(env, seed)
    frames = [now["pixels"]]
    for action in actions:
        now = step_mdp(env.step(now.set("action", action)))
        frames.append(now["pixels"])
    return now, stack(frames)
