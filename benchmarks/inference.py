"""The realised speed of dynamic models beside the static one: sizes as published, random weights, one run.

    python -m benchmarks.inference                                       # what the device at hand can bear
    python -m benchmarks.inference --sizes dit-xl --batch 1 8 64 --ratios 0.7 0.5 0.3
    python -m benchmarks.inference --sizes flux-dev --masks runs/x       # shares of a trained run
    python -m benchmarks.inference --plot benchmarks/results/inference-*.json    # docs/speed.md and docs/speed.svg

Each measurement is the forwards of a sampler's steps, with another sub-network at each. The variants run in turn, so
that a machine that slows down slows all of them. Speed-ups are medians over the rounds. Writes
benchmarks/results/inference-DEVICE-DTYPE.json; what the columns mean is in docs/speed.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.inference_masks import drawn_shares, shares_of_run
from benchmarks.inference_page import write_page
from benchmarks.inference_peers import counted_macs
from benchmarks.inference_pending import Skipped
from benchmarks.inference_sizes import SIZES, Size
from benchmarks.inference_variants import COMPILED, FEW_STEPS, VARIANTS, Setting, Variant, build
from dydit_scale.models.quiet import quiet_libraries
from dydit_scale.sampling.speed import machine

ROOT = Path(__file__).parents[1]
FEW = 4
"""Steps of a distilled model's sampler."""
ON_CPU = {"sizes": ["dit-s", "dit-b", "dit-xl", "flux-lite"], "batch": [1], "steps": 4}
ON_GPU = {"sizes": list(SIZES), "batch": [1, 8, 64], "steps": 28}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: those that the device can bear")
    parser.add_argument("--batch", nargs="+", type=int, help="pictures at a time; CPU: 1, GPU: 1 8 64")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5], help="cost ratios to draw masks at")
    parser.add_argument("--masks", type=Path, metavar="RUN", help="the shares of an evaluated run instead")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all, compiled ones on a GPU only")
    parser.add_argument("--schedules", nargs="+", choices=("sampler", "few"), default=["sampler", "few"],
                        help=f"steps spread over the size's sampler; all {FEW} of a distilled model")  # fmt: skip
    parser.add_argument("--steps", type=int, help="measured steps of the sampler; CPU: 4, GPU: 28")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--layers", type=int, help="cut the depth to so many blocks")
    parser.add_argument("--side", type=int, help="image tokens along a side")
    parser.add_argument("--text", type=int, help="text tokens")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result")
    parser.add_argument("--plot", nargs="+", type=Path, metavar="FILE", help="measure nothing; make the page of these")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page that --plot makes")
    args = parser.parse_args()
    if args.plot:
        write_page([json.loads(file.read_text()) for file in args.plot], args.docs)
        return
    for name, value in (ON_GPU if args.device == "cuda" else ON_CPU).items():
        setattr(args, name, getattr(args, name) or value)
    _check(parser, args)
    quiet_libraries()
    measure_all(args)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    numbers = {"batch": args.batch, "steps": [args.steps], "repetitions": [args.repetitions]}
    numbers |= {name: [value] for name in ("layers", "side", "text") if (value := getattr(args, name)) is not None}
    for name, values in numbers.items():
        if min(values) < 1:
            parser.error(f"--{name}: expected 1 or more; got {min(values)}")
    if not all(0 < ratio < 1 for ratio in args.ratios):
        parser.error(f"--ratios: expected numbers between 0 and 1; got {args.ratios}")
    if (longest := max(SIZES[name].steps for name in args.sizes)) < args.steps:
        parser.error(f"--steps: the sampler has {longest}; got {args.steps}")


