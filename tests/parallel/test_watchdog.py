"""A process without progress ends itself and says where it stood."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from dydit_scale.parallel import watchdog
from dydit_scale.parallel.watchdog import LimitsConfig, Phase, Watchdog
from dydit_scale.parallel.world import World

LIMITS = LimitsConfig(setup=60, step=1, evaluation=60, checkpoint=60)


def a_slow_step(folder: Path, phase: Phase, pauses: int) -> None:
    watchdog.TICK = 0.1
    with Watchdog(World(3, 4), folder, LIMITS, code=74) as dog:
        for _ in range(pauses):
            dog.enter(phase)
            time.sleep(0.4)
        if pauses == 1:
            dog.enter(phase)
            time.sleep(5)


def run(folder: Path, phase: Phase, pauses: int) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=a_slow_step, args=(folder, phase, pauses))
    process.start()
    process.join(60)
    return process.exitcode


def test_a_hang_is_ended_with_the_stacks_of_all_threads(tmp_path: Path) -> None:
    assert run(tmp_path / "run", "step", pauses=1) == 74
    text = (tmp_path / "run" / "stacks-rank-3.txt").read_text()
    assert text.startswith("watchdog: no progress in phase step for 1 s (limits.step)")
    assert "in a_slow_step" in text and "in _watch" in text


def test_the_stacks_of_a_folder_that_cannot_be_written_do_not_delay_the_end(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    assert run(tmp_path / "run", "step", pauses=1) == 74


def test_progress_and_long_phases_are_left_alone(tmp_path: Path) -> None:
    assert run(tmp_path, "step", pauses=5) == 0
    assert run(tmp_path, "evaluation", pauses=1) == 0
    assert list(tmp_path.iterdir()) == []


def test_it_gives_signs_of_life(tmp_path: Path) -> None:
    beats: list[float] = []
    with Watchdog(World(), tmp_path, LIMITS, code=74) as dog:
        dog.beat = lambda: beats.append(0.0)
        for _ in range(100):
            time.sleep(0.1)
            if beats:
                break
    assert beats


def test_limits_are_seconds() -> None:
    assert LimitsConfig(step=5, checkpoint=9, setup=7, evaluation=2).collective == 9
    with pytest.raises(ValueError, match=r"limits.step: expected seconds, 1 or more; got 0"):
        LimitsConfig(step=0)
