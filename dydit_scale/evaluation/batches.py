"""Sets of pictures or clips on disk: the ``.npz`` of ADM's evaluation suite, or a folder of files.

Nothing is unpickled, and no more than a batch of a set is in memory at a time.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from einops import rearrange
from PIL import Image
from tqdm import tqdm

from dydit_scale.data.decode import BadSampleError, decode_image
from dydit_scale.data.video import VIDEO_EXTENSIONS, decode_clip, scan_clip

PICTURE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
"""Means and covariances that ADM's reference files hold: of the pooled and of the spatial features."""
GENEVAL_LINE, GENEVAL_PICTURES = "metadata.jsonl", "samples"
"""GenEval has a folder for each prompt, which holds its line and a folder of its pictures (and a grid of them)."""

Batches = Iterator[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Pictures or clips that are all of one size."""

    path: Path
    count: int
    """0 for a file of statistics alone."""
    shape: tuple[int, ...]
    """Of each: [height, width, 3], or [frames, height, width, 3]; () without any."""
    batches: Callable[[int], Batches]
    """uint8 [batch, *shape], so many at a time, in the order of the file or of the names."""
    files: tuple[Path, ...] = ()
    """Each one's, if it has a file of its own."""
    statistics: dict[str, np.ndarray] = field(default_factory=dict)
    """Those of ``STATISTICS`` that the file holds."""

    @property
    def clips(self) -> bool:
        return len(self.shape) == 4

    @property
    def size(self) -> str:
        """For messages, e.g. "256 x 256"."""
        return " x ".join(map(str, self.shape[:-1]))


def open_set(path: Path, *, progress: bool = True) -> SampleSet:
    """What is in ``path``, read no further than the headers.

    A ``.npz`` holds ``arr_0``, uint8 [n, height, width, 3] or [n, frames, height, width, 3], or ADM's statistics, or
    both. A folder, and the folders in it, hold PNG, JPEG and WebP pictures, or MP4, WebM and Matroska clips (the extra
    ``video``), not both; they count in the order of their names. Of a folder as GenEval writes it, only the pictures
    in ``*/samples`` count.
    Raises ValueError with the fault if it is neither of the two, holds nothing, or its members are not of one size.
    """
    if path.is_dir():
        return _open_folder(path, progress)
    if path.suffix == ".npz" and path.is_file():
        return _open_npz(path)
    raise ValueError(f"{path}: expected a folder of pictures or clips, or a .npz file; {_what(path)}")


def _what(path: Path) -> str:
    return "there is nothing of that name" if not path.exists() else "it is another kind of file"


def _open_npz(path: Path) -> SampleSet:
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            shape = _pixel_shape(path, archive) if "arr_0.npy" in names else (0,)
        statistics = _read_statistics(path, names)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as .npz ({error}); is it complete?") from error
    for mean, cov in (("mu", "sigma"), ("mu_s", "sigma_s")):
        _check_statistics(path, statistics, mean, cov)
    if not shape[0] and not statistics:
        held = ", ".join(sorted(name.removesuffix(".npy") for name in names)) or "nothing"
        raise ValueError(f"{path}: expected arr_0, the pixels, or the statistics mu and sigma; it holds {held}")
    reader = partial(_npz_batches, path, shape)
    return SampleSet(path=path, count=shape[0], shape=shape[1:], batches=reader, statistics=statistics)


def _read_statistics(path: Path, names: set[str]) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        try:
            return {name: arrays[name] for name in STATISTICS if f"{name}.npy" in names}
        except ValueError as error:
            raise ValueError(f"{path}: its statistics are no arrays of numbers ({error})") from error


def _check_statistics(path: Path, statistics: dict[str, np.ndarray], mean: str, cov: str) -> None:
    if (mean in statistics) != (cov in statistics):
        raise ValueError(f"{path}: expected both {mean} and {cov}, found one")
    if mean in statistics:
        width = statistics[mean].size
        if statistics[mean].ndim != 1 or statistics[cov].shape != (width, width):
            found = f"{list(statistics[mean].shape)} and {list(statistics[cov].shape)}"
            raise ValueError(f"{path}: expected {mean} [dim] and {cov} [dim, dim], got {found}")


def _pixel_shape(path: Path, archive: zipfile.ZipFile) -> tuple[int, ...]:
    with archive.open("arr_0.npy") as member:
        shape, in_rows, dtype = _header(path, member)
    if dtype != np.uint8 or len(shape) not in (4, 5) or shape[-1] != 3 or not in_rows:
        raise ValueError(
            f"{path}: expected arr_0 of uint8 [n, height, width, 3], or [n, frames, height, width, 3] for clips, "
            f"got {dtype} {list(shape)}" + ("" if in_rows else " in Fortran's order")
        )
    if 0 in shape:
        raise ValueError(f"{path}: arr_0 is empty, {list(shape)}")
    return shape


def _header(path: Path, member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether rows come first, and type of an open .npy file, which is left at its first value."""
    version = np.lib.format.read_magic(member)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, fortran, dtype = readers[version](member)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: arr_0 has no readable header ({error})") from error
    return shape, not fortran, dtype


def _npz_batches(path: Path, shape: tuple[int, ...], batch: int) -> Batches:
    one = int(np.prod(shape[1:]))
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        _header(path, member)
        for start in range(0, shape[0], batch):
            n = min(batch, shape[0] - start)
            data = member.read(n * one)
            if len(data) < n * one:
                raise ValueError(f"{path}: arr_0 ends after {start + len(data) // one} of {shape[0]}; is it complete?")
            yield np.frombuffer(data, np.uint8).reshape(n, *shape[1:])


def _open_folder(path: Path, progress: bool) -> SampleSet:
    places = _geneval_folders(path) or [path]
    files = sorted(p for place in places for p in place.rglob("*") if p.is_file() and not p.name.startswith("."))
    pictures = [p for p in files if p.suffix.lower()[1:] in PICTURE_EXTENSIONS]
    clips = [p for p in files if p.suffix.lower()[1:] in VIDEO_EXTENSIONS]
    if pictures and clips:
        raise ValueError(f"{path}: holds {len(pictures)} pictures and {len(clips)} clips; expected one kind")
    chosen = pictures or clips
    if not chosen:
        kinds = ", ".join((*PICTURE_EXTENSIONS, *VIDEO_EXTENSIONS))
        raise ValueError(f"{path}: holds no pictures and no clips ({kinds}), {len(files)} other files")
    measure = _picture_shape if pictures else _clip_shape
    shape: tuple[int, ...] = ()
    for file in tqdm(chosen, desc=f"checking {path.name}", unit="file", disable=not progress, leave=False):
        found = measure(file)
        shape = shape or found
        if found != shape:
            raise ValueError(f"{file}: is {list(found)}, {chosen[0].name} is {list(shape)}; expected one size in a set")
    read = _read_picture if pictures else _read_clip

    def batches(batch: int) -> Batches:
        for start in range(0, len(chosen), batch):
            yield np.stack([read(file, shape) for file in chosen[start : start + batch]])

    return SampleSet(path=path, count=len(chosen), shape=shape, batches=batches, files=tuple(chosen))


def _geneval_folders(path: Path) -> list[Path]:
    """The folders of pictures, if ``path`` is one that GenEval wrote."""
    told = {line.parent for line in path.glob(f"*/{GENEVAL_LINE}")}
    folders = sorted(path.glob(f"*/{GENEVAL_PICTURES}"))
    untold = [folder.parent.name for folder in folders if folder.parent not in told]
    if told and untold:
        raise ValueError(f"{path}: no {GENEVAL_LINE} in {', '.join(untold[:5])}, as there is in the other folders")
    return folders if told else []


def _picture_shape(file: Path) -> tuple[int, ...]:
    try:
        with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
            return image.height, image.width, 3
    # Pillow raises many types on broken files.
    except Exception as error:
        raise ValueError(f"{file}: cannot be read as a picture ({error})") from error


def _clip_shape(file: Path) -> tuple[int, ...]:
    try:
        info = scan_clip(file.read_bytes())
    except BadSampleError as error:
        raise ValueError(f"{file}: {error}") from error
    return info.frames, info.height, info.width, 3


def _read_picture(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        pixels = np.asarray(decode_image(file.read_bytes()))
    except BadSampleError as error:
        raise ValueError(f"{file}: {error}") from error
    if pixels.shape != shape:  # turned upright by EXIF, or exchanged meanwhile
        raise ValueError(f"{file}: is {list(pixels.shape)} when read, expected {list(shape)}")
    return pixels


def _read_clip(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    frames, height, width, _ = shape
    clip = decode_clip(file.read_bytes(), range(frames), height, width)
    return rearrange(((clip + 1) * 127.5).round().byte(), "f c h w -> f h w c").numpy()
