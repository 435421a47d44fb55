"""A complete run folder with made-up numbers and pictures, for the tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

MODELS = ("base", "control", "dynamic")
SHAPES = ("circle", "square", "triangle", "ring")
COLOURS = {
    "red": (214, 69, 65),
    "green": (64, 160, 92),
    "blue": (52, 110, 190),
    "yellow": (236, 196, 60),
    "white": (238, 238, 232),
    "purple": (130, 84, 160),
}
GROUNDS = ((38, 42, 50), (226, 222, 210), (120, 150, 140), (90, 74, 66))
OVERALL = {"base": 0.609, "control": 0.648, "dynamic": 0.629}


def draw_scene(rng: np.random.Generator, shape: str, colour: str, size: int = 32) -> np.ndarray:
    """uint8 [size, size, 3] with one shape."""
    y, x = np.mgrid[:size, :size] / size
    cx, cy, radius = rng.uniform(0.35, 0.65), rng.uniform(0.35, 0.65), rng.uniform(0.18, 0.28)
    distance = np.hypot(x - cx, y - cy)
    inside = {
        "circle": distance < radius,
        "square": np.maximum(abs(x - cx), abs(y - cy)) < radius * 0.88,
        "triangle": (y - cy < radius * 0.7) & (y - cy > 1.9 * abs(x - cx) - radius),
        "ring": abs(distance - radius * 0.8) < radius * 0.28,
    }[shape]
    ground = np.array(GROUNDS[rng.integers(len(GROUNDS))], float)
    scene = np.where(inside[..., None], np.array(COLOURS[colour], float), ground) + rng.normal(0, 5, (size, size, 3))
    return scene.clip(0, 255).astype(np.uint8)


def write_metrics(path: Path, rng: np.random.Generator, steps: int = 2500, every: int = 5) -> None:
    lines = []
    for step in range(every, steps + 1, every):
        target = 1 - 0.5 * min(1.0, max(0.0, (step - 100) / 900))
        ratio = target + 0.05 * math.exp(-(((step - 900) / 700) ** 2)) + 0.012 + rng.normal(0, 0.008)
        flow = 0.055 + 0.02 * math.exp(-(((step - 1000) / 420) ** 2)) - 0.004 * step / steps
        supervision = 0.009 + 0.02 * math.exp(-(((step - 1050) / 500) ** 2))
        line = {
            "step": step,
            "loss": flow * 1.3,
            "loss_flow": flow * rng.lognormal(0, 0.16),
            "loss_supervision": supervision * rng.lognormal(0, 0.25),
            "loss_cost": 2 * (ratio - target) ** 2,
            "ratio": ratio,
            "target": target,
            "lr": 5e-4,
            "grad_norm": 0.4,
            "samples_per_second": 151.2,
            "seconds": 0.42,
        }
        lines.append(json.dumps(line))
        if step % 250 == 0:
            evaluated = {
                "step": step,
                "ratio_eval": 0.5163 if step == steps else ratio + 0.015,
                "mse_eval": flow * 1.05,
            }
            lines.append(json.dumps(evaluated))
    path.write_text("\n".join(lines) + "\n")


def write_scores(path: Path) -> None:
    names = ("single_object", "two_object", "counting", "colors", "position", "attribute_binding")
    shifts = (0.33, 0.02, -0.14, 0.21, -0.24, -0.1)
    models = {
        name: {
            "overall": share,
            "categories": {key: round(share + shift, 3) for key, shift in zip(names, shifts, strict=True)},
            "frechet": round(14 - 10 * share, 2),
        }
        for name, share in OVERALL.items()
    }
    path.write_text(json.dumps({"prompts": 256, "steps": 12, "models": models, "frechet_real": 2.31}))


def write_speed(path: Path) -> None:
    speed = {
        "machine": "2 cores of an Intel Xeon, fp32",
        "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
        "date": "2026-11-21",
        "batch": 16,
        "steps": 12,
        "macs_static": 2.013e9,
        "macs_dynamic": 1.047e9,
        "seconds_static": 0.8412,
        "seconds_dynamic": 0.5127,
        "ideal": 1.9226,
        "realised": 1.6407,
        "share": 0.8534,
    }
    path.write_text(json.dumps(speed))


def write_arrays(folder: Path, rng: np.random.Generator, steps: int = 12) -> None:
    names = np.array([f"double.{i}" for i in range(2)] + [f"single.{i}" for i in range(4)])
    timesteps = np.linspace(1000, 1000 / steps, steps)
    wish = 0.3 + 0.6 * (1 - timesteps[:, None] / 1000) ** 0.8 + rng.normal(0, 0.12, (1, len(names)))
    heads, groups = (np.arange(4) / 4 < wish[:, :, None] + rng.normal(0, 0.06, (1, 6, 1)) for _ in range(2))
    tokens = np.clip(wish + 0.1, 0.05, 1)
    tokens[:, 0] = np.nan
    np.savez(folder / "widths.npz", timesteps=timesteps, heads=heads, groups=groups, tokens=tokens, names=names)
    pairs = [(list(SHAPES)[i % 4], list(COLOURS)[i * 5 % 6]) for i in range(16)]
    pictures = {name: np.stack([draw_scene(rng, *pair) for pair in pairs]) for name in MODELS}
    right = {f"ok_{name}": rng.random(16) < share + 0.1 for name, share in OVERALL.items()}
    captions = [f"a {colour} {shape}" for shape, colour in pairs]
    captions[3] = "two small yellow rings to the left of a large purple triangle"
    np.savez(folder / "pictures.npz", captions=np.array(captions), **pictures, **right)
    detail = pictures["dynamic"][:4].astype(float).std(axis=3) + 40 * (rng.random((4, 32, 32)) < 0.2)
    coarse = detail.reshape(4, 8, 4, 8, 4).mean(axis=(2, 4))
    coarse /= coarse.max(axis=(1, 2), keepdims=True)
    shown = timesteps[::2]
    keep = np.clip(coarse[:, None] + 0.45 - shown[None, :, None, None] / 1400, 0, 1)
    np.savez(folder / "tokens.npz", pictures=pictures["dynamic"][:4], keep=keep, timesteps=shown)


def make_run(run: Path) -> Path:
    """A complete synthetic run folder."""
    rng = np.random.default_rng(7)
    (run / "evaluation").mkdir(parents=True)
    (run / "export").mkdir()
    recipe = (
        "name: shapes-flux-td-lora\nseed: 0\ntrain:\n  steps: 2500\n  lr: 0.0005\ncost:\n  target: 0.5\n  ramp: 900\n"
    )
    (run / "recipe.yaml").write_text(recipe)
    write_metrics(run / "metrics.jsonl", rng)
    write_scores(run / "evaluation" / "scores.json")
    write_speed(run / "evaluation" / "speed.json")
    write_arrays(run / "evaluation", rng)
    errors = ("error_mean", "error_max", "output_error")
    exports = [
        ("td-lora", "td_lora.safetensors", 356_412, (0.0, 0.0, 0.0)),
        ("diffusers", "transformer", 9_412_384, (2.1e-8, 4.8e-7, 3.1e-7)),
        ("peft", "adapter_model.safetensors", 211_090, (0.0031, 0.041, 0.0184)),
    ]
    entries = [
        {"format": kind, "path": path, "bytes": size, **dict(zip(errors, found, strict=True)), "verified": True}
        for kind, path, size, found in exports
    ]
    (run / "export" / "export.json").write_text(json.dumps(entries))
    return run


def write_gates(run: Path, step: int, layers: int = 8) -> np.ndarray:
    rng = np.random.default_rng(step)
    times = (np.arange(25) + 0.5) * 40
    turn = np.stack([np.cos(times / 1000 * np.pi * (1 + expert)) for expert in range(4)], axis=1)
    gates = np.exp(rng.uniform(0.5, 2, (layers, 1, 1)) * turn)
    gates /= gates.sum(axis=2, keepdims=True)
    (run / "gates").mkdir(exist_ok=True)
    names = np.array([f"transformer_blocks.{i // 2}.attn.{'to_q' if i % 2 else 'to_v'}" for i in range(layers)])
    np.savez(run / "gates" / f"step-{step:07d}.npz", timesteps=times, gates=gates.astype(np.float16), names=names)
    return gates
