"""The folder of a run's checkpoints: names, and what comes and goes.

step-0000001000                 complete, for it gets this name last
.tmp-step-0000001000.1f3a90c2   unfinished; with .abandoned behind it, given up
.trash-step-0000001000          replaced or no longer kept, about to be deleted
step-0000001000.corrupt         found damaged
step-0000001000.left            of a branch that the run went back from
latest                          the newest name: a hint for people, never read
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from dydit_scale.checkpoint.files import file_digest, rename_synced, sync_folder, write_synced
from dydit_scale.checkpoint.manifest import MANIFEST, Damaged, UnknownFormatError, find_damage, read_manifest
from dydit_scale.parallel.faults import fail_point

_NAME = re.compile(r"step-(\d{10,})")
_READ: dict[Path, tuple[str, str | None]] = {}
"""Of each checkpoint that this process has read whole: the sha256 of its manifest, and what was wrong with it."""


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
    """Give a complete draft its name. FileNotFoundError if it was abandoned meanwhile; then all is as it was."""
    sync_folder(draft)
    if target.exists():  # a run that went back and came here again
        rename_synced(target, _trash_name(target))
    try:
        rename_synced(draft, target)
    except FileNotFoundError:
        recover_one(_trash_name(target))
        raise


def abandon(draft: Path) -> Path | None:
    """Give a draft another name, so that no thread that still writes can commit it; the new name.

    None if it is not there any more: it was committed, or never made.
    """
    name = draft.with_name(f"{draft.name}.abandoned")
    try:
        os.replace(draft, name)
    except FileNotFoundError:
        return None
    return name


def later_than(target: Path) -> list[Path]:
    """Committed checkpoints of later steps than that of ``target``."""
    step = step_of(target)
    assert step is not None, f"{target}: no name of a checkpoint"
    return [path for path in list_checkpoints(target.parent) if (step_of(path) or 0) > step]


def after_commit(target: Path, later: Iterable[Path] = (), *, keep: int, keep_every: int) -> None:
    """Housekeeping; the checkpoint is safe already, so a failure here is only told.

    ``later`` are those that were later before the commit: of a branch that the run went back from.
    """
    folder = target.parent
    try:
        hint = folder / ".tmp-latest"
        write_synced(hint, f"{target.name}\n".encode())
        rename_synced(hint, folder / "latest")
        for left in later:  # the next start would take it for the newest
            rename_synced(left, free_name(left, "left"))
            warnings.warn(f"{left}: later than {target.name}, renamed to *.left", RuntimeWarning, stacklevel=2)
        prune(folder, keep=keep, keep_every=keep_every)
        _remove(_trash_name(target))
    except OSError as error:
        warnings.warn(f"{folder}: tidying up after {target.name} failed: {error}", RuntimeWarning, stacklevel=2)


def prune(folder: Path, *, keep: int, keep_every: int = 0) -> list[Path]:
    """Delete complete checkpoints but for the newest ``keep`` and those of every ``keep_every``-th step (0: none).

    Those that count are read whole, once per process. A damaged one is neither counted nor deleted; of those that go
    sizes are compared only. Returns what went.
    """
    counted, old = 0, []
    for path in reversed(list_checkpoints(folder)):
        if counted < keep:
            counted += _counts(path)
        elif (not keep_every or (step_of(path) or 0) % keep_every) and find_damage(path, digests=False) is None:
            old.append(path)
    old.reverse()
    for path in old:
        trash = _trash_name(path)
        rename_synced(path, trash)
        _READ.pop(path, None)
        fail_point("checkpoint.pruning", step_of(path))
        _remove(trash)
    return old


def remember_whole(path: Path) -> None:
    """The checkpoint at ``path`` was read whole and is right: ``prune`` need not read it again."""
    _READ[path] = file_digest(path / MANIFEST), None


def _counts(path: Path) -> bool:
    """True if all of a checkpoint is right. Warns of one that is not, once."""
    if find_damage(path, digests=False) is not None:
        return False
    digest = file_digest(path / MANIFEST)
    known, problem = _READ.get(path, ("", None))
    if known != digest:
        problem = find_damage(path)
        _READ[path] = digest, problem
        if problem is not None:
            warnings.warn(f"{path}: damaged, not counted among those to keep: {problem}", RuntimeWarning, stacklevel=2)
    return problem is None


def tidy(folder: Path) -> None:
    """Remove what a killed process left unfinished. Only for the one process that may write to ``folder``."""
    recover(folder)
    for pattern in (".tmp-step-*", ".trash-step-*"):
        for path in folder.glob(pattern):
            _remove(path)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):  # a thread that hung may be deleting it too
        shutil.rmtree(path)


def recover(folder: Path) -> None:
    """Take back a checkpoint whose replacement was killed between the two renames of a commit."""
    for trash in folder.glob(".trash-step-*"):
        recover_one(trash)


def recover_one(trash: Path) -> None:
    """Take back one replaced checkpoint if it is whole and has no successor."""
    target = trash.with_name(trash.name.removeprefix(".trash-"))
    if not target.exists() and _worth_keeping(trash):
        rename_synced(trash, target)


def _worth_keeping(trash: Path) -> bool:
    try:
        read_manifest(trash)
    except UnknownFormatError:  # a newer version can read it
        return True
    except Damaged:
        return False
    return find_damage(trash) is None


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
