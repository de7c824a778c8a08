"""What a pre-trained world model has learned, as numbers. Nothing here is a training loss.

Shape legend: B batch, T time, A action, U latent action, N transitions, K exchanged actions,
M samples, X features. World models are expected in ``eval()`` mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import scipy  # which imports scipy.stats when it is used
import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from prelar_trl.modules import RSSMWorldModel
from prelar_trl.modules.actions import LatentActionEncoder
from prelar_trl.record import psnr, ssim

__all__ = [
    "action_effects",
    "action_usage",
    "frame_difference",
    "latent_action_features",
    "linear_r2",
    "mlp_r2",
    "openloop_quality",
    "rank_correlation",
    "states_before",
    "transfer",
    "transfer_quality",
]


@torch.no_grad()
def openloop_quality(
    world_model: RSSMWorldModel,
    batch: TensorDictBase,
    context: int,
    metrics: Sequence[Callable[[Tensor, Tensor], Tensor]] = (psnr, ssim),
) -> dict[str, dict[str, Tensor]]:
    """PSNR and SSIM of open-loop predictions, frame by frame.

    The latent actions of the imagined frames are inferred from those very frames: they tell what
    happens, and the model what that looks like. So three predictions are compared: under the
    clip's ``own_actions``; under ``other_actions``, those of another clip of the batch from frame
    ``context`` on; and ``last_frame``, the last seen frame, repeated. A model without actions has
    ``no_actions`` in place of the first two.

    Args:
        batch: ``pixels, is_first``, ``[B, T]``; B at least 2.
        context: number of frames seen; their values are those of reconstructions.
        metrics: what is compared. Default: PSNR and SSIM.

    Returns:
        ``{"psnr" | "ssim": {prediction: float32 [B, T]}}``.
    """
    pixels = batch["pixels"]
    own, _ = world_model.dynamics_actions(batch, world_model.preprocess(pixels))
    if own is None:
        predictions = {"no_actions": world_model.open_loop(batch, context)}
    else:
        other = _switch(own, own.roll(1, 0), context)
        predictions = {
            "own_actions": world_model.open_loop(batch, context, own),
            "other_actions": world_model.open_loop(batch, context, other),
        }
    last = pixels[:, context - 1 : context].expand_as(pixels[:, context:])
    predictions["last_frame"] = torch.cat([pixels[:, :context], last], 1).float() / 255
    return {
        metric.__name__: {name: metric(x, pixels) for name, x in predictions.items()}
        for metric in metrics
    }


@torch.no_grad()
def transfer(
    world_model: RSSMWorldModel, source: TensorDictBase, target: TensorDictBase, context: int
) -> tuple[Tensor, Tensor]:
    """Imagine the target's beginning under the source's latent actions.

    Args:
        source, target: ``pixels, is_first``, ``[B, T]``.
        context: frames of the target that are seen; from there on the source's actions act.

    Returns:
        Frames in [0, 1], ``[B, T, 3, H, W]``, imagined with the source's and with the target's
        own actions.
    """
    actions = [
        world_model.dynamics_actions(x, world_model.preprocess(x["pixels"]))[0]
        for x in (source, target)
    ]
    source_action, target_action = actions
    if source_action is None or target_action is None:
        raise ValueError("this world model has no latent actions to transfer")
    moved = world_model.open_loop(target, context, _switch(target_action, source_action, context))
    return moved, world_model.open_loop(target, context, target_action)


@torch.no_grad()
def transfer_quality(
    world_model: RSSMWorldModel,
    source: TensorDictBase,
    target: TensorDictBase,
    played: Tensor,
    context: int,
) -> dict[str, Tensor]:
    """Do the source's latent actions do in the target's scene what its true actions do there?

    Args:
        source, target: see :func:`transfer`.
        played: what really comes when the source's true actions are played from the target's state
            at frame ``context - 1`` on, uint8 ``[B, T - context, 3, H, W]``; a simulator tells.
        context: frames of the target that are seen.

    Returns:
        PSNR in dB of the imagined frames, float32 ``[B]`` each: ``transferred``, under the source's
        latent actions, against ``played``; ``own``, under the target's own, against the target; and
        ``own_played``, the target's own against ``played``: what no transfer at all would give.
    """
    moved, own = (x[:, context:] for x in transfer(world_model, source, target, context))
    real = target["pixels"][:, context:]
    pairs = {"transferred": (moved, played), "own": (own, real), "own_played": (own, played)}
    return {name: psnr(x, y).mean(1) for name, (x, y) in pairs.items()}


@torch.no_grad()
def latent_action_features(
    encoder: LatentActionEncoder,
    images: Tensor,
    flow: Tensor | None = None,
    *,
    sample: bool = False,
) -> Tensor:
    """Latent actions as their kind wants them read, without noise, or as the dynamics gets them.

    What is read without noise may be far below the noise: where the latent KL has won, the means of
    Gaussian latent actions differ by far less than their deviation of 1, and none of that gets
    through.

    Args:
        images: ``[B, T, 3, H, W]`` in [-0.5, 0.5]; flow: alike, for encoders of optical flow.
        sample: as the dynamics gets them. Default: False.

    Returns:
        ``[B, T-1, X]``; index t is the transition from frame t to frame t+1.
    """
    action, params = encoder(images, flow, sample=sample)
    if sample:
        return action[:, 1:]
    params = None if params is None else params[:, 1:]
    return encoder.latent_actions.features(action[:, 1:], params)


def frame_difference(images: Tensor, size: int = 8) -> Tensor:
    """What a linear probe could read without any network: differences of down-sampled frames.

    ``[B, T, 3, H, W]`` -> ``[B, T-1, 3*size*size]``.
    """
    small = F.adaptive_avg_pool2d(images.flatten(0, 1), size).flatten(1)
    return small.unflatten(0, images.shape[:2]).diff(dim=1)


def linear_r2(
    features: Tensor,
    targets: Tensor,
    test_features: Tensor,
    test_targets: Tensor,
    penalty: float = 1e-2,
) -> Tensor:
    """Share of the test targets' variance that a ridge regression on the features explains.

    ``min_W mean |y - W x|^2 + penalty |W|^2`` in closed form, features standardised and targets
    centered by the training samples; ``R^2 = 1 - sum (y - W x)^2 / sum (y - mean y)^2`` on the test
    samples.

    Args:
        features, targets: training samples, ``[M, X]`` and ``[M, A]``.
        test_features, test_targets: alike; of other clips.
        penalty: of the weights. Default: 1e-2.

    Returns:
        float64 ``[A]``; 1 is perfect, 0 as good as the mean, below 0 worse. NaN for a target that
        does not vary.
    """
    x, y, test_x, test_y = (z.double() for z in (features, targets, test_features, test_targets))
    x, test_x = _standardize(x, test_x)
    gram = x.T @ x / len(x) + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(gram, x.T @ (y - y.mean(0)) / len(x))  # [X, A]
    error = (test_y - y.mean(0) - test_x @ weights).square().sum(0)
    total = (test_y - test_y.mean(0)).square().sum(0)
    return torch.where(total > 0, 1 - error / total, torch.nan)


def mlp_r2(
    features: Tensor,
    targets: Tensor,
    test_features: Tensor,
    test_targets: Tensor,
    *,
    hidden: int = 128,
    steps: int = 1000,
    seed: int = 0,
) -> Tensor:
    """As :func:`linear_r2`, by a small MLP: also what is in the features in another form.

    No upper bound: where a linear map is what it takes, the MLP may fit worse.

    Two hidden layers, Adam with weight decay and a falling learning rate, mini-batches of 256; the
    weights are the average over the second half of the steps. Shapes as there; float64 ``[A]``.
    """
    x, test_x = _standardize(features.float(), test_features.float())
    x, test_x = x.clamp(-5, 5), test_x.clamp(-5, 5)  # a feature that hardly ever moves
    center, spread = targets.mean(0), targets.std(0).clamp_min(1e-6)
    y = (targets - center) / spread
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(x.shape[1], hidden),
            nn.ELU(),
            nn.Linear(hidden, hidden),
            nn.ELU(),
            nn.Linear(hidden, y.shape[1]),
        )
        average = AveragedModel(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=3e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            rows = torch.randint(len(x), (256,))
            optimizer.zero_grad()
            F.mse_loss(net(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
            if step >= steps // 2:
                average.update_parameters(net)
    with torch.no_grad():
        error = (test_targets - (average(test_x) * spread + center)).double().square().sum(0)
    total = (test_targets - test_targets.mean(0)).double().square().sum(0)
    return torch.where(total > 0, 1 - error / total, torch.nan)


def _standardize(x: Tensor, test_x: Tensor) -> tuple[Tensor, Tensor]:
    """Both by the first one's mean and deviation; a feature that is constant there becomes zero."""
    center, spread = x.mean(0), x.std(0)
    scale = torch.where(spread > 1e-8, spread.reciprocal(), 0.0)
    return (x - center) * scale, (test_x - center) * scale


