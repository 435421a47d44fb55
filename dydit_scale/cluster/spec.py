"""What a job asks of a cluster: typed, cross-checked, and the one source of the options of ``dydit cluster render``."""

from __future__ import annotations

import re
from dataclasses import Field, dataclass, field, fields
from typing import Any

SCRIPTS = ("deepspeed", "torchrun", "slurm")
"""Targets that are shell scripts."""
KUBERNETES = ("job", "jobset", "trainjob")
"""Targets that are manifests."""
TARGETS = (*SCRIPTS, *KUBERNETES)
LONGEST_NAME = 40
"""Pods are called NAME-node-0-INDEX-XXXXX, in 63 characters."""
TMP_GIB, SPARE_GIB = 16, 16
"""Of ``disk_gib``: what /tmp may hold, and what is left for logs; the cache has the rest."""
OURS = ("PET_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "JOB_COMPLETION_INDEX", "SLURM_", "DYDIT_EXIT")
"""Beginnings of variables that the launchers set."""

_IMAGE = re.compile(r"[a-z0-9][\w.:/-]*@sha256:[0-9a-f]{64}")
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-\w.]*[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([-\w.]*[A-Za-z0-9])?)?")
_RDMA = re.compile(r"[a-z0-9][-a-z0-9.]*/[A-Za-z0-9][-\w.]*")
_SECRET = re.compile(r"[a-z0-9][-a-z0-9.]*/[-\w.]+")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")


def _option(default: Any, text: str, targets: tuple[str, ...] = TARGETS, placeholder: str = "") -> Any:
    """A field that is an option of the command line, for some targets only."""
    return field(default=default, metadata={"help": text, "targets": targets, "placeholder": placeholder})


