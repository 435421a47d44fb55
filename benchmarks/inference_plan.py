"""What benchmarks/inference.py is asked to compare, checked before anything is measured."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.inference_masks import Shares, drawn_shares, mean_ratio, shares_of_run
from benchmarks.inference_sizes import SIZES, Size
from benchmarks.inference_variants import COMPILED, FEW_STEPS, ON_REQUEST, VARIANTS, Setting

FEW = 4
"""Steps of a distilled model's sampler."""
ON_CPU = {"sizes": ["dit-s", "dit-b", "dit-xl", "flux-lite"], "steps": 4}
ON_GPU = {"sizes": list(SIZES), "steps": 28}


def check(args: argparse.Namespace) -> None:
    numbers = {"batch": args.batch, "steps": [args.steps], "repetitions": [args.repetitions]}
    numbers |= {name: [getattr(args, name)] for name in ("layers", "side", "text")}
    for name, values in numbers.items():
        if values and values[0] is not None and min(values) < 1:
            raise ValueError(f"--{name}: expected 1 or more; got {min(values)}")
    if not all(0 < ratio < 1 for ratio in args.ratios):
        raise ValueError(f"--ratios: expected numbers between 0 and 1; got {args.ratios}")
    if (longest := min(SIZES[name].steps for name in args.sizes)) < args.steps:
        raise ValueError(f"--steps: the sampler has {longest}; got {args.steps}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: torch finds no CUDA device here")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is to be compared."""

    size: Size
    batch: int
    few: bool
    target: float | None
    """The ratio that masks were drawn at; None: they are those of a run."""
    sigmas: Tensor
    shares: Shares
    ratio: float
    """What the shares cost."""

    def setting(self, static: Any, max_bytes: int | None = None) -> Setting:
        """With the model, its inputs, and what each packed variant's copies may take."""
        like = next(static.parameters())
        return Setting(
            size=self.size,
            static=static,
            draw=partial(self.size.inputs, self.batch, self.sigmas, like.device, like.dtype),
            timesteps=self.size.timesteps(self.sigmas),
            shares=self.shares,
            target=self.ratio,
            few=self.few,
            max_bytes=max_bytes,
        )

    def described(self) -> dict[str, Any]:
        """For the result's rows."""
        size = self.size
        return {
            "size": size.name, "layers": size.layers, "image_tokens": size.tokens, "text_tokens": size.text,
            "batch": self.batch, "samples": self.batch * size.branches, "schedule": "few" if self.few else "sampler",
            "steps": len(self.sigmas), "target": self.target, "timesteps": size.timesteps(self.sigmas).tolist(),
        }  # fmt: skip


def planned(args: argparse.Namespace) -> list[Comparison]:
    """Every size, schedule, batch and ratio.

    Raises:
        ValueError: a size cannot have a ratio, or the run has no masks.
    """
    found = []
    for name in args.sizes:
        size = sized(SIZES[name], args)
        cost, units = size.cost(), size.config["num_attention_heads"]
        for few in (schedule == "few" for schedule in args.schedules):
            if few and not size.few_steps:
                continue
            sigmas = size.sigmas(FEW, of=FEW) if few else size.sigmas(args.steps, of=size.steps)
            for target in [None] if args.masks else args.ratios:
                if target is None:
                    shares = shares_of_run(args.masks, size.layers, sigmas, units=units)
                else:
                    shares = drawn_shares(cost, target, sigmas, units=units, token_keep=size.token_keep)
                batches = args.batch or (size.gpu_batches if args.device == "cuda" else (1,))
                found += [
                    Comparison(size=size, batch=batch, few=few, target=target, sigmas=sigmas, shares=shares,
                               ratio=mean_ratio(cost, shares))
                    for batch in batches
                ]  # fmt: skip
    return found


def sized(size: Size, args: argparse.Namespace) -> Size:
    """The size as the device and the arguments have it."""
    layers, side, text = size.on_cpu if args.device == "cpu" else (None, None, None)
    return size.cut(args.layers or layers, args.side or side, args.text or text)


def names(args: argparse.Namespace, *, few: bool) -> list[str]:
    """The variants to measure; the static model and ours with open gates are always among them."""
    gpu_only = () if args.device == "cuda" else (*COMPILED, "fused")
    wanted = args.variants or [v for v in VARIANTS if v not in (*gpu_only, *ON_REQUEST)]
    wanted = [v for v in wanted if v in FEW_STEPS] if few else wanted
    needed = {"static", "open", *(f"static-{v}" for v in ("compile", "cudagraphs") if v in wanted)}
    return [v for v in VARIANTS if v in needed or v in wanted]