@torch.no_grad()
def states_before(world_model: RSSMWorldModel, batch: TensorDictBase) -> Tensor:
    """Features of the posterior state before each transition, ``[B, T-1, F]``."""
    return world_model.infer(batch)["feat"][:, :-1].float()


@torch.no_grad()
def action_usage(
    world_model: RSSMWorldModel, batch: TensorDictBase, context: int
) -> dict[str, float]:
    """Does the dynamics use its actions? Two numbers to watch during pre-training.

    Args:
        batch: ``pixels, is_first``, ``[B, T]`` with B above 4; held-out clips.
        context: frames seen before the prediction.

    Returns:
        - ``action_usage``: how often the own action explains the transition better than four
          others, minus chance, over one minus chance: 0 chance, 1 perfect, -0.25 where
          exchanged actions change nothing at all;
        - ``action_psnr_gap``: PSNR of the open-loop prediction under the own actions minus that
          under another clip's, in dB.
    """
    batch = batch.select("pixels", "is_first", *world_model.in_keys)
    exchanges = 4
    explained = action_effects(world_model, batch, exchanges)["explained"].float().mean().item()
    quality = {
        name: x[:, context:].mean().item()
        for name, x in openloop_quality(world_model, batch, context, (psnr,))["psnr"].items()
    }
    chance = 1 / (1 + exchanges)
    return {
        "action_usage": (explained - chance) / (1 - chance),
        "action_psnr_gap": quality["own_actions"] - quality["other_actions"],
    }


