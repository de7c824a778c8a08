"""A world model as a TorchRL environment: what it imagines, step by step, under any policy.

Shape legend: B batch, T time, S stochastic variables, K classes, D deter, F feature, A action,
U latent action.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.data import Bounded, Composite, OneHot, TensorSpec, Unbounded
from torchrl.envs.model_based import ModelBasedEnvBase

from prelar_trl.modules.checks import check_entry, check_input
from prelar_trl.modules.rssm import State
from prelar_trl.modules.world_model import RSSMWorldModel
from prelar_trl.utils import check_integers

__all__ = ["ImaginationEnv", "posterior_states"]


class ImaginationEnv(ModelBasedEnvBase):
    """Steps the dynamics of a world model, from states that it was given.

    ::

        reset:  state z0, feat, ...        step:  z1 ~ prior(. | z0, action); its feat, reward, ...

    A reset and a step give ``feat`` ``[F]``, ``stoch`` ``[S, K]`` and ``deter`` ``[D]`` (the state
    itself, from which the next step goes on), with a head of the discount ``discount`` ``[1]``, and
    on request ``pixels`` uint8 ``[3 V, H, W]`` of V views. It takes ``action``: the real one
    ``[A]``, or, of a model that was pre-trained with latent actions, a latent one ``[U]``, any
    numbers: ``env.rand_action`` draws from N(0, 1), the prior of Gaussian ones. The gradient flows
    through a step, into the policy and into the model; freeze the model where only a policy is
    trained.

    Rewards are the ``reward`` head's, zero without one. An episode ends, as ``terminated``, where
    the predicted discount falls below half of gamma, never without such a head.

    ``env.reset(states)`` begins with the states in a TensorDict of any batch shape, such as
    :func:`posterior_states` gives them; ``env.reset()`` draws from ``starts``.

    Args:
        world_model: put into evaluation mode.
        action_spec: that of the environment that the model knows, ``env.action_spec``, unbatched:
            numbers or one-hot. Not with latent actions. Default: numbers in [-1, 1], as many as the
            model knows.
        starts: states ``[M]`` (``stoch, deter``, and ``action_history`` with an action window) that
            a reset draws from; the attribute can be set anew. Default: the zero state before the
            first frame.
        decode: also give ``pixels``. Default: False.
        sample: draw the stochastic state; otherwise take its mode. Default: True.
        batch_size: of the environment. Default: none; it then takes TensorDicts of any batch shape.

    Raises:
        TypeError, ValueError: a model without any action; ``decode`` of a model whose decoder also
            needs a frame (ContextWM); ``starts`` of more than one batch dimension, or of another
            model; an ``action_spec`` that is not of the model's actions; by a reset or a step,
            states or actions of another type or shape.
    """

    def __init__(
        self,
        world_model: RSSMWorldModel,
        *,
        action_spec: TensorSpec | None = None,
        starts: TensorDictBase | None = None,
        decode: bool = False,
        sample: bool = True,
        batch_size: Sequence[int] = (),
    ) -> None:
        if not isinstance(world_model, RSSMWorldModel):
            raise TypeError(f"world_model={world_model!r:.40} is no RSSMWorldModel")
        if world_model.action_free:
            raise ValueError("this world model knows no actions, so nobody can act in it")
        if decode and world_model.context_encoder is not None:
            raise ValueError("decode=True: the decoder of this world model also needs a frame")
        if not isinstance(batch_size, Sequence) or isinstance(batch_size, str):
            raise TypeError(f"batch_size={batch_size!r} must be a sequence of whole numbers")
        for size in batch_size:
            check_integers(batch_size=size)
        batch = torch.Size(batch_size)
        super().__init__(
            cast(TensorDictModule, world_model.eval()),  # torch's type; this class calls it itself
            device=next(world_model.parameters()).device,
            batch_size=batch,
        )
        self.decode, self.sample = decode, sample
        rssm, latent = world_model.rssm, world_model.latent_action_encoder
        if latent is not None:
            if action_spec is not None:
                raise ValueError("action_spec: this world model takes latent actions, any numbers")
            action_spec = Unbounded(torch.Size([latent.latent_actions.dim]))
        elif action_spec is None:
            size = world_model.action_dim or rssm.action_dim
            action_spec = Bounded(-1, 1, torch.Size([size]))
        else:
            _check_action_spec(action_spec, world_model)
        window = world_model.action_window
        self.history_shape = torch.Size([window - 1, action_spec.shape[-1]])
        state: dict[str, TensorSpec] = {
            "stoch": Unbounded(torch.Size(rssm.latent.shape)),
            "deter": Unbounded(torch.Size([rssm.deter])),
        }
        if window > 1:
            state["action_history"] = Unbounded(self.history_shape)
        self._state_shapes = {name: spec.shape for name, spec in state.items()}
        self._action_shape, self._one_hot = action_spec.shape, isinstance(action_spec, OneHot)
        self.starts = starts
        observation = {"feat": Unbounded(torch.Size([rssm.feat_dim])), **state}
        one = torch.Size([1])
        if "discount" in world_model.heads:
            observation["discount"] = Bounded(0, 1, one)
        if decode:
            drawn = self._draw(torch.zeros(1, rssm.feat_dim, device=self.device)).shape[1:]
            observation["pixels"] = Bounded(0, 255, drawn, dtype=torch.uint8)

        def batched(specs: dict[str, TensorSpec]) -> Composite:
            return Composite(specs, device=self.device).expand(batch)

        self.observation_spec, self.state_spec = batched(observation), batched(state)
        self.full_action_spec = batched({"action": action_spec})
        self.full_reward_spec = batched({"reward": Unbounded(one)})

    @property
    def starts(self) -> TensorDictBase | None:
        """The states that a reset draws from, ``[M]``."""
        return cast(TensorDictBase | None, self._starts)

    @starts.setter
    def starts(self, states: TensorDictBase | None) -> None:
        if states is not None:
            self._check_states(states, "starts", moved=True)
            if states.ndim != 1:
                shape = list(states.shape)
                raise ValueError(f"starts has the batch shape {shape}: flatten it to [M]")
        self._starts = None if states is None else states.detach()

    def _check_states(self, states: TensorDictBase, name: str, *, moved: bool = False) -> None:
        """Raise where they are no states of the model; ``moved``: to its device, afterwards."""
        if not isinstance(states, TensorDictBase):
            raise TypeError(f"{name} is {type(states).__name__}; it must be a TensorDict of states")
        weight = self.world_model.rssm.input_layer.weight
        for key, shape in self._state_shapes.items():
            value = states[key]
            check_entry(key, value, "float", (*states.batch_size, *shape))
            if moved and not value.is_meta:
                value = value.to(weight.device)
            check_input(key, value, weight)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDictBase:
        batch = self.batch_size if tensordict is None else tensordict.batch_size
        known = () if tensordict is None else tensordict.keys()
        given = any(key in known for key in self._state_shapes)
        if tensordict is None or not given or "_reset" in tensordict.keys():
            states = self._draw_starts(batch.numel())  # TorchRL keeps what has not ended
        else:
            self._check_states(tensordict, "the states")
            states = tensordict.select(*self.state_spec.keys()).reshape(-1)
        return self._observation(states).reshape(batch)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self._check_states(tensordict, "the step")
        shape = (*tensordict.batch_size, *self._action_shape)
        number = "bool" if self._one_hot and tensordict["action"].dtype == torch.bool else "float"
        check_entry("action", tensordict["action"], number, shape, tensordict["deter"])
        model, flat = self.world_model, tensordict.reshape(-1)
        history = flat.get("action_history", None)
        action = flat["action"].to(flat["deter"].dtype)  # a one-hot one may be bool
        latent, history = model.next_latent_action(action, history, self.sample)
        state, _ = model.rssm.step(State(flat["stoch"], flat["deter"]), latent, self.sample)
        states = TensorDict(state._asdict(), flat.batch_size)
        if history is not None:
            states["action_history"] = history
        out = self._observation(states)
        zero = torch.zeros_like(out["feat"][:, :1])
        head = model.heads["reward"] if "reward" in model.heads else None
        out["reward"] = zero if head is None else head(out["feat"])
        out["terminated"] = zero.bool()
        if "discount" in model.heads:
            out["terminated"] = out["discount"] < model.discount / 2
        out["done"] = out["terminated"].clone()
        return out.reshape(tensordict.batch_size)

    def _observation(self, states: TensorDictBase) -> TensorDict:
        """States ``[N]`` with what is seen of them."""
        model = self.world_model
        out = TensorDict(dict(states.items()), states.batch_size, device=self.device)
        feat = out["feat"] = model.rssm.feat(State(states["stoch"], states["deter"]))
        if "discount" in model.heads:
            out["discount"] = torch.sigmoid(model.heads["discount"](feat))
        if self.decode:
            out["pixels"] = self._draw(feat)
        return out

    def _draw(self, feat: Tensor) -> Tensor:
        """Features ``[N, F]`` -> pictures uint8 ``[N, 3 V, H, W]``."""
        with torch.no_grad():
            image = self.world_model.decode(feat.unsqueeze(1))[:, 0].float()
        if self.world_model.gray:
            image = image.repeat_interleave(3, 1)
        return ((image + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    def _draw_starts(self, count: int) -> TensorDictBase:
        """``count`` random ones of ``starts``, ``[count]``."""
        if self.starts is not None:
            index = torch.randint(len(self.starts), (count,), device=self.starts["deter"].device)
            return self.starts.select(*self.state_spec.keys())[index].to(self.device)
        states = TensorDict(self.world_model.rssm.initial_state(count)._asdict(), [count])
        if "action_history" in self.state_spec.keys():
            states["action_history"] = torch.zeros(count, *self.history_shape, device=self.device)
        return states

    def _set_seed(self, seed: int | None) -> None:
        """Nothing: what is drawn comes from torch's global generator."""


