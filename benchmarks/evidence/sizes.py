"""How large everything is: ``small`` for two CPU cores, ``gpu`` for one GPU, ``quick`` to see that it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One family of models on the built-in data, from its base to its samples."""

    title: str
    recipe: str
    data: tuple[str, ...]
    """Options of ``dydit data shapes``."""
    samples: int
    """Training samples."""
    base_steps: int
    """Of the static base, and of the narrow one; 0: the base that ships with the repository."""
    base_batch: int = 32
    steps: int
    """Of every adaptation and of its controls."""
    batch: int = 16
    pictures: int
    """Drawn by each model for each seed."""
    sampler_steps: int
    cfg: float
    family: str
    """As ``dydit base`` calls it."""
    options: tuple[str, ...] = ()
    """More overrides of the recipe."""
    emoji: bool = False
    """Pictures of emoji in place of the built-in data: nobody judges them."""

    @property
    def video(self) -> bool:
        """Whether it draws clips."""
        return "--video" in self.data

    @property
    def work(self) -> int:
        """To tell which base takes longest: samples that it is trained on, a clip for four of them."""
        return self.base_steps * self.base_batch * (4 if self.video else 1)


@dataclass(frozen=True, kw_only=True)
class Size:
    """All of one run of the evidence."""

    name: str
    trials: dict[str, Trial]
    seeds: tuple[int, ...] = (0, 1, 2)
    held_out: int
    """Samples that no model is trained on, for the denoising error."""
    workers: int
    """Units that run side by side."""
    timed: int
    """Times that each sampler is timed."""


_CLASSES = ("--classes",)
_CLIPS = ("--classes", "--video", "--frames", "8", "--side", "16")
_FULL = ("adapter.kind=none", "train.lr=1e-3", "supervision.guidance=1")
"""The demo's recipe with all weights trained."""


def _trials(
    *, base: int, steps: int, few_steps: int, emoji: int, pictures: int, samples: int, batch: int
) -> dict[str, Trial]:
    dit = Trial(
        title="DiT (DDPM)", recipe="dit/debug", data=_CLASSES, samples=samples, base_steps=base, steps=steps,
        batch=batch, pictures=pictures, sampler_steps=20, cfg=2.0, family="dit",
    )  # fmt: skip
    sit = Trial(
        title="SiT (flow matching)", recipe="sit/debug", data=_CLASSES, samples=samples, base_steps=base, steps=steps,
        batch=batch, pictures=pictures, sampler_steps=20, cfg=2.0, family="sit",
    )  # fmt: skip
    flux = Trial(
        title="FLUX (text to image)", recipe="shapes/demo", data=(), samples=samples, base_steps=0, steps=few_steps,
        batch=batch, pictures=pictures, sampler_steps=10, cfg=3.0, family="flux", options=_FULL,
    )  # fmt: skip
    latte = Trial(
        title="Latte (video)", recipe="latte/debug_classes", data=_CLIPS, samples=samples // 2, base_steps=base,
        base_batch=16, steps=few_steps, batch=max(4, batch // 2), pictures=max(7, pictures // 14 * 7), sampler_steps=20,
        cfg=2.0, family="latte-classes", options=("data.images_per_clip=0",),
    )  # fmt: skip
    emojis = replace(
        flux, title="FLUX on emoji", recipe="emoji/pixels", base_steps=emoji, options=(), samples=0, emoji=True
    )
    return {"dit": dit, "sit": sit, "flux": flux, "latte": latte, "emoji": emojis}


SIZES = {
    "small": Size(
        name="small",
        trials=_trials(base=1500, steps=160, few_steps=96, emoji=600, pictures=96, samples=8192, batch=16),
        held_out=512,
        workers=2,
        timed=2,
    ),
    "gpu": Size(
        name="gpu",
        trials=_trials(base=10000, steps=1000, few_steps=1000, emoji=6000, pictures=960, samples=65536, batch=64),
        held_out=2048,
        workers=3,
        timed=5,
    ),
    "quick": Size(
        name="quick",
        trials=_trials(base=2, steps=4, few_steps=4, emoji=2, pictures=7, samples=64, batch=8),
        seeds=(0, 1),
        held_out=32,
        workers=1,
        timed=1,
    ),
}
