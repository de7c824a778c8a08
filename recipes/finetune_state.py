"""Where a fine-tuning run is: what its checkpoints hold, and what falls due."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tensordict import TensorDict, TensorDictBase

from prelar_trl.checkpoint import rng_state, set_rng_state
from prelar_trl.recipes.common import crossed, save_run, seed_everything
from prelar_trl.recipes.interaction import Collection
from prelar_trl.recipes.learner import Learner
from prelar_trl.recipes.processes import Processes
from prelar_trl.recipes.replays import share_replays
from prelar_trl.recipes.schema import FinetuneConfig
from prelar_trl.record import RunFolder

COUNTERS = ("step", "before", "updates_due", "training_due", "evaluation_due", "best")


@dataclass
class FinetuneState:
    """A fine-tuning run at one of its steps: all that is saved of it, and restored."""

    cfg: FinetuneConfig
    known: dict[str, Any]  # of the environment, see `interface`
    learner: Learner
    collection: Collection
    processes: Processes
    step: int = 0  # of the environments of all processes
    before: int = 0  # the step before that one
    saved: int = 0  # the step of the newest checkpoint
    ready: bool = False  # there is something to learn from, in all processes
    training_due: bool = False  # not all that follows a step is done: updates, what is logged
    evaluation_due: bool = False  # an interruption has cut the last one off
    best: list[float] | None = None  # success and return of the best evaluation
    losses: TensorDictBase | None = None  # of the last update

    def __post_init__(self) -> None:
        # Updates that the steps so far call for; a part of one is carried over.
        self.updates_due = float(self.cfg.pretrain_updates)
        environments = self.processes.size * self.collection.collector.num_envs
        self._stride = environments * self.cfg.action_repeat

    @property
    def can_train(self) -> bool:
        """Whether the prefill is over, and there is something to learn from."""
        return self.step >= self.cfg.prefill and self.ready

    @property
    def at_evaluation(self) -> bool:
        """Whether one follows this step; the last does if anything was learned."""
        first = self.cfg.first_evaluation
        last = self.step >= self.cfg.env_steps and self.ready
        return last or (self.step >= first and self.crossed(self.cfg.eval_every, since=first))

    def crossed(self, every: int, since: int = 0) -> bool:
        """Whether this step has passed a multiple of ``every``, counted from ``since``."""
        return crossed(self.before - since, self.step - since, every)

    def advance(self) -> None:
        """Count a step in each environment, and the updates that they call for."""
        self.before, self.step = self.step, self.step + self._stride
        self.training_due = True
        self.look_for_episodes()
        if self.can_train:
            self.updates_due += self._stride / self.cfg.train_every

    def look_for_episodes(self) -> None:
        """Whether all processes have one; all must ask."""
        has_one = self.collection.replay.num_episodes > 0
        self.ready = self.ready or self.processes.all(has_one)

    def check_episodes(self) -> None:
        """Raise ValueError where none has ended when the first should, and perhaps none ever will.

        An evaluation may have no end either, so without a prefill the first one is waited for.
        """
        prefill = self.cfg.prefill
        expected = prefill or self.cfg.first_evaluation
        if self.before < expected <= self.step and not self.ready and not self.cfg.max_steps:
            raise ValueError(
                f"no episode has ended in {'the prefill of ' if prefill else ''}{expected} steps, "
                "and nothing can be learned before: give max_steps, or a longer prefill"
            )

    def is_finished(self, state: dict[str, Any]) -> bool:
        """Whether nothing is left to do for a run with that checkpoint."""
        due = state["evaluation_due"] or state["training_due"]
        return state["step"] >= self.cfg.env_steps and not due

    def start(self, checkpoint: dict[str, Any] | None) -> None:
        """Start the first episodes, or go on from a checkpoint."""
        if checkpoint is None:
            self.collection.reset()
            return
        self.load_state_dict(checkpoint)
        share_replays(self.collection.replay, checkpoint, self.processes)
        self.look_for_episodes()

    def save(self, run: RunFolder) -> None:
        """Write the newest checkpoint; all processes must come here."""
        with self.learner.watch("logging"):
            whole = self.state_dict()
            if self.processes.first:
                save_run(self.cfg, run, whole, self.saved)
            own = [whole, *whole["others"]][self.processes.rank]
            self.collection.replay.hold(own["replay"], self.cfg.keep)
        self.saved = self.step

    def state_dict(self) -> dict[str, Any]:
        """The whole run's, in each of its processes: all must ask for it."""
        own, *others = self.processes.gather({**self.collection.state_dict(), "rng": rng_state()})
        return {
            "phase": "finetune",
            "method": self.cfg.method,
            "size": self.cfg.size,
            "overrides": self.cfg.model,
            **self.known,
            "inputs": asdict(self.known["inputs"]),
            **{name: getattr(self, name) for name in COUNTERS},
            "losses": None if self.losses is None else self.losses.detach().to_dict(),
            **self.learner.state_dict(),
            **own,
            "others": others,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the checkpoint was written; a process that is new starts at that step."""
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.saved = self.step
        self.losses = None if state["losses"] is None else TensorDict(state["losses"])
        self.learner.load_state_dict(state)
        states, rank = [state, *state.get("others", [])], self.processes.rank
        if rank < len(states):
            self.collection.load_state_dict(states[rank])
            set_rng_state(states[rank]["rng"])
        else:  # the run had fewer processes
            seed_everything(self.processes.seed(self.cfg.seed) + self.step)
            self.collection.reset()
