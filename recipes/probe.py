"""What a pre-training run has learned, measured on held-out clips.

python recipes/probe.py run=runs/pretrain

Open-loop quality by horizon; how well a linear map and a small MLP read the true action from the
latent one, from the state before, and from both, which tells unused, copying and acting latent
actions apart; how action distances and state distances go together; latent actions moved from one
video to another, on videos of the toy against what the simulator says would come.
Writes ``probe.csv``, ``probe.json`` and ``pictures/probe_*.png`` into the run folder.
"""

from __future__ import annotations

import sys

from prelar_trl.recipes.entry import start

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(start("probe"))

import math
import os
from collections import defaultdict
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from prelar_trl.data import VideoClips
from prelar_trl.envs.toy import draw_start, play_toy
from prelar_trl.fast import accelerate
from prelar_trl.models import make_model
from prelar_trl.modules import RSSMWorldModel
from prelar_trl.modules.pixels import normalize_pixels
from prelar_trl.pretrained import load_weights
from prelar_trl.probes import (
    action_effects,
    frame_difference,
    latent_action_features,
    linear_r2,
    mlp_r2,
    openloop_quality,
    rank_correlation,
    states_before,
    transfer,
    transfer_quality,
)
from prelar_trl.recipes.common import choose_device, read_run, seed_everything
from prelar_trl.recipes.schema import ProbeConfig
from prelar_trl.record import (
    RunFolder,
    film_rows,
    plot_bars,
    plot_psnr_by_step,
    plot_scatter,
    write_csv,
    write_picture,
)
from prelar_trl.utils import write_json

EXCHANGES = 4  # other actions that each transition's own is compared with
CALIBRATION = 8  # batches that give the random encoder's norm layers their statistics
SHOWN_POINTS = 2_000
FEATURES = (
    "latent_action",
    "latent_action_sampled",
    "state",
    "latent_action_and_state",
    "random_encoder",
    "frame_difference",
)
Row = tuple[str, str, int | None, float]  # probe, name, horizon, value


