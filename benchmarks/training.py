"""A training step of dynamic models beside the static one: with masks, with a second target, with frozen routers.

    python -m benchmarks.training                                            # DiT-B, fp32, on what is there
    python -m benchmarks.training --models dit-xl flux-lite --layers 4 --precision bf16 --batch 2
    python -m benchmarks.training --models flux-dev --batch 1 --layers 12
    python -m benchmarks.training --models flux-lite --batch 1 --layers 3 --side 16 --text 32       # on a CPU

Random weights, all of which learn; a step is forward, loss and backward, and draws the noise of its gates. The
optimiser's update, the same for all, is left out. Masks of the frozen step are drawn at each of the ratios: in every
layer another set of heads and channels, scattered, and token routers that keep about a share. The kinds of step take
turns, forwards and backwards, without the garbage collector; what is told is the median over the rounds of a step's
time by that of the static step of the same round. Writes benchmarks/results/training-DEVICE-PRECISION.json and
docs/training-DEVICE-PRECISION.svg.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.inference_masks import equal_keep, shifted
from benchmarks.inference_sizes import SIZES, Size
from dydit_scale.dynamic.cost import ModelCost
from dydit_scale.dynamic.losses import cost_loss
from dydit_scale.dynamic.masks import FrozenGates, SharedUnits, SubNetwork
from dydit_scale.models.quiet import quiet_libraries
from dydit_scale.sampling.speed import machine
from dydit_scale.train.objective import draw_gate_noise

ROOT = Path(__file__).parents[1]
RATIOS = (0.7, 0.5, 0.3)
STATIC, DYNAMIC, TEACHER, COMPLETE = "static", "dynamic", "dynamic + teacher", "dynamic + complete"


@dataclass(frozen=True)
class Subject:
    """A model in its static and its dynamic form, a batch for them, and what a forward costs."""

    static: Any
    """diffusers' class."""
    dynamic: Any
    """Ours, on the same weights."""
    inputs: dict[str, Any]
    tokens: int
    """Of the picture."""
    cost: ModelCost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["dit-b"])
    parser.add_argument("--layers", type=int, help="blocks to keep of each model; all by default")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: under autocast")
    parser.add_argument("--batch", type=int, default=8, help="samples of a micro-batch")
    parser.add_argument("--side", type=int, help="image tokens along a side (default: the size's own; FLUX 64)")
    parser.add_argument("--text", type=int, help="text tokens of FLUX (default: 512)")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write both files here instead")
    args = parser.parse_args()
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {k: v for k, v in vars(args).items() if k not in ("models", "out")}
    name = f"training-{device.type}-{args.precision}"
    results, docs = (args.out, args.out) if args.out else (ROOT / "benchmarks" / "results", ROOT / "docs")
    results.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for model in args.models:  # each is kept, whatever becomes of the next
        rows += measure(model, args, device)
        (results / f"{name}.json").write_text(json.dumps({**machine(), **settings, "rows": rows}, indent=1) + "\n")
        plot(rows, docs / f"{name}.svg")
    print(f"results: {results / name}.json, {docs / name}.svg")


