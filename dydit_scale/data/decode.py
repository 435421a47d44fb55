"""Bytes of a sample to picture tensor, caption and label: an allow-list of formats, limits before work, no pickle."""

from __future__ import annotations

import io
import json
import re
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float32, UInt8
from PIL import ExifTags, Image
from torch import Tensor

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
CAPTION_EXTENSION, LABEL_EXTENSION, FIELDS_EXTENSION = "txt", "cls", "json"
MAX_PIXELS = 1 << 26
MAX_SIDE = 1 << 16
MAX_IMAGE_BYTES = 1 << 28
MAX_CAPTION_BYTES = 1 << 20
MAX_LABEL_BYTES = 64
MAX_LABEL = (1 << 31) - 1

# The modes that Pillow turns into 8-bit RGB by their meaning.
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})
# Of 16-bit colours Pillow keeps the high byte itself; 16-bit grey it would clip at 255.
_GREY16 = "I;16"

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by its EXIF orientation."""


class BadSampleError(ValueError):
    """A sample that cannot be used; the message is the reason, without the sample's name."""


def decode_image(data: bytes) -> Image.Image:
    """A loaded 8-bit RGB picture, turned upright by its EXIF orientation, from PNG, JPEG or WebP bytes.

    Of an animation it is the first picture, of 16 bits a channel the high 8; transparency is left out.
    Raises BadSampleError when the bytes are broken, of another format or mode, or have more than ``MAX_PIXELS`` pixels
    or a side of more than ``MAX_SIDE``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # Remarks on EXIF blocks and palettes, for every picture anew.
        warnings.simplefilter("ignore", UserWarning)
        try:
            image: Image.Image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
            _check_picture(image)
            image.load()
            image = _upright(image)
            if image.mode == _GREY16:
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image if image.mode == "RGB" else image.convert("RGB")
        except BadSampleError:
            raise
        # Pillow raises a dozen unrelated types on broken bytes (SyntaxError, struct.error, MemoryError, ...).
        except Exception as error:
            what = str(error) if not isinstance(error, Image.UnidentifiedImageError) else "no PNG, JPEG or WebP picture"
            raise BadSampleError(f"broken image ({type(error).__name__}: {what})") from error


def check_size(width: int, height: int) -> None:
    """BadSampleError for a picture of more than ``MAX_PIXELS`` pixels or a side of more than ``MAX_SIDE``."""
    if width * height > MAX_PIXELS:
        raise BadSampleError(f"image of {width} x {height} pixels, more than the limit of {MAX_PIXELS}")
    if max(width, height) > MAX_SIDE:
        raise BadSampleError(f"image of {width} x {height} pixels, more on a side than the limit of {MAX_SIDE}")


def _check_picture(image: Image.Image) -> None:
    check_size(*image.size)
    if image.mode not in _MODES | {_GREY16}:
        raise BadSampleError(f"image of mode {image.mode}, expected 8 bits a channel, or 16")


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; where that cannot be read, as it lies."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    # A broken EXIF block raises as many types as a broken picture, but the pixels are whole.
    except Exception:
        return image
    return image if turn is None else image.transpose(turn)


def image_tensor(image: Image.Image, height: int, width: int) -> Float32[Tensor, "3 height width"]:
    """An RGB picture at ``height`` x ``width``, in [-1, 1]: resized to cover it (bicubic) and cropped at the centre."""
    if image.size != (width, height):
        held_width, held_height = image.size
        # What is kept of the picture: its whole width or its whole height.
        box_width = min(held_width, held_height * width / height)
        box_height = min(held_height, held_width * height / width)
        left, top = (held_width - box_width) / 2, (held_height - box_height) / 2
        # Resizing this box alone bounds the memory for a long strip; its borders still see their neighbours.
        box = (left, top, left + box_width, top + box_height)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    values = torch.from_numpy(np.array(image, dtype=np.float32))
    return scale_values(rearrange(values, "height width channels -> channels height width").contiguous())


def scale_values(values: Tensor) -> Float32[Tensor, "..."]:
    """Colours of 8 bits in [-1, 1]."""
    return values.float() / 127.5 - 1


def pixel_values(pixels: Float32[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """The inverse of ``scale_values``, exactly."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8)


class Fields(NamedTuple):
    """What a ``.json`` says of its sample."""

    captions: tuple[str, ...]
    """Of which each reading takes one; none if it has no caption."""
    label: int | None


def decode_caption(data: bytes) -> str:
    """The caption of a ``.txt``, stripped; BadSampleError if it is no UTF-8 text."""
    try:
        return _checked_caption(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadSampleError(f"broken caption ({type(error).__name__}: {error})") from error


def decode_label(data: bytes) -> int:
    """The class number of a ``.cls``: decimal digits in text; else BadSampleError."""
    text = data.strip()
    if not re.fullmatch(rb"-?\d{1,30}", text):
        raise BadSampleError(f"broken label: the .cls holds {text[:20]!r}, expected an integer in decimal digits")
    return _checked_label(int(text))


def decode_fields(data: bytes) -> Fields:
    """The strings under "captions", or else under "caption", stripped, and the integer under "label" of a ``.json``.

    Under either key there may be one string or a list of them; null and an empty list are as nothing. Raises
    BadSampleError if the JSON is broken or one of them has another type.
    """
    try:
        fields = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"broken caption ({type(error).__name__}: {error})") from error
    if not isinstance(fields, dict):
        return Fields((), None)
    captions, label = _captions(fields, "captions") or _captions(fields, "caption"), fields.get("label")
    if label is not None and (not isinstance(label, int) or isinstance(label, bool)):
        raise BadSampleError('broken label: the .json holds no integer under "label"')
    return Fields(captions, None if label is None else _checked_label(label))


def _captions(fields: dict[str, Any], key: str) -> tuple[str, ...]:
    found = fields.get(key)
    texts = [] if found is None else [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadSampleError(f'broken caption: the .json holds no string under "{key}", nor a list of them')
    try:
        # JSON may spell half a surrogate pair, which no later file or tokenizer can take.
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSampleError(f"broken caption ({type(error).__name__}: {error})") from error
    return tuple(_checked_caption(text) for text in texts)


def _checked_caption(text: str) -> str:
    if "\0" in text:
        raise BadSampleError("broken caption (zero bytes)")
    return text.strip()


def _checked_label(label: int) -> int:
    if not 0 <= label <= MAX_LABEL:
        raise BadSampleError(f"label {label}, expected a class number from 0 to {MAX_LABEL}")
    return label
