"""``dydit plan``: what a recipe needs, before anything is rented."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The options of ``dydit plan``."""
    parser.add_argument("recipe", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe, such as train.batch_size=32")
    cluster = parser.add_argument_group("the cluster")
    cluster.add_argument("--gpus", type=int, default=1, help="over all nodes")
    cluster.add_argument("--nodes", type=int, help="default: as many as hold at most 8 GPUs each")
    cluster.add_argument(
        "--gpu", default="h100", help="a100, h100 (default), h200, b200, ...: what follows, by its name"
    )
    cluster.add_argument("--gpu-memory", metavar="SIZE", help="of one GPU: 80GiB, 80GB")
    cluster.add_argument("--tflops", type=float, help="of one GPU, dense bf16")
    cluster.add_argument("--watts", type=float, help="of one GPU")
    cluster.add_argument("--link", type=float, metavar="GB/S", help="between the GPUs of a node, in one direction")
    cluster.add_argument(
        "--bandwidth", type=float, default=50.0, metavar="GB/S", help="of a node to the others (default: 50)"
    )
    parser.add_argument("--encoded", action="store_true", help="count with data that `dydit data encode` made")
    parser.add_argument("--search", action="store_true", help="the cheapest settings that fit, the batch kept")
    parser.add_argument("--json", action="store_true", help="the plan as JSON")
    parser.set_defaults(run=_run_plan)


def _run_plan(args: argparse.Namespace) -> int:
    from dydit_scale.models.quiet import quiet_libraries

    quiet_libraries()
    from dydit_scale.workflows.plan import plan_recipe

    options = ("gpus", "nodes", "gpu", "gpu_memory", "tflops", "watts", "link", "bandwidth")
    return plan_recipe(
        args.recipe,
        args.overrides,
        {name: getattr(args, name) for name in options},
        encoded=args.encoded or None,
        find_others=args.search,
        as_json=args.json,
    )
