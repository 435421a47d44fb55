"""DyLatte for class-conditional and unconditional Latte: DyDiT's blocks over the tokens of a frame, and over time.

A subclass of :class:`ClassLatteTransformer3DModel` with the same parameter names for the base weights. All gates open,
it computes what the static model computes, bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin  # noqa: F401  (diffusers looks for ModelMixin here)
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from jaxtyping import Float
from torch import Tensor, nn

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.cost import BlockCost, ModelCost
from dydit_scale.dynamic.masks import DynamicMasks, GateMode
from dydit_scale.dynamic.tokens import router_macs
from dydit_scale.models.base import DynamicModelMixin
from dydit_scale.models.blocks import BlockGates
from dydit_scale.models.class_latte import BLOCK_SETTINGS, ClassLatteTransformer3DModel, FrameAxis
from dydit_scale.models.dit import TIME_FREQUENCIES
from dydit_scale.models.dit_blocks import DyDiTAttnProcessor, DyDiTTransformerBlock, PackedDiTBlock
from dydit_scale.models.latte import check_dynamic, with_idle_temporal
from dydit_scale.models.routed import in_batch_order, timestep_embedding


class DyClassLatteOutput(NamedTuple):
    """What a forward returns when it is asked for its masks."""

    sample: Float[Tensor, "batch channels frames height width"]
    masks: DynamicMasks
    """Layers: spatial and temporal blocks in turn. Tokens: frame by frame, each frame row by row, in both kinds; zeros
    for what a layer does not see: the pictures in temporal blocks."""


class DyClassLatteTransformerBlock(DyDiTTransformerBlock):
    """DyDiT's block, whose attention stays within a frame, or (temporal) within a place of all frames."""

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        *,
        temporal: bool,
        config: DynamicConfig,
    ) -> None:
        super().__init__(
            dim, num_attention_heads, attention_head_dim, upcast_attention=False, config=config, **BLOCK_SETTINGS
        )
        self.temporal = temporal

    def forward(  # type: ignore[override]
        self,
        hidden_states: Float[Tensor, "batch tokens dim"],
        temb: Float[Tensor, "batch dim"],
        frames: int = 1,
        positions: Float[Tensor, "1 tokens dim"] | None = None,
        t_emb: Float[Tensor, "batch_t dim"] | None = None,
        gates: BlockGates = BlockGates(),
        collect: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The tokens, and with ``collect`` (tokens, token gates [batch, tokens])."""
        x = hidden_states if positions is None else hidden_states + positions
        attention = {"frames": frames, "temporal": self.temporal}
        return super().forward(x, temb, attention, t_emb, gates, collect)

    def assembled(self, parts: dict[str, Any], t_emb: Float[Tensor, "1 dim"]) -> PackedClassLatteBlock:
        """The packed block of these parts."""
        return PackedClassLatteBlock(self, **parts, t_emb=t_emb)


class PackedClassLatteBlock(PackedDiTBlock):
    """:class:`DyClassLatteTransformerBlock` with some of its heads and channels; for inference."""

    def __init__(self, block: DyClassLatteTransformerBlock, **settings: Any) -> None:
        super().__init__(block, **settings)
        self.temporal = block.temporal

    def forward(  # type: ignore[override]
        self,
        hidden_states: Float[Tensor, "batch tokens dim"],
        temb: Float[Tensor, "batch dim"],
        frames: int = 1,
        positions: Float[Tensor, "1 tokens dim"] | None = None,
        t_emb: Float[Tensor, "batch_t dim"] | None = None,
        gates: BlockGates = BlockGates(),
        collect: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As :class:`DyClassLatteTransformerBlock`'s."""
        x = hidden_states if positions is None else hidden_states + positions
        attention = {"frames": frames, "temporal": self.temporal}
        return super().forward(x, temb, attention, t_emb, gates, collect)


class DyClassLatteTransformer3DModel(DynamicModelMixin, ClassLatteTransformer3DModel, AttentionMixin):
    """Class-conditional or unconditional Latte with timestep-wise dynamic width and spatial-wise dynamic tokens, in
    spatial and temporal blocks.

    Args (beyond ClassLatteTransformer3DModel's):
        dynamic: the fields of :class:`DynamicConfig`; the token router is ``dit``.
    """

    static_class = ClassLatteTransformer3DModel
    output_class = DyClassLatteOutput
    processor_class = DyDiTAttnProcessor
    token_router = "dit"
    _no_split_modules = ["DyClassLatteTransformerBlock"]
    _repeated_blocks = ["DyClassLatteTransformerBlock"]
    _keep_in_fp32_modules = ["dy_width", "dy_token"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "time_class_embed", "dy_"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        sample_size: int = 32,
        patch_size: int = 2,
        num_classes: int | None = None,
        video_length: int = 16,
        dynamic: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=0,  # ours follow
            sample_size=sample_size,
            patch_size=patch_size,
            num_classes=num_classes,
            video_length=video_length,
        )
        if num_layers % 2:
            raise ValueError(f"num_layers: expected an even number, spatial and temporal in turn; got {num_layers}")
        self.register_to_config(num_layers=num_layers)
        self.dynamic = DynamicConfig(**(dynamic or {})).for_family(self.token_router)
        check_dynamic(self.dynamic)
        self.transformer_blocks = nn.ModuleList(
            DyClassLatteTransformerBlock(
                self.inner_dim, num_attention_heads, attention_head_dim, temporal=i % 2 == 1, config=self.dynamic
            )
            for i in range(num_layers)
        )
        self._init_dynamic(layers=num_layers, dim=self.inner_dim, heads=num_attention_heads)
        for block in self.transformer_blocks:
            block.timestep_state = self.timestep_state  # type: ignore[assignment]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        images: int = 0,
        drop_labels: Tensor | None = None,
        gates: GateMode = "threshold",
        collect: bool = False,
    ) -> Transformer2DModelOutput | DyClassLatteOutput | tuple[Tensor]:
        """ClassLatteTransformer3DModel's forward (same arguments, same shapes), and:

        Args:
            gates: "threshold" (inference), "open" (the complete model), the noise for random gates (training), whose
                tokens are those of clip and pictures, or one sub-network for the batch (training with frozen
                routers).
            collect: return :class:`DyClassLatteOutput` with the masks of all layers.
        """
        self._check_processors()
        axis = self._frame_axis(hidden_states, timestep, class_labels, drop_labels, images)
        steps = self._planned_steps(timestep.float(), gates, hidden_states)
        if len(steps) > 1:
            rows = list(steps.values())
            parts = [
                self(
                    hidden_states[r],
                    timestep[r],
                    None if class_labels is None else class_labels[r],
                    return_dict=False,
                    images=images,
                    drop_labels=None if drop_labels is None else drop_labels[r],
                    collect=collect,
                )
                for r in rows
            ]
            return self._result(*in_batch_order(parts, rows), return_dict)

        step = next(iter(steps), None)
        t_emb, blocks, width = self._network_at(step, timestep.float(), gates)
        with self.timestep_state.scope(t_emb):
            x = self._embed(hidden_states)  # [batch, tokens, dim]
            temb = self._condition(timestep, class_labels, drop_labels, axis, x.dtype)  # [batch parts, dim]
            ahead = None
            if axis.parts == 1:
                ahead = self._modulations(
                    step,
                    timestep,
                    (class_labels, drop_labels),
                    temb,
                    lambda t: self._condition(t, class_labels, drop_labels, axis, x.dtype),
                )
            tokens: list[Tensor] = []
            for i, block in axis.running(blocks):
                block_gates = _for_rows(self._block_gates(i, step, width, gates, ahead), i, axis)
                options = (axis.per_row(i, t_emb), block_gates, collect)
                inputs = (*self._block_inputs(i, x, temb, axis), *options)
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    out = self._gradient_checkpointing_func(block, *inputs)
                else:
                    out = block(*inputs)
                out, *keep = out if collect else (out,)
                x = axis.back(i, out, x)
                tokens.extend(axis.back(i, k, k.new_zeros(len(x), axis.tokens)) for k in keep)
            sample = self._unpatched(x, temb, axis, *hidden_states.shape[3:])
        if not collect:
            return self._result(sample, None, return_dict)
        if axis.clip:
            return DyClassLatteOutput(sample, self._masks(step, width, torch.stack(tokens)))
        return DyClassLatteOutput(sample, with_idle_temporal(tokens, partial(self._masks, step, width)))

    def dynamic_blocks(self) -> list[nn.Module]:
        """Spatial and temporal blocks in turn."""
        return list(self.transformer_blocks)

    def block_names(self) -> list[str]:
        """Spatial and temporal blocks by their numbers."""
        return [f"{('spatial', 'temporal')[i % 2]} {i // 2}" for i in range(len(self.dynamic_blocks()))]

    def routing_embedding(self, timestep: Float[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """The output of the timestep embedder alone, without the class, computed in fp32."""
        return timestep_embedding(self.time_class_embed, timestep)

    def cost(self, image_tokens: int, text_tokens: int = 0, *, frames: int | None = None, images: int = 0) -> ModelCost:
        """MACs of one forward for one sample, from shapes; ``text_tokens`` must be 0.

        Args:
            image_tokens: those of the whole clip and of the pictures.
            frames: of the clip: the model's ``video_length`` (where it is None) or 0.
            images: pictures behind the clip. Own labels of theirs, which cost a modulation each, are not counted.

        Raises:
            ValueError: text tokens, or frames that cannot have equally many tokens.
        """
        if text_tokens:
            raise ValueError(f"cost: a class-conditional model has no text tokens; got {text_tokens}")
        config, d, n = self.config, self.inner_dim, image_tokens
        clip = config["video_length"] if frames is None else frames
        if n % (clip + images):
            raise ValueError(f"cost: {n} tokens cannot be cut into {clip + images} equal frames")
        patches = n // (clip + images)
        spatial = BlockCost(
            fixed=6 * d * d,
            router=router_macs(self.dynamic, d, n),
            heads=4 * d * d * n + 2 * n * patches * d,
            groups_tokens=8 * d * d * n,
        )
        m = clip * patches
        temporal = BlockCost(
            fixed=6 * d * d,
            router=router_macs(self.dynamic, d, m),
            heads=4 * d * d * m + 2 * m * clip * d,
            groups_tokens=8 * d * d * n,
            token_share=m / n,
        )
        per_token = n * d * config["patch_size"] ** 2 * (config["in_channels"] + self.out_channels)
        return ModelCost(
            blocks=(spatial, temporal if clip else BlockCost()) * (config["num_layers"] // 2),
            outside=TIME_FREQUENCIES * d + 3 * d * d + per_token,
        )


def _for_rows(gates: BlockGates, layer: int, axis: FrameAxis) -> BlockGates:
    """The gates of a layer for the rows that it sees."""
    heads, groups = (None if mask is None else axis.per_row(layer, mask) for mask in (gates.heads, gates.groups))
    noise = None if gates.token_noise is None else axis.into(layer, gates.token_noise)
    return gates._replace(heads=heads, groups=groups, token_noise=noise)


for _block in (DyClassLatteTransformerBlock, PackedClassLatteBlock):
    TransformerBlockRegistry.register(
        _block, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
    )
