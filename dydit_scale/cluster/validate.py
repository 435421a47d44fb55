"""``dydit cluster validate``: whether a rendered file, perhaps edited since, can be trusted with a cluster."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from dydit_scale.cluster.command import CACHE, RECIPE_FILE, WORKDIR, Job, Times, check_fit
from dydit_scale.cluster.pod import NEVER_AGAIN
from dydit_scale.cluster.policy import check_policy
from dydit_scale.cluster.schemas import check_kinds, check_schemas, check_words, missing_validators
from dydit_scale.cluster.spec import ClusterSpec
from dydit_scale.cluster.workload import Workload, at, listed, maps, named, number, read_workload, word
from dydit_scale.train.exits import Exit
from dydit_scale.train.recipe import Recipe, load_recipe

ENDS = "limits.checkpoint and the larger of limits.step and limits.evaluation"
SBATCH = {
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "signal", "open-mode",
    "output", "partition", "qos", "requeue", "account", "constraint", "exclusive", "reservation", "mail-type",
    "mail-user",
}  # fmt: skip
"""Options that are known."""
TRAP = r"^trap '(?!.*\bkill\b).*dydit stop .*' USR1 TERM$"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What came of it."""

    problems: tuple[str, ...]
    checked: tuple[str, ...]
    """Against what."""
    missing: tuple[str, ...] = ()
    """What could not be checked, and why."""


