"""A run's folder has one writer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dydit_scale.train import attempt
from dydit_scale.train.attempt import ATTEMPT_FILE, FolderInUseError, Holder, read_holder, take_folder


def holder(folder: Path) -> Holder:
    found = read_holder(folder)
    assert found is not None
    return found


def rewrite(folder: Path, *, age: float = 0.0, **changes: object) -> None:
    file = folder / ATTEMPT_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    at = file.stat().st_mtime - age
    os.utime(file, (at, at))


def test_a_folder_in_use_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    said: list[str] = []
    first = take_folder(tmp_path, wait=0)
    with pytest.raises(FolderInUseError, match=rf"in use by process {os.getpid()} on .*dydit stop {tmp_path} --wait"):
        take_folder(tmp_path, wait=0.2, say=said.append)
    assert len(said) == 1 and "waiting" in said[0]
    first.still_ours()
    first.end("done")
    assert not holder(tmp_path).lives(tmp_path) and holder(tmp_path).ended == "done"
    second = take_folder(tmp_path, wait=0)
    second.still_ours()
    with pytest.raises(FolderInUseError, match="taken over by process"):
        first.still_ours()
    first.end("late")
    first.beat()
    assert holder(tmp_path).token == second.token and holder(tmp_path).ended is None
    assert first.lost() and not second.lost()


def test_a_dead_process_of_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    take_folder(tmp_path, wait=0)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        rewrite(tmp_path, pid=process.pid)
        process.wait()
        second = take_folder(tmp_path, wait=0)  # a zombie at most
        assert holder(tmp_path).token == second.token
    rewrite(tmp_path, pid=1, pid_started="a number used again")
    third = take_folder(tmp_path, wait=0)
    assert holder(tmp_path).token == third.token and second.lost()


@pytest.mark.parametrize(("age", "lives"), [(0.0, True), (attempt.STALE / 2, True), (attempt.STALE * 2, False)])
def test_a_process_of_another_machine_counts_by_its_signs_of_life(tmp_path: Path, age: float, lives: bool) -> None:
    first = take_folder(tmp_path, wait=0)
    rewrite(tmp_path, space="another machine", pid=1, age=age)
    assert holder(tmp_path).lives(tmp_path) == lives
    if not lives:
        first.beat()
        assert holder(tmp_path).lives(tmp_path)


def test_a_holder_that_leaves_in_time_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = take_folder(tmp_path, wait=0)
    monkeypatch.setattr(attempt.time, "sleep", lambda seconds: first.end("done"))
    second = take_folder(tmp_path, wait=60, say=lambda text: None)
    assert holder(tmp_path).token == second.token and first.lost()


def test_a_removed_or_unreadable_file_is_nobodys(tmp_path: Path) -> None:
    ours = take_folder(tmp_path, wait=0)
    (tmp_path / ATTEMPT_FILE).unlink()
    with pytest.raises(FolderInUseError, match=r"someone who removed attempt\.json"):
        ours.still_ours()
    (tmp_path / ATTEMPT_FILE).write_text("{")
    take_folder(tmp_path, wait=0).still_ours()
    assert str(replace(holder(tmp_path), host="node-7", pid=12, began=0)) == (
        "process 12 on node-7, since 1970-01-01 00:00:00 UTC"
    )
