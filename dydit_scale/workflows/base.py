"""``dydit base``: a small pipeline with random weights, the start of a base that a recipe trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dydit_scale.data.shapes.language import CLASSES, vocabulary
from dydit_scale.data.shapes.motion import MOTIONS, motion_vocabulary
from dydit_scale.models.small import (
    small_class_latte_pipeline,
    small_class_pipeline,
    small_flux_pipeline,
    small_latte_pipeline,
)

_NAMES = [subject.phrase() for subject in CLASSES]
_MAKERS: dict[str, Callable[[int], Any]] = {
    "flux": lambda seed: small_flux_pipeline(vocabulary(), seed=seed),
    "dit": lambda seed: small_class_pipeline(_NAMES, kind="dit", seed=seed),
    "sit": lambda seed: small_class_pipeline(_NAMES, kind="sit", seed=seed),
    "latte": lambda seed: small_latte_pipeline(motion_vocabulary(), seed=seed),
    "latte-classes": lambda seed: small_class_latte_pipeline(MOTIONS, seed=seed),
}
BASES = tuple(_MAKERS)


def write_base(out: Path, family: str = "flux", *, seed: int = 0) -> None:
    """A pipeline folder with random weights for the captions, classes or motions of the built-in scenes.

    Raises ValueError if the folder holds a pipeline already.
    """
    if (out / "model_index.json").exists():
        raise ValueError(f"{out} holds a pipeline already; choose another folder, or remove it first")
    _MAKERS[family](seed).save_pretrained(out)
