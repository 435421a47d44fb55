"""Rendered files: as they are kept, the same each time, and refused before they could go wrong."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from dydit_scale.cli.main import main
from dydit_scale.cluster.command import Times
from dydit_scale.cluster.pod import OUTSIDE
from dydit_scale.cluster.render import render, to_yaml
from dydit_scale.cluster.spec import KUBERNETES, TARGETS, ClusterSpec, words
from dydit_scale.cluster.validate import check_documents, check_script
from dydit_scale.cluster.workload import Workload, at, read_workload
from dydit_scale.parallel.watchdog import LimitsConfig
from dydit_scale.train.attempt import take_folder
from dydit_scale.workflows.health import health_of
from tests.cluster.golden import ROOT, command_of, golden_files

FLUX = "recipes/flux/dev_td_lora.yaml"
IMAGE = "registry.example.com/dydit_scale@sha256:" + "0123456789abcdef" * 4
POD = {"image": IMAGE, "pvc": "training"}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def spec(target: str, **options: object) -> ClusterSpec:
    return ClusterSpec(target=target, **{**(POD if target in KUBERNETES else {}), **options})  # type: ignore[arg-type]


def test_kept_files_are_what_their_heads_make(capsys: pytest.CaptureFixture[str]) -> None:
    files = golden_files()
    made = [(path, command_of(path)) for path in files]
    assert len(files) == 9
    assert {command[command.index("--target") + 1] for _, command in made} == set(TARGETS)
    for path, command in made:
        assert main(command) == 0
        first = capsys.readouterr().out
        again = "run python -m tests.cluster.golden if the change is meant"
        assert first == path.read_text(), f"{path.relative_to(ROOT)}: {again}"


def test_kept_files_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "validate", *map(str, golden_files())]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(golden_files()) and all(": valid (" in line for line in lines)


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_words_give_the_same_bytes(target: str) -> None:
    one = render(FLUX, ["train.lr=1e-5"], spec(target, nodes=2))
    assert one == render(FLUX, ["train.lr=1e-5"], spec(target, nodes=2))
    assert one.count("train.lr=1e-5") == 2 and "..." not in one


OPTIONS: list[dict[str, object]] = [
    {"queue": "gpus"},
    {"priority": "training"},
    {"name": "another", "env": (("NCCL_IB_HCA", "mlx5"),)},
    {"hours": 2, "restarts": 0, "cpus": 8, "memory_gib": 100, "nodes": 1},
    {"rdma": "rdma/ib", "interface": "net1"},
    {"object_store": "s3://bucket/shards", "secret": (("AWS_ACCESS_KEY_ID", "store/id"),)},
    {"namespace": "research", "topology": "topology.kubernetes.io/zone", "node_selector": (("pool", "h100"),)},
    {"https": True, "shm_gib": 1, "disk_gib": 150, "nodes": 8, "gpus": 4},
]


@pytest.mark.parametrize("target", KUBERNETES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_manifests_with_every_option_are_valid(target: str, options: dict[str, object]) -> None:
    chosen = spec(target, **{"nodes": 2} | options)
    documents = list(yaml.safe_load_all(render(FLUX, [], chosen)))
    assert list(check_documents(documents)) == []
    assert "queue" not in options or "suspend: true" in to_yaml(documents)


@pytest.mark.parametrize("target", [t for t in TARGETS if t not in KUBERNETES])
@pytest.mark.parametrize("nodes", [1, 4])
def test_scripts_are_valid(target: str, nodes: int) -> None:
    assert list(check_script(render(FLUX, [], spec(target, nodes=nodes)))) == []


def test_every_option_is_tried() -> None:
    tried = {name for options in OPTIONS for name in options} | {"nodes", "gpus", "image", "pvc", "hosts"}
    assert {field.name for field in dataclasses.fields(ClusterSpec)} - tried == {"target"}


@pytest.mark.parametrize("target", KUBERNETES)
def test_metrics_are_open_to_those_who_scrape(target: str) -> None:
    text = render(FLUX, ["monitor.prometheus_port=9464"], spec(target, nodes=4))
    documents = list(yaml.safe_load_all(text))
    assert list(check_documents(documents)) == []
    assert text.count("9464") == 5  # in the head, the arguments, the ports, the annotations and the NetworkPolicy
    policy = next(one for one in documents if one["kind"] == "NetworkPolicy")
    del policy["spec"]["ingress"][1]["from"]
    assert any("the port called metrics" in text for text in check_documents(documents))


@pytest.mark.parametrize(
    ("sinks", "env", "opened"),
    [
        ("[tensorboard]", (), False),
        ("[wandb]", (), True),
        ("[tensorboard,mlflow]", (), True),
        ("[wandb]", (("WANDB_MODE", "offline"),), False),
        ("[wandb,mlflow]", (("WANDB_MODE", "offline"),), True),
    ],
)
def test_sinks_elsewhere_open_port_443(sinks: str, env: tuple[tuple[str, str], ...], opened: bool) -> None:
    documents = list(yaml.safe_load_all(render(FLUX, [f"monitor.sinks={sinks}"], spec("jobset", nodes=4, env=env))))
    assert list(check_documents(documents)) == []
    egress = at(next(one for one in documents if one["kind"] == "NetworkPolicy"), "spec", "egress")
    assert (OUTSIDE in egress) == opened
    if opened:
        egress.remove(OUTSIDE)
        assert any("expected port 443, for data of a URL, W&B or MLflow" in text for text in check_documents(documents))


def test_a_pod_that_waits_outlives_the_attempt_before(tmp_path: Path) -> None:
    """The first pod of a Job to be made anew starts while others still hold on to the attempt that failed."""
    work = read_workload(list(yaml.safe_load_all(render(FLUX, [], spec("job", nodes=4)))))
    assert isinstance(work, Workload)
    probes = [work.container[name] for name in ("startupProbe", "livenessProbe")]
    words = [at(probe, "exec", "command") for probe in probes]
    assert words[0] == words[1] and words[0][:2] == ["dydit", "health"]
    age = float(words[0][words[0].index("--max-age") + 1])
    before = take_folder(tmp_path, wait=0)
    assert health_of(tmp_path, max_age=age).healthy, "the startup probe is done"
    before.end("RuntimeError")
    assert not health_of(tmp_path, max_age=age).healthy, "each liveness probe fails, until the nodes have met"
    for probe in probes:
        assert probe["failureThreshold"] * probe["periodSeconds"] > LimitsConfig().setup == work.option("rdzv-conf")
    take_folder(tmp_path, wait=0)
    assert health_of(tmp_path, max_age=age).healthy


def test_ends_leave_room_for_what_lies_inside() -> None:
    for limits in (
        LimitsConfig(),
        LimitsConfig(checkpoint=1, step=1, setup=1, evaluation=1),
        LimitsConfig(step=1.5),
        LimitsConfig(step=4000, evaluation=10),
    ):
        times = Times.of(limits)
        assert times.save < times.shutdown < times.grace and times.save + 60 < times.grace
        assert times.shutdown >= max(limits.step, limits.evaluation) + limits.checkpoint
        assert times.health > limits.collective


def test_a_command_line_says_only_what_is_new() -> None:
    assert words(spec("slurm", nodes=4)) == ["--target", "slurm", "--nodes", "4"]
    assert words(ClusterSpec(target="slurm", gpus=4, cpus=40)) == ["--target", "slurm", "--gpus", "4"]


@pytest.mark.parametrize(
    ("target", "options", "overrides", "text"),
    [
        ("job", {"image": "dydit:latest"}, [], "--image: expected NAME@sha256:"),
        ("job", {"image": IMAGE, "pvc": ""}, [], "--pvc: expected a ReadWriteMany claim"),
        ("job", {"shm_gib": 768}, [], "/dev/shm counts to the memory"),
        ("job", {"disk_gib": 32}, [], "--disk-gib: expected more than 32"),
        ("job", {"rdma": "ib"}, [], "--rdma: expected a resource such as rdma/ib"),
        ("job", {"name": "Big_Name"}, [], "--name: expected a-z"),
        ("job", {"name": "n" * 41}, [], "40 at most"),
        ("job", {"secret": (("HF_TOKEN", "token"),)}, [], "--secret HF_TOKEN: expected SECRET/KEY"),
        ("job", {"env": (("MASTER_PORT", "1"),)}, [], "--env MASTER_PORT: the launchers set it"),
        ("job", {"env": (("A", "1"), ("A", "2"))}, [], "A is set twice"),
        ("job", {"hosts": "a,b"}, [], "--hosts is for deepspeed, torchrun; the target is job"),
        ("job", {"node_selector": (("a b", "c"),)}, [], "expected a label"),
        ("job", {"object_store": "bucket"}, [], "--object-store: expected a URL"),
        ("slurm", {"image": IMAGE}, [], "--image is for job, jobset, trainjob; the target is slurm"),
        ("torchrun", {"nodes": 2, "hosts": "a"}, [], "--hosts names 1 machines, --nodes is 2"),
        ("torchrun", {"nodes": 0}, [], "--nodes: expected 1 or more"),
        ("job", {"hours": 1}, [], "--hours 1: expected more than 3720 s"),
        ("slurm", {"hours": 2}, ["limits.checkpoint=7200"], "--hours 2: expected more than 9120 s"),
        ("job", {}, ["monitor.prometheus_port=29500"], "monitor.prometheus_port 29500: there the launchers meet"),
        ("trainjob", {}, ["monitor.prometheus_port=29400"], "monitor.prometheus_port 29400: there the launchers meet"),
        ("nomad", {}, [], "--target: expected one of deepspeed"),
        ("slurm", {"nodes": 3}, [], "train.batch_size 64: not divisible by 24 ranks"),
        ("slurm", {}, ["engine.name=single"], "engine.name is single, one process"),
        ("deepspeed", {}, ["engine.name=fsdp"], "--target deepspeed: expected engine.name=zero; got fsdp"),
        ("slurm", {}, ["train.lrr=1"], "unknown key train.lrr"),
        ("job", {}, ["run=/runs/x"], "run /runs/x: expected a path such as folder/name"),
        ("job", {}, ["run=recipes/x"], "recipes/ is part of the image; set run=runs/x"),
        ("job", {}, ["data.path=../x"], "data.path ../x: expected a path"),
        ("job", {"object_store": "s3://b"}, ["data.path=s3://c/d"], "data.path is a URL already"),
        ("job", {"object_store": "s3://b"}, ["data.cache=/cache/x", "data.cache_gib=500.0"], "cache holds 168 GiB"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(target: str, options: dict[str, object], overrides: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        render(FLUX, overrides, spec(target, **options))


def test_the_command_line_writes_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "job.sh"
    assert main(["cluster", "render", FLUX, "--target", "slurm", "--env", "A=b=c", "--out", str(out)]) == 0
    assert "export A=b=c\n" in out.read_text()
    assert main(["cluster", "validate", str(out)]) == 0
    assert main(["cluster", "render", FLUX, "--target", "slurm", "--env", "A"]) == 64
    assert "--env A: expected two words joined by =" in capsys.readouterr().err
    out.write_text(out.read_text().replace("--max-restarts=0", "--max-restarts=3"))
    assert main(["cluster", "validate", str(out)]) == 1
    assert "expected --max-restarts=0" in capsys.readouterr().out
    assert main(["cluster", "validate", str(tmp_path / "none.yaml")]) == 64
    out.write_text("a: [")
    assert main(["cluster", "validate", str(out)]) == 64
    out.write_text("")
    assert main(["cluster", "validate", str(out)]) == 1


@pytest.mark.parametrize("target", [t for t in TARGETS if t not in KUBERNETES])
def test_a_script_keeps_words_with_spaces_together(target: str) -> None:
    text = render(FLUX, ["train.sample_prompts=[a red fox, an owl]", "name=it's"], spec(target))
    assert list(check_script(text)) == []
