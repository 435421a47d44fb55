"""The way back: a run whose steps went wrong returns to its newest checkpoint, once at each."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dydit_scale.checkpoint.state import restore
from dydit_scale.checkpoint.store import load_checkpoint
from dydit_scale.parallel.world import gather_objects
from dydit_scale.train.guard import NotFiniteError, Suspect
from dydit_scale.train.setup import Run


def go_back(run: Run) -> None:
    """Return to the newest checkpoint; the data go on where they are, behind the bad window. Collective.

    Raises NotFiniteError if there is none, or if the run returned to this one already.
    """
    run.watchdog.enter("checkpoint")
    run.writer.wait()
    run.watchdog.enter("checkpoint")
    at = run.step
    suspects = gather_objects(run.world, run.guard.suspects)
    path = run.folder / f"bad-batch-{at - 1:07d}-{len(run.guard.rollbacks) + 1}.json"
    if run.world.is_main:
        _write_suspects(path, suspects)
    checkpoint = (
        None if run.saved is None else load_checkpoint(run.folder / "checkpoints", world=run.world, repair=True)
    )
    advice = f"What was read is in {path}. Look at these samples, lower train.lr, or look at the base"
    if checkpoint is None:
        raise NotFiniteError(f"step {at - 1}: the gradients are not finite and there is no checkpoint yet. {advice}")
    if run.guard.came_back_before(checkpoint.step):
        raise NotFiniteError(
            f"step {at - 1}: went wrong again after the return to step {checkpoint.step}, which is intact. {advice}"
        )
    restore(checkpoint, run.engine, run.ema)
    run.guard.go_back(at=at, to=checkpoint.step, consumed=run.consumed, state=checkpoint.meta.get("guard"))
    run.step = run.saved = checkpoint.step
    run.observer.back_to(run.step)
    run.saved_consumed = checkpoint.meta["consumed"]
    run.say(
        f"step {at - 1}: back to the checkpoint of step {run.step}; the data go on at sample {run.consumed}; {path}"
    )
    if run.metrics:
        run.metrics.back_to(run.step, {"event": "rollback", "at": at, "consumed": run.consumed})


def _write_suspects(path: Path, suspects: list[list[Suspect]]) -> None:
    rows = [{"rank": rank, **one._asdict()} for rank, own in enumerate(suspects) for one in own]
    try:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    except OSError as error:
        print(f"warning: {path} was not written: {error}", file=sys.stderr)