def probe(cfg: ProbeConfig) -> dict[str, Any]:
    """Run all probes; returns what ``probe.json`` holds."""
    if cfg.batch_size <= EXCHANGES:
        raise ValueError(f"batch_size={cfg.batch_size} must be above {EXCHANGES}")
    device = choose_device(cfg.device)
    seed_everything(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    run, checkpoint = read_run(cfg.run, trust_code=cfg.trust_code)
    if checkpoint["phase"] != "pretrain":
        raise ValueError(f"run={cfg.run} is a {checkpoint['phase']} run; probe a pretrain run")
    world_model, untrained = (
        accelerate(cast(RSSMWorldModel, make_model(checkpoint)).to(device)) for _ in range(2)
    )
    load_weights(world_model, checkpoint["model"], f"run={cfg.run}")
    world_model.eval()
    fitting, heldout, context = open_clips(cfg, run, world_model, device)
    has_actions = all("actions" in store.streams for store in heldout.stores)

    rows, notes = [], []
    quality, effects, test = defaultdict(list), defaultdict(list), defaultdict(list)
    calibrate(untrained, fitting)
    for batch in draw(heldout, cfg.clips, has_actions):
        for metric, predictions in openloop_quality(world_model, batch, context).items():
            add(quality, {(metric, name): x for name, x in predictions.items()})
        if world_model.latent_action_encoder is not None:
            add(effects, action_effects(world_model, batch, EXCHANGES))
        if has_actions:
            add(test, features(world_model, untrained, batch))
    curves = {key: x.mean(0).tolist() for key, x in join(quality).items()}  # [T] each
    for (metric, name), curve in curves.items():
        rows += [(f"openloop_{metric}", name, t + 1 - context, x) for t, x in enumerate(curve)]
        rows.append((f"openloop_{metric}", f"{name}_mean", None, _mean(curve[context:])))
    for metric, label in (("psnr", "PSNR (dB)"), ("ssim", "SSIM")):
        shown = {name: curve for (m, name), curve in curves.items() if m == metric}
        path = run.pictures / f"probe_{metric}.png"
        plot_psnr_by_step(shown, path, context=context, label=label)

    if has_actions:
        fit = defaultdict(list)
        for batch in draw(fitting, cfg.clips, has_actions):
            add(fit, features(world_model, untrained, batch))
        known, asked = join(fit), join(test)
        panels = {}
        for probe_name, read in (("action_r2", linear_r2), ("action_r2_mlp", mlp_r2)):
            scores = {
                name: read(known[name], known["target"], asked[name], asked["target"]).tolist()
                for name in FEATURES
                if name in known
            }
            for name, score in scores.items():
                rows.append((probe_name, name, None, _mean(score)))
                rows += [(probe_name, f"{name}_{i}", None, x) for i, x in enumerate(score)]
            title = f"R² of the true action, {'linear' if read is linear_r2 else 'MLP'}"
            panels[title] = {name: [max(_mean(score), 0.0)] for name, score in scores.items()}
        plot_bars(panels, run.pictures / "probe_action_r2.png")
    else:
        notes.append("the clips have no true actions: action_r2 and true distances are left out")

    if world_model.latent_action_encoder is None:
        notes.append(
            f"method={checkpoint['method']} has no latent actions: rank_correlation, contrast and "
            "transfer are left out"
        )
    else:
        rows += effect_rows(join(effects), run)
        draw_transfers(cfg, world_model, heldout, run, context)
        rows += toy_transfer(cfg, world_model, heldout, context)
    result = {
        "method": checkpoint["method"],
        "step": checkpoint["step"],
        "clips": cfg.clips,
        "seed": cfg.seed,
        "heldout_clips": heldout.num_clips,
        "notes": notes,
        "values": {f"{p}/{name}": x for p, name, horizon, x in rows if horizon is None},
    }
    write_csv(run.path / "probe.csv", ["probe", "name", "horizon", "value"], rows)
    write_json(run.path / "probe.json", result)
    return result


def open_clips(
    cfg: ProbeConfig, run: RunFolder, world_model: RSSMWorldModel, device: torch.device
) -> tuple[VideoClips, VideoClips, int]:
    """Clips to fit linear maps on, held-out clips, and the number of frames seen."""
    chosen = {}
    for name in ("data", "clip_len", "context", "heldout"):
        own = getattr(cfg, name)
        chosen[name] = run.config.get(name) if own is None else own
        if chosen[name] is None:
            raise ValueError(f"{name} is not given and the run in {cfg.run} has none: add {name}=")
    context, heldout = chosen.pop("context"), chosen.pop("heldout")
    if not 0 < context < chosen["clip_len"]:
        raise ValueError(f"context={context} must lie below clip_len={chosen['clip_len']}")
    if not heldout:
        raise ValueError(f"the run in {cfg.run} held no clips out: add heldout= and other data=")
    own_share = run.config.get("heldout") or 0
    if heldout > own_share and stores(chosen["data"]) & stores(run.config.get("data")):
        raise ValueError(
            f"heldout={heldout:g} would probe on clips that the run in {cfg.run} has learned from: "
            f"it held {own_share:g} of them out; lower heldout, or give other data="
        )
    streams = ["pixels"] + (["flow"] if "flow" in world_model.in_keys else [])
    path = chosen.pop("data")
    chosen |= {"batch_size": cfg.batch_size, "seed": cfg.seed, "device": device}
    fitting, held = (
        VideoClips(path, split=split, streams=streams, heldout=heldout, **chosen)
        for split in ("train", "heldout")
    )
    return fitting, held, context


def stores(data: Any) -> set[str]:
    """The places of one or several clip stores, each in one spelling."""
    places = [data] if isinstance(data, str) else data or ()
    return {os.path.realpath(os.path.expanduser(place)) for place in places}


def draw(clips: VideoClips, count: int, with_actions: bool) -> Any:
    """At least ``count`` windows, in batches."""
    for _ in range(math.ceil(count / clips.batch_size)):
        yield clips.sample_with_actions() if with_actions else clips.sample()


@torch.no_grad()
def calibrate(untrained: RSSMWorldModel, clips: VideoClips) -> None:
    """Norm layers of the random encoder get statistics, so that it is not at a disadvantage."""
    if untrained.latent_action_encoder is not None:
        for layer in untrained.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None  # those of all batches, nothing of the initial ones
        untrained.train()
        for _ in range(CALIBRATION):
            batch = clips.sample()
            untrained.dynamics_actions(batch, untrained.preprocess(batch["pixels"]))
    untrained.eval()


@torch.no_grad()
def features(
    world_model: RSSMWorldModel, untrained: RSSMWorldModel, batch: TensorDict
) -> dict[str, Tensor]:
    """What the true action (``target``) is read from, ``[B*(T-1), X]`` each."""
    images = world_model.preprocess(batch["pixels"])
    flow = normalize_pixels(batch["flow"], images.dtype) if "flow" in batch.keys() else None
    found = {
        "target": cast(Tensor, batch["action"])[:, 1:],
        "frame_difference": frame_difference(images),
    }
    found["state"] = states_before(world_model, batch)
    for name, model in (("latent_action", world_model), ("random_encoder", untrained)):
        if model.latent_action_encoder is not None:
            found[name] = latent_action_features(model.latent_action_encoder, images, flow)
    if (encoder := world_model.latent_action_encoder) is not None:
        found["latent_action_sampled"] = latent_action_features(encoder, images, flow, sample=True)
        found["latent_action_and_state"] = torch.cat([found["latent_action"], found["state"]], -1)
    return {name: x.flatten(0, 1).cpu() for name, x in found.items()}


def effect_rows(effects: dict[str, Tensor], run: RunFolder) -> list[Row]:
    """Rank correlations of the distances, and how often the own action explains best."""
    pairs = [("latent", "state"), ("true", "state"), ("true", "latent")]
    pairs = [(x, y) for x, y in pairs if x in effects and y in effects]
    rows: list[Row] = [
        ("rank_correlation", f"{x}_{y}", None, rank_correlation(effects[x], effects[y]))
        for x, y in pairs
    ]
    rows.append(("state_distance", "mean", None, float(effects["state"].mean())))
    rows.append(("contrast", "accuracy", None, float(effects["explained"].float().mean())))
    rows.append(("contrast", "chance", None, 1 / (1 + EXCHANGES)))
    shown = slice(0, SHOWN_POINTS)
    points = {
        f"{name} actions": (effects[name][shown].tolist(), effects["state"][shown].tolist())
        for name in ("latent", "true")
        if name in effects
    }
    plot_scatter(
        points,
        run.pictures / "probe_distance.png",
        x_label="distance of the actions",
        y_label="distance of the next states (nats)",
    )
    return rows


def draw_transfers(
    cfg: ProbeConfig, world_model: RSSMWorldModel, clips: VideoClips, run: RunFolder, context: int
) -> None:
    """Latent actions of clip A applied to the first frames of clip B, as pictures."""
    a, b = clips.sample(), clips.sample()
    moved, own = transfer(world_model, a, b, context)
    for i in range(min(cfg.transfers, cfg.batch_size)):
        rows = {
            "A": a["pixels"][i],
            "B": b["pixels"][i],
            "B with A's actions": moved[i],
            "B with its own": own[i],
        }
        write_picture(run.pictures / f"probe_transfer_{i}.png", film_rows(rows))


def toy_transfer(
    cfg: ProbeConfig, world_model: RSSMWorldModel, clips: VideoClips, context: int
) -> list[Row]:
    """Transfer measured against the simulator, where all clips are the toy's; no rows elsewhere.

    Nor where a frame comes after several steps of it.
    """
    infos = [store.meta.get("info") or {} for store in clips.stores]
    made = [(info.get("envs"), info.get("action_repeat", 1)) for info in infos]
    if made[0] not in ((["toy"], 1), (["toy/shifted"], 1)) or any(x != made[0] for x in made):
        return []
    env, size = infos[0]["envs"][0], clips.stores[0].size[0]
    generator = torch.Generator().manual_seed(cfg.seed)
    count, steps = cfg.batch_size, clips.clip_len
    values = defaultdict(list)
    for _ in range(math.ceil(cfg.clips / count)):
        position, target = draw_start((2, count, 2), generator)
        actions = torch.rand(2, count, steps - 1, 2, generator=generator) * 2 - 1
        frames, path = zip(
            *(play_toy(*x, env, size) for x in zip(position, target, actions, strict=True)),
            strict=True,
        )
        is_first = torch.zeros(count, steps, 1, dtype=torch.bool)
        is_first[:, 0] = True
        source, goal = (
            TensorDict({"pixels": x, "is_first": is_first}, [count, steps]).to(clips.device)
            for x in frames
        )
        rest = actions[0][:, context - 1 :]  # the source's, from the target's last seen frame on
        played, _ = play_toy(path[1][:, context - 1], target[1], rest, env, size)
        played = played[:, 1:].to(clips.device)
        add(values, transfer_quality(world_model, source, goal, played, context))
    return [("transfer_psnr", name, None, float(x.mean())) for name, x in join(values).items()]


def add(pieces: dict[Any, list[Tensor]], new: dict[Any, Tensor]) -> None:
    """Append to the pieces of each name."""
    for name, x in new.items():
        pieces[name].append(x)


def join(pieces: dict[Any, list[Tensor]]) -> dict[Any, Tensor]:
    """The pieces of each name as one tensor."""
    return {name: torch.cat(x) for name, x in pieces.items()}


def _mean(values: list[float]) -> float:
    """The mean of the values that are numbers."""
    return torch.tensor(values, dtype=torch.float64).nanmean().item()


def main(cfg: ProbeConfig) -> None:
    """Entry point."""
    result = probe(cfg)
    for name, value in result["values"].items():
        print(f"{name:<40} {value:8.3f}")
    for note in result["notes"]:
        print(f"note: {note}")
    print(f"{cfg.run}/probe.csv, {cfg.run}/probe.json, {cfg.run}/pictures/probe_*.png")
