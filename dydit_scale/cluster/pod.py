"""The pod of a training node, alike for a Job, a JobSet and a TrainJob."""

from __future__ import annotations

from typing import Any

from dydit_scale.cluster.command import CACHE, HEALTH_MARGIN, PORT, RECIPE_FILE, WORKDIR, Job
from dydit_scale.cluster.spec import TMP_GIB
from dydit_scale.train.exits import Exit

CONTAINER = "node"
"""Kubeflow's name for the container that trains."""
USER = 1000
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
NEVER_AGAIN = [int(Exit.BAD_CONFIG), int(Exit.BAD_DATA), int(Exit.NOT_FINITE)]
"""Exit codes after which a restart would fail again."""
KEEP_FINISHED = 7 * 24 * 3600
"""Seconds for which a finished Job or JobSet can be looked at."""
PROBE_PERIOD = 60
"""Seconds between two probes, and what one may take."""
AGAIN = "RestartJobSetAndIgnoreMaxRestarts"
SET_ACTIONS = {"neverAgain": "FailJobSet", "tooLong": "FailJobSet", "stopped": AGAIN, "disrupted": AGAIN}
"""What a JobSet does by its failure rules; it restarts, and counts, after other failures."""

Manifest = dict[str, Any]

NAME_SERVICE: Manifest = {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}
"""An egress rule: anywhere, for a name service on the node itself is no pod that could be selected."""
OUTSIDE: Manifest = {"ports": [{"port": 443, "protocol": "TCP"}]}
"""An egress rule: HTTPS anywhere."""


def labels(job: Job) -> dict[str, str]:
    """Of everything of a job; the instance tells its pods from those of others."""
    return {"app.kubernetes.io/name": "dydit-scale", "app.kubernetes.io/instance": job.name}


def metadata(job: Job, name: str | None = None, *, queued: bool = False) -> Manifest:
    """Name, namespace and labels; ``queued`` adds Kueue's."""
    queue = {"kueue.x-k8s.io/queue-name": job.spec.queue} if queued and job.spec.queue else {}
    return {"name": name or job.name, "namespace": job.spec.namespace, "labels": labels(job) | queue}


def suspended(job: Job) -> Manifest:
    """Kueue starts what it is given suspended."""
    return {"suspend": True} if job.spec.queue else {}


def pod_template(job: Job, *, subdomain: str | None, container: Manifest) -> Manifest:
    """A node's pod around its training container."""
    meta: Manifest = {"labels": labels(job)}
    if job.metrics_port:
        meta["annotations"] = scrape_notes(job.metrics_port)
    spec: Manifest = {"restartPolicy": "Never"}
    if subdomain:
        spec["subdomain"] = subdomain
    spec |= {
        "terminationGracePeriodSeconds": job.times.grace,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if job.spec.priority:
        spec["priorityClassName"] = job.spec.priority
    if job.spec.node_selector:
        spec["nodeSelector"] = dict(job.spec.node_selector)
    if job.spec.topology:
        term = {"labelSelector": {"matchLabels": labels(job)}, "topologyKey": job.spec.topology}
        preferred = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]}
        spec["affinity"] = {"podAffinity": preferred}
    spec |= {
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
        "volumes": _volumes(job),
    }
    return {"metadata": meta, "spec": spec}


def main_part(job: Job) -> Manifest:
    """Image, command and resources of the training container; a TrainJob has them apart."""
    return {"image": job.spec.image, "command": ["tini", "--"], "args": job.torchrun}


