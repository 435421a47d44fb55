"""DyFlux: FLUX.1's transformer with dynamic heads, MLP channels and image tokens (DyDiT++ section 4; DyFLUX).

A subclass of diffusers' FluxTransformer2DModel with the same parameter names for the base weights. All gates open, it
computes what the static model computes, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel, ModelMixin  # noqa: F401  (diffusers looks for ModelMixin in this namespace)
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from jaxtyping import Float
from torch import Tensor, nn

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.cost import BlockCost, ModelCost
from dydit_scale.dynamic.masks import DynamicMasks, GateMode
from dydit_scale.dynamic.tokens import router_macs
from dydit_scale.models.base import DynamicModelMixin
from dydit_scale.models.flux_blocks import (
    DyFluxAttnProcessor,
    DyFluxSingleTransformerBlock,
    DyFluxTransformerBlock,
)
from dydit_scale.models.flux_packed import PackedFluxBlock, PackedFluxSingleBlock, full_mask
from dydit_scale.models.routed import at_full_strength, in_batch_order, timestep_embedding


class DyFluxOutput(NamedTuple):
    """What a forward returns when it is asked for its masks."""

    sample: Float[Tensor, "batch image_tokens channels"]
    masks: DynamicMasks


class DyFluxTransformer2DModel(DynamicModelMixin, FluxTransformer2DModel):
    """FLUX.1 with timestep-wise dynamic width and spatial-wise dynamic tokens.

    Args (beyond FluxTransformer2DModel's):
        dynamic: the fields of :class:`DynamicConfig`.
    """

    static_class = FluxTransformer2DModel
    output_class = DyFluxOutput
    processor_class = DyFluxAttnProcessor
    token_router = "flux"
    timestep_tolerance = 0.006  # pipelines round to bf16, by up to 0.4 %
    _no_split_modules = ["DyFluxTransformerBlock", "DyFluxSingleTransformerBlock"]
    _repeated_blocks = ["DyFluxTransformerBlock", "DyFluxSingleTransformerBlock"]
    _keep_in_fp32_modules = ["dy_width", "dy_token"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "dy_"]
    _tp_plan = None  # head masks would have to be sharded with the heads

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        dynamic: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
        )
        self.dynamic = DynamicConfig(**(dynamic or {})).for_family(self.token_router)
        shape = {
            "dim": self.inner_dim,
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
        }
        self.transformer_blocks = nn.ModuleList(
            DyFluxTransformerBlock(**shape, config=self.dynamic) for _ in range(num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            DyFluxSingleTransformerBlock(**shape, config=self.dynamic) for _ in range(num_single_layers)
        )
        self._init_dynamic(layers=num_layers + num_single_layers, dim=self.inner_dim, heads=num_attention_heads)
        for block in self.dynamic_blocks():
            block.timestep_state = self.timestep_state  # type: ignore[assignment]

    @at_full_strength("joint_attention_kwargs")
    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor = None,  # type: ignore[assignment]
        pooled_projections: Tensor = None,  # type: ignore[assignment]
        timestep: Tensor = None,  # type: ignore[assignment]
        img_ids: Tensor = None,  # type: ignore[assignment]
        txt_ids: Tensor = None,  # type: ignore[assignment]
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: list[Tensor] | None = None,
        controlnet_single_block_samples: list[Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
        gates: GateMode = "threshold",
        collect: bool = False,
    ) -> Transformer2DModelOutput | DyFluxOutput | tuple[Tensor]:
        """FluxTransformer2DModel's forward (same arguments, same shapes), and:

        Args:
            timestep: [batch] in 0..1; keep it in fp32, routing reads it before it is rounded to the activations' dtype.
            gates: "threshold" (inference), "open" (the complete model), the noise for random gates (training), or one
                sub-network for the batch (training with frozen routers).
            collect: return :class:`DyFluxOutput` with the masks of all layers.
        """
        self._check(joint_attention_kwargs)
        steps = self._planned_steps(timestep.float(), gates, hidden_states)
        tokens = encoder_hidden_states.shape[1] + hidden_states.shape[1]
        if len(steps) > 1:
            if controlnet_block_samples or controlnet_single_block_samples:
                raise ValueError("packed sampling of a batch with several timesteps does not go with ControlNet")
            rows = list(steps.values())
            masked = full_mask(joint_attention_kwargs, len(hidden_states), tokens)
            batched = (hidden_states, encoder_hidden_states, pooled_projections, timestep)
            shared = {"img_ids": img_ids, "txt_ids": txt_ids, "collect": collect, "return_dict": False}
            parts = [
                self(
                    *(x[r] for x in batched),
                    guidance=None if guidance is None else guidance[r],
                    joint_attention_kwargs=_of_rows(masked, r),
                    **shared,
                )
                for r in rows
            ]
            return self._result(*in_batch_order(parts, rows), return_dict)

        step = next(iter(steps), None)
        if step is not None:
            joint_attention_kwargs = full_mask(joint_attention_kwargs, len(hidden_states), tokens)
        t_emb, blocks, width = self._network_at(step, timestep, gates)
        control = ControlNetResiduals(
            controlnet_block_samples, controlnet_single_block_samples, controlnet_blocks_repeat
        )
        with self.timestep_state.scope(t_emb):
            hidden_states, encoder_hidden_states, temb, rotary = self._embed(
                hidden_states, encoder_hidden_states, pooled_projections, timestep, guidance, img_ids, txt_ids
            )
            ahead = self._modulations(
                step,
                timestep,
                (pooled_projections, guidance),
                temb,
                lambda t: self._condition(t, guidance, pooled_projections, temb.dtype),
            )
            kept: list[Tensor] = []
            for i, block in enumerate(blocks):
                state = (hidden_states, encoder_hidden_states, temb, rotary, joint_attention_kwargs)
                options = (t_emb, self._block_gates(i, step, width, gates, ahead), collect)
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    out = self._gradient_checkpointing_func(block, *state, *options)
                else:
                    out = block(*state, *options)
                encoder_hidden_states, hidden_states = out[:2]
                kept.extend(out[2:])
                hidden_states = control.add(
                    hidden_states, i, len(self.transformer_blocks), len(self.single_transformer_blocks)
                )
            sample = self.proj_out(self.norm_out(hidden_states, temb))
        return self._result(sample, self._masks(step, width, torch.stack(kept)) if collect else None, return_dict)

    def dynamic_blocks(self) -> list[nn.Module]:
        """Double blocks, then single ones."""
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def block_names(self) -> list[str]:
        """Double and single blocks by their numbers."""
        kinds = (("double", self.transformer_blocks), ("single", self.single_transformer_blocks))
        return [f"{kind} {i}" for kind, blocks in kinds for i in range(len(blocks))]

    def routing_embedding(self, timestep: Float[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """The output of the timestep embedder alone, computed in fp32 from timesteps in 0..1."""
        return timestep_embedding(self.time_text_embed, timestep.float() * 1000)

    def cost(self, image_tokens: int, text_tokens: int | None = None) -> ModelCost:
        """MACs of one forward for one sample, from shapes.

        Raises:
            ValueError: ``text_tokens`` is not given: every block works on them, so there is no number to assume.
        """
        if text_tokens is None:
            raise ValueError("cost: give the number of text tokens too (512 for FLUX.1 dev, 256 for schnell)")
        config, d = self.config, self.inner_dim
        double = _double_cost(self.dynamic, d, self.mlp_dim, image_tokens, text_tokens)
        single = _single_cost(self.dynamic, d, self.mlp_dim, image_tokens, text_tokens)
        embedders = 256 * d + d * d + config["pooled_projection_dim"] * d + d * d
        embedders += (256 * d + d * d) if config["guidance_embeds"] else 0
        per_token = image_tokens * d * (config["in_channels"] + self.proj_out.out_features)
        per_token += text_tokens * d * config["joint_attention_dim"]
        return ModelCost(
            blocks=(double,) * config["num_layers"] + (single,) * config["num_single_layers"],
            outside=embedders + 2 * d * d + per_token,
        )

    @property
    def mlp_dim(self) -> int:
        """Hidden channels of each MLP."""
        return 4 * self.inner_dim

    def _check(self, joint_attention_kwargs: dict[str, Any] | None) -> None:
        self._check_processors()
        if joint_attention_kwargs and "ip_adapter_image_embeds" in joint_attention_kwargs:
            raise ValueError("IP adapters replace the attention that head masks act on; use to_static() for them")

    def _embed(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        img_ids: Tensor,
        txt_ids: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """(image tokens, text tokens, modulation embedding, rotary tables)."""
        hidden_states = self.x_embedder(hidden_states)
        temb = self._condition(timestep, guidance, pooled_projections, hidden_states.dtype)
        ids = torch.cat([x[0] if x.ndim == 3 else x for x in (txt_ids, img_ids)])
        return hidden_states, self.context_embedder(encoder_hidden_states), temb, self.pos_embed(ids)

    def _condition(
        self, timestep: Tensor, guidance: Tensor | None, pooled: Tensor, dtype: torch.dtype
    ) -> Float[Tensor, "batch dim"]:
        """Timestep, guidance and pooled text together."""
        scaled = [x.to(dtype) * 1000 for x in (timestep, guidance) if x is not None]
        return self.time_text_embed(*scaled, pooled)


def _of_rows(options: dict[str, Any] | None, rows: list[int]) -> dict[str, Any] | None:
    """``joint_attention_kwargs`` with the mask of these rows of the batch, where each has its own."""
    mask = (options or {}).get("attention_mask")
    return options if mask is None or len(mask) == 1 else {**(options or {}), "attention_mask": mask[rows]}


class ControlNetResiduals(NamedTuple):
    """ControlNet's samples for double and single blocks, spread over the blocks as diffusers does."""

    double: list[Tensor] | None
    single: list[Tensor] | None
    repeat: bool

    def add(self, x: Tensor, i: int, doubles: int, singles: int) -> Tensor:
        """``x`` after block i of all blocks, with the residual that belongs to it."""
        samples, i, blocks = (self.double, i, doubles) if i < doubles else (self.single, i - doubles, singles)
        if samples is None:
            return x
        if self.repeat and samples is self.double:
            return x + samples[i % len(samples)]
        return x + samples[i // math.ceil(blocks / len(samples))]


def _double_cost(config: DynamicConfig, d: int, f: int, image: int, text: int) -> BlockCost:
    both = image + text
    return BlockCost(
        fixed=12 * d * d,
        router=router_macs(config, d, image),
        heads=4 * d * d * both + 2 * both * both * d,
        groups=2 * d * f * text,
        groups_tokens=2 * d * f * image,
    )


def _single_cost(config: DynamicConfig, d: int, f: int, image: int, text: int) -> BlockCost:
    both = image + text
    of_query = 2 * d * d + 2 * both * d  # projections of query and output, and attention to all
    return BlockCost(
        fixed=3 * d * d,
        router=router_macs(config, d, image),
        heads=2 * d * d * both + of_query * (text if config.skips_attention else both),
        heads_tokens=of_query * image if config.skips_attention else 0,
        groups=2 * d * f * text,
        groups_tokens=2 * d * f * image,
    )


for _block in (DyFluxTransformerBlock, DyFluxSingleTransformerBlock, PackedFluxBlock, PackedFluxSingleBlock):
    TransformerBlockRegistry.register(
        _block, TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0)
    )
