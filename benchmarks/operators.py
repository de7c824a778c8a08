"""Operators of one update: in eager mode a GPU gets at least one kernel launch for each.

python -m benchmarks.operators --method prelar apv --phase finetune --length 50

Counted below autograd, forward, backward and optimizers together; views and empty tensors, which
launch nothing, are left out. The size of networks and batch hardly matters, the length does.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.train import make_updates, random_batch
from prelar_trl.config import METHODS

NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that compute something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_LAUNCH:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count(method: str, phase: str, length: int, size: str = "mini") -> dict[str, Counter[str]]:
    """Operators of the world model's update, and of the behavior's if there is one."""
    config = {"method": method, "phase": phase, "size": size, "device": "cpu", "precision": "32"}
    torch.manual_seed(0)
    update, behavior = make_updates(config | {"compile": "off", "plain": False})
    batch, counts = random_batch(2, length, "cpu"), {}
    for _ in range(2):  # the first also makes the optimizers' moments
        with OperatorCounter() as counter:
            losses = update(batch)
        counts["world model"] = counter.counts
        if behavior is not None:
            state = losses["state"].update(batch.select("terminated", "action", "is_first"))
            with OperatorCounter() as counter:
                behavior(state)
            counts["behavior"] = counter.counts
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=["prelar"])
    parser.add_argument(
        "--phase", nargs="+", choices=("pretrain", "finetune"), default=["finetune"]
    )
    parser.add_argument("--length", type=int, default=50)
    parser.add_argument("--size", default="mini")
    parser.add_argument("--most", type=int, default=0, help="also show the most frequent ones")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for method in options.method:
        for phase in options.phase:
            if getattr(METHODS[method], phase) is None:
                continue
            for name, counts in count(method, phase, options.length, options.size).items():
                print(f"{method} {phase}, {name}: {counts.total():,}")
                for operator, times in counts.most_common(options.most):
                    print(f"    {times:6,} {operator}")


if __name__ == "__main__":
    main()
