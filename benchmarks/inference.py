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
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.inference_masks import drawn_shares
from benchmarks.inference_page import comparisons_of, write_page
from benchmarks.inference_peers import Skipped, counted_macs
from benchmarks.inference_plan import FEW, ON_CPU, ON_GPU, Comparison, check, names, planned
from benchmarks.inference_sizes import SIZES, Size
from benchmarks.inference_variants import OWNER, PACKED, VARIANTS, Setting, Variant, build
from dydit_scale.dynamic.packing import REST
from dydit_scale.models.part_store import free_memory
from dydit_scale.models.quiet import quiet_libraries
from dydit_scale.sampling.speed import machine

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: those that the device can bear")
    parser.add_argument("--batch", nargs="+", type=int, help="pictures at a time; CPU: 1, GPU: up to 64")
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
    parser.add_argument("--name", help="the last part of the result's name, beside others of the same device and dtype")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="also one profiled run of each variant: a table "
                        "of its operations, and a trace for chrome://tracing")  # fmt: skip
    parser.add_argument("--plot", nargs="*", type=Path, metavar="FILE", help="measure nothing; make the page of these")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page that --plot makes")
    args = parser.parse_args()
    if args.plot is not None:
        write_page([summarised(json.loads(file.read_text())) for file in args.plot], args.docs)
        return
    for name, value in (ON_GPU if args.device == "cuda" else ON_CPU).items():
        setattr(args, name, getattr(args, name) or value)
    try:
        check(args)
        comparisons = planned(args)
    except ValueError as error:
        parser.error(str(error))
    quiet_libraries()
    gc.freeze()  # what is imported need not be searched for garbage before every run
    try:
        measure_all(comparisons, args)
    finally:
        gc.unfreeze()


def measure_all(comparisons: list[Comparison], args: argparse.Namespace) -> None:
    """Measure them; the file is written after each."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    settings = {k: v for k, v in vars(args).items() if k not in ("plot", "docs", "out", "profile", "masks")}
    settings["masks"] = None if args.masks is None else args.masks.resolve().name
    found: dict[str, Any] = {**machine(device), "device": device.type, "dtype": args.dtype, "settings": settings}
    found |= {"flops_checks": {}, "rows": [], "skipped": []}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"inference-{device.type}-{args.dtype}{'' if args.name is None else f'-{args.name}'}.json"
    for name, own in groupby(comparisons, key=lambda comparison: comparison.size.name):
        first, *others = own
        found["flops_checks"][name] = flops_check(first.size, device, dtype)
        static = first.size.make_static(device, dtype)
        for comparison in (first, *others):
            wanted = names(args, few=comparison.few)
            setting = comparison.setting(static, _budget(wanted, device))
            rows, skipped = compare(setting, wanted, args.repetitions, device, args.profile)
            del setting
            _free(device)
            where = comparison.described()
            found["rows"] += [{**where, **row} for row in rows]
            found["skipped"] += [{**where, **row} for row in skipped]
            found["process_peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            file.write_text(json.dumps(found, indent=1) + "\n")
        del static
        _free(device)
    print(f"results: {file}")


def compare(
    setting: Setting, wanted: list[str], repetitions: int, device: torch.device, profile: Path | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the variants, run in turn, and those that could not run."""
    title = f"{setting.size.name}, {len(setting.inputs[0]['hidden_states'])} samples"
    variants, rows, skipped = [], [], []
    for name in tqdm(wanted, desc=f"{title}: setting up", unit="variant", dynamic_ncols=True):
        try:
            variant, row = first_run(name, setting, device)
        except (Skipped, torch.OutOfMemoryError) as error:
            reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
            _leave_out(name, reason, skipped, title)
            _free(device)
            if name in ("static", "open"):
                return [], skipped
            continue
        variants.append(variant)
        rows.append(row)
    with tqdm(total=repetitions * len(variants), desc=f"{title}: timing", unit="run", dynamic_ncols=True) as bar:
        for picture in range(1, repetitions + 1):
            inputs = setting.draw(picture)
            for variant, row in zip(variants, rows, strict=True):
                with variant.ready():
                    row["seconds"].append(timed(lambda v=variant, x=inputs: v.run(x), device))
                bar.update()
            for variant, row in zip(variants, rows, strict=True):
                row["macs_each"].append(variant.macs if variant.macs_of is None else variant.macs_of(inputs))
    variants, rows = _as_named(variants, rows, skipped, title)
    for variant in variants if profile is not None else ():
        write_profile(profile / f"{setting.size.name}-{variant.name}", variant, setting, device)
    for variant, row in zip(variants, rows, strict=True):
        row["macs"] = statistics.mean(row["macs_each"])
        if variant.execution is not None:
            row |= {"recompilations": variant.execution.recompilations}
            row |= {"warmup_seconds": variant.execution.warmup_seconds}
    setting.stack.close()
    torch._dynamo.reset()  # codes of one comparison count towards the next one's limit
    for row in summarise(rows):
        tqdm.write(line(title, row))
    return rows, skipped


