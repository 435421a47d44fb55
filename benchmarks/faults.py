"""Kill loops: training runs whose processes are killed at random moments end as if nothing had happened.

    python -m benchmarks.faults OUT                  # make faults: about 25 minutes on two CPU cores
    python -m benchmarks.faults OUT --seeds 2        # fewer
    python -m benchmarks.faults OUT --quick          # two short trials, results in OUT
    python -m benchmarks.faults --table              # only write docs/faults.md anew

Each seed trains a tiny model on two ranks, in turn under torchrun with FSDP2 and under the deepspeed launcher with
ZeRO-2 and ZeRO-3. Two or three times kill -9 meets one rank, the launcher or all of them, and the run is resumed. Every
fourth seed leaves the restarts to torchrun (--max-restarts). A trial is good if all processes left within 10 s of each
kill and none trained on alone, every step counts once with the loss of the uninterrupted run, and the final weights,
moments and average equal that run's bit for bit. Writes benchmarks/results/faults.json and docs/faults.md.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.fault_rows import ROWS, Row
from dydit_scale.sampling.speed import machine
from tests.faults.jobs import ENGINES, Job, commits_of, differences, on_this_machine, steps_of
from tests.faults.processes import Process, kill, wait_until
from tests.train.small_run import small_world

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results" / "faults.json", ROOT / "docs" / "faults.md"
ORPHAN = 10.0
"""Seconds after a kill at which a process that is still alive counts as left behind."""
PATIENCE = 300.0
"""Seconds to wait for a start, a step or an end; longer than any takes."""
TURNS = (("fsdp", "resume"), ("zero2", "resume"), ("fsdp", "restart"), ("zero3", "resume"))
"""Engine and way of continuing of seed 0, 1, ..."""


class Victim(NamedTuple):
    """What is killed."""

    name: str
    is_one: Callable[[Process], bool]


RANKS = (Victim("rank 0", lambda p: p.rank == 0), Victim("rank 1", lambda p: p.rank == 1))
VICTIMS = (*RANKS, Victim("the launcher", lambda p: p.rank is None), Victim("all", lambda p: True))


@dataclass(frozen=True)
class Plan:
    """One trial."""

    seed: int
    engine: str
    way: str
    """``resume``: started again with --resume. ``restart``: by torchrun, in place."""
    steps: int
    kills: tuple[tuple[int, float, Victim], ...]
    """Step whose record is awaited, seconds to wait after it, and what is killed then."""


def make_plan(seed: int, *, steps: int, kills: int | None = None) -> Plan:
    """The trial of ``seed``: always the same. The kills are spread over the run, so that each start gets on."""
    random_ = random.Random(seed)
    engine, way = TURNS[seed % len(TURNS)]
    count = kills or random_.choice((2, 3))
    part = steps // count
    chosen = []
    for n in range(count):
        step = n * part + random_.randrange(part - 3)
        chosen.append((step, random_.uniform(0, 1), random_.choice(VICTIMS if way == "resume" else RANKS)))
    return Plan(seed, engine, way, steps, tuple(chosen))


class Bench:
    """Where runs lie, and the uninterrupted ones."""

    def __init__(self, out: Path, steps: int, bar: tqdm) -> None:
        self.out, self.steps, self.bar = out, steps, bar
        self.recipe = small_world(out)
        self.settings = (f"train.steps={steps}", "train.save_every=5", "train.evaluate_every=10")

    def words(self, engine: str, run: Path, *options: str, resume: bool = False) -> list[str]:
        launcher = on_this_machine(engine, *options)
        overrides = [str(self.recipe), f"run={run}", *self.settings, *ENGINES[engine]]
        return [*launcher, *overrides, *(["--resume"] if resume else [])]

    def whole(self, engine: str) -> Path:
        """An uninterrupted run, made once."""
        run = self.out / f"whole-{engine}"
        if not run.exists():
            self.bar.set_postfix_str(f"{engine} uninterrupted")
            with Job(self.words(engine, run), self.out / f"whole-{engine}.log") as job:
                finish(job)
            self.bar.update()
        return run

    def trial(self, plan: Plan) -> dict[str, Any]:
        """What became of a plan."""
        whole, run = self.whole(plan.engine), self.out / f"seed-{plan.seed}"
        log = self.out / f"seed-{plan.seed}.log"
        kills: list[dict[str, Any]] = []
        wrong, problem = [], None
        try:
            (self.resumed if plan.way == "resume" else self.restarted)(plan, run, log, kills)
            wrong = differences(run, whole, self.steps)
        except (TimeoutError, RuntimeError) as error:
            problem = str(error)
        good = problem is None and not wrong and not any(k["orphans"] or k["went_on"] for k in kills)
        return {
            "seed": plan.seed, "engine": plan.engine, "way": plan.way, "steps": plan.steps, "kills": kills,
            "differences": wrong, "problem": problem, "good": good,
        }  # fmt: skip

    def resumed(self, plan: Plan, run: Path, log: Path, kills: list[dict[str, Any]]) -> None:
        for step, delay, victim in plan.kills:
            self.bar.set_postfix_str(f"seed {plan.seed}: {plan.engine}, {victim.name} in step {step + 1}")
            with Job(self.words(plan.engine, run, resume=True), log) as job:
                reach(job, run, step)
                time.sleep(delay)
                kills.append(strike(job, run, victim) | self.left_behind(job, run, job.processes()))
            self.bar.update()
        self.bar.set_postfix_str(f"seed {plan.seed}: {plan.engine}, to the end")
        with Job(self.words(plan.engine, run, resume=True), log) as job:
            finish(job)
        self.bar.update()

    def restarted(self, plan: Plan, run: Path, log: Path, kills: list[dict[str, Any]]) -> None:
        words = self.words(plan.engine, run, "--max-restarts", str(len(plan.kills)), resume=True)
        with Job(words, log) as job:
            for step, delay, victim in plan.kills:
                self.bar.set_postfix_str(f"seed {plan.seed}: torchrun restarts, {victim.name} in step {step + 1}")
                reach(job, run, step)
                time.sleep(delay)
                before = job.processes(lambda p: p.rank is not None)
                kills.append(strike(job, run, victim) | self.left_behind(job, run, before))
                self.bar.update()
            finish(job)
        self.bar.update()

    def left_behind(self, job: Job, run: Path, were: list[Process]) -> dict[str, Any]:
        """Wait for the processes ``were`` to leave: how long that took, who had to be killed, whether work went on."""
        began, last = time.monotonic(), last_step(run)
        pids = {process.pid for process in were}

        def alive() -> list[Process]:
            return job.processes(lambda process: process.pid in pids)

        while alive() and time.monotonic() - began < ORPHAN:
            time.sleep(0.05)
        seconds, orphans = time.monotonic() - began, alive()
        kill(process.pid for process in orphans)
        names = [f"rank {p.rank}" if p.rank is not None else "launcher" for p in orphans]
        return {"seconds": round(seconds, 2), "orphans": names, "went_on": max(0, last_step(run) - last - 1)}


def last_step(run: Path) -> int:
    """The last step that ``run`` recorded; -1 for none."""
    return max((record["step"] for record in steps_of(run)), default=-1)


def reach(job: Job, run: Path, step: int) -> None:
    """Wait until ``run`` has recorded ``step``. RuntimeError if the job ends before it came there."""

    def there() -> bool:
        if job.left() and last_step(run) < step:
            raise RuntimeError(f"the job ended before step {step}: {job.tail()}")
        return last_step(run) >= step

    wait_until(there, f"in step {step}", PATIENCE)


def strike(job: Job, run: Path, victim: Victim) -> dict[str, Any]:
    """SIGKILL to ``victim``, and what had been done by then."""
    wait_until(lambda: job.left() or bool(job.processes(victim.is_one)), f"{victim.name} there", PATIENCE)
    victims = job.processes(victim.is_one)
    kill(process.pid for process in victims)
    return {
        "killed": victim.name,
        "processes": len(victims),
        "after_step": last_step(run),
        "committed": commits_of(run),
    }


def finish(job: Job) -> None:
    """Wait for a job's end. RuntimeError unless it went well."""
    wait_until(job.left, "at the end", PATIENCE)
    if job.launcher.returncode:
        raise RuntimeError(f"exit {job.launcher.returncode}: {job.tail()}")


