"""The supervisor of a launcher, and the batch script around it, with programs in the place of launchers and Slurm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dydit_scale.cluster.render import render
from dydit_scale.cluster.spec import ClusterSpec
from dydit_scale.train.exits import NOTES, Exit, note, verdict
from tests.parallel.launch import ROOT, child_environment

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "tests.cluster.supervised"]
    ran = subprocess.run(command, env=child_environment(), cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("done", Exit.DONE),
        ("config", Exit.BAD_CONFIG),
        ("failed", Exit.FAILED),
        ("stopped", Exit.STOPPED),
        ("while importing", Exit.STOPPED),
        ("abandoned", Exit.STOPPED),
        ("stubborn", Exit.FAILED),
    ],
)
def test_the_answer_is_that_of_the_ranks(results: dict[str, dict[str, Any]], case: str, code: Exit) -> None:
    assert len(results) == 7
    assert (results[case]["code"], results[case]["left"]) == (code, 0)
    assert results[case]["seconds"] < 60, "a rank was waited for to the end of its sleep"


def test_what_forbids_a_restart_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict(tmp_path) is None
    monkeypatch.setenv(NOTES, str(tmp_path))
    for rank, code, said in ((0, 0, 0), (1, 75, 75), (2, 74, 74), (3, 1, 1), (4, 71, 71), (5, 70, 70), (6, 64, 64)):
        monkeypatch.setenv("RANK", str(rank))
        note(code)
        assert verdict(tmp_path) == said
    monkeypatch.delenv(NOTES)
    note(1)  # nobody asks


STEP = """#!/usr/bin/env bash
# srun answers a SIGTERM by killing all tasks; the ranks leave with 75 when they see the stop file
trap 'kill -KILL $$' TERM
echo "srun $*" >> calls
for _ in $(seq {tenths}); do
    if [ -e stop ]; then exit 75; fi
    sleep 0.1
done
exit {code}
"""
# Slower than the ranks, so that they have left while the script is still in its trap.
STOP = """#!/usr/bin/env bash
echo "dydit $*" >> calls
touch stop
sleep 1
"""


@pytest.mark.parametrize(
    ("code", "failures", "asked", "status", "again"),
    [
        (0, 0, False, 0, False),
        (64, 0, False, 64, False),
        (71, 0, False, 71, False),
        (75, 0, False, 75, False),  # dydit stop by a person
        (0, 10, True, 0, True),  # the time limit comes; that is no failure
        (1, 9, False, 0, True),
        (1, 10, False, 1, False),
        (137, 0, False, 0, True),
    ],
)
def test_a_batch_script_goes_back_into_the_queue_when_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, failures: int, asked: bool, status: int, again: bool
) -> None:
    """srun, scontrol and dydit are stand-ins that note their words."""
    monkeypatch.chdir(ROOT)
    text = render("recipes/flux/dev_td_lora.yaml", [], ClusterSpec(target="slurm", nodes=4))
    monkeypatch.chdir(tmp_path)
    stand_ins = {
        "srun": STEP.format(tenths=300 if asked else 1, code=code),
        "scontrol": '#!/usr/bin/env bash\necho "scontrol $*" >> calls\n[ "$1" = requeue ] || echo node7\n',
        "dydit": STOP,
        "job": text,
    }
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    counted = tmp_path / "flux-dev-td-lora-17.failures"
    counted.write_text("1\n" * failures)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[7-10]"}
    job = subprocess.Popen(["bash", "job"], env=environment, cwd=tmp_path)
    calls = tmp_path / "calls"
    if asked:
        while not (calls.exists() and "srun" in calls.read_text()):
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == status
    said = calls.read_text()
    assert ("scontrol requeue 17" in said) == again
    assert ("dydit stop runs/flux/dev_td_lora" in said) == asked
    failed = code not in (0, 64, 71, 75)
    assert len(counted.read_text().splitlines()) == failures + failed
    assert "dydit_scale.cluster.supervise --grace=3600 -- torchrun" in said
