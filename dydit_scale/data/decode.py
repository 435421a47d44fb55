"""Bytes of a sample to a picture tensor and a caption: an allow-list of formats, limits before work, no pickle."""

from __future__ import annotations

import io
import json
import warnings

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float32
from PIL import Image, ImageOps
from torch import Tensor

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
CAPTION_EXTENSIONS = ("txt", "json")
MAX_PIXELS = 1 << 26
MAX_IMAGE_BYTES = 1 << 28
MAX_CAPTION_BYTES = 1 << 20

# The modes that Pillow turns into 8-bit RGB by their meaning; it clips 16-bit and float pictures at 255 instead.
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})


class BadSampleError(ValueError):
    """A sample that cannot be used; the message is the reason, without the sample's name."""


def decode_image(data: bytes) -> Image.Image:
    """A loaded 8-bit RGB picture, turned upright by its EXIF orientation, from PNG, JPEG or WebP bytes.

    Raises BadSampleError when the bytes are broken, of another format or mode, or have more than ``MAX_PIXELS`` pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
            _check_picture(image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image.convert("RGB")
        except BadSampleError:
            raise
        # Pillow raises a dozen unrelated types on broken bytes (SyntaxError, struct.error, MemoryError, ...).
        except Exception as error:
            what = str(error) if not isinstance(error, Image.UnidentifiedImageError) else "no PNG, JPEG or WebP picture"
            raise BadSampleError(f"broken image ({type(error).__name__}: {what})") from error


def _check_picture(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadSampleError(f"image of {width} x {height} pixels, more than the limit of {MAX_PIXELS}")
    if image.mode not in _MODES:
        raise BadSampleError(f"image of mode {image.mode}, expected 8 bits a channel")


def image_tensor(image: Image.Image, image_size: int) -> Float32[Tensor, "3 image_size image_size"]:
    """The centre square of an RGB picture at ``image_size``, in [-1, 1].

    The shorter side is resized to ``image_size`` (bicubic) and the longer one cropped at both ends.
    """
    if image.size != (image_size, image_size):
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        # Resizing the centre square alone bounds the memory for a long strip; its borders still see their neighbours.
        box = (left, top, left + side, top + side)
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return rearrange(pixels, "height width channels -> channels height width").contiguous() / 127.5 - 1


def decode_caption(data: bytes, *, is_json: bool) -> str:
    """The caption, stripped: all of a ``.txt``, or the string under "caption" in a ``.json``; else BadSampleError."""
    try:
        text = data.decode("utf-8")
        fields = json.loads(text) if is_json else {"caption": text}
        caption = fields.get("caption") if isinstance(fields, dict) else None
        if isinstance(caption, str):
            # JSON may spell half a surrogate pair, which no later file or tokenizer can take.
            caption.encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"broken caption ({type(error).__name__}: {error})") from error
    if not isinstance(caption, str):
        raise BadSampleError('caption missing: the .json holds no string under "caption"')
    return caption.strip()
