"""The world model: encoder, dynamics and heads as one TensorDictModule.

Shape legend: B batch, T time, V views, C H W image, E embedding, S stochastic variables, K classes,
D deter, F feature = S*K + D, A action, U latent action, N imagined trajectories, H horizon.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from prelar_trl.modules.actions import ActionEncoder, LatentActionEncoder, recent_actions
from prelar_trl.modules.checks import check_entry, check_output
from prelar_trl.modules.context import ContextEncoder
from prelar_trl.modules.heads import Actor, OneHotActor
from prelar_trl.modules.pixels import normalize_pixels, to_gray
from prelar_trl.modules.rssm import RSSM, State

__all__ = ["RSSMWorldModel"]


class RSSMWorldModel(TensorDictModuleBase):
    """A recurrent world model over sequences of frames.

    Reads ``pixels`` (uint8 ``[B, T, 3 V, S, S]``, V pictures), ``is_first`` (bool ``[B, T, 1]``)
    and, unless the actions are latent or absent, ``action`` (``[B, T, A]``, the action that led to
    the frame); with a vector encoder ``vector`` (``[B, T, size]``).
    Writes ``embed, stoch, deter, feat, posterior, prior`` (the statistics),
    ``("prediction", <head>)`` for every head, for ``pixels`` and for ``vector``; with a
    latent-action encoder ``latent_action`` and ``latent_action_statistics`` (zero at t = 0); for a
    stack ``("lower", "stoch" | "deter" | "feat" | "posterior" | "prior")``. Under autocast
    predicted frames have its type, states and the heads' predictions are float32.

    Args:
        encoder: images ``[N, C, S, S]`` -> ``[N, E]``; of several views the first, which is also
            what latent actions and context are inferred from.
        decoder: features ``[N, F]`` -> images; with a context encoder it also takes its maps.
        rssm: the dynamics that is imagined.
        heads: scalar heads on the features: ``reward``, ``aux_reward``, ``discount``.
        grad_heads: heads whose gradient reaches the representation; the others read detached
            features. Default: ``("reward", "aux_reward")``.
        lower_rssm: an action-free RSSM between the encoder and ``rssm`` (APV's stack).
        concat_embed: give ``rssm`` the image embedding beside the lower feature.
        latent_action_encoder: infers the actions from the frames (PreLAR, pre-training).
        action_encoder: encodes the real actions (PreLAR, fine-tuning).
        action_free: the dynamics gets no action at all (APV, pre-training).
        context_encoder: ContextWM's context branch.
        discount: gamma, for imagination without a ``discount`` head. Default: 0.99.
        view_encoders, view_decoders: of the other views, in their order. Default: none.
        vector_encoder, vector_decoder: ``[N, size]`` -> ``[N, E]`` with the attribute
            ``embed_dim``, and features -> ``[N, size]``. Default: none.
        gray: networks see and predict brightness, C = 1. Default: False.
        sample: draw latents while observing; False takes modes. Default: True.
        action_dim: size A of the real action. Default: the action encoder's, else any that the RSSM
            takes.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        rssm: RSSM,
        *,
        heads: Mapping[str, nn.Module] | None = None,
        grad_heads: Iterable[str] = ("reward", "aux_reward"),
        lower_rssm: RSSM | None = None,
        concat_embed: bool = False,
        latent_action_encoder: LatentActionEncoder | None = None,
        action_encoder: ActionEncoder | None = None,
        action_free: bool = False,
        context_encoder: ContextEncoder | None = None,
        discount: float = 0.99,
        view_encoders: Iterable[nn.Module] = (),
        view_decoders: Iterable[nn.Module] = (),
        vector_encoder: nn.Module | None = None,
        vector_decoder: nn.Module | None = None,
        gray: bool = False,
        sample: bool = True,
        action_dim: int | None = None,
    ) -> None:
        super().__init__()
        if action_dim is None and action_encoder is not None:
            action_dim = action_encoder.action_dim
        self.action_dim = action_dim
        self.encoder, self.decoder, self.rssm = encoder, decoder, rssm
        self.heads = nn.ModuleDict(dict(heads or {}))
        self.grad_heads = frozenset(grad_heads)
        self.lower_rssm, self.concat_embed = lower_rssm, concat_embed
        self.latent_action_encoder, self.action_encoder = latent_action_encoder, action_encoder
        self.action_free, self.context_encoder = action_free, context_encoder
        self.view_encoders = nn.ModuleList(view_encoders)
        self.view_decoders = nn.ModuleList(view_decoders)
        self.vector_encoder, self.vector_decoder = vector_encoder, vector_decoder
        self.gray, self.discount, self.sample = gray, discount, sample
        size = getattr(decoder, "image_size", None)  # a user's decoder may not tell
        self._image_size: int | str = size if isinstance(size, int) else "S"
        self._frame = (3 * (1 + len(self.view_encoders)), self._image_size, self._image_size)

        self.in_keys = ["pixels", "is_first"]
        if vector_encoder is not None:
            self.in_keys.append("vector")
        if latent_action_encoder is None and not action_free:
            self.in_keys.append("action")
        elif latent_action_encoder is not None and latent_action_encoder.frames == "flow":
            self.in_keys.append("flow")
        out_keys: list[Any] = ["embed", "stoch", "deter", "feat", "posterior", "prior"]
        out_keys += [("prediction", name) for name in ("pixels", *self.heads)]
        if vector_decoder is not None:
            out_keys.append(("prediction", "vector"))
        if latent_action_encoder is not None:
            out_keys.append("latent_action")
            if latent_action_encoder.latent_actions.outputs().has_params:
                out_keys.append("latent_action_statistics")
        if lower_rssm is not None:
            out_keys += [("lower", key) for key in ("stoch", "deter", "feat", "posterior", "prior")]
        self.out_keys = out_keys

    # ------------------------------------------------------------------ training

    def check_batch(self, batch: TensorDictBase) -> None:
        """Raise KeyError, TypeError or ValueError where a batch ``[B, T]`` cannot be read."""
        weight = self.rssm.input_layer.weight
        check_entry("pixels", batch["pixels"], "uint8", ("B", "T", *self._frame), weight)
        entries: dict[str, tuple[Any, tuple[int | str, ...]]] = {
            "is_first": ("bool", (1,)),
            "action": ("float", (self.action_dim or "A",)),
            "vector": ("float", (getattr(self.vector_encoder, "in_features", "V"),)),
            "flow": ("uint8", (3, *self._frame[1:])),
        }
        steps = cast(Tensor, batch["pixels"]).shape[:2]
        for key, (dtype, shape) in entries.items():
            if key in self.in_keys:
                check_entry(key, batch[key], dtype, (*steps, *shape), weight, "pixels")

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Observe a batch ``[B, T]`` and predict; writes ``out_keys`` into ``tensordict``.

        Raises:
            KeyError, TypeError, ValueError: see :meth:`check_batch`; the encoder's or the decoder's
                output has another type or shape than they promise.
        """
        self.check_batch(tensordict)
        images = self.preprocess(tensordict["pixels"])
        out = self.infer(tensordict, images)
        context = None
        if self.context_encoder is not None:
            context = self.context_encoder(self.first_view(images))
        feat = out["feat"]
        out["prediction", "pixels"] = self.decode(feat, context)
        if self.vector_decoder is not None:
            out["prediction", "vector"] = self.vector_decoder(feat)
        for name, head in self.heads.items():
            out["prediction", name] = head(feat if name in self.grad_heads else feat.detach())
        return tensordict.update(out)

    def infer(self, tensordict: TensorDictBase, images: Tensor | None = None) -> TensorDict:
        """What :meth:`forward` infers from a batch ``[B, T]``, without its predictions.

        ``images`` are its preprocessed pixels, where it is checked already.
        """
        if images is None:
            self.check_batch(tensordict)
            images = self.preprocess(tensordict["pixels"])
        embed = self.encode(images, tensordict.get("vector", None))
        action, statistics = self.dynamics_actions(tensordict, images)
        out = self.observe(embed, action, tensordict["is_first"])
        if self.latent_action_encoder is not None:
            out["latent_action"] = action
            if statistics is not None:
                out["latent_action_statistics"] = statistics
        return out

    def preprocess(self, pixels: Tensor) -> Tensor:
        """uint8 ``[..., 3 V, H, W]`` -> images ``[..., C V, H, W]`` in [-0.5, 0.5].

        They are in the precision of the weights.

        Raises:
            TypeError, ValueError: ``pixels`` have another type, size, number of views or device,
                or are empty.
        """
        weight = self.rssm.input_layer.weight
        check_entry("pixels", pixels, "uint8", (*pixels.shape[:-3], *self._frame), weight)
        images = normalize_pixels(pixels, weight.dtype)
        return to_gray(images) if self.gray else images

    def first_view(self, images: Tensor) -> Tensor:
        """``[..., C V, H, W]`` -> the first picture, ``[..., C, H, W]``."""
        return images[..., : images.shape[-3] // (1 + len(self.view_encoders)), :, :]

    def encode(self, images: Tensor, vector: Tensor | None = None) -> Tensor:
        """Images ``[B, T, C V, H, W]`` and vectors ``[B, T, size]`` -> embeddings ``[B, T, E]``."""
        batch = images.shape[:2]
        views = images.flatten(0, 1).chunk(1 + len(self.view_encoders), 1)
        embeds = [self.encoder(views[0])]
        shape = (len(views[0]), getattr(self.encoder, "embed_dim", "E"))
        check_output("output of the encoder", embeds[0], shape, self.rssm.input_layer.weight)
        embeds += [e(view) for e, view in zip(self.view_encoders, views[1:], strict=True)]
        if self.vector_encoder is not None:
            assert vector is not None, "the model sees a vector"
            embeds.append(self.vector_encoder(vector.flatten(0, 1).to(images.dtype)))
        embed = torch.cat(embeds, -1) if len(embeds) > 1 else embeds[0]
        return embed.unflatten(0, batch)

    def decode(self, feat: Tensor, context: list[Tensor] | None = None) -> Tensor:
        """Features ``[B, T, F]`` -> image means ``[B, T, C V, H, W]`` in [-0.5, 0.5]."""
        maps = () if context is None else (context,)
        flat = feat.flatten(0, 1)
        views = [self.decoder(flat, *maps), *(decoder(flat) for decoder in self.view_decoders)]
        shape = (len(flat), 1 if self.gray else 3, self._image_size, self._image_size)
        check_entry("output of the decoder", views[0], "float", shape, flat)
        images = torch.cat(views, 1) if len(views) > 1 else views[0]
        return images.unflatten(0, feat.shape[:2])

    def dynamics_actions(
        self, tensordict: TensorDictBase, images: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """What the RSSM is given as actions ``[B, T, U]``, and their parameters ``[B, T, ...]``.

        Either may be None.
        """
        if self.action_free:
            return None, None
        if self.latent_action_encoder is not None:
            flow = None
            if self.latent_action_encoder.frames == "flow":
                flow = normalize_pixels(tensordict["flow"], images.dtype)
            return self.latent_action_encoder(self.first_view(images), flow, self.sample)
        action = cast(Tensor, tensordict["action"]).to(self.rssm.input_layer.weight.dtype)
        if self.action_encoder is not None:
            return self.action_encoder(action, self.sample, tensordict["is_first"])
        return action, None

    def observe(
        self,
        embed: Tensor,
        action: Tensor | None,
        is_first: Tensor,
        state: State | None = None,
        lower_state: State | None = None,
        sample: bool | None = None,
    ) -> TensorDict:
        """Filter embeddings ``[B, T, E]`` under actions of the dynamics; is_first ``[B, T, 1]``.

        ``sample`` replaces the model's own.
        """
        sample = self.sample if sample is None else sample
        out = TensorDict({"embed": embed}, batch_size=embed.shape[:2])
        first = is_first.squeeze(-1)
        if self.lower_rssm is not None:
            lower, posterior, prior = self.lower_rssm.observe(
                embed, None, first, lower_state, sample
            )
            feat = self.lower_rssm.feat(lower)
            out["lower"] = TensorDict(
                {**lower._asdict(), "feat": feat, "posterior": posterior, "prior": prior},
                batch_size=out.batch_size,
            )
            embed = torch.cat([embed, feat], -1) if self.concat_embed else feat
        states, posterior, prior = self.rssm.observe(embed, action, first, state, sample)
        out.update(states._asdict())
        return out.update({"feat": self.rssm.feat(states), "posterior": posterior, "prior": prior})

    # ------------------------------------------------------------------ imagination

    def imagine(
        self,
        actor: Actor | OneHotActor,
        start: TensorDictBase,
        horizon: int = 15,
        sample: bool = True,
    ) -> TensorDict:
        """Imagine trajectories under the actor, from states that are detached first.

        ::

            state      z0   z1   z2  ...  zH        z0 comes from the replay batch
            action     0    a1   a2  ...  aH        a_k was sampled at z_{k-1}
            log_prob   0    l1   l2  ...  lH        of a_k (detached) at z_{k-1}
            entropy    e0   e1   e2  ...  0         of the policy at z_k

        Args:
            actor: features ``[N, F]`` -> a distribution of actions, :class:`TruncatedNormal` or
                :class:`OneHot`; reads detached features.
            start: ``stoch, deter`` and optionally ``terminated``, any batch shape (``[B, T]``
                becomes N = B*T). An action window also needs ``action`` ``[B, T, A]``, and reads
                ``is_first`` ``[B, T, 1]``, or what :meth:`flatten_start_states` made of them.
            horizon: number of steps H. Default: 15.
            sample: draw latents and actions; otherwise take modes. Default: True.

        Returns:
            TensorDict ``[N, H+1]``: ``feat``, ``action``, ``log_prob``, ``entropy``, ``reward``,
            ``discount``, ``weight`` (product of the discounts before).
        """
        start = (self.flatten_start_states(start) if start.dim() != 1 else start).detach()
        history = start["action_history"] if self.action_window > 1 else None
        state = State(start["stoch"], start["deter"])
        feats, actions, policies = [self.rssm.feat(state)], [], []
        for _ in range(horizon):
            policy = actor(feats[-1].detach())
            action = policy.rsample(sample)
            latent, history = self.next_latent_action(action, history, sample)
            state, _ = self.rssm.step(state, latent, sample)
            feats.append(self.rssm.feat(state))
            actions.append(action)
            policies.append(policy)
        feat = torch.stack(feats, 1)  # [N, H+1, F]
        action, policy = torch.stack(actions, 1), type(policy).stack(policies, 1)  # [N, H, A]
        discount = self.imagined_discount(feat, start.get("terminated", None))
        ones = torch.ones_like(discount[:, :1])
        return TensorDict(
            {
                "feat": feat,
                "action": F.pad(action, (0, 0, 1, 0)),
                "log_prob": F.pad(policy.log_prob(action.detach()), (1, 0)).unsqueeze(-1),
                "entropy": F.pad(policy.entropy(), (0, 1)).unsqueeze(-1),
                "reward": self.heads["reward"](feat),
                "discount": discount,
                "weight": torch.cat([ones, discount[:, :-1]], 1).cumprod(1).detach(),
            },
            batch_size=feat.shape[:2],
        )

    def flatten_start_states(self, states: TensorDictBase) -> TensorDictBase:
        """States ``[B, T]`` -> starts of imagination ``[B*T]``.

        With an action window, ``action`` ``[B, T, A]`` and, if there is one, ``is_first`` become
        ``action_history`` ``[B*T, window-1, A]``.
        """
        starts = cast(TensorDictBase, states.flatten())
        if self.action_window > 1:
            is_first = states.get("is_first", None)
            history = recent_actions(states["action"], self.action_window - 1, is_first)
            starts["action_history"] = history.flatten(0, 1)
        return starts

    @property
    def action_window(self) -> int:
        """How many actions, the newest last, the action encoder sees."""
        return 1 if self.action_encoder is None else self.action_encoder.window

    def imagined_discount(self, feat: Tensor, terminated: Tensor | None) -> Tensor:
        """Discount at each imagined state, ``[N, H+1, 1]``; the true one at z0 where known."""
        if "discount" not in self.heads:
            return torch.full_like(feat[..., :1], self.discount, dtype=torch.float32)
        discount = torch.sigmoid(self.heads["discount"](feat))
        if terminated is None:
            return discount
        known = self.discount * (~terminated).float().unsqueeze(1)
        return torch.cat([known, discount[:, 1:]], 1)

    def next_latent_action(
        self, action: Tensor, history: Tensor | None, sample: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Action ``[N, A]`` -> that of the dynamics ``[N, U]``; ``history`` moves on by one."""
        if self.action_encoder is None:
            return action, None
        recent = action.unsqueeze(-2)
        if history is not None:
            recent = torch.cat([history, recent], -2)  # [N, window, A]
            history = recent[..., 1:, :]
        return self.action_encoder.encode(recent, sample)[0], history

    # ------------------------------------------------------------------ prediction

    @torch.no_grad()
    def open_loop(
        self, tensordict: TensorDictBase, context: int = 5, action: Tensor | None = None
    ) -> Tensor:
        """See ``context`` frames, imagine the rest.

        Args:
            action: what the RSSM is given as actions, ``[B, T, U]``. Default: the batch's own.

        Returns:
            Predicted frames in [0, 1], ``[B, T, 3 V, H, W]``; the first ``context`` are
            reconstructions. Gray ones have three equal channels.
        """
        images = self.preprocess(tensordict["pixels"])
        if action is None:
            action, _ = self.dynamics_actions(tensordict, images)
        seen = None if action is None else action[:, :context]
        vector = None if self.vector_encoder is None else tensordict["vector"][:, :context]
        embed = self.encode(images[:, :context], vector)
        out = self.observe(embed, seen, tensordict["is_first"][:, :context])
        last = State(out["stoch"][:, -1], out["deter"][:, -1])
        later = None if action is None else action[:, context:]
        ahead, _ = self.rssm.imagine(later, last, self.sample, images.shape[1] - context)
        feat = torch.cat([out["feat"], self.rssm.feat(ahead)], 1)
        maps = None
        if self.context_encoder is not None:  # never a frame that is to be predicted
            maps = self.context_encoder(self.first_view(images[:, :context]))
        frames = (self.decode(feat, maps) + 0.5).clamp(0, 1)
        return frames.repeat_interleave(3, 2) if self.gray else frames
