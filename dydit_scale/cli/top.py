"""``dydit top``: a run in the terminal."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_top(parser: argparse.ArgumentParser) -> None:
    """The options of ``dydit top``."""
    parser.add_argument("folder", type=Path, metavar="RUN")
    parser.add_argument("--once", action="store_true", help="print one frame and leave")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two looks")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="with --once: draw the frame into a file")
    parser.set_defaults(run=_run_top)


def _run_top(args: argparse.Namespace) -> None:
    from dydit_scale.workflows.top import draw_once, watch

    if args.svg and not args.once:
        raise ValueError("--svg: add --once, it is of one frame")
    if args.once:
        draw_once(args.folder, args.svg)
    else:
        watch(args.folder, every=args.every)
