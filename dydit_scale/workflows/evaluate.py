"""``dydit evaluate``: base, control and dynamic model on the same prompts and noise, judged; and what the gates do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dydit_scale.dynamic.masks import DynamicMasks
from dydit_scale.evaluation.classifier import features
from dydit_scale.evaluation.frechet import frechet_distance
from dydit_scale.evaluation.judges import Judge, judge_for, real_scenes
from dydit_scale.models.family import SampleConfig
from dydit_scale.models.registry import family_of
from dydit_scale.sampling.generate import Recording, generate, recorded, sampler_timesteps
from dydit_scale.sampling.speed import machine
from dydit_scale.workflows.runs import LoadedRun, load_run, sample_config, static_pipeline
from dydit_scale.workflows.sample import measure

SHOWN = 24
"""Pictures kept for the report."""
MAPPED = 6
"""Pictures whose token maps are kept."""
REAL_SEEDS = (1, 2)
"""Of the real scenes that all are compared with, and of others to compare with those."""


class EvaluationResult(NamedTuple):
    """What ``dydit evaluate`` found."""

    scores: dict[str, dict[str, Any]]
    """By model: base, control (if there is one) and the run's own; with "frechet", its distance from real scenes."""
    frechet_real: float
    """The distance of as many real scenes from others of the same prompts: what no model can be expected to beat."""
    speed: dict[str, Any] | None
    """The timing of a dynamic run."""


def evaluate_run(
    folder: Path,
    *,
    control: Path | None = None,
    prompts: int = 256,
    steps: int = 12,
    cfg: float = 3.0,
    pairs: int = 3,
    timed: int = 64,
    batch: int = 64,
) -> EvaluationResult:
    """Judge a run trained on the built-in scenes or clips; writes ``evaluation/`` in its folder.

    Raises ValueError for fewer than two prompts, if a folder is no run, or the pictures are not of the built-in kind
    (the judge cannot read others).
    """
    if prompts < 2:
        raise ValueError(f"prompts: expected at least 2, which a distance needs, got {prompts}")
    run = load_run(folder)
    out = run.folder / "evaluation"
    out.mkdir(exist_ok=True)
    config = sample_config(run, steps=steps, batch=batch, cfg=cfg)
    judge = judge_for(reads_text=family_of(run.pipeline).reads_text, video=config.frames > 1)
    captions = judge.prompts(prompts)
    pictures = {"base": generate(static_pipeline(run), captions, config, progress="base")}
    if control is not None:
        pictures["control"] = generate(load_run(control).pipeline, captions, config, progress="control")
    speed = None
    if run.recipe.dynamic is None:
        pictures["fine-tuned"] = generate(run.pipeline, captions, config, progress=run.recipe.name)
    else:
        plan = run.network.pack(sampler_timesteps(run.pipeline, config))
        with recorded(run.network) as recording:
            pictures["dynamic"] = generate(run.pipeline, captions, config, progress="dynamic, packed")
        _save_gates(out, run, recording, config, pictures["dynamic"])
        report = replace(measure(run, captions[:timed], config, pairs=pairs), fallback=plan.run.fallback)
        speed = report.as_dict()
        (out / "speed.json").write_text(json.dumps(speed, indent=1))
    scores: dict[str, dict[str, Any]] = {name: dict(judge.score(p, captions)) for name, p in pictures.items()}
    distances = _distances(judge, pictures, captions, config)
    for name, found in scores.items():
        found["frechet"] = distances[name]
    result = EvaluationResult(scores, distances["real"], speed)
    _save_scores(out, result, run, control, config, prompts)
    _save_pictures(out, judge, pictures, captions)
    return result


def _distances(
    judge: Judge, pictures: dict[str, np.ndarray], captions: Sequence[str], config: SampleConfig
) -> dict[str, float]:
    """Fréchet distances from real scenes of the same prompts, by model; "real" is that of other real scenes."""
    side = next(iter(pictures.values())).shape[-2]
    reference, real = (real_scenes(judge, captions, side=side, frames=config.frames, seed=seed) for seed in REAL_SEEDS)
    wanted = features(reference)
    return {name: frechet_distance(features(p), wanted) for name, p in (pictures | {"real": real}).items()}


