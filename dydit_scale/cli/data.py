"""``dydit data``: make, index and look at training data."""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path

from dydit_scale.cli.pack import add_pack


def add_data(parser: argparse.ArgumentParser) -> None:
    """The subcommands of ``dydit data``."""
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    shapes = kinds.add_parser("shapes", help="draw the built-in captioned scenes into webdataset shards")
    shapes.add_argument("out", type=Path, help="folder for the shards")
    shapes.add_argument("--samples", type=int, default=16384)
    shapes.add_argument("--side", type=int, default=32, help="pixels of a picture's side")
    shapes.add_argument("--seed", type=int, default=0)
    shapes.add_argument("--classes", action="store_true", help="one object each, with its class (or motion) as a label")
    shapes.add_argument("--video", action="store_true", help="clips of moving shapes (needs the extra: video)")
    shapes.add_argument("--frames", type=int, help="frames of a clip, with --video (default: 16)")
    shapes.add_argument("--samples-per-shard", type=int, default=2048)
    shapes.add_argument("--workers", type=int, help="processes that draw (default: one on each core, at most 8)")
    shapes.set_defaults(run=_run_shapes)
    add_pack(kinds.add_parser("pack", help="pack folders or tables of pictures and clips into webdataset shards"))
    index = kinds.add_parser("index", help="index the webdataset shards of a folder, strictly")
    index.add_argument("folder")
    index.add_argument("--bad-shards", type=int, default=0, help="how many broken tars to leave out before giving up")
    index.add_argument("--update", action="store_true", help="scan only shards whose SHA-256 is not in the old index")
    index.add_argument("--workers", type=int, help="processes that read (default: one on each core, at most 8)")
    index.set_defaults(run=_run_index)
    check = kinds.add_parser("check", help="compare shards with their index; exit status 1 if anything differs")
    check.add_argument("folder", type=_local)
    check.add_argument("--quick", action="store_true", help="names and sizes only, without reading the shards")
    check.add_argument("--workers", type=int, help="processes that read (default: one on each core, at most 8)")
    check.set_defaults(run=_run_check)
    summarize = kinds.add_parser("summarize", help="write one HTML page about a folder of indexed shards")
    summarize.add_argument("folder", type=_local)
    summarize.add_argument(
        "--recipes", nargs="+", default=[], type=Path, metavar="RECIPE", help="show what they make of the samples"
    )
    summarize.add_argument("--out", type=Path, help="HTML file (default: FOLDER/summary.html)")
    summarize.add_argument("--image-size", type=int, help="show squares of that size, as a recipe would have them")
    summarize.add_argument("--buckets", action="store_true", help="with --image-size: aspect buckets of that area")
    summarize.set_defaults(run=_run_summarize)
    encode = kinds.add_parser("encode", help="compute the latents and text embeddings of a recipe's data once")
    encode.add_argument("recipe", type=Path, help="YAML file; its data, model and precision count")
    encode.add_argument("words", nargs="+", metavar="OUT [key=value]", help="folder for the shards; dotted overrides")
    encode.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of what is stored (default: the precision)")
    encode.add_argument("--batch", type=int, default=16, help="pictures, frames or captions in an encoder at a time")
    encode.add_argument("--update", action="store_true", help="encode again what changed in the data since")
    encode.set_defaults(run=_run_encode)


def _local(folder: str) -> Path:
    """A folder on this machine."""
    if "://" in folder:
        raise argparse.ArgumentTypeError(
            f"{folder}: give the shards' local folder; training compares those of a URL with their index itself"
        )
    return Path(folder)


def _run_shapes(args: argparse.Namespace) -> None:
    from data_tools.shapes import write_shapes

    if args.frames is not None and not args.video:
        raise ValueError(f"--frames {args.frames}: pictures have none; add --video for clips")
    if args.video and args.frames == 1:
        raise ValueError("--frames 1: a clip has more; leave out --video for pictures")
    index = write_shapes(
        args.out,
        samples=args.samples,
        side=args.side,
        seed=args.seed,
        classes=args.classes,
        frames=(16 if args.frames is None else args.frames) if args.video else 1,
        samples_per_shard=args.samples_per_shard,
        workers=args.workers,
    )
    print(f"{args.out}: {index.num_samples} scenes in {len(index.shards)} shards, digest {index.digest[:12]}")


def _run_index(args: argparse.Namespace) -> None:
    from dydit_scale.data.processes import default_workers
    from dydit_scale.data.shards import index_folder

    workers = default_workers() if args.workers is None else args.workers
    done = index_folder(args.folder, bad_shards=args.bad_shards, workers=workers, update=args.update)
    index = done.index
    for reason in index.broken.values():
        print(f"left out: {reason}")
    for sample, reason in list(index.bad.items())[:10]:
        print(f"unusable: {index.name(sample)}: {reason}")
    for tool, count in done.foreign.items():
        print(f"{tool} index agrees: {count} of {len(index.shards)} shards")
    if args.update:
        print(f"unchanged: {done.reused} of {len(index.shards)} shards")
    if index.ignored:
        kinds = ", ".join(f"{count} .{extension}" for extension, count in list(index.ignored.items())[:10])
        print(f"ignored: members that are no part of a sample, by extension: {kinds}")
    bad = f", {len(index.bad)} of them unusable" if index.bad else ""
    print(f"{args.folder}: {index.num_samples} samples in {len(index.shards)} shards{bad}, digest {index.digest[:12]}")


def _run_check(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from data_tools.check import check_shards
    from dydit_scale.data.processes import default_workers

    workers = default_workers() if args.workers is None else args.workers
    found = check_shards(args.folder, quick=args.quick, workers=workers, tell=tqdm.write)
    if found.findings:
        print(f"{args.folder}: {len(found.findings)} findings in {len(found.shards)} shards")
        return 1
    how = "by name and size; without --quick every byte is read" if args.quick else "by SHA-256"
    print(f"{args.folder}: {len(found.shards)} shards, {sum(s.count for s in found.shards)} samples as indexed ({how})")
    return 0


def _run_summarize(args: argparse.Namespace) -> None:
    from dydit_scale.workflows.summarize import summarize

    for line in summarize(
        args.folder, out=args.out, recipes=args.recipes, image_size=args.image_size, buckets=args.buckets
    ):
        print(line)


def _run_encode(args: argparse.Namespace) -> None:
    from dydit_scale.models.quiet import quiet_libraries

    quiet_libraries()
    from dydit_scale.parallel.world import close, init_world
    from dydit_scale.train.recipe import load_recipe
    from dydit_scale.workflows.encode import encode_data

    outs = [word for word in args.words if "=" not in word]
    if len(outs) != 1:
        raise ValueError(f"expected one folder OUT beside key=value overrides, got {outs or 'none'}")
    recipe = load_recipe(args.recipe, [word for word in args.words if "=" in word])
    world = init_world(timedelta(days=30))  # ranks that are done wait for the others
    done = encode_data(recipe, Path(outs[0]), world, dtype=args.dtype, batch=args.batch, update=args.update)
    if world.is_main:
        index = done.index
        for sample, reason in list(index.bad.items())[:10]:
            print(f"unusable: {index.name(sample)}: {reason}")
        bad = f", {len(index.bad)} of them unusable" if index.bad else ""
        print(
            f"{outs[0]}: {index.num_samples} samples in {len(index.shards)} shards{bad}, {done.written} encoded now, "
            f"{sum(shard.bytes for shard in index.shards) / 1e6:.1f} MB, digest {index.digest[:12]}"
        )
    close(world)
