"""``python -m tests.cluster.golden`` makes the files under cluster/ anew, each by the command in its head."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from dydit_scale.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
HEAD = "# Made by: dydit "


def golden_files() -> list[Path]:
    """The rendered files that are kept."""
    return sorted(path for path in (ROOT / "cluster").rglob("*") if path.is_file() and HEAD in path.read_text()[:500])


def command_of(path: Path) -> list[str]:
    """The words behind ``dydit`` that make a file."""
    line = next(line for line in path.read_text().splitlines() if line.startswith(HEAD))
    return shlex.split(line.removeprefix(HEAD))


if __name__ == "__main__":
    os.chdir(ROOT)
    for file in golden_files():
        assert main([*command_of(file), "--out", str(file)]) == 0, file
