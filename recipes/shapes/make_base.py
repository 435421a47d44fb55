"""Trains the small static FLUX that the demo adapts, from random weights to a pipeline folder.

    dydit data shapes out/shapes --samples 100000
    python recipes/shapes/make_base.py recipes/shapes/base.yaml OUT

With ``model.base=OUT model.from_scratch=false`` behind it, the same command goes on from the weights of OUT.

It trains small models of other families too (benchmarks/gallery.py). Model, data, noise levels and sizes are those of
the recipe, through the objective of every other run. Only the optimiser differs: Muon on the matrices of the blocks and
AdamW on the rest learn in about half the steps what AdamW alone learns here. The averaged weights are written to OUT
every 1,000 steps.
"""

from __future__ import annotations

import argparse
import copy
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from tqdm import tqdm

from dydit_scale.data.loader import make_loader, open_data
from dydit_scale.parallel.world import init_world
from dydit_scale.train.build import build_parts
from dydit_scale.train.objective import Objective
from dydit_scale.train.recipe import Recipe, load_recipe

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan et al., "Muon", 2024)."""


class Muon:
    """Momentum whose update is made orthogonal, for matrices (Jordan et al., 2024).

    As ``torch.optim.Muon``, but all matrices of a shape go through one batched product in fp32: four times faster for
    many small ones on a CPU.
    """

    def __init__(self, params: Iterable[nn.Parameter], momentum: float = 0.95) -> None:
        self.momentum = momentum
        self.groups = defaultdict(list)
        for param in params:
            self.groups[tuple(param.shape)].append(param)
        self.buffers = {s: torch.zeros(len(g), *s, device=g[0].device) for s, g in self.groups.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for shape, group in self.groups.items():
            grads = torch.stack([param.grad for param in group])
            buffer = self.buffers[shape].lerp_(grads, 1 - self.momentum)
            updates = orthogonal(grads.lerp(buffer, self.momentum))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for param, update in zip(group, updates, strict=True):
                param.sub_(update, alpha=lr * scale)


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """``x`` [..., rows, columns] with singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def zero_gates(network: nn.Module) -> None:
    """Start every block as the identity and the output at zero (DiT's adaLN-Zero)."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    last = getattr(network, "proj_out", None) or network.proj_out_2  # DiT's and Latte's name
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


def make_base(recipe: Recipe, out: Path, *, matrix_lr: float = 0.02, decay: float = 0.4) -> None:
    """Train as ``recipe`` says; the learning rates fall to zero over the last ``decay`` of the steps."""
    settings, device = recipe.train, init_world().device
    pipeline = build_parts(recipe).pipeline
    network = pipeline.transformer
    if recipe.model.from_scratch:
        zero_gates(network)
    pipeline.to(device)
    params = dict(network.named_parameters())
    matrices = {n: p for n, p in params.items() if "blocks." in n and p.ndim == 2}
    muon = Muon(matrices.values())
    rest = [p for n, p in params.items() if n not in matrices]
    adamw = torch.optim.AdamW(rest, betas=settings.betas, weight_decay=0.0)
    average = {n: p.detach().clone() for n, p in params.items()}
    objective = Objective(recipe, network, pipeline, None, device)
    loader = make_loader(
        recipe.data, open_data(recipe.data), seed=recipe.seed, rank=0, world_size=1, global_batch=settings.batch_size,
        micro_batch=settings.batch_size, consumed=0, quarantine=None,
    )  # fmt: skip
    module = torch.compile(network) if recipe.engine.compile else network
    bar = tqdm(range(settings.steps), unit="step")
    for step, batch in zip(bar, loader, strict=False):
        levels = objective.training_levels(step, batch.positions - step * settings.batch_size)
        loss = objective.terms(module, objective.prepare(batch, levels, recipe.seed), batch.positions, step).flow.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        rate = min(1.0, (step + 1) / settings.warmup_steps, (settings.steps - step) / (decay * settings.steps))
        adamw.param_groups[0]["lr"] = rate * settings.lr
        adamw.step()
        muon.step(rate * matrix_lr)
        keep = min(settings.ema or 0.0, (step + 1) / (step + 10))
        for name, param in params.items():
            average[name].lerp_(param.detach(), 1 - keep)
            param.grad = None
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 1000 == 0 or step + 1 == settings.steps:
            save(recipe, network, average, out)


def save(recipe: Recipe, network: ModelMixin, average: dict[str, Tensor], out: Path) -> None:
    """Write the recipe's pipeline folder to ``out``, with the averaged weights in its transformer."""
    shutil.copytree(recipe.model.base, out, dirs_exist_ok=True)
    averaged = copy.deepcopy(network).half()
    averaged.load_state_dict(averaged.state_dict() | average)  # the average holds no buffers
    # from_pretrained notes the folder, a path of this machine
    averaged._internal_dict = FrozenDict({k: v for k, v in averaged.config.items() if k != "_name_or_path"})
    averaged.save_pretrained(out / "transformer")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the demo's base model from random weights.")
    parser.add_argument("recipe", type=Path, help="recipes/shapes/base.yaml")
    parser.add_argument("out", type=Path, help="folder of the new pipeline")
    parser.add_argument("overrides", nargs="*", help="e.g. train.steps=100")
    options = parser.parse_args()
    make_base(load_recipe(options.recipe, options.overrides), options.out)
