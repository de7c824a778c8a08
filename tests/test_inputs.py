"""What an agent sees: sizes of pictures, several cameras, gray, vectors; with and without video."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from prelar_trl.data import EpisodeReplay, to_frames
from prelar_trl.envs import make_env
from prelar_trl.fast import accelerate
from prelar_trl.models import copy_pretrained, make_agent, make_world_model, make_world_model_loss
from prelar_trl.modules import (
    CNNDecoder,
    CNNEncoder,
    ResNetDecoder,
    ResNetEncoder,
    WorldModelPolicy,
)
from prelar_trl.modules.pixels import normalize_pixels, to_gray
from prelar_trl.objectives import total_loss
from prelar_trl.pretrained import added_inputs
from prelar_trl.recipes.evaluate import evaluate
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.recipes.schema import EvaluateConfig, FinetuneConfig
from prelar_trl.types import Inputs
from tests.test_envs_own import BYTES, RGB, Gym, Walkers
from tests.tiny import BONUS, TINY, batch, has_gradient
from tests.toy_runs import QUICK, checkpoint, finetune_config, make_clips, pretrain_config

SIZES = (64, 84, 96, 128)
NETWORKS = {
    "resnet": {"images": "resnet"},
    "context": {"images": "context", "context_dropout": 0.0, "context_mask": 0.0},
    "cnn": {"images": "cnn"},
    "patches": {"images": "cnn", "patches": True},
}
LEFT = np.where(np.arange(64)[:, None, None] < 32, BYTES, 0).astype(np.uint8)


class Robot(Gym):
    """Two cameras, the joints, and a mode of four; pictures change with the step."""

    def __init__(self) -> None:
        space = Dict(
            eye=Box(0, 255, (64, 64, 3), np.uint8),
            hand=Box(0, 255, (64, 64, 3), np.uint8),
            joint_pos=Box(-9, 9, (3,), np.float64),
            joint_vel=Box(-9, 9, (2,), np.float32),
            mode=Discrete(4),
        )
        observation = {
            "eye": BYTES,
            "hand": LEFT,
            "joint_pos": np.array([1.0, 2, 3]),
            "joint_vel": np.array([4, 5], np.float32),
            "mode": 2,
        }
        super().__init__(space, observation)


def robot(**options):
    return make_env(Robot, max_steps=6, **options)


def seen(inputs: Inputs, steps: int = 4) -> TensorDict:
    """A batch ``[2, steps]`` of such inputs."""
    shape = (2, steps, 3 * inputs.views, inputs.size, inputs.size)
    entries = {"pixels": torch.randint(0, 256, shape, dtype=torch.uint8)}
    if inputs.vector:
        entries["vector"] = torch.randn(2, steps, inputs.vector)
    return batch(2, steps, **entries)


def tiny_model(method: str, inputs: Inputs, phase: str = "finetune", **options):
    return make_world_model(method, phase, action_dim=2, inputs=inputs, **{**TINY, **options})


# ---------------------------------------------------------------------- networks


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("size", SIZES)
def test_every_network_has_every_size_and_the_fast_ones_compute_the_same(network, size):
    method = "contextwm" if network == "context" else "prelar"
    model = tiny_model(method, Inputs(size), **NETWORKS[network]).eval()
    fast = accelerate(copy.deepcopy(model))
    images = torch.rand(1, 2, 3, size, size) - 0.5
    torch.testing.assert_close(model.encode(images), fast.encode(images), rtol=1e-3, atol=1e-4)
    maps = None
    if model.context_encoder is not None:
        frame = images[:, :1].expand(-1, 2, -1, -1, -1)  # whichever is drawn
        maps = model.context_encoder(frame)
    feat = torch.randn(1, 2, model.rssm.feat_dim)
    frames = model.decode(feat, maps)
    assert frames.shape == images.shape
    torch.testing.assert_close(frames, fast.decode(feat, maps), rtol=1e-3, atol=1e-4)


def test_sizes_follow_from_one_formula():
    last = {size: ResNetEncoder(image_size=size).embed_dim for size in SIZES}
    assert last == {64: 192 * 16, 84: 192 * 36, 96: 192 * 36, 128: 192 * 64}
    assert [CNNEncoder(image_size=s).embed_dim // 384 for s in SIZES] == [4, 9, 16, 36]
    assert [CNNDecoder(8, image_size=s).first_map[1] for s in SIZES] == [1, 3, 3, 5]
    assert [ResNetDecoder(8, image_size=s).first_map[1] for s in SIZES] == [4, 6, 6, 8]


def test_padding_is_gray_around_and_cropping_takes_it_away():
    encoder = ResNetEncoder(depth=4, layers=1, norm="none", image_size=84)
    images = torch.rand(2, 3, 84, 84) - 0.5
    framed = torch.nn.functional.pad(images, (6, 6, 6, 6))
    other = ResNetEncoder(depth=4, layers=1, norm="none", image_size=96)
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(encoder(images), other(framed))
    decoder = ResNetDecoder(8, depth=4, layers=1, image_size=84)
    wide = ResNetDecoder(8, depth=4, layers=1, image_size=96)
    wide.load_state_dict(decoder.state_dict())
    feat = torch.randn(2, 8)
    assert torch.equal(decoder.eval()(feat), wide.eval()(feat)[..., 6:90, 6:90])


@pytest.mark.parametrize("method", ["prelar", "dreamerv2", "contextwm"])
def test_64x64_in_color_from_one_camera_keeps_its_weights(method):
    torch.manual_seed(0)
    before = make_agent(method, action_dim=2, **{**TINY, **BONUS}).state_dict()
    torch.manual_seed(0)
    now = make_agent(method, action_dim=2, inputs=Inputs(64, 1, 0), **{**TINY, **BONUS})
    assert before.keys() == now.state_dict().keys()
    assert all(torch.equal(x, now.state_dict()[key]) for key, x in before.items())
    new = ("view_", "vector_")
    assert not any(part in key for key in before for part in new)


# ---------------------------------------------------------------------- model and loss


@pytest.mark.parametrize("method", ["prelar", "dreamerv2", "apv", "contextwm"])
def test_every_picture_and_the_vector_are_encoded_and_predicted(method):
    inputs = Inputs(64, 3, 5)
    agent = make_agent(method, action_dim=2, inputs=inputs, **{**TINY, **BONUS})
    model, data = agent.world_model, seen(inputs)
    loss = make_world_model_loss(method, "finetune", model, video_bonus=agent.video_bonus)
    losses = loss(data)
    assert losses["loss_vector"] > 0
    total_loss(losses).backward()
    for name in added_inputs(model):
        part = getattr(model, name)
        for module in part if isinstance(part, torch.nn.ModuleList) else [part]:
            assert has_gradient(module), name
    out = model.eval()(data.copy())
    assert out["prediction", "pixels"].shape == data["pixels"].shape
    assert out["prediction", "vector"].shape == (2, 4, 5)
    assert model.open_loop(data, context=2).shape == data["pixels"].shape
    other = data.copy()
    for change in ("pixels", "vector"):  # the last camera, and the vector, are looked at
        other[change] = data[change].clone()
        if change == "pixels":
            other[change][:, :, 6:] = 0
        else:
            other[change] += 1
        images = model.preprocess(other["pixels"])
        before = model.encode(model.preprocess(data["pixels"]), data["vector"])
        assert not torch.equal(before, model.encode(images, other["vector"]))
        other = data.copy()


def test_the_image_loss_is_the_sum_over_the_pictures_and_the_vectors_over_its_numbers():
    inputs = Inputs(64, 2, 3)
    model, data = tiny_model("dreamerv2", inputs, sample=False).eval(), seen(inputs)
    losses = make_world_model_loss("dreamerv2", "finetune", model)(data)
    out = model(data.copy())
    error = (out["prediction", "pixels"] - normalize_pixels(data["pixels"])).square() / 2
    torch.testing.assert_close(losses["image"], error.sum((2, 3, 4)).mean().detach())
    error = (out["prediction", "vector"] - data["vector"]).square() / 2
    torch.testing.assert_close(losses["vector"], error.sum(-1).mean().detach())


def test_a_weight_of_the_vector_needs_one():
    with pytest.raises(ValueError, match="'vector', but the world model sees none"):
        model = tiny_model("dreamerv2", Inputs())
        make_world_model_loss("dreamerv2", "finetune", model, weights={"vector": 1.0})


def test_latent_actions_and_context_come_from_the_first_picture():
    model = tiny_model("contextwm", Inputs(64, 2, 0))
    images = torch.rand(2, 3, 6, 64, 64)
    assert torch.equal(model.first_view(images), images[:, :, :3])


@pytest.mark.parametrize("phase", ["pretrain", "finetune"])
def test_gray_networks_see_and_predict_brightness(phase):
    inputs = Inputs(64, 1 if phase == "pretrain" else 2, 0)
    model = tiny_model("prelar", inputs, phase, gray=True, sample=False).eval()
    data = seen(inputs)
    gray = model.preprocess(data["pixels"])
    red, green, blue = normalize_pixels(data["pixels"]).unflatten(2, (-1, 3)).unbind(3)
    torch.testing.assert_close(gray, 0.299 * red + 0.587 * green + 0.114 * blue)
    assert gray.shape == (2, 4, inputs.views, 64, 64)
    losses = make_world_model_loss("prelar", phase, model)(data)
    error = (model(data.copy())["prediction", "pixels"] - gray).square() / 2
    torch.testing.assert_close(losses["image"], error.sum((2, 3, 4)).mean().detach())
    frames = model.open_loop(data, context=2)
    assert frames.shape == data["pixels"].shape and torch.equal(frames[:, :, 0], frames[:, :, 1])


def test_white_is_white_in_gray():
    assert torch.allclose(to_gray(torch.full((1, 6, 2, 2), 0.5)), torch.full((1, 2, 2, 2), 0.5))


# ---------------------------------------------------------------------- environments


def test_several_cameras_lie_one_behind_the_other():
    env = robot(cameras=["hand", "eye"])
    check_env_specs(env)
    pixels = env.rollout(3)["pixels"]
    assert pixels.shape == (3, 6, 64, 64) and pixels.dtype == torch.uint8
    assert torch.equal(pixels[1, 3:], RGB)
    assert torch.equal(pixels[1, :3], torch.from_numpy(LEFT).permute(2, 0, 1))
    assert torch.equal(robot(cameras=["eye"]).reset()["pixels"], RGB)
    assert robot(cameras=["eye", "hand"], pixels=84).reset()["pixels"].shape == (6, 84, 84)


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        (["joint_pos"], [1, 2, 3]),
        (["joint_*"], [1, 2, 3, 4, 5]),
        (["joint_vel", "joint_pos"], [4, 5, 1, 2, 3]),
        (["state"], [1, 2, 3, 4, 5, 0, 0, 1, 0]),
        (["mode", "*"], [0, 0, 1, 0, 1, 2, 3, 4, 5]),
    ],
)
def test_vectors_are_chosen_by_names_and_patterns(vectors, expected):
    env = robot(camera="eye", vectors=vectors)
    check_env_specs(env)
    step = env.rand_step(env.reset())
    for place in (step, step["next"]):
        assert place["vector"].dtype == torch.float32 and place["vector"].tolist() == expected
    assert step["state"].shape == (9,)


def test_vectors_of_a_torchrl_environment_and_of_its_transforms():
    assert make_env("toy", vectors=["state"]).reset()["vector"].shape == (4,)
    start = make_env("toy", vectors=["state"], pixels=None).reset()
    assert torch.equal(start["vector"], start["state"])
    env = make_env(make_env("toy", vectors=["state"], max_steps=4), vectors=["state"])
    check_env_specs(env)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "gives 2 pictures, choose by camera=: eye, hand; or several by cameras="),
        ({"cameras": ["eye", "foot"]}, "unknown camera 'foot'; this environment has eye, hand"),
        ({"cameras": ["eye"], "camera": "hand"}, "camera=hand and cameras=.*: give one of them"),
        ({"cameras": ["eye", "eye"]}, "must be a list of different names"),
        ({"cameras": "eye"}, "must be a list of different names"),
        ({"camera": "eye", "vectors": ["wheel*"]}, "'wheel\\*' fits none of joint_pos, joint_vel"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        robot(**options)
    assert "\n" not in str(error.value)


def test_batched_environments_of_two_pictures():
    class Two(Walkers):
        def __init__(self):
            super().__init__()
            spec = self.observation_spec
            spec["left"], spec["right"] = spec["pixels"].clone(), spec["pixels"].clone()
            del spec["pixels"]
            self.observation_spec = spec

        def _observe(self):
            pixels = super()._observe()["pixels"]
            return {"left": pixels, "right": pixels + 7}

    env = make_env(Two(), cameras=["right", "left"])
    check_env_specs(env)
    assert env.reset()["pixels"].shape == (2, 6, 64, 64)
    assert env.reset()["pixels"][0, :, 0, 0].tolist() == [7] * 3 + [0] * 3


def test_the_replay_keeps_vectors_and_several_pictures(tmp_path):
    rollout = robot(cameras=["eye", "hand"], vectors=["joint_*"]).rollout(6)
    rollout["vector"] += torch.arange(6.0).unsqueeze(-1)
    rollout["next", "vector"] += torch.arange(1.0, 7).unsqueeze(-1)
    options = {"window": 7, "batch_size": 1, "capacity": 100}
    replay = EpisodeReplay(tmp_path / "replay", **options)
    replay.extend(rollout)
    frames = to_frames(rollout)
    for again in (replay.sample(), frames.unsqueeze(0)):
        assert again["vector"][0, :, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert torch.equal(again["pixels"][0, :6], rollout["pixels"])
    with pytest.raises(ValueError, match=r"vector has shape \[9\] per step; .* holds \[5\]"):
        replay.extend(robot(cameras=["eye", "hand"], vectors=["state"]).rollout(6))
    with pytest.raises(ValueError, match="vector is NaN"):
        replay.extend(rollout.clone().set("vector", rollout["vector"] * torch.nan))
    replay.close()
    replay = EpisodeReplay(tmp_path / "replay", **options)
    assert replay.sample()["vector"].shape == (1, 7, 5)


def test_the_policy_sees_what_training_sees():
    inputs = Inputs(64, 2, 5)
    model = tiny_model("prelar", inputs, sample=False).eval()
    agent = make_agent("prelar", action_dim=2, inputs=inputs, **{**TINY, **BONUS})
    policy = WorldModelPolicy(model, agent.actor, mode="mode")
    env = robot(cameras=["eye", "hand"], vectors=["joint_*"]).append_transform(policy.make_primer())
    rollout = env.rollout(4, policy)
    frames = to_frames(rollout)[:4].unsqueeze(0)
    action, _ = model.dynamics_actions(frames, None)
    embed = model.encode(model.preprocess(frames["pixels"]), frames["vector"])
    deter = model.observe(embed, action, frames["is_first"])["deter"][0]
    torch.testing.assert_close(rollout["next", "belief", "deter"], deter, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- from video


def test_pretraining_takes_one_picture():
    with pytest.raises(ValueError, match="pre-training takes one picture and no vector"):
        tiny_model("prelar", Inputs(64, 2, 0), "pretrain")


@pytest.mark.parametrize("method", ["prelar", "apv"])
def test_added_inputs_start_anew_and_the_rest_is_pretrained(method):
    trained = tiny_model(method, Inputs(), "pretrain")
    model = tiny_model(method, Inputs(64, 2, 5))
    before = copy.deepcopy(model.state_dict())
    copy_pretrained(model, trained.state_dict())
    now = model.state_dict()
    added = ["view_encoders", "view_decoders", "vector_encoder", "vector_decoder"]
    assert added_inputs(model) == added and added_inputs(trained) == []
    for key in now:
        if key.startswith(tuple(added)):
            assert torch.equal(now[key], before[key]), key
    assert torch.equal(now["encoder.conv_in.weight"], trained.encoder.conv_in.weight)
    name = "lower_rssm" if method == "apv" else "rssm"
    weight, old = now[f"{name}.posterior_hidden.weight"], trained.rssm.posterior_hidden.weight
    width = old.shape[1]
    assert torch.equal(weight[:, :width], old) and weight.shape[1] > width
    assert torch.equal(weight[:, width:], before[f"{name}.posterior_hidden.weight"][:, width:])


def test_the_recipes_add_a_camera_and_a_vector_to_what_video_has_taught(tmp_path, capsys):
    clips = make_clips(tmp_path / "clips", pixels=84)
    small = {"depth": 2, "head_layers": 1}
    cfg = pretrain_config(clips, tmp_path / "pre", size="mini", updates=1, pixels=84, model=small)
    pretrain(cfg)
    options = {"pretrained": cfg.run, "env": "mine", "method": "prelar", "align_updates": 1}
    options |= {"cameras": ["eye", "hand"], "vectors": ["joint_*"], **QUICK}
    small["bonus_window"] = 2
    fine = finetune_config(tmp_path / "fine", pixels=84, model=small, **options)
    finetune(fine, env_factory=lambda: Robot())
    assert "starts anew: view_encoders, view_decoders, vector_encoder" in capsys.readouterr().out
    state = checkpoint(tmp_path / "fine")
    assert state["inputs"] == {"size": 84, "views": 2, "vector": 5}
    result = evaluate(
        EvaluateConfig(run=fine.run, episodes=1, device="cpu"), env_factory=lambda: Robot()
    )
    assert result["records"][0]["length"] == 8
    with pytest.raises(ValueError, match="saw pictures of 84x84, this run pixels=64; use pixels=8"):
        finetune(finetune_config(tmp_path / "c", model=small, **options), env_factory=Robot)
    rehearsed = finetune_config(tmp_path / "d", pixels=84, rehearse=0.5, model=small, **options)
    with pytest.raises(ValueError, match="rehearse=0.5: videos show neither further cameras nor"):
        finetune(rehearsed, env_factory=lambda: Robot())
    with pytest.raises(ValueError, match="frames of 84x84; make it with pixels=64, or train with"):
        pretrain(pretrain_config(clips, tmp_path / "e", size="mini", updates=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixels": 100}, "pixels=100 is unknown; choose 64, 84, 96 or 128"),
        ({"cameras": 3}, "cameras=3 must be a list of names"),
        ({"cameras": "eye,eye"}, "cameras='eye,eye' must be a list of names"),
        ({"vectors": [3]}, r"vectors=\[3\] must be a list of names"),
    ],
)
def test_bounds_of_the_settings(options, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(env="toy", run="r", **options)
