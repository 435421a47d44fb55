"""Inputs: a picture or clip, where its bytes and captions are, and why it may not be packed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data_tools.packing.config import PackConfig
from dydit_scale.data.decode import MAX_CAPTION_BYTES, MAX_IMAGE_BYTES, MAX_LABEL, BadSampleError, decode_caption
from dydit_scale.data.video import MAX_VIDEO_BYTES

PICTURE_EXTENSIONS = ("png", "jpg", "jpeg", "jfif", "webp", "gif", "bmp", "tif", "tiff", "avif")
CLIP_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "m4v", "avi")
MEDIA_EXTENSIONS = PICTURE_EXTENSIONS + CLIP_EXTENSIONS
TEXT_EXTENSIONS = ("txt", "caption", "json")
MAX_BYTES = max(MAX_IMAGE_BYTES, MAX_VIDEO_BYTES)

UNREADABLE = "unreadable"
"""The reason that may pass: a shard with such an input is written again by the next run."""


class UnfitError(ValueError):
    """An input that cannot be packed: the kind of reason, by which it is counted, and what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Dropped(NamedTuple):
    """A line of the report: an input that is not packed, or a caption of it that is left out."""

    input: str
    reason: str
    detail: str


class File(NamedTuple):
    """A regular file as it was when it was listed."""

    path: str
    size: int
    mtime_ns: int


class Cell(NamedTuple):
    """Where in a table the bytes of an input are."""

    group: int
    """Row group of a parquet file; 0 in an Arrow file."""
    row: int
    """In the group."""
    column: str


class Texts(NamedTuple):
    """What is said of an input."""

    captions: tuple[str, ...]
    label: int | None
    left_out: tuple[str, ...] = ()
    """Why other captions are left out."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """A picture or clip and what is said of it."""

    name: str
    """Path in the source, with slashes; ``TABLE#ROW`` of a picture inside a table."""
    file: File
    """Holds the bytes: the picture or clip itself, or the table."""
    cell: Cell | None = None
    """Where in the table."""
    size: int
    """Bytes of the picture or clip."""
    texts: tuple[File, ...] = ()
    """Files beside it with captions or a label."""
    captions: tuple[str, ...] = ()
    """From a table."""
    label: int | str | None = None
    """From a table or a folder's name; a number once all are known."""
    sha256: str = field(default="", compare=False)
    """Of the bytes, in hex, where it is known."""

    @property
    def stamp(self) -> str:
        """Changes with the input, as far as can be told without reading it; equal for the same files elsewhere."""
        texts = [text[1:] for text in self.texts]
        known = [self.name, self.file[1:], self.cell, self.size, texts, self.captions, self.label]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:24]


def extension_of(name: str) -> str:
    """``"a/B.Tar.PNG"`` -> ``"png"``."""
    return PurePosixPath(name).suffix[1:].lower()


def find_file(path: Path, root: Path) -> File:
    """The file at ``path`` as it is now; UnfitError where it is none, or leads out of ``root`` (a resolved path)."""
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(root):
            raise UnfitError("outside the source", f"leads to {real}, which is not below {root}")
        state = real.stat()
    except (OSError, RuntimeError) as error:
        raise UnfitError(UNREADABLE, _reason(error)) from error
    if stat.S_ISDIR(state.st_mode) and path.is_symlink():
        raise UnfitError("link to a folder", "links to folders are not followed")
    if not stat.S_ISREG(state.st_mode):
        raise UnfitError("no regular file", "a folder, pipe, socket or device")
    return File(str(real), state.st_size, state.st_mtime_ns)


def read_file(file: File, limit: int) -> bytes:
    """All bytes of a file; UnfitError if there are more than ``limit``, it cannot be read or is no longer the same."""
    if file.size > limit:
        raise UnfitError("over a limit", f"{file.size} bytes, more than {limit}")
    try:
        with open(file.path, "rb") as opened:
            state = os.fstat(opened.fileno())
            if (state.st_size, state.st_mtime_ns) != (file.size, file.mtime_ns):
                raise UnfitError(UNREADABLE, f"{file.path} changed since it was listed")
            data = opened.read(file.size + 1)
    except OSError as error:
        raise UnfitError(UNREADABLE, _reason(error)) from error
    if len(data) != file.size:
        raise UnfitError(UNREADABLE, f"{file.path} gave {len(data)} bytes, expected {file.size}")
    return data


def read_texts(item: Input, config: PackConfig) -> Texts:
    """Captions within the limits, without repeats, and the label; UnfitError when neither is there or one is broken."""
    assert not isinstance(item.label, str), f"{item.name}: its label has no number yet"
    captions, label = list(item.captions), item.label
    if config.caption_from == "name":
        captions = [" ".join(re.split(r"[\s_-]+", PurePosixPath(item.name).stem))]
    for file in item.texts:
        said = _parse(file)
        if config.caption_from == "files":
            captions += said.captions
        label = said.label if label is None else label
    captions = [text for text in dict.fromkeys(map(str.strip, captions)) if text]
    kept = tuple(text for text in captions if not _misfit(text, config))
    left_out = tuple(_misfit(text, config) for text in captions if text not in kept)
    if not kept and left_out:
        raise UnfitError("caption length", "; ".join(left_out))
    if not kept and label is None:
        raise UnfitError("no caption", "neither a caption nor a label")
    return Texts(kept, label, left_out)


def check_label(label: object) -> int:
    """A class number; UnfitError if it is none."""
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label <= MAX_LABEL:
        raise UnfitError("bad label", f"{label!r}, expected a class number from 0 to {MAX_LABEL}")
    return label


def check_captions(value: object) -> tuple[str, ...]:
    """One caption or a list of them; None has none. UnfitError if it is something else."""
    captions = [] if value is None else value if isinstance(value, list) else [value]
    for caption in captions:
        if not isinstance(caption, str):
            raise UnfitError("bad caption", f"{str(caption)[:40]!r} ({type(caption).__name__}), expected a text")
        try:
            data = caption.encode("utf-8")
            decode_caption(data)
        except (UnicodeEncodeError, BadSampleError) as error:
            raise UnfitError("bad caption", str(error)) from error
        if len(data) > MAX_CAPTION_BYTES:
            raise UnfitError("over a limit", f"caption of {len(data)} bytes, more than {MAX_CAPTION_BYTES}")
    return tuple(captions)


def _parse(file: File) -> Texts:
    """What a .txt, .caption or .json says."""
    data = read_file(file, MAX_CAPTION_BYTES)
    try:
        text = data.decode("utf-8-sig")
        fields = json.loads(text) if extension_of(file.path) == "json" else {"caption": text}
    except (ValueError, RecursionError) as error:
        raise UnfitError("bad caption", f"{Path(file.path).name}: {error}") from error
    if not isinstance(fields, dict):
        raise UnfitError("bad caption", f"{Path(file.path).name}: expected an object, got {type(fields).__name__}")
    captions = (*check_captions(fields.get("caption")), *check_captions(fields.get("captions")))
    label = fields.get("label")
    return Texts(captions, None if label is None else check_label(label))


def _misfit(caption: str, config: PackConfig) -> str:
    """Why a caption is left out; "" if it is not."""
    if len(caption) < config.min_caption:
        return f"caption of {len(caption)} characters, fewer than {config.min_caption}"
    if config.max_caption is not None and len(caption) > config.max_caption:
        return f"caption of {len(caption)} characters, more than {config.max_caption}"
    return ""


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
