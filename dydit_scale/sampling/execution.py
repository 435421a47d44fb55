"""How a packed model's steps are launched: op by op, compiled, or as CUDA graphs."""

from __future__ import annotations

import inspect
import logging
import time
from contextlib import AbstractContextManager, ExitStack
from types import NoneType, TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dydit_scale.dynamic.kernel_layout import KernelLinear
from dydit_scale.dynamic.packing import depends_on_timestep

logger = logging.getLogger(__name__)

RECOMPILE_LIMIT = 64
"""Codes of one function, after which torch runs it op by op and says so."""
GRAPH_LIMIT = 256
"""Graphs, after which further steps run op by op."""
Backend = Literal["eager", "compile", "cudagraphs"]


class Execution(AbstractContextManager["Execution"]):
    """Inside the ``with``, forwards of a packed model run by ``backend``.

    ``compile``: compiled code for each class of packed block, with the widths as variables, so that sub-networks share
    it. ``cudagraphs``: each distinct sub-network is captured when it first comes, for each shape of inputs, and
    replayed from then on; all graphs share one pool of memory and their inputs. The step is found by the timestep,
    which is read from the device once a forward; modulation is part of a graph, and not computed ahead of its step. A
    model that is packed again inside is followed.

    Raises:
        ValueError: the model is not packed, or the backend cannot run it: the compiler needs plain weights
            (``pack(..., kernel_layout=False)``); graphs need a CUDA device, no cache, and a number of tokens that is
            known before (``pack(..., capacity=...)``).
    """

    def __init__(self, model: Any, backend: Backend = "eager") -> None:
        if backend not in get_args(Backend):
            raise ValueError(f"backend: expected one of {', '.join(get_args(Backend))}; got {backend!r}")
        self.model, self.backend = model, backend
        self._check()
        self.warmup_seconds = 0.0
        """Spent on first calls: compilation and capture."""
        self.recompilations = 0
        """Codes compiled or graphs captured."""
        self.op_by_op: str | None = None
        """Why forwards of packed sub-networks ran op by op, if some did."""
        self._plan: Any = None
        self._inside = self._follows_timestep = False
        self._graphs: dict[tuple, _Graph] = {}
        self._inputs: dict[tuple, list[Any]] = {}
        self._pool: Any = None

    def _check(self) -> None:
        if self.model._plan is None:
            raise ValueError("execution: the model is not packed; call pack(model, timesteps) first")
        if self.backend == "cudagraphs":
            _check_graphs(self.model)
        blocks = self._sub_blocks()
        if self.backend == "compile" and any(isinstance(m, KernelLinear) for b in blocks for m in b.modules()):
            raise ValueError(
                "compile: the packed weights are in a layout of the CPU's kernels, which the compiler cannot read; "
                "pack with kernel_layout=False"
            )

    def __enter__(self) -> Execution:
        if self.backend == "eager":
            return self
        if self.backend == "compile":
            settings: dict[str, Any] = {
                "force_parameter_static_shapes": False,
                "capture_dynamic_output_shape_ops": True,
            }
            self._config = ExitStack()
            self._config.enter_context(torch._dynamo.config.patch(**settings, recompile_limit=RECOMPILE_LIMIT))
            # An entry of an older version of a block was found for a newer one, and gave other numbers (torch 2.13).
            self._config.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        self._plain, self._before = self.model.forward, vars(self.model).get("forward")
        self._signature = inspect.signature(self._plain)
        self.model.forward = self._forward
        self._follow()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.backend == "eager":
            return
        if self._before is None:
            del self.model.forward
        else:
            self.model.forward = self._before
        if self.backend == "compile":
            self._config.close()
            if self.op_by_op is not None:  # functions at their limit stay so, and the next one is not told
                torch._dynamo.reset()
            for block in self._sub_blocks() if self.model._plan is not None else []:
                block._compiled_call_impl = None
        self._graphs.clear()
        self._inputs.clear()

    def _sub_blocks(self) -> list[Any]:
        return list({id(block): block for row in self.model._plan.blocks for block in row}.values())

    def _follow(self) -> None:
        """Serve the model's plan of now."""
        if self.model._plan is self._plan:
            return
        self._check()
        self._plan = self.model._plan
        self._follows_timestep = depends_on_timestep(self.model)
        self._graphs.clear()
        if self.backend == "compile":
            for block in self._sub_blocks():
                block.compile(dynamic=True)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._inside or self.model._plan is None:  # the parts of a batch of several timesteps; or it was unpacked
            return self._plain(*args, **kwargs)
        self._inside = True
        try:
            self._follow()
            run = self._replayed if self.backend == "cudagraphs" else self._counted
            return run(*args, **kwargs)
        finally:
            self._inside = False

    def _counted(self, *args: Any, **kwargs: Any) -> Any:
        before, refused, start = _graph_count(), _refused_count(), time.perf_counter()
        out = self._plain(*args, **kwargs)
        if _refused_count() > refused:
            self._tell(f"more than {RECOMPILE_LIMIT} codes of a function would be needed")
        if (compiled := _graph_count() - before) > 0:
            self.recompilations += compiled
            self.warmup_seconds += time.perf_counter() - start
        return out

    def _replayed(self, *args: Any, **kwargs: Any) -> Any:
        given = self._signature.bind(*args, **kwargs).arguments
        timestep, gates = given["timestep"].float(), given.get("gates", "threshold")
        steps = self.model._planned_steps(timestep, gates, given["hidden_states"])
        leaves, form = pytree.tree_flatten(given)
        if not steps or None in steps or given.get("collect"):  # masked, which the model tells, or asked for its masks
            return self._plain(*args, **kwargs)
        others = {type(x).__name__ for x in leaves if not isinstance(x, (Tensor, bool, int, float, str, NoneType))}
        if len(steps) > 1 or others:
            self._tell(f"a {min(others)} among its arguments" if others else "a batch of several timesteps")
            return self._plain(*args, **kwargs)
        (step,) = steps
        device = given["hidden_states"].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        shapes = (form, autocast, *((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in leaves))
        key = (*self._network(step), shapes)
        if key not in self._graphs:
            if len(self._graphs) >= GRAPH_LIMIT:
                self._tell(f"more than {GRAPH_LIMIT} graphs would be needed")
                return self._plain(*args, **kwargs)
            self._graphs[key] = self._captured(step, shapes, leaves, form)
        return self._graphs[key].replay(leaves)

    def _tell(self, reason: str) -> None:
        if self.op_by_op is None:
            logger.warning("%s: a forward runs op by op: %s", self.backend, reason)
            self.op_by_op = reason

    def _network(self, step: int) -> tuple:
        """What a graph holds of a step; equal for steps that may share one."""
        counts = self._plan.tokens.counts
        # Layers outside the blocks hold TD-LoRA's experts of the step that was captured.
        own = step if self._follows_timestep else None
        return (own, *map(id, self._plan.blocks[step]), *(counts[step] if counts else ()))

    def _captured(self, step: int, shapes: tuple, leaves: list[Any], form: Any) -> _Graph:
        start = time.perf_counter()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        inputs = self._inputs.setdefault(shapes, [x.clone() if isinstance(x, Tensor) else x for x in leaves])
        arguments = pytree.tree_unflatten(inputs, form)
        with torch.cuda.device(next(self.model.parameters()).device), self.model.at_planned_step(step):
            graph = _Graph(lambda: self._plain(**arguments), inputs, leaves, self._pool)
        self.recompilations += 1
        self.warmup_seconds += time.perf_counter() - start
        return graph


class _Graph:
    """One sub-network, captured for one shape of inputs."""

    def __init__(self, forward: Any, inputs: list[Any], first: list[Any], pool: Any) -> None:
        self.inputs, self.graph = inputs, torch.cuda.CUDAGraph()
        self._fill(first)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries choose their algorithms outside the capture
                forward()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph, pool=pool):
            self.out = forward()

    def _fill(self, leaves: list[Any]) -> None:
        for ours, theirs in zip(self.inputs, leaves, strict=True):
            if isinstance(ours, Tensor):
                ours.copy_(theirs)

    def replay(self, leaves: list[Any]) -> Any:
        """The result for new inputs, in memory of its own: the next graph writes over the pool."""
        self._fill(leaves)
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


def _graph_count() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _refused_count() -> int:
    """How often the compiler did not compile a function because there are too many codes of it."""
    reasons = torch._dynamo.utils.counters["unimplemented"].items()
    return sum(count for reason, count in reasons if "recompile limit" in reason)
