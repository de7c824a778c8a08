"""Latent actions: inferred from two frames (pre-training), encoded from real ones (fine-tuning).

Source: PreLAR (Zhang et al., ECCV 2024), sections 3.2 and 3.4.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prelar_trl.modules.convnets import Norm, ResNetEncoder
from prelar_trl.modules.distributions import Categorical, Gaussian
from prelar_trl.modules.linear import Linear

__all__ = ["ActionCode", "ActionEncoder", "LatentActionEncoder"]

FrameInput = Literal["concat", "diff", "catdiff", "flow"]
Variant = Literal["gaussian", "deterministic", "categorical", "mixed"]

FRAME_CHANNELS: dict[FrameInput, int] = {"concat": 6, "diff": 3, "catdiff": 9, "flow": 3}


class ActionCode:
    """How a network's output becomes an action code, and its distribution.

    Args:
        variant: ``gaussian`` (mean and std of ``size`` variables), ``deterministic`` (``size``
            numbers), ``categorical`` (``size`` one-hot variables of ``classes``), ``mixed``
            (``deter_size`` numbers, then Gaussian or, with ``classes`` > 0, categorical ones).
    """

    def __init__(
        self, variant: Variant = "gaussian", size: int = 64, classes: int = 0, deter_size: int = 64
    ) -> None:
        if variant not in ("gaussian", "deterministic", "categorical", "mixed"):
            raise ValueError(
                f"variant={variant!r} is unknown; "
                "choose gaussian, deterministic, categorical or mixed"
            )
        if variant == "categorical" and classes < 2:
            raise ValueError(f"classes={classes}: a categorical action code needs at least 2")
        self.deter_size = {"deterministic": size, "mixed": deter_size}.get(variant, 0)
        self.latent: Categorical | Gaussian | None = None
        if variant == "categorical" or (variant == "mixed" and classes):
            self.latent = Categorical(size, classes)
        elif variant != "deterministic":
            self.latent = Gaussian(size, min_std=0.0)
        self.num_outputs = self.deter_size + (self.latent.num_outputs if self.latent else 0)
        self.dim = self.deter_size + (self.latent.flat_size if self.latent else 0)

    def __call__(self, raw: Tensor, sample: bool = True) -> tuple[Tensor, Tensor | None]:
        """Network output ``[..., num_outputs]`` -> code ``[..., dim]``, statistics or None."""
        if self.latent is None:
            return raw, None
        deter, stoch = raw.split([self.deter_size, self.latent.num_outputs], -1)
        statistics = self.latent.statistics(stoch)
        drawn = self.latent.flatten(self.latent.draw(statistics, sample))
        return torch.cat([deter, drawn], -1), statistics


class LatentActionEncoder(nn.Module):
    """Inverse-dynamics model: two consecutive frames -> the latent action between them.

    ::

        frame          x0          x1          x2
        latent action  0           u1(x0,x1)   u2(x1,x2)

    Args:
        frames: what the network sees of a pair: ``concat`` (both), ``diff`` (x_t - x_{t-1}),
            ``catdiff`` (both and the difference), ``flow`` (a given optical-flow image).
        variant, size, classes, deter_size: see :class:`ActionCode`.
        hidden: size of the hidden layer. Default: 1024.
        depth, stages, layers, norm: of the ResNet, see :class:`ResNetEncoder`.
    """

    def __init__(
        self,
        *,
        frames: FrameInput = "concat",
        variant: Variant = "gaussian",
        size: int = 64,
        classes: int = 0,
        deter_size: int = 64,
        hidden: int = 1024,
        depth: int = 48,
        stages: int = 3,
        layers: int = 2,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        if frames not in FRAME_CHANNELS:
            raise ValueError(f"frames={frames!r} is unknown; choose {', '.join(FRAME_CHANNELS)}")
        self.frames = frames
        self.code = ActionCode(variant, size, classes, deter_size)
        self.encoder = ResNetEncoder(FRAME_CHANNELS[frames], depth, stages, layers, norm)
        self.head = nn.Sequential(
            Linear(self.encoder.embed_dim, hidden),
            nn.ELU(inplace=True),
            Linear(hidden, self.code.num_outputs),
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
            Latent actions ``[B, T, U]`` (zero at t = 0), and the statistics of the transitions
            ``[B, T-1, ...]`` (None for the deterministic variant).
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
        raw = self.head(self.encoder(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        code, statistics = self.code(raw, sample)
        return F.pad(code, (0, 0, 1, 0)), statistics


class ActionEncoder(nn.Module):
    """Maps real actions into the latent-action space.

    Args:
        action_dim: size A of the real action.
        variant, size, classes, deter_size: see :class:`ActionCode`. Default: deterministic, 64.
        hidden: size of the hidden layer. Default: 1024.
        window: actions seen at a time: the last ``window`` ones, by a causal convolution, zeros
            before the first. Default: 1.
    """

    def __init__(
        self,
        action_dim: int,
        *,
        variant: Variant = "deterministic",
        size: int = 64,
        classes: int = 0,
        deter_size: int = 64,
        hidden: int = 1024,
        window: int = 1,
    ) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window={window}: the action window must be at least 1")
        self.action_dim, self.window = action_dim, window
        self.code = ActionCode(variant, size, classes, deter_size)
        self.hidden = (
            Linear(action_dim, hidden)
            if window == 1
            else nn.Conv1d(action_dim, hidden, window, padding=window - 1)
        )
        self.out = Linear(hidden, self.code.num_outputs)

    def forward(self, action: Tensor, sample: bool = True) -> tuple[Tensor, Tensor | None]:
        """``[..., T, A]`` -> codes ``[..., T, U]`` and their statistics, or None.

        With ``window=1`` any leading shape serves; otherwise the input is ``[B, T, A]``.
        """
        if self.window == 1:
            x = self.hidden(action)
        else:
            x = self.hidden(action.transpose(1, 2))[..., : action.shape[1]].transpose(1, 2)
        return self.code(self.out(F.elu(x, inplace=True)), sample)
