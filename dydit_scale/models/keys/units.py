"""The tables that say which routing unit a head or channel belongs to: the releases know contiguous runs only."""

from __future__ import annotations

from dydit_scale.dynamic.ranking import units_in_place
from dydit_scale.models.keys.rules import Computed, Rule


def contiguous_units(block: str, heads: int, channels: dict[str, int]) -> list[Rule]:
    """Tables of one block: a unit per head, and as many equal runs of channels (``channels``: table to its length)."""
    because = "the release has contiguous units only, so a model whose units were ranked does not fit it"
    tables = {"dy_head_unit": heads, **channels}
    return [
        Computed((), (f"{block}.{name}",), lambda members=members: units_in_place(members, heads), because)  # type: ignore[misc]
        for name, members in tables.items()
    ]
