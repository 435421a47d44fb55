"""Work over shards in several processes, its results in order, with a bar in bytes."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from tqdm import tqdm

Advance = Callable[[int], object]
"""Tells the bar how many more bytes are done."""
Job = TypeVar("Job")
Result = TypeVar("Result")

_LOOK_SECONDS = 0.2


def default_workers() -> int:
    """One process on each core, at most 8."""
    return min(8, os.cpu_count() or 1)


def run_jobs(
    work: Callable[[Job, Advance], Result],
    jobs: Iterable[Job],
    *,
    workers: int,
    total_bytes: int,
    title: str,
    progress: bool = True,
) -> Generator[Result, None, None]:
    """``work(job, advance)`` for each job; results come in the order of the jobs, few of them ahead of their turn.

    With one worker all is done in this process. ``work`` must be a function of a module, or a partial of one; what it
    raises is raised here. ValueError if a process is killed.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    disable = None if progress else True
    with tqdm(total=total_bytes, desc=title, unit="B", unit_scale=True, disable=disable) as bar:
        if workers == 1:
            for job in jobs:
                yield work(job, bar.update)
        else:
            yield from _in_processes(work, iter(jobs), workers, bar, title)


def _in_processes(
    work: Callable[[Job, Advance], Result], jobs: Iterator[Job], workers: int, bar: tqdm, title: str
) -> Iterator[Result]:
    done = multiprocessing.Value("q", 0)
    pool = ProcessPoolExecutor(workers, initializer=_share, initargs=(done,))
    waiting: deque[Future[Result]] = deque()
    try:
        while True:
            waiting += [pool.submit(_run, work, job) for job in islice(jobs, 2 * workers - len(waiting))]
            if not waiting:
                return
            first = waiting.popleft()
            while not wait([first], timeout=_LOOK_SECONDS).done:
                bar.update(done.value - bar.n)
            bar.update(done.value - bar.n)
            yield first.result()
    except BrokenProcessPool as error:
        raise ValueError(f"{title}: a worker process was killed (out of memory?); try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


_done: Any = None


def _share(done: Any) -> None:
    global _done
    _done = done


def _advance(count: int) -> None:
    with _done.get_lock():
        _done.value += count


def _run(work: Callable[[Job, Advance], Result], job: Job) -> Result:
    return work(job, _advance)
