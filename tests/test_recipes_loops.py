"""The loops of the recipes: their environments and evaluations, and what they wait for."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from prelar_trl.data import ClipStore
from prelar_trl.envs import make_env
from prelar_trl.envs.toy import ToyEnv
from prelar_trl.recipes import interaction
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.interaction import EVAL_SEED, Evaluation
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.updates import BehaviorUpdate, WorldModelUpdate
from tests.toy_runs import (
    checkpoint,
    finetune_config,
    interrupt_after,
    pretrain_config,
    rows,
    two_at_once,
)


@pytest.mark.parametrize("end", ["done", "interrupted", "failed"])
def test_evaluations_share_one_environment_which_is_closed(end, tmp_path, monkeypatch):
    made, closed = [], []
    monkeypatch.setattr(ToyEnv, "close", lambda self, **options: closed.append(self))

    def factory(name, *, seed, **options):
        made.append((seed, make_env(name, seed=seed, **options)))
        return made[-1][1]

    if end == "interrupted":
        interrupt_after(monkeypatch, 3)
    if end == "failed":
        real = WorldModelUpdate.__call__

        def call(self, batch):
            if self.count == 2:
                raise RuntimeError("broken")
            return real(self, batch)

        monkeypatch.setattr(WorldModelUpdate, "__call__", call)
    with nullcontext() if end == "done" else pytest.raises((SystemExit, RuntimeError)):
        finetune(finetune_config(tmp_path / "a", eval_every=12), env_factory=factory)
    evaluations = [row for row in rows(tmp_path / "a") if row["eval/return"]]
    assert len(evaluations) == {"done": 4, "interrupted": 2, "failed": 2}[end]
    assert [seed for seed, _ in made] == [0, EVAL_SEED]
    assert [id(env) for env in closed] == [id(env.base_env) for _, env in reversed(made)]


def test_each_evaluation_starts_from_the_same_states(tmp_path, monkeypatch):
    starts = []
    real = interaction.play

    def play(env, policy, episodes, **options):
        def note(td):
            starts.extend(td["state"][td["is_first"].squeeze(-1)].tolist())
            return policy(td)

        return real(env, note, episodes, **options)

    monkeypatch.setattr(interaction, "play", play)
    cfg = finetune_config(tmp_path / "a", eval_every=30, eval_episodes=3)
    finetune(cfg, env_factory=two_at_once)
    assert len(starts) == 8 and starts[:4] == starts[4:]
    assert len({tuple(start) for start in starts}) == 4


@pytest.mark.parametrize(("eval_every", "killed_at"), [(40, 40), (20, 60), (70, 60)])
def test_an_evaluation_that_was_killed_is_made_up_for(eval_every, killed_at, tmp_path, monkeypatch):
    cfg = finetune_config(tmp_path / "fine", eval_every=eval_every)
    evaluation = Evaluation.__call__

    def killed(self, logger, step):
        if step == killed_at:
            raise KeyboardInterrupt  # saves nothing
        evaluation(self, logger, step)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(cfg)
    cfg.resume = True
    finetune(cfg)
    evaluated = [int(row["step"]) for row in rows(tmp_path / "fine") if row["eval/return"]]
    assert evaluated == sorted({*range(eval_every, 61, eval_every), 60} - {0, 10, 20})


def test_finetuning_in_several_environments_at_once(tmp_path):
    finetune(finetune_config(tmp_path / "a"), env_factory=two_at_once)
    episodes = [int(row["step"]) for row in rows(tmp_path / "a") if row["train/return"]]
    assert episodes == [20, 20, 40, 40, 60, 60]
    assert replayed(tmp_path / "a") == (6, 66)


def test_action_repeat_counts_the_simulators_steps(tmp_path):
    finetune(finetune_config(tmp_path / "a", action_repeat=2, eval_episodes=0))
    episodes = [int(row["step"]) for row in rows(tmp_path / "a") if row["train/return"]]
    assert episodes == [20, 40, 60]
    assert replayed(tmp_path / "a") == (3, 33)


def replayed(run):
    """Episodes by the checkpoint, and frames in the replay's folder."""
    store = ClipStore(run / "replay")
    assert len(store) == checkpoint(run)["replay"]["end"]
    return len(store), store.num_frames


class Watched(torch.Tensor):
    """A tensor that notes when its value is asked for: on a GPU the program would wait."""

    reads = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        asks = ("item", "tolist", "numpy", "cpu", "nonzero", "__float__", "__int__", "__bool__")
        Watched.reads += function.__name__ in asks
        return super().__torch_function__(function, types, args, kwargs)


@pytest.fixture
def reads(monkeypatch):
    """Before each update of the world model: how often a loss was read so far."""
    counts, Watched.reads = [], 0

    def watch(kind):
        real = kind.__call__

        def call(self, batch):
            if kind is WorldModelUpdate:
                counts.append(Watched.reads)
            losses = real(self, batch)
            for name in losses.exclude("state").keys():
                losses[name] = losses[name].as_subclass(Watched)
            return losses

        monkeypatch.setattr(kind, "__call__", call)

    watch(WorldModelUpdate)
    watch(BehaviorUpdate)
    return counts


def test_finetuning_reads_no_loss_but_to_show_it(tmp_path, reads):
    finetune(finetune_config(tmp_path / "a", log_every=1_000, checkpoint_every=1_000))
    assert reads == [0] * 5 and Watched.reads > 0
    first = Watched.reads
    finetune(finetune_config(tmp_path / "b", log_every=10, checkpoint_every=1_000))
    assert first < reads[-1]  # logged


def test_pretraining_reads_no_loss_but_to_show_it(clips, tmp_path, reads):
    rarely = {"log_every": 1_000, "checkpoint_every": 1_000}
    pretrain(pretrain_config(clips, tmp_path / "a", updates=5, **rarely))
    assert reads[0] == 0 < reads[1]  # the first update is logged
    assert reads[1:] == [reads[1]] * 4
