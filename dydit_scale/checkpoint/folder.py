"""The folder of a run's checkpoints: names, and what comes and goes.

step-0000001000                 complete, for it gets this name last
.tmp-step-0000001000.1f3a90c2   unfinished
.trash-step-0000001000          replaced or no longer kept, about to be deleted
step-0000001000.corrupt         found damaged
step-0000001000.left            of a branch that the run went back from
latest                          the newest name: a hint for people, never read
"""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path

from dydit_scale.checkpoint.files import rename_synced, sync_folder, write_synced
from dydit_scale.checkpoint.manifest import find_damage
from dydit_scale.parallel.faults import fail_point

_NAME = re.compile(r"step-(\d{10,})")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return folder / f"step-{step:010d}"


def step_of(path: Path) -> int | None:
    """The step of a committed checkpoint; None for anything else."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def list_checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints in ``folder``, oldest first; not verified."""
    if not folder.is_dir():
        return []
    found = [(step, path) for path in folder.iterdir() if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found)]


def has_checkpoints(folder: Path) -> bool:
    """True if anything was ever committed to ``folder``: also what is damaged now, or was being replaced."""
    return any(any(folder.glob(pattern)) for pattern in ("step-*", ".trash-step-*"))


def commit(draft: Path, target: Path) -> None:
    """Give a complete draft its name."""
    sync_folder(draft)
    if target.exists():  # a run that went back and came here again
        rename_synced(target, _trash_name(target))
    rename_synced(draft, target)


def after_commit(target: Path, *, keep: int, keep_every: int) -> None:
    """Housekeeping; the checkpoint is safe already, so a failure here is only told."""
    folder = target.parent
    try:
        hint = folder / ".tmp-latest"
        write_synced(hint, f"{target.name}\n".encode())
        rename_synced(hint, folder / "latest")
        steps = list_checkpoints(folder)
        for left in steps[steps.index(target) + 1 :]:
            # of a branch that the run went back from; the next start would take it for the newest
            rename_synced(left, free_name(left, "left"))
            warnings.warn(f"{left}: later than {target.name}, renamed to *.left", RuntimeWarning, stacklevel=2)
        prune(folder, keep=keep, keep_every=keep_every)
        tidy(folder)
    except OSError as error:
        warnings.warn(f"{folder}: tidying up after {target.name} failed: {error}", RuntimeWarning, stacklevel=2)


def prune(folder: Path, *, keep: int, keep_every: int = 0) -> list[Path]:
    """Delete complete checkpoints but for the newest ``keep`` and those of every ``keep_every``-th step (0: none).

    A damaged one is neither counted nor deleted. Returns what went.
    """
    complete = [path for path in list_checkpoints(folder) if find_damage(path, digests=False) is None]
    old = [path for path in complete[:-keep] if not keep_every or (step_of(path) or 0) % keep_every]
    for path in old:
        trash = _trash_name(path)
        rename_synced(path, trash)
        fail_point("checkpoint.pruning", step_of(path))
        shutil.rmtree(trash)
    return old


def tidy(folder: Path) -> None:
    """Remove what a killed process left unfinished. Only for the one process that may write to ``folder``."""
    recover(folder)
    for pattern in (".tmp-step-*", ".trash-step-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def recover(folder: Path) -> None:
    """Take back a checkpoint whose replacement was killed between the two renames of a commit."""
    for trash in folder.glob(".trash-step-*"):
        target = folder / trash.name.removeprefix(".trash-")
        if not target.exists() and find_damage(trash) is None:
            rename_synced(trash, target)


def set_aside(path: Path, problem: str) -> None:
    """Rename a damaged checkpoint to ``*.corrupt`` and say so, loudly."""
    try:
        rename_synced(path, free_name(path, "corrupt"))
    except OSError as error:
        problem = f"{problem} (and not renamed: {error})"
    warnings.warn(f"CHECKPOINT DAMAGED, going back to the one before: {path}: {problem}", RuntimeWarning, stacklevel=2)


def free_name(path: Path, ending: str) -> Path:
    """``path.ending``, with a number if that is taken."""
    number = 0
    while (name := path.with_name(f"{path.name}.{ending}{number or ''}")).exists():
        number += 1
    return name


def _trash_name(path: Path) -> Path:
    return path.with_name(f".trash-{path.name}")