def fixed_part(job: Job) -> Manifest:
    """The rest of it: ports, probes, its end, what it may do and what it sees."""
    ports: list[Manifest] = []
    if job.spec.target != "trainjob":  # the operator adds its own
        ports.append({"name": "rendezvous", "containerPort": PORT})
    if job.metrics_port:
        ports.append({"name": "metrics", "containerPort": job.metrics_port})
    run, times = f"{WORKDIR}/{job.recipe.run}", job.times  # whole: where probes start is not said everywhere
    health = {"exec": {"command": ["dydit", "health", run, "--max-age", str(times.health)]}}
    # as long as nodes may wait for one another, while the folder tells of an attempt that has ended
    patience = -(-(times.setup + HEALTH_MARGIN) // PROBE_PERIOD)
    probe = health | {"periodSeconds": PROBE_PERIOD, "timeoutSeconds": PROBE_PERIOD, "failureThreshold": patience}
    stop = ["dydit", "stop", run, "--wait", "--timeout", str(times.shutdown)]
    return {
        "workingDir": WORKDIR,
        **({"ports": ports} if ports else {}),
        "startupProbe": probe,
        "livenessProbe": probe,
        "lifecycle": {"preStop": {"exec": {"command": stop}}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": _mounts(job),
    }


def resources(job: Job) -> Manifest:
    """Requests equal limits, so that nothing of a node is promised twice."""
    spec = job.spec
    amounts = {"cpu": str(spec.cpus), "memory": f"{spec.memory_gib}Gi", "ephemeral-storage": f"{spec.disk_gib}Gi"}
    amounts["nvidia.com/gpu"] = str(spec.gpus)
    if spec.rdma:
        amounts[spec.rdma] = "1"
    return {"requests": dict(amounts), "limits": amounts}


def environment(job: Job) -> list[Manifest]:
    """What is the same on every node."""
    found: list[Manifest] = [{"name": name, "value": value} for name, value in job.environment.items()]
    for name, place in job.spec.secret:
        secret, key = place.split("/")
        found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return found


def meeting(job: Job, first: str) -> list[Manifest]:
    """What torchrun needs to know, where no operator injects it; ``first`` is the name of node 0."""
    same = {**job.rendezvous, "PET_MASTER_ADDR": first, "MASTER_ADDR": first, "MASTER_PORT": str(PORT)}
    own = {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}}
    return [*({"name": name, "value": value} for name, value in same.items()), own]


def scrape_notes(port: int) -> Manifest:
    """Annotations of a pod by which Prometheus finds its endpoint."""
    return {"prometheus.io/scrape": "true", "prometheus.io/port": str(port), "prometheus.io/path": "/metrics"}


def scrape_rule(port: int) -> Manifest:
    """An ingress rule: pods of all namespaces may read the endpoint."""
    return {"from": [{"namespaceSelector": {}}], "ports": [{"port": port, "protocol": "TCP"}]}


def exit_rule(action: str, codes: list[int]) -> Manifest:
    """A rule of a podFailurePolicy on the exit codes of the training container."""
    return {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": codes}}


def disruption_rule(action: str) -> Manifest:
    """A rule for pods that were evicted, preempted or drained."""
    return {"action": action, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def recipe_map(job: Job) -> Manifest:
    """The recipe's file, as it was when the manifest was made."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(job, f"{job.name}-recipe"),
        "data": {RECIPE_FILE.rpartition("/")[2]: job.text},
    }


def network_policy(job: Job) -> Manifest:
    """The pods reach one another and the name service, and port 443 if the job has business outside; nobody reaches
    them, but for the metrics."""
    own = {"podSelector": {"matchLabels": labels(job)}}
    ingress: list[Manifest] = [{"from": [own]}]
    if job.metrics_port:
        ingress.append(scrape_rule(job.metrics_port))
    egress: list[Manifest] = [{"to": [own]}, NAME_SERVICE]
    if job.reaches_out:
        egress.append(OUTSIDE)
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(job),
        "spec": {
            "podSelector": {"matchLabels": labels(job)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": egress,
        },
    }


def _volumes(job: Job) -> list[Manifest]:
    spec = job.spec
    return [
        {"name": "recipe", "configMap": {"name": f"{job.name}-recipe"}},
        {"name": "claim", "persistentVolumeClaim": {"claimName": spec.pvc}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{spec.shm_gib}Gi"}},
        {"name": "tmp", "emptyDir": {"sizeLimit": f"{TMP_GIB}Gi"}},
        {"name": "cache", "emptyDir": {"sizeLimit": f"{spec.cache_gib}Gi"}},
    ]


def _mounts(job: Job) -> list[Manifest]:
    folders = [
        {"name": "claim", "mountPath": f"{WORKDIR}/{name}", "subPath": name, **({} if writes else {"readOnly": True})}
        for name, writes in job.folders().items()
    ]
    return [
        {"name": "recipe", "mountPath": RECIPE_FILE.rpartition("/")[0], "readOnly": True},
        *folders,
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "cache", "mountPath": CACHE},
    ]