def page(results: dict[str, Any] | None) -> str:
    """docs/faults.md; ``results`` is what :func:`read_results` returns."""
    lines = [
        "# Faults, and what becomes of a run",
        "",
        "Each of these faults is provoked. `make test` and `make test-slow` run the named tests; those of two nodes "
        "need root and the `ip` command, and are skipped without. `make faults` runs the kill loops: real launchers, "
        'two ranks, SIGKILL at random moments. "The same end, bit for bit" compares with an uninterrupted run of the '
        "same engine and number of ranks: each step counted once, with the same loss and gradient norm; equal weights, "
        "moments and average.",
        "",
        measured(results),
        "",
        "| fault | how | expected | observed |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {row.fault} | {row.how} | {row.expected} | {observed(row, results)} |" for row in ROWS]
    if results is not None:
        lines += ["", "## Kill loops", "", *trials_table(results["trials"])]
    lines += ["", "Written by `python -m benchmarks.faults` from `benchmarks/results/faults.json`."]
    return "\n".join(lines) + "\n"


def read_results() -> dict[str, Any] | None:
    """What the last kill loops found; None if there were none."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else None


def measured(results: dict[str, Any] | None) -> str:
    """Where and when the kill loops ran."""
    if results is None:
        return "The kill loops have not been run yet."
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"Kill loops: {results['date']}, {results['machine']}; {versions}; {len(results['trials'])} trials."


def observed(row: Row, results: dict[str, Any] | None) -> str:
    """The last column of a row."""
    if row.loop is None:
        return ", ".join(f"`{test}`" for test in row.tests)
    trials = [] if results is None else [trial for trial in results["trials"] if trial["way"] == row.loop]
    if not trials:
        return "not run yet"
    kills = [kill for trial in trials for kill in trial["kills"]]
    same = sum(trial["problem"] is None and not trial["differences"] for trial in trials)
    parts = [f"{len(trials)} trials with {len(kills)} kills, {same} with the same end"]
    if kills:
        seconds = [kill["seconds"] for kill in kills]
        parts.append(f"all left after {statistics.median(seconds):.1f} s (median), {max(seconds):.1f} s (longest)")
    if stayed := sum(bool(kill["orphans"]) for kill in kills):
        parts.append(f"{stayed} times processes were still there after {ORPHAN:g} s")
    if alone := sum(bool(kill["went_on"]) for kill in kills):
        parts.append(f"{alone} times the ranks trained on without a launcher")
    return "; ".join(parts)


def trials_table(trials: list[dict[str, Any]]) -> list[str]:
    """One line a trial."""
    lines = ["| seed | engine | continued by | killed | seconds until all left | end |", "| ---" * 6 + " |"]
    for trial in trials:
        killed = ", ".join(f"{kill['killed']} after step {kill['after_step'] + 1}" for kill in trial["kills"])
        seconds = ", ".join(f"{kill['seconds']:.1f}{' (killed)' if kill['orphans'] else ''}" for kill in trial["kills"])
        way = "--resume" if trial["way"] == "resume" else "torchrun"
        lines.append(f"| {trial['seed']} | {trial['engine']} | {way} | {killed} | {seconds} | {ending(trial)} |")
    return lines


def ending(trial: dict[str, Any]) -> str:
    """How a trial ended, in few words."""
    if trial["problem"] is not None:
        return "failed: " + trial["problem"].split("\n")[0][:120].replace("|", "/")
    same = "the same, bit for bit" if not trial["differences"] else f"{len(trial['differences'])} differences"
    alone = sum(kill["went_on"] for kill in trial["kills"])
    return same + (f"; {alone} steps without a launcher" if alone else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", help="folder for data and runs; emptied first")
    parser.add_argument("--seeds", type=int, default=20, help="number of trials")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=30, help="steps of each run")
    parser.add_argument("--quick", action="store_true", help="two trials with one kill each; results go to OUT")
    parser.add_argument("--table", action="store_true", help="only write docs/faults.md, from the last results")
    args = parser.parse_args()
    results, docs = RESULTS, DOCS
    if args.table:
        docs.write_text(page(read_results()))
        return
    if args.out is None:
        parser.error("a folder for data and runs is needed")
    if args.quick:
        args.seeds, args.steps, results, docs = 2, 12, args.out / "faults.json", args.out / "faults.md"
    plans = [
        make_plan(seed, steps=args.steps, kills=1 if args.quick else None)
        for seed in range(args.first, args.first + args.seeds)
    ]
    trials = run_all(args.out.resolve(), args.steps, plans)
    found = {**machine(), "steps": args.steps, "trials": trials}
    results.write_text(json.dumps(found, indent=1) + "\n")
    docs.write_text(page(found))
    print(f"{sum(trial['good'] for trial in trials)} of {len(trials)} trials good; results: {results}, {docs}")
    raise SystemExit(0 if all(trial["good"] for trial in trials) else 1)


def run_all(out: Path, steps: int, plans: list[Plan]) -> list[dict[str, Any]]:
    """The trials, one after the other."""
    if out.exists() and any(out.iterdir()) and not (out / "recipe.yaml").exists():
        raise SystemExit(f"{out} holds other files; choose an empty folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    starts = len({plan.engine for plan in plans}) + sum(len(plan.kills) + 1 for plan in plans)
    with tqdm(total=starts, desc="kill loops", unit="start", dynamic_ncols=True) as bar:
        bench, trials = Bench(out, steps, bar), []
        for plan in plans:
            trials.append(bench.trial(plan))
            bar.write(f"seed {plan.seed}: {plan.engine}, {plan.way}: {ending(trials[-1])}")
    return trials


if __name__ == "__main__":
    main()
