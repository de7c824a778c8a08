"""Which of the toy's four targets has a run found? One is often missing where its return stays low.

``python benchmarks/toy_targets.py`` says how likely random steps are to find a target's reward in
no episode. With the folder of a fine-tuning run on the toy it lists, for each target, the best
rewards of the episodes in its replay, random ones apart, and what the reward head predicts on it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import torch
from tensordict import TensorDict

from prelar_trl.checkpoint import load_checkpoint
from prelar_trl.checkpoint_files import LAST
from prelar_trl.data import ClipStore
from prelar_trl.envs import make_env
from prelar_trl.envs.toy import draw_start, toy_dynamics, toy_expert
from prelar_trl.models import Agent, make_model
from prelar_trl.record import RunFolder

FOUND = 0.6  # a reward that tells where the target is
EPISODES = 20_000
STEPS = 8  # of the expert, by which it is on the target
CORNERS = ("top left", "top right", "bottom left", "bottom right")


def chance(steps: int, prefill: int) -> tuple[float, float, float]:
    """Of random steps: that an episode finds its target, that no episode finds a given one, any."""
    generator = torch.Generator().manual_seed(0)

    def uniform() -> torch.Tensor:
        return torch.rand(EPISODES, 2, generator=generator) * 2 - 1

    position, target = draw_start((EPISODES, 2), generator)
    best = torch.zeros(EPISODES, 1)
    for _ in range(steps):
        position, reward, _ = toy_dynamics(position, target, uniform())
        best = torch.maximum(best, reward)
    found = float((best > FOUND).float().mean())
    episodes = prefill // steps
    drawn = torch.randint(4, (EPISODES, episodes), generator=generator)
    lucky = torch.rand(EPISODES, episodes, generator=generator) < found
    seen = torch.stack([((drawn == i) & lucky).any(1) for i in range(4)], 1)
    return found, (1 - found / 4) ** episodes, float((~seen.all(1)).float().mean())


def corner(frame: torch.Tensor) -> int:
    """The target's, of ``CORNERS``, by the green in a frame ``[3, H, W]``."""
    green = (frame[1].float() - frame[0].float()).clamp(min=0)
    half = len(green) // 2
    return int(green.reshape(2, half, 2, half).sum((1, 3)).flatten().argmax())


def best_rewards(run: RunFolder) -> list[list[tuple[int, float]]]:
    """Of each corner the episodes in the replay: their first step, and their best reward."""
    store, begin = ClipStore(run.path / "replay"), 0
    found: list[list[tuple[int, float]]] = [[] for _ in CORNERS]
    for number in range(len(store)):
        pixels = torch.as_tensor(store.read(number, "pixels", 0, 1)[0].copy())
        reward = store.read(number, "rewards")
        found[corner(pixels)].append((begin, float(reward.max())))
        begin += len(reward) - 1  # the first frame is a reset's
    return found


@torch.no_grad()
def predicted(agent: Agent) -> list[float]:
    """By corner, what the reward head predicts once the expert is on the target."""
    model, found = agent.world_model, [torch.zeros(0) for _ in CORNERS]
    env = make_env("toy", seed=0, max_steps=STEPS + 1)
    for _ in range(40):
        now = env.reset()
        frames, actions = [now["pixels"]], [torch.zeros(2)]
        for _ in range(STEPS):
            step, now = env.step_and_maybe_reset(toy_expert(now))
            frames.append(step["next", "pixels"])
            actions.append(step["action"])
        first = (torch.arange(STEPS + 1) == 0)[None, :, None]
        batch = TensorDict(
            {"pixels": torch.stack(frames)[None], "action": torch.stack(actions)[None]},
            [1, STEPS + 1],
        )
        images = model.preprocess(batch["pixels"])
        latent, _ = model.dynamics_actions(batch.set("is_first", first), images)
        feat = model.observe(model.encode(images), latent, first)["feat"]
        at = corner(frames[0])
        found[at] = torch.cat([found[at], model.heads["reward"](feat)[0, -1]])
    return [float(x.mean()) for x in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", help="of finetune.py env=toy, with its replay")
    parser.add_argument("--steps", type=int, default=25, help="of an episode")
    parser.add_argument("--prefill", type=int, default=750)
    args = parser.parse_args()
    episode, given, any_target = chance(args.steps, args.prefill)
    print(f"a random episode gets a reward above {FOUND} with probability {episode:.2f};")
    print(f"in {args.prefill // args.steps} none does for a given target: {given:.2f}, ", end="")
    print(f"for one of the four: {any_target:.2f}")
    if args.run is None:
        return
    run = RunFolder.load(args.run)
    agent = cast(Agent, make_model(state := load_checkpoint(run.checkpoints / LAST))).eval()
    agent.load_state_dict(state["agent"])
    prefill = run.config["prefill"]
    for name, episodes, head in zip(CORNERS, best_rewards(run), predicted(agent), strict=True):
        random = [best for begin, best in episodes if begin < prefill]
        later = [best for begin, best in episodes if begin >= prefill]
        print(
            f"{name}: {len(random)} random episodes, best reward {max(random, default=0):.2f}; "
            f"later {sum(x > FOUND for x in later)} of {len(later)} above {FOUND}; "
            f"the head predicts {head:.2f} on it"
        )


if __name__ == "__main__":
    main()
