"""What diffusers keeps for the whole process is put back after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry


@pytest.fixture(autouse=True)
def _same_attention_backend_afterwards() -> Iterator[None]:
    """``set_attention_backend`` changes the backend of every model, not of its own alone."""
    before = registry._active_backend
    yield
    registry._active_backend = before


@pytest.fixture
def unpadded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed blocks on a CPU compute chosen tokens alone, without the one to three that fill up a piece: models of a
    few tokens would spend a good share on these."""
    monkeypatch.setattr("dydit_scale.dynamic.packing.REST", 1)
