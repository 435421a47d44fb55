"""Starts programs of this environment and waits for them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def launch(recipe: str | Path, *overrides: str) -> None:
    """Train a recipe under the deepspeed launcher, on two processes.

    Raises ValueError if that fails.
    """
    port = str(_free_port())  # the launcher's own is taken while another run is under way
    options = ("--num_gpus", "2", "--master_port", port, "--module", "dydit_scale.train")
    call("deepspeed", *options, recipe, *overrides)


def call(program: str, *words: str | Path) -> None:
    """Print a command and run it, with OMP_NUM_THREADS=1 unless the environment sets another.

    Raises ValueError naming the command if it fails.
    """
    folder = Path(sys.executable).parent
    command = [str(folder / program), *map(str, words)]
    line = " ".join([program, *command[1:]])
    print(f"  $ {line}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment["PATH"] = f"{folder}{os.pathsep}{environment['PATH']}"
    if subprocess.run(command, env=environment, check=False).returncode:
        raise ValueError(f"the command above failed: {line}")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
