"""Lost launchers, data smaller than its readers, and the table of faults."""

from __future__ import annotations

import io
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import faults
from dydit_scale.data.loader import DataConfig, make_loader
from dydit_scale.data.shards import write_shards
from tests.faults.jobs import ENGINES, Job, on_this_machine, steps_of
from tests.faults.processes import kill, wait_until
from tests.train.small_run import small_world

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.xfail(raises=TimeoutError, strict=True, reason="ranks do not look whether their launcher lives")
def test_ranks_leave_when_their_launcher_dies(tmp_path: Path) -> None:
    """Else the next start would find the old ranks at work in its folder."""
    recipe, run = small_world(tmp_path), tmp_path / "run"
    words = [*on_this_machine("fsdp"), str(recipe), f"run={run}", "train.steps=1000", *ENGINES["fsdp"]]
    with Job(words, tmp_path / "log") as job:
        try:
            wait_until(lambda: job.left() or len(steps_of(run)) > 0, "training")
        except TimeoutError as error:
            raise AssertionError(job.tail()) from error
        launchers, ranks = (job.processes(lambda p, one=one: (p.rank is None) == one) for one in (True, False))
        assert len(launchers) == 1 and {process.rank for process in ranks} == {0, 1}, job.tail()
        kill(process.pid for process in launchers)
        wait_until(job.left, "left by the ranks", faults.ORPHAN)


@pytest.mark.parametrize("workers", [0, 2])
def test_fewer_samples_than_a_batch_and_fewer_shards_than_ranks(tmp_path: Path, workers: int) -> None:
    """Five samples in two shards, batches of eight on four ranks: an epoch ends inside every batch."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    samples = ({"__key__": f"{n}", "png": picture.getvalue(), "txt": f"{n}"} for n in range(5))
    index = write_shards(samples, tmp_path / "shards", samples_per_shard=3, progress=False)
    assert len(index.shards) == 2
    config = DataConfig(path=str(index.folder), image_size=8, workers=workers)

    def keys(ranks: int, steps: int) -> list[str]:
        batches = [
            list(islice(make_loader(config, index, seed=1, rank=rank, world_size=ranks, global_batch=8,
                                    micro_batch=8 // ranks, consumed=0), steps))
            for rank in range(ranks)
        ]  # fmt: skip
        return [key for step in range(steps) for of_rank in batches for key in of_rank[step].keys]

    one, four = keys(1, 5), keys(4, 5)
    assert one == four and len(one) == 40
    for epoch in range(8):
        assert Counter(one[5 * epoch : 5 * epoch + 5]) == Counter("01234")


def test_the_table_names_tests_that_exist() -> None:
    named = [test for row in faults.ROWS for test in row.tests]
    assert len(faults.ROWS) >= 20 and len(named) >= 25
    for name in named:
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(), name
    assert all(bool(row.tests) != bool(row.loop) for row in faults.ROWS)
    assert {row.loop for row in faults.ROWS if row.loop} == {way for _, way in faults.TURNS}


def test_the_page_is_the_one_that_the_results_make() -> None:
    assert faults.DOCS.read_text() == faults.page(faults.read_results()), "run `python -m benchmarks.faults --table`"


def test_a_seed_is_always_the_same_trial() -> None:
    plans = [faults.make_plan(seed, steps=30) for seed in range(20)]
    assert plans == [faults.make_plan(seed, steps=30) for seed in range(20)]
    assert {plan.engine for plan in plans} == set(ENGINES)
    assert {victim.name for plan in plans for *_, victim in plan.kills} == {v.name for v in faults.VICTIMS}
    for plan in plans:
        steps = [step for step, *_ in plan.kills]
        assert steps == sorted(set(steps)) and steps[0] >= 0 and steps[-1] < 27
