"""Everything around the transformer that turns captions and pictures into tensors, and small stand-ins for it.

The real ones (T5, CLIP, AutoencoderKL) come from transformers and diffusers. The small ones are the same classes at toy
sizes with fixed random weights, and an exact pixel autoencoder, so that a whole FluxPipeline fits into a megabyte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from einops import rearrange
from jaxtyping import Float
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel


class PixelAutoencoder(ModelMixin, ConfigMixin):
    """Space-to-depth in place of a learned autoencoder: exact, without parameters, for pictures too small to compress.

    Speaks AutoencoderKL's language: ``encode(x).latent_dist`` and ``decode(z).sample``; pixels in [-1, 1] become
    ``3 * scale**2`` channels, where ``scale = 2 ** (len(block_out_channels) - 1)`` as in the pipelines of diffusers.
    ``shift_factor`` and ``scaling_factor`` standardise the latents as FLUX's do.
    """

    @register_to_config
    def __init__(
        self, block_out_channels: Sequence[int] = (1, 1), shift_factor: float = 0.0, scaling_factor: float = 1.0
    ) -> None:
        super().__init__()
        self.scale = 2 ** (len(block_out_channels) - 1)
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)  # gives the module a dtype and a device

    def encode(
        self, x: Float[Tensor, "batch 3 height width"], return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The picture as a distribution of no width over latents [batch, 3 * scale**2, height / scale, width /
        scale]."""
        s = self.scale
        mean = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=s, q=s)
        latent_dist = DiagonalGaussianDistribution(torch.cat([mean, mean], dim=1), deterministic=True)
        return AutoencoderKLOutput(latent_dist=latent_dist) if return_dict else (latent_dist,)

    def decode(
        self, z: Float[Tensor, "batch channels rows cols"], return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """The inverse of :meth:`encode`."""
        s = self.scale
        sample = rearrange(z, "b (c p q) h w -> b c (h p) (w q)", p=s, q=s)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


class Posterior(NamedTuple):
    """The autoencoder's distribution over latents, before they are shifted and scaled."""

    mean: Float[Tensor, "*batch channels rows cols"]
    std: Float[Tensor, "*batch channels rows cols"] | None
    """None where the distribution has no width."""


def posterior_of(vae: AutoencoderKL | PixelAutoencoder, pixels: Float[Tensor, "batch 3 height width"]) -> Posterior:
    """What the encoder makes of pictures, in its own dtype."""
    (latents,) = vae.encode(pixels.to(vae.dtype), return_dict=False)
    return Posterior(latents.mean, None if latents.deterministic else latents.std)


def draw_latents(vae: AutoencoderKL | PixelAutoencoder, posterior: Posterior, noise: Tensor) -> Tensor:
    """Latents in fp32 as the transformer sees them: drawn by unit Gaussian ``noise`` of their shape, then shifted and
    scaled (FLUX: ``(z - 0.1159) * 0.3611``)."""
    z = posterior.mean.float()
    if posterior.std is not None:
        z = z + posterior.std.float() * noise
    return (z - (vae.config["shift_factor"] or 0.0)) * vae.config["scaling_factor"]


def pack_latents(z: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch tokens dim"]:
    """FLUX's tokens: 2x2 neighbours side by side, row by row."""
    return rearrange(z, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def image_ids(rows: int, cols: int) -> Float[Tensor, "tokens 3"]:
    """Positions (0, row, column) of ``rows`` x ``cols`` tokens."""
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, col], dim=-1).reshape(-1, 3).float()


def small_text_encoders(
    words: Sequence[str], *, dim: int = 64, length: int = 16, seed: int = 0
) -> tuple[CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel, PreTrainedTokenizerFast]:
    """Toy CLIP and T5 with fixed random weights over a closed vocabulary of whole words.

    T5's relative attention biases are drawn wide, so that each head looks at one or two fixed offsets: a token's
    embedding then says what stands beside it, which a bag of words ("red circle, blue square") would not.
    """
    clip_tokens = _word_tokenizer(words, length, "<s> $A </s>")
    t5_tokens = _word_tokenizer(words, length, "$A </s>")
    special = {"pad_token_id": clip_tokens.pad_token_id, "eos_token_id": clip_tokens.eos_token_id}
    vocab = {"vocab_size": len(clip_tokens), **special}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=dim,
                intermediate_size=2 * dim,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=length,
                bos_token_id=clip_tokens.bos_token_id,
                initializer_factor=2.0,
                **vocab,
            )
        )
        t5 = T5EncoderModel(
            T5Config(d_model=dim, d_kv=8, d_ff=2 * dim, num_layers=2, num_heads=8, is_encoder_decoder=False, **vocab)
        )
        for name, parameter in t5.named_parameters():
            if "relative_attention_bias" in name:
                nn.init.normal_(parameter, std=4.0)
    return clip.eval().requires_grad_(False), clip_tokens, t5.eval().requires_grad_(False), t5_tokens


def _word_tokenizer(words: Sequence[str], length: int, template: str) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    vocab = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, vocab[t]) for t in ("<s>", "</s>") if t in template]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
