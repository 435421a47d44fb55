"""Units side by side, each worker with its share of the cores."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

Task = tuple[str, Callable[..., Any], tuple[Any, ...]]
"""Name, function and its arguments, all of which can be pickled."""


def run_all(tasks: Sequence[Task], *, workers: int, logs: Path, title: str) -> None:
    """Run the tasks, each with a log of its own; all are tried, and then the failed ones are named in a
    RuntimeError."""
    if not tasks:
        return
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the workers, read as they start
    context = multiprocessing.get_context("spawn")
    failed: list[str] = []
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        futures: dict[Future[Any], str] = {
            pool.submit(_logged, logs / f"{name}.log", function, arguments): name for name, function, arguments in tasks
        }
        for future in tqdm(as_completed(futures), total=len(tasks), desc=title, unit="unit", dynamic_ncols=True):
            if (error := future.exception()) is not None:
                failed.append(f"{futures[future]}: {error} (see {logs / futures[future]}.log)")
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(tasks)} failed:\n" + "\n".join(failed))


def _end_with(parent: int) -> None:
    """A worker whose parent was killed stops, too."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _logged(log: Path, function: Callable[..., Any], arguments: Iterable[Any]) -> None:
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)  # programs that the task starts write there too
        try:
            function(*arguments)
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
