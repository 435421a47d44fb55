"""``dydit demo``: the whole journey in minutes: data, adaptation under a launcher, control, evaluation, export,
report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dydit_scale.monitoring.records import read_metrics
from dydit_scale.report.page import write_report
from dydit_scale.sampling.speed import fallback_lines, machine
from dydit_scale.train.recipe import load_recipe
from dydit_scale.workflows.evaluate import EvaluationResult, evaluate_run
from dydit_scale.workflows.export import export_run
from dydit_scale.workflows.exports.common import ExportRow
from dydit_scale.workflows.launch import call, launch

PROMPTS, STEPS, CFG = 256, 10, 3.0
SAMPLES = {"demo": 2048, "long": 8192}
"""Scenes to train on."""
RATIO_TOLERANCE = 0.03
LEAST_SHARE = {"demo": 0.85, "long": 0.97}
"""Least score of the dynamic model, as a share of its control's."""


def run_demo(out: Path, recipes: Path, name: str = "demo", *, strict: bool = False) -> Path:
    """Run everything, print what was achieved, and return the report's path.

    Raises ValueError if a step fails, naming its command, or, if ``strict``, if a goal is missed.
    """
    began = time.monotonic()
    for recipe in (recipes / f"{name}.yaml", recipes / f"{name}_control.yaml"):
        load_recipe(recipe)  # a mistake in either is told before the first does any work
    _clear(out)
    adapted, control = recipes / f"{name}.yaml", recipes / f"{name}_control.yaml"
    runs = {name: out / "runs" / name for name in ("td_lora", "control")}
    data = [f"data.path={out / 'shards'}"]
    _step("1/6  data: captioned scenes as webdataset shards", began)
    call("dydit", "data", "shapes", out / "shards", "--samples", str(SAMPLES[name]))
    _step("2/6  adapt the base to half its compute: TD-LoRA and routers, DeepSpeed ZeRO-2 on 2 processes", began)
    launch(adapted, *data, f"run={runs['td_lora']}")
    _step("3/6  control: the static base fine-tuned equally long with plain LoRA of equal size", began)
    launch(control, *data, f"run={runs['control']}")
    _step("4/6  evaluate: packed sub-networks beside base and control", began)
    result = evaluate_run(
        runs["td_lora"], control=runs["control"], prompts=PROMPTS, steps=STEPS, cfg=CFG, pairs=2, timed=32
    )
    _step("5/6  export the adapter and load it back", began)
    exports = export_run(runs["td_lora"], ["td-lora", "diffusers"], force=True)
    _step("6/6  report", began)
    report = write_report(runs["td_lora"])
    achieved = _achieved(runs, recipes, name, result, exports, time.monotonic() - began)
    (out / "result.json").write_text(json.dumps(achieved, indent=1))
    print(_table(achieved))
    scores = achieved["scores"]
    missed = missed_goals(
        achieved["ratio"], achieved["target"], scores["dynamic"], scores["control"], LEAST_SHARE[name]
    )
    print("\n" + ("goals: reached" if not missed else "goals missed: " + "; ".join(missed)))
    print(f"result: {out / 'result.json'}\nreport: {report}")
    if missed and strict:
        raise ValueError("a goal was missed (see above), and --strict asks for all of them")
    return report


def _clear(out: Path) -> None:
    """Make room for a new demo; only a folder that a demo made is removed."""
    marker = out / ".dydit-demo"
    if out.exists() and any(out.iterdir()) and not marker.exists():
        raise ValueError(f"{out} is not empty and was not made by a demo; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    marker.touch()


def missed_goals(ratio: float, target: float, dynamic: float, control: float, least_share: float) -> list[str]:
    """What a run was for and did not reach, in words; empty if it reached everything."""
    missed = []
    if abs(ratio - target) > RATIO_TOLERANCE:
        missed.append(f"the cost ratio at evaluation is {ratio:.3f}, not within {RATIO_TOLERANCE} of {target}")
    if dynamic < least_share * control:
        missed.append(
            f"the dynamic model scores {dynamic:.3f}, less than {least_share:.0%} of its control's {control:.3f}"
        )
    return missed


def _final_ratio(run: Path) -> float:
    return [r["ratio_eval"] for r in read_metrics(run / "metrics.jsonl") if "ratio_eval" in r][-1]


def data_share(run: Path) -> float:
    """Share of the steps' seconds that the main process waited for its batches."""
    steps = [record for record in read_metrics(run / "metrics.jsonl") if "data_seconds" in record]
    return sum(step["data_seconds"] for step in steps) / sum(step["seconds"] for step in steps)


def _achieved(
    runs: dict[str, Path],
    recipes: Path,
    name: str,
    result: EvaluationResult,
    exports: Sequence[ExportRow],
    seconds: float,
) -> dict[str, Any]:
    """What came of it, with the settings that gave it and the machine that did it."""
    recipe = load_recipe(recipes / f"{name}.yaml")
    scores = {model: s["overall"] for model, s in result.scores.items()}
    return {
        "recipe": f"{name}.yaml",
        "prompts": PROMPTS,
        "sampler_steps": STEPS,
        "cfg": CFG,
        "ratio": _final_ratio(runs["td_lora"]),
        "target": recipe.cost.target,
        "scores": scores,
        "share_of_control": scores["dynamic"] / scores["control"] if scores["control"] else float("nan"),
        "categories": {model: s["categories"] for model, s in result.scores.items()},
        "speed": result.speed,
        "exports": [
            {"format": row["format"], "bytes": row["bytes"], "output_error": row["output_error"]} for row in exports
        ],
        "data_share": data_share(runs["td_lora"]),
        "seconds": seconds,
        "settings": recipe.as_dict(),
        **machine(),
    }


def _table(achieved: dict[str, Any]) -> str:
    scores, speed = achieved["scores"], achieved["speed"]
    adapter, mean = achieved["exports"]
    rows = [
        ("cost ratio at evaluation", f"{achieved['ratio']:.3f}", f"target {achieved['target']:.2f}"),
        ("score, dynamic", f"{scores['dynamic']:.3f}", f"{achieved['share_of_control']:.0%} of its control"),
        ("score, control", f"{scores['control']:.3f}", "static, plain LoRA of equal size"),
        ("score, base", f"{scores['base']:.3f}", "untouched"),
        ("speed-up", f"{speed['realised']:.2f}x", f"ideal {speed['ideal']:.2f}x, {speed['share']:.0%} of it"),
        ("adapter", f"{adapter['bytes'] / 1e6:.2f} MB", "loaded back, equal to rounding"),
        (
            "mean plain LoRA",
            f"{mean['bytes'] / 1e6:.2f} MB",
            f"error {mean['output_error']:.2f} of the adapter's effect",
        ),
        ("waiting for data", f"{achieved['data_share']:.1%}", "of the steps' time; under 1% is wanted"),
        ("time", f"{achieved['seconds'] / 60:.1f} min", "without installation"),
    ]
    lines = [f"  {what:26}{value:>10}   {note}" for what, value, note in rows]
    return "\n".join(["", *lines, *fallback_lines(speed["fallback"])])


def _step(title: str, began: float) -> None:
    print(f"\n[{time.monotonic() - began:5.0f} s] {title}", flush=True)
