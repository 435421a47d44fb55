"""Class-conditional and unconditional Latte (arXiv 2401.03048, variant 1), which diffusers has not: DiT's blocks, even
ones over the tokens of a frame, odd ones over the frames of a place.

Weights are named as in :class:`DyDiTTransformer2DModel`, with one embedder at the root. ``images`` are the separate
pictures of Latte's image-video joint training: they stand behind the clip on the frame axis, pass the spatial blocks
with it, and know no time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    LabelEmbedding,
    PatchEmbed,
    TimestepEmbedding,
    Timesteps,
    get_1d_sincos_pos_embed_from_grid,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormZero
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from dydit_scale.models.dit import TIME_FREQUENCIES, dit_config
from dydit_scale.models.dit_blocks import DyDiTAttnProcessor

LATTE_CLASSES = {"FaceForensics": None, "SkyTimelapse": None, "Taichi": None, "UCF101": 101}
"""Classes of the published models, by data set; None: unconditional."""
LABEL_DROPOUT = 0.1
BLOCK_SETTINGS: dict[str, Any] = {
    "dropout": 0.0,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
"""What all published models share."""


def class_latte_config(data_set: str, *, size: str = "XL/2", sample_size: int = 32) -> dict[str, Any]:
    """Arguments of :class:`ClassLatteTransformer3DModel` for a published model: 16 frames, learned variance.

    Args:
        data_set: one of ``LATTE_CLASSES``.
        size: size and patch, as those of DiT.
        sample_size: side of the latent frames: a frame's side / 8.
    """
    if data_set not in LATTE_CLASSES:
        raise ValueError(f"class_latte_config: expected one of {', '.join(LATTE_CLASSES)}; got {data_set!r}")
    dit = dit_config(size.removeprefix("Latte-"), sample_size=sample_size)
    sizes = ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "sample_size", "in_channels")
    return {
        **{name: dit[name] for name in (*sizes, "out_channels")},
        "num_classes": LATTE_CLASSES[data_set],
        "video_length": 16,
    }


class FrameAxis(NamedTuple):
    """What stands on the frame axis, and how a sample's tokens, frame by frame, go into a block and come back."""

    clip: int
    """Frames of the video; they come first."""
    images: int
    """Separate pictures."""
    patches: int
    """Tokens of a frame."""
    parts: int
    """Equal parts of a sample with a modulation of their own: one, or one per frame where pictures have labels."""

    @property
    def tokens(self) -> int:
        """Tokens of a sample."""
        return (self.clip + self.images) * self.patches

    def running(self, blocks: Iterable[nn.Module]) -> Iterator[tuple[int, nn.Module]]:
        """The blocks that have something to do: without a clip, no temporal one."""
        return ((i, block) for i, block in enumerate(blocks) if self.clip or i % 2 == 0)

    def into(self, layer: int, x: Shaped[Tensor, "batch tokens ..."]) -> Shaped[Tensor, "rows tokens_in ..."]:
        """What a layer sees: every part, or (temporal) the clip."""
        if layer % 2:
            return x[:, : self.clip * self.patches]
        return x.reshape(len(x) * self.parts, -1, *x.shape[2:])

    def per_row(self, layer: int, x: Shaped[Tensor, "batch_t ..."]) -> Shaped[Tensor, "rows_t ..."]:
        """What is given for each sample (or one for all), for each row that a layer sees."""
        return x if layer % 2 or len(x) == 1 else x.repeat_interleave(self.parts, dim=0)

    def back(
        self, layer: int, out: Shaped[Tensor, "rows tokens_in ..."], x: Shaped[Tensor, "batch tokens ..."]
    ) -> Shaped[Tensor, "batch tokens ..."]:
        """``x`` with a layer's output in the places that it saw."""
        if layer % 2 and self.images:
            return torch.cat([out, x[:, self.clip * self.patches :]], dim=1)
        return out.reshape(x.shape)


def over_frames(x: Shaped[Tensor, "batch given ..."], clip: int) -> Shaped[Tensor, "batch frames ..."]:
    """What is given for the clip, if there is one, then for each picture: the first repeated over the clip's frames."""
    first = min(clip, 1)
    return torch.cat([x[:, :first].repeat_interleave(max(clip, 1), dim=1), x[:, first:]], dim=1)


