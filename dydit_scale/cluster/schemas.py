"""Manifests against published schemas: kubernetes-validate, Kubeflow's models, and tables of the words they allow."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from dydit_scale.cluster.pod import Manifest
from dydit_scale.cluster.workload import KINDS, Workload, at, leaves, word

VALIDATORS = {"kubernetes_validate": "kubernetes-validate", "kubeflow_trainer_api": "kubeflow-trainer-api"}
"""Modules and where they come from; both are optional."""
BUILT_IN = ("ConfigMap", "Service", "NetworkPolicy", "Job")
MODELS = {
    "JobSet": "JobsetV1alpha2JobSet",
    "ClusterTrainingRuntime": "TrainerV1alpha1ClusterTrainingRuntime",
    "TrainJob": "TrainerV1alpha1TrainJob",
}
_JOB_ACTIONS = ("FailJob", "Ignore", "Count", "FailIndex")
_SET_ACTIONS = (
    "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts",
)  # fmt: skip
WORDS: dict[str, tuple[str, ...]] = {
    "restartPolicy": ("Always", "OnFailure", "Never"),
    "completionMode": ("Indexed", "NonIndexed"),
    "podReplacementPolicy": ("Failed", "TerminatingOrFailed"),
    "podFailurePolicy.rules.action": _JOB_ACTIONS,
    "failurePolicy.rules.action": _SET_ACTIONS,
    "failurePolicy.rules.onJobFailureReasons": (
        "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy",
    ),
    "failurePolicy.restartStrategy": ("Recreate", "BlockingRecreate", "InPlaceRestart"),
    "successPolicy.operator": ("All", "Any"),
    "onExitCodes.operator": ("In", "NotIn"),
    "onPodConditions.status": ("True", "False", "Unknown"),
    "tolerations.operator": ("Exists", "Equal", "Lt", "Gt"),
    "tolerations.effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
    "seccompProfile.type": ("RuntimeDefault", "Unconfined", "Localhost"),
    "fsGroupChangePolicy": ("Always", "OnRootMismatch"),
    "emptyDir.medium": ("", "Memory", "HugePages"),
    "policyTypes": ("Ingress", "Egress"),
    "protocol": ("TCP", "UDP", "SCTP"),
    "runtimeRef.kind": ("ClusterTrainingRuntime", "TrainingRuntime"),
}  # fmt: skip
"""Allowed words, by the end of a field's path; the schemas of Kubernetes know most of them as any text."""


def missing_validators() -> list[str]:
    """Packages that are not installed."""
    return [name for module, name in VALIDATORS.items() if importlib.util.find_spec(module) is None]


def check_kinds(documents: list[Manifest]) -> Iterator[str]:
    """Kinds and versions that we do not write."""
    for one in documents:
        kind = word(one.get("kind"))
        if kind not in KINDS:
            yield f"kind {kind}: expected one of {', '.join(KINDS)}"
        elif one.get("apiVersion") != KINDS[kind]:
            yield f"{kind}: apiVersion {one.get('apiVersion')}: expected {KINDS[kind]}"


def check_words(documents: list[Manifest]) -> Iterator[str]:
    """Words that a field does not know."""
    for one in documents:
        for path, value in leaves(one):
            names = ".".join(step for step in path if isinstance(step, str))
            for end, allowed in WORDS.items():
                if f".{names}".endswith(f".{end}") and value not in allowed:
                    yield f"{one['kind']}: {_dotted(path)}: {value!r}: expected one of {', '.join(allowed)}"


def check_schemas(work: Workload) -> Iterator[str]:
    """Fields that the schemas do not know, wrong types and missing fields, as far as validators are installed."""
    if importlib.util.find_spec("kubernetes_validate"):
        for one in work.documents:
            if one["kind"] in BUILT_IN:
                yield from _check_built_in(one, one["kind"])
        if work.kind != "Job":  # the models know its inner job less well than Kubernetes does
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": work.name}, "spec": work.job_spec}
            yield from _check_built_in(job, f"{work.kind}: job of its pods")
    if importlib.util.find_spec("kubeflow_trainer_api"):
        for one in work.documents:
            if one["kind"] in MODELS:
                yield from _check_model(one)


def _check_built_in(document: Manifest, name: str) -> Iterator[str]:
    for error in _validator(document["kind"], document["apiVersion"]).iter_errors(document):
        yield f"{name}: {_dotted(error.absolute_path)}: {error.message}"


@lru_cache
def _validator(kind: str, version: str) -> Any:
    """Of the newest Kubernetes that the package knows, strict about unknown fields."""
    import jsonschema
    from kubernetes_validate import utils
    from referencing import Registry, Resource

    folder = f"kubernetes-json-schema/v{utils.all_versions()[-1]}-local-strict"
    group, _, number = version.rpartition("/")
    name = f"{kind.lower()}-{group.split('.')[0] + '-' if group else ''}{number}"
    schema, definitions = (utils.schema_contents(f"{folder}/{file}.json", "") for file in (name, "_definitions"))
    registry: Any = Resource.from_contents(definitions) @ (Resource.from_contents(schema) @ Registry())
    return jsonschema.Draft202012Validator(schema, registry=registry)


def _check_model(document: Manifest) -> Iterator[str]:
    """A round trip: what a model drops, it does not know."""
    from kubeflow_trainer_api import models

    kind = document["kind"]
    try:
        back = getattr(models, MODELS[kind]).from_dict(document).to_dict()
    except (TypeError, ValueError, AttributeError) as error:
        yield f"{kind}: {' '.join(str(error).split())}"
        return
    for path, value in leaves(document):
        if at(back, *path) != value:
            yield f"{kind}: {_dotted(path)}: unknown field, or {value!r} is no value of it"
    for path in _empty(document):
        if path[-1] not in at(back, *path[:-1]):
            yield f"{kind}: {_dotted(path)}: unknown field"


def _empty(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of empty mappings, which have no leaves."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, one in pairs:
        if one == {}:
            yield (*path, step)
        yield from _empty(one, (*path, step))


def _dotted(path: Any) -> str:
    return ".".join(map(str, path)) or "(top)"
