"""Two ranks under real launchers: they stop together, and none is left behind when the other goes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from dydit_scale.checkpoint.store import load_checkpoint
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.train.__main__ import main
from dydit_scale.train.attempt import Holder, read_holder
from dydit_scale.train.exits import Exit
from dydit_scale.workflows.stop import stop_run
from tests.parallel.launch import ROOT, child_environment, free_port
from tests.train.small_run import small_world

BIN = Path(sys.executable).parent
PATIENCE = 240.0
"""Seconds within which anything here has happened, or never will."""
ENDLESS = ("train.steps=100000", "train.evaluate_every=0", "train.save_every=0")

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_world(tmp_path_factory.mktemp("small"))


def until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s for {what}"
        time.sleep(0.2)


def steps_of(run: Path) -> list[int]:
    return [r["step"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def holder_of(run: Path) -> Holder:
    holder = read_holder(run)
    assert holder is not None
    return holder


@contextmanager
def job(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """One process, in a group of its own that is killed in the end."""
    environment = child_environment() | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | environment
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def two_ranks(
    recipe: Path,
    run: Path,
    *words: str,
    fault: str = "",
    of_rank: tuple[str, str] = ("", ""),
    awaited: tuple[int, ...] = (0, 1),
) -> list[int]:
    """Both ranks without a launcher, to the end of those ``awaited``: their exit codes. Logs lie beside ``run``."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "DYDIT_FAULT": fault}
    commands = [
        [sys.executable, "-m", "dydit_scale.train", str(recipe), f"run={run}", *words, *filter(None, [own])]
        for own in of_rank
    ]
    logs = [run.parent / f"{run.name}-{rank}.log" for rank in (0, 1)]
    with (
        job(commands[0], logs[0], RANK="0", LOCAL_RANK="0", **meeting) as first,
        job(commands[1], logs[1], RANK="1", LOCAL_RANK="1", **meeting) as second,
    ):
        return [(first, second)[rank].wait(PATIENCE) for rank in awaited]


@contextmanager
def fits_and_starts(rank: int) -> Iterator[list[int]]:
    """Suspend the process of ``rank`` for a third of a second, again and again; yields the pauses so far."""
    pauses: list[int] = []
    over = threading.Event()

    def pause() -> None:
        while not over.wait(0.3):
            for child in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):
                    if child.environ().get("RANK") == str(rank):
                        child.suspend()
                        over.wait(0.3)
                        child.resume()
                        pauses.append(child.pid)

    thread = threading.Thread(target=pause)
    thread.start()
    try:
        yield pauses
    finally:
        over.set()
        thread.join()


def said(run: Path) -> str:
    return "\n".join((run.parent / f"{run.name}-{rank}.log").read_text(errors="replace") for rank in (0, 1))