class TimeClassEmbedding(nn.Module):
    """Timestep plus class, or the timestep alone."""

    def __init__(self, dim: int, classes: int | None) -> None:
        super().__init__()
        self.time_proj = Timesteps(TIME_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(TIME_FREQUENCIES, dim)
        self.class_embedder = LabelEmbedding(classes, dim, LABEL_DROPOUT) if classes else None

    def forward(
        self,
        timestep: Shaped[Tensor, " batch"],
        labels: Int[Tensor, "batch given"] | None,
        drop: Bool[Tensor, "batch given"] | None,
        dtype: torch.dtype,
    ) -> Float[Tensor, "batch given dim"]:
        """Without classes, ``given`` is 1. In training mode and where ``drop`` is None, a tenth of the labels are
        replaced by no class."""
        time = self.timestep_embedder(self.time_proj(timestep).to(dtype))[:, None]
        if self.class_embedder is None or labels is None:
            return time
        if drop is None:
            return time + self.class_embedder(labels.flatten()).unflatten(0, labels.shape)
        return time + self.class_embedder.embedding_table(torch.where(drop, self.class_embedder.num_classes, labels))


class ClassLatteTransformerBlock(BasicTransformerBlock):
    """DiT's block, whose attention stays within a frame, or (temporal) within a place of all frames."""

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int, *, temporal: bool) -> None:
        super().__init__(dim, num_attention_heads, attention_head_dim, norm_type="layer_norm", **BLOCK_SETTINGS)
        self.norm1 = AdaLayerNormZero(dim)
        self.attn1.set_processor(DyDiTAttnProcessor())
        self.temporal = temporal

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens dim"],
        temb: Float[Tensor, "batch dim"],
        frames: int = 1,
        positions: Float[Tensor, "1 tokens dim"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Tokens of ``frames`` frames in turn; ``positions`` are added to them first."""
        # Positions are added in here, so that a cache that skips the block skips them too.
        x = hidden_states if positions is None else hidden_states + positions
        attended, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(x, emb=temb)
        x = x + gate_msa[:, None] * self.attn1(attended, frames=frames, temporal=self.temporal)
        return x + gate_mlp[:, None] * self.ff(self.norm3(x) * (1 + scale_mlp[:, None]) + shift_mlp[:, None])


class ClassLatteTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """Latte with class labels, or without any condition but the timestep.

    Args:
        sample_size: side of the latent frames for which the table of positions is made.
        out_channels: ``in_channels`` where None; twice as many with a learned variance.
        num_layers: spatial and temporal blocks together, in turn.
        num_classes: None for an unconditional model. One more row of the table stands for no class.
        video_length: frames of a clip.

    Raises:
        ValueError: an odd number of layers.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ClassLatteTransformerBlock"]
    _repeated_blocks = ["ClassLatteTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "time_class_embed"]

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
    ) -> None:
        super().__init__()
        if num_layers % 2:
            raise ValueError(f"num_layers: expected an even number, spatial and temporal in turn; got {num_layers}")
        dim = self.inner_dim
        self.out_channels = in_channels if out_channels is None else out_channels
        self.pos_embed = PatchEmbed(
            height=sample_size, width=sample_size, patch_size=patch_size, in_channels=in_channels, embed_dim=dim
        )
        places = get_1d_sincos_pos_embed_from_grid(dim, torch.arange(video_length)[:, None], output_type="pt")
        self.register_buffer("temp_embed", places.float()[None], persistent=False)  # [1, frames, dim]
        self.temp_embed: Tensor
        self.time_class_embed = TimeClassEmbedding(dim, num_classes)
        self.transformer_blocks = nn.ModuleList(
            ClassLatteTransformerBlock(dim, num_attention_heads, attention_head_dim, temporal=i % 2 == 1)
            for i in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(dim, 2 * dim)
        self.proj_out_2 = nn.Linear(dim, patch_size * patch_size * self.out_channels)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        images: int = 0,
        drop_labels: Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The prediction, in the shape of ``hidden_states`` but for the channels.

        Args:
            hidden_states: [batch, channels, frames, height, width]: the model's ``video_length`` frames (or none), then
                the pictures; sides that are multiples of the patch.
            timestep: [batch], 0..999.
            class_labels: [batch]; or, with own labels of the pictures, [batch, 1 + images], the clip's first
                ([batch, images] without a clip). The number of classes stands for no class.
            images: how many of the last frames are separate pictures.
            drop_labels: booleans, the labels to replace by no class. None draws a tenth of them in training mode from
                torch's global generator.

        Raises:
            ValueError: shapes that do not fit the model or each other, labels that it has no classes for.
        """
        axis = self._frame_axis(hidden_states, timestep, class_labels, drop_labels, images)
        x = self._embed(hidden_states)  # [batch, tokens, dim]
        temb = self._condition(timestep, class_labels, drop_labels, axis, x.dtype)  # [batch parts, dim]
        for i, block in axis.running(self.transformer_blocks):
            inputs = self._block_inputs(i, x, temb, axis)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                out = self._gradient_checkpointing_func(block, *inputs)
            else:
                out = block(*inputs)
            x = axis.back(i, out, x)
        sample = self._unpatched(x, temb, axis, *hidden_states.shape[3:])
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @property
    def inner_dim(self) -> int:
        """Channels of a token."""
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    def _frame_axis(
        self, video: Tensor, timestep: Tensor, labels: Tensor | None, drop: Tensor | None, images: int
    ) -> FrameAxis:
        """The frame axis of checked inputs."""
        if video.ndim != 5:
            raise ValueError(
                f"hidden_states: expected [batch, channels, frames, height, width]; got {list(video.shape)}"
            )
        batch, _, frames, height, width = video.shape
        length, patch, classes = (self.config[name] for name in ("video_length", "patch_size", "num_classes"))
        if not 0 <= images <= frames or frames - images not in (0, length):
            raise ValueError(
                f"hidden_states: expected a clip of {length} frames or none, then the {images} pictures that images= "
                f"says; got {frames} frames"
            )
        if height % patch or width % patch:
            raise ValueError(
                f"hidden_states: expected sides that are multiples of the patch, {patch}; got {height} x {width}"
            )
        if timestep.shape != (batch,):
            raise ValueError(
                f"timestep: expected one for each of the {batch} samples; got shape {list(timestep.shape)}"
            )
        clip, patches = frames - images, (height // patch) * (width // patch)
        if classes is None:
            if labels is not None or drop is not None:
                raise ValueError("class_labels: this model is unconditional (num_classes is None); leave them out")
            return FrameAxis(clip, images, patches, 1)
        own = (batch, min(clip, 1) + images)
        if labels is None or labels.shape not in ((batch,), own):
            raise ValueError(
                f"class_labels: expected {[batch]}, or {list(own)} with own labels of the pictures; "
                f"got {None if labels is None else list(labels.shape)}"
            )
        if drop is not None and drop.shape != labels.shape:
            raise ValueError(f"drop_labels: expected {list(labels.shape)} as class_labels; got {list(drop.shape)}")
        return FrameAxis(clip, images, patches, 1 if labels.ndim == 1 else frames)

    def _embed(self, video: Tensor) -> Float[Tensor, "batch tokens dim"]:
        x = self.pos_embed(rearrange(video, "b c f h w -> (b f) c h w"))
        return rearrange(x, "(b f) p d -> b (f p) d", b=len(video))

    def _condition(
        self, timestep: Tensor, labels: Tensor | None, drop: Tensor | None, axis: FrameAxis, dtype: torch.dtype
    ) -> Float[Tensor, "rows dim"]:
        """What modulates each part of each sample."""
        labels, drop = (x[:, None] if x is not None and x.ndim == 1 else x for x in (labels, drop))
        temb = self.time_class_embed(timestep, labels, drop, dtype)
        return (temb if axis.parts == 1 else over_frames(temb, axis.clip)).flatten(0, 1)

    def _block_inputs(
        self, layer: int, x: Tensor, temb: Tensor, axis: FrameAxis
    ) -> tuple[Tensor, Tensor, int, Tensor | None]:
        """(tokens, modulation, frames, positions) for a block."""
        if layer % 2 == 0:
            return axis.into(layer, x), temb, (axis.clip + axis.images) // axis.parts, None
        positions = self.temp_embed.repeat_interleave(axis.patches, dim=1).to(x.dtype) if layer == 1 else None
        return axis.into(layer, x), temb[:: axis.parts], axis.clip, positions

    def _unpatched(
        self, x: Float[Tensor, "batch tokens dim"], temb: Tensor, axis: FrameAxis, height: int, width: int
    ) -> Float[Tensor, "batch channels frames height width"]:
        modulation = self.proj_out_1(F.silu(temb).unflatten(0, (len(x), -1)))  # [batch, parts, 2 dim]
        shift, scale = modulation.flatten(0, 1).chunk(2, dim=1)
        out = self.norm_out(axis.into(0, x)) * (1 + scale[:, None]) + shift[:, None]
        p = self.config["patch_size"]
        out = self.proj_out_2(out).reshape(*x.shape[:2], -1)  # [batch, tokens, patch * patch * out_channels]
        return rearrange(out, "b (f h w) (p q c) -> b c f (h p) (w q)", h=height // p, w=width // p, p=p, q=p)


TransformerBlockRegistry.register(
    ClassLatteTransformerBlock,
    TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
)
