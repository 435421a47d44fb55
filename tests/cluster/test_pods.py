"""Two pods as Kubernetes would start them: each a network of its own, the names of the headless Service in its hosts
file, the words and variables of the rendered manifest. Not there: tini, mounts, and a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dydit_scale.checkpoint.store import load_checkpoint
from dydit_scale.cluster.command import RECIPE_FILE, WORKDIR
from dydit_scale.cluster.pod import INDEX
from dydit_scale.cluster.render import render
from dydit_scale.cluster.spec import ClusterSpec
from dydit_scale.cluster.validate import check_documents
from dydit_scale.cluster.workload import Workload, at, read_workload
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.train.attempt import read_holder
from dydit_scale.train.exits import Exit
from tests.faults.nodes import CABLE, Nodes, why_not
from tests.faults.processes import wait_until
from tests.parallel.launch import child_environment, free_port
from tests.train.small_run import small_recipe, small_world

PROBLEM = why_not()
PATIENCE = 240
IMAGE = "registry.example.com/dydit_scale@sha256:" + "0123456789abcdef" * 4
SETTINGS = ("train.steps=100000", "train.evaluate_every=0", "train.save_every=0", "engine.name=fsdp")
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.launch, pytest.mark.slow]  # real launchers, several processes each


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a pod finds it at WORKDIR: what the recipe names lies below."""
    small_world(tmp_path / "data")
    recipe = small_recipe(tmp_path) | {"run": "runs/small"}
    recipe["model"]["base"], recipe["data"]["path"] = "data/base", "data/shards"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rendered(nodes: int, *overrides: str) -> Workload:
    spec = ClusterSpec(
        target="job", nodes=nodes, gpus=1, interface=CABLE, image=IMAGE, pvc="training", namespace="research"
    )
    documents = list(yaml.safe_load_all(render("recipe.yaml", overrides, spec)))
    assert list(check_documents(documents)) == []
    work = read_workload(documents)
    assert isinstance(work, Workload)
    return work


class Pods:
    """The pods of a job, each on a node of its own."""

    def __init__(self, nodes: Nodes, work: Workload, folder: Path) -> None:
        self.nodes, self.work, self.folder = nodes, work, folder
        self.count = at(work.job_spec, "parallelism")
        recipe = folder / "mounted.yaml"
        recipe.write_text(work.of_kind("ConfigMap")["data"]["recipe.yaml"])
        hosts = folder / "hosts"
        names = [f"{work.name}-{index}.{at(work.pod, 'spec', 'subdomain')}" for index in range(self.count)]
        lines = (f"{address} {name}" for address, name in zip(nodes.addresses, names, strict=False))
        hosts.write_text("127.0.0.1 localhost\n" + "\n".join(lines) + "\n")
        words = [str(recipe) if word == RECIPE_FILE else word for word in work.args]
        self.launched = [self._start(index, words) for index in range(self.count)]

    def _start(self, index: int, words: list[str]) -> subprocess.Popen[bytes]:
        return self.nodes.launch(index, self._inside(words), self._environment(index), self.folder / f"pod-{index}.log")

    def _inside(self, words: list[str]) -> list[str]:
        """``ip netns exec`` gives a view of mounts of its own."""
        text = 'mount --bind "$1" /etc/hosts && cd "$2" && shift 2 && exec "$@"'
        return ["bash", "-c", text, "pod", str(self.folder / "hosts"), str(self.folder), *words]

    def _environment(self, index: int) -> dict[str, str]:
        """As the kubelet and the Job controller make it."""
        found = {"JOB_COMPLETION_INDEX": str(index)}
        for one in at(self.work.container, "env"):
            own = at(one, "valueFrom", "fieldRef", "fieldPath") == INDEX
            found[one["name"]] = str(index) if own else one["value"]
        places = {"HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}
        kept = {name: value for name, value in found.items() if name not in places}
        return child_environment() | kept | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

    def pre_stop(self, index: int) -> int:
        """What the kubelet runs in a pod before it ends it."""
        words = at(self.work.container, "lifecycle", "preStop", "exec", "command")
        words = [word.replace(WORKDIR, str(self.folder)) for word in words]
        log = self.folder / "stop.log"
        return self.nodes.launch(index, self._inside(words), self._environment(index), log).wait(PATIENCE)

    def codes(self) -> list[int]:
        wait_until(lambda: all(pod.poll() is not None for pod in self.launched), f"gone\n{self.said()}", PATIENCE)
        return [pod.returncode for pod in self.launched]

    def said(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.folder.glob("*.log")))


def steps_of(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [record["step"] for record in read_metrics(path) if "loss" in record] if path.exists() else []


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with Nodes() as two:
        yield two


@pytest.mark.skipif(PROBLEM is not None, reason=f"no two nodes: {PROBLEM}")
def test_pods_train_stop_before_they_are_ended_and_go_on_as_one(workspace: Path, nodes: Nodes) -> None:
    run = workspace / "runs" / "small"
    two = Pods(nodes, rendered(2, *SETTINGS), workspace)
    wait_until(lambda: len(steps_of(run)) > 1 or two.launched[0].poll() is not None, "two steps", PATIENCE)
    assert two.pre_stop(1) == 0, two.said()
    assert two.codes() == [Exit.STOPPED, Exit.STOPPED], two.said()
    stopped = len(steps_of(run))
    checkpoint = load_checkpoint(run / "checkpoints")
    assert checkpoint is not None and checkpoint.step == stopped > 1

    one = Pods(nodes, rendered(1, *SETTINGS, f"train.steps={stopped + 2}"), workspace)
    assert one.codes() == [Exit.DONE], one.said()
    assert steps_of(run) == list(range(stopped + 2))


def supervised(log: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dydit_scale.cluster.supervise", "--grace=120", "--", *words]
    environment = child_environment() | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


@pytest.mark.parametrize("engine", ["fsdp", "zero"])
def test_a_signal_to_the_supervisor_ends_its_ranks_with_their_state_saved(workspace: Path, engine: str) -> None:
    """Also under the deepspeed runner, which alone would keep the signal to itself."""
    run, log, port = workspace / "runs" / "small", workspace / "log", str(free_port())
    launcher: list[str] = ["torchrun", "--nproc-per-node=2", f"--master-port={port}", "--shutdown-timeout=100", "-m"]
    if engine == "zero":
        launcher = ["deepspeed", "--num_gpus=2", f"--master_port={port}", "--module"]
    words: list[Any] = [*launcher, "dydit_scale.train", "recipe.yaml", *SETTINGS, f"engine.name={engine}", "--resume"]
    job = supervised(log, *words)
    try:
        wait_until(lambda: len(steps_of(run)) > 1 or job.poll() is not None, "two steps", PATIENCE)
        job.send_signal(signal.SIGTERM)
        assert job.wait(PATIENCE) == Exit.STOPPED, log.read_text(errors="replace")[-3000:]
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    holder = read_holder(run)
    assert holder is not None and holder.ended == "Stopped"
    checkpoint = load_checkpoint(run / "checkpoints")
    assert checkpoint is not None and checkpoint.step == len(steps_of(run)) > 1
    assert not list(Path(f"/proc/{job.pid}").glob("task"))


def test_a_mistake_in_the_recipe_is_told_through_torchrun(workspace: Path) -> None:
    log = workspace / "log"
    words = ("torchrun", "--nproc-per-node=2", f"--master-port={free_port()}", "-m", "dydit_scale.train", "recipe.yaml")
    assert supervised(log, *words, "train.lrr=1", "--resume").wait(PATIENCE) == Exit.BAD_CONFIG
    assert "unknown key train.lrr" in log.read_text()
