"""Reads the objects off a picture of coloured shapes on the dark ground, without knowing its caption.

Made for what a small diffusion model paints: edges are soft, colours a little off, the ground a little noisy.
Every pixel is taken for a mix of the ground and one palette colour; connected pixels of a colour are an object; the
object's covered area and centre give, for each shape, the one template that could be it, and the best overlap wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from dydit_scale.data.shapes.language import BACKGROUND, COLOURS, SHAPES
from dydit_scale.data.shapes.scene import shape_mask

MIN_OVERLAP = 0.75
"""Soft intersection over union with the best template below which an object has no shape.

A blurred ring of 9 pixels still has 0.79 with its own template; an L, half a circle, two circles that touch or a
triangle upside down stay below 0.71 with every one.
"""
DIAMETERS = (0.22, 0.62)
"""What a shape can measure, as shares of the side; all sizes of the language with room for error."""
COLOUR_TOLERANCE = 75.0
"""Largest distance in RGB of an object's colour from the nearest of the palette; grey, brown and pink are further off.

JPEG moves the yellow of a thin ring by 66.
"""
_SPECK = 6 / 32**2  # share of the picture's pixels below which something is dirt, not an object
_EDGE = 0.5  # covered share of a pixel from which it is the object's
_FAINT = 0.3  # covered share from which something is there, if it is no object's soft edge
_OVERSAMPLE = 4  # points a pixel and axis when a template is drawn


@dataclass(frozen=True)
class Found:
    """One object of a picture; centre and diameter as shares of the picture's side, y down."""

    shape: str | None
    """None: something is there, but it has the form of no shape of the language."""
    colour: str | None
    """None: the colour is too far from every one of the palette."""
    x: float
    y: float
    diameter: float
    confidence: float
    """Soft intersection over union with the best template, 0 to 1."""

    def __str__(self) -> str:
        return f"{self.colour or 'oddly coloured'} {self.shape or 'blob'}"


def read_scene(picture: np.ndarray) -> list[Found]:
    """The objects of ``picture`` (uint8 [side, side, 3]), largest area first.

    Something with no readable shape or colour is listed too: it is an object that should not be there. Things of less
    than 6 pixels (at 32 x 32; in proportion elsewhere) and lines one pixel thin, such as the mixed colours where two
    objects touch, are not. Raises ValueError for any other dtype or shape.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape != (len(picture), len(picture), 3):
        raise ValueError(f"picture: expected uint8 [side, side, 3], got {picture.dtype} {list(picture.shape)}")
    offset = picture.astype(np.float64) - np.array(BACKGROUND)  # [side, side, 3]
    components = _components(_colours_by_area(offset))
    areas = [area for area in _areas(components) if _is_thick(area)]
    areas.sort(key=np.count_nonzero, reverse=True)
    taken = np.any(areas, axis=0)
    return [_read_object(offset, area, taken) for area in areas]


def _colours_by_area(offset: np.ndarray) -> np.ndarray:
    """Palette index for each pixel that is an object's, else -1; [side, side].

    A connected area is all of one colour unless several are plainly there. Pixel by pixel one could not tell: at a soft
    edge, and after JPEG, which halves the resolution of colour, orange lies on the line to red as well as to yellow.
    """
    colours = np.array(list(COLOURS.values()), dtype=np.float64) - np.array(BACKGROUND)  # [colours, 3]
    cover, misfit = _mixes(offset, colours)
    covered = _covered(np.take_along_axis(cover, misfit.argmin(-1)[..., None], -1)[..., 0])
    distance = np.linalg.norm(offset[..., None, :] - colours, axis=-1)  # [side, side, colours]
    pure = np.where(distance.min(-1) <= COLOUR_TOLERANCE, distance.argmin(-1), -1)
    around, labels = _windows(misfit).sum(0), np.full(covered.shape, -1)
    for area in _areas(_components(np.where(covered, 0, -1))):
        counts = np.bincount(pure[area] + 1, minlength=len(colours) + 1)[1:]
        present = np.flatnonzero(counts >= _SPECK * area.size)
        present = present if len(present) else np.arange(len(colours))
        labels[area] = present[around[area][:, present].argmin(-1)]
    return labels


def _covered(share: np.ndarray) -> np.ndarray:
    """The pixels covered by at least half, and faint things that hold none of these; [side, side]."""
    covered = share >= _EDGE
    faint = [area for area in _areas(_components(np.where(share >= _FAINT, 0, -1))) if not covered[area].any()]
    return np.any([covered, *faint], axis=0)


def _areas(components: np.ndarray) -> list[np.ndarray]:
    """A mask [side, side] for each component that is more than a speck."""
    sizes = np.bincount(components.ravel() + 1)[1:]
    return [components == c for c in np.flatnonzero(sizes >= _SPECK * components.size)]


def _mixes(offset: np.ndarray, colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pixel as a mix of the ground and each colour: that colour's share and the squared error.

    ``offset`` is [side, side, 3], ``colours`` [colours, 3], both results [side, side, colours].
    """
    cover = np.clip(offset @ (colours / (colours**2).sum(1, keepdims=True)).T, 0, 1)
    return cover, ((offset[..., None, :] - cover[..., None] * colours) ** 2).sum(-1)


def _windows(field: np.ndarray) -> np.ndarray:
    """The nine neighbours of every pixel, itself included and zero outside: [9, side, side, ...]."""
    side = len(field)
    padded = np.pad(field, [(1, 1), (1, 1)] + [(0, 0)] * (field.ndim - 2))
    return np.stack([padded[i : i + side, j : j + side] for i in range(3) for j in range(3)])