def measure(name: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Rows of one model: its kinds of step, timed in turn."""
    size = SIZES[name].cut(args.layers, args.side, args.text)
    size = replace(size, branches=1)  # guidance is for sampling
    subject = make(size, args, device)
    kinds: dict[str, Callable[[], Tensor]] = {
        STATIC: lambda: loss_of(answer(subject.static, subject)),
        DYNAMIC: lambda: dynamic_loss(subject)[1],
        TEACHER: lambda: with_teacher(subject),
        COMPLETE: lambda: dynamic_loss(subject)[1] + loss_of(answer(subject.dynamic, subject)),
    }
    ratios = {}
    with autocast(args.precision, device):
        for target in RATIOS:
            keep = equal_keep(subject.cost, target)
            gates = FrozenGates(draw_network(subject.dynamic, keep))
            biases = calibrate_tokens(subject, gates, keep)
            set_token_biases(subject.dynamic, biases)
            kind = f"frozen routers, {target}"
            ratios[kind] = float(subject.cost.ratio(masks_of(subject, gates)).mean())
            kinds[kind] = lambda gates=gates, biases=biases: frozen_loss(subject, gates, biases)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    memory: dict[str, dict[str, int]] = {}
    for n in tqdm(range(args.repetitions + 1), desc=name, unit="round"):
        for kind, loss in list(kinds.items())[:: 1 if n % 2 else -1]:
            network = subject.static if kind == STATIC else subject.dynamic
            if n == 0:  # warms up
                memory[kind] = memory_of(network, loss, args.precision, device)
            else:
                seconds[kind].append(seconds_of(loss, args.precision, device))
            network.zero_grad(set_to_none=True)
    return [
        row(name, kind, times, seconds[STATIC], ratios.get(kind), {"tokens": size.tokens, **memory[kind]})
        for kind, times in seconds.items()
    ]


def seconds_of(loss: Callable[[], Tensor], precision: str, device: torch.device) -> float:
    gc.collect()
    gc.disable()
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    with autocast(precision, device):
        value = loss()
    value.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    taken = time.perf_counter() - began
    gc.enable()
    return taken


def memory_of(network: nn.Module, loss: Callable[[], Tensor], precision: str, device: torch.device) -> dict[str, int]:
    """Bytes of activations; on CUDA also the most that a step takes beyond what was there."""
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with saved_bytes(network) as saved, autocast(precision, device):
        value = loss()
    value.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    peak = {"peak_bytes": torch.cuda.max_memory_allocated() - before} if device.type == "cuda" else {}
    return {"saved_bytes": saved(), **peak}


def row(
    name: str, kind: str, times: list[float], static: list[float], ratio: float | None, of_model: dict[str, int]
) -> dict[str, Any]:
    """One line of results, which is printed too; quartiles are of ``against_static``, and ``ideal`` and ``share`` of
    steps that do less."""
    pairs = [own / other for own, other in zip(times, static, strict=True)]
    against, (low, _, high) = statistics.median(pairs), statistics.quantiles(pairs, n=4)
    seconds = statistics.median(times)
    found: dict[str, Any] = {
        "model": name, "step": kind, "seconds": seconds, "against_static": against, "quartiles": [low, high], **of_model
    }  # fmt: skip
    text = f"{name:10}{kind:22}{seconds:9.4f} s  {against:5.3f}x the static step ({low:.3f} to {high:.3f})"
    if ratio is not None:
        found |= {"ratio": ratio, "ideal": 1 / ratio, "realised": 1 / against, "share": ratio / against}
        text += f"  ideal {1 / ratio:.2f}x  realised {1 / against:.2f}x  share of ideal {found['share']:.0%}"
    sizes = {key: size for key, size in of_model.items() if key.endswith("bytes")}
    print(text + "".join(f"  {key} {size / 2**20:.0f} MiB" for key, size in sizes.items()), flush=True)
    return found


def make(size: Size, args: argparse.Namespace, device: torch.device) -> Subject:
    """The model with random weights, which both forms share, and a random batch, one noise level per sample."""
    torch.manual_seed(0)
    static = size.make_static(device, torch.float32).requires_grad_(True).train()
    dynamic = size.make_dynamic(static).requires_grad_(True).train()
    levels = size.inputs(args.batch, 0.01 + 0.98 * torch.rand(args.batch), device, torch.float32)
    rows = {key: [level[key] for level in levels] for key in levels[0]}
    moving = ("hidden_states", "timestep")  # the others are the same at each level
    inputs = {k: torch.stack([x[n] for n, x in enumerate(v)]) if k in moving else v[0] for k, v in rows.items()}
    return Subject(static, dynamic, inputs, size.tokens, size.cost(dynamic))


def answer(network: nn.Module, subject: Subject) -> Tensor:
    """The complete model's."""
    gates = {} if network is subject.static else {"gates": "open"}
    return network(**subject.inputs, **gates, return_dict=False)[0]


def loss_of(sample: Tensor) -> Tensor:
    return sample.float().square().mean()


def dynamic_loss(subject: Subject) -> tuple[Tensor, Tensor]:
    """(sample, loss) as in ordinary training, the cost included."""
    device = subject.inputs["hidden_states"].device
    positions = torch.arange(len(subject.inputs["hidden_states"]))
    noise = draw_gate_noise(subject.dynamic, 0, positions, subject.tokens, device)
    out = subject.dynamic(**subject.inputs, gates=noise, collect=True)
    return out.sample, loss_of(out.sample) + 2 * cost_loss(subject.cost.ratio(out.masks).mean(), 0.5)


def with_teacher(subject: Subject) -> Tensor:
    sample, loss = dynamic_loss(subject)
    with torch.no_grad():
        taught = answer(subject.static, subject)
    return loss + loss_of(sample.float() - taught.float())


def frozen_loss(subject: Subject, gates: FrozenGates, biases: list[Tensor]) -> Tensor:
    """As in the frozen phase; the token routers are those of ``biases``."""
    set_token_biases(subject.dynamic, biases)
    out = subject.dynamic(**subject.inputs, gates=gates, collect=True)
    with torch.no_grad():
        subject.cost.ratio(out.masks)  # which is logged
    return loss_of(out.sample)


def draw_network(dynamic: Any, share: float) -> SubNetwork:
    """Another set of units in every layer; the first one always works."""
    heads = dynamic.config["num_attention_heads"]
    generator = torch.Generator().manual_seed(1)

    def units(count: int) -> Tensor:
        order = torch.randperm(count - 1, generator=generator) + 1
        on = torch.zeros(count, dtype=torch.bool)
        on[0] = on[order[: max(0, round(share * count) - 1)]] = True
        return on

    count = dynamic.dynamic.mlp_groups or heads
    return SubNetwork(tuple(SharedUnits(units(heads), units(count)) for _ in dynamic.dynamic_blocks()))


def calibrate_tokens(subject: Subject, gates: FrozenGates, share: float) -> list[Tensor]:
    """The routers' last biases at which each block keeps about a share of the tokens, in this sub-network."""
    routers = [block.dy_token for block in subject.dynamic.dynamic_blocks()]
    with shifted(routers, [share] * len(routers)) as shifts:
        masks_of(subject, gates)
    return [router.up.bias.detach() + shift for router, shift in zip(routers, shifts, strict=True)]


def set_token_biases(dynamic: Any, biases: list[Tensor]) -> None:
    for block, bias in zip(dynamic.dynamic_blocks(), biases, strict=True):
        block.dy_token.up.bias.data.copy_(bias)


@torch.no_grad()
def masks_of(subject: Subject, gates: FrozenGates) -> Any:
    return subject.dynamic(**subject.inputs, gates=gates, collect=True).masks


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, torch.bfloat16)