def measure_all(args: argparse.Namespace) -> Path:
    """Every size, schedule, batch and ratio; the file is written after each of them."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("plot", "docs")}
    found: dict[str, Any] = {**machine(device), "device": device.type, "dtype": args.dtype, "settings": settings}
    found |= {"flops_checks": {}, "rows": [], "skipped": []}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"inference-{device.type}-{args.dtype}.json"
    for name in args.sizes:
        size = sized(SIZES[name], args)
        found["flops_checks"][name] = flops_check(size, device, dtype)
        static = size.make_static(device, dtype)
        for few in (schedule == "few" for schedule in args.schedules):
            if few and not size.few_steps:
                continue
            for batch in args.batch:
                for ratio in args.ratios[:1] if args.masks or few else args.ratios:
                    setting = make_setting(size, static, batch, ratio, few=few, args=args)
                    rows, skipped = compare(setting, names(args, few=few), args.repetitions, device)
                    where = describe(setting, batch, None if args.masks else ratio)
                    found["rows"] += [{**where, **row} for row in rows]
                    found["skipped"] += [{**where, **row} for row in skipped]
                    found["process_peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                    file.write_text(json.dumps(found, indent=1) + "\n")
        del static
        _free(device)
    print(f"results: {file}")
    return file


def sized(size: Size, args: argparse.Namespace) -> Size:
    """The size as the device and the arguments have it."""
    layers, side, text = size.on_cpu if args.device == "cpu" else (None, None, None)
    return size.cut(args.layers or layers, args.side or side, args.text or text)


def names(args: argparse.Namespace, *, few: bool) -> list[str]:
    """The variants to measure; the static model and ours with open gates are always among them."""
    wanted = args.variants or [v for v in VARIANTS if args.device == "cuda" or v not in COMPILED]
    wanted = [v for v in wanted if v in FEW_STEPS] if few else wanted
    needed = {"static", "open", *(f"static-{v}" for v in ("compile", "cudagraphs") if v in wanted)}
    return [v for v in VARIANTS if v in needed or v in wanted]


def make_setting(size: Size, static: Any, batch: int, ratio: float, *, few: bool, args: argparse.Namespace) -> Setting:
    """The steps of one comparison and the shares that work in them."""
    sigmas = size.sigmas(FEW, of=FEW) if few else size.sigmas(args.steps, of=size.steps)
    like = next(static.parameters())
    heads = size.config["num_attention_heads"]
    cost = size.cost(size.make_dynamic(static))
    if args.masks:
        shares = shares_of_run(args.masks, size.layers, sigmas, units=heads)
    else:
        shares = drawn_shares(cost, ratio, sigmas, units=heads, token_keep=size.token_keep)
    inputs = size.inputs(batch, sigmas, like.device, like.dtype)
    return Setting(size=size, static=static, inputs=inputs, timesteps=size.timesteps(sigmas), shares=shares,
                   target=ratio, few=few)  # fmt: skip


def describe(setting: Setting, batch: int, ratio: float | None) -> dict[str, Any]:
    """What was compared."""
    size = setting.size
    return {
        "size": size.name, "layers": size.layers, "image_tokens": size.tokens, "text_tokens": size.text,
        "batch": batch, "samples": batch * size.branches, "schedule": "few" if setting.few else "sampler",
        "steps": setting.steps, "target": ratio, "timesteps": setting.timesteps.tolist(),
    }  # fmt: skip


def compare(
    setting: Setting, wanted: list[str], repetitions: int, device: torch.device
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the variants, run in turn, and those that could not run."""
    title = f"{setting.size.name}, {len(setting.inputs[0]['hidden_states'])} samples"
    variants, rows, skipped = [], [], []
    for name in tqdm(wanted, desc=f"{title}: setting up", unit="variant", dynamic_ncols=True):
        try:
            variant, row = first_run(name, setting, device)
        except (Skipped, torch.OutOfMemoryError) as error:
            reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
            skipped.append({"variant": name, "reason": reason})
            tqdm.write(f"{title}: {VARIANTS[name]} is left out: {reason}")
            continue
        variants.append(variant)
        rows.append(row)
    with tqdm(total=repetitions * len(variants), desc=f"{title}: timing", unit="run", dynamic_ncols=True) as bar:
        for _ in range(repetitions):
            for variant, row in zip(variants, rows, strict=True):
                with variant.ready():
                    row["seconds"].append(timed(lambda v=variant: v.run(setting.inputs), device))
                bar.update()
    for variant, row in zip(variants, rows, strict=True):
        if variant.execution is not None:
            row |= {"recompilations": variant.execution.recompilations}
            row |= {"warmup_seconds": variant.execution.warmup_seconds}
    setting.stack.close()
    by_name = {row["variant"]: row for row in rows}
    for row in rows:
        row |= summary(row, by_name)
        tqdm.write(line(title, row))
    return rows, skipped