def _components(labels: np.ndarray) -> np.ndarray:
    """Numbers 0, 1, ... for the 4-connected areas of equal label, -1 where the label is -1; both [side, side].

    Every pixel takes the lowest index among its like neighbours', then jumps to that pixel's own, until all agree.
    """
    index = np.arange(labels.size).reshape(labels.shape)
    across = (labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] >= 0)
    down = (labels[1:] == labels[:-1]) & (labels[1:] >= 0)
    one = np.concatenate([index[:, 1:][across], index[1:][down]])  # [joints]
    other = np.concatenate([index[:, :-1][across], index[:-1][down]])
    lowest, before = index.ravel().copy(), None
    while before is None or (lowest != before).any():
        before = lowest.copy()
        low = np.minimum(lowest[one], lowest[other])
        np.minimum.at(lowest, one, low)
        np.minimum.at(lowest, other, low)
        lowest = lowest[lowest]
    lowest = lowest.reshape(labels.shape)
    return np.where(labels >= 0, np.searchsorted(np.unique(lowest[labels >= 0]), lowest), -1)


def _is_thick(area: np.ndarray) -> bool:
    """Not a line of one pixel's width: two by two pixels lie in it somewhere."""
    return bool((area[1:, 1:] & area[:-1, 1:] & area[1:, :-1] & area[:-1, :-1]).any())


def _read_object(offset: np.ndarray, area: np.ndarray, taken: np.ndarray) -> Found:
    """What the object on the pixels ``area`` is; ``taken`` are the pixels of all objects."""
    side = len(area)
    ray = _body_colour(offset[area])
    # The soft edge belongs to the object, the pixels of another object do not.
    near = _windows(area).any(0) & (area | ~taken)
    cover = np.where(near, np.clip(offset @ (ray / (ray**2).sum()), 0, 1), 0.0)
    fits = {shape: template for shape in SHAPES if _is_plausible(template := _template(shape, cover), side)}
    overlaps = {shape: _overlap(template, cover) for shape, template in fits.items()}
    best = max(overlaps, key=lambda shape: overlaps[shape], default=None)
    at = fits[best] if best else _template("circle", cover)
    overlap = overlaps[best] if best else 0.0
    shape = best if overlap >= MIN_OVERLAP else None
    return Found(shape, _name_colour(ray), at.x / side, at.y / side, at.diameter / side, overlap)


def _body_colour(pixels: np.ndarray) -> np.ndarray:
    """An object's colour less the ground's, from the best covered sixth of its pixels ([n, 3])."""
    brightest = np.argsort(-(pixels @ pixels.mean(0)), kind="stable")[: max(1, len(pixels) // 6)]
    return np.median(pixels[brightest], axis=0)


def _name_colour(ray: np.ndarray) -> str | None:
    colour = ray + np.array(BACKGROUND)
    distances = {name: float(np.linalg.norm(colour - np.array(rgb))) for name, rgb in COLOURS.items()}
    name = min(distances, key=lambda n: distances[n])
    return name if distances[name] <= COLOUR_TOLERANCE else None


class _Template(NamedTuple):
    """A shape somewhere in a picture, in pixels (a pixel's middle lies at .5)."""

    shape: str
    x: float
    y: float
    diameter: float


def _template(shape: str, cover: np.ndarray) -> _Template:
    """The shape with the area and the centre of mass of ``cover``, the covered share of each pixel."""
    mass, at = float(cover.sum()), np.arange(len(cover)) + 0.5
    area, sag = _template_moments(shape)
    radius = float(np.sqrt(mass / area))
    x, y = float(cover.sum(0) @ at) / mass, float(cover.sum(1) @ at) / mass
    return _Template(shape, x, y - sag * radius, 2 * radius)


@cache
def _template_moments(shape: str) -> tuple[float, float]:
    """Area and centre of mass (y; x is 0 for all) of a shape of radius 1."""
    at = (np.arange(800) + 0.5) / 320 - 1.25
    inside = shape_mask(shape, at[None, :], at[:, None])
    return float(inside.sum()) / 320**2, float(inside.sum(1) @ at / inside.sum())


def _is_plausible(template: _Template, side: int) -> bool:
    return DIAMETERS[0] <= template.diameter / side <= DIAMETERS[1]


def _overlap(template: _Template, cover: np.ndarray) -> float:
    """Soft intersection over union of ``cover`` and the template, sharp or blurred, whichever is more alike."""
    radius = template.diameter / 2
    rows, columns = (_points(c, template.diameter, len(cover)) for c in (template.y, template.x))
    x, y = (columns.ravel() - template.x) / radius, (rows.reshape(-1, 1) - template.y) / radius
    inside = shape_mask(template.shape, x, y)
    sharp = inside.reshape(len(rows), _OVERSAMPLE, len(columns), _OVERSAMPLE).mean(axis=(1, 3))
    seen = cover[int(rows[0, 0]) : int(rows[-1, 0]) + 1, int(columns[0, 0]) : int(columns[-1, 0]) + 1]
    both = max(float(np.minimum(seen, wanted).sum()) for wanted in (sharp, _blurred(sharp)))
    return both / (float(cover.sum() + sharp.sum()) - both)


def _points(centre: float, diameter: float, side: int) -> np.ndarray:
    """Sampling points, in pixels, of the pixels along one axis that a blurred shape can touch: [pixels, oversample]."""
    first, last = max(0, int(centre - diameter * 0.55 - 1)), min(side, int(centre + diameter * 0.55 + 2))
    return np.arange(first, last)[:, None] + (np.arange(_OVERSAMPLE) + 0.5) / _OVERSAMPLE


def _blurred(field: np.ndarray) -> np.ndarray:
    """The field after a triangle filter two pixels wide along both axes."""
    padded = np.zeros((field.shape[0] + 2, field.shape[1] + 2))
    padded[1:-1, 1:-1] = field
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
