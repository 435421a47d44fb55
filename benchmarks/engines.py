"""Step time and peak memory of every engine on two ranks, for all weights of a FLUX and for TD-LoRA on it.

    python benchmarks/engines.py                 # about 100 M parameters; ten minutes on two CPU cores
    python benchmarks/engines.py --quick OUT     # a tiny one, to see that it runs; writes to the folder OUT

Each engine runs in processes of its own, started by torchrun. Writes benchmarks/results/engines-DEVICE.json and
docs/engines.md. Two ranks on one CPU share its cores, so times compare engines with each other, not with one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from tqdm import tqdm

from dydit_scale.adapters.td_lora import TDLoraConfig, add_td_lora, is_dynamic_name
from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.models.encoders import image_ids
from dydit_scale.models.flux import DyFluxTransformer2DModel
from dydit_scale.models.quiet import quiet_libraries
from dydit_scale.parallel.engine import EngineConfig, ParamGroup, make_engine
from dydit_scale.parallel.world import World, close, init_world
from dydit_scale.parallel.zero import load_deepspeed
from dydit_scale.sampling.speed import machine
from dydit_scale.train.build import shard_units
from dydit_scale.train.recompute import checkpoint_function

ROOT = Path(__file__).parents[1]
ENGINES: dict[str, dict[str, Any]] = {
    "single": {"name": "single"},
    "ddp": {"name": "ddp"},
    "ZeRO-1": {"name": "zero", "zero_stage": 1},
    "ZeRO-2": {"name": "zero", "zero_stage": 2},
    "ZeRO-3": {"name": "zero", "zero_stage": 3},
    "FSDP2": {"name": "fsdp"},
    "FSDP2, blocks kept": {"name": "fsdp", "reshard": False},
}
LEARN = ("all weights", "TD-LoRA")
BUCKETS = {
    "reduce_bucket_size": 5_000_000,
    "allgather_bucket_size": 5_000_000,
    "stage3_prefetch_bucket_size": 5_000_000,
    "stage3_max_live_parameters": 10_000_000,
    "stage3_max_reuse_distance": 10_000_000,
}
"""For a model of this size; the usual numbers, made for billions of parameters, would keep all of it gathered."""
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""glibc would hold on to freed memory, which is then counted as used."""
ROWS, SIDE, TEXT, STEPS = 2, 8, 16, 3
"""Samples per rank and step, latent side, text tokens, measured steps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", type=Path, metavar="OUT", help="a tiny model; results go to this folder")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        engine, learn, out = args.worker
        measure(engine, learn, Path(out), quick=bool(args.quick))
        return
    rows = []
    for learn in LEARN:
        for engine in tqdm(ENGINES, desc=learn):
            rows.append({"engine": engine, "learn": learn, **launch(engine, learn, args.quick)})
    found = {"rows": rows, "samples_per_rank": ROWS, "image_tokens": SIDE**2, "text_tokens": TEXT, **machine()}
    results, docs = (args.quick, args.quick) if args.quick else (ROOT / "benchmarks" / "results", ROOT / "docs")
    results.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (results / f"engines-{device}.json").write_text(json.dumps(found, indent=1) + "\n")
    (docs / "engines.md").write_text(page(found))


def launch(engine: str, learn: str, quick: Path | None) -> dict[str, Any]:
    """What the first rank measured."""
    ranks = 1 if engine == "single" or torch.cuda.device_count() == 1 else 2
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", str(ranks)]
        command += [__file__, *(["--quick", str(quick)] if quick else []), "--worker", engine, learn, folder]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **GIVE_BACK}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{engine}, {learn}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        ranks_found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    largest = max(found["peak_bytes"] for found in ranks_found)
    return {**ranks_found[0], "ranks": ranks, "peak_bytes": largest}


def measure(engine_name: str, learn: str, out: Path, *, quick: bool) -> None:
    """Train a few steps as one rank; seconds are the median, bytes what this process holds at most."""
    quiet_libraries()
    world = init_world()
    if ENGINES[engine_name]["name"] == "zero":
        load_deepspeed(world)  # its libraries are not what is measured
    before = resident(world)
    network = make_network(learn, quick=quick)
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    groups = [ParamGroup(name="all", params=trainable, lr=1e-4)]
    blocks = shard_units(network)
    network.enable_gradient_checkpointing(checkpoint_function(network, blocks, "full"))
    config = EngineConfig(**ENGINES[engine_name])
    if config.name == "zero":
        file = out / f"deepspeed-{world.rank}"
        file.write_text(json.dumps({"zero_optimization": BUCKETS}))
        config = replace(config, deepspeed=str(file))
    engine = make_engine(config, network, groups, world, shard_units=blocks)
    seconds = []
    for step in range(STEPS + 1):
        inputs = batch(network, step, world)
        began = time.perf_counter()
        engine.backward(engine.module(gates="open", collect=True, **inputs).sample.square().mean(), last=True)
        assert engine.step(1.0).applied
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        if step == 0:  # the moments are there, and what sharding needed for a while is gone
            reset_peak(world)
    found = {
        "seconds": sorted(seconds[1:])[STEPS // 2],
        "peak_bytes": peak(world) - before,
        "parameters": engine.parameters,
        "trainable": sum(shape.numel() for shape in engine.shapes.values()),
    }
    (out / f"{world.rank}.json").write_text(json.dumps(found))
    close(world)


def make_network(learn: str, *, quick: bool) -> DyFluxTransformer2DModel:
    """A dynamic FLUX with random weights, and what ``learn`` says of it trainable."""
    torch.manual_seed(0)
    static = FluxTransformer2DModel(
        patch_size=1, in_channels=64, joint_attention_dim=512, pooled_projection_dim=256,
        num_attention_heads=8, attention_head_dim=8 if quick else 64,
        axes_dims_rope=(4, 2, 2) if quick else (16, 24, 24),
        num_layers=1 if quick else 6, num_single_layers=1 if quick else 12,
    )  # fmt: skip
    network: Any = DyFluxTransformer2DModel.from_static(static, DynamicConfig())
    if learn == "TD-LoRA":
        network.requires_grad_(False)
        targets = r".*transformer_blocks\.\d+\..*(to_q|to_k|to_v|net\.0\.proj|net\.2|proj_mlp|proj_out)"
        add_td_lora(network, TDLoraConfig(target_modules=targets, rank=16, alpha=16, experts=4))
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or is_dynamic_name(name))
    return network


def batch(network: Any, step: int, world: World) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + world.rank)
    config = network.config
    made = {
        "hidden_states": torch.randn(ROWS, SIDE**2, config["in_channels"], generator=generator),
        "encoder_hidden_states": torch.randn(ROWS, TEXT, config["joint_attention_dim"], generator=generator),
        "pooled_projections": torch.randn(ROWS, config["pooled_projection_dim"], generator=generator),
        "timestep": torch.rand(ROWS, generator=generator),
        "img_ids": image_ids(SIDE, SIDE),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return {name: tensor.to(world.device) for name, tensor in made.items()}


def resident(world: World) -> int:
    """Bytes now: on CUDA those of tensors, on the CPU those of this process."""
    return torch.cuda.memory_allocated() if world.device.type == "cuda" else _status("VmRSS")


def peak(world: World) -> int:
    """The most bytes since ``reset_peak``."""
    return torch.cuda.max_memory_allocated() if world.device.type == "cuda" else _status("VmHWM")


def reset_peak(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again at what is resident


def _status(key: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) * 1024


def page(found: dict[str, Any]) -> str:
    """A table as Markdown."""
    parts = []
    for learn in LEARN:
        rows = [row for row in found["rows"] if row["learn"] == learn]
        base = next(row for row in rows if row["engine"] == "ddp")
        parts += [
            f"## {learn}: {rows[0]['trainable'] / 1e6:.1f} M of {rows[0]['parameters'] / 1e6:.1f} M parameters learn\n",
            "| engine | ranks | seconds per step | against ddp | peak memory per rank, GiB | against ddp |",
            "|---|---|---|---|---|---|",
        ]
        parts += [
            f"| {row['engine']} | {row['ranks']} | {row['seconds']:.2f} | {row['seconds'] / base['seconds']:.2f} "
            f"| {row['peak_bytes'] / 2**30:.2f} | {row['peak_bytes'] / base['peak_bytes']:.2f} |"
            for row in rows
        ]
        parts.append("")
    return f"""# Engines side by side

A dynamic FLUX with random weights, fp32, blocks recomputed in the backward; {found["samples_per_rank"]} samples per
rank and step, {found["image_tokens"]} image and {found["text_tokens"]} text tokens. Memory is what a rank holds at most
during a step, beyond the loaded libraries; DeepSpeed's buckets are small, to suit the model. Ranks on one CPU share its
cores and its memory bandwidth, so the times say what an engine adds, not what a second machine would bring.

{chr(10).join(parts)}
{found["machine"]}, torch {found["versions"]["torch"]}, {found["date"]}; `python benchmarks/engines.py` makes this page.
"""


if __name__ == "__main__":
    main()
