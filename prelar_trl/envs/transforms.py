"""The transforms that make every environment give the same TensorDict."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.data import Binary, Bounded, Composite
from torchrl.envs import Transform
from torchrl.envs.utils import step_mdp


def to_pixels(image: torch.Tensor, size: int) -> torch.Tensor:
    """Any picture as ``pixels``: uint8 [H, W, 3] to uint8 [3, size, size], averaged over areas."""
    image = image.permute(2, 0, 1)  # [3, H, W]
    if image.shape[1:] == (size, size):
        return image.contiguous()
    resized = nn.functional.interpolate(image[None].float(), size=(size, size), mode="area")
    return resized[0].round().to(torch.uint8)


class ActionRepeat(Transform):
    """Apply each action ``repeat`` times: rewards are summed, success is any, an end ends it.

    Must come first, right after the environment, so that nothing else runs in between.
    """

    def __init__(self, repeat: int) -> None:
        super().__init__()
        if repeat < 1:
            raise ValueError(f"action_repeat must be at least 1, got {repeat}")
        self.repeat = repeat

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        env = self.parent.base_env
        for _ in range(self.repeat - 1):
            if next_tensordict["done"].all():
                break
            now = step_mdp(tensordict.copy().set("next", next_tensordict), exclude_action=False)
            previous, tensordict = next_tensordict, now
            next_tensordict = env._step(now)
            env._complete_done(env.full_done_spec, next_tensordict)
            next_tensordict["reward"] = next_tensordict["reward"] + previous["reward"]
            if "success" in next_tensordict.keys():
                next_tensordict["success"] = next_tensordict["success"] | previous["success"]
        return next_tensordict


class Pixels(Transform):
    """Add the present picture under ``pixels``, uint8 [3, size, size].

    Args:
        picture: gives the picture as a tensor of that type and shape.
        size: height and width.
        close: called when the environment closes.
    """

    def __init__(
        self,
        picture: Callable[[], torch.Tensor],
        size: int,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(out_keys=["pixels"])
        self._picture, self._size, self._close = picture, size, close

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict.set("pixels", self._picture())

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        shape = (3, self._size, self._size)
        observation_spec["pixels"] = Bounded(0, 255, shape, dtype=torch.uint8)
        return observation_spec

    def close(self) -> None:
        self._close()


class NoSuccess(Transform):
    """Add ``success`` = False, bool [*batch, 1], to an environment that does not know success."""

    def __init__(self) -> None:
        super().__init__(out_keys=["success"])

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        shape = (*next_tensordict.batch_size, 1)
        return next_tensordict.set("success", torch.zeros(shape, dtype=torch.bool))

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        shape = (*observation_spec.shape, 1)
        observation_spec["success"] = Binary(1, shape, dtype=torch.bool)
        return observation_spec
