"""``dydit base``: the small pipeline around which the demo's base model is trained."""

from __future__ import annotations

from pathlib import Path

from dydit_scale.data.shapes.language import vocabulary
from dydit_scale.models.small import small_flux_pipeline


def write_base(out: Path, *, seed: int = 0) -> None:
    """A FluxPipeline folder with random weights for captions of the built-in scenes.

    Raises ValueError if the folder holds a pipeline already.
    """
    if (out / "model_index.json").exists():
        raise ValueError(f"{out} holds a pipeline already; choose another folder, or remove it first")
    small_flux_pipeline(vocabulary(), seed=seed).save_pretrained(out)
