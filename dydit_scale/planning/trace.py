"""One training step, run on tensors without contents: what it allocates, block by block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge

from dydit_scale.dynamic.losses import cost_loss
from dydit_scale.dynamic.masks import GateNoise
from dydit_scale.models.encoders import posterior_of
from dydit_scale.models.family import Prompts
from dydit_scale.planning.allocations import Allocations, CudaAutocast
from dydit_scale.planning.bases import Base
from dydit_scale.planning.network import Place, Planned, stand_in
from dydit_scale.train.build import frozen_dtype, shard_units
from dydit_scale.train.objective import Inputs, Objective, make_process, sample_size
from dydit_scale.train.recipe import Recipe
from dydit_scale.train.recompute import checkpoint_function


class Point(NamedTuple):
    """A high-water mark within a segment, beyond what there was at its start."""

    activations: int
    """Bytes of all that is no gradient of a parameter, or not yet."""
    gradients: int
    """Bytes of the gradients of parameters that were complete by then."""


class Segment(NamedTuple):
    """A stretch of a step between the borders of two blocks."""

    unit: int | None
    """Number of the block; None outside blocks."""
    backward: bool
    points: tuple[Point, ...]
    net: int
    """Bytes of activations that it leaves behind, or (negative) frees."""
    gradients: int
    """Bytes of the gradients that it completes."""
    freed: Mapping[int, int]
    """Bytes that it frees, by the number of the segment that made them."""


def trace_step(recipe: Recipe, base: Base, micro_batch: int, *, gpu: bool) -> list[Segment]:
    """The segments of forward and backward of one micro-batch, weights and kept gradients left out.

    The network runs with as few blocks as show what the first, a middle and the last one need; those of the middle are
    then repeated, so that a deep network takes no longer than a shallow one.

    Args:
        gpu: Cast under autocast as on a GPU.
    """
    planned = Planned.build(recipe, base, shallow=True)
    rows = micro_batch * (2 if recipe.supervision.guidance > 1 else 1)  # each follows again without its prompt
    conditions = _conditions(recipe, planned, rows)
    recorder = _Recorder()
    with _fake(planned) as network, recorder.mode:
        for tensor in (*network.parameters(), *network.buffers()):
            recorder.mode.ignore(tensor)
        teacher = planned.teacher
        if teacher is not None:
            for tensor in (*teacher.parameters(), *teacher.buffers()):
                recorder.mode.ignore(tensor)
        casts = CudaAutocast(gpu)
        with casts:
            inputs = _inputs(recipe, planned, rows, conditions)
        _run(recipe, planned, inputs, micro_batch, recorder, casts)
    return _repeated(recorder.segments, planned.places)


def trace_encoding(recipe: Recipe, base: Base, micro_batch: int, *, gpu: bool) -> int:
    """Bytes that the autoencoder allocates at most while it encodes the pictures of a micro-batch."""
    vae, data, high = base.make_vae().requires_grad_(False), recipe.data, 0

    def grown(live: int) -> None:
        nonlocal high
        high = max(high, live)

    allocations = Allocations(grown, lambda era, size: None)
    side = data.image_size
    for parameter in vae.parameters():
        parameter.data = parameter.data.to(frozen_dtype(recipe))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        _without_contents(vae)
        for parameter in vae.parameters():
            allocations.ignore(parameter)
        with allocations, CudaAutocast(gpu), _autocast(recipe):
            posterior_of(vae, torch.empty(micro_batch * (data.frames + data.images_per_clip), 3, side, side))
    return high


def _autocast(recipe: Recipe) -> AbstractContextManager[Any]:
    bf16 = recipe.engine.precision == "bf16"
    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()


def _run(
    recipe: Recipe, planned: Planned, inputs: Inputs, micro_batch: int, recorder: _Recorder, casts: CudaAutocast
) -> None:
    network, train = planned.network, recipe.train
    network.train()
    units = shard_units(network)
    if train.gradient_checkpointing != "none":
        carry = recipe.dynamic is None and recipe.adapter.kind == "td_lora"
        function = checkpoint_function(
            network, units, train.gradient_checkpointing, train.checkpointed_blocks, carry_timestep=carry
        )
        network.enable_gradient_checkpointing(function)
    recorder.watch(network, units)
    pipeline = stand_in(planned.base, network)
    objective = _Objective(recipe, network, pipeline, None, torch.device("cpu"))
    objective.teacher = planned.teacher
    with casts, _autocast(recipe):
        terms = objective.terms(network, inputs, torch.empty(micro_batch, device="meta"), 0)
        loss = terms.flow.mean() + terms.supervision.mean() + cost_loss(terms.ratio.mean(), 1.0)
        del terms
    recorder.enter(None, backward=True)
    edge = get_gradient_edge(loss)
    del loss, inputs
    with casts:
        torch.autograd.backward(edge)  # of a tensor it would switch function modes off
    recorder.close()


class _Objective(Objective):
    """The objective of training; its noise is made without a loop over positions, which have no values here."""

    def gate_noise(self, positions: Tensor, size: Any) -> Any:
        blocks, heads = len(self.network.dynamic_blocks()), self.network.config["num_attention_heads"]
        groups = self.network.dynamic.mlp_groups or heads
        tokens = self.family.image_tokens(self.pipeline, size)
        return GateNoise(*(torch.rand(blocks, len(positions), n) for n in (heads, groups, tokens)))


def _inputs(recipe: Recipe, planned: Planned, rows: int, conditions: Mapping[str, Any]) -> Inputs:
    """A micro-batch as ``Objective.prepare`` makes it, of ``rows`` samples."""
    family, size = planned.base.family, sample_size(recipe)
    x0 = family.pack(torch.randn(rows, *family.latent_shape(stand_in(planned.base, planned.network), size)))
    noise = torch.randn_like(x0)
    process = make_process(recipe, family)
    level = process.training_levels(torch.rand(rows))
    noisy = process.noisy(x0, noise, level)
    copies = {name: torch.empty_like(c) if isinstance(c, Tensor) else c for name, c in conditions.items()}
    arguments = {"hidden_states": noisy, "timestep": process.timestep(level), **copies}
    return Inputs(x0, noise, noisy, level, arguments, size, recipe.model.text_tokens)


def _conditions(recipe: Recipe, planned: Planned, rows: int) -> dict[str, Any]:
    """The transformer's other arguments, of zeros: families look into labels, which must have contents."""
    family, images = planned.base.family, recipe.data.images_per_clip
    pictures = [[""] * images for _ in range(rows)] if images else []
    shapes = family.text_shapes(planned.network.config, recipe.model.text_tokens)
    dtype = frozen_dtype(recipe)
    text = {name: torch.zeros(rows * (1 + images), *shape, dtype=dtype) for name, shape in shapes.items()}
    prompts = Prompts(
        captions=[""] * rows,
        labels=torch.zeros(rows, dtype=torch.long),
        picture_captions=pictures,
        picture_labels=torch.zeros(rows, images, dtype=torch.long) if images else None,
        text_tokens=recipe.model.text_tokens,
        text=text or None,
    )
    return family.conditions(stand_in(planned.base, planned.network), prompts, sample_size(recipe))


