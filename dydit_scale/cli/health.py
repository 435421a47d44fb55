"""``dydit health``: for probes."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_health(parser: argparse.ArgumentParser) -> None:
    """The options of ``dydit health``."""
    parser.add_argument("folder", type=Path, metavar="RUN")
    parser.add_argument(
        "--max-age", type=float, required=True, metavar="SECONDS",
        help="without a sign of life, or a step, it is not healthy; more than the recipe's largest limit",
    )  # fmt: skip
    parser.set_defaults(run=_run_health)


def _run_health(args: argparse.Namespace) -> int:
    from dydit_scale.workflows.health import health_of

    health = health_of(args.folder, max_age=args.max_age)
    print(health)
    return 0 if health.healthy else 1
