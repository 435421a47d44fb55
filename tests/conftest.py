"""Settings of every test run: few threads, no network, checked shapes, skipped GPU tests where there is no GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

# Before torch and the Hugging Face libraries are imported, since they read these once; child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from jaxtyping import install_import_hook

CHECKED_PACKAGES = ("dydit_scale.dynamic", "dydit_scale.diffusion", "dydit_scale.models")

_too_early = sorted(name for name in sys.modules if name.startswith(CHECKED_PACKAGES))
assert not _too_early, f"imported before the shape checks were installed: {_too_early}"
install_import_hook(CHECKED_PACKAGES, "beartype.beartype")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


_LINEAR = torch.nn.functional.linear


@pytest.fixture(autouse=True)
def _own_linear() -> Iterator[None]:
    """ZeRO-3 puts another in its place, for all models of the process, which rounds in another order."""
    yield
    torch.nn.functional.linear = _LINEAR


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
