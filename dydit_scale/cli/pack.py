"""``dydit data pack``: folders and tables of pictures and clips into shards."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_pack(parser: argparse.ArgumentParser) -> None:
    """The options of ``dydit data pack``; those with a default have it from ``PackConfig``."""
    parser.add_argument(
        "source", type=Path, help="folder, table (csv, tsv, jsonl, parquet, arrow) or saved HF data set"
    )
    parser.add_argument("out", type=Path, help="folder for the shards")
    options = parser.add_argument_group("what is packed", argument_default=argparse.SUPPRESS)
    options.add_argument(
        "--caption-from", metavar="WHAT", help="files (beside the input, or a column) or name (the file's own)"
    )
    options.add_argument(
        "--labels-from", metavar="WHAT", help="files (a json beside it, or a column) or folder (the first of its path)"
    )
    options.add_argument("--image-column", metavar="NAME", help="column of a table with paths or bytes")
    options.add_argument("--caption-column", metavar="NAME")
    options.add_argument("--label-column", metavar="NAME")
    options.add_argument(
        "--root", metavar="FOLDER", help="folder at which a table's paths start (default: that of the table)"
    )
    options.add_argument("--min-side", type=int, metavar="N", help="drop what has a shorter side")
    options.add_argument("--max-aspect", type=float, metavar="X", help="drop what is longer by wider than this")
    options.add_argument("--min-caption", type=int, metavar="N", help="leave shorter captions out (characters)")
    options.add_argument("--max-caption", type=int, metavar="N", help="leave longer captions out (characters)")
    options.add_argument("--min-frames", type=int, metavar="N", help="drop shorter clips")
    options.add_argument("--keep-duplicates", action="store_true", help="pack inputs with equal bytes all the same")
    options.add_argument("--animated", metavar="WHAT", help="animated pictures: first (frame) or refuse")
    options.add_argument("--max-side", type=int, metavar="N", help="shrink pictures with a longer side")
    options.add_argument("--format", metavar="NAME", help="of converted pictures: auto, png, jpeg or webp")
    options.add_argument("--background", metavar="COLOUR", help="colour under transparent pictures (default: white)")
    options.add_argument(
        "--shuffle", action="store_true", help="mix the inputs over the shards, always in the same way"
    )
    options.add_argument("--samples-per-shard", type=int, metavar="N")
    options.add_argument("--shard-mib", type=int, metavar="N", help="MiB of inputs in a shard, at most")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one on each core, at most 8)")
    parser.add_argument("--part", type=_part, metavar="N/M", help="on one of M machines: write every M-th shard")
    parser.set_defaults(run=_run_pack)


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected N/M such as 3/16, got {text!r}")
    return int(number), int(count)


def _run_pack(args: argparse.Namespace) -> None:
    from data_tools.pack import Part, describe, pack
    from data_tools.packing.config import PackConfig

    options = {name: value for name, value in vars(args).items() if name in PackConfig.__dataclass_fields__}
    part = Part(*args.part) if args.part else None
    summary = pack(args.source, args.out, PackConfig(**options), part=part, workers=args.workers)
    for line in describe(summary):
        print(line)
    if summary.index is None:
        print(
            f"{args.out}: part {args.part[0]} of {args.part[1]}; when all are packed, run this without --part to index"
        )
        return
    for sample, reason in list(summary.index.bad.items())[:10]:
        print(f"unusable: {summary.index.name(sample)}: {reason}")
    print(f"{args.out}: {summary.index.num_samples} samples in {len(summary.index.shards)} shards, ", end="")
    print(f"digest {summary.index.digest[:12]}")
