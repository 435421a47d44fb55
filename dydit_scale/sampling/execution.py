"""How a packed model's steps are launched: op by op, compiled, or as one CUDA graph for each step."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dydit_scale.dynamic.kernel_layout import KernelLinear

RECOMPILE_LIMIT = 64
"""Codes of one function, after which torch runs it op by op and says so."""
Backend = Literal["eager", "compile", "cudagraphs"]


class Execution(AbstractContextManager["Execution"]):
    """Inside the ``with``, forwards of a packed model run by ``backend``.

    ``compile``: compiled code for each class of packed block, with the widths as variables, so that sub-networks share
    it. ``cudagraphs``: each step is captured when it first comes, for each shape of inputs, and replayed from then on;
    all graphs share one pool of memory.

    Raises:
        ValueError: the model is not packed, or the backend cannot run it: the compiler needs plain weights
            (``pack(..., kernel_layout=False)``); graphs need a CUDA device, no cache, and a number of tokens that is
            known before (``pack(..., capacity=...)``).
    """

    def __init__(self, model: Any, backend: Backend = "eager") -> None:
        if backend not in get_args(Backend):
            raise ValueError(f"backend: expected one of {', '.join(get_args(Backend))}; got {backend!r}")
        if model._plan is None:
            raise ValueError("execution: the model is not packed; call pack(model, timesteps) first")
        self.model, self.backend = model, backend
        if backend == "cudagraphs":
            _check_graphs(model)
        if backend == "compile" and any(isinstance(m, KernelLinear) for b in self._sub_blocks() for m in b.modules()):
            raise ValueError(
                "compile: the packed weights are in a layout of the CPU's kernels, which the compiler cannot read; "
                "pack with kernel_layout=False"
            )
        self.warmup_seconds = 0.0
        """Spent on first calls: compilation and capture."""
        self.recompilations = 0
        """Codes compiled or graphs captured."""
        self._graphs: dict[tuple, _Graph] = {}
        self._pool: Any = None

    def __enter__(self) -> Execution:
        if self.backend == "compile":
            for block in self._sub_blocks():
                block.compile(dynamic=True)
            self._config = torch._dynamo.config.patch(
                force_parameter_static_shapes=False, capture_dynamic_output_shape_ops=True, recompile_limit=64
            )
            self._config.__enter__()
        if self.backend != "eager":
            self._plain = self.model.forward
            self.model.forward = self._replayed if self.backend == "cudagraphs" else self._counted
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.backend == "compile":
            self._config.__exit__(kind, error, trace)
            for block in self._sub_blocks():
                block._compiled_call_impl = None
        if self.backend != "eager":
            del self.model.forward
        self._graphs.clear()

    def _sub_blocks(self) -> list[Any]:
        return list({id(block): block for row in self.model._plan.blocks for block in row}.values())

    def _counted(self, *args: Any, **kwargs: Any) -> Any:
        before, start = _graph_count(), time.perf_counter()
        out = self._plain(*args, **kwargs)
        if (compiled := _graph_count() - before) > 0:
            self.recompilations += compiled
            self.warmup_seconds += time.perf_counter() - start
        return out

    def _replayed(self, *args: Any, **kwargs: Any) -> Any:
        steps = self.model._planned_steps(kwargs["timestep"].float())
        if torch.is_grad_enabled() or len(steps) != 1 or None in steps or kwargs.get("collect"):
            return self._plain(*args, **kwargs)
        (step,) = steps
        key = (step, *(_signature(x) for x in args), *((name, _signature(x)) for name, x in sorted(kwargs.items())))
        if key not in self._graphs:
            start = time.perf_counter()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[key] = _Graph(self.model, self._plain, step, args, kwargs, self._pool)
            self.recompilations += 1
            self.warmup_seconds += time.perf_counter() - start
        return self._graphs[key].replay(args, kwargs)


class _Graph:
    """One step, captured for one shape of inputs."""

    def __init__(self, model: Any, forward: Any, step: int, args: tuple, kwargs: dict[str, Any], pool: Any) -> None:
        self.args = tuple(_buffer(x) for x in args)
        self.kwargs = {name: _buffer(x) for name, x in kwargs.items()}
        self.graph = torch.cuda.CUDAGraph()
        object.__setattr__(model, "_fixed_step", step)
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # libraries choose their algorithms outside the capture
                    forward(*self.args, **self.kwargs)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graph, pool=pool):
                self.out = forward(*self.args, **self.kwargs)
        finally:
            object.__setattr__(model, "_fixed_step", None)

    def replay(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result for new inputs, in memory of its own: the next graph writes over the pool."""
        for ours, theirs in zip((*self.args, *self.kwargs.values()), (*args, *kwargs.values()), strict=True):
            if isinstance(ours, Tensor):
                ours.copy_(theirs)
        self.graph.replay()
        if isinstance(self.out, tuple):
            return tuple(x.clone() for x in self.out)
        return type(self.out)(sample=self.out.sample.clone())


def _check_graphs(model: Any) -> None:
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"cudagraphs: expected a model on a CUDA device; it is on {device}")
    if model.is_cache_enabled:
        raise ValueError("cudagraphs: a cache decides at run time which blocks run; use it with backend='compile'")
    if model.dynamic.tokens and model._plan.tokens.counts is None:
        raise ValueError(
            "cudagraphs: tokens above a threshold are counted at run time; pack with "
            "capacity=TokenCapacity.from_masks(...)"
        )


def _signature(x: Any) -> Any:
    return (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else repr(x)


def _buffer(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def _graph_count() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
