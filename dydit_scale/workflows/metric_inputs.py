"""What metrics of files are asked for, and whether all that they need is there: checked before any work."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from dydit_scale.evaluation.batches import GENEVAL_LINE, GENEVAL_PICTURES, SampleSet, open_set
from dydit_scale.evaluation.geneval import check_line
from dydit_scale.evaluation.i3d import MIN_FRAMES
from dydit_scale.evaluation.statistics import NEIGHBOUR
from dydit_scale.workflows.prompt_files import prompt_lines

PROMPT_FILES = ("prompts.jsonl", "prompts.txt")
"""Looked for in the folder of the samples, or beside their file."""


class Need(NamedTuple):
    """What a metric works with."""

    weights: tuple[str, ...]
    reference: bool = False
    prompts: bool = False
    clips: bool = False


METRICS = {
    "fid": Need(("inception",), reference=True),
    "sfid": Need(("inception",), reference=True),
    "is": Need(("inception",)),
    "precision": Need(("inception",), reference=True),
    "recall": Need(("inception",), reference=True),
    "fvd": Need(("i3d",), reference=True, clips=True),
    "clip": Need(("clip",), prompts=True),
    "geneval": Need(("detector", "clip"), prompts=True),
}
WEIGHTS = {
    "inception": (
        "FILE",
        "weights-inception-2015-12-05-6726825d.pth (its SHA-256 begins with 6726825d) from "
        "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0",
    ),
    "i3d": ("FILE", "i3d_torchscript.pt, named in https://github.com/universome/fvd-comparison"),
    "clip": ("FOLDER", "it by `hf download openai/clip-vit-large-patch14 --local-dir FOLDER`"),
    "detector": ("FOLDER", "it by `hf download facebook/mask2former-swin-small-coco-instance --local-dir FOLDER`"),
}
"""Whether each is a file or a folder, and where to get it."""


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What to compute, and with what."""

    samples: Path
    reference: Path | None = None
    metrics: Sequence[str] = ("fid", "sfid", "is", "precision", "recall")
    weights: Mapping[str, Path]
    """By name, see ``WEIGHTS``."""
    captions: Path | None = None
    """Text file, one prompt a line, or JSON lines with "prompt"; None to look for ``PROMPT_FILES``, or for the lines
    of a folder as GenEval writes it."""
    trust_torchscript: bool = False
    batch: int = 32
    device: str = "auto"

    def __post_init__(self) -> None:
        for kind, known, given in (("metric", METRICS, self.metrics), ("weights", WEIGHTS, self.weights)):
            for name in given:
                if name not in known:
                    near = difflib.get_close_matches(name, known, n=1)
                    hint = f"; did you mean {near[0]}?" if near else ""
                    raise ValueError(f"unknown {kind} {name!r}{hint} There are {', '.join(known)}")
        if not self.metrics:
            raise ValueError(f"metrics: expected at least one of {', '.join(METRICS)}")
        if self.batch < 1:
            raise ValueError(f"batch: expected 1 or more, got {self.batch}")

    def need(self, what: str) -> list[str]:
        """The metrics asked for that need ``what``: weights by name, or a field of ``Need``."""
        return [m for m in self.metrics if what in METRICS[m].weights or getattr(METRICS[m], what, False) is True]


class Checked(NamedTuple):
    """What the metrics are computed from."""

    samples: SampleSet
    reference: SampleSet | None
    lines: list[dict[str, Any]]
    """By prompt; those of plain texts hold "prompt" alone."""


def check_inputs(config: MetricsConfig) -> Checked:
    """Samples, reference and prompts of ``config``, as far as its metrics need them.

    Raises ValueError for what is missing, broken, or does not go together; weights are only looked for.
    """
    if (users := config.need("reference")) and config.reference is None:
        raise ValueError(f"{', '.join(users)}: need something to compare with; add --reference FOLDER or FILE.npz")
    _check_weights(config)
    samples = open_set(config.samples)
    if not samples.count:
        raise ValueError(f"{config.samples}: holds statistics alone; samples need their pixels, arr_0")
    for name in config.metrics:
        if METRICS[name].clips != samples.clips:
            wanted, found = ("clips", "pictures") if METRICS[name].clips else ("pictures", "clips")
            raise ValueError(f"{name}: is a metric of {wanted}, {config.samples} holds {found}")
    reference = open_set(config.reference) if config.reference is not None and users else None
    if reference is not None:
        _check_reference(config, samples, reference)
    return Checked(samples, reference, _read_prompts(config, samples) if config.need("prompts") else [])


