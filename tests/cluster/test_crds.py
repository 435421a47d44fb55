"""Rendered manifests, and the words that we allow, against published schemas of JobSet and Kubeflow Trainer.

Skipped without a folder of their CustomResourceDefinitions: DYDIT_CRDS, or shared/schemas beside the project.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from dydit_scale.cluster.schemas import WORDS
from dydit_scale.cluster.workload import KINDS, at
from tests.cluster.golden import ROOT, golden_files

jsonschema = pytest.importorskip("jsonschema")

FOLDER = Path(os.environ.get("DYDIT_CRDS", ROOT.parent / "shared" / "schemas"))
CUSTOM = ("JobSet", "ClusterTrainingRuntime", "TrainJob")

pytestmark = pytest.mark.skipif(not list(FOLDER.glob("*.yaml")), reason=f"no definitions in {FOLDER}")


@lru_cache
def schema_of(kind: str) -> dict[str, Any]:
    """Of the version that we write, strict about unknown fields."""
    for path in FOLDER.glob("*.yaml"):
        definition = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        if at(definition, "spec", "names", "kind") == kind:
            versions = {one["name"]: one["schema"]["openAPIV3Schema"] for one in definition["spec"]["versions"]}
            schema: dict[str, Any] = versions[KINDS[kind].rpartition("/")[2]]
            _forbid_unknown(schema)
            return schema
    raise LookupError(f"{FOLDER}: no definition of {kind}")


def _forbid_unknown(schema: dict[str, Any]) -> None:
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    for _, inner in _inside(schema):
        _forbid_unknown(inner)


def _inside(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Schemas in a schema, with the names that they add to a path."""
    yield from ((f".{name}", inner) for name, inner in schema.get("properties", {}).items())
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield "", schema[key]


def _choices(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, frozenset[str]]]:
    """Paths of fields with a list of allowed words."""
    if "enum" in schema:
        yield path, frozenset(schema["enum"])
    for name, inner in _inside(schema):
        yield from _choices(inner, path + name)


def errors(document: dict[str, Any]) -> list[str]:
    found = jsonschema.Draft202012Validator(schema_of(document["kind"])).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def rendered() -> list[dict[str, Any]]:
    texts = [path.read_text() for path in golden_files() if path.suffix == ".yaml"]
    return [one for text in texts for one in yaml.safe_load_all(text) if one["kind"] in CUSTOM]


def test_rendered_manifests_fit_the_definitions() -> None:
    documents = rendered()
    assert {one["kind"] for one in documents} == set(CUSTOM) and len(documents) >= 5
    assert [f"{one['kind']}: {text}" for one in documents for text in errors(one)] == []


def test_what_does_not_fit_is_found() -> None:
    for document in rendered():
        document["spec"]["suspendd"] = True
        assert any("suspendd" in text for text in errors(document))
    runtime = next(one for one in rendered() if one["kind"] == "ClusterTrainingRuntime")
    at(runtime, "spec", "template", "spec", "failurePolicy", "rules", 0)["action"] = "Nope"
    assert any("'Nope' is not one of" in text for text in errors(runtime))


def test_words_are_those_of_the_definitions() -> None:
    found: dict[str, set[frozenset[str]]] = {}
    for kind in CUSTOM:
        for path, choices in _choices(schema_of(kind)):
            for end in WORDS:
                if path.endswith(f".{end}"):
                    found.setdefault(end, set()).add(choices)
    assert set(found) == {"failurePolicy.rules.action", "failurePolicy.restartStrategy", "successPolicy.operator"}
    assert found == {end: {frozenset(WORDS[end])} for end in found}
