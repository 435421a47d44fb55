"""Start the ranks of a test as processes of this machine, as torchrun would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def child_environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


class Ranks:
    """``python -m module *args`` once per rank; ``wait`` returns when all went well.

    It raises otherwise. No process outlives the ``with``.
    """

    def __init__(self, module: str, *args: str, world_size: int = 2) -> None:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
        self.logs: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(world_size)]  # noqa: SIM115  (read at the end)
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", module, *args],
                env=child_environment() | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(self.logs)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *args: object) -> None:
        for process in self.processes:
            process.kill()

    def wait(self, seconds: float = 280) -> None:
        codes = [process.wait(seconds) for process in self.processes]
        assert not any(codes), "\n".join(f"rank {n}: exit {code}\n{self._log(n)}" for n, code in enumerate(codes))

    def _log(self, rank: int) -> str:
        self.logs[rank].seek(0)
        return self.logs[rank].read().decode(errors="replace")[-5000:]
