"""What a report is made of: reads a run folder, strict about each file, lenient about which of them exist."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from dydit_scale.report.checks import FloatArray, Pixels, arrays, expect_shape, finite, mapping, maybe, number, pixels
from dydit_scale.report.metrics import Metrics, read_metrics

Read = TypeVar("Read")
EVALUATE, EXPORT = "dydit evaluate RUN", "dydit export RUN"
MODELS = ("base", "control", "dynamic")


@dataclass(frozen=True, kw_only=True)
class Missing:
    """An optional input that is not there, or that cannot be used."""

    file: str
    """Path inside the run folder."""
    command: str
    """What writes it."""
    reason: str | None = None
    """Why an existing file is of no use; None when there is no file."""


class ModelScore(NamedTuple):
    """How often the judge said yes, as shares in 0..1; a category without prompts is None."""

    overall: float
    categories: dict[str, float | None]
    frechet: float | None = None
    """Fréchet distance from real scenes of the same prompts."""


class Scores(NamedTuple):
    """Prompt scores of the compared models."""

    prompts: int
    steps: int
    models: dict[str, ModelScore]
    frechet_real: float | None = None
    """That of as many other real scenes."""


class Speed(NamedTuple):
    """Static and dynamic model on one machine; MACs per picture and seconds per batch, both for a whole sampling."""

    machine: str
    versions: dict[str, str]
    date: str
    batch: int
    steps: int
    macs_static: float
    macs_dynamic: float
    seconds_static: float
    seconds_dynamic: float
    ideal: float
    realised: float
    share: float
    fallback: str | None = None
    """Why forwards of the dynamic model ran masked, if some did."""


class Widths(NamedTuple):
    """Shares in 0..1 over sampling step and layer; tokens are NaN where a layer has no token router."""

    timesteps: FloatArray  # [steps]
    heads: FloatArray  # [steps, layers]
    groups: FloatArray  # [steps, layers]
    tokens: FloatArray  # [steps, layers]
    names: tuple[str, ...]


class Experts(NamedTuple):
    """What the gates of a TD-LoRA say over noise levels; the last evaluation's."""

    timesteps: FloatArray  # [timesteps]
    gates: FloatArray  # [layers, timesteps, experts]
    names: tuple[str, ...]


class TokenMaps(NamedTuple):
    """Where the tokens are that were computed."""

    pictures: Pixels  # [pictures, H, W, 3]
    keep: FloatArray  # [pictures, steps, h, w]
    timesteps: FloatArray  # [steps]


class Samples(NamedTuple):
    """Pictures of the compared models from the same noise and captions, with the judge's verdict."""

    captions: tuple[str, ...]
    pictures: dict[str, Pixels]  # each [samples, H, W, 3]
    right: dict[str, NDArray[np.bool_]]  # each [samples]


class ExportFile(NamedTuple):
    """One exported file and how far it is from the model it stands for; None where not measured."""

    format: str
    path: str
    bytes: int
    error_mean: float | None
    error_max: float | None
    output_error: float | None
    verified: bool
    routers: bool | None = None
    """Whether those of a dynamic run are in it; None where that is not known."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Everything a report shows."""

    name: str
    """The run folder's name."""
    recipe_name: str
    """The recipe's own name, else the run folder's."""
    recipe_text: str
    """recipe.yaml as written."""
    metrics: Metrics
    """Curves over steps."""
    scores: Scores | Missing
    """evaluation/scores.json"""
    speed: Speed | Missing
    """evaluation/speed.json"""
    widths: Widths | Missing
    """evaluation/widths.npz"""
    tokens: TokenMaps | Missing
    """evaluation/tokens.npz"""
    samples: Samples | Missing
    """evaluation/pictures.npz"""
    exports: tuple[ExportFile, ...] | Missing
    """export/export.json"""
    experts: Experts | Missing | None
    """The newest of gates/step-*.npz; None for a run that has none."""


def read_run(run: Path) -> RunData:
    """Read the run folder.

    Errors: ValueError when recipe.yaml or metrics.jsonl is missing or recipe.yaml is not a mapping. Any other file that
    is absent or broken comes back as `Missing`.
    """
    recipe = run / "recipe.yaml"
    for needed in (recipe, run / "metrics.jsonl"):
        if not needed.is_file():
            raise ValueError(
                f"{needed}: expected a run folder with this file, found none; give the folder of a training run"
            )
    text = recipe.read_text(encoding="utf-8")
    return RunData(
        name=run.resolve().name,
        recipe_name=_recipe_name(recipe, text) or run.resolve().name,
        recipe_text=text,
        metrics=read_metrics(run / "metrics.jsonl"),
        scores=_optional(run, "evaluation/scores.json", EVALUATE, _read_scores),
        speed=_optional(run, "evaluation/speed.json", EVALUATE, _read_speed),
        widths=_optional(run, "evaluation/widths.npz", EVALUATE, _read_widths),
        tokens=_optional(run, "evaluation/tokens.npz", EVALUATE, _read_tokens),
        samples=_optional(run, "evaluation/pictures.npz", EVALUATE, _read_samples),
        exports=_optional(run, "export/export.json", EXPORT, _read_exports),
        experts=_experts(run),
    )


def _experts(run: Path) -> Experts | Missing | None:
    files = sorted((run / "gates").glob("step-*.npz"))
    if not files:
        return None
    return _optional(run, f"gates/{files[-1].name}", "training with adapter.kind=td_lora", _read_experts)


