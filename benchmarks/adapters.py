"""TD-LoRA, plain LoRA of equal size and full fine-tuning make the demo's base dynamic, each with several seeds.

    python benchmarks/adapters.py OUT                  # nine runs: most of an hour on one CPU core
    python benchmarks/adapters.py OUT --seeds 0 --quick

All train recipes/shapes/demo.yaml on one process with the same data, steps, routers and budget; only the adapter, its
learning rate where it has none, and the seed differ. The rank of the plain LoRA is the one whose number of
parameters is nearest to the TD-LoRA's. Scores are those of the built-in judge on the packed dynamic model. Writes
benchmarks/results/adapters.json, docs/adapters.md and docs/adapters.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dydit_scale.adapters.td_lora import is_dynamic_name
from dydit_scale.evaluation.judges import judge_for
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.report.markup import Html, el
from dydit_scale.sampling.generate import generate, sampler_timesteps
from dydit_scale.sampling.speed import machine
from dydit_scale.train.build import build_parts
from dydit_scale.train.recipe import load_recipe
from dydit_scale.workflows.launch import call
from dydit_scale.workflows.runs import load_run, sample_config, static_pipeline

ROOT = Path(__file__).parents[1]
RECIPE = "recipes/shapes/demo.yaml"
PROMPTS, STEPS, CFG = 256, 10, 3.0
FULL_LR = "1e-3"
"""AdamW's usual value for all weights of so small a model; a LoRA takes several times more."""
NAMES = {"td_lora": "TD-LoRA", "lora": "plain LoRA", "none": "full fine-tuning"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for data and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    args = parser.parse_args()
    args.out = args.out.resolve()
    os.chdir(ROOT)
    docs, results = ROOT / "docs", ROOT / "benchmarks" / "results" / "adapters.json"
    if args.quick:
        docs = results = args.out
        results = args.out / "adapters.json"
    shards = args.out / "shards"
    if not shards.exists():
        call("dydit", "data", "shapes", shards, "--samples", "64" if args.quick else "2048")
    kinds = {kind: options(kind) for kind in NAMES}
    sizes = {kind: trainable(kinds[kind]) for kind in NAMES}
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for kind, overrides in kinds.items():
            run = args.out / f"{kind}-{seed}"
            shutil.rmtree(run, ignore_errors=True)
            changes = ["train.steps=4", "train.evaluate_samples=8"] if args.quick else []
            changes += [f"data.path={shards}", f"run={run}", f"seed={seed}", "train.sample_every=0", *overrides]
            call("python", "-m", "dydit_scale.train", RECIPE, "engine.name=single", *changes)
            rows.append({"adapter": kind, "seed": seed, **score(run, quick=args.quick)})
            print(json.dumps(rows[-1]), flush=True)
    static = score(args.out / f"td_lora-{args.seeds[0]}", quick=args.quick, static=True)["score"]
    found = {"rows": rows, "parameters": sizes, "static": static, "prompts": PROMPTS, **machine()}
    results.write_text(json.dumps(found, indent=1) + "\n")
    (docs / "adapters.md").write_text(page(found))
    (docs / "adapters.svg").write_text(plot(rows, static) + "\n")


def options(kind: str) -> list[str]:
    """Overrides of the demo's recipe for one way to adapt it."""
    if kind == "td_lora":
        return []
    if kind == "none":
        return ["adapter.kind=none", f"train.lr={FULL_LR}"]
    unit = trainable(["adapter.kind=lora", "adapter.rank=1"])["adapter"]
    return ["adapter.kind=lora", f"adapter.rank={round(trainable([])['adapter'] / unit)}"]


def trainable(overrides: Sequence[str]) -> dict[str, int]:
    """Numbers of parameters that learn."""
    network = build_parts(load_recipe(RECIPE, overrides)).network
    learn = {name: p.numel() for name, p in network.named_parameters() if p.requires_grad}
    routers = sum(n for name, n in learn.items() if is_dynamic_name(name))
    return {"adapter": sum(learn.values()) - routers, "routers": routers}


def score(run: Path, *, quick: bool, static: bool = False) -> dict[str, float]:
    """The judge's score of a run's packed model, or of its static base, and what the last evaluation said."""
    loaded = load_run(run)
    config = sample_config(loaded, steps=STEPS, cfg=CFG)
    judge = judge_for(reads_text=True, video=False)
    captions = judge.prompts(8 if quick else PROMPTS)
    if not static:
        loaded.network.pack(sampler_timesteps(loaded.pipeline, config))
    pictures = generate(static_pipeline(loaded) if static else loaded.pipeline, captions, config, progress=run.name)
    last = [r for r in read_metrics(run / "metrics.jsonl") if "ratio_eval" in r][-1]
    return {"score": judge.score(pictures, captions)["overall"], "ratio": last["ratio_eval"], "mse": last["mse_eval"]}


def page(found: dict[str, Any]) -> str:
    """Table and plot as Markdown."""
    lines = ["| | parameters | score | cost ratio | flow error |", "|---|---|---|---|---|"]
    for kind, name in NAMES.items():
        rows = [row for row in found["rows"] if row["adapter"] == kind]
        cells = [
            _spread([row[key] for row in rows], digits) for key, digits in (("score", 3), ("ratio", 3), ("mse", 4))
        ]
        lines.append(f"| {name} | {found['parameters'][kind]['adapter']:,} | {' | '.join(cells)} |")
    seeds = len({row["seed"] for row in found["rows"]})
    return f"""# TD-LoRA, plain LoRA and full fine-tuning

The demo's base is made dynamic at half its compute in three ways: with TD-LoRA, with a plain LoRA of equal size, and
with all weights trained. Recipe, data, steps and routers are those of `make demo`; {seeds} seeds each, mean ± standard
deviation. The score is the share of {found["prompts"]} prompts that the judge of the built-in scenes finds fulfilled;
the static base, at full compute, has {found["static"]:.3f}.

![score of every run](adapters.svg)

{chr(10).join(lines)}

{_verdict(found["rows"])}

Parameters are those of the adapter; the routers add {found["parameters"]["td_lora"]["routers"]:,} to each. The learning
rate is the recipe's for both LoRAs and {FULL_LR} for all weights; none was searched for. {found["machine"]},
{found["date"]}; `python benchmarks/adapters.py OUT` makes this page.
"""


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    scores = [[row["score"] for row in rows if row["adapter"] == kind] for kind in NAMES]
    means, deviations = [float(np.mean(s)) for s in scores], [float(np.std(s, ddof=1)) for s in scores]
    gap = max(means) - min(means)
    said = "do not tell the three apart" if gap < max(deviations) else "differ by more than the seeds do"
    scored = f"The scores {said}: the means lie {gap:.3f} apart, the seeds of one deviate by {max(deviations):.3f}."
    orders = {tuple(sorted(errors, key=errors.__getitem__)) for errors in _flow_errors(rows).values()}
    if len(orders) > 1:
        return f"{scored} The flow errors order the three differently from seed to seed."
    names = [NAMES[kind] for kind in orders.pop()]
    return f"{scored} The flow error, which varies more between seeds, has one order in each of them, least first: " + (
        f"{', '.join(names)}."
    )


def _flow_errors(rows: Sequence[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """By seed and adapter."""
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for row in rows:
        found[row["seed"]][row["adapter"]] = row["mse"]
    return found


def _spread(values: Sequence[float], digits: int) -> str:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def plot(rows: Sequence[dict[str, Any]], static: float) -> Html:
    """A dot for every run, a bar for each mean, a line for the static base."""
    left, right, top, step = 130, 590, 34, 44
    scores = [row["score"] for row in rows]
    low = np.floor(20 * (min(*scores, static) - 0.02)) / 20
    high = np.ceil(20 * (max(*scores, static) + 0.01)) / 20

    def x(value: float) -> float:
        return left + (right - left) * float((value - low) / (high - low))

    bottom = top + step * len(NAMES)
    ticks = np.arange(round(20 * low), round(20 * high) + 1) / 20
    parts = [el("rect", x=0, y=0, width=620, height=bottom + 44, fill="#ffffff")]
    for tick in ticks:
        parts.append(el("line", x1=x(tick), x2=x(tick), y1=top - 8, y2=bottom, stroke="#e2e2e2"))
        parts.append(el("text", f"{tick:.2f}", x=x(tick), y=bottom + 16, text_anchor="middle", fill="#555555"))
    parts.append(
        el("line", x1=x(static), x2=x(static), y1=top - 8, y2=bottom, stroke="#555555", stroke_dasharray="4 3")
    )
    parts.append(el("text", "static base, full compute", x=x(static), y=top - 14, text_anchor="middle", fill="#555555"))
    for place, (kind, colour) in enumerate(zip(NAMES, ("#0072b2", "#e69f00", "#009e73"), strict=True)):
        y = top + step * (place + 0.5)
        own = [row["score"] for row in rows if row["adapter"] == kind]
        mean = x(float(np.mean(own)))
        parts.append(el("text", NAMES[kind], x=left - 14, y=y + 4, text_anchor="end", fill="#222222"))
        parts.append(el("line", x1=mean, x2=mean, y1=y - 13, y2=y + 13, stroke=colour, stroke_width=3))
        parts += [el("circle", cx=x(value), cy=y, r=5, fill=colour, fill_opacity=0.55) for value in own]
    label = "share of prompts fulfilled, dynamic model at half the compute"
    parts.append(el("text", label, x=(left + right) / 2, y=bottom + 36, text_anchor="middle", fill="#222222"))
    box = f"0 0 620 {bottom + 44}"
    return el("svg", *parts, xmlns="http://www.w3.org/2000/svg", viewBox=box, font_family="sans-serif", font_size=12)


if __name__ == "__main__":
    main()
