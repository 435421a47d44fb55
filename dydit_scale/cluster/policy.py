"""What a manifest must say so that a job starts, is safe beside others, stops with its state saved, and comes back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dydit_scale.cluster.command import CACHE, HEALTH_MARGIN, WORKDIR
from dydit_scale.cluster.pod import (
    CONTAINER,
    INDEX,
    NAME_SERVICE,
    NEVER_AGAIN,
    OUTSIDE,
    SET_ACTIONS,
    disruption_rule,
    exit_rule,
    scrape_notes,
    scrape_rule,
)  # fmt: skip
from dydit_scale.cluster.spec import LONGEST_NAME, is_name
from dydit_scale.cluster.workload import (
    STARTED,
    Workload,
    amount,
    at,
    listed,
    mapping,
    maps,
    named,
    number,
    word,
)  # fmt: skip
from dydit_scale.train.exits import Exit

Finding = tuple[bool, str]
NEEDED_ENV = (
    "PYTHONUNBUFFERED", "PYTHONFAULTHANDLER", "OMP_NUM_THREADS", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE", "HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
)  # fmt: skip
RESOURCES = ("cpu", "memory", "ephemeral-storage", "nvidia.com/gpu")
LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/instance")


def check_policy(work: Workload) -> Iterator[str]:
    """What is wrong, in words."""
    for check in (
        _names,
        _launch,
        _meeting,
        _resources,
        _disk,
        _security,
        _endings,
        _probes,
        _failures,
        _network,
        _queue,
    ):
        for right, text in check(work):
            if not right:
                yield text


def _names(work: Workload) -> Iterator[Finding]:
    spaces = {word(at(one, "metadata", "namespace")) for one in work.documents if one is not work.runtime}
    yield len(spaces) == 1 and "" not in spaces, "metadata.namespace: expected the same in all documents"
    for one in [*work.documents, work.pod]:
        labels, kind = mapping(at(one, "metadata", "labels")), one.get("kind", "pod template")
        ours = labels.get(LABELS[0]) == "dydit-scale" and labels.get(LABELS[1]) == work.name
        yield ours, f"{kind}: metadata.labels: expected {' and '.join(LABELS)}, the latter {work.name}"
    names = [(one.get("kind"), at(one, "metadata", "name")) for one in work.documents]
    yield len(set(map(str, names))) == len(names), "metadata.name: two documents of one kind have the same"
    yield all(word(name) for _, name in names), "metadata.name: a document has none"
    yield is_name(work.name), f"metadata.name: expected {LONGEST_NAME} characters at most, a-z, 0-9 and -"


def _launch(work: Workload) -> Iterator[Finding]:
    box, args = work.container, work.args
    yield box.get("name") == CONTAINER, f"container: expected the name {CONTAINER}, which rules and operators look for"
    digest = re.search(r"@sha256:[0-9a-f]{64}$", str(box.get("image", "")))
    yield digest is not None, "image: expected a digest, NAME@sha256:..."
    yield (
        box.get("command") == ["tini", "--"],
        "command: expected tini as the first process, which reaps and passes signals on",
    )
    head = ["python", "-m", "dydit_scale.cluster.supervise"]
    yield args[:3] == head and args[4:6] == ["--", "torchrun"], "args: expected the supervised torchrun"
    yield "--max-restarts=0" in args, "args: expected --max-restarts=0; whole jobs are restarted, not ranks in place"
    yield args[-1:] == ["--resume"], "args: expected --resume at the end, so that a restart goes on"
    yield box.get("workingDir") == WORKDIR, f"workingDir: expected {WORKDIR}"
    names = [str(e.get("name")) for e in maps(box.get("env"))]
    yield len(set(names)) == len(names), "env: a variable is set twice"
    for name in NEEDED_ENV:
        yield isinstance(work.env.get(name), str) and work.env[name] != "", f"env: expected {name}"
    for e in maps(box.get("env")):
        plain = isinstance(e.get("value"), str)
        yield plain != ("valueFrom" in e), f"env {e.get('name')}: expected a quoted value or valueFrom"
        source = mapping(e.get("valueFrom"))
        whole = plain or "fieldRef" in source or {"name", "key"} == set(mapping(source.get("secretKeyRef")))
        yield whole, f"env {e.get('name')}: valueFrom: expected a secretKeyRef with name and key, or a fieldRef"
        yield (
            not (plain and re.search(r"TOKEN|SECRET|PASSWORD|API_KEY", str(e.get("name")))),
            (f"env {e.get('name')}: expected a secretKeyRef, not the secret itself"),
        )


def _meeting(work: Workload) -> Iterator[Finding]:
    gpus = at(work.container, "resources", "limits", "nvidia.com/gpu")
    ports = {name: p.get("containerPort") for name, p in named(work.container.get("ports")).items()}
    env = work.env
    if work.kind == "TrainJob":
        trainer, policy = at(work.top, "spec", "trainer"), at(work.runtime, "spec", "mlPolicy")
        nodes, ranks = at(trainer, "numNodes"), at(trainer, "numProcPerNode")
        yield number(nodes) >= 1 and nodes == at(policy, "numNodes"), "numNodes: TrainJob and runtime differ"
        yield "torch" in policy, "mlPolicy: expected torch, which injects where ranks meet"
        yield str(ranks) == gpus, "numProcPerNode: expected as many ranks as GPUs"
        known = any(name.startswith("PET_") for name in env)
        yield not known, "env: PET_ variables are injected by the operator"
        yield "rendezvous" not in ports, "ports: rendezvous is the operator's to add, and has another number"
        ref, meta = at(work.top, "spec", "runtimeRef"), at(work.runtime, "metadata")
        same = at(ref, "name") == at(meta, "name") != {} and at(ref, "kind") == work.runtime.get("kind")
        yield (
            same and at(ref, "apiGroup") == "trainer.kubeflow.org",
            "runtimeRef: expected the ClusterTrainingRuntime of this file",
        )
        step = at(
            work.set_spec,
            "replicatedJobs",
            0,
            "template",
            "metadata",
            "labels",
            "trainer.kubeflow.org/trainjob-ancestor-step",
        )
        yield (
            step == "trainer",
            "runtime: expected the label trainjob-ancestor-step: trainer, by which the trainer finds its job",
        )
        framework = at(meta, "labels", "trainer.kubeflow.org/framework")
        yield framework == "torch", "runtime: expected the label framework: torch"
    else:
        nodes = str(work.job_spec.get("parallelism"))
        yield (
            nodes == str(work.job_spec.get("completions")),
            "parallelism and completions: expected one pod for each node",
        )
        yield env.get("PET_NNODES") == nodes, "env PET_NNODES: expected as many nodes as pods"
        yield env.get("PET_NPROC_PER_NODE") == gpus, "env PET_NPROC_PER_NODE: expected as many ranks as GPUs"
        middle = "" if work.kind == "Job" else "-node-0"
        first = f"{work.name}{middle}-0.{work.name}"
        for name in ("MASTER_ADDR", "PET_MASTER_ADDR"):
            yield env.get(name) == first, f"env {name}: expected {first}, the pod of node 0"
        for name in ("MASTER_PORT", "PET_MASTER_PORT"):
            yield env.get(name) == str(ports.get("rendezvous")), f"env {name}: expected the port called rendezvous"
        own = [
            at(e, "valueFrom", "fieldRef", "fieldPath")
            for e in maps(work.container.get("env"))
            if e.get("name") == "PET_NODE_RANK"
        ]
        yield own == [INDEX], "env PET_NODE_RANK: expected the index of the pod in the job"
        yield 1024 <= number(ports.get("rendezvous")) < 65536, "ports: expected one called rendezvous"
    if work.kind == "Job":
        service = work.of_kind("Service")
        subdomain = at(work.pod, "spec", "subdomain")
        yield subdomain == at(service, "metadata", "name") == work.name, "subdomain: expected the Service's name"
        yield at(service, "spec", "clusterIP") == "None", "Service: expected clusterIP None (headless)"
        early = at(service, "spec", "publishNotReadyAddresses")
        yield early is True, "Service: expected publishNotReadyAddresses, for pods meet before they are ready"
        selector = at(service, "spec", "selector")
        yield _selects(selector, work), "Service: the selector does not select the pods"
    else:
        network = at(work.set_spec, "network")
        whole = network == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
        yield whole, "network: expected enableDNSHostnames and publishNotReadyAddresses"
        groups = maps(work.set_spec.get("replicatedJobs"))
        yield (
            [(g.get("name"), g.get("replicas")) for g in groups] == [("node", 1)],
            "replicatedJobs: expected one, called node",
        )
        yield at(work.set_spec, "successPolicy", "operator") == "All", "successPolicy: expected All"
    yield work.job_spec.get("completionMode") == "Indexed", "completionMode: expected Indexed, which numbers the pods"


def _selects(selector: object, work: Workload) -> bool:
    labels = mapping(at(work.pod, "metadata", "labels"))
    return mapping(selector) == {name: labels.get(name) for name in LABELS}


def _resources(work: Workload) -> Iterator[Finding]:
    requests, limits = (mapping(at(work.container, "resources", name)) for name in ("requests", "limits"))
    yield requests == limits, "resources: expected requests equal to limits"
    for name in RESOURCES:
        yield amount(limits.get(name)) > 0, f"resources: expected a quoted quantity of {name}"
    for name in sorted(set(limits) - set(RESOURCES)):
        yield amount(limits[name]) > 0 and "/" in name, f"resources: {name}: expected a device with a quoted count"
    taint = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    yield (
        taint in listed(at(work.pod, "spec", "tolerations")),
        "tolerations: expected the taint of GPU nodes, nvidia.com/gpu",
    )
    affinity = mapping(at(work.pod, "spec", "affinity"))
    for near in maps(at(affinity, "podAffinity", "preferredDuringSchedulingIgnoredDuringExecution")):
        chosen = at(near, "podAffinityTerm", "labelSelector", "matchLabels")
        yield _selects(chosen, work), "affinity: does not select the pods of this job"
    added = at(work.container, "securityContext", "capabilities", "add")
    yield not added, "capabilities: expected none to be added; an ordinary user would not have them"


def _disk(work: Workload) -> Iterator[Finding]:
    volumes = named(at(work.pod, "spec", "volumes"))
    mounts = maps(work.container.get("volumeMounts"))
    yield (
        {word(m.get("name")) for m in mounts} == set(volumes),
        "volumes: expected each to be mounted, and nothing else",
    )
    where = {str(m.get("mountPath")): m for m in mounts}
    yield len(where) == len(mounts), "volumeMounts: two at one place"

    def held(path: str) -> dict[str, object]:
        return mapping(at(volumes, word(at(where, path, "name")), "emptyDir"))

    shm = held("/dev/shm")
    memory = amount(at(work.container, "resources", "limits", "memory"))
    yield shm.get("medium") == "Memory", "/dev/shm: expected an emptyDir in Memory"
    yield (
        0 < amount(shm.get("sizeLimit")) < memory,
        "/dev/shm: expected a sizeLimit below the memory limit, which counts it",
    )
    total = amount(at(work.container, "resources", "limits", "ephemeral-storage"))
    sizes = [amount(held(path).get("sizeLimit")) for path in ("/tmp", CACHE)]
    yield sum(sizes) <= total, f"/tmp and {CACHE}: expected emptyDirs with a sizeLimit, within ephemeral-storage"
    yield (
        all("medium" not in held(path) for path in ("/tmp", CACHE)),
        f"/tmp and {CACHE}: expected the disk, not Memory",
    )
    claims = [v for v in volumes.values() if at(v, "persistentVolumeClaim", "claimName")]
    yield len(claims) == 1, "volumes: expected one claim"
    for path, mount in where.items():
        if at(volumes, word(mount.get("name")), "persistentVolumeClaim"):
            yield path == f"{WORKDIR}/{mount.get('subPath')}", f"{path}: expected the claim's folder of the same name"


def _security(work: Workload) -> Iterator[Finding]:
    pod, box = mapping(at(work.pod, "spec")), mapping(work.container.get("securityContext"))
    own = mapping(pod.get("securityContext"))
    yield own.get("runAsNonRoot") is True, "securityContext: expected runAsNonRoot"
    for name in ("runAsUser", "runAsGroup", "fsGroup"):
        yield number(own.get(name)) > 0, f"securityContext: expected {name}"
    yield (
        at(own, "seccompProfile", "type") == "RuntimeDefault",
        "securityContext: expected seccompProfile RuntimeDefault",
    )
    yield box.get("allowPrivilegeEscalation") is False, "securityContext: expected allowPrivilegeEscalation: false"
    yield box.get("readOnlyRootFilesystem") is True, "securityContext: expected readOnlyRootFilesystem"
    yield at(box, "capabilities", "drop") == ["ALL"], "securityContext: expected capabilities drop: [ALL]"
    yield pod.get("automountServiceAccountToken") is False, "expected automountServiceAccountToken: false"
    yield pod.get("enableServiceLinks") is False, "expected enableServiceLinks: false, for they are variables of others"
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        yield not pod.get(name), f"expected no {name}"
    yield not box.get("privileged"), "securityContext: expected no privileged container"
    policy = fs if isinstance(fs := own.get("fsGroupChangePolicy", ""), str) else ""
    yield (
        policy == "OnRootMismatch",
        "securityContext: expected fsGroupChangePolicy OnRootMismatch, or each start walks the claim",
    )


def _endings(work: Workload) -> Iterator[Finding]:
    grace = number(at(work.pod, "spec", "terminationGracePeriodSeconds"))
    shutdown, supervised = work.option("shutdown-timeout"), work.option("grace")
    yield (
        shutdown is not None and shutdown < grace,
        "--shutdown-timeout: expected less than terminationGracePeriodSeconds",
    )
    yield supervised is not None and supervised == shutdown, "--grace: expected the same as --shutdown-timeout"
    yield work.option("rdzv-conf") is not None, "--rdzv-conf: expected timeout=SECONDS"
    stop = listed(at(work.container, "lifecycle", "preStop", "exec", "command"))
    right = stop[:2] == ["dydit", "stop"] and stop[3:5] == ["--wait", "--timeout"] and len(stop) == 6
    yield right, "preStop: expected dydit stop RUN --wait --timeout SECONDS"
    wait = int(stop[5]) if right and str(stop[5]).isdigit() else None
    yield wait is not None and wait == shutdown, "preStop: expected the timeout of --shutdown-timeout"
    kept = number(at(work.top, "spec", "ttlSecondsAfterFinished"))
    inner = [place for place in (work.set_spec, work.job_spec) if place is not at(work.top, "spec")]
    yield work.kind == "TrainJob" or kept > 0, "expected ttlSecondsAfterFinished"
    yield (
        not any("ttlSecondsAfterFinished" in place for place in inner),
        "ttlSecondsAfterFinished: only of a Job or JobSet itself; what is removed below it would be started again",
    )
    place = work.top.get("spec") if work.kind == "TrainJob" else work.job_spec
    deadline = number(at(place, "activeDeadlineSeconds"))
    yield deadline > grace, "activeDeadlineSeconds: expected more than terminationGracePeriodSeconds"


def _probes(work: Workload) -> Iterator[Finding]:
    stop = listed(at(work.container, "lifecycle", "preStop", "exec", "command"))
    run = stop[2] if len(stop) > 2 else None
    for name in ("startupProbe", "livenessProbe"):
        probe = at(work.container, name)
        words = listed(at(probe, "exec", "command"))
        right = (
            words[:2] == ["dydit", "health"] and words[2:3] == [run] and words[3:4] == ["--max-age"] and len(words) == 5
        )
        yield (
            right and str(words[4]).isdigit(),
            f"{name}: expected dydit health RUN --max-age SECONDS, of the run that preStop stops",
        )
        fits = 1 <= number(at(probe, "timeoutSeconds")) <= number(at(probe, "periodSeconds"))
        yield fits, f"{name}: expected a timeoutSeconds within periodSeconds"
        patience = number(at(probe, "failureThreshold")) * number(at(probe, "periodSeconds"))
        setup = work.option("rdzv-conf") or 0
        yield patience >= setup + HEALTH_MARGIN, f"{name}: gives up before the run's set-up may be over"


def _failures(work: Workload) -> Iterator[Finding]:
    yield at(work.pod, "spec", "restartPolicy") == "Never", "restartPolicy: expected Never, or exit codes are lost"
    yield (
        work.job_spec.get("podReplacementPolicy") == "Failed",
        "podReplacementPolicy: expected Failed: never two writers",
    )
    rules = maps(at(work.job_spec, "podFailurePolicy", "rules"))
    last = "Ignore" if work.kind == "Job" else "FailJob"
    expected = [exit_rule("FailJob", NEVER_AGAIN), exit_rule(last, [int(Exit.STOPPED)]), disruption_rule(last)]
    yield (
        rules == expected,
        f"podFailurePolicy: expected rules for exit codes {NEVER_AGAIN}, {int(Exit.STOPPED)} and DisruptionTarget",
    )
    backoff = number(work.job_spec.get("backoffLimit"))
    if work.kind == "Job":
        yield backoff >= 0, "expected a backoffLimit"
        return
    yield backoff == 0, "backoffLimit: expected 0; the JobSet restarts"
    failure = mapping(work.set_spec.get("failurePolicy"))
    yield (
        failure.get("restartStrategy") == "BlockingRecreate",
        "restartStrategy: expected BlockingRecreate: never two writers",
    )
    yield number(failure.get("maxRestarts")) >= 0, "expected maxRestarts"
    given = {str(rule.get("name")): rule for rule in maps(failure.get("rules"))}
    yield (
        {k: r.get("action") for k, r in given.items()} == SET_ACTIONS,
        f"failurePolicy: expected the rules {', '.join(SET_ACTIONS)}",
    )
    said = {
        "neverAgain": [f"Container {CONTAINER} for pod a/b failed with exit code {c} matching" for c in NEVER_AGAIN],
        "stopped": [f"Container {CONTAINER} for pod a/b failed with exit code {int(Exit.STOPPED)} matching"],
        "disrupted": ["Pod a/b has condition DisruptionTarget matching"],
    }
    for name, rule in given.items():
        reason = "DeadlineExceeded" if name == "tooLong" else "PodFailurePolicy"
        yield rule.get("onJobFailureReasons") == [reason], f"rule {name}: expected the reason {reason}"
        if name == "tooLong":
            yield "onJobFailureMessagePatterns" not in rule, f"rule {name}: expected no pattern"
            continue
        patterns = [str(p) for p in listed(rule.get("onJobFailureMessagePatterns"))]
        for other, texts in said.items():
            for text in texts:
                yield _matches(patterns, text) == (other == name), f"rule {name}: its pattern is wrong for {text!r}"


def _matches(patterns: list[str], text: str) -> bool:
    try:
        return any(re.search(pattern, text) for pattern in patterns)
    except re.error:
        return False


def _network(work: Workload) -> Iterator[Finding]:
    policy = mapping(work.of_kind("NetworkPolicy").get("spec"))
    yield _selects(at(policy, "podSelector", "matchLabels"), work), "NetworkPolicy: does not select the pods"
    yield policy.get("policyTypes") == ["Ingress", "Egress"], "NetworkPolicy: expected both policyTypes"
    for way, key in (("ingress", "from"), ("egress", "to")):
        peers = [peer for rule in maps(policy.get(way)) if "ports" not in rule for peer in maps(rule.get(key))]
        own = [at(peer, "podSelector", "matchLabels") for peer in peers]
        yield (
            len(own) == 1 and _selects(own[0], work),
            f"NetworkPolicy: {way}: expected the own pods, on every port, and no others",
        )
    rules = [rule for rule in maps(policy.get("egress")) if "ports" in rule]
    yield rules in ([NAME_SERVICE], [NAME_SERVICE, OUTSIDE]), "NetworkPolicy: egress: expected ports 53 and at most 443"
    ports: list[Any] = [p.get("containerPort") for p in maps(work.container.get("ports")) if p.get("name") == "metrics"]
    open_to = [rule for rule in maps(policy.get("ingress")) if "ports" in rule]
    yield (
        open_to == [*map(scrape_rule, ports)],
        "NetworkPolicy: ingress: expected the port called metrics, if there is one",
    )
    notes = mapping(at(work.pod, "metadata", "annotations"))
    told = {key: text for key, text in notes.items() if str(key).startswith("prometheus.io/")}
    expected = scrape_notes(ports[0]) if ports else {}
    yield told == expected, f"annotations: expected {expected or 'none of prometheus.io without a port called metrics'}"


def _queue(work: Workload) -> Iterator[Finding]:
    label = at(work.top, "metadata", "labels", "kueue.x-k8s.io/queue-name")
    queued, waits = bool(label), at(work.top, "spec", "suspend") is True
    yield queued == waits, "Kueue: the label queue-name and suspend: true go together"
    others = [one for one in work.documents if one.get("kind") not in STARTED]
    yield (
        not any(at(one, "metadata", "labels", "kueue.x-k8s.io/queue-name") for one in others),
        "Kueue: only the job is queued",
    )