def _recipe_name(path: Path, text: str) -> str | None:
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got {error}; restore the resolved recipe") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(recipe).__name__}; restore the resolved recipe")
    name = recipe.get("name")
    return name if isinstance(name, str) and name.strip() else None


def _optional(run: Path, file: str, command: str, read: Callable[[Path], Read]) -> Read | Missing:
    if not (run / file).is_file():
        return Missing(file=file, command=command)
    try:
        return read(run / file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        return Missing(file=file, command=command, reason=str(error) or type(error).__name__)


def _read_scores(path: Path) -> Scores:
    found = mapping(json.loads(path.read_text(encoding="utf-8")), "the file")
    models = {}
    for name, entry in mapping(found.get("models"), "models").items():
        score = mapping(entry, f"models.{name}")
        categories = mapping(score.get("categories", {}), f"models.{name}.categories")
        models[name] = ModelScore(
            number(score, "overall", high=1.0),
            {key: maybe(categories, key, high=1.0) for key in categories},
            maybe(score, "frechet"),
        )
    if not models:
        raise ValueError("models: expected at least one, got none")
    real = maybe(found, "frechet_real")
    return Scores(int(number(found, "prompts", low=1)), int(number(found, "steps")), models, real)


def _read_speed(path: Path) -> Speed:
    found = mapping(json.loads(path.read_text(encoding="utf-8")), "the file")
    versions = mapping(found.get("versions", {}), "versions")
    positive = {
        key: number(found, key, low=1e-12)
        for key in ("macs_static", "macs_dynamic", "seconds_static", "seconds_dynamic", "ideal", "realised", "share")
    }
    return Speed(
        machine=str(found.get("machine", "")),
        versions={name: str(version) for name, version in versions.items()},
        date=str(found.get("date", "")),
        batch=int(number(found, "batch", low=1)),
        steps=int(number(found, "steps", low=1)),
        fallback=None if found.get("fallback") is None else str(found["fallback"]),
        **positive,
    )


def _read_widths(path: Path) -> Widths:
    found = arrays(path, timesteps=1, heads=3, groups=3, tokens=2, names=1)
    steps, layers = found["tokens"].shape
    expected = {"timesteps": (steps,), "heads": (steps, layers), "groups": (steps, layers), "names": (layers,)}
    for key, shape in expected.items():
        expect_shape(key, found[key].shape[: len(shape)], shape)
    if not (steps and layers and found["heads"].shape[2] and found["groups"].shape[2]):
        raise ValueError(f"heads: expected no empty axis, got shape {found['heads'].shape}")
    return Widths(
        timesteps=finite("timesteps", found["timesteps"]),
        heads=finite("heads", found["heads"]).mean(axis=2),
        groups=finite("groups", found["groups"]).mean(axis=2),
        tokens=found["tokens"].astype(np.float64),
        names=tuple(str(name) for name in found["names"]),
    )


def _read_experts(path: Path) -> Experts:
    found = arrays(path, timesteps=1, gates=3, names=1)
    expect_shape("gates", found["gates"].shape[:2], (len(found["names"]), len(found["timesteps"])))
    if not found["gates"].size:
        raise ValueError(f"gates: expected no empty axis, got shape {found['gates'].shape}")
    names = tuple(str(name) for name in found["names"])
    return Experts(finite("timesteps", found["timesteps"]), finite("gates", found["gates"]), names)


def _read_tokens(path: Path) -> TokenMaps:
    found = arrays(path, pictures=4, keep=4, timesteps=1)
    pictures = pixels("pictures", found["pictures"])
    expect_shape("keep", found["keep"].shape[:2], (len(pictures), len(found["timesteps"])))
    if not found["keep"].size:
        raise ValueError(f"keep: expected no empty axis, got shape {found['keep'].shape}")
    return TokenMaps(pictures, found["keep"].astype(np.float64), finite("timesteps", found["timesteps"]))


def _read_samples(path: Path) -> Samples:
    found = arrays(path, captions=1)
    names = [name for name in MODELS if name in found]
    if not names:
        raise ValueError(f"expected pictures of {', '.join(MODELS)}, got only {', '.join(sorted(found))}")
    pictures = {name: pixels(name, found[name]) for name in names}
    right = {name: found[f"ok_{name}"].astype(bool) for name in names if f"ok_{name}" in found}
    for name, array in (*pictures.items(), *((f"ok_{key}", value) for key, value in right.items())):
        expect_shape(name, array.shape[:1], found["captions"].shape)
    return Samples(tuple(str(caption) for caption in found["captions"]), pictures, right)


def _read_exports(path: Path) -> tuple[ExportFile, ...]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, list):
        raise ValueError(f"expected a list, got {type(found).__name__}")
    entries = [mapping(entry, f"entry {row}") for row, entry in enumerate(found)]
    return tuple(
        ExportFile(
            format=str(entry.get("format", "")),
            path=str(entry.get("path", "")),
            bytes=int(number(entry, "bytes")),
            error_mean=maybe(entry, "error_mean"),
            error_max=maybe(entry, "error_max"),
            output_error=maybe(entry, "output_error"),
            verified=entry.get("verified") is True,
            routers=entry["routers"] if isinstance(entry.get("routers"), bool) else None,
        )
        for entry in entries
    )
