"""The MLP of the chosen tokens: the dense MLP beside gather, MLP and scatter, as separate operations and as
``mlp_on_rows``.

    python benchmarks/fused_tokens.py                       # DiT-XL and FLUX.1 widths, on the GPU if there is one
    python benchmarks/fused_tokens.py --sizes small         # a trial on any machine

The ways run in turn; a way's time is the median. ``share`` is what a way realises of the ideal speed-up over the dense
MLP, tokens / chosen tokens. The tokens come normalised; each way modulates them and adds the gated result to the
residual. The first call (tuning and compilation) is timed apart. ``fused`` says whether mlp_on_rows ran as Triton
kernels. Writes benchmarks/results/fused_tokens-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dydit_scale.dynamic import fused_tokens
from dydit_scale.dynamic.fused_tokens import fixed_rows, mlp_on_rows
from dydit_scale.sampling.speed import machine

SIZES: dict[str, dict[str, int]] = {
    "small": {"batch": 2, "tokens": 64, "dim": 64, "hidden": 256},
    "DiT-XL, batch 8": {"batch": 16, "tokens": 256, "dim": 1152, "hidden": 4608},
    "DiT-XL, batch 64": {"batch": 128, "tokens": 256, "dim": 1152, "hidden": 4608},
    "FLUX.1, 1024 px": {"batch": 1, "tokens": 4096, "dim": 3072, "hidden": 12288},
    "FLUX.1, 512 px": {"batch": 1, "tokens": 1024, "dim": 3072, "hidden": 12288},
}
"""With guidance the batch is twice that of pictures."""
KEEPS, WIDTHS = (0.3, 0.5, 0.8), (0.5, 1.0)
"""Shares of tokens and of hidden channels that work."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[name for name in SIZES if name != "small"])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30, help="runs of each way")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in args.sizes:
        for width in WIDTHS:
            for keep in KEEPS:
                row = measure(name, width, keep, device, getattr(torch, args.dtype), args.rounds)
                rows.append(row)
                print(line(row), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out / f"fused_tokens-{_device_name(device)}.json"
    result = {**machine(device), "dtype": args.dtype, "rounds": args.rounds, "rows": rows}
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"results: {out}")


@torch.no_grad()
def measure(
    size: str, width: float, keep: float, device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """One row of the results: seconds of each way, and the shares of the ideal."""
    batch, tokens, dim, hidden = SIZES[size].values()
    hidden = round(hidden * width)
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype)

    x, residual, gate, shift, scale = normal(batch, tokens, dim), normal(batch, tokens, dim), *normal(3, batch, dim)
    weights = (normal(hidden, dim) / dim**0.5, normal(hidden), normal(dim, hidden) / hidden**0.5, normal(dim))
    rows = fixed_rows(torch.rand(batch, tokens, generator=draw).to(device), round(keep * tokens))

    def dense() -> Tensor:
        y = F.gelu(F.linear(x * (1 + scale[:, None]) + shift[:, None], *weights[:2]), approximate="tanh")
        return residual.add_(gate[:, None] * F.linear(y, *weights[2:]))

    def separate() -> Tensor:
        part = (x * (1 + scale[:, None]) + shift[:, None]).flatten(0, 1)[rows]
        part = F.linear(F.gelu(F.linear(part, *weights[:2]), approximate="tanh"), *weights[2:])
        return residual.flatten(0, 1).index_add_(0, rows, part * gate[rows // tokens]).view_as(residual)

    def modulated_before() -> Tensor:
        modulated = x * (1 + scale[:, None]) + shift[:, None]
        return mlp_on_rows(modulated, rows, *weights, gate, activation="gelu-approximate", residual=residual)

    ways: dict[str, Callable[[], Tensor]] = {
        "dense": dense,
        "separate": separate,
        "mlp_on_rows": lambda: mlp_on_rows(
            x, rows, *weights, gate, activation="gelu-approximate", residual=residual, shift=shift, scale=scale
        ),
        "modulated before": modulated_before,
    }
    first = {way: _seconds(run, device) for way, run in ways.items()}
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in tqdm(range(rounds), desc=f"{size}, width {width}, tokens {keep}", unit="round", leave=False):
        residual.copy_(x)  # what is added to again and again must stay finite
        for way, run in ways.items():
            found[way].append(_seconds(run, device))
    ideal = batch * tokens / len(rows)
    medians = {way: statistics.median(seconds) for way, seconds in found.items()}
    return {
        "size": size, **SIZES[size], "width": width, "tokens_kept": keep, "hidden_kept": hidden, "rows": len(rows),
        "fused": fused_tokens._is_fused(x, weights[0], weights[2]),
        "ideal": ideal, "seconds": medians, "seconds_first": first,
        "quartiles": {way: statistics.quantiles(seconds, n=4)[::2] for way, seconds in found.items()},
        "share": {way: medians["dense"] / seconds / ideal for way, seconds in medians.items() if way != "dense"},
    }  # fmt: skip


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return name.lower().replace(" ", "-").replace("/", "-")


def line(row: dict[str, Any]) -> str:
    """For the terminal."""
    times = "  ".join(f"{way} {1e3 * seconds:.3f} ms" for way, seconds in row["seconds"].items())
    shares = ", ".join(f"{way} {share:.0%}" for way, share in row["share"].items())
    return f"{row['size']:18}width {row['width']:.1f}  tokens {row['tokens_kept']:.1f}  {times}  of the ideal: {shares}"


if __name__ == "__main__":
    main()
