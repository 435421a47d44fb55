"""Two machines on one: network namespaces, each with an address of its own, joined by one cable that can be cut."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.faults.processes import kill, wait_until

ROOT = Path(__file__).resolve().parents[2]
CABLE = "dydit0"


class Nodes:
    """Two nodes, 0 and 1, that see this file system, and each other through the cable only.

    At the end of the ``with`` no process that runs on them and nothing of the network is left. If this process is
    killed before, the next one that makes nodes clears up.
    """

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self) -> None:
        self._names = [f"dydit-{os.getpid()}-{secrets.token_hex(3)}-{node}" for node in (0, 1)]
        self._undo = ExitStack()

    def __enter__(self) -> Nodes:
        _clear_up()
        with ExitStack() as undo:
            for name in self._names:
                _ip("netns", "add", name)
                undo.callback(_ip, "netns", "delete", name)  # and with it its end of the cable
            a, b = self._names
            _ip("link", "add", CABLE, "netns", a, "type", "veth", "peer", "name", CABLE, "netns", b)
            for name, address in zip(self._names, self.addresses, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
                for device in ("lo", CABLE):
                    _ip("-n", name, "link", "set", device, "up")
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *args: object) -> None:
        with self._undo:
            for node in (0, 1):
                self.kill(node)

    def launch(self, node: int, command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen:
        """Start ``command`` on ``node``, in a process group of its own; stdout and stderr are added to ``log``."""
        with log.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._names[node], *command],
                env={**environment, "GLOO_SOCKET_IFNAME": CABLE, "NCCL_SOCKET_IFNAME": CABLE},
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self, node: int) -> list[int]:
        """The processes that run on ``node``; their launchers may have given them groups of their own."""
        return _processes(self._names[node])

    def kill(self, node: int) -> None:
        """SIGKILL everything on ``node``, as when the machine is reset."""

        _kill_all(self._names[node])

    def cut(self) -> None:
        """From now on what a node sends is lost, and neither is told."""
        _ip("-n", self._names[1], "link", "set", CABLE, "down")

    def heal(self) -> None:
        """Join the nodes again."""
        _ip("-n", self._names[1], "link", "set", CABLE, "up")


def _clear_up() -> None:
    """Remove the nodes of test processes that are no more."""
    for line in _ip("netns", "list").splitlines():
        found = re.match(r"dydit-(\d+)-\S+", line)
        if found and not Path(f"/proc/{found[1]}").exists():
            _kill_all(found[0])
            _ip("netns", "delete", found[0])


def _processes(name: str) -> list[int]:
    return [int(word) for word in _ip("netns", "pids", name).split()]


def _kill_all(name: str) -> None:
    def dead() -> bool:
        kill(_processes(name))
        return not _processes(name)

    wait_until(dead, f"namespace {name} empty", 20)


def why_not() -> str | None:
    """Why there can be no nodes here; None if there can."""
    if shutil.which("ip") is None:
        return "the ip command (iproute2) is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Nodes() as nodes:
            subprocess.run(["ip", "netns", "exec", nodes._names[0], "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces are not permitted here: {getattr(error, 'stderr', None) or error}"
    return None


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
