"""Videos and pictures: PSNR, grids, sheets, and files that are read back."""

from __future__ import annotations

import math

import av
import numpy as np
import pytest
import torch
from PIL import Image

from prelar_trl.record import (
    contact_sheet,
    frame_strip,
    psnr,
    read_video,
    to_uint8,
    video_grid,
    write_picture,
    write_video,
)


def moving_square(length=6, batch=2):
    """uint8 [B, T, 3, 64, 64]: a bright square that moves right."""
    frames = torch.full((batch, length, 3, 64, 64), 40, dtype=torch.uint8)
    for t in range(length):
        frames[:, t, :, 20:40, 4 * t : 4 * t + 16] = 220
    return frames


def test_psnr_has_its_closed_form_for_a_constant_error():
    truth = torch.full((2, 5, 3, 8, 8), 100, dtype=torch.uint8)
    values = psnr(truth + 51, truth)  # 51 / 255 = 0.2
    torch.testing.assert_close(values, torch.full((2, 5), -20 * math.log10(0.2)))
    assert psnr(truth.float() / 255, truth).eq(100).all()  # finite for equal frames
    with pytest.raises(ValueError, match="shapes differ"):
        psnr(truth, truth[:1])


def test_to_uint8_rounds_and_clips():
    assert to_uint8(torch.tensor([-0.5, 0.0, 0.5, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]


def test_grid_shows_truth_model_and_doubled_error_in_rows():
    truth = moving_square()
    model = (truth.float() / 255 - 10 / 255).clamp(0, 1)
    grid = video_grid(truth, model, scale=2)
    assert grid.dtype == torch.uint8 and grid.shape[:2] == (6, 3)
    frame = grid[0].permute(1, 2, 0)
    counts = [(frame == value).all(-1).sum().item() for value in (220, 210, 20)]
    # per sequence 20 x 16 bright pixels, 4 times enlarged; the whole tile has the same error
    assert counts[0] == counts[1] == 2 * 20 * 16 * 4
    assert counts[2] == 2 * 64 * 64 * 4


def test_grid_marks_seen_and_imagined_frames():
    truth = moving_square()
    grid = video_grid(truth, truth, context=2)
    assert not torch.equal(grid[1, :, 30:], grid[2, :, 30:])
    colors = [set(map(tuple, grid[t].flatten(1).T.tolist())) for t in (1, 2)]
    assert (0, 121, 140) in colors[0] and (209, 73, 91) not in colors[0]
    assert (209, 73, 91) in colors[1] and (0, 121, 140) not in colors[1]


def test_grid_takes_one_sequence_and_limits_many():
    truth = moving_square(batch=1)[0]
    one = video_grid(truth, truth)
    many, six = (video_grid(x, x) for x in (truth.expand(n, -1, -1, -1, -1) for n in (9, 6)))
    assert one.shape[-1] < many.shape[-1] == six.shape[-1]
    with pytest.raises(ValueError, match=r"\[B, T, 3, H, W\]"):
        video_grid(truth, truth[:5])
    strip = frame_strip(truth, truth, context=5, columns=4)
    assert strip.shape[2] > frame_strip(truth[:2], truth[:2], columns=4).shape[2]


def test_contact_sheet_holds_every_picture_with_or_without_labels():
    pictures = [torch.full((3, 16, 16), 10 * i, dtype=torch.uint8) for i in range(1, 8)]
    plain = contact_sheet(pictures, columns=3)
    labelled = contact_sheet(pictures, columns=3, labels=["x"] * 7, caption="seven")
    for sheet in (plain, labelled):
        for i in range(1, 8):
            assert (sheet == 10 * i).all(0).sum() >= 16 * 16
    with pytest.raises(ValueError, match="no pictures"):
        contact_sheet([])


def test_mp4_is_read_back_enlarged_and_plays_in_browsers(tmp_path):
    frames = moving_square(length=9, batch=1)[0]
    path = write_video(tmp_path / "new" / "clip.mp4", frames, fps=25)
    back = read_video(path)
    assert back.shape == (9, 3, 256, 256)
    small = back[..., 2::4, 2::4]
    assert psnr(small, frames).min() > 30
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 25
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]


def test_mp4_with_odd_sides_is_padded(tmp_path):
    path = write_video(tmp_path / "odd.mp4", torch.zeros(2, 3, 301, 299, dtype=torch.uint8))
    assert read_video(path).shape == (2, 3, 302, 300)


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_frames_of_wrong_type_or_shape_are_refused(tmp_path, frames):
    with pytest.raises(ValueError, match=r"uint8 frames \[T, 3, H, W\]"):
        write_video(tmp_path / "clip.mp4", frames)


def test_picture_is_written_exactly(tmp_path):
    picture = moving_square()[0, 0]
    back = np.asarray(Image.open(write_picture(tmp_path / "a.png", picture)).convert("RGB"))
    assert np.array_equal(back, picture.permute(1, 2, 0).numpy())
