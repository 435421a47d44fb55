"""Metrics of samples on disk: their values are the library's on the same features, and all faults are told before any
network is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from dydit_scale.cli.main import main
from dydit_scale.evaluation.batches import open_set
from dydit_scale.evaluation.frechet import moments
from dydit_scale.evaluation.statistics import precision_recall
from dydit_scale.workflows import metric_inputs
from dydit_scale.workflows import metrics as workflow
from dydit_scale.workflows.metric_inputs import METRICS, MetricsConfig
from tests.evaluation.tiny_networks import (
    TinyI3D,
    TinyInception,
    do_without_scipy,
    write_clip,
    write_detector,
    write_i3d,
)

PICTURE_METRICS = ["fid", "sfid", "is", "precision", "recall"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> TinyInception:
    """The network that stands in for Inception."""
    network = TinyInception()
    monkeypatch.setattr(workflow, "load_inception", lambda path: network)
    return network


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Samples, a reference, and files that are looked for but not read."""
    np.savez(tmp_path / "samples.npz", pixels(40))
    np.savez(tmp_path / "reference.npz", pixels(50, seed=1) // 2 + 60)
    (tmp_path / "inception.pth").write_bytes(b"read by nobody")
    return tmp_path


def pixels(count: int, *, seed: int = 0, shape: tuple[int, ...] = (12, 12, 3)) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, *shape)).astype(np.uint8)


def run(folder: Path, *options: object) -> dict[str, Any]:
    """What the command writes for the samples in ``folder``."""
    out = folder / "out.json"
    words = ["evaluate", "--samples", folder / "samples.npz", *options, "--out", out, "--device", "cpu", "--batch", 16]
    assert main([str(word) for word in words]) == 0
    return json.loads(out.read_text())


def load(folder: Path, name: str) -> torch.Tensor:
    return torch.from_numpy(np.load(folder / name)["arr_0"]).movedim(-1, 1)


class Part(nn.Module):
    """One of the small network's features, for torchmetrics."""

    def __init__(self, network: TinyInception, name: str, width: int) -> None:
        super().__init__()
        self.network, self.name, self.num_features = network, name, width

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return getattr(self.network(pictures), self.name).double()


@pytest.mark.filterwarnings("ignore:.*InceptionScore.*:UserWarning")
def test_values_are_the_librarys(small: TinyInception, folder: Path) -> None:
    weights = f"inception={folder / 'inception.pth'}"
    found = run(folder, "--reference", folder / "reference.npz", "--weights", weights)["metrics"]
    assert list(found) == PICTURE_METRICS
    ours, theirs = load(folder, "samples.npz"), load(folder, "reference.npz")
    for name, part, width in (("fid", "pool", 6), ("sfid", "spatial", 8)):
        library = FrechetInceptionDistance(feature=Part(small, part, width))
        library.update(theirs, real=True)
        library.update(ours, real=False)
        assert found[name] == pytest.approx(library.compute().item(), rel=1e-6)
    score = InceptionScore(feature=Part(small, "logits", 6), splits=1)
    score.update(ours)
    assert found["is"] == pytest.approx(score.compute()[0].item(), rel=1e-6)
    shares = precision_recall(small(ours).pool, small(theirs).pool)
    assert (found["precision"], found["recall"]) == shares


