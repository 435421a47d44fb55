"""FLUX's blocks cut to some of their heads and channels, the MLP (as released also attention) for the chosen image
tokens only; for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dydit_scale.dynamic.packing import fold, pieces
from dydit_scale.models.blocks import BlockGates, PackedBlock, PackedTokens, ones_or
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
        self.skips_attention = block.dynamic.skips_attention

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
        if tokens.rows is not None and self.skips_attention:
            rows = _among_all(tokens.rows, len(x), texts, images).sort().values  # sample by sample
            counts = [texts + count for count in _counts(tokens, len(x), gates.capacity)]
            self._add_on_chosen_(stream, x, rows, counts, gate, image_rotary_emb, mask)
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
        stream: Float[Tensor, "batch tokens dim"],
        x: Float[Tensor, "batch tokens dim"],
        rows: Int64[Tensor, " rows"],
        counts: list[int],
        gate: Float[Tensor, "batch dim"],
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
    ) -> None:
        """Add to ``stream`` what the chosen tokens do: attention, for which they alone ask, and MLP.

        Args:
            counts: how many of the rows, which are in order, belong to each sample.
        """
        key, value = self.attn.keys_and_values(x)
        key, begin = _rotated(key, rotary), 0
        for piece in pieces(rows, x.shape[1], in_few_sizes=self.mlp.is_laid_out):
            chosen, places = piece.taken(x), piece.rows % x.shape[1]
            at = None if rotary is None else (rotary[0].to(x.device)[places], rotary[1].to(x.device)[places])
            query = _rotated(self.attn.queries(chosen)[None], at)[0]
            lengths = _lengths(counts, begin, len(query))
            attn: list[Tensor] = []
            for n, (one, where) in enumerate(zip(query.split(lengths), places.split(lengths), strict=True)):
                if lengths[n]:
                    own = slice(n, n + 1)
                    attn.append(self.attn.attend(one[None], key[own], value[own], _mask_at(mask, n, where))[0])
            if attn:
                piece.add_(stream, self.mlp(chosen).add_(self.attn.project_out(torch.cat(attn))), gate)
            begin += piece.length

    @property
    def modulation(self) -> tuple[nn.Module, ...]:
        """That of both streams."""
        return (self.norm.linear,)


def _mask_of(options: dict[str, Any] | None) -> Tensor | None:
    """The mask among ``joint_attention_kwargs``; ValueError for others."""
    if others := set(options or {}) - {"attention_mask"}:
        got = ", ".join(sorted(others))
        raise ValueError(f"joint_attention_kwargs: packed blocks take 'attention_mask'; got {got}")
    return (options or {}).get("attention_mask")


def full_mask(options: dict[str, Any] | None, batch: int, tokens: int) -> dict[str, Any] | None:
    """``joint_attention_kwargs`` with the mask, if there is one, as [batch or 1, 1, tokens or 1, tokens].

    Raises:
        ValueError: a mask that is nothing of the kind, or that tells heads apart: packed blocks have not all of them.
    """
    mask = (options or {}).get("attention_mask")
    if mask is None:
        return options
    shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if shape == [batch, tokens]:  # so the native backend reads it
        mask = mask[:, None, None]
    elif shape == [tokens, tokens]:
        mask = mask[None, None]
    whole = (batch, 1, tokens, tokens)
    if (
        not isinstance(mask, Tensor)
        or mask.ndim != 4
        or any(size not in (1, full) for size, full in zip(mask.shape, whole, strict=True))
    ):
        raise ValueError(
            f"attention_mask: packed blocks take [batch, tokens], [tokens, tokens] or [batch, 1, tokens or 1, tokens] "
            f"for {batch} samples of {tokens} tokens; got {shape}"
        )
    return {**(options or {}), "attention_mask": mask}


def _mask_at(mask: Tensor | None, sample: int, places: Int64[Tensor, " some"]) -> Tensor | None:
    """A sample's part of a full mask, for the queries at these places."""
    if mask is None:
        return None
    own = mask if len(mask) == 1 else mask[sample : sample + 1]
    return own if own.shape[2] == 1 else own.index_select(2, places)


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


def _counts(tokens: PackedTokens, batch: int, capacity: int | None) -> list[int]:
    """How many image tokens of each sample are chosen; the host asks for them only where it cannot know."""
    assert tokens.rows is not None, "all are chosen"
    if batch == 1 or capacity is not None:
        return [len(tokens.rows) // batch] * batch
    assert tokens.keep is not None, "a threshold leaves gates"
    return tokens.keep.sum(1).int().tolist()


def _lengths(counts: list[int], begin: int, length: int) -> list[int]:
    """How many of ``length`` rows from ``begin`` on belong to each sample; what fills them up to the last one's."""
    if len(counts) == 1:
        return [length]
    lengths, first = [], 0
    for count in counts:
        lengths.append(max(0, min(first + count, begin + length) - max(first, begin)))
        first += count
    filling, last = length - sum(lengths), len(lengths) - 1
    while last and not lengths[last]:
        last -= 1
    lengths[last] += filling
    return lengths


def _among_all(rows: Int64[Tensor, " rows"], batch: int, texts: int, images: int) -> Int64[Tensor, " all_rows"]:
    """The chosen image tokens and all text tokens, by their places among the flattened (text, image) tokens of all
    samples; not in their order."""
    start = torch.arange(batch, device=rows.device) * (texts + images)
    text = (start[:, None] + torch.arange(texts, device=rows.device)).flatten()
    return torch.cat([text, rows + (rows // images + 1) * texts])


def finite(x: Tensor) -> Tensor:
    """Within what fp16 can hold, as upstream."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
