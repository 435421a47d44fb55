"""DyDiT: the class-conditional transformer of DiT and SiT with dynamic heads, MLP channels and tokens.

A subclass of diffusers' DiTTransformer2DModel with the same parameter names for the base weights, except for the
embedder of timestep and class: diffusers keeps a copy in every block (77.8 M parameters in XL/2, where the original
has 2.8 M), here the model has one, ``time_class_embed``. All gates open, it computes what the static model computes,
bit for bit. DiT: arXiv 2212.09748, SiT: 2401.08740, DyDiT: 2410.03456.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from diffusers import DiTTransformer2DModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.cost import BlockCost, ModelCost
from dydit_scale.dynamic.masks import DynamicMasks, GateMode
from dydit_scale.dynamic.tokens import router_macs
from dydit_scale.models.base import DynamicModelMixin
from dydit_scale.models.dit_blocks import DyDiTAttnProcessor, DyDiTTransformerBlock, PackedDiTBlock
from dydit_scale.models.routed import at_full_strength, in_batch_order, timestep_embedding

TIME_FREQUENCIES = 256
"""Sinusoids of a timestep, half of them cosines."""
_IN_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.norm1\.emb\.(.+)")
_AT_ROOT = "time_class_embed."


class DiTSize(NamedTuple):
    """A published size (DiT, table 1)."""

    layers: int
    heads: int
    head_dim: int


DIT_SIZES = {"S": DiTSize(12, 6, 64), "B": DiTSize(12, 12, 64), "L": DiTSize(24, 16, 64), "XL": DiTSize(28, 16, 72)}
DIT_PATCHES = (2, 4, 8)


def dit_config(
    name: str, *, sample_size: int = 32, in_channels: int = 4, learn_sigma: bool = True, classes: int = 1000
) -> dict[str, Any]:
    """Arguments of :class:`DyDiTTransformer2DModel` for a published model, exact for the original weights.

    Args:
        name: size and patch, such as ``XL/2``; ``DiT-`` or ``SiT-`` may stand before it.
        sample_size: side of the latent picture: a picture's side / 8.
        learn_sigma: twice the channels out, the second half for the variance (all DiT; SiT at 256 px only).
    """
    size, _, patch = name.removeprefix("DiT-").removeprefix("SiT-").partition("/")
    if size not in DIT_SIZES or patch not in map(str, DIT_PATCHES):
        known = ", ".join(f"{s}/{p}" for s in DIT_SIZES for p in DIT_PATCHES)
        raise ValueError(f"dit_config: expected one of {known}; got {name!r}")
    layers, heads, head_dim = DIT_SIZES[size]
    return {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "patch_size": int(patch),
        "sample_size": sample_size,
        "in_channels": in_channels,
        "out_channels": in_channels * (2 if learn_sigma else 1),
        "num_embeds_ada_norm": classes,
        "norm_eps": 1e-6,
        "time_freq_shift": 0.0,
    }


class DyDiTOutput(NamedTuple):
    """What a forward returns when it is asked for its masks."""

    sample: Float[Tensor, "batch channels side side"]
    masks: DynamicMasks


class DyDiTTransformer2DModel(DynamicModelMixin, DiTTransformer2DModel, PeftAdapterMixin, AttentionMixin, CacheMixin):
    """DiT with timestep-wise dynamic width and spatial-wise dynamic tokens.

    ``from_static`` and ``from_pretrained`` take the first block's embedder for all, and refuse with ValueError a model
    whose blocks hold different ones (one trained from scratch with diffusers' class; the published ones are equal).
    ``to_static`` gives every block but the first its own copy.

    Args (beyond DiTTransformer2DModel's):
        time_freq_shift: 1 is built into diffusers' class; the published weights of DiT and SiT were trained with 0
            (and ``norm_eps=1e-6``), and compute the original's output only so.
        dynamic: the fields of :class:`DynamicConfig`; the token router is ``dit``.
    """

    static_class = DiTTransformer2DModel
    output_class = DyDiTOutput
    processor_class = DyDiTAttnProcessor
    token_router = "dit"
    own_settings = ("dynamic", "time_freq_shift")
    _no_split_modules = ["DyDiTTransformerBlock"]
    _repeated_blocks = ["DyDiTTransformerBlock"]
    _supports_group_offloading = True  # unlike the static class, it reads no weight but in that layer's forward
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
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        time_freq_shift: float = 1.0,
        dynamic: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=0,  # ours follow
            dropout=dropout,
            norm_num_groups=norm_num_groups,
            attention_bias=attention_bias,
            sample_size=sample_size,
            patch_size=patch_size,
            activation_fn=activation_fn,
            num_embeds_ada_norm=num_embeds_ada_norm,
            upcast_attention=upcast_attention,
            norm_type=norm_type,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
        )
        self.register_to_config(num_layers=num_layers)
        self.dynamic = DynamicConfig(**(dynamic or {})).for_family(self.token_router)
        if self.dynamic.token_router != self.token_router:
            raise ValueError(
                f"dynamic.token_router: {self.dynamic.token_router!r} reads text tokens, which a class-conditional "
                f"model has not; choose {self.token_router!r}"
            )
        self.time_class_embed = CombinedTimestepLabelEmbeddings(num_embeds_ada_norm, self.inner_dim)
        self.time_class_embed.time_proj = Timesteps(
            TIME_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=time_freq_shift
        )
        self.transformer_blocks = nn.ModuleList(
            DyDiTTransformerBlock(
                self.inner_dim,
                num_attention_heads,
                attention_head_dim,
                dropout=dropout,
                activation_fn=activation_fn,
                attention_bias=attention_bias,
                upcast_attention=upcast_attention,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
                config=self.dynamic,
            )
            for _ in range(num_layers)
        )
        self._init_dynamic(layers=num_layers, dim=self.inner_dim, heads=num_attention_heads)
        for block in self.transformer_blocks:
            block.timestep_state = self.timestep_state  # type: ignore[assignment]

    @at_full_strength("cross_attention_kwargs")
    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor = None,  # type: ignore[assignment]
        class_labels: Tensor = None,  # type: ignore[assignment]
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        gates: GateMode = "threshold",
        collect: bool = False,
        drop_labels: Bool[Tensor, " batch"] | None = None,
    ) -> Transformer2DModelOutput | DyDiTOutput | tuple[Tensor]:
        """DiTTransformer2DModel's forward (same arguments, same shapes), and:

        Args:
            hidden_states: [batch, channels, side, side]; any side that is a multiple of the patch.
            timestep: [batch] or [1]; 0..999 for DiT, 0 (noise) .. 1 (data) for SiT, integers or fp32.
            class_labels: [batch]; the number of classes stands for no class.
            gates: "threshold" (inference), "open" (the complete model), the noise for random gates (training), or one
                sub-network for the batch (training with frozen routers).
            collect: return :class:`DyDiTOutput` with the masks of all layers.
            drop_labels: the labels to replace by no class. None draws a tenth of them in training mode from torch's
                global generator, once per forward (the static class draws anew in every block).
        """
        self._check_processors()
        self._check_side(hidden_states)
        steps = self._planned_steps(timestep.float(), gates, hidden_states)
        if len(steps) > 1:
            rows = list(steps.values())
            parts = [
                self(
                    hidden_states[r],
                    timestep[r],
                    class_labels[r],
                    cross_attention_kwargs=cross_attention_kwargs,
                    return_dict=False,
                    collect=collect,
                    drop_labels=None if drop_labels is None else drop_labels[r],
                )
                for r in rows
            ]
            return self._result(*in_batch_order(parts, rows), return_dict)

        step = next(iter(steps), None)
        t_emb, blocks, width = self._network_at(step, timestep.float(), gates)
        side = hidden_states.shape[-1] // self.patch_size
        with self.timestep_state.scope(t_emb):
            hidden_states = self.pos_embed(hidden_states)  # [batch, tokens, dim]
            temb = self._condition(timestep, class_labels, drop_labels, hidden_states.dtype)  # [batch, dim]
            ahead = self._modulations(
                step,
                timestep,
                (class_labels, drop_labels),
                temb,
                lambda t: self._condition(t, class_labels, drop_labels, temb.dtype),
            )
            tokens: list[Tensor] = []
            for i, block in enumerate(blocks):
                options = (t_emb, self._block_gates(i, step, width, gates, ahead), collect)
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    out = self._gradient_checkpointing_func(
                        block, hidden_states, temb, cross_attention_kwargs, *options
                    )
                else:
                    out = block(hidden_states, temb, cross_attention_kwargs, *options)
                if collect:
                    hidden_states, keep = out
                    tokens.append(keep)
                else:
                    hidden_states = out
            shift, scale = self.proj_out_1(F.silu(temb)).chunk(2, dim=1)
            hidden_states = self.norm_out(hidden_states) * (1 + scale[:, None]) + shift[:, None]
            hidden_states = self.proj_out_2(hidden_states)  # [batch, tokens, patch * patch * out_channels]
        p = self.patch_size
        sample = rearrange(hidden_states, "b (h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=p, q=p)
        return self._result(sample, self._masks(step, width, torch.stack(tokens)) if collect else None, return_dict)

    def dynamic_blocks(self) -> list[nn.Module]:
        """The blocks in their order."""
        return list(self.transformer_blocks)

    def routing_embedding(self, timestep: Float[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """The output of the timestep embedder alone, without the class, computed in fp32."""
        return timestep_embedding(self.time_class_embed, timestep)

    def cost(self, image_tokens: int, text_tokens: int = 0) -> ModelCost:
        """MACs of one forward for one sample, from shapes; ``text_tokens`` must be 0."""
        if text_tokens:
            raise ValueError(f"cost: a class-conditional model has no text tokens; got {text_tokens}")
        d, n, config = self.inner_dim, image_tokens, self.config
        f = 4 * d
        block = BlockCost(
            fixed=6 * d * d,
            router=router_macs(self.dynamic, d, n),
            heads=4 * d * d * n + 2 * n * n * d,
            groups_tokens=2 * d * f * n,
        )
        patch = config["patch_size"] ** 2 * (config["in_channels"] + self.out_channels)
        return ModelCost(
            blocks=(block,) * config["num_layers"],
            outside=TIME_FREQUENCIES * d + d * d + 2 * d * d + n * d * patch,
        )

    def to_static(self) -> ModelMixin:
        """The static model with the same tensors, and copies of the embedder; routers stay behind.

        Raises:
            ValueError: ``time_freq_shift`` is not 1: diffusers' class would compute something else.
        """
        if (shift := self.config["time_freq_shift"]) != 1:
            raise ValueError(
                f"to_static: time_freq_shift is {shift}, but DiTTransformer2DModel always computes with 1, so its "
                'outputs would differ; gates="open" runs the complete model here'
            )
        return super().to_static()

    @classmethod
    def _own_names(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return with_one_embedder(state)

    def _static_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return with_embedder_per_block(state, len(self.transformer_blocks))

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, Tensor]) -> None:
        super()._fix_state_dict_keys_on_load(state_dict)
        ours = with_one_embedder(state_dict)
        state_dict.clear()
        state_dict.update(ours)

    @classmethod
    def _load_pretrained_model(
        cls, model: Any, state_dict: Any, files: Any, name: Any, loaded_keys: list[str], *args: Any, **kwargs: Any
    ) -> Any:
        if any(map(_IN_BLOCK.fullmatch, loaded_keys)):  # diffusers maps no names of a checkpoint in several files
            raise ValueError(
                f"{name}: a static checkpoint in several files; load it with DiTTransformer2DModel.from_pretrained "
                f"and make it dynamic with {cls.__name__}.from_static"
            )
        return super()._load_pretrained_model(model, state_dict, files, name, loaded_keys, *args, **kwargs)

    def _condition(
        self, timestep: Tensor, class_labels: Tensor, drop_labels: Tensor | None, dtype: torch.dtype
    ) -> Float[Tensor, "batch dim"]:
        """Timestep plus class embedding."""
        embed = self.time_class_embed
        if drop_labels is None:
            return embed(timestep, class_labels, hidden_dtype=dtype)
        classes = embed.class_embedder
        labels = torch.where(drop_labels, classes.num_classes, class_labels)
        return embed.timestep_embedder(embed.time_proj(timestep).to(dtype)) + classes.embedding_table(labels)

    def _check_side(self, hidden_states: Tensor) -> None:
        height, width = hidden_states.shape[-2:]
        if height != width or height % self.patch_size:
            raise ValueError(
                f"hidden_states: expected a square whose side is a multiple of the patch, {self.patch_size}; "
                f"got {height} x {width}"
            )


def with_one_embedder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names -> ours: the blocks' equal embedders become ``time_class_embed``.

    Raises:
        ValueError: the embedders of two blocks differ.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if (match := _IN_BLOCK.fullmatch(name)) is None:
            ours[name] = tensor
            continue
        first = ours.setdefault(_AT_ROOT + match[2], tensor)
        if first is not tensor and not first.is_meta and not torch.equal(first, tensor):
            raise ValueError(
                f"{name} differs from another block's: a dynamic DiT has one embedder of timestep and class for all "
                "blocks, as the published models have; train a new one from DyDiTTransformer2DModel itself"
            )
    return ours


def with_embedder_per_block(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The inverse of :func:`with_one_embedder`: block 0 gets the tensors themselves, the others copies."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(_AT_ROOT):
            theirs[name] = tensor
            continue
        leaf = name.removeprefix(_AT_ROOT)
        for i in range(layers):
            own = tensor if i == 0 else nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
            theirs[f"transformer_blocks.{i}.norm1.emb.{leaf}"] = own
    return theirs


for _block in (DyDiTTransformerBlock, PackedDiTBlock):
    TransformerBlockRegistry.register(
        _block, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
    )
