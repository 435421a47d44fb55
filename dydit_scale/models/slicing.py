"""Attention and MLP on the heads and channels that a whole batch shares, with gradients; see dynamic/slicing.py.

Where all work, nothing is cut but the graph is the same: gradients must come in one order on all ranks, whose
sub-networks differ, for ZeRO-2 lays them into buckets as they come.
"""

from __future__ import annotations

from typing import Any, TypeVar

from jaxtyping import Int64
from torch import Tensor, nn

from dydit_scale.dynamic.packing import channels_of, shallow
from dydit_scale.dynamic.slicing import IN, OUT, SlicedLayer

M = TypeVar("M", bound=nn.Module)


def sliced_block(kind: type[M], block: nn.Module, **changes: object) -> M:
    """The block again as one of ``kind``, with ``changes``; FSDP2 gives a block a class of its own, which cannot be
    copied."""
    plain = object.__new__(kind)
    plain.__dict__ = dict(block.__dict__)
    return shallow(plain, **changes)


def sliced_attention(attn: Any, heads: Int64[Tensor, " active"] | None) -> Any:
    """The attention on the given heads (None: all)."""
    channels = None if heads is None else channels_of(heads, attn.inner_dim // attn.heads)
    names = ["to_q", "to_k", "to_v"] + (["add_q_proj", "add_k_proj", "add_v_proj"] if attn.added_kv_proj_dim else [])
    changes: dict[str, Any] = {name: SlicedLayer(getattr(attn, name), channels, OUT) for name in names}
    if not attn.pre_only:
        changes["to_out"] = nn.ModuleList([SlicedLayer(attn.to_out[0], channels, IN), attn.to_out[1]])
    if attn.added_kv_proj_dim:
        changes["to_add_out"] = SlicedLayer(attn.to_add_out, channels, IN)
    return shallow(attn, heads=attn.heads if heads is None else len(heads), **changes)


def sliced_feed_forward(ff: Any, channels: Int64[Tensor, " active"] | None) -> Any:
    """diffusers' FeedForward on the given hidden channels (None: all)."""
    up, dropout, down = ff.net
    up = shallow(up, proj=SlicedLayer(up.proj, channels, OUT))
    return shallow(ff, net=nn.ModuleList([up, dropout, SlicedLayer(down, channels, IN)]))
