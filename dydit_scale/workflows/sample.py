"""``dydit sample``: pictures from the packed model beside the static one's, with what it cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dydit_scale.dynamic.cost import KeepRates, ModelCost
from dydit_scale.dynamic.weight_only import Kind
from dydit_scale.models.family import SampleConfig
from dydit_scale.models.plan import PackedPlan
from dydit_scale.models.registry import family_of
from dydit_scale.sampling.execution import Backend, Execution
from dydit_scale.sampling.generate import (
    Recording,
    calibrated_capacity,
    forwards,
    generate,
    picture_grid,
    recorded,
    sampler_timesteps,
)
from dydit_scale.sampling.speed import SpeedReport, speed_report, timed_pairs
from dydit_scale.sampling.video import write_video
from dydit_scale.workflows.runs import LoadedRun, load_run, sample_config, static_pipeline


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """How a dynamic model runs while it samples."""

    max_bytes: int | None = None
    """What packed weights may take beside the model; None: half of the memory that is free."""
    fixed_tokens: bool = False
    """Each block works on a number of tokens that a first pass over the first prompts has found."""
    execution: Backend = "eager"
    share_scores: bool = False
    """The branches of guidance skip the same tokens."""
    weights: Kind | None = None
    """Keep packed weights in 8 bits."""
    fused_tokens: bool = False
    """Run the MLPs of chosen tokens in Triton kernels where they can."""


def sample_run(
    folder: Path,
    prompts: Sequence[str],
    out: Path,
    *,
    config: dict[str, Any],
    fps: int = 8,
    packing: PackOptions = PackOptions(),
) -> SpeedReport | None:
    """Write numbered pictures (or clips, as GIF and MP4) and ``grid.png`` (static above dynamic) to ``out``; print and
    return the comparison.

    Args:
        config: fields of SampleConfig; None keeps the run's own.
        fps: frames a second of clips.
        packing: how the dynamic model runs.

    Raises ValueError if the folder is no run, or for a sampler or a size that its family does not know.
    """
    run = load_run(folder)
    settings = sample_config(run, **config)
    family_of(run.pipeline).token_grid(run.pipeline, settings.size)  # refuses a size before the work
    if run.recipe.dynamic is None:
        pictures, rows, report = generate(run.pipeline, prompts, settings, progress="sampling"), [], None
    else:
        first = list(prompts)[: settings.batch]
        plan = pack_run(run, first, settings, packing)
        print(packed_line(plan))
        static = static_pipeline(run)
        with Execution(run.network, packing.execution) as execution:
            pictures = generate(run.pipeline, prompts, settings, progress="dynamic, packed")
            rows = [generate(static, prompts, settings, progress="static")]
            timed = timed_pairs(drawer(static, first, settings), drawer(run.pipeline, first, settings), pairs=3)
        report = replace(
            counted(run, first, settings, timed),
            execution=packing.execution,
            fallback=plan.run.fallback,
            op_by_op=execution.op_by_op,
        )
        print(report.table())
        if execution.recompilations:
            print(f"{packing.execution}: {execution.recompilations} made in {execution.warmup_seconds:.1f} s, once")
    _write_pictures(out, pictures, rows, fps)
    if report is not None:
        (out / "speed.json").write_text(json.dumps(report.as_dict(), indent=1))
    return report


def _write_pictures(out: Path, pictures: np.ndarray, rows: Sequence[np.ndarray], fps: int) -> None:
    """Numbered pictures or clips, and a grid of them below the ``rows`` that they are compared with."""
    out.mkdir(parents=True, exist_ok=True)
    columns = len(pictures) if rows else min(8, len(pictures))
    zoom = max(1, 128 // max(pictures.shape[-3:-1]))
    Image.fromarray(picture_grid(np.concatenate([*rows, pictures]), columns, zoom)).save(out / "grid.png")
    for i, picture in enumerate(pictures):
        if picture.ndim == 3:
            Image.fromarray(picture).save(out / f"{i:05d}.png")
            continue
        for ending in ("gif", "mp4"):
            write_video(out / f"{i:05d}.{ending}", picture, fps)


def pack_run(run: LoadedRun, prompts: Sequence[str], config: SampleConfig, packing: PackOptions) -> PackedPlan:
    """Cut a dynamic run's sub-networks for the sampler's steps; ``prompts`` are drawn if tokens are to be counted."""
    _check_guidance(run, config, packing)
    capacity = calibrated_capacity(run.pipeline, prompts, config) if packing.fixed_tokens else None
    return run.network.pack(
        sampler_timesteps(run.pipeline, config),
        max_bytes=packing.max_bytes,
        capacity=capacity,
        share_scores=packing.share_scores,
        kernel_layout=packing.execution != "compile",
        weights=packing.weights,
        fused_tokens=packing.fused_tokens,
    )


def _check_guidance(run: LoadedRun, config: SampleConfig, packing: PackOptions) -> None:
    """ValueError if scores are to be shared by branches that no batch holds together."""
    if not packing.share_scores:
        return
    family = family_of(run.pipeline)
    if family.guidance_layout == "in_turn":
        raise ValueError(
            f"share_scores: {type(run.pipeline).__name__} runs the branches of guidance one after the other, not in "
            "one batch; leave it out"
        )
    if config.cfg == 1:
        raise ValueError("share_scores: expected two branches of guidance, got cfg 1, which has one; leave it out")


def packed_line(plan: PackedPlan) -> str:
    """For the terminal."""
    steps, kernels = len(plan.blocks), plan.fused_tokens
    line = f"packed: {plan.distinct} sub-blocks for {steps} steps, {plan.bytes / 2**20:.0f} MiB of copies"
    if others := {kind: n for kind, n in plan.stored.items() if kind != "own"}:
        parts = sum(plan.stored.values())
        line += f" ({', '.join(f'{n} of {parts} parts {kind}' for kind, n in others.items())})"
    if kernels is None:
        return line
    reason = "" if kernels.reason is None else f" ({kernels.reason})"
    return f"{line}, {kernels.fused} of {kernels.parts} MLPs in fused kernels{reason}"


def measure(run: LoadedRun, prompts: Sequence[str], config: SampleConfig, *, pairs: int = 3) -> SpeedReport:
    """Time the packed dynamic pipeline beside the static one on the same prompts and noise, another noise for each
    pair; then count the MACs of these pictures."""
    static, dynamic = drawer(static_pipeline(run), prompts, config), drawer(run.pipeline, prompts, config)
    return counted(run, prompts, config, timed_pairs(static, dynamic, pairs))


def drawer(pipe: Any, prompts: Sequence[str], config: SampleConfig) -> Callable[[int], Any]:
    """What draws the prompts from the noise of a pair's number."""
    return lambda pair: generate(pipe, prompts, config, first=pair * len(prompts))


def counted(
    run: LoadedRun, prompts: Sequence[str], config: SampleConfig, seconds: Sequence[tuple[float, float]]
) -> SpeedReport:
    """What the seconds of pairs say beside the MACs of their pictures, which are drawn once more for it."""
    dynamic = drawer(run.pipeline, prompts, config)
    with recorded(run.network) as recording:
        for pair in range(1, len(seconds) + 1):
            dynamic(pair)
    return speed_report(
        seconds,
        macs_static=_cost(run, config).static * forwards(run.pipeline, config),
        macs_dynamic=macs_of(run, recording, config),
        batch=len(prompts),
        steps=config.steps,
    )


def macs_of(run: LoadedRun, recording: Recording, config: SampleConfig) -> float:
    """MACs per picture over all recorded forwards."""
    cost = _cost(run, config)
    each = [float(cost.dynamic(KeepRates(*m.keep_rates())).mean()) for m in recording.masks]
    return sum(each) / len(each) * forwards(run.pipeline, config)


def _cost(run: LoadedRun, config: SampleConfig) -> ModelCost:
    return family_of(run.pipeline).cost(run.network, run.pipeline, config.size, config.text_tokens)
