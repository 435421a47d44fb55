"""``dydit top``: what a frame shows of a made-up run, whose numbers are known."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dydit_scale.cli.main import main
from dydit_scale.monitoring.records import METRICS_FILE, RUN_FILE, rank_file
from dydit_scale.monitoring.view import frame
from dydit_scale.train.attempt import take_folder
from dydit_scale.workflows.top import Watched, watch

LAYERS = 40


def step_record(step: int) -> dict:
    return {
        "step": step, "loss": 1.0, "loss_flow": 0.25, "loss_supervision": 0.125, "ratio": 0.6, "target": 0.5,
        "grad_norm": 2.0, "lr": 1e-4, "seconds": 3.0, "data_seconds": 0.5, "data_wait": 0.3,
        "samples_per_second": 5.5, "goodput": 0.875, "loss_timestep": [0.5, None, 0.75, 0.0625],
        "mfu": {"activated": 0.21, "dense": 0.42}, "tflops": {"activated": 21.0, "dense": 42.0},
        "rank_seconds": {"min": 1.0, "mean": 1.5, "max": 2.0}, "slowest_rank": 1, "nonfinite": 3, "rollbacks": 0,
        "bad_samples": 0,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    attempt = take_folder(tmp_path, wait=0)
    about = {
        "name": "made-up", "token": attempt.token, "ranks": 12, "engine": "fsdp", "device": "cuda", "steps": 100,
        "peak_tflops": 100.0, "peak": "recipe", "restarts": {"killed": 2},
    }  # fmt: skip
    routers = {"heads": [[i / LAYERS, 1.0] for i in range(LAYERS)], "tokens": [[None, 0.5]] * LAYERS}
    records = [step_record(step) for step in range(30)]
    records[19] |= {"routers": routers, "dead_heads": 0.0625}
    records.insert(11, {
        "step": 9, "checkpoint_bytes": 3 << 20, "checkpoint_seconds": 4.5, "checkpoint_blocked_seconds": 0.25,
        "checkpoint_step": 10, "checkpoint_failures_total": 0,
    })  # fmt: skip
    records.append({"step": 29, "mse_eval": 0.3125, "ratio_eval": 0.59})
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / RUN_FILE).write_text(json.dumps(about))
    for rank in range(12):
        rank_file(tmp_path, rank).parent.mkdir(exist_ok=True)
        own = {"step": 28 if rank == 11 else 29, "rank_step_seconds": 3.0, "gpu_memory": 1 << 31}
        rank_file(tmp_path, rank).write_text(json.dumps(own) + "\n")
    return tmp_path


def drawn(run: Path, width: int = 110) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(frame(Watched(run).look()))
    return console.export_text()


def test_a_frame_shows_the_run(run: Path) -> None:
    text = drawn(run)
    for shown in (
        "made-up", "training, fsdp x 12 on cuda", "started again after killed (2)",
        "30 of 100 steps, 3.00 s each, 0:03:30 left",
        "0.6", "0.59 error 0.312", "0.25", "1.00e-04", "6.2%",
        "30.0%", "21.0%", "42 of 100, recipe", "87.5%", "step 10", "3.0 MiB, 4.5 s, blocked 0.25", "left out 3",
        "from 500", "0.75", "2.0 GiB", "4 more", "first forward after 1.00 to 2.00 s, last is rank 1",
    ):  # fmt: skip
        assert shown in text, shown
    lines = text.splitlines()
    ranks = [line for line in lines if "2.0 GiB" in line]
    assert len(ranks) == 8 and " 11 " in ranks[-1], "the slowest is among those shown"


def test_a_deep_network_shares_the_rows_of_the_map(run: Path) -> None:
    rows = [line for line in drawn(run).splitlines() if "·" in line]
    assert len(rows) == 14  # of 3 blocks each
    assert " 0-2  0 10 " in rows[0] and "39 10 10 " in rows[-1]
    assert all("·  5 " in row for row in rows)


@pytest.mark.parametrize("width", [80, 200])
def test_a_frame_fits_the_terminal(run: Path, width: int) -> None:
    assert max(len(line) for line in drawn(run, width).splitlines()) <= width


def test_a_run_that_goes_back_or_on_is_followed(run: Path) -> None:
    watched = Watched(run)
    assert len(watched.look().steps) == 30
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 10, "event": "rollback", "at": 30}\n')
        file.write(json.dumps(step_record(10)) + "\n")
    shot = watched.look()
    assert [record["step"] for record in shot.steps] == [*range(11)] and shot.last["step"] == 10
    draft = run / "draft"  # a resume
    draft.write_text(json.dumps(step_record(0)) + "\n")
    draft.replace(run / METRICS_FILE)
    assert [record["step"] for record in watched.look().steps] == [0]


def test_a_run_before_its_first_step_and_after_its_end(run: Path) -> None:
    (run / METRICS_FILE).unlink()
    assert "no step is trained yet" in drawn(run)
    (run / RUN_FILE).unlink()
    holder = json.loads((run / "attempt.json").read_text())
    (run / "attempt.json").write_text(json.dumps({**holder, "ended": "NotFiniteError"}))
    assert "ended (NotFiniteError)" in drawn(run)


def test_the_command_prints_one_frame_or_draws_it(
    run: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", str(run), "--once"]) == 0
    assert "30 of 100 steps" in capsys.readouterr().out
    svg = tmp_path_factory.mktemp("svg") / "top.svg"
    assert main(["top", str(run), "--once", "--svg", str(svg)]) == 0
    picture = svg.read_text()
    assert picture.startswith("<svg") and "made-up" in picture and "font-face" not in picture


def test_it_goes_on_until_interrupted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("dydit_scale.workflows.top.time.sleep", sleep)
    watch(run, every=0.5)
    assert pauses == [0.5] * 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["NONE"], "nothing has trained there"),
        (["RUN", "--every", "0"], "--every: expected seconds, more than 0"),
        (["RUN", "--svg", "x.svg"], "add --once"),
    ],
)
def test_bad_input_is_told(run: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"RUN": str(run), "NONE": str(run / "none")}
    assert main(["top", *(places.get(word, word) for word in words)]) == 64
    assert told in capsys.readouterr().err