def _check_action_spec(spec: Any, world_model: RSSMWorldModel) -> None:
    """Raise where a spec is not of one vector of numbers, or one choice, that the model takes."""
    if not isinstance(spec, TensorSpec) or isinstance(spec, Composite):
        raise TypeError(f"action_spec is {type(spec).__name__}; it must be the spec of one tensor")
    given = f"action_spec is {type(spec).__name__} {list(spec.shape)}"
    if not (spec.dtype.is_floating_point or isinstance(spec, OneHot)):
        raise ValueError(f"{given} of {spec.dtype}: the model takes floats, or a OneHot choice")
    known, most = world_model.action_dim, world_model.rssm.action_dim
    size = spec.shape[-1] if len(spec.shape) == 1 else 0
    if not 1 <= size <= (known or most) or known not in (None, 0, size):
        raise ValueError(f"{given}; the model takes [{known or most}]")


@torch.no_grad()
def posterior_states(world_model: RSSMWorldModel, frames: TensorDictBase) -> TensorDict:
    """The states that a world model infers from frames: where imagination can begin.

    Args:
        world_model: put into evaluation mode.
        frames: a batch ``[B, T]`` as the losses read it: ``pixels``, ``is_first`` and, of a model
            with real actions, ``action``; ``vector`` of one that reads vectors.

    Returns:
        ``stoch, deter`` ``[B, T]``, and ``action_history`` with an action window; and, of a model
        with latent actions, ``latent_action`` ``[B, T, U]``, with which the frames can be imagined
        anew.
    """
    model = world_model.eval()
    if not isinstance(frames, TensorDictBase):
        raise TypeError(f"frames is {type(frames).__name__}; it must be a TensorDict [B, T]")
    states = model.infer(frames).select("stoch", "deter", "latent_action", strict=False)
    if "action" in model.in_keys:
        states.update(frames.select("action", "is_first"))
        states = model.flatten_start_states(states).exclude("action", "is_first")
        states = states.reshape(frames.shape)
    return states
