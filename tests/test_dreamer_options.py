"""DreamerV2's options of exploration, evaluation and behavior learning, and of what is loaded."""

from __future__ import annotations

import copy

import pytest
import torch
import yaml
from tensordict import TensorDict

from prelar_trl.models import copy_pretrained, make_agent, make_world_model_loss
from prelar_trl.modules import WorldModelPolicy, distributions
from prelar_trl.objectives.behavior import ActorLoss, RewardNorm
from prelar_trl.recipes.evaluate import evaluate
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.interaction import evaluation_policy
from prelar_trl.recipes.learner import make_learner
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.recipes.processes import Processes
from prelar_trl.recipes.resume import settle_preset
from prelar_trl.recipes.schema import EvaluateConfig, FinetuneConfig
from prelar_trl.schedules import Schedule, is_schedule
from prelar_trl.stopwatch import Stopwatch
from prelar_trl.types import Inputs
from prelar_trl.updates import BehaviorUpdate, WorldModelUpdate
from tests.tiny import BONUS, TINY, batch, tiny, tiny_agent, tiny_world_model
from tests.toy_runs import QUICK, checkpoint, different, finetune_config, pretrain_config

MODEL = {"depth": 2, "head_layers": 1, "bonus_window": 2}
OPTIONS = {**QUICK, "method": "dreamerv2", "model": MODEL}


def behavior(**options):
    """An agent, its update and states to start from."""
    torch.manual_seed(0)
    agent = tiny_agent("dreamerv2")
    start = agent.world_model.eval()(batch()).detach().select("stoch", "deter")
    return agent, BehaviorUpdate(agent, horizon=3, **options), start


# ---------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0.25, [0.25, 0.25, 0.25, 0.25]),
        ("2e-3", [2e-3, 2e-3, 2e-3, 2e-3]),
        ("linear(1, 0, 10)", [1, 0.5, 0, 0]),
        ("linear(0.1,0.3,20)", [0.1, 0.15, 0.2, 0.3]),
        ("exponential(1, 0, 5)", [1, 0.5, 0.25, 2**-20]),
    ],
)
def test_values_of_a_schedule(text, expected):
    schedule = Schedule.parse(text)
    assert [schedule(n) for n in (0, 5, 10, 100)] == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["", "cos(1,2,3)", "linear(1,2)", "linear(1,2,0)", "x", None, True]
)
def test_what_is_no_schedule(text):
    with pytest.raises(ValueError, match="is no schedule: write a number, linear"):
        Schedule.parse(text)
    assert not is_schedule(text) and not is_schedule("linear(-1,0,5)") and is_schedule("1e-3")


def test_entropy_and_gradient_mix_follow_their_schedules():
    _, update, start = behavior(
        gradient="both", entropy_scale="linear(1, 0, 2)", gradient_mix="linear(0, 1, 2)"
    )
    seen = []
    for _ in range(4):
        update(start)
        seen.append((float(update.actor_loss.entropy_scale), float(update.actor_loss.mix)))
    assert seen == [(1, 0), (0.5, 0.5), (0, 1), (0, 1)]


def test_the_loss_reads_what_the_schedule_says():
    ones = torch.ones(1, 4, 1)
    data = {"value_target": ones, "value": ones, "entropy": 2 * ones, "log_prob": ones}
    td = {**data, "weight": ones}
    scale = torch.tensor(0.0)
    loss = ActorLoss(entropy_scale=scale)
    values = []
    for value in (0.0, 1.0):
        scale.fill_(value)
        values.append(loss(TensorDict(td, [1, 4]))["loss_actor"].item())
    assert values == [-1, -3]


def test_constant_settings_are_the_floats_that_they_were():
    _, update, _ = behavior()
    assert (update.actor_loss.entropy_scale, update.actor_loss.mix) == (1e-4, 0.1)


# ---------------------------------------------------------------------- critic and rewards


