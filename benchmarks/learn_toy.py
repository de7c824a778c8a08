"""Learning check: a tiny DreamerV2 learns the toy task from pixels.

    python benchmarks/learn_toy.py [--seed N] [--out results/toy]

Passes when the mean return of the last evaluation (20 episodes) reaches 90% of what the best
policy gets. Writes ``curve.csv``, ``curve.png`` and ``result.json``; takes about ten minutes on two
cores.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from prelar_trl.envs import toy_return
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.schema import FinetuneConfig
from prelar_trl.record import plot_curves, read_metrics, write_csv
from prelar_trl.utils import write_json

STEPS = 25  # an episode
SHARE = 0.9  # of the best policy's return
COLUMNS = ("step", "eval/return", "train/return", "loss_image", "loss_reward", "loss_kl")


def settings(run: Path, seed: int) -> FinetuneConfig:
    """Ten steps reach the target, so the discount is short; the reward is small beside an image."""
    return FinetuneConfig(
        method="dreamerv2",
        size="tiny",
        model={"depth": 4, "discount": 0.9},
        loss={"weights": {"reward": 10.0}},
        env="toy",
        max_steps=STEPS,
        run=str(run),
        seed=seed,
        env_steps=6_000,
        prefill=1_500,
        pretrain_updates=400,
        train_every=4,
        batch_size=12,
        batch_length=12,
        horizon=10,
        lr=1e-3,
        actor_lr=2e-4,
        critic_lr=4e-4,
        entropy_scale=1e-2,
        slow_every=50,
        eval_every=1_000,
        eval_episodes=20,
        log_every=200,
        threads=1,  # small tensors: a second thread only waits
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/toy"))
    args = parser.parse_args()
    best, random = toy_return("expert", steps=STEPS), toy_return("random", steps=STEPS)

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        finetune(settings(run, args.seed))
        minutes = (time.monotonic() - start) / 60
        args.out.mkdir(parents=True, exist_ok=True)
        metrics = read_metrics(run / "metrics.csv")
        plot_curves(
            {"DreamerV2, tiny": metrics},
            args.out / "curve.png",
            ["eval/return", "train/return", "loss_image", "loss_reward"],
            columns=2,
            step_name="environment step",
        )
        with open(run / "metrics.csv", newline="") as source:
            rows = [[row.get(name, "") for name in COLUMNS] for row in csv.DictReader(source)]
        write_csv(args.out / "curve.csv", COLUMNS, (row for row in rows if any(row[1:])))
        shutil.copy(run / "versions.json", args.out / "versions.json")

    reached = float(metrics["eval/return"].values[-1])
    passed = reached >= SHARE * best
    result = {
        "return": reached,
        "best_policy": best,
        "random_policy": random,
        "needed": SHARE * best,
        "passed": passed,
        "minutes": round(minutes, 1),
        "seed": args.seed,
        "threads": torch.get_num_threads(),
    }
    write_json(args.out / "result.json", result)
    print(
        f"return {reached:.1f} of {best:.1f} (random {random:.1f}, needed {SHARE * best:.1f}) "
        f"after {minutes:.1f} minutes: {'passed' if passed else 'FAILED'}; see {args.out}"
    )
    sys.exit(not passed)


if __name__ == "__main__":
    main()
