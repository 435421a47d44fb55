"""The ``dydit`` command: parses arguments and calls a workflow. Libraries are imported when a command needs them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from dydit_scale.checkpoint.errors import CheckpointError
from dydit_scale.cli.commands import COMMANDS


def make_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(
        prog="dydit", description="Dynamic diffusion transformers: train, sample, export, report."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (add, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        add(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or what the command says; 64 for a mistake in what was asked, told in one line; 130 when
    interrupted."""
    args = make_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int | None] = args.run
    try:
        return run(args) or 0
    except (ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 64
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
