"""What a file of manifests starts, read back from its documents: one view of Job, JobSet and TrainJob."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dydit_scale.cluster.pod import Manifest

KINDS = {
    "ConfigMap": "v1",
    "Service": "v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "Job": "batch/v1",
    "JobSet": "jobset.x-k8s.io/v1alpha2",
    "ClusterTrainingRuntime": "trainer.kubeflow.org/v1alpha1",
    "TrainJob": "trainer.kubeflow.org/v1alpha1",
}
"""What we write, and in which version."""
STARTED = ("Job", "JobSet", "TrainJob")
_UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The parts of a job, wherever its kind keeps them; what is missing is an empty mapping or list."""

    documents: list[Manifest]
    top: Manifest
    """The Job, JobSet or TrainJob."""
    runtime: Manifest
    """Of a TrainJob."""
    set_spec: Manifest
    """Of a JobSet, also the one in a runtime."""
    job_spec: Manifest
    pod: Manifest
    """The pod template."""
    container: Manifest
    """The one that trains, with what a TrainJob lays over it."""

    @property
    def kind(self) -> str:
        """Job, JobSet or TrainJob."""
        return str(self.top.get("kind"))

    @property
    def name(self) -> str:
        """Of the job."""
        return str(at(self.top, "metadata", "name"))

    @property
    def args(self) -> list[str]:
        """Words of the training container."""
        return [str(word) for word in listed(self.container.get("args"))]

    @property
    def env(self) -> dict[str, Any]:
        """Variables with plain values."""
        return {name: e.get("value") for name, e in named(self.container.get("env")).items()}

    def option(self, name: str) -> int | None:
        """The number behind ``--name=`` among the words; None if there is none."""
        found = re.findall(rf"(?:^|\n)--{name}=(?:timeout=)?(\d+)(?=\n|$)", "\n".join(self.args))
        return int(found[0]) if len(found) == 1 else None

    def of_kind(self, kind: str) -> Manifest:
        """The first document of a kind; empty if there is none."""
        return next((one for one in self.documents if one.get("kind") == kind), {})


def read_workload(documents: list[Manifest]) -> Workload | str:
    """The workload in the documents, or why there is none."""
    tops = [one for one in documents if one.get("kind") in STARTED]
    if len(tops) != 1:
        return f"expected one Job, JobSet or TrainJob; found {len(tops)}"
    top = tops[0]
    runtime = next((one for one in documents if one.get("kind") == "ClusterTrainingRuntime"), {})
    if top["kind"] == "Job":
        set_spec, job_spec = {}, at(top, "spec")
    else:
        set_spec = at(runtime, "spec", "template", "spec") if top["kind"] == "TrainJob" else at(top, "spec")
        job_spec = at(set_spec, "replicatedJobs", 0, "template", "spec")
    pod = at(job_spec, "template")
    containers = maps(at(pod, "spec", "containers"))
    if len(containers) != 1:
        return f"expected one container in the pod; found {len(containers)}"
    trainer = at(top, "spec", "trainer") if top["kind"] == "TrainJob" else {}
    container = {
        **containers[0],
        **{k: v for k, v in mapping(trainer).items() if k in ("image", "command", "args", "env")},
    }
    if "resourcesPerNode" in mapping(trainer):
        container["resources"] = trainer["resourcesPerNode"]
    return Workload(
        documents=documents, top=top, runtime=runtime, set_spec=mapping(set_spec), job_spec=mapping(job_spec),
        pod=mapping(pod), container=container,
    )  # fmt: skip


def at(value: Any, *path: str | int) -> Any:
    """What lies at a path of keys and places; an empty mapping if anything on the way is missing."""
    for step in path:
        known = step in value if isinstance(value, dict) else isinstance(value, list) and step in range(len(value))
        if not known:
            return {}
        value = value[step]
    return value


def mapping(value: Any) -> Manifest:
    """``value`` if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def listed(value: Any) -> list[Any]:
    """``value`` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def maps(value: Any) -> list[Manifest]:
    """The mappings in a list."""
    return [one for one in listed(value) if isinstance(one, dict)]


def word(value: Any) -> str:
    """``value`` if it is a text, else an empty one."""
    return value if isinstance(value, str) else ""


def named(value: Any) -> dict[str, Manifest]:
    """The mappings in a list by their names."""
    return {word(one.get("name")): one for one in maps(value)}


def number(value: Any) -> float:
    """A count; nan, which compares false with everything, if it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) else float("nan")


def amount(value: Any) -> float:
    """A quoted quantity in its unit; nan if it is none."""
    found = re.fullmatch(r"(\d+)([KMGT]i)?", value) if isinstance(value, str) else None
    return int(found[1]) * _UNITS[found[2] or ""] if found else float("nan")


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every plain value of nested mappings and lists, with its path."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, (*path, key))
    elif isinstance(value, list):
        for place, one in enumerate(value):
            yield from leaves(one, (*path, place))
    else:
        yield path, value
