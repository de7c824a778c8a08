"""How much can latent actions explain? The measures of pre-training, under the true actions.

    python benchmarks/true_actions.py <clip store> [--updates 3000] [--size mini]

Trains a world model without heads on the clips of a store that holds actions, told the actions, and
prints ``action_usage`` and ``action_psnr_gap`` on held-out clips as ``pretrain.py`` logs them for
latent actions. Where the true actions themselves explain little (an arm that moves by less than a
pixel a frame, an expert that goes on as it did), no latent action is used much either.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from prelar_trl.data import VideoClips
from prelar_trl.data.clips import Split
from prelar_trl.fast import accelerate
from prelar_trl.models import make_world_model, make_world_model_loss
from prelar_trl.probes import action_usage
from prelar_trl.updates import WorldModelUpdate

METHOD = "dreamerv2"  # a plain world model with real actions


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("data", type=Path, help="a clip store with actions")
    parser.add_argument("--updates", type=int, default=3_000)
    parser.add_argument("--size", default="mini")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--clip-len", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=500, help="updates between two lines")
    return parser.parse_args()


def open_clips(args: argparse.Namespace, split: Split, batch_size: int | None = None) -> VideoClips:
    """Clips whose actions are told, all of them; a batch of the whole split by default."""
    clips = VideoClips(args.data, args.clip_len, 1, split=split)
    count = clips.num_clips
    return VideoClips(args.data, args.clip_len, batch_size or count, split=split, labels=count)


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    clips = open_clips(args, "train", args.batch_size)
    heldout = open_clips(args, "heldout").sample()
    world_model = make_world_model(
        METHOD, "finetune", action_dim=clips.action_dim, size=args.size, heads=()
    )
    accelerate(world_model)
    loss = make_world_model_loss(METHOD, "finetune", world_model, weights={"reward": None})
    update = WorldModelUpdate(loss, lr=args.lr)
    for step in range(1, args.updates + 1):
        losses = update(clips.sample())
        if step % args.every == 0:
            world_model.eval()
            usage = action_usage(world_model, heldout, context=5)
            image = losses["loss_image"].item()
            numbers = " ".join(f"{name} {value:.3f}" for name, value in usage.items())
            print(f"{step} updates: loss_image {image:.1f} {numbers}", flush=True)


if __name__ == "__main__":
    main()