_NO_PAIRS: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """A job of ``nodes`` machines with ``gpus`` ranks each. What does not fit is a ValueError that names the option."""

    target: str = field(metadata={"help": "what to write", "targets": TARGETS})
    nodes: int = _option(1, "machines, one pod or task on each")
    gpus: int = _option(8, "GPUs, and ranks, of each machine")
    name: str = _option("", "of the job (default: the recipe's)")
    cpus: int = _option(0, "CPU cores of a node (default: 10 for each GPU)", ("slurm", *KUBERNETES))
    memory_gib: int = _option(0, "memory of a node, GiB (default: 96 for each GPU)", ("slurm", *KUBERNETES))
    shm_gib: int = _option(0, "of the memory: /dev/shm, GiB (default: 8 for each GPU)", KUBERNETES)
    disk_gib: int = _option(200, "disk of a node for /tmp, caches and logs, GiB", KUBERNETES)
    hours: int = _option(
        168,
        "after which the job is ended; of a JobSet each attempt, on Slurm each turn in the queue",
        ("slurm", *KUBERNETES),
    )
    restarts: int = _option(10, "restarts after failures; stops and disruptions do not count", ("slurm", *KUBERNETES))
    queue: str = _option("", "Kueue's local queue; Slurm's partition", ("slurm", *KUBERNETES))
    priority: str = _option("", "PriorityClass; Slurm's quality of service", ("slurm", *KUBERNETES))
    interface: str = _option("", "network interface of NCCL and gloo, e.g. eth0 (default on Kubernetes)")
    env: tuple[tuple[str, str], ...] = _option(_NO_PAIRS, "a variable; may be repeated", placeholder="NAME=VALUE")
    image: str = _option("", "with its digest: NAME@sha256:...", KUBERNETES)
    namespace: str = _option("default", "where the job lives", KUBERNETES)
    pvc: str = _option("", "ReadWriteMany claim; holds the recipe's folders under their own names", KUBERNETES)
    object_store: str = _option("", "URL, s3:// and others, under which data.path is found instead", KUBERNETES)
    secret: tuple[tuple[str, str], ...] = _option(
        _NO_PAIRS, "a variable from a key of a secret; may be repeated", KUBERNETES, "NAME=SECRET/KEY"
    )
    rdma: str = _option(
        "", "resource of the RDMA device plugin, e.g. rdma/ib; containerd needs LimitMEMLOCK=infinity", KUBERNETES
    )
    node_selector: tuple[tuple[str, str], ...] = _option(
        _NO_PAIRS, "label of the nodes; may be repeated", KUBERNETES, placeholder="KEY=VALUE"
    )
    topology: str = _option("", "label of nodes that should be one for all pods, e.g. a rack's", KUBERNETES)
    https: bool = _option(False, "let the pods reach port 443 anywhere, e.g. the hub (data of a URL: on)", KUBERNETES)
    hosts: str = _option("", "names of the machines, node 0 first: a,b,c", ("deepspeed", "torchrun"))

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"--target: expected one of {', '.join(TARGETS)}; got {self.target!r}")
        for option in options():
            if self.target not in option.metadata["targets"] and getattr(self, option.name) != option.default:
                known = ", ".join(option.metadata["targets"])
                raise ValueError(f"{flag(option)} is for {known}; the target is {self.target}")
        self._fill_in()
        for name, least in (("nodes", 1), ("gpus", 1), ("hours", 1), ("restarts", 0), ("cpus", self.gpus)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name}: expected {least} or more; got {getattr(self, name)}")
        self._check_words()
        if self.target in KUBERNETES:
            self._check_kubernetes()
        elif self.hosts and len(self.host_names) != self.nodes:
            raise ValueError(f"--hosts names {len(self.host_names)} machines, --nodes is {self.nodes}")

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.gpus

    @property
    def host_names(self) -> tuple[str, ...]:
        """Of the machines of a script, node 0 first."""
        return tuple(self.hosts.split(",")) if self.hosts else tuple(f"node-{n}" for n in range(self.nodes))

    @property
    def cache_gib(self) -> int:
        """What the node's cache may hold."""
        return self.disk_gib - TMP_GIB - SPARE_GIB

    def _fill_in(self) -> None:
        sizes = {"cpus": 10 * self.gpus, "memory_gib": 96 * self.gpus, "shm_gib": 8 * self.gpus}
        for name, default in sizes.items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, default)
        if self.target in KUBERNETES and not self.interface:
            object.__setattr__(self, "interface", "eth0")

    def _check_words(self) -> None:
        if self.name and not is_name(self.name):
            raise ValueError(
                f"--name: expected a-z, 0-9 and -, from a letter on, {LONGEST_NAME} at most; got {self.name!r}"
            )
        for word in ("queue", "priority", "interface", "hosts"):
            if not re.fullmatch(r"[\w.,-]*", getattr(self, word)):
                raise ValueError(f"--{word}: expected a name; got {getattr(self, word)!r}")
        for name, _ in (*self.env, *self.secret):
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"--env, --secret: expected the name of a variable; got {name!r}")
            if name.startswith(OURS):
                raise ValueError(f"--env {name}: the launchers set it; use --nodes, --gpus or --interface")
        names = [name for name, _ in (*self.env, *self.secret)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"--env, --secret: {twice[0]} is set twice")

    def _check_kubernetes(self) -> None:
        if not _IMAGE.fullmatch(self.image):
            raise ValueError(
                f"--image: expected NAME@sha256: and 64 digits, for a tag may change between restarts; got "
                f"{self.image!r}. `docker buildx imagetools inspect NAME:TAG` prints the digest"
            )
        if not self.pvc:
            raise ValueError("--pvc: expected a ReadWriteMany claim for runs and checkpoints")
        for word in ("pvc", "namespace", "queue", "priority"):
            value = getattr(self, word)
            if value and not (_SUBDOMAIN.fullmatch(value) and len(value) <= 63):
                raise ValueError(f"--{word}: expected a Kubernetes name (a-z, 0-9, - and .); got {value!r}")
        if self.memory_gib <= self.shm_gib or self.shm_gib < 1:
            raise ValueError(
                f"--shm-gib {self.shm_gib}: /dev/shm counts to the memory; expected 1 or more, and less than "
                f"--memory-gib {self.memory_gib}"
            )
        if self.cache_gib < 1:
            raise ValueError(
                f"--disk-gib: expected more than {TMP_GIB + SPARE_GIB} for /tmp and logs; got {self.disk_gib}"
            )
        if self.rdma and not _RDMA.fullmatch(self.rdma):
            raise ValueError(f"--rdma: expected a resource such as rdma/ib; got {self.rdma!r}")
        if self.object_store and "://" not in self.object_store:
            raise ValueError(f"--object-store: expected a URL such as s3://bucket/data; got {self.object_store!r}")
        for key, value in (*self.node_selector, *(((self.topology, ""),) if self.topology else ())):
            if not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
                raise ValueError(f"--node-selector, --topology: expected a label; got {key}={value}")
        for name, place in self.secret:
            if not _SECRET.fullmatch(place):
                raise ValueError(f"--secret {name}: expected SECRET/KEY; got {place!r}")


def is_name(text: str) -> bool:
    """Whether a job may be called so."""
    return bool(_LABEL.fullmatch(text)) and len(text) <= LONGEST_NAME


def options() -> tuple[Field[Any], ...]:
    """The fields of a spec that are options, in order."""
    return tuple(f for f in fields(ClusterSpec) if f.name != "target")


def flag(option: Field[Any]) -> str:
    """As it is typed: --memory-gib."""
    return "--" + option.name.replace("_", "-")


def words(spec: ClusterSpec) -> list[str]:
    """The options that make ``spec``, without those that say nothing new."""
    plain, found = _defaults(spec), ["--target", spec.target]
    for option in options():
        value = getattr(spec, option.name)
        if value == plain[option.name]:
            continue
        if isinstance(value, bool):
            found.append(flag(option))
        elif isinstance(value, tuple):
            found += [word for key, one in value for word in (flag(option), f"{key}={one}")]
        else:
            found += [flag(option), str(value)]
    return found


def _defaults(spec: ClusterSpec) -> dict[str, Any]:
    plain = {option.name: option.default for option in options()}
    plain |= {"cpus": 10 * spec.gpus, "memory_gib": 96 * spec.gpus, "shm_gib": 8 * spec.gpus}
    return plain | ({"interface": "eth0"} if spec.target in KUBERNETES else {})