@contextmanager
def saved_bytes(network: nn.Module) -> Iterator[Callable[[], int]]:
    """What a forward inside the ``with`` keeps for its backward, beyond the weights."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(sizes.values())


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars against the static step, and where a step at the ideal would end."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    kinds = [kind for kind in dict.fromkeys(row["step"] for row in rows) if kind != STATIC]
    colours = ["#0072b2", "#009e73", "#e69f00", "#8a939b", "#56b4e9", "#d55e00"]
    figure, axes = plt.subplots(figsize=(7.5, 0.6 + 1.5 * len(models)), layout="constrained")
    height = 0.8 / len(kinds)
    for n, kind in enumerate(kinds):
        found = [next(row for row in rows if (row["model"], row["step"]) == (model, kind)) for model in models]
        places = [m + (n - (len(kinds) - 1) / 2) * height for m in range(len(models))]
        lengths = [row["against_static"] for row in found]
        spread = [[abs(row["quartiles"][i] - row["against_static"]) for row in found] for i in (0, 1)]
        axes.barh(places, lengths, height * 0.9, color=colours[n], label=kind, xerr=spread, error_kw={"linewidth": 0.8})
        for place, row in zip(places, found, strict=True):
            if "ratio" in row:
                axes.plot([row["ratio"]] * 2, [place - height / 2, place + height / 2], "k-", linewidth=1.6)
    axes.plot([], [], "k-", linewidth=1.6, label="at the ideal")
    axes.axvline(1, color="0.4", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.set_xlabel("forward and backward, in static steps")
    axes.grid(axis="x", alpha=0.25)
    figure.legend(loc="outside upper center", fontsize=8, frameon=False, ncols=4)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
