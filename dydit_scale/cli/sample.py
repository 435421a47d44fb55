"""``dydit sample``: a few pictures beside the static model's, or thousands for metrics."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

LAUNCH = """\
thousands of pictures, on one GPU or on all:
  dydit sample RUN --num 50000 --npz OUT.npz
  torchrun --nproc-per-node 8 --no-python dydit sample RUN --num-samples 50000 --npz OUT.npz
  deepspeed --num_gpus 8 --no_local_rank --no_python dydit sample RUN --num-samples 50000 --npz OUT.npz
Launchers take --num for an option of their own, so it is written out there. The same command goes on after a kill, on
any number of processes, and the result is the same."""


def add_sample(parser: argparse.ArgumentParser) -> None:
    """The options of ``dydit sample``."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, LAUNCH
    parser.add_argument("folder", type=Path, metavar="RUN")
    parser.add_argument("--prompts", type=Path, help="text file, one prompt (or class) a line, or GenEval's jsonl")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the pictures (default: RUN/pictures; with --num RUN/samples, or OUT for OUT.npz)",
    )
    many = parser.add_argument_group("thousands of pictures", "of the run alone, without the static model beside it")
    many.add_argument(
        "--num",
        "--num-samples",
        type=int,
        metavar="N",
        help="how many; prompts take turns, all classes if none are given",
    )
    many.add_argument("--npz", type=Path, metavar="OUT.npz", help="for ADM's evaluation: arr_0 pixels, arr_1 classes")
    many.add_argument("--pictures", action="store_true", help="PNG (clips: MP4) in the pictures/ of --out")
    parser.add_argument("--steps", type=int, help="of the sampler (default: the recipe's sample_steps)")
    parser.add_argument(
        "--cfg", type=float, help="classifier-free guidance with the empty prompt, for undistilled models"
    )
    parser.add_argument("--guidance", type=float, help="distilled guidance, for models that take it")
    parser.add_argument("--sampler", help="dit: ddpm, ddim, dpm++; sit: euler, heun, sde (default: the pipeline's own)")
    parser.add_argument("--height", type=int, help="pixels of a picture (default: the recipe's image_size)")
    parser.add_argument("--width", type=int, help="the same; other than the height for flux and pixart")
    parser.add_argument("--fps", type=int, default=8, help="frames a second of clips")
    parser.add_argument(
        "--batch", type=int, help="pictures at a time (default: 16; with --num on a GPU as many as its memory holds)"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--pack-memory", type=float, metavar="GIB", help="for packed weights (default: half of the free memory)"
    )
    parser.add_argument(
        "--fixed-tokens",
        action="store_true",
        help="count tokens in a first pass: no wait for a GPU's answer",
    )
    parser.add_argument(
        "--share-scores",
        action="store_true",
        help="the branches of guidance skip the same tokens; for models that run both in one batch",
    )
    parser.add_argument(
        "--pack-weights", choices=("int8", "fp8"), help="packed weights in 8 bits: half the memory, no more speed"
    )
    parser.add_argument(
        "--fused-tokens", action="store_true", help="a GPU: MLPs of chosen tokens in Triton kernels where they can"
    )
    parser.add_argument("--execution", choices=("eager", "compile", "cudagraphs"), default="eager")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from dydit_scale.models.quiet import quiet_libraries

    quiet_libraries()
    from dydit_scale.workflows.prompt_files import read_prompts
    from dydit_scale.workflows.sample import PackOptions

    prompts = [*args.prompt, *(read_prompts(args.prompts) if args.prompts else [])]
    options = ("steps", "height", "width", "cfg", "guidance", "sampler", "batch", "seed")
    config = {name: getattr(args, name) for name in options}
    memory = None if args.pack_memory is None else int(args.pack_memory * 2**30)
    packing = PackOptions(
        max_bytes=memory,
        fixed_tokens=args.fixed_tokens,
        execution=args.execution,
        share_scores=args.share_scores,
        weights=args.pack_weights,
        fused_tokens=args.fused_tokens,
    )
    run = _compare if args.num is None else _draw_many
    run(args, prompts, config, packing)


def _compare(args: argparse.Namespace, prompts: list[str], config: dict[str, Any], packing: Any) -> None:
    from dydit_scale.workflows.sample import sample_run

    if args.npz is not None or args.pictures:
        raise ValueError("--npz and --pictures: say with --num how many pictures to draw")
    if not prompts:
        raise ValueError('nothing to draw: give --prompts FILE or --prompt "a red circle", or --num')
    out = args.out or args.folder / "pictures"
    config["batch"] = config["batch"] or 16
    sample_run(args.folder, prompts, out, config=config, fps=args.fps, packing=packing)
    print(f"pictures: {out}")


def _draw_many(args: argparse.Namespace, prompts: list[str], config: dict[str, Any], packing: Any) -> None:
    from datetime import timedelta

    from dydit_scale.parallel.world import close, init_world
    from dydit_scale.workflows.sample_many import sample_many
    from dydit_scale.workflows.sample_set import Wanted

    out = args.out or (args.folder / "samples" if args.npz is None else args.npz.with_suffix(""))
    wanted = Wanted(num=args.num, out=out, npz=args.npz, pictures=args.pictures, prompts=prompts, fps=args.fps)
    world = init_world(timedelta(hours=2))  # a block, or the batches that are tried before the first
    done = sample_many(args.folder, wanted, world, config=config, packing=packing)
    if world.is_main:
        print(f"{args.npz or wanted.picture_folder}: {done}")
    close(world)
