"""``dydit evaluate --samples``: metrics of pictures and clips on disk, by networks whose weights the user has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from dydit_scale.evaluation.batches import SampleSet
from dydit_scale.evaluation.clip import Clip
from dydit_scale.evaluation.detector import Detector, colours_of
from dydit_scale.evaluation.frechet import gaussian_distance, moments
from dydit_scale.evaluation.geneval import judge, summarise, wanted_names
from dydit_scale.evaluation.i3d import load_i3d, video_features
from dydit_scale.evaluation.inception import Inception, InceptionFeatures, load_inception
from dydit_scale.evaluation.statistics import SPLIT, inception_score, precision_recall
from dydit_scale.workflows.metric_inputs import Checked, MetricsConfig, check_inputs
from dydit_scale.workflows.runs import pick_device


class Row(NamedTuple):
    """One line of the result."""

    name: str
    value: float
    note: str = ""


def compute_metrics(config: MetricsConfig) -> list[Row]:
    """The metrics of ``config``, in the order in which they were asked for; those of GenEval one by one.

    Everything is checked before the first network is loaded. Raises ValueError for samples, a reference, prompts or
    weights that are missing, broken, or do not go together.
    """
    checked = check_inputs(config)
    device = str(pick_device(config.device))
    rows: dict[str, list[Row]] = {}
    if config.need("inception"):
        rows |= _by_inception(config, checked, device)
    if config.need("i3d"):
        rows["fvd"] = [_fvd(config, checked, device)]
    if config.need("clip"):
        rows |= _by_texts(config, checked, device)
    return [row for name in dict.fromkeys(config.metrics) for row in rows[name]]


def as_dict(config: MetricsConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """Plain values for JSON: the values by name, the notes, and what they are of."""
    return {
        "metrics": {row.name: row.value for row in rows},
        "notes": {row.name: row.note for row in rows if row.note},
        "samples": str(config.samples),
        "reference": None if config.reference is None else str(config.reference),
        "weights": {name: str(path) for name, path in config.weights.items()},
    }


def _by_inception(config: MetricsConfig, checked: Checked, device: str) -> dict[str, list[Row]]:
    network = load_inception(config.weights["inception"]).to(device)
    samples, reference = checked.samples, checked.reference
    ours = _inception_features(network, samples, config.batch, device)
    theirs, held = None, reference.statistics if reference else {}
    unread = {"fid": "mu" not in held, "sfid": "mu_s" not in held, "precision": True, "recall": True}
    if reference is not None and any(unread.get(name, False) for name in config.metrics):
        theirs = _inception_features(network, reference, config.batch, device)
    scaled = _scaled_note(samples, reference)
    rows = {}
    for name, part, (mean, cov) in (("fid", "pool", ("mu", "sigma")), ("sfid", "spatial", ("mu_s", "sigma_s"))):
        if name not in config.metrics:
            continue
        features = getattr(ours, part).numpy()
        other = (held[mean], held[cov]) if mean in held else moments(getattr(theirs, part).numpy())
        _check_width(name, reference, features, other[0])
        fewest = min(len(features), reference.count if reference and mean not in held else len(features))
        rows[name] = [Row(name, gaussian_distance(*moments(features), *other), _notes(_few(fewest, features), scaled))]
    if "is" in config.metrics:
        few = f"fewer than the usual {SPLIT}" if samples.count < SPLIT else ""
        rows["is"] = [Row("is", inception_score(ours.logits), few)]
    if theirs is not None and {"precision", "recall"} & set(config.metrics):
        shares = precision_recall(ours.pool.to(device), theirs.pool.to(device))
        note = _notes(f"against {len(theirs.pool)}", scaled)
        rows |= {name: [Row(name, share, note)] for name, share in shares._asdict().items()}
    return rows


def _inception_features(network: Inception, of: SampleSet, batch: int, device: str) -> InceptionFeatures:
    parts = []
    with torch.inference_mode():
        for pictures in _counted(of, batch, "Inception"):
            x = rearrange(torch.from_numpy(pictures.copy()).to(device), "n h w c -> n c h w")
            parts.append(InceptionFeatures(*(f.cpu() for f in network(x))))
    return InceptionFeatures(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _fvd(config: MetricsConfig, checked: Checked, device: str) -> Row:
    network = load_i3d(config.weights["i3d"], device)
    assert checked.reference is not None, "fvd without a reference passed the checks"
    sets = checked.samples, checked.reference
    ours, theirs = (
        torch.cat([video_features(network, clips, device) for clips in _counted(of, config.batch, "I3D")]).numpy()
        for of in sets
    )
    note = _notes(_few(min(len(ours), len(theirs)), ours), _scaled_note(*sets))
    return Row("fvd", gaussian_distance(*moments(ours), *moments(theirs)), note)


def _by_texts(config: MetricsConfig, checked: Checked, device: str) -> dict[str, list[Row]]:
    clip, lines = Clip(config.weights["clip"], device), checked.lines
    detector = Detector(config.weights["detector"], device) if "geneval" in config.metrics else None
    if detector is not None:
        detector.check_names({name for line in lines for name in wanted_names(line)})
    scores: list[Tensor] = []
    tags, correct, at = [], [], 0
    for pictures in _counted(checked.samples, config.batch, "texts"):
        wanted = [lines[(at + i) % len(lines)] for i in range(len(pictures))]
        at += len(pictures)
        if "clip" in config.metrics:
            scores.append(clip.scores(pictures, [line["prompt"] for line in wanted]))
        if detector is not None:
            tags += [line["tag"] for line in wanted]
            correct += [_is_correct(detector, clip, p, line) for p, line in zip(pictures, wanted, strict=True)]
    rows = {}
    if scores:
        found = torch.cat(scores).double()
        error = f"± {(found.std() / len(found) ** 0.5).item():.2g}" if len(found) > 1 else ""
        rows["clip"] = [Row("clip", found.mean().item(), error)]
    if detector is not None:
        shares = summarise(tags, correct)
        overall = Row("geneval", shares.pop("overall"), "mean over the kinds of prompts")
        by_tag = [Row(f"geneval {tag}", share, f"of {tags.count(tag)}") for tag, share in shares.items()]
        rows["geneval"] = [overall, *by_tag]
    return rows


def _is_correct(detector: Detector, clip: Clip, picture: np.ndarray, line: Mapping[str, Any]) -> bool:
    return judge(detector.detect(picture), line, lambda things, name: colours_of(clip, picture, things, name)).correct


def _counted(of: SampleSet, batch: int, what: str) -> Iterator[np.ndarray]:
    """The batches of a set, with a bar that counts its samples."""
    with tqdm(total=of.count, desc=f"{what}: {of.path.name}", unit="clip" if of.clips else "picture") as bar:
        for pictures in of.batches(batch):
            yield pictures
            bar.update(len(pictures))


def _few(count: int, features: np.ndarray) -> str:
    width = features.shape[1]
    return f"{count} samples for {width} features: the estimate is too high" if count <= width else ""


def _scaled_note(samples: SampleSet, reference: SampleSet | None) -> str:
    if reference is None or not reference.count or reference.shape == samples.shape:
        return ""
    return f"samples are {samples.size}, the reference {reference.size}"


def _check_width(name: str, reference: SampleSet | None, features: np.ndarray, mean: np.ndarray) -> None:
    if features.shape[1] != len(mean):
        where = reference.path if reference else "reference"
        raise ValueError(f"{where}: statistics for {name} of {len(mean)} features, expected {features.shape[1]}")


def _notes(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