def first_run(name: str, setting: Setting, device: torch.device) -> tuple[Variant, dict[str, Any]]:
    """The variant, set up and run once, and its row so far."""
    held = _allocated(device)
    began = time.perf_counter()
    variant = build(name, setting)
    row = {"variant": name, "beside": variant.beside, "macs": variant.macs, "macs_from": variant.macs_from,
           "blocks_computed": variant.blocks_computed, "plan_bytes": variant.plan_bytes,
           "setup_seconds": time.perf_counter() - began}  # fmt: skip
    with variant.ready():
        before = _allocated(device)
        _reset_peak(device)
        row["first_seconds"] = timed(lambda: _finite(variant, setting), device)
        if device.type == "cuda":
            weights = sum(p.numel() * p.element_size() for p in setting.static.parameters())
            working = torch.cuda.max_memory_allocated() - before
            row |= {"held_bytes": before - held, "peak_bytes": weights + before - held + working}
    return variant, {**row, "seconds": []}


def _finite(variant: Variant, setting: Setting) -> None:
    assert bool(variant.run(setting.inputs).isfinite().all()), f"{variant.name}: the sample is not finite"


def summary(row: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ideal and realised, each as a speed-up over the variant beside it, and over ours with open gates."""
    beside, open_row = by_name[row["beside"]], by_name["open"]
    ideal = beside["macs"] / row["macs"]
    realised = [a / b for a, b in zip(beside["seconds"], row["seconds"], strict=True)]
    over_open = statistics.median(a / b for a, b in zip(open_row["seconds"], row["seconds"], strict=True))
    return {
        "cost_ratio": row["macs"] / by_name["static"]["macs"],
        "ideal": ideal,
        "realised": statistics.median(realised),
        "realised_iqr": _quartiles(realised),
        "share": statistics.median(realised) / ideal,
        "realised_over_open": over_open,
        "seconds_median": statistics.median(row["seconds"]),
        "seconds_iqr": _quartiles(row["seconds"]),
    }


def line(title: str, row: dict[str, Any]) -> str:
    """A row for the terminal."""
    return (
        f"{title}: {VARIANTS[row['variant']]:<40} {row['seconds_median']:9.4f} s  ideal {row['ideal']:.2f}x  "
        f"realised {row['realised']:.2f}x  share {row['share']:.0%}"
    )


def flops_check(size: Size, device: torch.device, dtype: torch.dtype) -> float:
    """MACs that torch counts in the packed run of a shallow model of this size, over those of the cost model."""
    size = size.cut(layers=2 if size.family in ("flux", "latte") else 1)
    static, sigmas = size.make_static(device, dtype), size.sigmas(1, of=size.steps)
    heads = size.config["num_attention_heads"]
    cost = size.cost(size.make_dynamic(static))
    shares = drawn_shares(cost, 0.6, sigmas, units=heads, token_keep=size.token_keep, tolerance=0.1)
    setting = Setting(size=size, static=static, inputs=size.inputs(1, sigmas, device, dtype),
                      timesteps=size.timesteps(sigmas), shares=shares, target=0.6)  # fmt: skip
    variant = build("both", setting)
    counted = counted_macs(lambda: variant.run(setting.inputs)) / len(setting.inputs[0]["hidden_states"])
    agreement = counted / variant.macs
    assert abs(agreement - 1) < 0.01, f"{size.name}: torch counts {agreement:.4f} of the cost model's MACs"
    return agreement


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds, all kernels finished before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _quartiles(values: list[float]) -> list[float]:
    if len(values) == 1:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
