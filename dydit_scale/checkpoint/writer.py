"""Saving a run while it trains: every rank writes what it holds, rank 0 commits when all have."""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dydit_scale.checkpoint.agree import first_problem, on_main
from dydit_scale.checkpoint.draft import Origin, missing_ranks, write_manifest, write_parts
from dydit_scale.checkpoint.errors import CheckpointError
from dydit_scale.checkpoint.files import check_space
from dydit_scale.checkpoint.folder import (
    abandon,
    after_commit,
    checkpoint_path,
    commit,
    later_than,
    remember_whole,
    tidy,
)
from dydit_scale.checkpoint.parts import Part, Parts, Stage, whole
from dydit_scale.parallel.faults import fail_point
from dydit_scale.parallel.world import ONE_PROCESS, World, broadcast_object, gather_objects

_ROUND_SECONDS = 10.0
"""Ranks that wait for each other's files meet so often, so that no collective times out over a slow disk."""


class SaveReport(NamedTuple):
    """What became of one save; the same on every rank but for ``blocked_seconds``."""

    step: int
    path: Path | None
    """None if it failed."""
    problem: str
    """Why it failed; empty if it did not."""
    failures: int
    """Failed saves in a row, up to this one."""
    fatal: bool
    """It failed and ends the run."""
    blocked_seconds: float
    """Time that training on this rank stood still for it."""
    total_seconds: float
    """From the call to the commit."""
    bytes: int
    """Over all ranks."""


class Commit(NamedTuple):
    """A save that became a checkpoint."""

    step: int
    time: float
    """Seconds since 1970."""


@dataclass
class _Save:
    """One save as this rank sees it."""

    origin: Origin
    draft: Path
    target: Path
    bytes: int
    began: float
    blocked: float = 0.0
    seconds: float = 0.0
    problem: str | None = None
    """Of this rank's files, then (rank 0) of the commit."""
    lost: bool = False
    """This process no longer owns the run."""
    committed: bool = False
    written: threading.Event = field(default_factory=threading.Event)
    abort: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    def ended(self, seconds: float) -> bool:
        """True if nothing is left to do on this rank; waits for that no longer than ``seconds``."""
        if self.thread is not None:
            self.thread.join(seconds)
        return self.thread is None or not self.thread.is_alive()