def _check_weights(config: MetricsConfig) -> None:
    for name, (kind, source) in WEIGHTS.items():
        users, path = config.need(name), config.weights.get(name)
        if not users:
            continue
        if path is None:
            raise ValueError(
                f"{', '.join(users)}: need the weights {name!r}, and nothing is fetched by itself. Get {source}, put "
                f"it anywhere, and add --weights {name}={kind}"
            )
        if not (path.is_dir() if kind == "FOLDER" else path.is_file()):
            raise ValueError(f"weights {name}: there is no {kind.lower()} {path}; expected {source}")
    if config.need("detector") and find_spec("scipy") is None:
        raise ValueError("geneval: the detector needs SciPy; run `pip install 'dydit_scale[metrics]'`")
    if config.need("i3d") and not config.trust_torchscript:
        raise ValueError(
            f"weights i3d: {config.weights['i3d']} is TorchScript, and loading it runs whatever code is in it. If you "
            "trust where it comes from, add --trust-torchscript"
        )


def _check_reference(config: MetricsConfig, samples: SampleSet, reference: SampleSet) -> None:
    for name, statistic in (("fid", "mu"), ("sfid", "mu_s"), ("precision", ""), ("recall", ""), ("fvd", "")):
        if name in config.metrics and not reference.count and statistic not in reference.statistics:
            held = ", ".join(reference.statistics)
            raise ValueError(f"{name}: needs the reference's pixels, but {reference.path} holds {held} alone")
    if reference.count and reference.clips != samples.clips:
        kinds = ["clips" if of.clips else "pictures" for of in (samples, reference)]
        raise ValueError(f"{samples.path} holds {kinds[0]}, {reference.path} {kinds[1]}; expected the same")
    for of in (samples, reference):
        least = NEIGHBOUR + 1 if {"precision", "recall"} & set(config.metrics) else 2
        if of.count and of.count < least:
            raise ValueError(f"{of.path}: holds {of.count}; expected {least} or more")
        if of.clips and of.shape[0] < MIN_FRAMES:
            raise ValueError(f"{of.path}: clips of {of.shape[0]} frames; fvd needs {MIN_FRAMES} or more")
    if samples.clips and samples.shape[0] != reference.shape[0]:
        frames = f"{samples.shape[0]} and {reference.shape[0]}"
        raise ValueError(f"fvd: expected clips of equally many frames, got {frames}")


def _read_prompts(config: MetricsConfig, samples: SampleSet) -> list[dict[str, Any]]:
    places = None if config.captions else _geneval_lines(samples)
    lines = _lines_of_file(config, samples) if places is None else [_only_line(place) for place in places]
    if "geneval" in config.metrics:
        for line, where in lines:
            check_line(line, where)
    return [line for line, _ in lines]


def _geneval_lines(samples: SampleSet) -> list[Path] | None:
    """The file with each picture's line, if they lie as GenEval writes them."""
    folders = [file.parent.parent for file in samples.files if file.parent.name == GENEVAL_PICTURES]
    if len(folders) < samples.count or any(folder.parent != samples.path for folder in folders):
        return None
    lines = [folder / GENEVAL_LINE for folder in folders]
    return lines if lines and lines[0].is_file() else None


def _only_line(path: Path) -> tuple[dict[str, Any], str]:
    lines = prompt_lines(path)
    if len(lines) != 1:
        raise ValueError(f"{path}: expected one line, that of the prompt of the pictures beside it")
    return lines[0][0], str(path)


def _lines_of_file(config: MetricsConfig, samples: SampleSet) -> list[tuple[dict[str, Any], str]]:
    """Those of the file of prompts, which take turns, each with its place."""
    _check_order(config, samples)
    path = config.captions or _find_prompts(config)
    lines = prompt_lines(path)
    if not lines or samples.count % len(lines):
        raise ValueError(
            f"{path}: {len(lines)} prompts for {samples.count} samples; expected one each, or every prompt equally "
            "often, taking turns"
        )
    return lines


def _check_order(config: MetricsConfig, samples: SampleSet) -> None:
    """Prompts go by a picture's place, which several folders do not tell."""
    folders = {file.parent for file in samples.files}
    if len(folders) > 1:
        users = ", ".join(config.need("prompts"))
        raise ValueError(
            f"{users}: {config.samples} holds pictures in {len(folders)} folders, which do not tell each one's prompt; "
            f"put them into one, prompts taking turns, or lay them out as GenEval does: PROMPT/{GENEVAL_LINE} beside "
            f"PROMPT/{GENEVAL_PICTURES}/"
        )


def _find_prompts(config: MetricsConfig) -> Path:
    """In the folder of the samples, or for OUT.npz in the folder OUT that ``dydit sample`` makes of it; or beside."""
    samples = config.samples
    folders = [samples if samples.is_dir() else samples.with_suffix(""), samples.parent]
    places = [folder / name for folder in folders for name in PROMPT_FILES]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        users, missing = ", ".join(config.need("prompts")), " and no ".join(map(str, places))
        raise ValueError(f"{users}: need the prompts; there is no {missing}: add --captions FILE")
    return found
