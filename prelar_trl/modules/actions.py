"""Latent actions: inferred from two frames (pre-training), encoded from real ones (fine-tuning).

Source: PreLAR (Zhang et al., ECCV 2024), sections 3.2 and 3.4.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prelar_trl.modules.augmentation import random_shift
from prelar_trl.modules.checks import check_entry, check_output, embed_width
from prelar_trl.modules.latent_actions import LatentActions
from prelar_trl.types import FrameInput
from prelar_trl.utils import check_choice

__all__ = ["FRAME_CHANNELS", "ActionEncoder", "FrameInput", "LatentActionEncoder"]

FRAME_CHANNELS: dict[FrameInput, int] = {"concat": 6, "diff": 3, "catdiff": 9, "flow": 3}


class LatentActionEncoder(nn.Module):
    """Inverse-dynamics model: two consecutive frames -> the latent action between them.

    ::

        frame          x0          x1          x2
        latent action  0           u1(x0,x1)   u2(x1,x2)

    Args:
        encoder: image network for as many channels as ``FRAME_CHANNELS[frames]``, with the
            attribute ``embed_dim``.
        latent_actions: kind of latent action, whose output width is ``num_outputs``.
        frames: what the network sees of a pair: ``concat`` (both), ``diff`` (x_t - x_{t-1}),
            ``catdiff`` (both and the difference), ``flow`` (a given optical-flow image).
        hidden: size of the hidden layer. Default: 1024.
        shift: in training each pair of frames is moved by up to that many pixels in either
            direction, both frames alike and their edges repeated, so that an action cannot say
            where in the picture something happens. Default: 0.

    Raises:
        TypeError, ValueError: an ``embed_dim`` or a kind that cannot be used; by a call, where the
            network or the kind gives something else than they say.
    """

    def __init__(
        self,
        encoder: nn.Module,
        latent_actions: LatentActions,
        *,
        frames: FrameInput = "concat",
        hidden: int = 1024,
        shift: int = 0,
    ) -> None:
        super().__init__()
        check_choice("frames", frames, FRAME_CHANNELS)
        if shift < 0:
            raise ValueError(f"shift={shift} must not be negative")
        self.frames, self.shift = frames, shift
        self.latent_actions = latent_actions
        latent_actions.outputs()  # looks at the kind
        self.encoder = encoder
        self.head = nn.Sequential(
            nn.Linear(embed_width("encoder", encoder), hidden),
            nn.ELU(),
            nn.Linear(hidden, latent_actions.num_outputs),
        )

    def forward(
        self, images: Tensor, flow: Tensor | None = None, sample: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Infer the latent actions of a sequence.

        Args:
            images: ``[B, T, 3, H, W]`` in [-0.5, 0.5].
            flow: optical flow that led to each frame, as images, for ``frames="flow"``.
            sample: draw the stochastic part; otherwise take its mode. Default: True.

        Returns:
            Latent actions ``[B, T, U]`` and their parameters ``[B, T, ...]`` (None for kinds
            without), both zero at t = 0.
        """
        before, after = images[:, :-1], images[:, 1:]
        match self.frames:
            case "concat":
                x = torch.cat([before, after], 2)
            case "diff":
                x = after - before
            case "catdiff":
                x = torch.cat([before, after, after - before], 2)
            case "flow":
                if flow is None:
                    raise KeyError("frames='flow' needs optical-flow images under the key 'flow'")
                x = flow[:, 1:]
        pairs = x.flatten(0, 1)  # [B*(T-1), C, H, W]
        if self.shift and self.training:
            pairs = random_shift(pairs, self.shift)
        embed, first = self.encoder(pairs), cast(nn.Linear, self.head[0])
        shape = (len(pairs), first.in_features)
        check_output("output of the latent-action encoder", embed, shape, first.weight)
        raw = self.head(embed).unflatten(0, x.shape[:2])
        action, params = self.latent_actions(raw, sample)
        check_entry("latent action", action, "float", (*x.shape[:2], self.latent_actions.dim))
        if params is not None:
            params = F.pad(params, (0, 0) * (params.dim() - 2) + (1, 0))
        return F.pad(action, (0, 0, 1, 0)), params


class ActionEncoder(nn.Module):
    """Maps real actions into the latent-action space.

    Args:
        action_dim: size A of the real action.
        latent_actions: kind of latent action that it gives. What a kind learns (a codebook) is
            that of pre-training and stands still.
        hidden: size of the hidden layer. Default: 1024.
        window: actions seen at a time: the last ``window`` ones of the episode, zeros before the
            first. At first it is as with 1; the earlier ones enter as they are needed. Default: 1.

    Raises:
        TypeError, ValueError: a kind that cannot be used; by a call, where it gives something else
            than it says.
    """

    def __init__(
        self,
        action_dim: int,
        latent_actions: LatentActions,
        *,
        hidden: int = 1024,
        window: int = 1,
    ) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window={window}: the action window must be at least 1")
        latent_actions.outputs()  # looks at the kind
        self.action_dim, self.window = action_dim, window
        self.latent_actions = latent_actions
        last = self.hidden = nn.Linear(action_dim, hidden)
        if window > 1:
            self.hidden = nn.Conv1d(action_dim, hidden, window)
            with torch.no_grad():
                self.hidden.weight.zero_()[..., -1] = last.weight
            self.hidden.bias = last.bias
        self.act = nn.ELU()
        self.out = nn.Linear(hidden, self.latent_actions.num_outputs)

    def train(self, mode: bool = True) -> ActionEncoder:
        super().train(mode)
        self.latent_actions.eval()
        return self

    def forward(
        self, action: Tensor, sample: bool = True, is_first: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``[..., T, A]`` -> latent actions ``[..., T, U]`` and their parameters, or None.

        With ``window=1`` any leading shape serves; otherwise the input is ``[B, T, A]``, with
        episodes that begin where ``is_first`` ``[B, T, 1]`` says so. Default: nowhere.
        """
        if self.window == 1:
            return self.encode(action.unsqueeze(-2), sample)
        return self.encode(recent_actions(action, self.window, is_first), sample)

    def encode(self, recent: Tensor, sample: bool = True) -> tuple[Tensor, Tensor | None]:
        """The last actions ``[..., window, A]`` -> the newest's latent action ``[..., U]``.

        Its parameters come second, or None. :meth:`forward`, imagination and acting all end here.
        """
        *batch, window, size = recent.shape
        if (window, size) != (self.window, self.action_dim):
            raise ValueError(
                f"actions {list(recent.shape)}: the last dimensions must be the window "
                f"{self.window} and the action's size {self.action_dim}"
            )
        if window == 1:
            x = self.hidden(recent[..., 0, :])
        else:
            x = self.hidden(recent.reshape(-1, window, size).transpose(1, 2))
            x = x.reshape(*batch, self.out.in_features)
        code, params = self.latent_actions(self.out(self.act(x)), sample)
        check_entry("latent action", code, "float", (*x.shape[:-1], self.latent_actions.dim))
        return code, params


def recent_actions(action: Tensor, window: int, is_first: Tensor | None = None) -> Tensor:
    """The last ``window`` actions up to each step: ``[B, T, A]`` -> ``[B, T, window, A]``.

    Zeros before the first one, and in place of those before the newest ``is_first`` ``[B, T, 1]``.
    """

    def recent(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, window - 1, 0)).unfold(1, window, 1).transpose(2, 3)

    if is_first is None:
        return recent(action)
    episode = is_first.cumsum(1) + 1  # 0: before the first step
    return recent(action).masked_fill(recent(episode) != episode.unsqueeze(2), 0)