class CheckpointWriter:
    """Saves to one folder; at most one save is in flight.

    An asynchronous ``save`` copies this rank's pieces to CPU memory and returns; a thread writes them. No thread talks
    to other ranks: rank 0's waits for files in which each rank says that it is done, and commits. What became of a save
    is agreed on, on all ranks, by the next ``save`` or ``wait``.

    Args:
        engine: Name of the engine, for the manifest.
        keep: Complete checkpoints to keep, the newest ones; the others go after the next commit.
        keep_every: Keep those of every such step too; 0 for none.
        failures: So many failed saves in a row are a CheckpointError; fewer are only told.
        asynchronous: False writes within ``save``.
        may_commit: Called on rank 0 before it changes anything in the folder. It raises if this process no longer owns
            the run; then ``save`` or ``wait`` raises CheckpointError on every rank at once.
        tell: Called on every rank with each report.
        limit: Seconds that ``wait`` waits for the files of all ranks, and then for the commit; later it has failed.
    """

    def __init__(
        self,
        folder: Path,
        world: World = ONE_PROCESS,
        *,
        engine: str = "",
        keep: int = 2,
        keep_every: int = 0,
        failures: int = 3,
        asynchronous: bool = True,
        may_commit: Callable[[], None] = lambda: None,
        tell: Callable[[SaveReport], object] = lambda report: None,
        limit: float = 1800.0,
    ) -> None:
        for name, value, least in (("keep", keep, 1), ("keep_every", keep_every, 0), ("failures", failures, 1)):
            if value < least:
                raise ValueError(f"CheckpointWriter: {name}: expected >= {least}, got {value}")
        self.folder, self.world, self.engine = folder, world, engine
        self.keep, self.keep_every, self.limit = keep, keep_every, limit
        self._allowed, self._asynchronous, self._may_commit, self._tell = failures, asynchronous, may_commit, tell
        self._stage = Stage()
        self._save: _Save | None = None
        self._failures = 0
        self.newest: Commit | None = None
        """On rank 0: the newest commit of this process, known before all ranks agree on it."""

    def start(self) -> None:
        """Remove what a killed process left unfinished in the folder; call it once, before the first step. Collective.

        Raises CheckpointError on every rank if that cannot be done.
        """
        on_main(self.world, self._tidy)

    def _tidy(self) -> None:
        if self.folder.is_dir():
            self._may_commit()
            tidy(self.folder)

    @property
    def done(self) -> bool:
        """True if nothing of a save is left to do on this rank but to agree on it in ``wait``."""
        return self._save is None or self._save.ended(0.0)

    def save(self, step: int, parts: Parts, meta: Mapping[str, Any], *, must: bool = False) -> None:
        """Save ``parts``, of which every rank passes its own, and rank 0's ``meta`` (JSON). Collective.

        First waits for the save before it. A failure is told and leaves the checkpoints before it intact. Raises
        CheckpointError on every rank if it is one too many. ``must``: wait for this save too; its failure is an error.
        """
        self.wait()
        began = time.perf_counter()
        target = checkpoint_path(self.folder, step)
        own = sum(part.bytes for part in parts.values()) + (1 << 16) + 512 * len(parts)
        needed = sum(gather_objects(self.world, own))
        made = self._new_draft(target, needed) if self.world.is_main else None
        draft, problem, lost = broadcast_object(self.world, made)
        origin = Origin(step, meta, self.world.world_size, self.engine)
        self._save = _Save(origin, draft, target, needed, began, problem=problem, lost=lost)
        at_once = must or not self._asynchronous or problem is not None
        self._start(self._save, parts, at_once=at_once)
        self._save.blocked = time.perf_counter() - began
        if at_once:
            self.wait(must=must)

    def wait(self, *, must: bool = False) -> None:
        """Wait for the save in flight, if there is one, and agree on what became of it. Collective.

        Raises CheckpointError on every rank if it failed and was one too many, or if it ``must`` not fail.
        """
        save, self._save = self._save, None
        if save is None:
            return
        began = time.perf_counter()
        problem, lost = self._finish(save)
        blocked = save.blocked + time.perf_counter() - began
        step, text = save.origin.step, ""
        self._failures = 0 if problem is None else self._failures + 1
        if problem is not None:
            text = f"checkpoint of step {step} was not written to {self.folder}: {problem}"
        path = None if text else save.target
        fatal = bool(text) and (must or lost or self._failures >= self._allowed)
        self._tell(SaveReport(step, path, text, self._failures, fatal, blocked, save.seconds, save.bytes))
        if fatal:
            raise CheckpointError(text)

    def _new_draft(self, target: Path, needed: int) -> tuple[Path, str | None, bool]:
        """On rank 0: a folder of its own for each attempt, so that two processes never write into one."""
        draft = self.folder / f".tmp-{target.name}.{secrets.token_hex(4)}"
        try:
            self._may_commit()
        except Exception as error:
            return draft, _words(error), True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tidy(self.folder)
            check_space(self.folder, needed)
            draft.mkdir()
        except Exception as error:  # of any kind: the other ranks wait for the verdict
            return draft, _words(error), False
        return draft, None, False

    def _start(self, save: _Save, parts: Parts, *, at_once: bool) -> None:
        """Write in a thread; ``at_once`` from the tensors themselves, for training stands still."""
        try:
            if save.problem is None:
                staged = parts if at_once else self._stage.copy(parts)
                fail_point("checkpoint.staged", save.origin.step)
                save.thread = threading.Thread(target=self._write, args=(save, staged), name="checkpoint", daemon=True)
                save.thread.start()
        except Exception as error:  # too little memory, say
            save.problem = _words(error)
        if save.problem is not None:
            save.written.set()

    def _write(self, save: _Save, parts: Parts) -> None:
        try:
            write_parts(save.draft, self.world.rank, save.origin.step, parts)
        except Exception as error:  # of any kind: the other ranks wait for the verdict
            save.problem = _words(error)
        finally:
            save.written.set()
        if self.world.is_main and save.problem is None:
            self._commit(save)

    def _commit(self, save: _Save) -> None:
        """On rank 0: when all files are there, make them a checkpoint."""
        try:
            self._wait_for_ranks(save)
            write_manifest(save.draft, save.origin)
            fail_point("checkpoint.before_commit", save.origin.step)
            try:
                self._may_commit()
            except Exception:
                save.lost = True
                raise
            if save.abort.is_set():
                raise TimeoutError("another rank gave up")
            later = later_than(save.target)
            commit(save.draft, save.target)
            save.committed, self.newest = True, Commit(save.origin.step, time.time())
        except Exception as error:  # of any kind: the other ranks wait for the verdict
            save.problem = _words(error)
            return
        save.seconds = time.perf_counter() - save.began
        fail_point("checkpoint.after_rename", save.origin.step)
        if save.abort.is_set():  # the run went on without this thread: another save may be under way
            return
        remember_whole(save.target)  # every rank has read its files back
        after_commit(save.target, later, keep=self.keep, keep_every=self.keep_every)

    def _wait_for_ranks(self, save: _Save) -> None:
        end, pause = time.monotonic() + self.limit, 0.01
        while missing := missing_ranks(save.draft, self.world.world_size):
            if time.monotonic() > end or save.abort.wait(pause):
                raise TimeoutError(f"rank {missing[0]} has not written its files within {self.limit:g} s")
            pause = min(2 * pause, 1.0)

    def _finish(self, save: _Save) -> tuple[str | None, bool]:
        """The problem of a save, or None, and whether the run is lost, alike on all ranks. Collective."""
        in_time = self._meet(save.written.wait)
        late = None if save.written.is_set() else f"not written within {self.limit:g} s; does the disk hang?"
        if late:
            self._stage = Stage()  # the thread still reads the old one
        problem = first_problem(self.world, None if save.committed else save.problem or late)
        if problem is not None:
            save.abort.set()
        if in_time:
            self._meet(save.ended)
        save.abort.set()
        if self.world.is_main and not save.committed:
            problem = self._give_up(save, problem)
            save.seconds = time.perf_counter() - save.began
        problem, lost, save.seconds = broadcast_object(self.world, (problem, save.lost, save.seconds))
        return problem, lost

    def _give_up(self, save: _Save, problem: str | None) -> str | None:
        """On rank 0: why the save failed, and its draft is gone; None if its thread was quicker and committed it."""
        why = problem or save.problem or f"not committed within {self.limit:g} s; does the disk hang?"
        try:
            abandoned = abandon(save.draft)
        except OSError:
            return why
        if abandoned is None and save.problem is None and save.target.is_dir():
            return None
        if abandoned is not None:
            shutil.rmtree(abandoned, ignore_errors=True)
        return why

    def _meet(self, done: Callable[[float], bool]) -> bool:
        """True when ``done``, which waits for some seconds, holds on every rank; False if one is late. Collective."""
        end = time.monotonic() + self.limit
        while True:
            left = end - time.monotonic()
            ranks = gather_objects(self.world, (done(max(0.0, min(_ROUND_SECONDS, left))), left <= 0))
            if all(done for done, _ in ranks):
                return True
            if any(late for _, late in ranks):
                return False


def _words(error: Exception) -> str:
    return str(error) or repr(error)


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor] | Mapping[str, Part],
    meta: Mapping[str, Any],
    *,
    keep: int = 2,
    keep_every: int = 0,
    world: World = ONE_PROCESS,
) -> Path:
    """Write and commit one checkpoint of whole tensors or of parts; every rank passes its own. Collective.

    The newest ``keep`` complete checkpoints stay, older ones go. One process at a time may write to ``folder``.

    Raises CheckpointError on every rank if anything fails; then the unfinished folder is removed and the previous
    checkpoints are as they were.
    """
    parts = {name: part for name, part in tensors.items() if isinstance(part, Part)}
    parts |= whole({name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)})
    writer = CheckpointWriter(folder, world, keep=keep, keep_every=keep_every, failures=1, asynchronous=False)
    writer.save(step, parts, meta)
    return checkpoint_path(folder, step)