def test_soft_target_updates_move_the_slow_critic_part_of_the_way():
    agent, update, start = behavior(slow_every=1, slow_target_fraction=0.25, critic_lr=0.1)
    update(start)  # the first time all the way
    for slow, weight in zip(agent.slow_critic.parameters(), agent.critic.parameters(), strict=True):
        assert torch.equal(slow, weight)
    before = copy.deepcopy(agent.slow_critic)
    update(start)
    for slow, old, weight in zip(
        agent.slow_critic.parameters(),
        before.parameters(),
        agent.critic.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(slow, old + 0.25 * (weight - old))
    assert not torch.equal(agent.slow_critic.out.weight, agent.critic.out.weight)


def test_rewards_are_divided_by_their_running_magnitude():
    norm, reward = RewardNorm(0.5), torch.tensor([[2.0], [-6.0]])
    torch.testing.assert_close(norm(reward), reward / 2.5)  # (1 + 4) / 2
    torch.testing.assert_close(norm(reward), reward / 3.25)
    assert RewardNorm()(reward) is reward


def test_reward_normalization_is_used_saved_and_loaded():
    _, plain, start = behavior()
    _, update, _ = behavior(reward_norm_momentum=0.0)
    before, after = plain(start, sample=False), update(start, sample=False)
    assert before["imagined_return"] != after["imagined_return"]
    state = update.state_dict()
    assert state["reward_norm"]["magnitude"] != 1
    _, again, _ = behavior(reward_norm_momentum=0.0)
    again.load_state_dict(state)
    assert torch.equal(again.reward_norm.magnitude, update.reward_norm.magnitude)
    again.load_state_dict({k: x for k, x in state.items() if k != "reward_norm"})  # an older run


@pytest.mark.parametrize(
    ("clip", "function"),
    [("identity", lambda x: x), ("sign", torch.sign), ("tanh", torch.tanh)],
)
def test_clipped_rewards_are_what_the_reward_heads_learn(clip, function):
    model = tiny_world_model("prelar", "finetune", sample=False).eval()
    data = batch(reward=torch.randn(2, 4, 1) * 5)
    loss = make_world_model_loss("prelar", "finetune", model, clip_rewards=clip)
    losses, out = loss(data), model(data.copy())
    for name in ("reward", "aux_reward"):
        error = (out["prediction", name] - function(data["reward"])).square() / 2
        torch.testing.assert_close(losses[name], error.mean().detach())


# ---------------------------------------------------------------------- noise and modes


def test_noise_on_continuous_actions_is_gaussian_and_stays_within_bounds():
    torch.manual_seed(0)
    policy = distributions.TruncatedNormal(torch.zeros(1), torch.ones(1))
    noisy = policy.perturb(torch.zeros(40_000, 1), 0.2)
    assert noisy.std().item() == pytest.approx(0.2, rel=0.05)
    assert policy.perturb(torch.ones(1_000, 1), 5.0).abs().max() <= 1


def test_noise_on_choices_is_the_probability_of_an_even_draw():
    torch.manual_seed(0)
    policy, action = distributions.OneHot(torch.zeros(4)), torch.eye(4)[2].expand(40_000, 4)
    noisy = policy.perturb(action, 0.4)
    assert noisy.unique().tolist() == [0, 1] and (noisy.sum(-1) == 1).all()
    assert noisy.mean(0).tolist() == pytest.approx([0.1, 0.1, 0.7, 0.1], abs=0.01)


def frame(policy):
    belief = {name: torch.zeros(1, *shape) for name, shape in policy.belief_shapes().items()}
    pixels = torch.full((1, 3, 64, 64), 100, dtype=torch.uint8)
    first = torch.ones(1, 1, dtype=torch.bool)
    return TensorDict({"pixels": pixels, "is_first": first, "belief": belief}, [1])


def test_the_policy_adds_its_noise_and_remembers_the_action_that_it_takes():
    agent = tiny_agent("prelar")
    agent.world_model.sample = False
    quiet = WorldModelPolicy(agent.world_model, agent.actor, mode="mode")
    loud = WorldModelPolicy(agent.world_model, agent.actor, mode="mode", noise=0.3)
    calm, out = quiet(frame(quiet)), loud(frame(loud))
    assert not torch.equal(calm["action"], out["action"])
    assert torch.equal(out["next", "belief", "actions"][:, -1], out["action"])


def test_evaluation_by_the_latents_mode_repeats_itself():
    agent = tiny_agent("prelar")
    still, drawn = evaluation_policy(agent, 0.0, True), evaluation_policy(agent, 0.0, False)

    def latents(policy):
        return torch.stack([policy(frame(policy))["next", "belief", "stoch"] for _ in range(9)])

    assert (latents(still) == latents(still)[0]).all()
    assert not (latents(drawn) == latents(drawn)[0]).all()


# ---------------------------------------------------------------------- what is loaded


def test_only_the_parts_asked_for_are_loaded():
    trained = tiny_world_model("prelar", "pretrain")
    model = tiny_world_model("prelar", "finetune")
    before = copy.deepcopy(model.state_dict())
    copy_pretrained(model, trained.state_dict(), ["encoder", "rssm"])
    now = model.state_dict()
    weights = [key for key in now if key.endswith("weight") and "norm" not in key]
    changed = {key.split(".")[0] for key in weights if not torch.equal(now[key], before[key])}
    assert changed == {"encoder", "rssm"}


@pytest.mark.parametrize("part", ["context_encoder", "latent_actions"])
def test_a_part_that_is_asked_for_and_not_there_is_refused(part):
    trained, model = tiny_world_model("prelar"), tiny_world_model("prelar", "finetune")
    before = copy.deepcopy(model.state_dict())
    message = (
        f"load={part}: this model and the .* do not share it; choose of encoder, decoder, rssm"
    )
    with pytest.raises(ValueError, match=message):
        copy_pretrained(model, trained.state_dict(), ["encoder", part])
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_the_pretrained_group_has_a_rate_of_its_own_and_holds_what_was_loaded():
    _, loss = tiny("prelar", "finetune")
    update = WorldModelUpdate(loss, lr=1e-3, pretrained_lr=1e-5, pretrained=["encoder", "decoder"])
    rates = {name: o.param_groups[0]["lr"] for name, o in update.optimizers.items()}
    assert rates == {"pretrained": 1e-5, "model": 1e-3} and update.scheduler is None
    held = {id(p) for p in update.optimizers["pretrained"].param_groups[0]["params"]}
    assert held == {id(p) for p in loss.world_model.encoder.parameters()}
    update = WorldModelUpdate(loss, frozen_updates=2, pretrained_lr=1e-5)
    update(batch())
    assert update.optimizers["pretrained"].param_groups[0]["lr"] == 0
    for _ in range(2):
        update(batch())
    assert update.optimizers["pretrained"].param_groups[0]["lr"] == 1e-5
    assert WorldModelUpdate(loss, frozen_updates=2, pretrained=["decoder"]).optimizers.keys() == {
        "model"
    }


# ---------------------------------------------------------------------- recipes


def test_a_run_with_every_option_and_its_evaluation(clips, tmp_path):
    pre = pretrain_config(clips, tmp_path / "pre", size="mini", updates=1, model=MODEL)
    pretrain(pre)
    options = {
        **OPTIONS,
        "method": "prelar",
        "pretrained": pre.run,
        "load": "encoder,rssm",
        "pretrained_lr": 1e-5,
        "expl_noise": 0.3,
        "eval_noise": 0.1,
        "eval_state_mean": True,
        "entropy_scale": "linear(1e-2,1e-4,10)",
        "actor_gradient": "both",
        "actor_gradient_mix": "1e-1",
        "slow_target_fraction": 0.5,
        "reward_norm_momentum": 0.99,
        "loss": {"clip_rewards": "tanh"},
    }
    cfg = finetune_config(tmp_path / "fine", **options)
    assert (cfg.load, cfg.actor_gradient_mix) == (["encoder", "rssm"], 0.1)
    finetune(cfg)
    assert checkpoint(tmp_path / "fine")["behavior_update"]["reward_norm"]["magnitude"] != 1
    evaluate(EvaluateConfig(run=cfg.run, episodes=1, device="cpu"))
    cfg.resume, cfg.env_steps = True, 34
    finetune(cfg)
    assert checkpoint(tmp_path / "fine")["step"] == 34


def test_what_a_run_reads_of_the_options(tmp_path):
    cfg = finetune_config(
        tmp_path / "a", **OPTIONS, slow_target_fraction=0.5, reward_norm_momentum=0.9,
        entropy_scale=0.5, actor_gradient_mix=0.2, actor_gradient="both",
    )  # fmt: skip
    known = {"action_dim": 2, "discrete": False, "inputs": Inputs()}
    cfg = settle_preset(cfg)
    learner = make_learner(cfg, known, torch.device("cpu"), Stopwatch(), Processes())
    update = learner.behavior_update
    assert (update.slow_target_fraction, update.reward_norm.momentum) == (0.5, 0.9)
    assert (update.actor_loss.entropy_scale, update.actor_loss.mix) == (0.5, 0.2)


def test_a_run_that_is_older_than_an_option_can_be_continued(tmp_path):
    cfg = finetune_config(tmp_path / "a", **OPTIONS, eval_episodes=0)
    finetune(cfg)
    file = tmp_path / "a" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    for name in ("expl_noise", "load", "pixels"):
        config.pop(name)
    config["model"].pop("gray")
    file.write_text(yaml.safe_dump(config))
    cfg.resume, cfg.env_steps = True, 34
    finetune(cfg)
    cfg.expl_noise, cfg.env_steps = 0.5, 38
    with pytest.raises(ValueError, match="expl_noise=0.5 but the run .* with expl_noise=0.0"):
        finetune(cfg)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load": ["wheels"]}, r"load=\['wheels'\] is unknown; choose of encoder, decoder, rssm"),
        ({"load": ""}, "load='' is unknown"),
        ({"entropy_scale": "linear(1,2)"}, "entropy_scale='linear.*must be at least 0: a number"),
        ({"entropy_scale": -1}, "entropy_scale=-1 must be at least 0"),
        ({"slow_target_fraction": 0}, "slow_target_fraction=0 must be above 0"),
        ({"reward_norm_momentum": 2}, "reward_norm_momentum=2 must lie between 0 and 1"),
        ({"expl_noise": -0.1}, "expl_noise=-0.1 must be at least 0"),
        ({"loss": {"clip_rewards": "cube"}}, "loss.clip_rewards='cube' is unknown; choose identit"),
    ],
)
def test_bounds_of_the_options(options, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(env="toy", run="r", **options)


@pytest.mark.parametrize("options", [{"load": "encoder"}, {"pretrained_lr": 1e-4}])
def test_options_of_the_pretrained_parts_need_a_pretraining_run(options, tmp_path):
    with pytest.raises(ValueError, match="needs a pre-training run: pretrained="):
        finetune(finetune_config(tmp_path / "a", **OPTIONS, **options))


def test_defaults_change_nothing(tmp_path):
    torch.manual_seed(0)
    agent = make_agent("dreamerv2", action_dim=2, **{**TINY, **BONUS})
    start = agent.world_model.eval()(batch()).detach().select("stoch", "deter")
    states = []
    for options in ({}, {"slow_target_fraction": 1.0, "reward_norm_momentum": 1.0}):
        twin = copy.deepcopy(agent)
        torch.manual_seed(1)
        BehaviorUpdate(twin, horizon=3, **options)(start)
        states.append(twin.state_dict())
    assert not different(*states)
