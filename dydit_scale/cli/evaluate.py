"""``dydit evaluate``: a run on the built-in data, or samples on disk by the metrics of papers."""

from __future__ import annotations

import argparse
from pathlib import Path

OF_RUN = {"control": None, "prompts": 256, "steps": 12, "cfg": 3.0}
OF_SAMPLES = {
    "reference": None, "metrics": ["fid", "sfid", "is", "precision", "recall"], "weights": [], "captions": None,
    "trust_torchscript": False, "batch": 32, "device": "auto", "out": None,
}  # fmt: skip
"""Options that the other use of the command does not take, and what they are if not given."""


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Options for a run, or for samples."""
    run = parser.add_argument_group("a run on the built-in scenes or clips")
    run.add_argument("folder", type=Path, metavar="RUN", nargs="?")
    run.add_argument("--control", type=Path, help="run of the static model fine-tuned equally long")
    run.add_argument("--prompts", type=int, help="how many (default: 256)")
    run.add_argument("--steps", type=int, help="of the sampler (default: 12)")
    run.add_argument("--cfg", type=float, help="classifier-free guidance (default: 3)")
    files = parser.add_argument_group("samples on disk (docs/metrics.md)")
    files.add_argument("--samples", type=Path, metavar="FOLDER|FILE.npz", help="pictures or clips")
    files.add_argument("--reference", type=Path, metavar="FOLDER|FILE.npz", help="real ones, or their statistics")
    files.add_argument(
        "--metrics",
        nargs="+",
        help="fid sfid is precision recall (default), fvd, clip, geneval",
    )
    files.add_argument(
        "--weights",
        nargs="+",
        type=_named,
        metavar="NAME=PATH",
        help="inception=FILE i3d=FILE clip=FOLDER detector=FOLDER; without them it says what to get",
    )
    files.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="for clip and geneval: a prompt a line, or GenEval's jsonl (default: prompts.jsonl or .txt beside them)",
    )
    files.add_argument(
        "--trust-torchscript", action="store_true", default=None, help="load the i3d file, which may run any code"
    )
    files.add_argument("--batch", type=int, help="samples at a time (default: 32)")
    files.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    files.add_argument("--out", type=Path, metavar="FILE.json", help="write the values there too")
    parser.set_defaults(run=_run_evaluate)


def _named(text: str) -> tuple[str, Path]:
    """NAME=PATH."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, e.g. inception=weights.pth, got {text!r}")
    return name, Path(path)


def _run_evaluate(args: argparse.Namespace) -> None:
    if (args.folder is None) == (args.samples is None):
        raise ValueError("expected either a RUN, or --samples FOLDER or FILE.npz")
    own, others = (OF_RUN, OF_SAMPLES) if args.folder is not None else (OF_SAMPLES, OF_RUN)
    if foreign := [f"--{name.replace('_', '-')}" for name in others if getattr(args, name) is not None]:
        use = "a RUN" if args.folder is not None else "--samples"
        raise ValueError(f"{', '.join(foreign)}: not an option of evaluating {use}; see dydit evaluate --help")
    for name, usual in own.items():
        if getattr(args, name) is None:
            setattr(args, name, usual)
    from dydit_scale.models.quiet import quiet_libraries

    quiet_libraries()
    if args.folder is not None:
        _judge_run(args)
    else:
        _measure_samples(args)


def _judge_run(args: argparse.Namespace) -> None:
    from dydit_scale.sampling.speed import fallback_lines
    from dydit_scale.workflows.evaluate import evaluate_run

    result = evaluate_run(args.folder, control=args.control, prompts=args.prompts, steps=args.steps, cfg=args.cfg)
    for name, score in result.scores.items():
        print(f"{name:12} {score['overall']:.3f}  " + "  ".join(f"{c} {v:.2f}" for c, v in score["categories"].items()))
    distances = {name: score["frechet"] for name, score in result.scores.items()} | {"real": result.frechet_real}
    print("Fréchet distance from real scenes: " + ", ".join(f"{name} {d:.2f}" for name, d in distances.items()))
    if result.speed:
        print(f"speed-up: {result.speed['ideal']:.2f}x ideal, {result.speed['realised']:.2f}x realised")
        for line in fallback_lines(result.speed["fallback"]):
            print(line)


def _measure_samples(args: argparse.Namespace) -> None:
    import json

    from dydit_scale.workflows.metric_inputs import MetricsConfig
    from dydit_scale.workflows.metrics import as_dict, compute_metrics

    options = ("samples", "reference", "metrics", "captions", "trust_torchscript", "batch", "device")
    config = MetricsConfig(weights=dict(args.weights), **{name: getattr(args, name) for name in options})
    if args.out is not None and not args.out.parent.is_dir():
        raise ValueError(f"--out: there is no folder {args.out.parent}")
    rows = compute_metrics(config)
    for row in rows:
        print(f"{row.name:26} {row.value:10.4f}  {row.note}".rstrip())
    if args.out is not None:
        args.out.write_text(json.dumps(as_dict(config, rows), indent=1) + "\n")
