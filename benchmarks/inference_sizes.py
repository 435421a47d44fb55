"""The models of benchmarks/inference.py: published sizes with random weights, and inputs along a sampler's path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from torch import Tensor

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.cost import ModelCost
from dydit_scale.models.class_latte import ClassLatteTransformer3DModel, class_latte_config
from dydit_scale.models.dit import DyDiTTransformer2DModel, dit_config
from dydit_scale.models.dy_class_latte import DyClassLatteTransformer3DModel
from dydit_scale.models.encoders import image_ids
from dydit_scale.models.flux import DyFluxTransformer2DModel

CLASSES = {
    "dit": (DiTTransformer2DModel, DyDiTTransformer2DModel),
    "latte": (ClassLatteTransformer3DModel, DyClassLatteTransformer3DModel),
    "flux": (FluxTransformer2DModel, DyFluxTransformer2DModel),
}
"""By family: the static class and ours."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A published model and what it is asked to draw."""

    name: str
    family: str
    config: dict[str, Any]
    """Arguments of the static class."""
    side: int
    """Image tokens along a side."""
    text: int = 0
    """Text tokens."""
    branches: int = 1
    """Samples that each picture needs in a batch: two under classifier-free guidance."""
    steps: int = 28
    """Of its sampler."""
    few_steps: bool = False
    """Whether a distilled model of this size samples in four steps."""
    token_keep: float | None = None
    """Published mean share of image tokens; None: none was published for it alone."""
    on_cpu: tuple[int | None, int | None, int | None] = (None, None, None)
    """Layers, side and text tokens on a CPU; None leaves the size as it is."""
    gpu_batches: tuple[int, ...] = (1,)
    """Pictures at a time on a GPU."""

    @property
    def layers(self) -> int:
        """Blocks of all kinds."""
        return self.config["num_layers"] + self.config.get("num_single_layers", 0)

    @property
    def frames(self) -> int:
        """Of a clip; 1 for pictures."""
        return self.config.get("video_length", 1)

    @property
    def tokens(self) -> int:
        """Image tokens of a sample."""
        return self.frames * self.side**2

    def cut(self, layers: int | None = None, side: int | None = None, text: int | None = None) -> Size:
        """The same widths with fewer blocks, kinds in proportion, or fewer tokens; None changes nothing."""
        config = dict(self.config)
        if layers is not None and self.family == "flux":
            double = max(1, round(layers * config["num_layers"] / self.layers))
            config |= {"num_layers": double, "num_single_layers": max(1, layers - double)}
        elif layers is not None:
            config["num_layers"] = max(2, layers // 2 * 2) if self.family == "latte" else layers
        side = side or self.side
        if "sample_size" in config:
            config["sample_size"] = side * config["patch_size"]
        kept = self.text if text is None or not self.text else text
        return replace(self, config=config, side=side, text=kept)

    def make_static(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The static model with random weights, made where and as it will run."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                torch.manual_seed(0)
                model = CLASSES[self.family][0](**self.config).to(device, dtype).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        if self.family == "dit":  # a copy of the embedder in each block, equal as in published models
            first, *others = (block.norm1.emb for block in model.transformer_blocks)
            for embedder in others:
                embedder.load_state_dict(first.state_dict())
        return model

    def make_dynamic(self, static: Any, **dynamic: bool) -> Any:
        """The dynamic model of ``static``, sharing its tensors; ``dynamic`` says what of it is."""
        model = CLASSES[self.family][1].from_static(static, DynamicConfig(**dynamic))
        return model.eval().requires_grad_(False)

    def cost(self, model: Any = None) -> ModelCost:
        """MACs of a forward of one sample, by the dynamic ``model`` or by one with everything dynamic."""
        if model is None:
            with init_empty_weights():
                model = CLASSES[self.family][1](**self.config)
        return model.cost(self.tokens, self.text)

    def sigmas(self, steps: int, *, of: int) -> Tensor:
        """Noise levels, 1 at first, of ``steps`` steps evenly spread over a sampler of ``of`` steps."""
        places = torch.linspace(0, of - 1, steps).round()
        return 1 - places / of

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """The noise levels as the model takes them."""
        return sigmas if self.family == "flux" else (1000 * sigmas).round() - 1

    def inputs(
        self, batch: int, sigmas: Tensor, device: torch.device, dtype: torch.dtype, number: int = 0
    ) -> list[dict[str, Any]]:
        """Arguments of the forward for each step, on a straight path from noise to a smooth picture, that of a
        ``number``."""
        generator = torch.Generator().manual_seed(1 + number)
        rows, make = batch * self.branches, MAKERS[self.family]
        fixed, shape = make(self, rows, generator, device, dtype)
        noise = torch.randn(shape, generator=generator)
        picture = torch.randn(shape, generator=generator).cumsum(-1) / shape[-1] ** 0.5
        made = []
        for sigma, timestep in zip(sigmas.tolist(), self.timesteps(sigmas), strict=True):
            latents = (sigma * noise + (1 - sigma) * picture).to(device, dtype)
            moved = (timestep if self.family == "flux" else timestep.long()).to(device)
            made.append({"hidden_states": latents, "timestep": moved.expand(rows).contiguous(), **fixed})
        return made


Made = tuple[dict[str, Any], tuple[int, ...]]


def _for_dit(size: Size, rows: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Made:
    labels = torch.randint(size.config["num_embeds_ada_norm"], (rows,), generator=generator)
    side = size.config["sample_size"]
    return {"class_labels": labels.to(device)}, (rows, size.config["in_channels"], side, side)


def _for_latte(size: Size, rows: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Made:
    side = size.config["sample_size"]
    return {}, (rows, size.config["in_channels"], size.frames, side, side)


def _for_flux(size: Size, rows: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Made:
    config = size.config
    text = torch.randn(rows, size.text, config["joint_attention_dim"], generator=generator)
    pooled = torch.randn(rows, config["pooled_projection_dim"], generator=generator)
    fixed = {
        "encoder_hidden_states": text.to(device, dtype),
        "pooled_projections": pooled.to(device, dtype),
        "guidance": torch.full((rows,), 3.5, device=device) if config["guidance_embeds"] else None,
        "img_ids": image_ids(size.side, size.side).to(device),
        "txt_ids": torch.zeros(size.text, 3, device=device),
    }
    return fixed, (rows, size.tokens, config["in_channels"])


MAKERS: dict[str, Callable[..., Made]] = {"dit": _for_dit, "latte": _for_latte, "flux": _for_flux}


def _dit(name: str) -> Size:
    config = {k: v for k, v in dit_config(f"{name}/2").items() if k != "time_freq_shift"}  # the static class has 1
    return Size(name=f"dit-{name.lower()}", family="dit", config=config, side=16, branches=2,
                gpu_batches=(1, 8, 64))  # fmt: skip


def _flux(name: str, double: int) -> Size:
    config = {
        "in_channels": 64, "num_layers": double, "num_single_layers": 38, "num_attention_heads": 24,
        "attention_head_dim": 128, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
        "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
    }  # fmt: skip
    return Size(name=name, family="flux", config=config, side=64, text=512, few_steps=True, token_keep=0.44,
                on_cpu=(6, 16, 32))  # fmt: skip


_LATTE = Size(
    name="latte-xl", family="latte", config=class_latte_config("SkyTimelapse"), side=16, on_cpu=(4, None, None)
)
SIZES = {s.name: s for s in (*map(_dit, ("S", "B", "XL")), _LATTE, _flux("flux-lite", 8), _flux("flux-dev", 19))}
