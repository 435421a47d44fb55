"""Every family on the built-in data: a small static model is trained, then adapted to half its compute, and both draw.

    python benchmarks/gallery.py OUT                            # all families: some hours on 2 CPU cores
    python benchmarks/gallery.py OUT --families dit latte

On the debug recipe of each family: a base with random weights, trained as the demo's was (recipes/shapes/make_base.py),
the adaptation under the deepspeed launcher (ZeRO-2, two processes), and the judge of the built-in data. Pictures go to
docs/gallery, the dynamic model's below the static one's; figures to benchmarks/results/gallery.json; docs/gallery.md
shows both. FLUX is left to ``dydit demo``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dydit_scale.evaluation.judges import judge_for
from dydit_scale.models.registry import family_of
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.sampling.generate import generate, picture_grid, sampler_timesteps
from dydit_scale.sampling.speed import machine
from dydit_scale.sampling.video import write_video
from dydit_scale.workflows.evaluate import evaluate_run
from dydit_scale.workflows.launch import call, launch
from dydit_scale.workflows.runs import load_run, sample_config, static_pipeline

ROOT = Path(__file__).parents[1]
CLASSES, CLIPS = ["--classes"], ["--video", "--frames", "8"]
TITLES = {"dit": "DiT", "sit": "SiT", "pixart": "PixArt-Sigma", "latte-classes": "Latte", "latte": "Latte, from text"}
FAMILIES: dict[str, tuple[str, list[str], int]] = {
    "dit": ("dit/debug", CLASSES, 4000),
    "sit": ("sit/debug", CLASSES, 4000),
    "pixart": ("pixart/debug", [], 4000),
    "latte-classes": ("latte/debug_classes", [*CLASSES, *CLIPS, "--side", "16"], 3000),
    "latte": ("latte/debug_t2v", CLIPS, 8000),
}
"""Recipe, options of the data, and steps of the static model."""
PREFACE = """# Every family, small

Tiny models, trained here from random weights on the built-in data and then made dynamic at half their compute, all
weights trained. In every picture the upper row is the static model's and the lower row the dynamic one's, from the same
noise. All trainings are short: a static model with a low score has only begun to learn. FLUX, whose base was trained
for hours, is what `make demo` shows ([its report](report.png)). Figures, pictures and this page are written by
`benchmarks/gallery.py`."""
ADAPT = 1000
STEPS, CFG, PROMPTS, SHOWN, SHOWN_SIDE, FPS = 25, 2.0, 48, 8, 96, 6
STATIC = [
    "model.from_scratch=true",
    "dynamic=null",
    "cost.target=1",
    "supervision.kind=none",
    "engine.name=single",
    "train.ema=0.995",
]
STATIC += ["train.lr=2e-3", "train.warmup_steps=100"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for data, bases and runs")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--adapt-only", action="store_true", help="from the static models that OUT holds already")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    args = parser.parse_args()
    args.out = args.out.resolve()
    os.chdir(ROOT)
    docs = args.out / "docs" if args.quick else ROOT / "docs"
    results = args.out / "gallery.json" if args.quick else ROOT / "benchmarks" / "results" / "gallery.json"
    pictures = docs / "gallery"
    pictures.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = json.loads(results.read_text())["families"] if results.is_file() else {}
    for name in args.families:
        if not args.adapt_only:
            train_static(name, args.out / name, quick=args.quick)
        run = adapt(name, args.out / name, quick=args.quick)
        done[name] = {**measure(run, quick=args.quick), **machine()}
        done[name]["shown"] = show(run, pictures / name, quick=args.quick)
        results.write_text(json.dumps({"families": done}, indent=1) + "\n")
        (docs / "gallery.md").write_text(page(done))
        print(f"{name}: {json.dumps(done[name])}", flush=True)


def train_static(name: str, out: Path, *, quick: bool) -> None:
    """Write the data, and train the static model from random weights: ``shards/`` and ``base/``."""
    recipe, options, steps = FAMILIES[name]
    file, video = f"recipes/{recipe}.yaml", "--video" in options
    if out.exists():
        raise SystemExit(f"{out} exists already; choose another OUT, remove it, or ask for --adapt-only")
    samples = ["--samples", "64"] if quick else ["--samples", "8192" if video else "32768"]
    call("dydit", "data", "shapes", out / "shards", *options, *samples)
    call("dydit", "base", out / "untrained", "--family", name)
    sizes = ["train.batch_size=32", *(["data.images_per_clip=0"] if video else [])]
    call("python", "recipes/shapes/make_base.py", file, out / "base", *_data(out, quick=quick), *STATIC, *sizes,
         f"model.base={out / 'untrained'}", f"train.steps={4 if quick else steps}")  # fmt: skip


def adapt(name: str, out: Path, *, quick: bool) -> Path:
    """Make the static model dynamic; returns the run."""
    recipe, options, _ = FAMILIES[name]
    steps, batch = 4 if quick else ADAPT, 8 if "--video" in options else 16
    launch(f"recipes/{recipe}.yaml", *_data(out, quick=quick), f"run={out / 'run'}", f"model.base={out / 'base'}",
           "supervision.kind=distill", "train.ema=0.98", f"train.batch_size={batch}", f"train.steps={steps}",
           f"train.evaluate_every={steps}", f"train.save_every={steps}",
           f"cost.ramp_steps={min(60, steps // 3)}")  # fmt: skip
    return out / "run"


def _data(out: Path, *, quick: bool) -> list[str]:
    return [f"data.path={out / 'shards'}", "train.sample_every=0", *(["train.evaluate_samples=4"] if quick else [])]


def measure(run: Path, *, quick: bool) -> dict[str, Any]:
    """The judge's scores of both models, and the cost ratio."""
    prompts = 2 if quick else PROMPTS
    result = evaluate_run(run, prompts=prompts, steps=STEPS, cfg=CFG, pairs=1, timed=2, batch=32)
    ratio = [r["ratio_eval"] for r in read_metrics(run / "metrics.jsonl") if "ratio_eval" in r][-1]
    scores = {model: s["overall"] for model, s in result.scores.items()}
    return {"ratio_eval": ratio, "scores": scores, "prompts": prompts}


