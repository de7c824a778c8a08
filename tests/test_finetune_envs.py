"""Fine-tuning in environments that users bring, made by any function of theirs."""

from __future__ import annotations

import signal
import threading
from functools import partial

import pytest
import torch
from torchrl.envs import StepCounter, TransformedEnv

from prelar_trl.data import EpisodeReplay
from prelar_trl.envs import ToyEnv, make_env
from prelar_trl.recipes import interaction
from prelar_trl.recipes.environments import build_env
from prelar_trl.recipes.evaluate import evaluate
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.interaction import Evaluation
from prelar_trl.recipes.schema import EvaluateConfig
from tests.test_envs import Counter
from tests.test_envs_own import Gym, Walker
from tests.toy_runs import checkpoint, finetune_config, rows

OPTIONS = {
    "seed": 3,
    "camera": None,
    "render_quality": "fast",
    "action_repeat": 2,
    "max_steps": 4,
    "num_workers": 1,
}


def sized(size=64, seed=None):
    assert size == 64 and seed == 3
    return ToyEnv(size)


@pytest.mark.parametrize(
    "factory",
    [
        lambda: ToyEnv(),
        ToyEnv,
        sized,
        lambda name: make_env(name),
        lambda *, seed, camera: ToyEnv(),
        partial(make_env, "toy"),
        make_env,
        lambda name, **options: TransformedEnv(ToyEnv(), StepCounter(options["max_steps"])),
        lambda **anything: ToyEnv(**anything),
        Gym,
    ],
)
def test_any_function_that_makes_an_environment(factory):
    rollout = build_env(factory, "toy", **OPTIONS).rollout(9)
    assert rollout["next", "success"].dtype == torch.bool
    assert rollout["is_first"].flatten().tolist() == [True, False, False, False]
    assert rollout["next", "truncated"][-1].item()


def test_options_that_a_factory_fixes_stay_where_the_run_sets_none():
    options = {**OPTIONS, "max_steps": None}
    assert len(build_env(partial(make_env, "toy", max_steps=3), "toy", **options).rollout(9)) == 3


def test_several_workers_of_a_function_without_arguments():
    env = build_env(lambda: ToyEnv(), "toy", **{**OPTIONS, "num_workers": 2})
    try:
        start = env.reset()
    finally:
        env.close()
    assert env.batch_size == (2,)
    assert not torch.equal(start["state"][0, :2], start["state"][1, :2])


@pytest.mark.parametrize("takes", ["nothing", "name and options"])
def test_finetuning_and_evaluation_in_an_environment_of_ones_own(takes, tmp_path):
    def own(name, **options):
        assert name == "mine"
        return make_env(Counter(8, actions=3), **options)

    factory = own if takes == "name and options" else lambda: Counter(8, actions=3)
    cfg = finetune_config(tmp_path / "a", env="mine", max_steps=None)
    finetune(cfg, env_factory=factory)
    assert checkpoint(tmp_path / "a")["action_dim"] == 3
    lengths = [row["train/length"] for row in rows(tmp_path / "a") if row["train/length"]]
    assert lengths == ["8.0"] * 7
    result = evaluate(EvaluateConfig(run=cfg.run, episodes=1, device="cpu"), env_factory=factory)
    assert result["env"] == "mine" and result["records"][0]["length"] == 8


def test_finetuning_in_a_thread(tmp_path):
    errors = []

    def work():
        try:
            finetune(finetune_config(tmp_path / "a", env_steps=30))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    assert checkpoint(tmp_path / "a")["step"] == 30


def test_an_environment_without_end_is_named_after_the_prefill(tmp_path):
    cfg = finetune_config(tmp_path / "a", max_steps=None, env_steps=10_000)
    with pytest.raises(ValueError, match="no episode has ended in the prefill of 20 steps.*max_st"):
        finetune(cfg, env_factory=lambda: ToyEnv())


def test_without_a_prefill_it_is_named_before_the_first_evaluation(tmp_path):
    options = {"prefill": 0, "eval_every": 25, "env_steps": 10_000, "max_steps": None}
    with pytest.raises(ValueError, match="no episode has ended in 25 steps.*give max_steps"):
        finetune(finetune_config(tmp_path / "a", **options), env_factory=lambda: ToyEnv())


class EndsEarly(ToyEnv):
    """Ends in training; in the evaluation, where ``endless`` is set, never."""

    endless = False

    def _reset(self, tensordict, **kwargs):
        self.count = 0
        return super()._reset(tensordict, **kwargs)

    def _step(self, tensordict):
        self.count += 1
        out = super()._step(tensordict)
        over = torch.tensor([self.count == 10 and not type(self).endless])
        if self.count == 25:
            assert type(self).endless
            signal.raise_signal(signal.SIGINT)
        return out.update({"done": over, "terminated": over.clone()})


def test_ctrl_c_ends_an_evaluation_without_end_which_is_made_up_for(tmp_path, monkeypatch):
    cfg = finetune_config(tmp_path / "a", max_steps=None)
    real = Evaluation.__call__

    def endless(self, logger, step):
        with monkeypatch.context() as patch:
            patch.setattr(EndsEarly, "endless", True)
            real(self, logger, step)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "__call__", endless)
        with pytest.raises(SystemExit, match="stopped after 40 steps.*resume=true"):
            finetune(cfg, env_factory=EndsEarly)
    assert not any(row.get("eval/return") for row in rows(tmp_path / "a"))
    cfg.resume = True
    finetune(cfg, env_factory=EndsEarly)
    assert [int(row["step"]) for row in rows(tmp_path / "a") if row["eval/return"]] == [40, 60]


def test_the_film_of_a_long_episode_is_bounded(monkeypatch):
    monkeypatch.setattr("prelar_trl.recipes.common.FILM_FRAMES", 5)
    env = make_env("toy", max_steps=9)
    _, films = interaction.play(env, env.rand_action, 2)
    assert [len(film) for film in films] == [5]


def test_several_updates_a_step(tmp_path):
    finetune(finetune_config(tmp_path / "a", train_every=0.5, env_steps=24, eval_episodes=0))
    # one before the first policy step, and two for each of the steps 20 to 24
    assert checkpoint(tmp_path / "a")["model_update"]["count"] == 1 + 2 * 5


def test_episodes_shorter_than_a_window_are_trained_on(tmp_path):
    cfg = finetune_config(tmp_path / "a", batch_length=12, max_steps=None)
    finetune(cfg, env_factory=lambda: Walker(4))
    assert checkpoint(tmp_path / "a")["model_update"]["count"] == 5
    replay = EpisodeReplay(
        tmp_path / "a" / "replay", window=12, batch_size=2, capacity=1_000, pack=True
    )
    batch = replay.sample()
    assert batch["is_first"][..., 0].int().tolist() == [[1, 0, 0, 0, 0] * 2 + [1, 0]] * 2
    assert batch["pixels"][0, :, 0, 0, 0].tolist() == [0, 1, 2, 3, 4] * 2 + [0, 1]
