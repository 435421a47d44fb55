"""Looking at the model during training: loss and cost on fixed noise, and a grid of pictures."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dydit_scale.data.dataset import DataSet
from dydit_scale.data.loader import Batch, make_loader
from dydit_scale.data.stream import ShardStream
from dydit_scale.diffusion.randomness import keyed_seed
from dydit_scale.diffusion.timesteps import stratified_uniform
from dydit_scale.parallel.reduce import mean_values, sum_tensor
from dydit_scale.parallel.world import World
from dydit_scale.sampling.generate import SampleConfig, generate, picture_grid
from dydit_scale.train.objective import Objective
from dydit_scale.train.recipe import Recipe


class Evaluation(NamedTuple):
    """Means over the fixed batch, all ranks."""

    mse_eval: float
    """Squared error of what the model predicts (noise, or velocity), with thresholded gates."""
    ratio_eval: float
    """MACs dynamic / static with thresholded gates: what sampling will cost."""


class Validator:
    """The same pictures, noise and noise levels at every evaluation, and for every run with the same seed and data."""

    def __init__(self, recipe: Recipe, data: DataSet | ShardStream, objective: Objective, world: World) -> None:
        self.recipe, self.objective, self.world = recipe, objective, world
        samples = recipe.train.evaluate_samples
        share = samples // world.world_size
        whole = gcd(share, recipe.data.unit)
        micro = next(n for n in range(min(whole, 64), 0, -1) if whole % n == 0)
        self.seed = keyed_seed(recipe.seed, "evaluation")
        loader = make_loader(
            recipe.data, data, seed=self.seed, rank=world.rank, world_size=world.world_size,
            global_batch=samples, micro_batch=micro, consumed=0,
        )  # fmt: skip
        batches = iter(loader)
        self.batches: list[Batch] = [next(batches) for _ in range(share // micro)]

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> Evaluation:
        """Collective."""
        totals, count = torch.zeros(2, dtype=torch.float64), 0
        for batch in self.batches:
            inputs = self.objective.prepare(batch, self._levels(batch.positions), self.seed)
            sample, ratio = self.objective.predict(module, inputs)
            error = self.objective.error(sample, inputs)
            totals += torch.stack([error.double().sum(), ratio.double().sum()]).cpu()
            count += len(batch.positions)
        means = (totals / count).tolist()
        return Evaluation(**mean_values({"mse_eval": means[0], "ratio_eval": means[1]}))

    def _levels(self, positions: Tensor) -> Tensor:
        """As a sampler visits them, whatever the density in training."""
        return self.objective.process.even_levels(stratified_uniform(self.seed, 0, positions))

    def sample(self) -> np.ndarray:
        """A grid of the recipe's prompts; every rank draws its share. Collective."""
        train, prompts = self.recipe.train, self.recipe.train.sample_prompts
        ranks = self.world.world_size
        per_rank = -(-len(prompts) // ranks)
        numbers = [min(self.world.rank * per_rank + i, len(prompts) - 1) for i in range(per_rank)]
        data = self.recipe.data
        config = SampleConfig(
            steps=train.sample_steps, height=data.image_size, width=data.image_size, frames=data.frames,
            cfg=train.sample_cfg, batch=per_rank, text_tokens=self.recipe.model.text_tokens, seed=self.recipe.seed,
        )  # fmt: skip
        own = generate(self.objective.pipeline, [prompts[i] for i in numbers], config, first=numbers[0])
        sheet = torch.zeros(ranks * per_rank, *own.shape[1:], dtype=torch.float32, device=self.objective.device)
        sheet[self.world.rank * per_rank : (self.world.rank + 1) * per_rank] = torch.from_numpy(own).to(sheet)
        pictures = sum_tensor(sheet)[: len(prompts)].cpu().numpy().astype("uint8")
        return picture_grid(pictures, min(8, len(prompts)), max(1, 96 // config.height))