def show(run: Path, file: Path, *, quick: bool) -> list[str]:
    """A PNG, or a GIF of clips: the static row above the dynamic one.

    Returns their prompts, spread over the judge's list.
    """
    loaded = load_run(run)
    config = sample_config(loaded, steps=STEPS, cfg=CFG)
    judge = judge_for(reads_text=family_of(loaded.pipeline).reads_text, video=config.frames > 1)
    prompts = judge.prompts(SHOWN * 5)[::5][: 2 if quick else SHOWN]
    static = generate(static_pipeline(loaded), prompts, config)
    loaded.network.pack(sampler_timesteps(loaded.pipeline, config))
    rows = np.concatenate([static, generate(loaded.pipeline, prompts, config)])
    if rows.ndim == 4:
        Image.fromarray(picture_grid(rows, len(prompts), SHOWN_SIDE // config.height)).save(file.with_suffix(".png"))
        return prompts
    frames = [picture_grid(rows[:, i], len(prompts), SHOWN_SIDE // config.height) for i in range(rows.shape[1])]
    write_video(file.with_suffix(".gif"), np.stack(frames), FPS)
    return prompts


def page(families: dict[str, Any]) -> str:
    """The gallery as Markdown."""
    parts = [PREFACE]
    for name in (n for n in FAMILIES if n in families):
        result, (recipe, options, steps) = families[name], FAMILIES[name]
        clip, scores = "--video" in options, result["scores"]
        file = f"gallery/{name}.{'gif' if clip else 'png'}"
        parts.append(
            f"## {TITLES[name]}\n\n"
            f"![{TITLES[name]}: static above, dynamic below]({file})\n\n"
            f"From left to right: {', '.join(result['shown'])}.\n\n"
            f"| | static | dynamic |\n|---|---|---|\n"
            f"| MACs | 1 | {result['ratio_eval']:.2f} |\n"
            f"| judge's score, {result['prompts']} {'clips' if clip else 'pictures'} "
            f"| {scores['base']:.2f} | {scores['dynamic']:.2f} |\n\n"
            f"`recipes/{recipe}.yaml`: {steps:,} steps for the static model, {ADAPT:,} to adapt it. "
            f"{result['machine']}, {result['date']}."
        )
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
