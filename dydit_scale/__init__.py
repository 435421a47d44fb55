"""Dynamic diffusion transformers: width that follows the timestep, tokens that skip work, at a budget you set.

import dydit_scale as dy
transformer = dy.make_dynamic(FluxTransformer2DModel.from_pretrained(...), dy.DynamicConfig())
pipe = FluxPipeline.from_pretrained(..., transformer=transformer)
dy.pack(transformer, dy.sampler_timesteps(pipe, dy.SampleConfig(steps=28)))
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

_LIGHT = ("-h", "--help", "health", "stop", "top")
"""Arguments of the ``dydit`` command that must answer at once, probes among them."""

if TYPE_CHECKING or not (os.path.basename(sys.argv[0]) == "dydit" and sys.argv[1:2] and sys.argv[1] in _LIGHT):
    # Their imports take seconds; everyone else may count on them.
    from dydit_scale.dynamic.config import DynamicConfig
    from dydit_scale.models.class_latte import ClassLatteTransformer3DModel
    from dydit_scale.models.dit import DyDiTTransformer2DModel
    from dydit_scale.models.dy_class_latte import DyClassLatteTransformer3DModel
    from dydit_scale.models.flux import DyFluxTransformer2DModel
    from dydit_scale.models.latte import DyLatteTransformer3DModel
    from dydit_scale.models.pipelines import ClassLattePipeline, DyDiTPipeline, SiTPipeline
    from dydit_scale.models.registry import all_families, make_dynamic
    from dydit_scale.models.sit_scheduler import SiTScheduler
    from dydit_scale.sampling.generate import SampleConfig, sampler_timesteps

    # Pipelines saved with our classes name their modules; diffusers finds them only where they are imported already.
    all_families()

if TYPE_CHECKING:
    from torch import Tensor

    from dydit_scale.models.base import DynamicModelMixin
    from dydit_scale.models.plan import PackedPlan

__version__ = "0.1.0"


def pack(model: DynamicModelMixin, timesteps: Tensor, **options: Any) -> PackedPlan:
    """Cut a sub-network for each timestep of a sampler (``timesteps`` [steps] as the model's forward takes them: for
    FLUX 0..1, from ``sampler_timesteps``; for DiT and Latte their scheduler's); forwards without gradient run them from
    now on. ``options`` are those of :meth:`dydit_scale.models.routed.RoutedModelMixin.pack`.

    Raises ValueError if the copied weights would take more than ``max_bytes``.
    """
    return model.pack(timesteps, **options)


def load_td_lora(model: Any, folder: str) -> Any:
    """Load a TD-LoRA folder, with its routers, into a model; see :func:`dydit_scale.adapters.state.load_td_lora`."""
    from dydit_scale.adapters.state import load_td_lora as load

    return load(model, folder)


def load_lora_schedule(pipeline: Any, folder: str) -> Any:
    """Load an export of ranges or experts into a diffusers pipeline; see
    :func:`dydit_scale.adapters.schedule.load_lora_schedule`."""
    from dydit_scale.adapters.schedule import load_lora_schedule as load

    return load(pipeline, folder)


__all__ = [
    "ClassLattePipeline",
    "ClassLatteTransformer3DModel",
    "DyClassLatteTransformer3DModel",
    "DyDiTPipeline",
    "DyDiTTransformer2DModel",
    "DyFluxTransformer2DModel",
    "DyLatteTransformer3DModel",
    "DynamicConfig",
    "SampleConfig",
    "SiTPipeline",
    "SiTScheduler",
    "load_lora_schedule",
    "load_td_lora",
    "make_dynamic",
    "pack",
    "sampler_timesteps",
]
