"""Faults and signals that one test leaves behind must not reach the next."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from dydit_scale.parallel import faults
from dydit_scale.train.stopping import SIGNALS


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(faults, "_struck", set())
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)
