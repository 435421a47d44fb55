"""PixArt-Sigma: text to image by noise prediction. Model, family and a small base, as docs/cookbook.md explains them.

The model is a subclass of diffusers' PixArtTransformer2DModel with the same names for the base weights; its block is
the spatial block of Latte-1. All gates open, it computes what the static model computes, bit for bit. PixArt-Sigma:
arXiv 2403.04692.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    ModelMixin,  # noqa: F401  (diffusers looks for it here when it loads a saved pipeline)
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.cost import BlockCost, ModelCost
from dydit_scale.dynamic.masks import DynamicMasks, GateMode
from dydit_scale.dynamic.tokens import router_macs
from dydit_scale.models.base import DynamicModelMixin
from dydit_scale.models.encoders import PixelAutoencoder, small_text_encoders
from dydit_scale.models.family import (
    Family,
    Prompts,
    SampleConfig,
    SampleSize,
    scheduler_timesteps,
    to_uint8,
)
from dydit_scale.models.latte_blocks import DyLatteAttnProcessor, DyLatteTransformerBlock
from dydit_scale.models.routed import in_batch_order, timestep_embedding

COMPUTED: dict[str, tuple[Any, ...]] = {
    "norm_type": ("ada_norm_single",),
    "activation_fn": ("gelu-approximate", "gelu"),
    "attention_type": ("default",),
    "upcast_attention": (False,),
}
"""Settings of PixArtTransformer2DModel that the dynamic blocks compute; all published PixArt models have the first."""


class DyPixArtOutput(NamedTuple):
    """What a forward returns when it is asked for its masks."""

    sample: Float[Tensor, "batch channels height width"]
    masks: DynamicMasks


class DyPixArtTransformer2DModel(DynamicModelMixin, PixArtTransformer2DModel, PeftAdapterMixin, CacheMixin):
    """PixArt with timestep-wise dynamic width and spatial-wise dynamic tokens.

    Cross-attention to the text always runs whole (see :class:`DyLatteTransformerBlock`); it is 12 % of PixArt-Sigma's
    MACs at 1024 pixels.

    Args (beyond PixArtTransformer2DModel's):
        dynamic: the fields of :class:`DynamicConfig`; ``token_router`` must be ``dit``, the default here.

    Raises:
        ValueError: a config that this class does not compute, such as that of PixArt-alpha at 1024 pixels, which is
            conditioned on resolution and aspect ratio; PixArtSigmaPipeline gives neither.
    """

    static_class = PixArtTransformer2DModel
    output_class = DyPixArtOutput
    processor_class = DyLatteAttnProcessor
    token_router = "dit"
    _no_split_modules = ["DyLatteTransformerBlock", "PatchEmbed"]
    _repeated_blocks = ["DyLatteTransformerBlock"]
    _keep_in_fp32_modules = ["dy_width", "dy_token"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "adaln_single", "dy_"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = 1152,
        attention_bias: bool = True,
        sample_size: int = 128,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: int | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int | None = None,
        attention_type: str | None = "default",
        dynamic: dict[str, Any] | None = None,
    ) -> None:
        settings = {k: v for k, v in self.config.items() if k not in self.own_settings and not k.startswith("_")}
        _check_config(settings)
        super().__init__(**{**settings, "num_layers": 0})  # our blocks follow
        self.register_to_config(num_layers=num_layers)
        self.dynamic = DynamicConfig(**(dynamic or {})).for_family(self.token_router)
        _check_dynamic(self.dynamic)
        self.transformer_blocks = nn.ModuleList(
            DyLatteTransformerBlock(
                self.inner_dim,
                num_attention_heads,
                attention_head_dim,
                cross_attention_dim=cross_attention_dim,
                dropout=dropout,
                activation_fn=activation_fn,
                attention_bias=attention_bias,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
                config=self.dynamic,
            )
            for _ in range(num_layers)
        )
        self._init_dynamic(layers=num_layers, dim=self.inner_dim, heads=num_attention_heads)
        for block in self.transformer_blocks:
            block.timestep_state = self.timestep_state  # type: ignore[assignment]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        gates: GateMode = "threshold",
        collect: bool = False,
    ) -> Transformer2DModelOutput | DyPixArtOutput | tuple[Tensor]:
        """PixArtTransformer2DModel's forward (same arguments, same shapes), and:

        Args:
            hidden_states: [batch, channels, height, width].
            encoder_hidden_states: [batch, text, channels].
            timestep: [batch], as the model was trained with (0..999).
            added_cond_kwargs: not read; the pipeline passes empty ones.
            cross_attention_kwargs, attention_mask: must be None (or empty), as the pipeline leaves them.
            encoder_attention_mask: [batch, text], 1 to keep, or a bias [batch, 1, text].
            gates: "threshold" (inference), "open" (the complete model), the noise for random gates (training), or one
                sub-network for the batch (training with frozen routers).
            collect: return :class:`DyPixArtOutput` with the masks of all layers.
        """
        if attention_mask is not None or cross_attention_kwargs:
            raise ValueError("attention_mask, cross_attention_kwargs: a dynamic PixArt takes neither; leave them out")
        self._check_inputs(hidden_states, encoder_hidden_states, timestep, encoder_attention_mask)
        assert timestep is not None and encoder_hidden_states is not None, "checked above"
        steps = self._planned_steps(timestep.float(), gates, hidden_states)
        if len(steps) > 1:
            rows = list(steps.values())
            mask = encoder_attention_mask
            parts = [
                self(
                    hidden_states[r],
                    encoder_hidden_states[r],
                    timestep[r],
                    encoder_attention_mask=None if mask is None else mask[r],
                    return_dict=False,
                    collect=collect,
                )
                for r in rows
            ]
            return self._result(*in_batch_order(parts, rows), return_dict)

        step = next(iter(steps), None)
        t_emb, blocks, width = self._network_at(step, timestep.float(), gates)
        with self.timestep_state.scope(t_emb):
            x = self.pos_embed(hidden_states)  # [batch, tokens, dim]
            modulation, embedded = self.adaln_single(timestep, hidden_dtype=x.dtype)  # [batch, 6 dim], [batch, dim]
            text = encoder_hidden_states
            text = text if self.caption_projection is None else self.caption_projection(text)  # [batch, text, dim]
            state = (text, _text_bias(encoder_attention_mask, x.dtype), modulation)
            tokens: list[Tensor] = []
            for i, block in enumerate(blocks):
                settings = (t_emb, self._block_gates(i, step, width, gates), collect)
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    out = self._gradient_checkpointing_func(block, x, *state, *settings)
                else:
                    out = block(x, *state, *settings)
                x, *keep = out if collect else (out,)
                tokens.extend(keep)
            shift, scale = (self.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)  # [batch, 1, dim]
            x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)  # [batch, tokens, patch * patch * channels]
        p, height = self.config["patch_size"], hidden_states.shape[2]
        sample = rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=height // p, p=p, q=p)
        return self._result(sample, self._masks(step, width, torch.stack(tokens)) if collect else None, return_dict)

    def dynamic_blocks(self) -> list[nn.Module]:
        """The blocks in their order."""
        return list(self.transformer_blocks)

    def routing_embedding(self, timestep: Float[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """The output of the timestep embedder, computed in fp32 from timesteps in 0..999."""
        return timestep_embedding(self.adaln_single.emb, timestep)

    def cost(self, image_tokens: int, text_tokens: int = 0) -> ModelCost:
        """MACs of one forward for one sample, from shapes."""
        config, d, n, m = self.config, self.inner_dim, image_tokens, text_tokens
        text_dim, caption_dim = config["cross_attention_dim"], config["caption_channels"]
        block = BlockCost(
            fixed=0 if text_dim is None else 2 * d * d * n + 2 * text_dim * d * m + 2 * n * m * d,  # cross-attention
            router=router_macs(self.dynamic, d, n),
            heads=4 * d * d * n + 2 * n * n * d,
            groups_tokens=8 * d * d * n,
        )
        per_token = d * config["patch_size"] ** 2 * (config["in_channels"] + self.out_channels)
        caption = 0 if caption_dim is None else m * d * (caption_dim + d)
        return ModelCost(
            blocks=(block,) * config["num_layers"],
            outside=256 * d + 7 * d * d + n * per_token + caption,
        )

    def _check_inputs(self, latents: Tensor, text: Tensor | None, timestep: Tensor | None, mask: Tensor | None) -> None:
        batch, patch = len(latents), self.config["patch_size"]
        if latents.ndim != 4 or any(side % patch for side in latents.shape[2:]):
            raise ValueError(
                f"hidden_states: expected [batch, channels, height, width] with sides that are multiples of the patch, "
                f"{patch}; got {list(latents.shape)}"
            )
        wanted: list[tuple[str, Tensor | None, tuple[int, ...], str]] = [
            ("timestep", timestep, (1,), "[batch]"),
            ("encoder_hidden_states", text, (3,), "[batch, tokens, channels]"),
        ]
        if mask is not None:
            wanted.append(("encoder_attention_mask", mask, (2, 3), "[batch, tokens] or [batch, 1, tokens]"))
        for name, tensor, axes, shape in wanted:
            if tensor is None or tensor.ndim not in axes or len(tensor) != batch:
                found = None if tensor is None else list(tensor.shape)
                raise ValueError(f"{name}: expected {shape} for a batch of {batch}; got {found}")
        self._check_processors()


def _check_config(settings: dict[str, Any]) -> None:
    for name, allowed in COMPUTED.items():
        if settings[name] not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"{name}: expected {expected}, as in PixArt-Sigma; got {settings[name]!r}")
    conditions = settings["use_additional_conditions"]
    if conditions or (conditions is None and settings["sample_size"] == 128):  # as upstream reads None
        raise ValueError(
            f"use_additional_conditions: {conditions} with sample_size {settings['sample_size']} is PixArt-alpha at "
            "1024 pixels, conditioned on resolution and aspect ratio; expected False, as in PixArt-Sigma"
        )


def _check_dynamic(config: DynamicConfig) -> None:
    if config.tokens and config.token_router != "dit":
        raise ValueError(
            f"dynamic.token_router: expected 'dit'; got {config.token_router!r}, which reads text tokens beside "
            "those of the image; PixArt's text is in cross-attention only"
        )
    if config.single_bypass != "mlp":
        raise ValueError(f"dynamic.single_bypass: expected 'mlp'; {config.single_bypass!r} is for FLUX's single blocks")


def _text_bias(mask: Tensor | None, dtype: torch.dtype) -> Float[Tensor, "batch 1 1 text"] | None:
    """What is added to the scores of cross-attention: 0 for tokens to keep, -10,000 for others, as upstream."""
    if mask is None:
        return None
    bias = (1 - mask.to(dtype))[:, None] * -10000.0 if mask.ndim == 2 else mask.to(dtype)
    return bias[:, None]


class PixArtSigmaFamily(Family):
    """PixArtSigmaPipeline; the prompt goes through T5 and comes with its mask."""

    name = "pixart"
    pipeline_class = PixArtSigmaPipeline
    static_class = PixArtTransformer2DModel
    dynamic_class = DyPixArtTransformer2DModel
    objective: ClassVar = "ddpm"
    guidance_layout: ClassVar = "prompts_last"
    any_size = True

    def small_pipeline(self, words: Sequence[str], *, seed: int = 0) -> PixArtSigmaPipeline:
        """Four blocks of width 64."""
        return small_pixart_pipeline(words, seed=seed)

    def latent_shape(self, pipeline: Any, size: SampleSize) -> tuple[int, ...]:
        """[channels, rows, cols] of the autoencoder."""
        (rows, cols), config = self.token_grid(pipeline, size), pipeline.transformer.config
        return (config["in_channels"], rows * config["patch_size"], cols * config["patch_size"])

    def embed(self, pipeline: Any, captions: Sequence[str], text_tokens: int) -> dict[str, Tensor]:
        """T5's tokens with their mask, which keeps padding out of T5 and of the transformer."""
        text, mask, _, _ = pipeline.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            device=pipeline.text_encoder.device,
            max_sequence_length=text_tokens,
        )
        return {"text": text, "mask": mask}

    def text_shapes(self, config: Mapping[str, Any], text_tokens: int) -> dict[str, tuple[int, ...]]:
        """As of the encoder that the config was made for."""
        return {"text": (text_tokens, config["caption_channels"]), "mask": (text_tokens,)}

    def conditions(self, pipeline: Any, prompts: Prompts, size: SampleSize) -> dict[str, Tensor]:
        """The text and which of its tokens are padding."""
        embedded = self.embedded(pipeline, prompts)
        return {"encoder_hidden_states": embedded["text"], "encoder_attention_mask": embedded["mask"]}

    def timesteps(self, pipeline: Any, config: SampleConfig) -> Float[Tensor, " steps"]:
        """999 (noise) .. 0, as the pipeline's scheduler spaces them."""
        return scheduler_timesteps(pipeline, config.steps)

    def draw(
        self,
        pipeline: Any,
        prompts: list[str],
        noise: Tensor,
        generators: list[torch.Generator],
        config: SampleConfig,
    ) -> np.ndarray:
        """Through PixArtSigmaPipeline, whose scheduler must not ask for the learned variance."""
        pictures = pipeline(
            prompts,
            height=config.height,
            width=config.width,
            num_inference_steps=config.steps,
            guidance_scale=config.cfg,
            generator=generators,
            latents=noise.to(pipeline.text_encoder.dtype),
            clean_caption=False,
            use_resolution_binning=False,
            max_sequence_length=config.text_tokens,
            output_type="np",
        ).images
        return to_uint8(pictures)


FAMILIES = [PixArtSigmaFamily()]


def small_pixart_pipeline(
    words: Sequence[str], *, heads: int = 4, head_dim: int = 16, layers: int = 4, side: int = 32, seed: int = 0
) -> PixArtSigmaPipeline:
    """Random weights at toy size for captions of ``words``; a token is a patch of 4x4 pixels, as there is no
    autoencoder."""
    _, _, t5, t5_tokens = small_text_encoders(words, seed=seed)
    vae = PixelAutoencoder(block_out_channels=(1, 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = PixArtTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=3 * vae.scale**2,
            out_channels=2 * 3 * vae.scale**2,
            num_layers=layers,
            cross_attention_dim=heads * head_dim,
            sample_size=side // vae.scale,
            use_additional_conditions=False,
            caption_channels=t5.config.d_model,
        )
    return PixArtSigmaPipeline(
        tokenizer=t5_tokens,
        text_encoder=t5,
        vae=vae,
        transformer=transformer.eval(),
        scheduler=DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False),
    )
