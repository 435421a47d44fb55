"""Clips for people: files that open elsewhere with the right frames, and a sheet with every frame in its place."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dydit_scale.data.shapes.motion import draw_motion, make_motion
from dydit_scale.sampling.video import SHEET_GAP, contact_sheet, write_video


def clip(height: int = 32, width: int = 32) -> np.ndarray:
    """A bright bar that moves down, a colour for each frame."""
    frames = np.zeros((8, height, width, 3), dtype=np.uint8)
    for number in range(8):
        frames[number, 3 * number : 3 * number + 5] = (30 * number, 255 - 30 * number, 128)
    return frames


@pytest.mark.parametrize(("size", "written"), [((32, 48), (32, 48)), ((33, 32), (66, 64)), ((32, 31), (64, 62))])
def test_mp4_plays_in_browsers_and_shows_the_frames(
    tmp_path: Path, size: tuple[int, int], written: tuple[int, int]
) -> None:
    frames = clip(*size)
    write_video(tmp_path / "a.mp4", frames, 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.height, stream.width) == (8, *written)
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    scale = written[0] // size[0]
    want = np.kron(frames, np.ones((1, scale, scale, 1), dtype=np.uint8))
    assert read.shape == want.shape
    assert np.abs(read.astype(int) - want).mean() < 8


def test_gif_has_every_frame_and_its_time(tmp_path: Path) -> None:
    frames = draw_motion(make_motion(0, 0), 32, 8)
    write_video(tmp_path / "a.gif", frames, 10)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.size, gif.n_frames, gif.info["loop"], gif.info["duration"]) == ((32, 32), 8, 0, 100)
        for number in range(8):
            gif.seek(number)
            assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - frames[number]).max() < 40


def test_contact_sheet_puts_clips_in_rows_and_frames_in_columns() -> None:
    clips = np.random.RandomState(0).randint(0, 200, (3, 8, 16, 20, 3), dtype=np.uint8)
    sheet = contact_sheet(clips)
    assert sheet.dtype == np.uint8 and sheet.shape == (3 * 18 - SHEET_GAP, 8 * 22 - SHEET_GAP, 3)
    for row in range(3):
        for column in range(8):
            assert (sheet[18 * row : 18 * row + 16, 22 * column : 22 * column + 20] == clips[row, column]).all()
    assert (sheet[16:18] == 255).all() and (sheet[:, 20:22] == 255).all()


@pytest.mark.parametrize(
    ("name", "frames", "fps", "fault"),
    [
        ("a.avi", clip(), 8, "name it .mp4 or .gif"),
        ("a.mp4", clip().astype(np.float32), 8, r"got float32 \[8, 32, 32, 3\]"),
        ("a.gif", clip()[0], 8, r"got uint8 \[32, 32, 3\]"),
        ("a.gif", clip()[:0], 8, r"got uint8 \[0, 32, 32, 3\]"),
        ("a.mp4", clip(), 0, "fps: expected an integer from 1 to 50, got 0"),
        ("a.mp4", clip(), 7.5, "got 7.5"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path: Path, name: str, frames: np.ndarray, fps: int, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        write_video(tmp_path / name, frames, fps)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="clips: expected uint8"):
        contact_sheet(clip())
