"""``dydit cluster``: make and check the files that start a job on a cluster."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from dydit_scale.cluster.spec import TARGETS, ClusterSpec, flag, options

EXIT_FINDINGS = 1


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Its commands and their options."""
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    make = kinds.add_parser("render", help="write the script or manifest that trains a recipe on a cluster")
    make.add_argument("recipe", help="YAML file, e.g. recipes/flux/dev_td_lora.yaml")
    make.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. limits.checkpoint=600")
    make.add_argument("--target", choices=TARGETS, required=True)
    for option in options():
        text, placeholder = option.metadata["help"], option.metadata["placeholder"] or None
        if isinstance(option.default, bool):
            make.add_argument(flag(option), action="store_true", help=text)
        elif isinstance(option.default, tuple):
            make.add_argument(flag(option), action="append", default=[], metavar=placeholder, help=text)
        else:
            make.add_argument(flag(option), type=type(option.default), default=option.default, help=text)
    make.add_argument("--out", type=Path, help="file to write (default: print it)")
    make.set_defaults(run=_render)
    check = kinds.add_parser("validate", help="check rendered files; exit status 1 if anything is wrong")
    check.add_argument("files", nargs="+", type=Path, metavar="FILE")
    check.set_defaults(run=_validate)


def _render(args: argparse.Namespace) -> None:
    from dydit_scale.cluster.render import render

    values = {option.name: getattr(args, option.name) for option in options()}
    for option in options():
        if isinstance(option.default, tuple):
            values[option.name] = _pairs(flag(option), values[option.name])
    text = render(args.recipe, args.overrides, ClusterSpec(target=args.target, **values))
    if args.out is None:
        sys.stdout.write(text)
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(f"{args.out}: {args.target} for {args.nodes} x {args.gpus} GPUs")


def _pairs(name: str, words: list[str]) -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not re.fullmatch(r"\S+", key):
            raise ValueError(f"{name} {word}: expected two words joined by =")
        if key in found:
            raise ValueError(f"{name} {key}: given twice")
        found[key] = value
    return tuple(found.items())


def _validate(args: argparse.Namespace) -> int:
    from dydit_scale.cluster.validate import validate_file

    findings = 0
    for path in args.files:
        found = validate_file(path)
        for line in (*(f"not checked: {text}" for text in found.missing), *found.problems):
            print(f"{path}: {line}")
        if not found.problems:
            print(f"{path}: valid ({', '.join(found.checked)})")
        findings += len(found.problems)
    return EXIT_FINDINGS if findings else 0
