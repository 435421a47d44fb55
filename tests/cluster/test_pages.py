"""The pages about clusters: their links, their figures, and the commands that need no cluster."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dydit_scale.cluster.command import HEALTH_MARGIN, PORT, Times
from dydit_scale.cluster.spec import TARGETS
from dydit_scale.parallel.watchdog import LimitsConfig
from tests.cluster.golden import ROOT
from tests.parallel.launch import child_environment

PAGES = [ROOT / "docs" / "cluster.md", *sorted((ROOT / "docs" / "launch").glob("*.md"))]
BIN = Path(sys.executable).parent


def blocks(page: Path) -> list[str]:
    """The commands of a page that are marked to be run."""
    return re.findall(r"^```bash run\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def test_there_are_pages_with_commands() -> None:
    assert len(PAGES) == 7 and sum(len(blocks(page)) for page in PAGES) == 8


def test_links_lead_to_files() -> None:
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())]
    assert len(links) >= 10
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []


def test_figures_are_those_of_the_code() -> None:
    times, page = Times.of(LimitsConfig()), PAGES[0].read_text()
    for number in (times.save, times.shutdown, times.grace, times.setup, times.health):
        assert f"| {number} |" in page
    assert f"the largest limit and {HEALTH_MARGIN}" in page and f"port {PORT}" in PAGES[5].read_text()
    assert all(f"`{target}`" in page for target in TARGETS)


@pytest.mark.slow  # each command starts Python and its libraries
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_run(page: Path, tmp_path: Path) -> None:
    for name in ("recipes", "cluster", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = "set -euo pipefail\n" + "\n".join(blocks(page))
    environment = child_environment() | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    said = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert said.returncode == 0, (said.stdout + said.stderr)[-3000:]
    if page.stem == "failures":
        assert "exit code 64" in said.stdout and "did you mean train.lr?" in said.stderr
    assert ": valid (" in said.stdout or "validate" not in script
