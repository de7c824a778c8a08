"""DreamerV2's behavior learning on imagined trajectories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.func import functional_call
from torchrl.objectives import LossModule

from prelar_trl.collectives import ProcessGroup, joint_mean
from prelar_trl.modules.checks import check_device, check_entry, check_equal_shapes
from prelar_trl.objectives.common import check_range, dispatch
from prelar_trl.objectives.functional import gaussian_nll, lambda_return
from prelar_trl.utils import check_choice

__all__ = ["ActorLoss", "CriticLoss", "LambdaTarget", "RewardNorm"]


class LambdaTarget(nn.Module):
    """Writes the lambda-returns of imagined trajectories.

    ::

        state     z0   z1   z2  ...  zH
        reward    r0   r1   r2  ...  (rH)       the last one is not used
        value     v0   v1   v2  ...  vH         of the slow critic
        target    t0   t1   t2  ...  tH = vH

    Args:
        critic: the slow critic, features ``[..., F]`` -> values ``[..., 1]``: a network, or a
            function such as :meth:`CriticLoss.target_value`. A network's parameters get no
            gradient; the trajectory does.
        lmbda: lambda. Default: 0.95.
    """

    @dataclass
    class _AcceptedKeys:
        """Imagined trajectories ``[N, H+1]``, see :meth:`RSSMWorldModel.imagine`."""

        feat: NestedKey = "feat"
        reward: NestedKey = "reward"
        discount: NestedKey = "discount"
        value: NestedKey = "value"
        value_target: NestedKey = "value_target"

    def __init__(self, critic: Callable[[Tensor], Tensor], lmbda: float = 0.95) -> None:
        super().__init__()
        check_range(0, 1, lmbda=lmbda)
        self.critic, self.lmbda = critic, lmbda
        self.tensor_keys = self._AcceptedKeys()

    def set_keys(self, **keys: NestedKey) -> None:
        """Rename ``feat, reward, discount``, which are read, or ``value, value_target``.

        Raises:
            TypeError: another name.
        """
        self.tensor_keys = replace(self.tensor_keys, **keys)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Reads ``feat, reward, discount``, ``[N, H+1, ...]``; adds ``value, value_target``."""
        keys = self.tensor_keys
        reward, discount = tensordict[keys.reward], tensordict[keys.discount]
        check_equal_shapes(2, **{str(keys.reward): reward, str(keys.discount): discount})
        feat = tensordict[keys.feat]
        check_entry(keys.feat, feat, "float", (*reward.shape[:2], "F"), reward, keys.reward)
        value = self._value(feat)
        target = lambda_return(reward, value, discount, self.lmbda)
        return tensordict.copy().set(keys.value, value).set(keys.value_target, target)

    def _value(self, feat: Tensor) -> Tensor:
        if not isinstance(self.critic, nn.Module):
            return self.critic(feat)
        weights = self.critic.named_parameters()
        trained = {name: weight.detach() for name, weight in weights if weight.requires_grad}
        return functional_call(self.critic, trained, (feat,)) if trained else self.critic(feat)


class RewardNorm(nn.Module):
    """Divides imagined rewards by the running mean of their magnitude (DreamerV2's ``StreamNorm``).

    Of processes that share a batch each takes the mean over the whole of it.

    Args:
        momentum: of the running mean, which starts at 1. At 1 it stays there: nothing is changed.
            Default: 1.
    """

    process_group: ProcessGroup | None = None  # whose processes share the batch
    magnitude: Tensor  # [1]

    def __init__(self, momentum: float = 1.0) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum} must lie in [0, 1]")
        self.momentum = momentum
        self.register_buffer("magnitude", torch.ones(1))

    def forward(self, reward: Tensor) -> Tensor:
        """Any shape; the batch counts in the mean by which it is divided."""
        if self.momentum == 1:
            return reward
        check_equal_shapes(reward=reward)
        check_device("reward", reward, self.magnitude)
        with torch.no_grad():
            magnitude = joint_mean(reward.detach().abs().mean(), self.process_group)
            magnitude = magnitude.to(self.magnitude.dtype)
            self.magnitude.lerp_(magnitude.expand(1), 1 - self.momentum)
        return reward / (self.magnitude.clone() + 1e-8)