def test_a_folder_counts_as_its_npz_and_notes_tell_what_to_doubt(
    small: TinyInception, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = f"inception={folder / 'inception.pth'}"
    (folder / "pictures").mkdir()
    for number, picture in enumerate(np.load(folder / "reference.npz")["arr_0"]):
        Image.fromarray(picture).save(folder / "pictures" / f"{number:03}.png")
    by_file = run(folder, "--reference", folder / "reference.npz", "--weights", weights)
    assert run(folder, "--reference", folder / "pictures", "--weights", weights)["metrics"] == by_file["metrics"]
    assert by_file["notes"]["is"] == "fewer than the usual 5000" and "fid" not in by_file["notes"]
    np.savez(folder / "reference.npz", pixels(5, shape=(16, 16, 3)))
    capsys.readouterr()
    told = run(folder, "--reference", folder / "reference.npz", "--weights", weights, "--metrics", "fid")["notes"][
        "fid"
    ]
    assert told == "5 samples for 6 features: the estimate is too high; samples are 12 x 12, the reference 16 x 16"
    assert re.search(r"^fid +\d+\.\d{4}  5 samples for 6", capsys.readouterr().out, re.MULTILINE)


def test_statistics_stand_for_the_reference(small: TinyInception, folder: Path) -> None:
    weights = f"inception={folder / 'inception.pth'}"
    names = ["--metrics", "sfid", "fid"]
    expected = run(folder, "--reference", folder / "reference.npz", "--weights", weights, *names)["metrics"]
    features = small(load(folder, "reference.npz"))
    (mu, sigma), (mu_s, sigma_s) = (moments(f.numpy()) for f in (features.pool, features.spatial))
    np.savez(folder / "adm.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    found = run(folder, "--reference", folder / "adm.npz", "--weights", weights, *names)["metrics"]
    assert list(found) == ["sfid", "fid"] and found == pytest.approx(expected, rel=1e-9)
    # They count even where pixels are there: ADM's files hold but a part of those.
    np.savez(folder / "adm.npz", pixels(20), mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    assert run(folder, "--reference", folder / "adm.npz", "--weights", weights, *names)["metrics"] == found
    np.savez(folder / "adm.npz", mu=mu[:3], sigma=sigma[:3, :3])
    with pytest.raises(ValueError, match=r"adm\.npz: statistics for fid of 3 features, expected 6"):
        workflow.compute_metrics(config(folder, reference=folder / "adm.npz", metrics=["fid"]))


def test_fvd_is_the_librarys_value(folder: Path) -> None:
    clips, reference = pixels(30, shape=(10, 8, 8, 3)), pixels(20, seed=1, shape=(10, 8, 8, 3)) // 2
    np.savez(folder / "samples.npz", clips)
    np.savez(folder / "reference.npz", reference)
    words = ["--metrics", "fvd", "--trust-torchscript", "--weights", f"i3d={write_i3d(folder / 'i3d.pt')}"]
    found = run(folder, "--reference", folder / "reference.npz", *words)["metrics"]["fvd"]
    network = TinyI3D().requires_grad_(False)

    def features(clips: np.ndarray) -> torch.Tensor:
        return network(torch.from_numpy(clips).movedim(-1, 1).float(), True, True, True).double()

    identity = nn.Identity()
    identity.num_features = 12
    library = FrechetInceptionDistance(feature=identity)
    library.update(features(reference), real=True)
    library.update(features(clips), real=False)
    assert found == pytest.approx(library.compute().item(), rel=1e-4)


def test_texts_take_turns_and_geneval_is_told_by_kind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    do_without_scipy(monkeypatch)
    monkeypatch.setattr(metric_inputs, "find_spec", lambda name: name)
    lines = [
        {"tag": "single_object", "prompt": "a dog", "include": [{"class": "dog", "count": 1}]},
        {
            "tag": "two_object",
            "prompt": "a dog and a tie",
            "include": [{"class": n, "count": 1} for n in ("dog", "tie")],
        },
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    np.savez(folder / "samples.npz", pixels(4, shape=(32, 32, 3)))
    weights = [f"clip={write_clip(folder / 'clip')}", f"detector={write_detector(folder / 'detector')}"]
    found = run(folder, "--metrics", "clip", "geneval", "--weights", *weights)
    values = found["metrics"]
    # The detector sees dogs wherever it looks, and nothing else.
    assert values["geneval single_object"] == 1 and values["geneval two_object"] == 0 and values["geneval"] == 0.5
    assert found["notes"]["geneval two_object"] == "of 2"
    clip = workflow.Clip(folder / "clip")
    scores = clip.scores(pixels(4, shape=(32, 32, 3)), ["a dog", "a dog and a tie"] * 2)
    assert values["clip"] == pytest.approx(scores.mean().item(), abs=1e-3)
    (folder / "captions.txt").write_text("a tie\n\n")
    other = run(folder, "--metrics", "clip", "--weights", *weights, "--captions", folder / "captions.txt")["metrics"]
    assert other["clip"] != values["clip"]


def config(folder: Path, **changes: Any) -> MetricsConfig:
    given = {
        "samples": folder / "samples.npz",
        "reference": folder / "reference.npz",
        "weights": {"inception": folder / "inception.pth"},
        "device": "cpu",
    }
    return MetricsConfig(**(given | changes))


def save(name: str, *arrays: np.ndarray, **named: np.ndarray) -> Callable[[Path], object]:
    return lambda folder: np.savez(folder / name, *arrays, **named)


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


CLIPS = pixels(4, shape=(10, 8, 8, 3))
FAULTS: dict[str, tuple[list[Callable[[Path], object]], dict[str, Any], str]] = {
    "unknown metric": ([], {"metrics": ["fidd"]}, "unknown metric 'fidd'; did you mean fid? There are fid, sfid"),
    "unknown weights": (
        [],
        {"weights": {"incepton": Path("x")}},
        "unknown weights 'incepton'; did you mean inception?",
    ),
    "no metric": ([], {"metrics": []}, "metrics: expected at least one of fid"),
    "batch": ([], {"batch": 0}, "batch: expected 1 or more, got 0"),
    "no reference": (
        [],
        {"reference": None},
        "fid, sfid, precision, recall: need something to compare with; add --ref",
    ),
    "no weights": (
        [],
        {"weights": {}},
        "need the weights 'inception', and nothing is fetched by itself. Get weights-inc",
    ),
    "wrong weights": ([], {"weights": {"inception": Path("none.pth")}}, "weights inception: there is no file none.pth"),
    "no samples": ([], {"samples": Path("none")}, "none: expected a folder of pictures or clips"),
    "statistics as samples": (
        [save("samples.npz", mu=np.zeros(2), sigma=np.eye(2))],
        {},
        "holds statistics alone; samples need their pixels",
    ),
    "clips": ([save("samples.npz", CLIPS)], {}, "fid: is a metric of pictures, "),
    "pictures": (
        [],
        {"metrics": ["fvd"], "weights": {"i3d": Path(__file__)}, "trust_torchscript": True},
        "fvd: is a metric of clips",
    ),
    "torchscript": ([], {"metrics": ["fvd"], "weights": {"i3d": Path(__file__)}}, "add --trust-torchscript"),
    "reference of clips": ([save("reference.npz", CLIPS)], {}, "holds pictures, "),
    "few": ([save("reference.npz", pixels(3))], {}, "holds 3; expected 4 or more"),
    "no statistics of space": (
        [save("reference.npz", mu=np.zeros(6), sigma=np.eye(6))],
        {"metrics": ["fid", "sfid"]},
        "sfid: needs the reference's pixels",
    ),
    "statistics for recall": (
        [save("reference.npz", mu=np.zeros(6), sigma=np.eye(6))],
        {"metrics": ["recall"]},
        "recall: needs the reference's pixels, but",
    ),
    "short clips": (
        [save("samples.npz", CLIPS[:, :9]), save("reference.npz", CLIPS)],
        {"metrics": ["fvd"], "weights": {"i3d": Path(__file__)}, "trust_torchscript": True},
        "clips of 9 frames; fvd needs 10 or more",
    ),
    "other frames": (
        [save("samples.npz", CLIPS), save("reference.npz", np.concatenate([CLIPS, CLIPS], 1))],
        {"metrics": ["fvd"], "weights": {"i3d": Path(__file__)}, "trust_torchscript": True},
        "fvd: expected clips of equally many frames, got 10 and 20",
    ),
    "no prompts": (
        [],
        {"metrics": ["clip"], "weights": {"clip": Path()}},
        "samples/prompts.txt and no ",
    ),
    "no such prompts": (
        [],
        {"metrics": ["clip"], "weights": {"clip": Path()}, "captions": Path("none.txt")},
        "none.txt: there is no such file",
    ),
    "odd prompts": (
        [write("prompts.txt", "a\nb\nc\n")],
        {"metrics": ["clip"], "weights": {"clip": Path()}},
        "3 prompts for 40 samples",
    ),
    "no json": (
        [write("prompts.jsonl", "a dog\n")],
        {"metrics": ["clip"], "weights": {"clip": Path()}},
        "prompts.jsonl: line 1: not JSON",
    ),
    "no prompt": (
        [write("prompts.jsonl", '{"text": 1}\n')],
        {"metrics": ["clip"], "weights": {"clip": Path()}},
        'line 1: expected an object with "prompt"',
    ),
    "no scipy": (
        [],
        {"metrics": ["geneval"], "weights": {"clip": Path(), "detector": Path()}},
        "geneval: the detector needs SciPy; run `pip install 'dydit_scale[metrics]'`",
    ),
    "no metadata": (
        [write("prompts.txt", "a dog\n")],
        {"metrics": ["geneval"], "weights": {"clip": Path(), "detector": Path()}},
        "prompts.txt: line 1: expected GenEval metadata",
    ),
}


def test_prompts_are_found_where_sampling_leaves_them(folder: Path) -> None:
    (folder / "prompts.txt").write_text("beside\n")
    wanted, samples = config(folder, metrics=["clip"]), open_set(folder / "samples.npz")
    assert metric_inputs._read_prompts(wanted, samples) == [{"prompt": "beside"}]
    (folder / "samples").mkdir()
    (folder / "samples" / "prompts.txt").write_text("a dog\na cat\n")
    assert metric_inputs._read_prompts(wanted, samples) == [{"prompt": "a dog"}, {"prompt": "a cat"}]


def by_prompt(folder: Path, inner: str = "") -> Path:
    """Two pictures in each of two folders, and a grid of them if they lie in a folder ``inner``."""
    for prompt in ("00000", "00001"):
        (folder / prompt / inner).mkdir(parents=True)
        for n in range(2):
            Image.new("RGB", (8, 8)).save(folder / prompt / inner / f"{n:04d}.png")
        if inner:
            Image.new("RGB", (16, 8)).save(folder / prompt / "grid.png")
    return folder


def test_pictures_in_folders_by_prompt_are_refused(folder: Path) -> None:
    samples = by_prompt(folder / "pictures")
    (folder / "prompts.txt").write_text("a dog\na cat\n")
    wanted = config(folder, samples=samples, metrics=["clip"])
    with pytest.raises(ValueError, match=r"clip: .*pictures holds pictures in 2 folders, which do not tell"):
        metric_inputs._read_prompts(wanted, open_set(samples))


def test_genevals_folders_tell_the_prompts(folder: Path) -> None:
    samples = by_prompt(folder / "geneval", "samples")
    lines = [
        {"tag": "single_object", "prompt": f"a {n}", "include": [{"class": n, "count": 1}]} for n in ("dog", "tie")
    ]
    for number, line in enumerate(lines):
        (samples / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps(line))
    found = open_set(samples)
    assert found.count == 4 and found.shape == (8, 8, 3)  # without the grids
    wanted = config(folder, samples=samples, metrics=["clip", "geneval"])
    assert metric_inputs._read_prompts(wanted, found) == [lines[0], lines[0], lines[1], lines[1]]

    (folder / "own.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match="in 2 folders, which do not tell"):
        metric_inputs._read_prompts(
            config(folder, samples=samples, metrics=["clip"], captions=folder / "own.txt"), found
        )
    (samples / "00001" / "metadata.jsonl").write_text('{"prompt": "a tie"}\n')
    with pytest.raises(ValueError, match=r"00001/metadata.jsonl: expected GenEval metadata"):
        metric_inputs._read_prompts(wanted, found)
    (samples / "00001" / "metadata.jsonl").write_text(f"{json.dumps(lines[1])}\n" * 2)
    with pytest.raises(ValueError, match=r"00001/metadata.jsonl: expected one line"):
        metric_inputs._read_prompts(wanted, found)
    (samples / "00001" / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"geneval: no metadata.jsonl in 00001, as"):
        open_set(samples)


def test_every_metric_needs_weights_that_are_described() -> None:
    assert len(METRICS) == 8
    for need in METRICS.values():
        assert need.weights


def test_the_command_wants_a_run_or_samples(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words in ([], [str(tmp_path), "--samples", str(tmp_path)]):
        assert main(["evaluate", *words]) == 64
        assert "expected either a RUN, or --samples" in capsys.readouterr().err
    assert main(["evaluate", "--samples", "none", "--out", str(tmp_path / "none" / "out.json")]) == 64
    assert "--out: there is no folder" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), "--out", "a.json", "--trust-torchscript"]) == 64
    assert "--trust-torchscript, --out: not an option of evaluating a RUN" in capsys.readouterr().err
    assert main(["evaluate", "--samples", "none", "--cfg", "3"]) == 64
    assert "--cfg: not an option of evaluating --samples" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "--samples", "none", "--weights", "inception"])
    assert "expected NAME=PATH" in capsys.readouterr().err
