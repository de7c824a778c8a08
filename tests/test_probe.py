"""Probes: their numbers on data with a known answer, and the recipe on a toy run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from tensordict import TensorDict
from torch import nn

from prelar_trl.data import VideoClips
from prelar_trl.models import make_world_model
from prelar_trl.modules import LatentActionEncoder, ResNetEncoder, make_latent_actions
from prelar_trl.probes import (
    action_effects,
    frame_difference,
    latent_action_features,
    linear_r2,
    mlp_r2,
    openloop_quality,
    rank_correlation,
    transfer,
)
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.recipes.probe import calibrate, probe
from prelar_trl.recipes.schema import ProbeConfig
from prelar_trl.record import ssim
from tests.toy_runs import CLIPS, TINY, make_clips, pretrain_config, rows, shorten_mlp_probe


def world_model(method: str = "prelar", **changes):
    return make_world_model(
        method, "pretrain", action_dim=0, size="tiny", **{**TINY, **changes}
    ).eval()


def batch(sequences: int = 5, steps: int = 6) -> TensorDict:
    is_first = torch.zeros(sequences, steps, 1, dtype=torch.bool)
    is_first[:, 0] = True
    pixels = torch.randint(0, 256, (sequences, steps, 3, 64, 64), dtype=torch.uint8)
    td = {"pixels": pixels, "is_first": is_first, "action": torch.randn(sequences, steps, 2)}
    return TensorDict(td, batch_size=[sequences, steps])


# ---------------------------------------------------------------- similarity of images


def test_ssim_is_one_for_equal_frames_and_the_same_for_bytes_and_floats():
    frames = torch.randint(0, 256, (2, 3, 3, 24, 20), dtype=torch.uint8)
    assert ssim(frames, frames).shape == (2, 3)
    torch.testing.assert_close(ssim(frames, frames), torch.ones(2, 3))
    other = torch.randint(0, 256, frames.shape, dtype=torch.uint8)
    torch.testing.assert_close(ssim(other.float() / 255, frames), ssim(other, frames))


def test_ssim_of_two_constant_frames_compares_their_brightness_only():
    a, b = torch.full((3, 16, 16), 0.2), torch.full((3, 16, 16), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert float(ssim(a, b)) == pytest.approx(expected, rel=1e-4)


def test_ssim_agrees_with_the_definition_computed_with_scipy():
    x, y = np.random.default_rng(0).random((2, 20, 24))

    def blur(image):
        return gaussian_filter(image, 1.5, radius=5)[5:-5, 5:-5]

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    map_ = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
    map_ /= (mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)
    ours = ssim(torch.from_numpy(x)[None], torch.from_numpy(y)[None])
    assert float(ours) == pytest.approx(map_.mean(), abs=1e-5)


def test_ssim_refuses_unlike_shapes_and_tiny_frames():
    with pytest.raises(ValueError, match="ssim"):
        ssim(torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="11x11"):
        ssim(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8))


# ---------------------------------------------------------------- linear and MLP probe


def test_a_linear_map_is_read_perfectly_whatever_the_features_scale():
    x, mix = torch.randn(400, 6), torch.randn(6, 3)
    y = (x @ mix + 2) * torch.tensor([1.0, 10.0, 0.1])
    x = x * torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0, 1.0]) + 5
    r2 = linear_r2(x[:300], y[:300], x[300:], y[300:])
    torch.testing.assert_close(r2, torch.ones(3, dtype=torch.float64), atol=1e-3, rtol=0)


def test_noise_is_not_read_on_other_samples():
    x, y = torch.randn(600, 8), torch.randn(600, 2)
    assert (linear_r2(x[:400], y[:400], x[400:], y[400:]) < 0.05).all()


def test_half_of_the_variance_gives_half_the_score():
    signal, noise = torch.randn(20_000, 1), torch.randn(20_000, 1)
    y = signal + noise
    r2 = linear_r2(signal[:10_000], y[:10_000], signal[10_000:], y[10_000:])
    assert float(r2) == pytest.approx(0.5, abs=0.03)


def test_an_mlp_reads_what_no_linear_map_does():
    x = torch.randn(600, 1)
    split = (x[:400], x[:400].abs(), x[400:], x[400:].abs())
    assert linear_r2(*split) < 0.1 and mlp_r2(*split, steps=200) > 0.9


def test_constant_features_and_targets_are_harmless():
    x, y = torch.randn(50, 2), torch.randn(50, 2)
    x[:, 1], y[:, 1] = 3.0, 1.0
    r2 = linear_r2(x, y, x, y)
    assert r2[0].isfinite() and r2[1].isnan()


# ---------------------------------------------------------------- distances


def test_rank_correlation_sees_order_only():
    x = torch.randn(100)
    assert rank_correlation(x, x.exp()) == pytest.approx(1)
    assert rank_correlation(x, -(x**3)) == pytest.approx(-1)
    # ranks 1 2 3 4 against 1 3 2 4: 1 - 6 * 2 / (4 * 15)
    assert rank_correlation(torch.tensor([1.0, 2, 3, 4]), torch.tensor([0.0, 5, 1, 9])) == (
        pytest.approx(0.8)
    )
    assert math.isnan(rank_correlation(x, torch.ones(100)))


@pytest.mark.parametrize("variant", ["gaussian", "deterministic", "categorical", "mixed"])
def test_exchanged_actions_give_a_distance_for_each_transition(variant):
    model = world_model(latent_action=variant, latent_action_classes=4 * (variant == "categorical"))
    effects = action_effects(model, batch(5, 6), exchanges=3)
    for name in ("state", "latent", "true"):
        assert effects[name].shape == (3 * 5 * 5,)
        assert (effects[name] >= -1e-4).all() and effects[name].any()
    assert effects["explained"].shape == (25,)


def test_equal_clips_have_no_distances_between_them():
    model = world_model(latent_action="deterministic")
    model.sample = False
    same = batch(1, 6).expand(5, 6).contiguous()
    effects = action_effects(model, same, exchanges=2)
    for name in ("state", "latent", "true"):
        assert effects[name].abs().max() < 1e-4
    assert not effects["explained"].any()


def test_where_the_dynamics_ignores_actions_exchanging_them_changes_nothing():
    """Also with an ensemble, whose heads would differ."""
    for options in ({}, {"ensemble": 3}):
        model = world_model(**options)
        model.rssm.input_layer.weight.data[:, model.rssm.latent.flat_size :] = 0
        effects = action_effects(model, batch())
        assert effects["state"].abs().max() < 1e-4 and not effects["explained"].any()


def test_true_distances_are_between_the_actions_that_led_to_the_frames():
    td = batch(3, 4)
    effects = action_effects(world_model(), td, exchanges=1)
    expected = (td["action"][1, 2] - td["action"][0, 2]).norm()
    assert torch.isclose(effects["true"].view(3, 3)[1, 1], expected)


def test_the_own_action_explains_when_the_dynamics_depends_on_it():
    """A posterior equal to the prior under the own action is explained by no other."""
    model = world_model()
    model.rssm.input_layer.weight.data[:, model.rssm.latent.flat_size :] *= 100
    real = model.rssm.observe

    def observe(*args):
        states, _, prior = real(*args)
        return states, prior, prior

    model.rssm.observe = observe
    assert action_effects(model, batch())["explained"].float().mean() > 0.9


def test_true_actions_are_exchanged_where_the_dynamics_gets_them():
    model = make_world_model("dreamerv2", "finetune", action_dim=2, size="tiny", **TINY).eval()
    model.rssm.input_layer.weight.data[:, model.rssm.latent.flat_size :] *= 100
    td = batch()
    effects = action_effects(model, td)
    assert "latent" not in effects
    assert effects["state"].min() > 0
    td["action"] = torch.ones_like(td["action"])
    assert action_effects(model, td)["state"].abs().max() < 1e-5


def test_models_without_actions_say_so():
    with pytest.raises(ValueError, match="no actions"):
        action_effects(world_model("apv"), batch())
    with pytest.raises(ValueError, match="no latent actions"):
        transfer(world_model("apv"), batch(), batch(), 2)


# ---------------------------------------------------------------- predictions


def test_open_loop_quality_is_given_for_each_frame_and_prediction():
    quality = openloop_quality(world_model(), batch(3, 6), context=2)
    assert set(quality) == {"psnr", "ssim"}
    assert set(quality["psnr"]) == {"own_actions", "other_actions", "last_frame"}
    assert quality["ssim"]["own_actions"].shape == (3, 6)
    assert (quality["psnr"]["last_frame"][:, :2] == 100).all()
    assert (quality["psnr"]["last_frame"][:, 2:] < 20).all()
    assert set(openloop_quality(world_model("apv"), batch(3, 6), 2)["ssim"]) == {
        "no_actions",
        "last_frame",
    }


def test_transferred_actions_act_after_the_frames_that_were_seen():
    model = world_model(latent_action="deterministic")
    model.sample = False
    model.rssm.input_layer.weight.data *= 20  # untrained dynamics hardly react to anything
    a, b = batch(2, 6), batch(2, 6)
    moved, own = transfer(model, a, b, context=3)
    torch.testing.assert_close(moved[:, :3], own[:, :3])
    assert not torch.allclose(moved[:, 3], own[:, 3])
    torch.testing.assert_close(transfer(model, b, b, context=3)[0], own)
    torch.testing.assert_close(model.open_loop(b, 3), own)


def test_features_are_means_or_probabilities():
    images = torch.rand(2, 5, 3, 64, 64) - 0.5
    for kind, classes, width in (
        ("gaussian", 0, 3),
        ("deterministic", 0, 3),
        ("categorical", 4, 12),
        ("mixed", 4, 14),
        ("mixed", 0, 5),
    ):
        latent_actions = make_latent_actions(
            kind, size=3, shared={"classes": classes, "deter_size": 2}
        )
        network = ResNetEncoder(6, depth=4, layers=1)
        encoder = LatentActionEncoder(network, latent_actions, hidden=8).eval()
        x = latent_action_features(encoder, images)
        assert x.shape == (2, 4, width)
        torch.testing.assert_close(x, latent_action_features(encoder, images))
        if classes:
            sums = x[..., width - 12 :].unflatten(-1, (3, 4)).sum(-1)
            torch.testing.assert_close(sums, torch.ones(2, 4, 3))


def test_what_lies_below_the_noise_is_read_from_the_mean_alone():
    model = world_model()
    encoder = model.latent_action_encoder
    images = model.preprocess(batch()["pixels"])
    mean = latent_action_features(encoder, images)
    sampled = [latent_action_features(encoder, images, sample=True) for _ in range(2)]
    assert mean.equal(latent_action_features(encoder, images))
    assert not sampled[0].equal(sampled[1]) and sampled[0].shape == mean.shape
    assert (sampled[0] - sampled[1]).std() > mean.std()  # an untrained encoder's means are small


def test_frame_difference_is_that_of_the_means_of_patches():
    images = torch.rand(2, 3, 3, 64, 64)
    x = frame_difference(images, 8)
    assert x.shape == (2, 2, 192)
    patch = images[1, 1:3, 2, 8:16, 16:24].mean((-2, -1))
    torch.testing.assert_close(x[1, 1, 2 * 64 + 8 + 2], patch[1] - patch[0])


# ---------------------------------------------------------------- recipe


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    shorten_mlp_probe(monkeypatch)


@pytest.fixture(scope="module")
def trained(clips, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    pretrain(pretrain_config(clips, run, updates=1))
    return run


def config(run: Path, **changes) -> ProbeConfig:
    options = {"clips": 10, "batch_size": 5, "device": "cpu", "threads": 1, **changes}
    return ProbeConfig(run=str(run), **options)


def test_the_recipe_writes_numbers_and_pictures_into_the_run(trained):
    run = trained
    result = probe(config(run))
    table = rows(run, "probe.csv")
    assert list(table[0]) == ["probe", "name", "horizon", "value"]
    horizons = [
        int(r["horizon"])
        for r in table
        if (r["probe"], r["name"]) == ("openloop_psnr", "own_actions")
    ]
    seen = CLIPS["context"]
    assert horizons == list(range(1 - seen, CLIPS["clip_len"] - seen + 1))
    values = {f"{r['probe']}/{r['name']}": float(r["value"]) for r in table if not r["horizon"]}
    for name in ("latent_action", "latent_action_sampled", "random_encoder", "frame_difference"):
        dims = [values[f"action_r2/{name}_{i}"] for i in range(2)]
        assert values[f"action_r2/{name}"] == pytest.approx(sum(dims) / 2, rel=1e-3)
    assert {"rank_correlation/latent_state", "rank_correlation/true_state"} <= set(values)
    assert 0 <= values["contrast/accuracy"] <= 1
    assert json.loads((run / "probe.json").read_text()) == result
    pictures = {path.name for path in (run / "pictures").glob("probe_*.png")}
    kinds = ("psnr", "ssim", "action_r2", "distance", "transfer_0", "transfer_1")
    assert pictures == {f"probe_{kind}.png" for kind in kinds}
    before = (run / "probe.csv").read_bytes()
    probe(config(run))
    assert (run / "probe.csv").read_bytes() == before  # the same seed, the same numbers


def test_what_cannot_be_probed_is_said(clips, tmp_path):
    run = tmp_path / "apv"
    pretrain(pretrain_config(clips, run, updates=1, method="apv"))
    result = probe(config(run))
    assert "method=apv has no latent actions" in result["notes"][0]
    assert "action_r2/frame_difference" in result["values"]
    assert not [name for name in result["values"] if "latent" in name or "contrast" in name]


def test_clips_without_actions_leave_out_what_needs_them(trained, monkeypatch):
    real = VideoClips.__init__

    def without_actions(self, *args, **kwargs):
        real(self, *args, **kwargs)
        for each in self.stores:
            each.streams.pop("actions", None)

    monkeypatch.setattr(VideoClips, "__init__", without_actions)
    result = probe(config(trained))
    assert "no true actions" in result["notes"][0]
    assert "rank_correlation/latent_state" in result["values"]
    assert not [name for name in result["values"] if "true" in name or "r2" in name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 4}, "batch_size=4"),
        ({"clips": 0}, "clips=0"),
        ({"context": 6}, "context=6"),
        ({"heldout": 0.5}, "heldout=0.5 would probe on clips that the run .* held 0.25"),
    ],
)
def test_settings_that_cannot_work_are_refused(trained, changes, message):
    with pytest.raises(ValueError, match=message):
        probe(config(trained, **changes))


@pytest.mark.parametrize("spelled", ["{}/", "[{}]", "{}/../clips", "[{}, other]"])
def test_clips_that_were_learned_from_are_known_by_other_spellings(trained, clips, spelled):
    path = str(clips)
    data = {"{}/": f"{path}/", "[{}]": [path], "{}/../clips": f"{path}/../{clips.name}"}
    data["[{}, other]"] = [path, f"{path}_other"]
    with pytest.raises(ValueError, match=r"heldout=0\.5 would probe on clips"):
        probe(config(trained, data=data[spelled], heldout=0.5))


@pytest.mark.parametrize(
    ("changes", "measured"), [({"pixels": 96}, True), ({"action_repeat": 2}, False)]
)
def test_transfer_on_the_toy_is_measured_where_the_simulator_tells(tmp_path, changes, measured):
    data = make_clips(tmp_path / "clips", **changes)
    run = tmp_path / "run"
    pixels = changes.get("pixels", 64)
    pretrain(pretrain_config(data, run, updates=1, pixels=pixels))
    values = probe(config(run, transfers=1))["values"]
    assert ("transfer_psnr/transferred" in values) == measured


def test_norm_layers_of_the_random_encoder_have_the_statistics_of_its_frames(clips):
    model = world_model()
    data = VideoClips(clips, 6, 5, split="all")
    calibrate(model, data)
    norm = next(x for x in model.latent_action_encoder.modules() if isinstance(x, nn.BatchNorm2d))
    seen = []
    norm.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    pixels = data.sample()["pixels"]
    with torch.no_grad():
        model.latent_action_encoder(model.preprocess(pixels))
    assert float(seen[0].var((0, 2, 3)).mean()) == pytest.approx(1, abs=0.3)
