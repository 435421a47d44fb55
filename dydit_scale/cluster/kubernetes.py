"""Manifests: an indexed Job with its Service, a JobSet, and a TrainJob with its runtime."""

from __future__ import annotations

from dydit_scale.cluster.command import Job
from dydit_scale.cluster.pod import (
    CONTAINER,
    KEEP_FINISHED,
    NEVER_AGAIN,
    SET_ACTIONS,
    Manifest,
    disruption_rule,
    environment,
    exit_rule,
    fixed_part,
    labels,
    main_part,
    meeting,
    metadata,
    network_policy,
    pod_template,
    recipe_map,
    resources,
    suspended,
)  # fmt: skip
from dydit_scale.train.exits import Exit

GROUP = "node"
"""The one replicated job of a JobSet, called as Kubeflow calls it."""


def render_job(job: Job) -> list[Manifest]:
    """A plain indexed Job, which any cluster runs; its pods find one another by a headless Service."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(job),
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels(job)},
    }
    rules = [
        exit_rule("FailJob", NEVER_AGAIN),
        exit_rule("Ignore", [int(Exit.STOPPED)]),
        disruption_rule("Ignore"),
    ]
    spec = {
        **suspended(job),
        "completionMode": "Indexed",
        "completions": job.spec.nodes,
        "parallelism": job.spec.nodes,
        # one failure is one of every pod
        "backoffLimit": job.spec.restarts * job.spec.nodes,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": rules},
        "activeDeadlineSeconds": job.spec.hours * 3600,
        "ttlSecondsAfterFinished": KEEP_FINISHED,
        "template": pod_template(job, subdomain=job.name, container=_container(job, f"{job.name}-0.{job.name}")),
    }
    kind = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata(job, queued=True), "spec": spec}
    return [recipe_map(job), service, network_policy(job), kind]


def render_jobset(job: Job) -> list[Manifest]:
    """A JobSet: when one pod fails all are made anew, after the old ones are gone."""
    container = _container(job, f"{job.name}-{GROUP}-0-0.{job.name}")
    template = pod_template(job, subdomain=None, container=container)
    spec = {**suspended(job), **_set_spec(job, template, nodes=job.spec.nodes)}
    kind = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata(job, queued=True)}
    return [recipe_map(job), network_policy(job), {**kind, "spec": spec}]


def render_trainjob(job: Job) -> list[Manifest]:
    """A TrainJob of Kubeflow Trainer and the runtime that it refers to; the operator injects where ranks meet."""
    template = pod_template(job, subdomain=None, container={"name": CONTAINER, **fixed_part(job)})
    name = f"{job.spec.namespace}-{job.name}"  # a runtime lies in no namespace
    runtime = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "ClusterTrainingRuntime",
        "metadata": {"name": name, "labels": labels(job) | {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {
            "mlPolicy": {"numNodes": job.spec.nodes, "torch": {}},
            "template": {"spec": _set_spec(job, template, nodes=None)},
        },
    }
    spec = {
        **suspended(job),
        "activeDeadlineSeconds": job.spec.hours * 3600,
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": name},
        "trainer": {
            **main_part(job),
            "env": environment(job),
            "numNodes": job.spec.nodes,
            "numProcPerNode": job.spec.gpus,
            "resourcesPerNode": resources(job),
        },
    }
    kind = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": metadata(job, queued=True)}
    return [recipe_map(job), network_policy(job), runtime, {**kind, "spec": spec}]


def _container(job: Job, first: str) -> Manifest:
    env = [*environment(job), *meeting(job, first)]
    return {"name": CONTAINER, **main_part(job), "env": env, "resources": resources(job), **fixed_part(job)}


def _set_spec(job: Job, template: Manifest, *, nodes: int | None) -> Manifest:
    """Of a JobSet. In a runtime ``nodes`` is None: a TrainJob sets them, and a deadline; and it would be started again
    once its finished JobSet had been removed."""
    size = {} if nodes is None else {"completions": nodes, "parallelism": nodes}
    deadline = {} if nodes is None else {"activeDeadlineSeconds": job.spec.hours * 3600}
    rules = [exit_rule("FailJob", NEVER_AGAIN), exit_rule("FailJob", [int(Exit.STOPPED)]), disruption_rule("FailJob")]
    spec = {
        "completionMode": "Indexed",
        **size,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": rules},
        **deadline,
        "template": template,
    }
    # by this label the trainer finds the job whose container and size it sets
    meta = {"metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}} if nodes is None else {}
    kept = {} if nodes is None else {"ttlSecondsAfterFinished": KEEP_FINISHED}
    return {
        **kept,
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "successPolicy": {"operator": "All"},
        "failurePolicy": {
            "maxRestarts": job.spec.restarts,
            "restartStrategy": "BlockingRecreate",
            "rules": [
                # the words of Kubernetes' Job controller
                _set_rule("neverAgain", f"exit code ({'|'.join(map(str, NEVER_AGAIN))}) "),
                _set_rule("stopped", f"exit code {int(Exit.STOPPED)} "),
                _set_rule("disrupted", "condition DisruptionTarget "),
                {"name": "tooLong", "action": SET_ACTIONS["tooLong"], "onJobFailureReasons": ["DeadlineExceeded"]},
            ],
        },
        "replicatedJobs": [
            {
                "name": GROUP,
                "replicas": 1,
                "template": {**meta, "spec": spec},
            }
        ],
    }


def _set_rule(name: str, message: str) -> Manifest:
    reasons = {"onJobFailureReasons": ["PodFailurePolicy"], "onJobFailureMessagePatterns": [message]}
    return {"name": name, "action": SET_ACTIONS[name], **reasons}
