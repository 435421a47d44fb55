"""What benchmarks/inference.py takes from the library where the library has it: token capacity, compiled execution."""

from __future__ import annotations

from typing import Any


class Skipped(Exception):
    """A variant that cannot be measured here, and why."""


def token_capacity() -> Any:
    """The class TokenCapacity.

    Raises:
        Skipped: this version has none.
    """
    try:
        from dydit_scale.dynamic.capacity import TokenCapacity
    except ImportError as error:
        raise Skipped("this version has no dydit_scale.dynamic.capacity") from error
    return TokenCapacity


def execution(model: Any, backend: str) -> Any:
    """A context in which the packed model runs compiled ("compile") or as CUDA graphs ("cudagraphs").

    Raises:
        Skipped: this version has none.
    """
    try:
        from dydit_scale.sampling.execution import Execution
    except ImportError as error:
        raise Skipped("this version has no dydit_scale.sampling.execution") from error
    return Execution(model, backend=backend)
