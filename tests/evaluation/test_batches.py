"""Sets of pictures and clips on disk are read in order, in batches, and refused with the fault in words."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dydit_scale.data.video import encode_mp4
from dydit_scale.evaluation.batches import open_set


def pixels(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


def everything(path: Path, batch: int) -> list[np.ndarray]:
    return list(open_set(path, progress=False).batches(batch))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(7, 4, 6, 3), (5, 8, 4, 4, 3)])
def test_an_npz_is_read_in_batches(tmp_path: Path, save: object, shape: tuple[int, ...]) -> None:
    wanted = pixels(*shape)
    save(tmp_path / "a.npz", wanted, np.arange(len(wanted)))  # arr_1, the classes, is not needed
    found = open_set(tmp_path / "a.npz")
    assert (found.count, found.shape, found.clips) == (shape[0], shape[1:], len(shape) == 5)
    parts = list(found.batches(3))
    assert [len(part) for part in parts] == [3] * (shape[0] // 3) + [shape[0] % 3]
    np.testing.assert_array_equal(np.concatenate(parts), wanted)


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    wanted = pixels(4, 5, 6, 3)
    (tmp_path / "deep").mkdir()
    for name, picture in zip(("a.png", "b.webp", "c.PNG", "deep/a.png"), wanted, strict=True):
        Image.fromarray(picture).save(tmp_path / name, lossless=True)
    (tmp_path / "prompts.txt").write_text("of no interest")
    (tmp_path / ".hidden.png").write_bytes(b"of no interest")
    found = open_set(tmp_path, progress=False)
    assert (found.count, found.shape, found.clips, found.size) == (4, (5, 6, 3), False, "5 x 6")
    np.testing.assert_array_equal(np.concatenate(list(found.batches(3))), wanted)


def test_a_folder_of_clips_is_read_frame_by_frame(tmp_path: Path) -> None:
    pytest.importorskip("av")
    wanted = pixels(2, 10, 16, 16, 3)
    for number, clip in enumerate(wanted):
        (tmp_path / f"{number}.mp4").write_bytes(encode_mp4(clip, 8, lossless=True))
    found = open_set(tmp_path, progress=False)
    assert (found.count, found.shape, found.clips) == (2, (10, 16, 16, 3), True)
    (parts,) = found.batches(8)
    np.testing.assert_array_equal(parts, wanted)


def test_statistics_of_a_reference_are_read_with_and_without_its_pixels(tmp_path: Path) -> None:
    statistics = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.ones(2), "sigma_s": np.eye(2)}
    np.savez(tmp_path / "a.npz", pixels(2, 4, 4, 3), **statistics)
    np.savez(tmp_path / "b.npz", **statistics)
    whole, alone = (open_set(tmp_path / name) for name in ("a.npz", "b.npz"))
    assert (whole.count, alone.count, alone.shape) == (2, 0, ())
    for found in (whole, alone):
        assert found.statistics.keys() == statistics.keys()
        assert all((found.statistics[name] == value).all() for name, value in statistics.items())


def faulty(folder: Path, kind: str) -> Path:
    """A set with a fault."""
    path = folder / "set.npz"
    arrays = {
        "float": [np.zeros((2, 4, 4, 3))],
        "channels first": [pixels(2, 3, 4, 4)],
        "one picture": [pixels(4, 4, 3)],
        "empty": [pixels(0, 4, 4, 3)],
        "fortran": [np.asfortranarray(pixels(2, 4, 4, 3))],
    }
    named = {
        "other names": {"images": pixels(2, 4, 4, 3)},
        "half": {"mu": np.zeros(3)},
        "skew": {"mu": np.zeros(3), "sigma": np.eye(4)},
        "pickle": {"mu": np.array([{}], dtype=object), "sigma": np.eye(1)},
    }
    if kind in arrays:
        np.savez(path, *arrays[kind])
    elif kind in named:
        np.savez(path, **named[kind])
    elif kind == "short":
        whole = io.BytesIO()
        np.save(whole, pixels(4, 4, 4, 3))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", whole.getvalue()[:-50])
    elif kind == "broken":
        path.write_bytes(b"nothing")
    elif kind == "other file":
        path = folder / "set.txt"
        path.write_text("nothing")
    elif kind == "nothing":
        path = folder / "none"
    else:
        path = folder / "set"
        path.mkdir()
        Image.fromarray(pixels(4, 4, 3)).save(path / "a.png")
        if kind == "sizes":
            Image.fromarray(pixels(4, 5, 3)).save(path / "b.png")
        elif kind == "broken picture":
            (path / "b.png").write_bytes(b"nothing")
        elif kind == "two kinds":
            (path / "b.mp4").write_bytes(b"nothing")
        elif kind == "no pictures":
            (path / "a.png").rename(path / "a.txt")
    return path


FAULTS = {
    "float": "expected arr_0 of uint8 [n, height, width, 3], or [n, frames, height, width, 3] for clips, got float64",
    "channels first": "got uint8 [2, 3, 4, 4]",
    "one picture": "got uint8 [4, 4, 3]",
    "empty": "arr_0 is empty, [0, 4, 4, 3]",
    "fortran": "in Fortran's order",
    "other names": "expected arr_0, the pixels, or the statistics mu and sigma; it holds images",
    "half": "expected both mu and sigma, found one",
    "skew": "expected mu [dim] and sigma [dim, dim], got [3] and [4, 4]",
    "pickle": "its statistics are no arrays of numbers (Object arrays cannot be loaded",
    "short": "arr_0 ends after 2 of 4; is it complete?",
    "broken": "cannot be read as .npz (File is not a zip file)",
    "other file": "expected a folder of pictures or clips, or a .npz file; it is another kind of file",
    "nothing": "there is nothing of that name",
    "sizes": "b.png: is [4, 5, 3], a.png is [4, 4, 3]; expected one size in a set",
    "broken picture": "b.png: cannot be read as a picture",
    "two kinds": "holds 1 pictures and 1 clips; expected one kind",
    "no pictures": "holds no pictures and no clips",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_told(tmp_path: Path, kind: str) -> None:
    path = faulty(tmp_path, kind)
    with pytest.raises(ValueError, match=re.escape(FAULTS[kind])) as told:
        everything(path, 8)
    assert str(path) in str(told.value)
