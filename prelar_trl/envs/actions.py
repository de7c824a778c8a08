"""The actions that an agent can take: a bounded vector, or one of several as a one-hot vector."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, OneHot, TensorSpec
from torchrl.envs import ActionScaling, EnvBase, Transform

from prelar_trl.envs.pictures import dtype_name

NO_FACTORS = (
    "multi-discrete and mixed actions do not work: map each combination to one choice, or all of "
    "them to one bounded vector, in a wrapper of the environment"
)


class OneHotAction(Transform):
    """Takes one-hot actions, float32 [*batch, A], for an environment that takes a choice of A.

    Args:
        spec: of the environment's own action: ``OneHot`` of any type, or ``Categorical``, whose
            actions are the numbers of the choices.
    """

    def __init__(self, spec: OneHot | Categorical) -> None:
        super().__init__(in_keys_inv=["action"], out_keys_inv=["action"])
        self._spec = spec

    def _inv_apply_transform(self, action: Tensor) -> Tensor:
        if isinstance(self._spec, Categorical):
            action = action.argmax(-1).reshape(self._spec.shape)
        return action.to(self._spec.dtype)

    def transform_action_spec(self, action_spec: TensorSpec) -> TensorSpec:
        action_spec = action_spec.clone()
        batch = action_spec.shape if isinstance(action_spec, Composite) else ()
        count = self._spec.space.n
        new = OneHot(count, torch.Size([*batch, count]), dtype=torch.float32)
        if not isinstance(action_spec, Composite):
            return new
        action_spec["action"] = new
        return action_spec


def action_transforms(env: EnvBase) -> list[Transform]:
    """What gives ``action`` its form: float32 [A], in [-1, 1] or one-hot; nothing where it has it.

    Raises:
        ValueError: its actions are neither one bounded vector nor one choice.
    """
    spec = env.full_action_spec["action"]
    batch = env.batch_size
    shape = list(spec.shape[len(batch) :])
    given = f"{type(spec).__name__} {dtype_name(spec.dtype)} {shape}"
    if len(env.action_keys) > 1:
        keys = ", ".join(map(str, env.action_keys))
        raise ValueError(
            f"actions must be one vector [A]; the environment takes {keys}: {NO_FACTORS}"
        )
    if _is_choice(spec, shape):
        if getattr(spec, "mask", None) is not None:
            raise ValueError(f"the environment masks its actions ({given}), which does not work")
        if isinstance(spec, OneHot) and spec.dtype == torch.float32:
            return []
        transforms: list[Transform] = [OneHotAction(cast(OneHot, spec))]
        return transforms
    if not isinstance(spec, Bounded) or not spec.dtype.is_floating_point:
        kind = "unbounded" if spec.dtype.is_floating_point else "discrete"
        raise ValueError(
            f"the environment's actions are {kind} ({given}): only continuous ones work, floats "
            f"[A] with a lower and an upper bound, and one choice of several; {NO_FACTORS}"
        )
    if len(shape) != 1:
        raise ValueError(f"actions must be one vector [A]; the environment takes action: {given}")
    if not (spec.low.isfinite() & spec.high.isfinite()).all():
        raise ValueError(f"the environment's actions have no bounds ({given}): they must be finite")
    if not (spec.low < spec.high).all():
        raise ValueError(f"the environment's actions have no room between their bounds ({given})")
    scaled = (spec.low == -1).all() and (spec.high == 1).all()
    return [] if scaled else [ActionScaling()]


def _is_choice(spec: TensorSpec, shape: list[int]) -> bool:
    """Whether an action of that shape, without batch dimensions, is one choice of several."""
    if type(spec) is OneHot:
        return len(shape) == 1
    return type(spec) is Categorical and shape in ([], [1])
