"""``dydit ckpt``: look at, verify, convert and prune the checkpoints of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dydit_scale.checkpoint.survey import Row

EXIT_DAMAGED = 1


def add_ckpt(parser: argparse.ArgumentParser) -> None:
    """Its commands and their options."""
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    ls = kinds.add_parser("ls", help="list the checkpoints of a run; sizes are compared, contents are not read")
    ls.set_defaults(run=_ls)
    check = kinds.add_parser("verify", help="read checkpoints whole and compare their sha256; exit status 1 if damaged")
    check.set_defaults(run=_verify)
    for command in (ls, check):
        command.add_argument("folder", type=Path, metavar="RUN")
    check.add_argument("step", type=int, nargs="?", help="only this one")
    out = kinds.add_parser("convert", help="write the weights of a checkpoint into one plain safetensors file")
    out.add_argument("source", type=Path, help="a run, a checkpoint of it, or a folder of DeepSpeed or torch DCP")
    out.add_argument("out", type=Path, help="safetensors file to write")
    out.add_argument("--step", type=int, help="of a run (default: its newest whole one)")
    out.add_argument("--weights", choices=("ema", "param"), help="of a run (default: ema where present)")
    out.add_argument("--prefix", help="take the names that begin so, without it (default for DCP: model.)")
    out.add_argument("--trust-pickle", action="store_true", help="open DeepSpeed and DCP files, which may run any code")
    out.set_defaults(run=_convert)
    less = kinds.add_parser("prune", help="delete old checkpoints; not while the run is training")
    less.add_argument("folder", type=Path, metavar="RUN")
    less.add_argument("--keep", type=int, required=True, help="newest whole ones to keep")
    less.add_argument("--keep-every", type=int, default=0, help="keep those of every such step too")
    less.set_defaults(run=_prune)


def _ls(args: argparse.Namespace) -> None:
    from dydit_scale.checkpoint.survey import checkpoints_of, survey

    rows = [("checkpoint", "written (UTC)", "size", "by", "tensors", "pieces", "")]
    rows += map(_cells, survey(checkpoints_of(args.folder)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cells(row: Row) -> tuple[str, str, str, str, str, str, str]:
    if not row.written:
        return (row.name, "", "", "", "", "", row.problem or "")
    by = f"{row.world_size} x {row.engine or 'unknown'}" if row.world_size else "unknown"
    return (
        row.name, row.written.replace("T", " ").rstrip("Z"), _size(row.bytes), by, str(row.tensors), str(row.pieces),
        row.problem or "whole",
    )  # fmt: skip


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _verify(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from dydit_scale.checkpoint.survey import checkpoints_of, chosen, size_of, verify

    paths = chosen(checkpoints_of(args.folder), args.step)
    if not paths:
        raise ValueError(f"{args.folder}: all checkpoints were found damaged before; dydit ckpt ls lists them")
    total = sum(size_of(path) for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=total < 2**28) as bar:
        verdicts = [verify(path, bar.update) for path in paths]
    for verdict in verdicts:
        print(f"{verdict.path.name}: {verdict.problem or 'whole'}, {_size(verdict.bytes)}")
    return EXIT_DAMAGED if any(verdict.problem for verdict in verdicts) else 0


def _convert(args: argparse.Namespace) -> None:
    from dydit_scale.checkpoint.convert import convert

    options = ("step", "weights", "prefix", "trust_pickle")
    done = convert(args.source, args.out, **{name: getattr(args, name) for name in options})
    print(f"{args.source}: {done.title}")
    print(f"{args.out}: {done.tensors} tensors, {_size(done.bytes)}")


def _prune(args: argparse.Namespace) -> None:
    from dydit_scale.checkpoint.folder import prune
    from dydit_scale.checkpoint.survey import checkpoints_of
    from dydit_scale.train.attempt import read_holder

    if args.keep < 1 or args.keep_every < 0:
        raise ValueError(f"expected --keep >= 1 and --keep-every >= 0, got {args.keep} and {args.keep_every}")
    folder = checkpoints_of(args.folder)
    for run in {folder, folder.parent}:
        holder = read_holder(run)
        if holder is not None and holder.lives(run):
            raise ValueError(
                f"run {run}: in use by {holder}; it deletes old checkpoints itself (train.keep); or stop it first"
            )
    gone = prune(folder, keep=args.keep, keep_every=args.keep_every)
    print(f"{args.folder}: deleted {', '.join(path.name for path in gone) or 'nothing'}")