def _save_scores(
    out: Path,
    result: EvaluationResult,
    run: LoadedRun,
    control: Path | None,
    config: SampleConfig,
    prompts: int,
) -> None:
    where = {"run": str(run.folder), "control": None if control is None else str(control), **machine()}
    found = {"models": result.scores, "frechet_real": result.frechet_real}
    text = {"prompts": prompts, "steps": config.steps, "cfg": config.cfg, **found, **where}
    (out / "scores.json").write_text(json.dumps(text, indent=1))


def _save_pictures(out: Path, judge: Judge, pictures: dict[str, np.ndarray], captions: Sequence[str]) -> None:
    chosen = range(min(SHOWN, len(captions)))  # not picked by anyone; categories take turns
    arrays: dict[str, np.ndarray] = {"captions": np.array([captions[i] for i in chosen])}
    for name, all_pictures in pictures.items():
        arrays[name] = _stills(all_pictures[: len(chosen)])
        arrays[f"ok_{name}"] = np.array([judge.correct(all_pictures[i], captions[i]) for i in chosen])
    np.savez_compressed(out / "pictures.npz", **arrays)  # type: ignore[arg-type]


def _save_gates(out: Path, run: LoadedRun, recording: Recording, config: SampleConfig, pictures: np.ndarray) -> None:
    network = run.network
    table = network.step_table(sampler_timesteps(run.pipeline, config))
    steps = len(table.timesteps)
    conditional = _of_prompts(recording, run, config)
    tokens = [np.concatenate([m.tokens.numpy() for m in conditional[s::steps]], axis=1) for s in range(steps)]
    layers = len(network.dynamic_blocks())
    heads = network.config["num_attention_heads"]
    np.savez_compressed(
        out / "widths.npz",
        timesteps=_in_thousand(table.timesteps.numpy()),
        heads=_by_step(table.heads, steps, layers, heads),
        groups=_by_step(table.groups, steps, layers, network.dynamic.mlp_groups or heads),
        tokens=np.stack([t.mean(axis=(1, 2)) for t in tokens]),
        names=np.array(network.block_names()),
    )
    frames = config.frames
    side = int((tokens[0].shape[-1] // frames) ** 0.5)
    shown = np.linspace(0, steps - 1, min(4, steps)).astype(int)
    keep = [tokens[s][:, :MAPPED].mean(axis=0).reshape(-1, frames, side, side).mean(axis=1) for s in shown]
    np.savez_compressed(
        out / "tokens.npz",
        pictures=_stills(pictures[:MAPPED]),
        keep=np.stack(keep, axis=1),
        timesteps=_in_thousand(table.timesteps.numpy()[shown]),
    )


def _stills(pictures: np.ndarray) -> np.ndarray:
    """Pictures, or the middle frames of clips."""
    return pictures if pictures.ndim == 4 else pictures[:, pictures.shape[1] // 2]


def _in_thousand(timesteps: np.ndarray) -> np.ndarray:
    """Timesteps in 0..1000, whether the family counts so or in 0..1."""
    return timesteps if timesteps.max() > 1 else timesteps * 1000


def _of_prompts(recording: Recording, run: LoadedRun, config: SampleConfig) -> list[DynamicMasks]:
    """The masks of the branch with the prompts, where guidance adds another."""
    if config.cfg == 1:
        return recording.masks
    layout = family_of(run.pipeline).guidance_layout
    if layout == "in_turn":
        return recording.masks[::2]
    half = ("prompts_first", "prompts_last").index(layout)
    return [DynamicMasks(*(m.chunk(2, dim=1)[half] for m in masks)) for masks in recording.masks]


def _by_step(masks: Any, steps: int, layers: int, units: int) -> np.ndarray:
    """[steps, layers, units], ones where nothing is dynamic."""
    return np.ones((steps, layers, units)) if masks is None else masks.permute(1, 0, 2).cpu().numpy()
