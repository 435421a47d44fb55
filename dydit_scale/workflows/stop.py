"""Ask a run to stop and, if wanted, wait until it has left."""

from __future__ import annotations

import time
from pathlib import Path

from dydit_scale.train.attempt import read_holder
from dydit_scale.train.stopping import STOP_FILE


def stop_run(folder: Path, *, wait: bool = False, timeout: float = 600.0) -> bool:
    """Write the stop file of the process that trains in ``folder``; with ``wait``, return when it has left.

    What happens is printed. Returns False if the run is still there after ``timeout`` seconds of waiting. Nothing is
    written where nothing runs. Raises ValueError if there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"run {folder}: no such folder")
    holder = read_holder(folder)
    if holder is None or not holder.lives(folder):
        last = "" if holder is None else f"; the last was {holder} ({holder.ended or 'it was killed'})"
        print(f"run {folder}: nothing runs there{last}")
        return True
    draft = folder / f".{STOP_FILE}-{holder.token}"
    draft.write_text(holder.token)
    draft.replace(folder / STOP_FILE)
    print(f"run {folder}: asked {holder} to stop after its step", flush=True)
    if not wait:
        return True
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        now = read_holder(folder)
        if now is None or now.token != holder.token or not now.lives(folder):
            how = "it was killed" if now is None or now.ended is None else now.ended
            print(f"run {folder}: it has left ({how})")
            return how in ("Stopped", "done")
        time.sleep(0.5)
    print(f"run {folder}: still there after {timeout:.0f} s; it stops after its step, if it makes progress")
    return False
