"""How far things move in videos, and that pre-training shifts its frames by it."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch.nn.functional import avg_pool2d

from prelar_trl.config import METHODS
from prelar_trl.data import shift_for_motion, typical_motion
from prelar_trl.recipes.pretrain import pretrain
from tests.toy_runs import make_clips, pretrain_config


def texture_moving_by(quarters: int) -> torch.Tensor:
    """Eight frames ``[1, 8, 3, 40, 40]`` of a smooth texture that moves by quarters of a pixel."""
    generator = torch.Generator().manual_seed(0)
    fine = avg_pool2d(torch.rand(1, 256, 256, generator=generator), 25, stride=1)[0]
    fine = (fine - fine.min()) / (fine.max() - fine.min())
    frames = [fine[:160, quarters * t : quarters * t + 160] for t in range(8)]
    pixels = avg_pool2d(torch.stack(frames), 4) * 255
    return pixels.round().to(torch.uint8).unsqueeze(1).expand(-1, 3, -1, -1).unsqueeze(0)


@pytest.mark.parametrize("quarters", [1, 2, 4])
def test_the_motion_of_a_texture_is_found(quarters):
    # Along the gradient, whose directions are even: 2 / pi of it; textures bend that upwards.
    assert typical_motion(texture_moving_by(quarters)) == pytest.approx(quarters / 4, rel=0.4)


def test_faster_things_move_more_and_still_ones_not_at_all():
    slow, fast, faster = (typical_motion(texture_moving_by(n)) for n in (1, 2, 4))
    assert 0 < slow < fast < faster
    assert typical_motion(texture_moving_by(0)) == 0


def test_contrast_and_what_stands_still_do_not_matter():
    pixels = texture_moving_by(4)
    motion = typical_motion(pixels)
    assert typical_motion(pixels // 2) == pytest.approx(motion, rel=0.2)
    half = pixels.clone()
    half[..., :20] = half[:, :1, ..., :20]
    assert typical_motion(half) == pytest.approx(motion, rel=0.25)


def test_the_shift_is_a_multiple_of_the_motion_within_bounds():
    pixels = texture_moving_by(4)  # a pixel a frame
    assert shift_for_motion(pixels) == round(8 * typical_motion(pixels))
    assert shift_for_motion(pixels, 1000.0) == min(pixels.shape[-2:]) // 3
    assert shift_for_motion(pixels, 0.0) == 1


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 3, 8, 8), (1, 2, 3, 3, 8)])
def test_what_cannot_move_is_refused(shape):
    with pytest.raises(ValueError, match=r"two frames of 4x4"):
        typical_motion(torch.zeros(shape, dtype=torch.uint8))


def shift_of(run):
    return yaml.safe_load((run / "config.yaml").read_text())["model"]["latent_action_shift"]


def test_frames_are_shifted_by_the_motion_of_the_videos_unless_told_otherwise(tmp_path, capsys):
    clips = make_clips(tmp_path / "clips")
    options = {"method": "prelar_plus", "updates": 1}
    pretrain(pretrain_config(clips, tmp_path / "measured", **options))
    measured = shift_of(tmp_path / "measured")
    assert 5 < measured <= 21  # the disc moves by pixels
    said = f"moved by up to {measured} pixels (model.latent_action_shift)"
    assert said in capsys.readouterr().out

    pretrain(pretrain_config(clips, tmp_path / "less", **options, shift_by_motion=1))
    assert 0 < shift_of(tmp_path / "less") < measured
    pretrain(pretrain_config(clips, tmp_path / "told", **options, model={"latent_action_shift": 4}))
    assert shift_of(tmp_path / "told") == 4
    pretrain(pretrain_config(clips, tmp_path / "off", **options, shift_by_motion=0))
    pretrain(pretrain_config(clips, tmp_path / "prelar", updates=1))
    assert shift_of(tmp_path / "off") == METHODS["prelar_plus"].pretrain["latent_action_shift"]
    assert shift_of(tmp_path / "prelar") == 0

    both = {"shift_by_motion": 1, "model": {"latent_action_shift": 4}}
    with pytest.raises(ValueError, match="shift_by_motion=1 sets model.latent_action_shift"):
        pretrain(pretrain_config(clips, tmp_path / "both", **options, **both))

    older = tmp_path / "less" / "config.yaml"
    lines = older.read_text().splitlines(keepends=True)
    older.write_text("".join(x for x in lines if not x.startswith("shift_by_motion")))
    with pytest.raises(ValueError, match="is of an older version"):
        pretrain(pretrain_config(clips, tmp_path / "less", **options, resume=True))
    older.write_text("env_steps: 60\n")
    with pytest.raises(ValueError, match="resume: the run in .* is of the other phase"):
        pretrain(pretrain_config(clips, tmp_path / "less", **options, resume=True))

    with pytest.raises(ValueError, match="shift_by_motion=8: method=apv has no latent actions"):
        pretrain(pretrain_config(clips, tmp_path / "apv", method="apv", shift_by_motion=8))

    run = tmp_path / "measured"
    pretrain(pretrain_config(clips, run, method="prelar_plus", updates=2, resume=True))
    assert shift_of(run) == measured
