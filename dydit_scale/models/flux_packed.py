"""FLUX's blocks cut to some of their heads and channels, the MLP on the chosen image tokens only; for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dydit_scale.dynamic.packing import fold, pieces
from dydit_scale.models.blocks import BlockGates, PackedBlock, ones_or
from dydit_scale.models.parts import AttentionPart, MLPPart, gated_sum, mlp_on_tokens_, modulated


class PackedFluxBlock(PackedBlock):
    """The packed double block."""

    def __init__(
        self, block: Any, attn: AttentionPart, ff: MLPPart, ff_context: MLPPart, t_emb: Float[Tensor, "1 dim"]
    ) -> None:
        super().__init__(block)
        self.norm1: Any = fold(block.norm1, t_emb)
        self.norm1_context: Any = fold(block.norm1_context, t_emb)
        self.norm2, self.norm2_context = block.norm2, block.norm2_context
        self.attn, self.ff, self.ff_context = attn, ff, ff_context

    def forward(
        self,
        hidden_states: Float[Tensor, "batch image_tokens dim"],
        encoder_hidden_states: Float[Tensor, "batch text_tokens dim"],
        temb: Float[Tensor, "batch dim"],
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        t_emb: Float[Tensor, "batch_t dim"] | None = None,
        gates: BlockGates = BlockGates(),
        collect: bool = False,
    ) -> tuple[Tensor, ...]:
        """As DyFluxTransformerBlock's."""
        modulation = self._modulation(temb, gates).chunk(12, dim=1)  # [batch, dim]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation[:6]
        c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = modulation[6:]
        image = self.attn.project(modulated(self.norm1.norm, hidden_states, shift, scale), 0)
        text = self.attn.project(modulated(self.norm1_context.norm, encoder_hidden_states, c_shift, c_scale), 1)
        qkv = [torch.cat(pair, dim=1) for pair in zip(text, image, strict=True)]
        out = _attend(self.attn, qkv, image_rotary_emb, joint_attention_kwargs)
        text_out, image_out = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        image_stream = gated_sum(hidden_states, gate, self.attn.project_out(image_out, 0))
        text_stream = gated_sum(encoder_hidden_states, c_gate, self.attn.project_out(text_out, 1))

        tokens = self._tokens(image_stream, text_stream, temb, gates, collect)
        image_stream = mlp_on_tokens_(image_stream, tokens.rows, self.ff, self.norm2, shift_mlp, scale_mlp, gate_mlp)
        mlp_on_tokens_(text_stream, None, self.ff_context, self.norm2_context, c_shift_mlp, c_scale_mlp, c_gate_mlp)
        outputs = (finite(text_stream), image_stream)
        return (*outputs, ones_or(tokens.keep, image_stream)) if collect else outputs

    @property
    def modulation(self) -> tuple[nn.Module, ...]:
        """The image's, then the text's."""
        return self.norm1.linear, self.norm1_context.linear


class PackedFluxSingleBlock(PackedBlock):
    """The packed single block: its output projection falls into an attention and an MLP part."""

    def __init__(self, block: Any, attn: AttentionPart, mlp: MLPPart, t_emb: Float[Tensor, "1 dim"]) -> None:
        super().__init__(block)
        self.norm: Any = fold(block.norm, t_emb)
        self.attn, self.mlp = attn, mlp
        self.keeps_attention = block.dynamic.single_bypass == "mlp"

    def forward(
        self,
        hidden_states: Float[Tensor, "batch image_tokens dim"],
        encoder_hidden_states: Float[Tensor, "batch text_tokens dim"],
        temb: Float[Tensor, "batch dim"],
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        t_emb: Float[Tensor, "batch_t dim"] | None = None,
        gates: BlockGates = BlockGates(),
        collect: bool = False,
    ) -> tuple[Tensor, ...]:
        """As DyFluxSingleTransformerBlock's."""
        tokens = self._tokens(hidden_states, encoder_hidden_states, temb, gates, collect)
        texts, images = encoder_hidden_states.shape[1], hidden_states.shape[1]
        stream = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, scale, gate = self._modulation(temb, gates).chunk(3, dim=1)
        x = modulated(self.norm.norm, stream, shift, scale)
        attn = _attend(self.attn, self.attn.project(x), image_rotary_emb, joint_attention_kwargs)
        if tokens.rows is None:
            stream = gated_sum(stream, gate, self.attn.project_out(attn).add_(self.mlp(x)))
        elif self.mlp.fuses:  # the attention is kept, then
            stream = gated_sum(stream, gate, self.attn.project_out(attn))
            stream = self.mlp.add_on_rows(x, _among_all(tokens.rows, len(x), texts, images), gate, stream)
        else:
            rows = _among_all(tokens.rows, len(x), texts, images)
            if self.keeps_attention:
                stream = gated_sum(stream, gate, self.attn.project_out(attn))
            for piece in pieces(rows, texts + images, in_few_sizes=self.mlp.is_laid_out):
                update = self.mlp(piece.taken(x))
                if not self.keeps_attention:
                    update = update.add_(self.attn.project_out(piece.taken(attn)))
                piece.add_(stream, update, gate)
        text, image = finite(stream).split([texts, images], dim=1)
        return (text, image, ones_or(tokens.keep, image)) if collect else (text, image)

    @property
    def modulation(self) -> tuple[nn.Module, ...]:
        """That of both streams."""
        return (self.norm.linear,)


def _attend(
    attn: AttentionPart,
    qkv: Sequence[Float[Tensor, "batch tokens heads head_dim"]],
    rotary: tuple[Tensor, Tensor] | None,
    options: dict[str, Any] | None,
) -> Float[Tensor, "batch tokens channels"]:
    if others := set(options or {}) - {"attention_mask"}:
        got = ", ".join(sorted(others))
        raise ValueError(f"joint_attention_kwargs: packed blocks take 'attention_mask'; got {got}")
    query, key, value = qkv
    if rotary is not None:
        query, key = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (query, key))
    return attn.attend(query, key, value, (options or {}).get("attention_mask"))


def _among_all(rows: Int64[Tensor, " rows"], batch: int, texts: int, images: int) -> Int64[Tensor, " all_rows"]:
    """The chosen image tokens and all text tokens, by their places among the flattened (text, image) tokens of all
    samples; not in their order."""
    start = torch.arange(batch, device=rows.device) * (texts + images)
    text = (start[:, None] + torch.arange(texts, device=rows.device)).flatten()
    return torch.cat([text, rows + (rows // images + 1) * texts])


def finite(x: Tensor) -> Tensor:
    """Within what fp16 can hold, as upstream."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
