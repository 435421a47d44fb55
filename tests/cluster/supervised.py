"""Runs launchers that are no launchers under the supervisor, one after the other, and prints what came of each."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

from dydit_scale.cluster.supervise import Supervisor

# A rank: waits, understands SIGUSR1 after {deaf} seconds, and notes how it left.
RANK = """
import os, signal, sys, time
from pathlib import Path
file = Path(os.environ["DYDIT_EXIT_NOTES"]) / ("rank-" + os.environ["RANK"])
def leave(code):
    file.write_text(str(code))
    sys.exit(code)
time.sleep({deaf})
signal.signal(signal.SIGUSR1, lambda *_: leave(75))
file.write_text("1")
time.sleep({lasts})
leave({code})
"""
# Starts its ranks as deepspeed's runner does: it keeps signals to itself and answers 1 for all failures.
LAUNCHER = """
import os, subprocess, sys
codes = [subprocess.Popen([sys.executable, "-c", rank], env=os.environ | {{"RANK": str(n)}})
         for n, rank in enumerate({ranks!r})]
if {abandons}:
    os._exit(0)
sys.exit(1 if any(one.wait() for one in codes) else 0)
"""


def run(
    *ranks: dict[str, float], abandons: bool = False, signal_after: float | None = None, grace: float = 20
) -> dict[str, object]:
    """The supervisor's answer, and how many processes it left behind."""
    scripts = [textwrap.dedent(RANK).format(**{"deaf": 0, "lasts": 0, "code": 0} | rank) for rank in ranks]
    command = [sys.executable, "-c", LAUNCHER.format(ranks=scripts, abandons=abandons)]
    if signal_after is not None:
        threading.Timer(signal_after, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as notes:
        code = Supervisor(Path(notes), grace=grace).run(command)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {"code": int(code), "left": len(children), "seconds": time.monotonic() - began}


if __name__ == "__main__":
    results = {
        "done": run({}, {}),
        "config": run({"code": 64}, {"code": 1}),
        "failed": run({"code": 75}, {"code": 1}),
        "stopped": run({"lasts": 100}, {"lasts": 100}, signal_after=1.5),
        "while importing": run({"deaf": 2, "lasts": 100}, signal_after=0.5),
        "abandoned": run({"lasts": 2, "code": 75}, abandons=True),
        "stubborn": run({"deaf": 100}, signal_after=0.5, grace=1),
    }
    print(json.dumps(results))
