"""Every engine continues every other engine's run: the losses of all pairs in one plot.

    python benchmarks/resume.py OUT              # some minutes on two CPU cores
    python benchmarks/resume.py OUT --quick      # two engines only, to see that it runs; writes to OUT

Each engine trains the demo's model half way, saves, and each engine goes on from there; the reference is one process
that never stopped. Writes benchmarks/results/resume.json, docs/resume.md and docs/resume.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import MaxNLocator

from dydit_scale.checkpoint.store import load_checkpoint
from dydit_scale.models.quiet import quiet_libraries
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.parallel.engine import EngineConfig
from dydit_scale.parallel.world import barrier, close, init_world
from dydit_scale.sampling.speed import machine
from dydit_scale.train.loop import train
from dydit_scale.train.recipe import Recipe, load_recipe
from dydit_scale.workflows.launch import call

ROOT = Path(__file__).parents[1]
ENGINES: dict[str, dict[str, Any]] = {
    "one process": {"name": "single"},
    "ddp": {"name": "ddp"},
    "ZeRO-1": {"name": "zero", "zero_stage": 1},
    "ZeRO-2": {"name": "zero", "zero_stage": 2},
    "ZeRO-3": {"name": "zero", "zero_stage": 3},
    "FSDP2": {"name": "fsdp"},
}
"""All but the first on two ranks."""
QUICK = ("one process", "ZeRO-3")
STEPS, HALF = 20, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for data and runs")
    parser.add_argument("--quick", action="store_true", help="two engines only, to see that it runs")
    parser.add_argument("--worker", choices=("halves", "rests"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    os.chdir(ROOT)
    names = QUICK if args.quick else tuple(ENGINES)
    if args.worker:
        work(args.out, names, args.worker)
        return
    if not (args.out / "shards").exists():
        call("dydit", "data", "shapes", args.out / "shards", "--samples", "256")
    shutil.rmtree(args.out / "runs", ignore_errors=True)
    for phase in ("halves", "rests"):
        for ranks in (1, 2):
            launch(args.out, phase, ranks, quick=args.quick)
    found = {**gather(args.out, names), **machine()}
    docs = results = args.out
    if not args.quick:
        docs, results = ROOT / "docs", ROOT / "benchmarks" / "results"
    (results / "resume.json").write_text(json.dumps(found, indent=1) + "\n")
    (docs / "resume.md").write_text(page(found))
    plot(found, docs / "resume.svg")


def launch(out: Path, phase: str, ranks: int, *, quick: bool) -> None:
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), __file__]
    command += [str(out), "--worker", phase, *(["--quick"] if quick else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if subprocess.run(command, env=environment, check=False).returncode:
        raise SystemExit(f"the {phase} on {ranks} ranks failed")


def work(out: Path, names: tuple[str, ...], phase: str) -> None:
    """All runs of a phase that are of this number of ranks."""
    quiet_libraries()
    world = init_world()
    own = [name for name in names if (name == names[0]) == (world.world_size == 1)]
    if phase == "halves":
        if world.world_size == 1:
            train(recipe(out / "runs" / "whole", out, names[0], STEPS), world)
        for name in own:
            train(recipe(out / "runs" / name, out, name, HALF), world)
    else:
        for source, target in product(names, own):
            folder = out / "runs" / f"{source} to {target}"
            if world.is_main:
                shutil.copytree(out / "runs" / source, folder)
            barrier(world)
            train(recipe(folder, out, target, STEPS), world, resume=True)
    close(world)


def recipe(run: Path, out: Path, name: str, steps: int) -> Recipe:
    """The demo's, in fp32, with small batches and a learning rate that does not know where the run ends."""
    changes = [f"data.path={out / 'shards'}", f"run={run}", f"train.steps={steps}", "train.batch_size=4"]
    changes += ["train.final_lr=1", "train.sample_every=0", "train.evaluate_every=0", "train.evaluate_samples=4"]
    made = load_recipe("recipes/shapes/demo.yaml", changes)
    return replace(made, engine=EngineConfig(**ENGINES[name]))


def gather(out: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """The losses of every pair, and how far they and the weights end from those of the run that never stopped."""
    whole, pairs = losses(out / "runs" / "whole"), []
    end = weights(out / "runs" / "whole")
    for source, target in product(names, names):
        folder = out / "runs" / f"{source} to {target}"
        curve, state = losses(folder), weights(folder)
        assert len(curve) == len(whole) == STEPS, (source, target, len(curve))
        pairs.append(
            {
                "source": source,
                "target": target,
                "losses": curve,
                "largest_loss_difference": max(abs(a - b) for a, b in zip(curve, whole, strict=True)),
                "largest_weight_difference": max(float((state[n] - end[n]).abs().max()) for n in end),
            }
        )
    return {"steps": STEPS, "resumed_at": HALF, "whole": whole, "pairs": pairs}


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = load_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    return {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("param.")}


def page(found: dict[str, Any]) -> str:
    """The plot and a table of the differences."""
    targets = list(dict.fromkeys(pair["target"] for pair in found["pairs"]))
    lines = [f"| saved by | {' | '.join(targets)} |", "|---" * (len(targets) + 1) + "|"]
    for source in dict.fromkeys(pair["source"] for pair in found["pairs"]):
        row = [pair["largest_loss_difference"] for pair in found["pairs"] if pair["source"] == source]
        lines.append(f"| {source} | {' | '.join(f'{value:.1e}' for value in row)} |")
    largest = max(pair["largest_weight_difference"] for pair in found["pairs"])
    return f"""# One engine goes on where another stopped

The demo's model (TD-LoRA and routers, fp32) is trained for {found["resumed_at"]} steps by each engine and then to step
{found["steps"]} by each engine: {len(found["pairs"])} pairs, one rank or two. The reference is one process that never
stopped.

![losses of all pairs](resume.svg)

Largest difference of a step's loss from the reference, all {found["steps"]} steps; the engine that goes on, by column:

{chr(10).join(lines)}

The weights end at most {largest:.1e} apart, in fp32, where sums are taken in another order. {found["machine"]}, torch
{found["versions"]["torch"]}, {found["date"]}; `python benchmarks/resume.py OUT` makes this page.
"""


def plot(found: dict[str, Any], path: Path) -> None:
    """All curves over each other, and below them how far each is from the reference."""
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(7.5, 5), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    steps = range(1, found["steps"] + 1)
    colours = dict(zip(ENGINES, plt.get_cmap("tab10").colors, strict=False))
    for pair in found["pairs"]:
        colour = colours[pair["target"]]
        off = [max(abs(a - b), 1e-9) for a, b in zip(pair["losses"], found["whole"], strict=True)]
        upper.plot(steps, pair["losses"], color=colour, linewidth=1, alpha=0.5)
        lower.semilogy(steps, off, color=colour, linewidth=1, alpha=0.7)
    upper.plot(steps, found["whole"], "k--", linewidth=1.2, label="never stopped")
    for name in dict.fromkeys(pair["target"] for pair in found["pairs"]):
        upper.plot([], [], color=colours[name], label=f"continued by {name}")
    for axes in (upper, lower):
        axes.axvline(found["resumed_at"] + 0.5, color="0.6", linestyle=":")
        axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", fontsize=8, frameon=False, ncols=4)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    upper.set_ylabel("training loss")
    lower.set_ylabel("distance from it")
    lower.set_xlabel(f"step; every engine resumed every engine's checkpoint after step {found['resumed_at']}")
    lower.set_ylim(5e-10, 1e-3)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
