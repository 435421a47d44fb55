"""Pictures as data URIs: small ones exactly, pixel for pixel; large ones as small JPEGs."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_EXACT = 96
_LARGEST = 208
_RAMP = np.array([(0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (254, 232, 56)], float)
"""Blue to yellow, even in lightness, safe for colour-blind readers (after cividis, Nunez et al., arXiv 1712.01662)."""


def is_small(height: int, width: int) -> bool:
    """Whether pictures of that size are kept exactly and shown as crisp pixels."""
    return max(height, width) <= _EXACT


def picture_uri(picture: NDArray[np.uint8]) -> str:
    """A data URI of a uint8 [H, W, 3] picture: PNG up to 96 pixels, else a JPEG of at most 208."""
    image = Image.fromarray(picture)
    if is_small(*picture.shape[:2]):
        return _uri(image, "png")
    image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    return _uri(image, "jpeg")


def heat_uri(shares: NDArray[np.float64]) -> str:
    """A data URI of shares [h, w] in 0..1, one pixel a token; tokens that are NaN are transparent."""
    clipped = np.clip(np.nan_to_num(shares), 0, 1)
    colours = [np.interp(clipped, np.linspace(0, 1, len(_RAMP)), _RAMP[:, channel]) for channel in range(3)]
    alpha = np.where(np.isfinite(shares), 255.0, 0.0)
    return _uri(Image.fromarray(np.rint(np.stack([*colours, alpha], axis=-1)).astype(np.uint8)), "png")


def ramp_gradient() -> str:
    """The colours of `heat_uri` from 0 to 1 as a CSS gradient."""
    return f"linear-gradient(90deg,{','.join('#' + ''.join(f'{int(part):02x}' for part in stop) for stop in _RAMP)})"


def _uri(image: Image.Image, kind: str) -> str:
    written = io.BytesIO()
    image.save(written, kind, **({"quality": 82} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}"
