"""``dydit base``: a small pipeline with random weights, the start of a base that a recipe trains."""

from __future__ import annotations

from pathlib import Path

from dydit_scale.data.shapes.language import CLASSES, vocabulary
from dydit_scale.data.shapes.motion import MOTIONS, motion_vocabulary
from dydit_scale.models.family import Family
from dydit_scale.models.registry import all_families


def write_base(out: Path, family: str = "flux", *, seed: int = 0) -> None:
    """A pipeline folder with random weights for the captions, classes or motions of the built-in scenes.

    Raises ValueError if there is no such family, or the folder holds a pipeline already.
    """
    known = {f.name: f for f in all_families()}
    if family not in known:
        raise ValueError(f"--family {family}: expected one of {', '.join(sorted(known))}")
    if (out / "model_index.json").exists():
        raise ValueError(f"{out} holds a pipeline already; choose another folder, or remove it first")
    known[family].small_pipeline(_words(known[family]), seed=seed).save_pretrained(out)


def _words(family: Family) -> list[str]:
    """Of the built-in data's captions, or the names of its classes."""
    if family.reads_text:
        return list(motion_vocabulary() if family.makes_videos else vocabulary())
    return list(MOTIONS) if family.makes_videos else [subject.phrase() for subject in CLASSES]
