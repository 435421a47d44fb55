"""Clips for people to look at: an MP4 that any browser plays, a GIF, and a sheet of many clips as one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dydit_scale.data.video import encode_mp4

SHEET_GAP = 2
"""Pixels between the pictures of a contact sheet."""
SHEET_GROUND = 255


def write_video(path: Path | str, frames: np.ndarray, fps: int) -> None:
    """Write ``frames`` (uint8 [frames, height, width, 3]) to ``path``, whose ending chooses the format.

    ``.mp4`` is H.264 in yuv420p (by PyAV, the extra ``video``), which halves the resolution of colour and needs even
    sides: a clip with an odd one is written twice as large, each pixel four times. ``.gif`` loops, has 256 colours a
    frame and counts time in hundredths of a second.
    Raises ValueError for other endings, arrays and frame rates, and without PyAV for ``.mp4``; nothing is written then.
    """
    path = Path(path)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(
            f"frames: expected uint8 [frames, height, width, 3], got {frames.dtype} {list(frames.shape)}; "
            "scale pixels from [-1, 1] to [0, 255] first"
        )
    if isinstance(fps, bool) or not isinstance(fps, int) or not 1 <= fps <= 50:
        raise ValueError(f"fps: expected an integer from 1 to 50, got {fps!r}")
    if path.suffix == ".mp4":
        path.write_bytes(encode_mp4(_even_sided(frames), fps))
    elif path.suffix == ".gif":
        first, *rest = [Image.fromarray(frame) for frame in frames]
        first.save(path, save_all=True, append_images=rest, duration=round(100 / fps) * 10, loop=0)
    else:
        raise ValueError(f"{path}: cannot write a video of this kind; name it .mp4 or .gif")


def contact_sheet(clips: np.ndarray) -> np.ndarray:
    """One picture of many clips: a row for each, a column for each frame, white between them.

    ``clips`` is uint8 [clips, frames, height, width, 3]; ValueError for anything else.
    """
    if clips.dtype != np.uint8 or clips.ndim != 5 or clips.shape[-1] != 3 or not clips.size:
        raise ValueError(
            f"clips: expected uint8 [clips, frames, height, width, 3], got {clips.dtype} {list(clips.shape)}"
        )
    count, frames, height, width, _ = clips.shape
    step_down, step_right = height + SHEET_GAP, width + SHEET_GAP
    shape = (count * step_down - SHEET_GAP, frames * step_right - SHEET_GAP, 3)
    sheet = np.full(shape, SHEET_GROUND, dtype=np.uint8)
    for row, clip in enumerate(clips):
        for column, frame in enumerate(clip):
            top, left = row * step_down, column * step_right
            sheet[top : top + height, left : left + width] = frame
    return sheet


def _even_sided(frames: np.ndarray) -> np.ndarray:
    odd = frames.shape[1] % 2 or frames.shape[2] % 2
    return frames.repeat(2, axis=1).repeat(2, axis=2) if odd else frames