@contextmanager
def _fake(planned: Planned) -> Iterator[Any]:
    """Inside, the network (and its teacher) has CPU tensors without contents."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (planned.network, planned.teacher):
            if module is not None:
                _without_contents(module)
        yield planned.network


def _without_contents(module: nn.Module) -> None:
    made: dict[int, Any] = {}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                fake = torch.empty_like(parameter, device="cpu")
                again = made.setdefault(id(parameter), nn.Parameter(fake, requires_grad=parameter.requires_grad))
                part._parameters[name] = again
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device="cpu")


class _Recorder:
    """Cuts a step in segments at the borders of blocks."""

    def __init__(self) -> None:
        self.mode = Allocations(self._grown, self._freed)
        self.segments: list[Segment] = []
        self._unit: int | None = None
        self._backward = False
        self._start, self._gradients = 0, 0
        self._points: dict[int, int] = {}
        self._gone: dict[int, int] = defaultdict(int)

    def watch(self, network: nn.Module, units: Sequence[nn.Module]) -> None:
        """Segments begin where these blocks do."""
        for number, unit in enumerate(units):
            unit.register_forward_pre_hook(self._entering(number))
            unit.register_forward_hook(self._leaving(number))
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._completed)

    def enter(self, unit: int | None, *, backward: bool) -> None:
        """Another segment begins."""
        if (unit, backward) != (self._unit, self._backward):
            self._cut()
            self._unit, self._backward = unit, backward

    def close(self) -> None:
        """The last one ends."""
        self._cut()

    def _cut(self) -> None:
        points = tuple(Point(high - self._start, done) for done, high in sorted(self._points.items()))
        net = self.mode.live - self._start
        self.segments.append(Segment(self._unit, self._backward, points, net, self._gradients, self._gone))
        self._start, self._gradients, self._points = self.mode.live, 0, {}
        self._gone = defaultdict(int)
        self.mode.era = len(self.segments)

    def _grown(self, live: int) -> None:
        self._points[self._gradients] = max(live, self._points.get(self._gradients, 0))

    def _freed(self, era: int, size: int) -> None:
        self._gone[era] += size

    def _completed(self, parameter: Tensor) -> None:
        assert parameter.grad is not None, "the hook runs when there is a gradient"
        self._gradients += parameter.grad.nbytes
        parameter.grad = None

    def _entering(self, unit: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not self._backward:  # else it is computed a second time
                self.enter(unit, backward=False)

        return hook

    def _leaving(self, unit: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if self._backward:
                return
            for tensor in output if isinstance(output, tuple) else (output,):
                if tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(lambda _: self.enter(unit, backward=True))

        return hook


def _repeated(segments: Sequence[Segment], places: Sequence[Place]) -> list[Segment]:
    """Those of the whole depth.

    What all blocks in the middle made and a segment elsewhere frees at once (the weights that autocast keeps in bf16)
    was made by as many blocks as they stand for.
    """
    where = [None if s.unit is None else places[s.unit] for s in segments]
    times = [place.times if place is not None and place.is_middle else 1 for place in where]
    parts = [0 if place is None else place.part for place in where]
    out: list[Segment] = []
    for repeats, numbers in groupby(range(len(segments)), lambda n: times[n]):
        run = []
        for n in numbers:
            segment, place = segments[n], where[n]
            more = _freed_together(segment, times, parts) if repeats == 1 else 0
            run.append(segment._replace(unit=None if place is None else place.number, net=segment.net - more))
        out += run * repeats
    return out


def _freed_together(segment: Segment, times: Sequence[int], parts: Sequence[int]) -> int:
    """Bytes that it would free beyond what it did, if blocks in the middle were there as often as ``times`` says.

    Of neighbours in one list of blocks the one that made least counts: one alone may have handed a tensor over.
    """
    more = 0
    for repeats, eras in groupby(range(len(times)), lambda n: times[n]):
        sizes = defaultdict(list)
        for era in eras:
            sizes[parts[era]].append(segment.freed.get(era, 0))
        more += (repeats - 1) * sum(len(of_part) * min(of_part) for of_part in sizes.values())
    return more
