"""From a recipe and a spec to the text of a file."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from dydit_scale.cluster.command import Job, make_job
from dydit_scale.cluster.kubernetes import render_job, render_jobset, render_trainjob
from dydit_scale.cluster.scripts import render_deepspeed, render_slurm, render_torchrun
from dydit_scale.cluster.spec import ClusterSpec, words

MANIFESTS: dict[str, Callable[[Job], list[dict[str, Any]]]] = {
    "job": render_job,
    "jobset": render_jobset,
    "trainjob": render_trainjob,
}
SCRIPT_TEXTS: dict[str, Callable[[Job], str]] = {
    "slurm": render_slurm,
    "torchrun": render_torchrun,
    "deepspeed": render_deepspeed,
}


def render(path: str, overrides: Sequence[str], spec: ClusterSpec) -> str:
    """The manifest or script that trains the recipe of a file on a cluster; the same words give the same bytes.

    Raises ValueError if recipe and cluster do not fit.
    """
    job = make_job(path, overrides, spec)
    head = "# Made by: " + shlex.join(["dydit", "cluster", "render", path, *overrides, *words(spec)])
    if spec.target in SCRIPT_TEXTS:
        return f"#!/usr/bin/env bash\n{head}\n{SCRIPT_TEXTS[spec.target](job)}"
    return f"{head}\n{to_yaml(MANIFESTS[spec.target](job))}"


def to_yaml(documents: Sequence[dict[str, Any]]) -> str:
    """Documents of one file, in the order in which they are to be made."""
    return "---\n" + "---\n".join(
        yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True) for document in documents
    )


class _Dumper(yaml.SafeDumper):
    """Without anchors; texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