def validate_file(path: Path) -> Findings:
    """Check a manifest or a script. Raises ValueError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if text.startswith("#!"):
        problems = tuple(check_script(text))
        slurm = ("Slurm's options",) if "#SBATCH" in text else ()
        return Findings(problems=problems, checked=("bash", *slurm, "recipe", "rules of this project"))
    try:
        documents = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no YAML: {' '.join(str(error).split())}") from error
    missing = tuple(f"schemas, for {name} is not installed" for name in missing_validators())
    names = ("kubernetes-validate", "kubeflow-trainer-api")
    checked = tuple(name for name in names if name not in missing_validators())
    problems = tuple(check_documents(documents))
    return Findings(problems=problems, checked=(*checked, "recipe", "rules of this project"), missing=missing)


def check_documents(documents: list[Any]) -> Iterator[str]:
    """What is wrong with the manifests of a job, cheap checks first."""
    if not documents or not all(isinstance(one, dict) for one in documents):
        yield "expected documents with kind, metadata and spec"
        return
    wrong = list(check_kinds(documents))
    yield from wrong
    if wrong:
        return
    work = read_workload(documents)
    if isinstance(work, str):
        yield work
        return
    yield from chain(check_policy(work), _check_recipe(work), check_words(documents), check_schemas(work))


def _check_recipe(work: Workload) -> Iterator[str]:
    """The recipe can train here, and times and folders are those that follow from it."""
    args, volumes = work.args, named(at(work.pod, "spec", "volumes"))
    folder, _, name = RECIPE_FILE.rpartition("/")
    mounts = [m for m in maps(work.container.get("volumeMounts")) if m.get("mountPath") == folder]
    held = at(volumes, word(at(mounts, 0, "name")), "configMap", "name")
    config = work.of_kind("ConfigMap")
    text = at(config, "data", name)
    if at(mounts, 0, "readOnly") is not True or held != at(config, "metadata", "name") or not isinstance(text, str):
        yield f"recipe: expected a ConfigMap with {name}, mounted at {folder}, readOnly"
        return
    start = next((n for n, word in enumerate(args) if word == "dydit_scale.train"), None)
    if start is None or args[start - 1] != "-m" or args[start + 1 : start + 2] != [RECIPE_FILE]:
        yield f"args: expected -m dydit_scale.train {RECIPE_FILE}"
        return
    recipe = _recipe(text, tuple(args[start + 2 : -1]))
    if isinstance(recipe, str):
        yield recipe
        return
    yield from _check_against(work, recipe)


@lru_cache(maxsize=64)
def _recipe(text: str, overrides: tuple[str, ...]) -> Recipe | str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            return load_recipe(path, overrides)
        except ValueError as error:
            return str(error).replace(str(path), "of the ConfigMap")


def _check_against(work: Workload, recipe: Recipe) -> Iterator[str]:
    nodes = at(work.top, "spec", "trainer", "numNodes") or work.job_spec.get("parallelism")
    gpus = str(at(work.container, "resources", "limits", "nvidia.com/gpu"))
    if not (number(nodes) >= 1 and gpus.isdigit() and int(gpus) >= 1):
        return  # told elsewhere
    mode = work.env.get("WANDB_MODE")
    env = (("WANDB_MODE", mode),) if isinstance(mode, str) else ()
    spec = ClusterSpec(target="torchrun", nodes=int(number(nodes)), gpus=int(gpus), env=env)
    try:
        check_fit(recipe, spec)
        job = Job(spec=spec, recipe=recipe, path="", text="", overrides=(), times=Times.of(recipe.limits))
        folders = job.folders()
    except ValueError as error:
        yield f"recipe: {error}"
        return
    times = job.times
    grace = number(at(work.pod, "spec", "terminationGracePeriodSeconds"))
    shutdown = work.option("shutdown-timeout") or 0
    if not grace > times.save + 60:
        yield f"terminationGracePeriodSeconds {grace}: expected more than limits.checkpoint ({times.save} s) and 60 s"
    if not shutdown >= times.shutdown:
        yield f"--shutdown-timeout={shutdown}: expected {ENDS}, {times.shutdown} s, or more"
    if not (work.option("rdzv-conf") or 0) >= times.setup:
        yield f"--rdzv-conf: expected timeout={times.setup} (limits.setup) or more"
    for name in ("startupProbe", "livenessProbe"):
        age = at(work.container, name, "exec", "command", 4)
        if not (str(age).isdigit() and int(age) >= times.health):
            yield f"{name}: expected --max-age {times.health} or more, for the watchdog must come first"
    stop = listed(at(work.container, "lifecycle", "preStop", "exec", "command"))
    if f"{WORKDIR}/{recipe.run}" not in stop:
        yield f"preStop: expected the run {WORKDIR}/{recipe.run}"
    mounted = {
        str(m.get("subPath")): not m.get("readOnly", False)
        for m in maps(work.container.get("volumeMounts"))
        if "subPath" in m
    }
    if mounted != folders:
        told = ", ".join(f"{name} ({'written' if writes else 'readOnly'})" for name, writes in folders.items())
        yield f"volumeMounts: expected the folders of the recipe: {told}"
    trace = work.env.get("TORCH_FR_DUMP_TEMP_FILE", "")
    if not str(trace).startswith(f"{recipe.run}/"):
        yield f"env TORCH_FR_DUMP_TEMP_FILE: expected a file in {recipe.run}"
    port = job.metrics_port
    if [p.get("containerPort") for p in maps(work.container.get("ports")) if p.get("name") == "metrics"] != [
        port
    ] * bool(port):
        yield f"ports: expected one called metrics, {port}" if port else "ports: metrics, but the recipe tells none"
    if job.reaches_out and not any(p.get("port") == 443 for p in _egress(work)):
        yield "NetworkPolicy: egress: expected port 443, for data of a URL, W&B or MLflow"
    if work.env.get("HF_HUB_OFFLINE") != "1" and not any(p.get("port") == 443 for p in _egress(work)):
        yield "env: expected HF_HUB_OFFLINE=1, for the hub cannot be reached"
    if recipe.data.cache and not recipe.data.cache.startswith((CACHE, "/tmp")):
        yield f"data.cache {recipe.data.cache}: expected a folder below {CACHE}, for the image is read-only"


def _egress(work: Workload) -> Iterator[dict[str, Any]]:
    for rule in maps(at(work.of_kind("NetworkPolicy"), "spec", "egress")):
        yield from maps(rule.get("ports"))


def check_script(text: str) -> Iterator[str]:
    """What is wrong with a script for Slurm, torchrun or deepspeed."""
    if shutil.which("bash"):
        said = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        if said.returncode:
            yield f"bash: {said.stderr.strip()}"
    flat = text.replace("\\\n", " ")
    command = next((line for line in flat.splitlines() if "dydit_scale.train" in line and not line.startswith("#")), "")
    words = command.replace('"', "").split()
    found = re.search(r"-(?:-module|m) dydit_scale\.train (\S+) (.*?)--resume", command)
    if found is None:
        yield "expected a launcher with -m dydit_scale.train RECIPE ... --resume"
        return
    if "dydit_scale.cluster.supervise" not in words:
        yield "expected python -m dydit_scale.cluster.supervise before the launcher, which passes signals on"
    try:
        recipe = load_recipe(found[1], shlex.split(found[2]))
    except ValueError as error:
        yield str(error)
        return
    times, numbers = Times.of(recipe.limits), dict(re.findall(r"--(grace|shutdown-timeout)=(\d+)", command))
    for name in ("grace", *(["shutdown-timeout"] if "torchrun" in words else [])):
        if int(numbers.get(name, 0)) < times.shutdown:
            yield f"--{name}: expected {ENDS}, {times.shutdown} s, or more"
    if "torchrun" in words:
        for name in ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_MASTER_ADDR", "PET_MASTER_PORT", "PET_NODE_RANK"):
            if not re.search(rf"(^|\s|'){name}=", text, re.MULTILINE):
                yield f"expected {name}, by which torchrun finds the others"
        if "--max-restarts=0" not in words:
            yield "expected --max-restarts=0; whole jobs are restarted, not ranks in place"
    if "#SBATCH" in text:
        yield from _check_slurm(text, times)


def _check_slurm(text: str, times: Times) -> Iterator[str]:
    given = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    for line in lines:
        found = re.match(r"#SBATCH --([\w-]+)", line)
        if found is None or found[1] not in SBATCH:
            yield f"{line}: no option that sbatch is known to have"
    needed = ("nodes", "ntasks-per-node", "gpus-per-node", "time", "signal", "requeue", "open-mode")
    for name in needed:
        if name not in given:
            yield f"expected #SBATCH --{name}"
    exported = dict(re.findall(r"^export (PET_\w+)=(\d+)$", text, re.MULTILINE))
    for option, variable in (("nodes", "PET_NNODES"), ("gpus-per-node", "PET_NPROC_PER_NODE")):
        if given.get(option) != exported.get(variable):
            yield f"--{option} is {given.get(option)}, {variable} {exported.get(variable)}: expected the same"
    signal = re.fullmatch(r"B:USR1@(\d+)", given.get("signal", ""))
    if signal is None or int(signal[1]) <= times.shutdown:
        yield f"--signal: expected B:USR1@SECONDS, more than {times.shutdown}"
    if given.get("ntasks-per-node") != "1":
        yield "--ntasks-per-node: expected 1, a launcher for each node"
    for what, pattern in (
        ("a trap that stops the run, and no signal to srun, which would kill it", TRAP),
        (
            "no restart after exit codes " + ", ".join(map(str, NEVER_AGAIN)),
            rf"^\s*{'.'.join(map(str, NEVER_AGAIN))}\) exit",
        ),
        (f"a requeue after {int(Exit.STOPPED)} if Slurm asked", rf"^\s*{int(Exit.STOPPED)}\) \[ \"\$asked\" = 1 \]"),
        ("scontrol requeue", r"^scontrol requeue"),
    ):
        if not re.search(pattern, text, re.MULTILINE):
            yield f"expected {what}"