class ActorLoss(LossModule):
    """Maximise the imagined lambda-return (DreamerV2, section 3, equation 6).

    ::

        actor reads t1..t_{H-1}, entropies at z0..z_{H-2}, weights w0..w_{H-2}
        -mean( w_k * (objective_{k+1} + entropy_scale * entropy_k) ),  k = 0..H-2

    Args:
        gradient: ``dynamics`` back-propagates the return through the model; ``reinforce`` uses
            ``log_prob * (target - value)``; ``both`` mixes them. Default: ``dynamics``.
        entropy_scale: eta; a scalar tensor can be changed between updates. Default: 1e-4.
        mix: share of ``dynamics`` in ``both``, likewise. Default: 0.1.
    """

    @dataclass
    class _AcceptedKeys:
        """Imagined trajectories ``[N, H+1]``, see :meth:`RSSMWorldModel.imagine`."""

        value_target: NestedKey = "value_target"
        value: NestedKey = "value"
        entropy: NestedKey = "entropy"
        log_prob: NestedKey = "log_prob"
        weight: NestedKey = "weight"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys

    def __init__(
        self,
        *,
        gradient: Literal["dynamics", "reinforce", "both"] = "dynamics",
        entropy_scale: float | Tensor = 1e-4,
        mix: float | Tensor = 0.1,
    ) -> None:
        super().__init__()
        self.out_keys = ["loss_actor", "entropy", "imagined_return"]
        check_choice("gradient", gradient, ("dynamics", "reinforce", "both"))
        check_range(0, entropy_scale=entropy_scale)
        check_range(0, 1, mix=mix)
        self.gradient, self.entropy_scale, self.mix = gradient, entropy_scale, mix
        self._set_in_keys()

    @property
    def functional(self) -> bool:
        return False

    def _set_in_keys(self) -> None:
        keys = self.tensor_keys
        in_keys: list[Any] = [keys.value_target, keys.entropy, keys.weight]
        if self.gradient != "dynamics":
            in_keys += [keys.value, keys.log_prob]
        self.in_keys = in_keys

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        keys = self.tensor_keys
        check_equal_shapes(2, **{str(key): tensordict[key] for key in self.in_keys})
        objective = target = tensordict[keys.value_target][:, 1:-1]  # [N, H-1, 1]
        if not target.numel():
            raise ValueError(f"{keys.value_target}: trajectories need 3 states at least, H >= 2")
        if self.gradient != "dynamics":
            advantage = (target - tensordict[keys.value][:, :-2]).detach()
            objective = tensordict[keys.log_prob][:, 1:-1] * advantage
        if self.gradient == "both":
            objective = self.mix * target + (1 - self.mix) * objective
        entropy = tensordict[keys.entropy][:, :-2]
        weight = tensordict[keys.weight][:, :-2].detach()
        return TensorDict(
            {
                "loss_actor": -(weight * (objective + self.entropy_scale * entropy)).mean(),
                "entropy": entropy.detach().mean(),
                "imagined_return": target.detach().mean(),
            }
        )


class CriticLoss(LossModule):
    """Regress the value on the stopped lambda-return (DreamerV2, section 3, equation 5).

    ``mean( w_k * (value(z_k) - sg t_k)^2 / 2 )``, k = 0..H-1; features are stopped too.

    With target parameters it works with TorchRL's updaters::

        loss = CriticLoss(critic)
        target = LambdaTarget(loss.target_value)
        updater = SoftUpdate(loss, tau=0.02)      # or HardUpdate; updater.step() after the critic's

    Args:
        critic: features ``[..., F]`` -> values ``[..., 1]``.
        delay_value: keep target parameters, a copy of the critic's that only an updater moves.
            Default: True.
    """

    @dataclass
    class _AcceptedKeys:
        """Imagined trajectories ``[N, H+1]``, see :meth:`RSSMWorldModel.imagine`."""

        feat: NestedKey = "feat"
        value_target: NestedKey = "value_target"
        weight: NestedKey = "weight"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys

    critic_params: TensorDictParams
    target_critic_params: TensorDictParams

    def __init__(self, critic: nn.Module, *, delay_value: bool = True) -> None:
        super().__init__()
        self.delay_value = delay_value
        if delay_value:
            module = cast(TensorDictModule, critic)  # any module serves
            self.convert_to_functional(module, "critic", create_target_params=True)
        else:
            self.critic = critic
        self.out_keys = ["loss_critic", "value"]
        self._set_in_keys()

    @property
    def functional(self) -> bool:
        return False

    def _set_in_keys(self) -> None:
        keys = self.tensor_keys
        in_keys: list[Any] = [keys.feat, keys.value_target, keys.weight]
        self.in_keys = in_keys

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        keys = self.tensor_keys
        target, weight = tensordict[keys.value_target], tensordict[keys.weight]
        check_equal_shapes(2, **{str(keys.value_target): target, str(keys.weight): weight})
        feat = tensordict[keys.feat]
        shape = (*target.shape[:2], "F")
        check_entry(keys.feat, feat, "float", shape, target, keys.value_target)
        if target.shape[1] < 2:
            raise ValueError(f"{keys.value_target}: trajectories need 2 states at least, H >= 1")
        target, weight = target[:, :-1].detach(), weight[:, :-1].detach()
        value = self.value(feat[:, :-1].detach())
        check_equal_shapes(**{"value": value, str(keys.value_target): target})
        nll = gaussian_nll(value, target, 0)  # [N, H, 1]
        return TensorDict({"loss_critic": (weight * nll).mean(), "value": value.detach().mean()})

    def value(self, feat: Tensor) -> Tensor:
        """The critic's values, features ``[..., F]`` -> ``[..., 1]``."""
        if not self.delay_value:
            return self.critic(feat)
        with self.critic_params.to_module(self.critic):
            return self.critic(feat)

    def target_value(self, feat: Tensor) -> Tensor:
        """The values of the target parameters, which get no gradient; the features do.

        Raises:
            RuntimeError: there are none, by ``delay_value=False``.
        """
        if not self.delay_value:
            raise RuntimeError("this CriticLoss has no target parameters: delay_value is False")
        with self.target_critic_params.to_module(self.critic):
            return self.critic(feat)