def first_run(name: str, setting: Setting, device: torch.device) -> tuple[Variant, dict[str, Any]]:
    """The variant, set up and run once, and its row so far."""
    held = _allocated(device)
    began = time.perf_counter()
    variant = build(name, setting)
    copies = variant.packed.bytes
    row = {"variant": name, "beside": variant.beside, "macs_from": variant.macs_from,
           "blocks_computed": variant.blocks_computed, "plan_bytes": copies,
           "stored": variant.packed.stored, "setup_seconds": time.perf_counter() - began}  # fmt: skip
    with variant.ready():
        before = _allocated(device)
        _reset_peak(device)
        row["first_seconds"] = timed(lambda: _finite(variant, setting), device)
        variant.check_name()
    weights = sum(p.numel() * p.element_size() for p in setting.static.parameters())
    if device.type == "cuda":
        own = max(before - held, copies)  # a variant with a cache shares its plan
        row["peak_bytes"] = weights + own + torch.cuda.max_memory_allocated() - before
    else:
        row["peak_bytes"] = weights + copies + cpu_run_bytes(variant, setting)
    return variant, {**row, "seconds": [], "macs_each": []}


def cpu_run_bytes(variant: Variant, setting: Setting) -> int:
    """What torch's allocator holds at most during a run, beyond what it held before; scratch memory of oneDNN is not
    among it."""
    with variant.ready(), torch.profiler.profile(profile_memory=True) as found:
        variant.run(setting.inputs)
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(0, *accumulate(changes))


def _as_named(
    variants: list[Variant], rows: list[dict[str, Any]], skipped: list[dict[str, Any]], title: str
) -> tuple[list[Variant], list[dict[str, Any]]]:
    """Those that ran as they are called; the others are ``skipped``."""
    kept = []
    for variant, row in zip(variants, rows, strict=True):
        try:
            variant.check_name()
        except Skipped as error:
            _leave_out(variant.name, str(error), skipped, title)
        else:
            kept.append((variant, row))
    named = {variant.name for variant, _ in kept}
    for variant, _ in kept:
        if variant.beside not in named:
            _leave_out(variant.name, f"so is what it is compared with, {VARIANTS[variant.beside]}", skipped, title)
    kept = [(variant, row) for variant, row in kept if variant.beside in named]
    return [variant for variant, _ in kept], [row for _, row in kept]


def _leave_out(name: str, reason: str, skipped: list[dict[str, Any]], title: str) -> None:
    skipped.append({"variant": name, "reason": reason})
    tqdm.write(f"{title}: {VARIANTS[name]} is left out: {reason}")


def _finite(variant: Variant, setting: Setting) -> None:
    assert bool(variant.run(setting.inputs).isfinite().all()), f"{variant.name}: the sample is not finite"


def summarised(result: dict[str, Any]) -> dict[str, Any]:
    """A result of any date with its rows summed up as today."""
    for _, rows in comparisons_of(result["rows"]):
        summarise(rows)
    return result


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one comparison with what they come to."""
    by_name = {row["variant"]: row for row in rows}
    for row in rows:
        row |= summary(row, by_name)
    return rows


def summary(row: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ideal and realised, each as a speed-up over the variant beside it, and over ours with open gates."""
    beside, open_row = by_name[row["beside"]], by_name["open"]
    ideals, realised = (
        [a / b for a, b in zip(beside[kind], row[kind], strict=True)] for kind in ("macs_each", "seconds")
    )
    over_open = statistics.median(a / b for a, b in zip(open_row["seconds"], row["seconds"], strict=True))
    return {
        "cost_ratio": row["macs"] / by_name["static"]["macs"],
        "ideal": statistics.median(ideals),
        "realised": statistics.median(realised),
        "realised_iqr": _quartiles(realised),
        "share": statistics.median(a / b for a, b in zip(realised, ideals, strict=True)),
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
    size, sigmas = size.cut(layers=2 if size.family in ("flux", "latte") else 1), size.sigmas(1, of=size.steps)
    units = size.config["num_attention_heads"]
    shares = drawn_shares(size.cost(), 0.6, sigmas, units=units, token_keep=size.token_keep)
    shallow = Comparison(size=size, batch=1, few=False, target=0.6, sigmas=sigmas, shares=shares, ratio=0.6)
    setting = shallow.setting(size.make_static(device, dtype))
    variant = build("both", setting)
    counted = counted_macs(lambda: variant.run(setting.inputs)) / len(setting.inputs[0]["hidden_states"])
    agreement = counted / variant.macs
    filled = REST * sum(block.groups_tokens for block in setting.cost.blocks) / size.tokens / variant.macs
    assert 0.99 < agreement < 1.01 + filled, f"{size.name}: torch counts {agreement:.4f} of the cost model's MACs"
    return agreement


def write_profile(path: Path, variant: Variant, setting: Setting, device: torch.device) -> None:
    """``path.txt``, the operations by their time, and ``path.json``, the trace of one run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found, variant.ready():
        variant.run(setting.inputs)
    order = f"self_{device.type}_time_total"
    path.with_suffix(".txt").write_text(found.key_averages().table(sort_by=order, row_limit=40))
    found.export_chrome_trace(str(path.with_suffix(".json")))


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds, all kernels finished before and after, and no garbage collected meanwhile."""
    gc.collect()
    gc.disable()
    try:
        _synchronize(device)
        began = time.perf_counter()
        run()
        _synchronize(device)
        return time.perf_counter() - began
    finally:
        gc.enable()


def _quartiles(values: list[float]) -> list[float]:
    if len(values) == 1:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _budget(wanted: list[str], device: torch.device) -> int:
    """What the packed copies of a variant may take: its part of most of the free memory. All get the same, and none
    fewer because of those before it."""
    packed = len({OWNER.get(name, name) for name in wanted} & set(PACKED))
    return int(0.7 * free_memory(device)) // max(1, packed)


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