@torch.no_grad()
def action_effects(
    world_model: RSSMWorldModel, batch: TensorDictBase, exchanges: int = 4
) -> dict[str, Tensor]:
    """Exchange each transition's action for those of other sequences: what changes?

    The action is the latent one, or what a model that is fine-tuned makes of the true one. Each is
    exchanged ``exchanges`` times, for the action at the same time in the sequences that
    come before in the batch. The distances are those that the action-state consistency orders.

    Args:
        batch: ``pixels, is_first``, ``[B, T]`` with B > ``exchanges``; ``action``, optional for a
            model with latent actions.
        exchanges: number K. Default: 4.

    Returns:
        - ``state`` ``[N*K]``: KL of the next state's prior from the one under the other action;
        - ``latent`` ``[N*K]``: KL of the latent action from the other one, or the squared distance
          of deterministic ones; only of a model with latent actions;
        - ``true`` ``[N*K]``: distance of the true actions, where the batch has them;
        - ``explained`` bool ``[N]``: the own action predicts the posterior better than any other;
          in 1 / (1 + K) of the cases by chance, never where the dynamics ignores actions.
    """
    if world_model.action_free:
        raise ValueError("this world model has no actions to exchange")
    if batch.shape[0] <= exchanges:
        raise ValueError(f"{exchanges} exchanges need more than {batch.shape[0]} sequences")
    out = world_model.infer(batch)
    rssm, encoder = world_model.rssm, world_model.latent_action_encoder
    stoch, deter = out["stoch"][:, :-1], out["deter"][:, :-1]
    if encoder is None:
        images = world_model.preprocess(batch["pixels"])
        action, _ = world_model.dynamics_actions(batch, images)
    else:
        action = out["latent_action"]
    posterior, action = out["posterior"][:, 1:], cast(Tensor, action)[:, 1:]  # [B, T-1, U]
    params = out.get("latent_action_statistics", None)
    params = None if params is None else params[:, 1:]
    # Anew, and by one head of an ensemble, so that a tie with another action is exact.
    prior = rssm(stoch, deter, action, head=0)
    own = rssm.latent.kl(posterior, prior)  # [B, T-1]
    explained = torch.ones_like(own, dtype=torch.bool)
    distances: dict[str, list[Tensor]] = {"state": [], "latent": [], "true": []}
    for shift in range(1, exchanges + 1):
        other = action.roll(shift, 0)
        shuffled = rssm(stoch, deter, other, head=0)
        explained &= own < rssm.latent.kl(posterior, shuffled)
        distances["state"].append(rssm.latent.kl(prior, shuffled))
        if encoder is not None:
            other_params = None if params is None else params.roll(shift, 0)
            distance = encoder.latent_actions.distance(action, params, other, other_params)
            distances["latent"].append(distance)
        if "action" in batch.keys():
            true = cast(Tensor, batch["action"])[:, 1:]
            distances["true"].append((true - true.roll(shift, 0)).norm(dim=-1))
    joined = {name: torch.cat(x).flatten() for name, x in distances.items() if x}
    return {**joined, "explained": explained.flatten()}


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of two vectors ``[N]``; NaN if one of them is constant."""
    if (x == x[0]).all() or (y == y[0]).all():
        return float("nan")
    return float(cast(Any, scipy.stats.spearmanr(x.cpu().numpy(), y.cpu().numpy())).statistic)


def _switch(action: Tensor, other: Tensor, step: int) -> Tensor:
    """``action`` before ``step``, ``other`` from there on."""
    return torch.cat([action[:, :step], other[:, step:]], 1)