@pytest.mark.parametrize("engine", ["zero", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_both_at_the_same_step(recipe: Path, tmp_path: Path, engine: str) -> None:
    run = tmp_path / "run"
    codes = two_ranks(recipe, run, f"engine.name={engine}", *ENDLESS, fault="train.step=2@rank1:term")
    assert codes == [Exit.STOPPED, Exit.STOPPED], said(run)[-3000:]
    assert "stopped before step 3 of 100000 by SIGTERM on rank 1" in said(run)
    checkpoint = load_checkpoint(run / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 3 == len(steps_of(run))


def test_a_signal_to_one_rank_during_set_up_stops_both(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes = two_ranks(recipe, run, "engine.name=fsdp", *ENDLESS, fault="train.start@rank1:term")
    assert codes == [Exit.STOPPED, Exit.STOPPED], said(run)[-3000:]
    assert "stopped during set-up by a request to another rank" in said(run)
    assert not (run / "checkpoints").exists()


@pytest.mark.slow  # two processes and the wait for a limit; tests/parallel has the watchdog alone
def test_a_hanging_rank_is_ended_and_its_stacks_are_kept(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("engine.name=fsdp", "limits.step=20", *ENDLESS)
    codes = two_ranks(recipe, run, *words, fault="train.step=2@rank1:hang")
    assert codes[1] == Exit.STUCK, said(run)[-3000:]
    assert codes[0] != Exit.DONE  # the watchdog, or the connection that breaks when its peer leaves first
    assert "in fail_point" in (run / "stacks-rank-1.txt").read_text()
    assert "no progress in phase step for 20 s (limits.step)" in said(run)


@pytest.mark.slow  # two processes and the wait for a limit
def test_nobody_waits_for_a_suspended_rank(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("engine.name=fsdp", "limits.step=10", *ENDLESS)
    assert two_ranks(recipe, run, *words, fault="train.step=2@rank1:stop", awaited=(0,)) == [Exit.STUCK]
    assert "no progress in phase step for 10 s" in said(run)
    assert "in train_step" in (run / "stacks-rank-0.txt").read_text()


@pytest.mark.slow  # two processes, twice
def test_a_rank_that_is_slow_now_and_then_fails_nothing(recipe: Path, tmp_path: Path) -> None:
    run, even = tmp_path / "run", tmp_path / "even"
    words = ("engine.name=fsdp", "train.steps=12", "train.evaluate_every=0")
    assert two_ranks(recipe, even, *words) == [Exit.DONE, Exit.DONE], said(even)[-3000:]
    with fits_and_starts(rank=1) as pauses:
        assert two_ranks(recipe, run, *words) == [Exit.DONE, Exit.DONE], said(run)[-3000:]
    assert len(pauses) > 5
    losses = [[r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r] for folder in (run, even)]
    assert losses[0] == losses[1] and len(losses[0]) == 12


@pytest.mark.slow  # two processes
def test_a_killed_data_worker_ends_the_run(recipe: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "dydit_scale.train", str(recipe), f"run={run}", "data.workers=1", *ENDLESS]
    with job(command, log) as process:
        until(lambda: len(steps_of(run)) > 1, "two steps")
        for worker in children_of(process.pid):
            os.kill(worker, signal.SIGKILL)
        assert process.wait(PATIENCE) == Exit.FAILED
    assert "DataLoader worker" in log.read_text(errors="replace")


@pytest.mark.slow  # a process
def test_process_number_one_of_a_container_heeds_a_signal(recipe: Path, tmp_path: Path) -> None:
    container = ["unshare", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*container, "true"], capture_output=True).returncode:
        pytest.skip("may not make a namespace of processes")
    run, log = tmp_path / "run", tmp_path / "log"
    command = [*container, sys.executable, "-m", "dydit_scale.train", str(recipe), f"run={run}", *ENDLESS]
    with job(command, log) as process:
        until(lambda: len(steps_of(run)) > 1, "two steps")
        assert holder_of(run).pid == 1
        for first in children_of(process.pid):
            os.kill(first, signal.SIGTERM)
        assert process.wait(PATIENCE) == Exit.STOPPED, log.read_text(errors="replace")[-2000:]
    checkpoint = load_checkpoint(run / "checkpoints")
    assert checkpoint is not None and checkpoint.step == len(steps_of(run))


@pytest.mark.slow  # a launcher and its processes
def test_the_deepspeed_launcher_process_passes_a_signal_on(recipe: Path, tmp_path: Path) -> None:
    """It tells one rank after the other, each after the one before has left; the ranks agree at once."""
    run, log = tmp_path / "run", tmp_path / "log"
    launcher = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "--module"]
    with job([*launcher, "dydit_scale.train", str(recipe), f"run={run}", "engine.name=zero", *ENDLESS], log) as process:
        until(lambda: len(steps_of(run)) > 1, "two steps")
        for child in children_of(process.pid):
            os.kill(child, signal.SIGTERM)
        process.wait(PATIENCE)
        until(lambda: holder_of(run).ended is not None, "the end of rank 0")
    assert holder_of(run).ended == "Stopped"
    checkpoint = load_checkpoint(run / "checkpoints")
    assert checkpoint is not None and checkpoint.step == len(steps_of(run))


@pytest.mark.slow  # two processes; the kill loops do nothing else
def test_a_killed_rank_takes_the_other_with_it(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes = two_ranks(recipe, run, "engine.name=zero", *ENDLESS, fault="train.step=2@rank1:kill")
    assert codes[1] == -signal.SIGKILL and codes[0] not in (Exit.DONE, Exit.BAD_CONFIG), said(run)[-3000:]
    assert steps_of(run) == [0, 1]


@pytest.mark.parametrize("engine", [pytest.param("zero", marks=pytest.mark.slow), "fsdp"])
def test_a_loss_that_is_not_finite_on_one_rank_is_left_out_by_both(recipe: Path, tmp_path: Path, engine: str) -> None:
    run = tmp_path / "run"
    fault = "train.loss=2@rank1:nan,train.loss=3@rank1:nan"
    words = (f"engine.name={engine}", "train.evaluate_every=0", "guard.refused=2")
    assert two_ranks(recipe, run, *words, fault=fault) == [Exit.DONE, Exit.DONE], said(run)[-3000:]
    assert steps_of(run) == [0, 1, 2, 3, 2, 3]
    checkpoint = load_checkpoint(run / "checkpoints")
    assert checkpoint is not None and checkpoint.meta["consumed"] == 48
    assert int(checkpoint.tensors["count.optimizer"]) == 4
    rows = json.loads((run / "bad-batch-0000003-1.json").read_text())
    assert [(row["rank"], row["step"], row["positions"][0]) for row in rows] == [
        (0, 2, 16), (0, 3, 24), (1, 2, 20), (1, 3, 28),
    ]  # fmt: skip


def test_ranks_that_disagree_are_refused_with_what_differs(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes = two_ranks(recipe, run, "engine.name=fsdp", of_rank=("train.lr=1e-3", "train.lr=2e-3"))
    assert codes == [Exit.BAD_CONFIG, Exit.BAD_CONFIG], said(run)[-3000:]
    assert said(run).count("recipe train.lr: 0.001 on rank 0; 0.002 on rank 1") == 2
    assert not run.exists()


@pytest.mark.slow  # a launcher and its processes
def test_torchrun_passes_a_signal_on_and_a_second_job_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    launcher = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port())]
    # torchrun signals process groups: the workers that read data hear it too
    words = [str(recipe), f"run={run}", "engine.name=fsdp", "data.workers=1", *ENDLESS]
    with job([*launcher, "-m", "dydit_scale.train", *words], log) as process:
        until(lambda: len(steps_of(run)) > 1, "two steps")
        assert main([str(recipe), f"run={run}", "limits.takeover=0.5"]) == Exit.FAILED
        assert f"run {run}: in use by process {holder_of(run).pid}" in capsys.readouterr().err
        process.terminate()
        assert process.wait(PATIENCE) != 0
    text = log.read_text(errors="replace")
    assert "SIGTERM on rank 0, SIGTERM on rank 1; the state is saved" in text, text[-3000:]
    checkpoint = load_checkpoint(run / "checkpoints")
    assert checkpoint is not None and checkpoint.step == len(steps_of(run)) > 1
    assert holder_of(run).ended == "Stopped"


@pytest.mark.slow  # a launcher and its processes
def test_the_deepspeed_runner_keeps_a_signal_to_itself_and_the_stop_file_helps(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    launcher = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "--module"]
    words = [str(recipe), f"run={run}", "engine.name=zero", *ENDLESS]
    with job([*launcher, "dydit_scale.train", *words], log) as process:
        until(lambda: len(steps_of(run)) > 1, "two steps")
        process.terminate()
        assert process.wait(PATIENCE) != 0
        trained = len(steps_of(run))
        until(lambda: len(steps_of(run)) > trained + 1, "steps of the ranks that nobody told")
        try:
            assert stop_run(run, wait=True, timeout=PATIENCE)
        finally:
            if holder_of(run).lives(run):
                os.killpg(process.pid, signal.SIGKILL)
    assert "it has left (Stopped)" in capsys.readouterr().out
    checkpoint = load_checkpoint(run / "checkpoints")
    assert checkpoint is not None and checkpoint.step == len(steps_of(run))
