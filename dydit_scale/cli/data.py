"""``dydit data``: make, index and look at training data."""

from __future__ import annotations

import argparse
from pathlib import Path


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
    index = kinds.add_parser("index", help="index the webdataset shards of a folder, strictly")
    index.add_argument("folder")
    index.add_argument("--bad-shards", type=int, default=0, help="how many broken tars to leave out before giving up")
    index.set_defaults(run=_run_index)


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
    from dydit_scale.data.shards import build_index

    index = build_index(args.folder, bad_shards=args.bad_shards)
    for reason in index.broken.values():
        print(f"left out: {reason}")
    for sample, reason in list(index.bad.items())[:10]:
        print(f"unusable: {index.name(sample)}: {reason}")
    bad = f", {len(index.bad)} of them unusable" if index.bad else ""
    print(f"{args.folder}: {index.num_samples} samples in {len(index.shards)} shards{bad}, digest {index.digest[:12]}")
