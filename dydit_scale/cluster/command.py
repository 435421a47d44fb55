"""What every target agrees on: the training command, its environment, where ranks meet and how long an end takes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dydit_scale.cluster.spec import KUBERNETES, LONGEST_NAME, ClusterSpec
from dydit_scale.data.remote import is_url
from dydit_scale.parallel.watchdog import LimitsConfig
from dydit_scale.parallel.world import World
from dydit_scale.train.checks import check_batch
from dydit_scale.train.recipe import Recipe, load_recipe

PORT = 29500
"""Where rank 0's launcher waits for the others."""
TRAINER_PORT = 29400
"""The same in a TrainJob: Kubeflow Trainer sets and opens it."""
RECIPE_FILE = "/etc/dydit/recipe.yaml"
"""The recipe in a pod."""
WORKDIR = "/workspace"
"""Of a pod: what the recipe names by relative paths lies below it."""
IMAGE_FOLDER = "recipes"
"""The folder in WORKDIR that comes with the image; all others come from the claim."""
CACHE = "/cache"
HEALTH_MARGIN = 300
"""Seconds by which a probe is more patient than the watchdog."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds; each end leaves room for the one inside it."""

    setup: int
    """How long a node waits for the others, and a run for its first step."""
    save: int
    """A checkpoint at most; the watchdog ends what takes longer."""
    shutdown: int
    """The step or evaluation under way and a save: what ranks have after they were asked to stop."""
    grace: int
    """What a pod or job has from the same moment until it is killed."""
    health: int
    """Age of a sign of life at which a run counts as dead."""

    @staticmethod
    def of(limits: LimitsConfig) -> Times:
        """Those that follow from a recipe's limits."""
        save = math.ceil(limits.checkpoint)
        shutdown = math.ceil(max(limits.step, limits.evaluation)) + save
        return Times(
            setup=math.ceil(limits.setup), save=save, shutdown=shutdown, grace=shutdown + 120,
            health=math.ceil(limits.collective) + HEALTH_MARGIN,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe and a spec that fit together."""

    spec: ClusterSpec
    recipe: Recipe
    path: str
    """Of the recipe, as it was given."""
    text: str
    """Of the recipe's file."""
    overrides: tuple[str, ...]
    """As they were given, and those that the spec asks for."""
    times: Times

    @property
    def name(self) -> str:
        """Of all that is made in the cluster."""
        return self.spec.name or plain_name(self.recipe.name)

    @property
    def metrics_port(self) -> int:
        """Where a node tells its metrics; 0 if it does not."""
        return self.recipe.monitor.prometheus_port

    @property
    def reaches_out(self) -> bool:
        """Whether pods need more than one another and the name service."""
        sinks = set(self.recipe.monitor.sinks) - {"tensorboard"}
        if dict(self.spec.env).get("WANDB_MODE") == "offline":
            sinks -= {"wandb"}
        return self.spec.https or bool(sinks) or any(is_url(path) for path in data_paths(self.recipe))

    @property
    def environment(self) -> dict[str, str]:
        """Of the launcher and its ranks, without what differs from node to node."""
        ours = {
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "OMP_NUM_THREADS": str(max(1, min(8, self.spec.cpus // self.spec.gpus))),
            "NCCL_DEBUG": "WARN",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_FR_BUFFER_SIZE": "2000",
            "TORCH_FR_DUMP_TEMP_FILE": f"{self.recipe.run}/nccl-trace-rank-",
        }
        if self.spec.interface:
            ours |= {"NCCL_SOCKET_IFNAME": self.spec.interface, "GLOO_SOCKET_IFNAME": self.spec.interface}
        if self.spec.target in KUBERNETES:
            ours |= {
                "HOME": "/tmp",
                "TMPDIR": "/tmp",
                "XDG_CACHE_HOME": CACHE,
                "HF_HOME": f"{CACHE}/huggingface",
                "TRITON_CACHE_DIR": f"{CACHE}/triton",
                "TORCHINDUCTOR_CACHE_DIR": f"{CACHE}/inductor",
            }
            ours |= {} if self.reaches_out else {"HF_HUB_OFFLINE": "1"}
        return ours | dict(self.spec.env)

    @property
    def rendezvous(self) -> dict[str, str]:
        """What torchrun reads from its environment, besides the node's number and the address of node 0."""
        spec = self.spec
        return {"PET_NNODES": str(spec.nodes), "PET_NPROC_PER_NODE": str(spec.gpus), "PET_MASTER_PORT": str(PORT)}

    @property
    def training(self) -> list[str]:
        """The training program and its words; they are the same at a first start and at a restart."""
        recipe = RECIPE_FILE if self.spec.target in KUBERNETES else self.path
        return ["dydit_scale.train", recipe, *self.overrides, "--resume"]

    @property
    def torchrun(self) -> list[str]:
        """The supervised launcher of one node; who it is and whom it meets is in its environment."""
        options = ["--max-restarts=0", f"--shutdown-timeout={self.times.shutdown}"]
        options.append(f"--rdzv-conf=timeout={self.times.setup}")
        return [*self.supervisor, "torchrun", *options, "-m", *self.training]

    @property
    def supervisor(self) -> list[str]:
        """What passes a request to stop on to the ranks and leaves with their exit code."""
        return ["python", "-m", "dydit_scale.cluster.supervise", f"--grace={self.times.shutdown}", "--"]

    def folders(self) -> dict[str, bool]:
        """Folders of the claim that the recipe reads, and whether it writes there, by their names under WORKDIR.

        Raises ValueError for a path that no folder of the claim can hold.
        """
        found = {_first(self.recipe.run, "run"): True}
        paths = [("model.base", self.recipe.model.base), ("engine.deepspeed", self.recipe.engine.deepspeed or "")]
        paths += [("data.path", path) for path in data_paths(self.recipe) if not is_url(path)]
        for key, path in paths:
            if path and (name := _first(path, key)) != IMAGE_FOLDER:
                found.setdefault(name, False)
        return found


def make_job(path: str, overrides: Sequence[str], spec: ClusterSpec) -> Job:
    """The job of a recipe on a cluster. Raises ValueError if something in either, or of both together, does not fit."""
    overrides = list(overrides)
    if spec.object_store:  # a cache is for URLs only, so it cannot be asked for before the path is one
        without_cache = [text for text in overrides if not text.startswith("data.cache")]
        overrides += _from_store(load_recipe(path, without_cache), spec)
    recipe = load_recipe(path, overrides)
    if spec.target in KUBERNETES and any(map(is_url, data_paths(recipe))) and not recipe.data.cache:
        overrides += [f"data.cache={CACHE}/shards"]
        recipe = load_recipe(path, overrides)
    job = Job(
        spec=spec, recipe=recipe, path=path, text=Path(path).read_text(encoding="utf-8"), overrides=tuple(overrides),
        times=Times.of(recipe.limits),
    )  # fmt: skip
    check_fit(recipe, spec)
    if spec.target in KUBERNETES:
        job.folders()
    return job


def check_fit(recipe: Recipe, spec: ClusterSpec) -> None:
    """ValueError if a recipe cannot train on such a cluster."""
    engine = recipe.engine.name
    if engine == "single" and spec.world_size > 1:
        raise ValueError(
            f"engine.name is single, one process, but there are {spec.world_size} ranks; set engine.name=zero"
        )
    if spec.target == "deepspeed" and engine != "zero":
        raise ValueError(f"--target deepspeed: expected engine.name=zero; got {engine}. torchrun starts every engine")
    check_batch(recipe, World(world_size=spec.world_size))
    if (port := recipe.monitor.prometheus_port) in (PORT, TRAINER_PORT):
        raise ValueError(f"monitor.prometheus_port {port}: there the launchers meet; choose another, e.g. 9464")
    grace = Times.of(recipe.limits).grace
    if spec.target in ("slurm", *KUBERNETES) and spec.hours * 3600 <= grace:
        raise ValueError(
            f"--hours {spec.hours}: expected more than {grace} s, which an orderly end may take; lower limits.step, "
            "limits.evaluation and limits.checkpoint, or raise --hours"
        )
    if spec.target in KUBERNETES and recipe.data.cache.startswith(CACHE) and recipe.data.cache_gib > spec.cache_gib:
        raise ValueError(
            f"data.cache_gib {recipe.data.cache_gib:g}: the node's cache holds {spec.cache_gib} GiB; set it lower, or "
            "--disk-gib higher"
        )


def data_paths(recipe: Recipe) -> list[str]:
    """Folders and URLs of the data."""
    return [config.path for config in recipe.data.split()]


def plain_name(text: str) -> str:
    """A recipe's name as Kubernetes takes it."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:LONGEST_NAME].strip("-")
    return name if re.match("[a-z]", name) else f"run-{name}"[:LONGEST_NAME].strip("-")


def _from_store(recipe: Recipe, spec: ClusterSpec) -> list[str]:
    if recipe.data.sources:
        raise ValueError("--object-store: data.sources has several places; give each its URL in the recipe")
    if is_url(recipe.data.path):
        raise ValueError(f"--object-store: data.path is a URL already, {recipe.data.path}; leave out one of the two")
    return [f"data.path={spec.object_store.rstrip('/')}/{recipe.data.path.strip('/')}"]


def _first(path: str, key: str) -> str:
    """The first part of a relative path: the folder of the claim that holds it."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or len(parts) < 2:
        raise ValueError(
            f"{key} {path}: expected a path such as folder/name, whose folder is mounted from the claim below {WORKDIR}"
        )
    if key == "run" and parts[0] == IMAGE_FOLDER:
        raise ValueError(f"run {path}: {IMAGE_FOLDER}/ is part of the image; set run=runs/{parts[-1]}")
    return parts[0]
