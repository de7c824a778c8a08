"""Acting with a world model: a recurrent TorchRL policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.envs.utils import ExplorationType, exploration_type

from prelar_trl.modules.heads import Actor, OneHotActor
from prelar_trl.modules.rssm import State
from prelar_trl.modules.world_model import RSSMWorldModel
from prelar_trl.utils import check_choice

__all__ = ["StatefulPolicy", "WorldModelPolicy"]


class WorldModelPolicy(TensorDictModuleBase):
    """Filters the frames into a latent state and acts on it.

    Reads ``pixels``, ``is_first``, where the model has one ``vector``, and the recurrent entries
    under ``"belief"``; writes ``action`` and the next belief under ``("next", "belief")``, as
    TorchRL's recurrent modules do. Give the environment :meth:`make_primer` so that the belief is
    there after a reset.

    Args:
        world_model, actor: the networks.
        mode: ``"sample"`` draws the action, or takes its mode while TorchRL's exploration type is
            another than ``RANDOM``; ``"mode"`` takes its mode (evaluation). Latents are drawn in
            both.
        noise: added to the action: the standard deviation of Gaussian noise, or of choices the
            probability of one that is drawn evenly. Default: 0.
        sample_state: draw latents, latent actions too; False takes their mode. Default: the world
            model's ``sample``.
    """

    def __init__(
        self,
        world_model: RSSMWorldModel,
        actor: Actor | OneHotActor,
        mode: Literal["sample", "mode"] = "sample",
        *,
        noise: float = 0.0,
        sample_state: bool | None = None,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("sample", "mode"))
        self.world_model, self.actor, self.mode = world_model, actor, mode
        self.noise = noise
        self.sample_state = world_model.sample if sample_state is None else sample_state
        self.action_dim = actor.action_dim
        self.window = world_model.action_window
        vector = [] if world_model.vector_encoder is None else ["vector"]
        self.in_keys = ["pixels", "is_first", *vector, "belief"]
        out_keys: list[Any] = ["action", ("next", "belief")]
        self.out_keys = out_keys

    def belief_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each recurrent entry of one environment."""
        shapes: dict[str, tuple[int, ...]] = {"actions": (self.window, self.action_dim)}
        rssms = {"": self.world_model.rssm, "lower_": self.world_model.lower_rssm}
        for prefix, rssm in rssms.items():
            if rssm is not None:
                shapes[prefix + "stoch"] = rssm.latent.shape
                shapes[prefix + "deter"] = (rssm.deter,)
        return shapes

    def zero_belief(self, batch_size: Sequence[int] = ()) -> TensorDict:
        """The belief before the first frame, on the CPU."""
        shapes = self.belief_shapes().items()
        zeros = {name: torch.zeros(*batch_size, *shape) for name, shape in shapes}
        return TensorDict(zeros, batch_size)

    def make_primer(self) -> TensorDictPrimer:
        """The transform that puts a zero belief into the environment's reset."""
        return TensorDictPrimer(
            {
                ("belief", name): Unbounded(torch.Size(shape))
                for name, shape in self.belief_shapes().items()
            },
            default_value=0.0,
            expand_specs=True,  # to the environment's batch size
        )

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        batch = tensordict.batch_size
        flat = cast(
            Any, tensordict.flatten(0, len(batch) - 1) if batch else tensordict.unsqueeze(0)
        )
        belief = flat["belief"]
        is_first = flat["is_first"].unsqueeze(1)  # [N, 1, 1]

        model = self.world_model
        vector = None if model.vector_encoder is None else flat["vector"].unsqueeze(1)
        embed = model.encode(model.preprocess(flat["pixels"]).unsqueeze(1), vector)
        history = belief["actions"].masked_fill(is_first, 0.0)
        lower = None
        if model.lower_rssm is not None:
            lower = State(belief["lower_stoch"], belief["lower_deter"])
        state = State(belief["stoch"], belief["deter"])
        out = model.observe(embed, self._code(history), is_first, state, lower, self.sample_state)
        out = cast(TensorDictBase, out[:, 0])

        policy = self.actor(out["feat"])
        greedy = self.mode == "mode" or exploration_type() not in (None, ExplorationType.RANDOM)
        action = policy.rsample(not greedy)
        if self.noise:
            action = policy.perturb(action, self.noise)
        new = {
            "stoch": out["stoch"],
            "deter": out["deter"],
            "actions": torch.cat([history[:, 1:], action.unsqueeze(1)], 1),
        }
        if lower is not None:
            new["lower_stoch"], new["lower_deter"] = out["lower", "stoch"], out["lower", "deter"]
        shape: tuple[int, ...] = tuple(batch)
        tensordict["action"] = action.reshape(*shape, self.action_dim)
        for name, value in new.items():
            tensordict["next", "belief", name] = value.float().reshape(*shape, *value.shape[1:])
        return tensordict

    def _code(self, history: Tensor) -> Tensor:
        """The last actions ``[N, window, A]`` -> the RSSM's action input ``[N, 1, U]``."""
        encoder = self.world_model.action_encoder
        if encoder is None:
            return history[:, -1:]
        return encoder.encode(history, self.sample_state)[0].unsqueeze(1)


class StatefulPolicy:
    """A policy that keeps its belief itself, for environments on the CPU.

    The belief stays on the policy's device: a step takes the frames there, and waits for the
    actions. The environments need no primer.

    Args:
        policy: with its networks on ``device``.
        device: theirs.

    Attributes:
        belief: after the last step, of all environments. None: no step was made; the next one is
            then a first one, also in the middle of an episode.
    """

    def __init__(self, policy: WorldModelPolicy, device: torch.device | str) -> None:
        self.policy, self.device = policy, torch.device(device)
        self.belief: TensorDictBase | None = None

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        """``tensordict`` with the ``action``, on the CPU."""
        keys = [key for key in self.policy.in_keys if key != "belief"]
        seen = tensordict.select(*keys).to(self.device, non_blocking=True)
        if self.belief is None:
            self.belief = self.policy.zero_belief(tensordict.batch_size).to(self.device)
            seen["is_first"] = torch.ones_like(seen["is_first"])
        out = self.policy(seen.set("belief", self.belief))
        self.belief = out["next", "belief"]
        return tensordict.set("action", out["action"].cpu())
