"""Whatever is broken in a manifest or a script is found: typos, missing fields, wrong words, odd numbers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dydit_scale.cluster import schemas, validate
from dydit_scale.cluster.schemas import VALIDATORS, WORDS, check_schemas, check_words
from dydit_scale.cluster.validate import check_documents, check_script, validate_file
from dydit_scale.cluster.workload import Workload, at, leaves, read_workload
from tests.cluster.golden import ROOT, golden_files

for module in VALIDATORS:
    pytest.importorskip(module)

Path_ = tuple[str | int, ...]
MANIFESTS = [path for path in golden_files() if path.suffix == ".yaml"]
SCRIPTS = [path for path in golden_files() if path.suffix != ".yaml"]
# What may be missing: a job without it starts elsewhere, later or with less, but not wrongly.
MAY_GO = re.compile(
    r"(nodeSelector|affinity|priorityClassName)\b(?!.*(podAffinityTerm$|topologyKey$|weight$|labels\.))"
    r"|args\.13$"  # data.cache
    r"|env\.(16|17|18)$"  # variables of the object store
)
# Labels of a cluster are its own.
FREE = re.compile(r"nodeSelector\.")


def documents_of(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def paths(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, one in pairs:
        yield (*path, step)
        yield from paths(one, (*path, step))


def changed(documents: list[Any], path: Path_, change: Callable[[Any, Any], None]) -> list[Any]:
    """A copy with ``change(parent, key)`` made at ``path``."""
    found = copy.deepcopy(documents)
    parent: Any = found
    for step in path[:-1]:
        parent = parent[step]
    change(parent, path[-1])
    return found


def misspell(parent: Any, key: str) -> None:
    items = [(name + "x" if name == key else name, value) for name, value in parent.items()]
    parent.clear()
    parent.update(items)


def remove(parent: Any, key: Any) -> None:
    del parent[key]


def dotted(path: Path_) -> str:
    return ".".join(map(str, path))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_every_typo_and_every_missing_part_is_found(path: Path) -> None:
    documents = documents_of(path)
    assert list(check_documents(documents)) == []
    typos = missing = 0
    unseen = []
    for place in paths(documents):
        if isinstance(place[-1], str) and not FREE.search(dotted(place)):
            typos += 1
            if next(check_documents(changed(documents, place, misspell)), None) is None:
                unseen.append(f"typo: {dotted(place)}")
        if not MAY_GO.search(dotted(place)):
            missing += 1
            if next(check_documents(changed(documents, place, remove)), None) is None:
                unseen.append(f"gone: {dotted(place)}")
    assert unseen == []
    assert typos >= 240 and missing >= 320, (typos, missing)


def test_every_wrong_word_is_found() -> None:
    tried: dict[str, int] = dict.fromkeys(WORDS, 0)
    for path in MANIFESTS:
        documents = documents_of(path)
        for place, _ in leaves(documents):
            names = "." + ".".join(step for step in place if isinstance(step, str))
            for end in (end for end in WORDS if names.endswith("." + end)):
                tried[end] += 1
                wrong = changed(documents, place, lambda parent, key: parent.__setitem__(key, "Nope"))
                assert [text for text in check_words(wrong) if "'Nope'" in text], dotted(place)
    assert sum(tried.values()) >= 100
    assert [end for end, count in tried.items() if count == 0] == []


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_schemas_alone_find_unknown_fields_and_wrong_types(path: Path) -> None:
    """What the rules of the project would find first is not shown to them here."""
    documents = documents_of(path)
    free = re.compile(r"labels|annotations|matchLabels|nodeSelector|\.selector|requests|limits|\.data\.|clusterIP$")
    tried, unseen = 0, []
    for place in paths(documents):
        # kind and version choose the schema; the container's name finds the one that trains
        if len(place) < 3 or isinstance(place[-1], int) or free.search(dotted(place)):
            continue
        for what, change in (
            ("typo", misspell),
            ("type", lambda parent, key: parent.__setitem__(key, [[1.5]])),
        ):
            wrong = changed(documents, place, change)
            work = read_workload(wrong)
            tried += 1
            if isinstance(work, Workload) and next(check_schemas(work), None) is None:
                unseen.append(f"{what}: {dotted(place)}")
    assert unseen == []
    assert tried >= 300


def job() -> list[Any]:
    return documents_of(ROOT / "cluster" / "kubernetes" / "job.yaml")


def trainjob() -> list[Any]:
    return documents_of(ROOT / "cluster" / "kubernetes" / "trainjob.yaml")


POD: Path_ = (3, "spec", "template", "spec")
BOX: Path_ = (*POD, "containers", 0)
JOB_ENV = [e["name"] for e in at(job(), *BOX, "env")]


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        ((3, "spec", "parallelism"), 8, "parallelism and completions"),
        ((*BOX, "env", JOB_ENV.index("PET_NNODES"), "value"), "5", "PET_NNODES: expected as many nodes as pods"),
        ((*BOX, "env", JOB_ENV.index("PET_NPROC_PER_NODE"), "value"), "4", "PET_NPROC_PER_NODE"),
        ((*BOX, "env", JOB_ENV.index("MASTER_PORT"), "value"), "29501", "MASTER_PORT: expected the port"),
        (
            (*BOX, "env", JOB_ENV.index("MASTER_ADDR"), "value"),
            "flux-0.flux",
            "MASTER_ADDR: expected flux-dev-td-lora-0",
        ),
        ((*BOX, "env", 0), {"name": "HF_TOKEN", "value": "hf_abc"}, "HF_TOKEN: expected a secretKeyRef"),
        ((*BOX, "ports", 0, "containerPort"), 29501, "expected the port called rendezvous"),
        ((*BOX, "image"), "registry.example.com/dydit_scale:1.0", "image: expected a digest"),
        ((*BOX, "resources", "limits", "nvidia.com/gpu"), 8, "expected requests equal to limits"),
        ((*BOX, "resources", "requests", "cpu"), "1", "expected requests equal to limits"),
        ((*BOX, "securityContext", "capabilities", "add"), ["IPC_LOCK"], "expected none to be added"),
        ((*BOX, "securityContext", "privileged"), True, "no privileged container"),
        ((*POD, "hostNetwork"), True, "expected no hostNetwork"),
        ((*POD, "terminationGracePeriodSeconds"), 1800, "expected less than terminationGracePeriodSeconds"),
        ((*POD, "restartPolicy"), "OnFailure", "restartPolicy: expected Never"),
        ((*POD, "subdomain"), "other", "subdomain: expected the Service's name"),
        ((*POD, "volumes", 2, "emptyDir", "sizeLimit"), "800Gi", "sizeLimit below the memory limit"),
        ((*POD, "volumes", 4, "emptyDir", "sizeLimit"), "900Gi", "within ephemeral-storage"),
        ((*BOX, "livenessProbe", "exec", "command", 4), "600", "the watchdog must come first"),
        ((*BOX, "startupProbe", "failureThreshold"), 5, "startupProbe: gives up before"),
        ((*BOX, "livenessProbe", "failureThreshold"), 3, "livenessProbe: gives up before"),
        ((3, "spec", "activeDeadlineSeconds"), 3600, "more than terminationGracePeriodSeconds"),
        (
            (*BOX, "lifecycle", "preStop", "exec", "command", 2),
            "/workspace/runs/other",
            "of the run that preStop stops",
        ),
        ((*BOX, "volumeMounts", 3, "readOnly"), False, "volumeMounts: expected the folders of the recipe"),
        (
            (*BOX, "args", 7),
            "--shutdown-timeout=60",
            "--shutdown-timeout=60: expected limits.checkpoint and the larger",
        ),
        (
            (3, "spec", "podFailurePolicy", "rules", 0, "onExitCodes", "values"),
            [64],
            "podFailurePolicy: expected rules",
        ),
        ((3, "spec", "suspend"), True, "Kueue: the label queue-name and suspend"),
        ((0, "data", "recipe.yaml"), "name: x", "recipe: "),
        ((2, "spec", "egress", 0), {}, "expected the own pods"),
    ],
    ids=lambda value: dotted(value)[-40:] if isinstance(value, tuple) else None,
)
def test_what_does_not_fit_together_is_found(place: Path_, value: Any, text: str) -> None:
    wrong = changed(job(), place, lambda parent, key: parent.__setitem__(key, value))
    assert any(text in problem for problem in check_documents(wrong)), list(check_documents(wrong))


def test_ranks_times_nodes_and_times_are_those_of_the_recipe() -> None:
    documents = job()
    recipe = documents[0]["data"]["recipe.yaml"]
    documents[0]["data"]["recipe.yaml"] = recipe.replace("batch_size: 64", "batch_size: 48")
    assert any("48: not divisible by 32 ranks" in text for text in check_documents(documents))
    documents[0]["data"]["recipe.yaml"] = recipe + "limits: {checkpoint: 7200}\n"
    found = list(check_documents(documents))
    assert any("expected more than limits.checkpoint (7200 s) and 60 s" in text for text in found)
    documents[0]["data"]["recipe.yaml"] = recipe.replace("  steps:", "  stepz:")
    assert any("unknown key train.stepz" in text for text in check_documents(documents))


def test_a_trainjob_and_its_runtime_must_agree() -> None:
    runtime: Path_ = (2, "spec", "template", "spec")
    inner: Path_ = (*runtime, "replicatedJobs", 0, "template", "spec")
    box: Path_ = (*inner, "template", "spec", "containers", 0)
    for place, value, text in (
        ((3, "spec", "runtimeRef", "name"), "other", "expected the ClusterTrainingRuntime of this file"),
        ((3, "spec", "trainer", "numNodes"), 3, "numNodes: TrainJob and runtime differ"),
        ((3, "spec", "trainer", "numProcPerNode"), 4, "expected as many ranks as GPUs"),
        ((3, "spec", "trainer", "env", 0, "name"), "PET_NNODES", "injected by the operator"),
        ((*runtime, "failurePolicy", "restartStrategy"), "Recreate", "never two writers"),
        ((*runtime, "failurePolicy", "rules", 0, "onJobFailureMessagePatterns"), ["exit code 6"], "rule neverAgain"),
        ((*runtime, "failurePolicy", "rules", 1, "onJobFailureMessagePatterns"), ["("], "rule stopped"),
        ((*runtime, "failurePolicy", "rules", 3, "onJobFailureReasons"), ["PodFailurePolicy"], "DeadlineExceeded"),
        ((*runtime, "ttlSecondsAfterFinished"), 600, "would be started again"),
        ((*inner, "ttlSecondsAfterFinished"), 600, "would be started again"),
        ((*box, "ports"), [{"name": "rendezvous", "containerPort": 29500}], "rendezvous is the operator's to add"),
    ):
        wrong = changed(trainjob(), place, lambda parent, key, value=value: parent.__setitem__(key, value))
        assert any(text in problem for problem in check_documents(wrong)), dotted(place)


@pytest.mark.parametrize("value", [None, 3, "text", [], [3], {"kind": "Job"}, {"kind": "Pod", "apiVersion": "v1"}])
def test_no_manifest_is_told_not_raised(value: Any) -> None:
    assert next(check_documents([value]), None)


def test_any_part_may_be_nonsense() -> None:
    """Nothing is raised, whatever a part is exchanged for."""
    tried = 0
    for documents in (job(), trainjob()):
        for place in paths(documents):
            for value in (None, [], {}, 7):
                wrong = changed(documents, place, lambda parent, key, value=value: parent.__setitem__(key, value))
                next(check_documents(wrong), None)
                tried += 1
    assert tried >= 2000


def test_missing_validators_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        assert name in VALIDATORS

    monkeypatch.setattr(schemas.importlib.util, "find_spec", none)
    found = validate_file(MANIFESTS[0])
    assert len(found.missing) == 2 and "kubernetes-validate is not installed" in "".join(found.missing)
    assert found.problems == () and found.checked == ("recipe", "rules of this project")
    assert validate.missing_validators() == list(VALIDATORS.values())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_broken_scripts_are_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    changes = [
        ("--resume", "--resum"),
        ("--grace=3600", "--grace=24"),
        ("dydit_scale.cluster.supervise", "dydit_scale.supervise"),
        ("recipes/flux/dev_td_lora.yaml --resume", "recipes/flux/none.yaml --resume"),
    ]
    if "torchrun" in text:
        changes += [("--max-restarts=0", "--max-restarts=1"), ("--shutdown-timeout=3600", "--shutdown-timeout=30")]
        changes += [(f"{name}=", f"X{name}=") for name in ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR")]
    if "#SBATCH" in text:
        options = sorted({line.split("=")[0] for line in text.splitlines() if line.startswith("#SBATCH")})
        changes += [(option, option + "x") for option in options]
        changes += [
            ("@3720", "@100"),
            ("USR1@", "@"),
            ("esac", "esa"),
            ("scontrol requeue", "scontrol"),
            ("64|70|71)", "64|71)"),
        ]
        changes += [
            ("PET_NNODES=4", "PET_NNODES=3"),
            ("gpus-per-node=8", "gpus-per-node=4"),
            ("dydit stop", "dydit ls"),
            ("' USR1 TERM", '; kill -TERM "$step"\' USR1 TERM'),
        ]
    assert list(check_script(text)) == []
    for old, new in changes:
        assert old in text
        assert next(check_script(text.replace(old, new)), None), f"{old} -> {new}"
    assert len(changes) >= 4
