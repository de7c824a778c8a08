"""Does the action encoder learn the latent actions, or the prefill by heart? R² on other episodes.

    python benchmarks/alignment.py <fine-tuning run> [--pretrained RUN]

Repeats a run's alignment on the random prefill in its replay, leaving out each fifth of episodes
in turn, and prints how much of the latent actions' variance the true actions explain on both parts.
The variance is that around the mean of the episodes that were learned from.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from prelar_trl.checkpoint import load_checkpoint
from prelar_trl.checkpoint_files import LAST
from prelar_trl.data import ClipStore
from prelar_trl.fast import accelerate
from prelar_trl.models import Agent, make_inverse_model, make_model
from prelar_trl.modules import ActionEncoder
from prelar_trl.modules.pixels import normalize_pixels
from prelar_trl.record import RunFolder
from prelar_trl.updates import make_adam

FOLDS = 5
Episode = tuple[Tensor, Tensor]  # actions [1, T, A], latent actions [1, T, U]


def prefill(run: RunFolder, inverse_model: torch.nn.Module) -> list[Episode]:
    """The random episodes in the replay, with the latent actions inferred from their frames."""
    store, steps, episodes = ClipStore(run.path / "replay"), 0, []
    for number in range(len(store)):
        frames, actions = store.read(number), store.read(number, "actions")
        steps += (len(actions) - 1) * run.config["action_repeat"]
        if steps > run.config["prefill"]:
            break
        pixels = normalize_pixels(torch.from_numpy(np.array(frames))[None])
        with torch.no_grad():
            latent, _ = inverse_model(pixels, sample=False)
        episodes.append((torch.from_numpy(np.array(actions))[None], latent))
    return episodes


def windows(episodes: list[Episode], count: int, length: int) -> Episode:
    """Random windows ``[count, length]`` of the episodes, as a run draws them."""
    drawn = []
    for i in torch.randint(len(episodes), (count,)).tolist():
        begin = int(torch.randint(episodes[i][0].shape[1] - length + 1, ()))
        drawn.append([x[:, begin : begin + length] for x in episodes[i]])
    actions, latents = zip(*drawn, strict=True)
    return torch.cat(actions), torch.cat(latents)


def error(encoder: ActionEncoder, episode: Episode) -> Tensor:
    """Squared error of all transitions, ``[N, U]``."""
    actions, latent = episode
    is_first = (torch.arange(actions.shape[1]) == 0).expand(actions.shape[:2]).unsqueeze(-1)
    predicted, _ = encoder(actions, sample=False, is_first=is_first)
    return (predicted - latent)[:, 1:].square().flatten(0, 1)


def r2(encoder: ActionEncoder, episodes: list[Episode], mean: Tensor) -> float:
    """The share of the variance around ``mean`` [U] that the actions explain."""
    with torch.no_grad():
        left = torch.cat([error(encoder, episode) for episode in episodes]).sum()
    whole = torch.cat([latent[0, 1:] - mean for _, latent in episodes]).square().sum()
    return float(1 - left / whole)


def aligned(run: RunFolder, episodes: list[Episode], updates: int) -> ActionEncoder:
    """An action encoder like the run's, trained on the episodes from random weights on."""
    agent = cast(Agent, make_model(load_checkpoint(run.checkpoints / LAST)))
    encoder = cast(ActionEncoder, agent.world_model.action_encoder)
    optimizer = make_adam(encoder.parameters(), run.config["align_lr"])
    for _ in range(updates):
        drawn = windows(episodes, run.config["batch_size"], run.config["batch_length"])
        loss = error(encoder, drawn).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("run", type=Path, help="of finetune.py, with its replay")
    parser.add_argument("--pretrained", type=Path, help="default: as the run's config.yaml says")
    parser.add_argument("--updates", type=int, default=800)
    args = parser.parse_args()
    run = RunFolder.load(args.run)
    place = args.pretrained or run.config["pretrained"]
    if place is None:
        parser.error(f"{args.run} was trained from scratch: there is nothing to align with")
    pretrained = RunFolder.load(place)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inverse_model = make_inverse_model(load_checkpoint(pretrained.checkpoints / LAST))
    episodes = prefill(run, accelerate(inverse_model))
    if len(episodes) < FOLDS:
        parser.error(f"{args.run} has {len(episodes)} random episodes, and {FOLDS} are needed")
    scores = []
    for fold in range(FOLDS):
        learned = [episode for i, episode in enumerate(episodes) if i % FOLDS != fold]
        encoder = aligned(run, learned, args.updates)
        mean = torch.cat([latent[0, 1:] for _, latent in learned]).mean(0)
        scores.append([r2(encoder, part, mean) for part in (learned, episodes[fold::FOLDS])])
    for name, values in zip(("learned from", "held out"), zip(*scores, strict=True), strict=True):
        shown = " ".join(f"{value:.2f}" for value in values)
        print(f"episodes {name}: R² {sum(values) / FOLDS:.2f} ({shown})")


if __name__ == "__main__":
    main()
