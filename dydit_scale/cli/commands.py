"""Each command: its options, and the workflow it calls."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from dydit_scale.cli.ckpt import add_ckpt
from dydit_scale.cli.cluster import add_cluster
from dydit_scale.cli.data import add_data
from dydit_scale.cli.evaluate import add_evaluate
from dydit_scale.cli.health import add_health
from dydit_scale.cli.plan import add_plan
from dydit_scale.cli.sample import add_sample
from dydit_scale.cli.top import add_top

EXPORT_FORMATS = (
    "td-lora", "diffusers", "peft", "kohya", "comfyui", "lora-ranges", "lora-experts", "pipeline", "static",
)  # fmt: skip
"""Those of workflows/export.py, which takes seconds to import."""


def _quiet() -> None:
    from dydit_scale.models.quiet import quiet_libraries

    quiet_libraries()


def _base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder for the pipeline")
    parser.add_argument("--family", default="flux", help="flux (default), dit, latte, ...; a wrong name lists them all")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_run_base)


def _run_base(args: argparse.Namespace) -> None:
    _quiet()
    from dydit_scale.workflows.base import write_base

    write_base(args.out, args.family, seed=args.seed)


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN")
    parser.add_argument(
        "--format",
        action="append",
        dest="formats",
        choices=EXPORT_FORMATS,
        required=True,
    )
    parser.add_argument("--out", type=Path, help="folder (default: RUN/export)")
    parser.add_argument(
        "--steps", type=int, default=28, help="of the sampler: means are taken over them, gates are exact at them"
    )
    parser.add_argument("--ranges", type=int, default=4, help="files of lora-ranges, each for a part of the timesteps")
    parser.add_argument("--force", action="store_true", help="write although the approximation is poor")
    parser.add_argument("--license", help="of the weights, for headers and the model card (default: other)")
    parser.set_defaults(run=_run_export)


def _run_export(args: argparse.Namespace) -> None:
    _quiet()
    from dydit_scale.workflows.export import export_run

    options = {"steps": args.steps, "ranges": args.ranges, "force": args.force, "license": args.license}
    rows = export_run(args.folder, args.formats, out=args.out, **options)
    for row in rows:
        errors = (
            f"weights {row['error_mean']:.3f} (worst layer {row['error_max']:.3f}), output {row['output_error']:.3f}"
        )
        print(f"{row['format']}: {row['path']}, {row['bytes'] / 1e6:.2f} MB, loaded back and compared; error: {errors}")
        if row["routers"] is False:
            print("  without the routers: for the complete model, at full cost")


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="original checkpoint (.safetensors, .pt, .pth), or a model folder")
    parser.add_argument("out", type=Path, help="model folder to write, or file with --to original")
    parser.add_argument("--to", choices=("diffusers", "original"), default="diffusers")
    parser.add_argument("--weights", choices=("ema", "model"), help="of a training file (default: ema where present)")
    parser.add_argument("--heads", type=int, help="attention heads, where no published size tells them")
    parser.add_argument(
        "--parts",
        help="autoencoder (DiT, SiT, Latte) or pipeline (FLUX), folder or hub name: OUT becomes a whole pipeline",
    )
    parser.add_argument("--pipeline", help="its class, e.g. SiTPipeline: DiT and SiT files look the same")
    parser.set_defaults(run=_run_convert)


def _run_convert(args: argparse.Namespace) -> None:
    _quiet()
    from dydit_scale.workflows.convert import convert

    options = ("to", "weights", "heads", "parts", "pipeline")
    done = convert(args.source, args.out, **{name: getattr(args, name) for name in options})
    taken = f", its {done.weights} weights" if done.weights else ""
    print(f"{args.source}: {done.layout.title}{taken}")
    print(f"{args.out}: {done.tensors} tensors" + (f" for {done.layout.target}" if args.to == "diffusers" else ""))
    if args.to == "diffusers" and done.layout.note and not args.parts:
        print(f"note: {done.layout.note}")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, help="HTML file (default: RUN/report.html)")
    parser.set_defaults(run=_run_report)


def _run_report(args: argparse.Namespace) -> None:
    from dydit_scale.report.page import write_report

    print(f"report: {write_report(args.folder, args.out)}")


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for everything the demo makes")
    parser.add_argument("--name", default="demo", help="which recipe of --recipes: demo, or long (45 minutes)")
    parser.add_argument(
        "--recipes", type=Path, default=Path("recipes/shapes"), help="folder of the recipes and their controls"
    )
    parser.add_argument("--strict", action="store_true", help="fail if the cost ratio or the score misses its goal")
    parser.set_defaults(run=_run_demo)


def _run_demo(args: argparse.Namespace) -> None:
    _quiet()
    from dydit_scale.workflows.demo import run_demo

    run_demo(args.out, args.recipes, args.name, strict=args.strict)


def _stop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN")
    parser.add_argument("--wait", action="store_true", help="return when the run has saved its state and left")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait; then the exit status is 1")
    parser.set_defaults(run=_run_stop)


def _run_stop(args: argparse.Namespace) -> int:
    from dydit_scale.workflows.stop import stop_run

    return 0 if stop_run(args.folder, wait=args.wait, timeout=args.timeout) else 1


Add = Callable[[argparse.ArgumentParser], None]
COMMANDS: dict[str, tuple[Add, str]] = {
    "demo": (_demo, "adapt the small base, sample, export, verify and report, all in minutes on two CPU cores"),
    "data": (add_data, "make and index training data"),
    "plan": (add_plan, "say whether a recipe fits a cluster, how fast it will be and what it takes; nothing is loaded"),
    "base": (_base, "write a small pipeline with random weights, to be trained on the built-in data"),
    "stop": (_stop, "ask a run to save its state and leave after its step; for people and for preStop hooks"),
    "top": (add_top, "watch a run in the terminal: progress, losses, cost, routers, machines"),
    "health": (add_health, "say whether a run is alive and makes progress; exit status 1 if not; for probes"),
    "sample": (
        add_sample,
        "draw pictures with the packed dynamic model beside the static one, or thousands for metrics",
    ),
    "evaluate": (
        add_evaluate,
        "judge a run on the built-in scenes, beside its base and its control; or compute metrics of samples on disk",
    ),
    "export": (_export, "write adapters or models, loaded back and verified"),
    "convert": (_convert, "turn DiT, SiT, Latte, FLUX, DyDiT and DyFLUX checkpoints into model folders, and back"),
    "ckpt": (add_ckpt, "list, verify, convert and prune the checkpoints of a run"),
    "report": (_report, "write one HTML page about a run"),
    "cluster": (add_cluster, "make and check files for Kubernetes, Slurm, torchrun and deepspeed"),
}
