"""FLUX's blocks cut to some of their heads and channels, the MLP on the chosen image tokens only; for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import apply_rotary_emb
from jaxtyping import Float, Int64, Shaped
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
        out = _attend(self.attn, qkv, image_rotary_emb, _mask_of(joint_attention_kwargs))
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
        mask = _mask_of(joint_attention_kwargs)
        if tokens.rows is not None and not self.keeps_attention:
            keys, values = self.attn.keys_and_values(x)
            attended = _Attended(_rotated(keys, image_rotary_emb), values, image_rotary_emb, mask)
            for n, rows in enumerate(_of_each(tokens.rows, len(x), images, gates.capacity)):
                places, one = _among_all(rows - n * images, 1, texts, images), slice(n, n + 1)
                self._add_on_chosen_(stream[one], x[one], places, gate[one], attended.of(n))
        else:
            qkv = self.attn.project(x)
            attn = self.attn.project_out(_attend(self.attn, qkv, image_rotary_emb, mask))
            if tokens.rows is None:
                stream = gated_sum(stream, gate, attn.add_(self.mlp(x)))
            else:
                rows = _among_all(tokens.rows, len(x), texts, images)
                stream = self._with_mlp(gated_sum(stream, gate, attn), x, rows, gate)
        text, image = finite(stream).split([texts, images], dim=1)
        return (text, image, ones_or(tokens.keep, image)) if collect else (text, image)

    def _with_mlp(
        self,
        stream: Float[Tensor, "batch tokens dim"],
        x: Float[Tensor, "batch tokens dim"],
        rows: Int64[Tensor, " rows"],
        gate: Float[Tensor, "batch dim"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """``stream``, which may be written over, with the gated MLP of these rows of ``x`` added."""
        if self.mlp.fuses:
            return self.mlp.add_on_rows(x, rows, gate, stream)
        for piece in pieces(rows, x.shape[1], in_few_sizes=self.mlp.is_laid_out):
            piece.add_(stream, self.mlp(piece.taken(x)), gate)
        return stream

    def _add_on_chosen_(
        self,
        stream: Float[Tensor, "1 tokens dim"],
        x: Float[Tensor, "1 tokens dim"],
        places: Int64[Tensor, " chosen"],
        gate: Float[Tensor, "1 dim"],
        attended: _Attended,
    ) -> None:
        """Add to one sample's ``stream`` what its chosen tokens do: attention, for which they alone ask, and MLP."""
        for piece in pieces(places, x.shape[1], in_few_sizes=self.mlp.is_laid_out):
            chosen = piece.taken(x)
            query = _rotated(self.attn.queries(chosen[None]), attended.rotary_at(piece.rows))
            attn = self.attn.attend(query, attended.keys, attended.values, attended.mask_at(piece.rows))
            piece.add_(stream, self.mlp(chosen).add_(self.attn.project_out(attn[0])), gate)

    @property
    def modulation(self) -> tuple[nn.Module, ...]:
        """That of both streams."""
        return (self.norm.linear,)


class _Attended(NamedTuple):
    """What some tokens of each sample attend to: all of its tokens."""

    keys: Float[Tensor, "batch tokens heads head_dim"]
    values: Float[Tensor, "batch tokens heads head_dim"]
    rotary: tuple[Tensor, Tensor] | None
    """Of all tokens; the keys have theirs."""
    mask: Shaped[Tensor, "*batch tokens_or_1 tokens"] | None

    def of(self, sample: int) -> _Attended:
        """That of one sample."""
        one = slice(sample, sample + 1)
        mask = None if self.mask is None else mask_of_samples(self.mask, [sample])
        return _Attended(self.keys[one], self.values[one], self.rotary, mask)

    def rotary_at(self, places: Int64[Tensor, " some"]) -> tuple[Tensor, Tensor] | None:
        """The rotary table of queries at these places."""
        return None if self.rotary is None else (self.rotary[0][places], self.rotary[1][places])

    def mask_at(self, places: Int64[Tensor, " some"]) -> Tensor | None:
        """The mask of queries at these places."""
        return self.mask if self.mask is None or self.mask.shape[-2] == 1 else self.mask.index_select(-2, places)


def _mask_of(options: dict[str, Any] | None) -> Tensor | None:
    """The mask among ``joint_attention_kwargs``; ValueError for others."""
    if others := set(options or {}) - {"attention_mask"}:
        got = ", ".join(sorted(others))
        raise ValueError(f"joint_attention_kwargs: packed blocks take 'attention_mask'; got {got}")
    return (options or {}).get("attention_mask")


def mask_of_samples(mask: Shaped[Tensor, "*shape"], samples: list[int]) -> Shaped[Tensor, "*shape_of_samples"]:
    """An attention mask's part for these samples of a batch; one of fewer than four dimensions is the same for all."""
    return mask if mask.ndim < 4 or len(mask) == 1 else mask[samples]


def _rotated(
    x: Float[Tensor, "batch tokens heads head_dim"], rotary: tuple[Tensor, Tensor] | None
) -> Float[Tensor, "batch tokens heads head_dim"]:
    return x if rotary is None else apply_rotary_emb(x, rotary, sequence_dim=1)


def _attend(
    attn: AttentionPart,
    qkv: Sequence[Float[Tensor, "batch tokens heads head_dim"]],
    rotary: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
) -> Float[Tensor, "batch tokens channels"]:
    query, key, value = qkv
    return attn.attend(_rotated(query, rotary), _rotated(key, rotary), value, mask)


def _of_each(
    rows: Int64[Tensor, " rows"], batch: int, images: int, capacity: int | None
) -> Sequence[Int64[Tensor, " some"]]:
    """The chosen image tokens of each sample; a fixed ``capacity`` is the same for all."""
    if batch == 1:
        return [rows]
    if capacity is not None:
        return rows.view(batch, len(rows) // batch).unbind()
    return rows.split(torch.bincount(rows // images, minlength=batch).tolist())


def _among_all(rows: Int64[Tensor, " rows"], batch: int, texts: int, images: int) -> Int64[Tensor, " all_rows"]:
    """The chosen image tokens and all text tokens, by their places among the flattened (text, image) tokens of all
    samples; not in their order."""
    start = torch.arange(batch, device=rows.device) * (texts + images)
    text = (start[:, None] + torch.arange(texts, device=rows.device)).flatten()
    return torch.cat([text, rows + (rows // images + 1) * texts])


def finite(x: Tensor) -> Tensor:
    """Within what fp16 can hold, as upstream."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
