"""What a training step allocates, measured: python -m tests.planning.measured OUT RECIPE, as one of some ranks.

The bytes of all tensors that live when the step begins, and on top of them what the allocator's own record says that
the step took at most; of several steps the least, because gloo's threads let go of a buffer sooner or later. Resident
memory would also count libraries and what malloc keeps.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dydit_scale.models.quiet import quiet_libraries
from dydit_scale.parallel.world import close, init_world
from dydit_scale.train import loop
from dydit_scale.train.recipe import load_recipe
from dydit_scale.train.setup import Run


def living() -> int:
    """Bytes of the storages of all tensors that Python can reach."""
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not thing.is_meta:
            local = thing.to_local() if hasattr(thing, "to_local") else thing
            storage = local.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def risen(taken: profile) -> int:
    """The most that was allocated beyond what there was when the profile began."""
    events = [e for e in taken.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = high = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        high = max(high, level)
    return high


def main(out: Path, recipe: Path) -> None:
    """Train the recipe; the bytes of its steps but the first go to OUT/peak-RANK.json."""
    quiet_libraries()
    world = init_world(device="cpu")
    original, peaks = loop.train_step, list[int]()

    def measured(run: Run, batches: Any) -> Any:
        if run.step == 0:
            return original(run, batches)
        before = living()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
            done = original(run, batches)
        peaks.append(before + risen(taken))
        return done

    loop.train_step = measured  # type: ignore[assignment]
    loop.train(load_recipe(recipe), world)
    (out / f"peak-{world.rank}.json").write_text(json.dumps({"peak": min(peaks), "steps": peaks}))
    close(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
