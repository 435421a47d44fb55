"""One linear layer with TD-LoRA: W(t) = W0 + scaling * (sum_i g_i(t) B_i) A, with g = softmax(gate(t_emb)), or its
sigmoid."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from dydit_scale.diffusion.randomness import keyed_generator
from dydit_scale.dynamic.timestep import TimestepState

GateKind = Literal["softmax", "sigmoid"]
GateScope = Literal["layer", "network"]
NETWORK_GATES = "timestep_gates"
"""Where a network's root holds the gates that its layers share. To diffusers it is a layer as any other: a dict of
strengths for ``set_adapters`` must name it too, with any value."""


class SharedDown(nn.Module):
    """z = A x: the projection that all experts share."""

    def __init__(self, in_features: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=torch.float32))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Uniform in +-1/sqrt(in_features), as peft starts LoRA's A."""
        rank, in_features = self.weight.shape
        self.weight.copy_((2 * torch.rand(rank, in_features, generator=generator) - 1) * in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., rank], in autocast's dtype or the parameter's."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.weight.dtype)
        return F.linear(x, self.weight)


class ExpertUp(nn.Module):
    """The experts B_i, mixed by the gates before they meet the activations."""

    def __init__(self, out_features: int, rank: int, experts: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_features, rank, device=device, dtype=torch.float32))

    @torch.no_grad()
    def reset(self, generator: torch.Generator, noise: float) -> None:
        """Exactly opposite pairs B_{2k+1} = -B_{2k} of entries +-noise; with an odd count the last expert is zero.

        Equal gates then mix them to exactly zero: noise is a power of two, so every product g * B is exact, also in a
        fused multiply-add and in low precision, and neighbours cancel without a rounding error.
        """
        experts, out_features, rank = self.weight.shape
        signs = 2 * torch.randint(0, 2, (experts // 2, out_features, rank), generator=generator) - 1
        pairs = noise * torch.stack((signs, -signs), dim=1).flatten(0, 1).float()
        self.weight.zero_()
        self.weight[: len(pairs)].copy_(pairs)

    def forward(self, gates: Tensor) -> Tensor:
        """gates [batch, experts] in fp32 -> mixed experts [batch, out_features, rank] in fp32."""
        with torch.autocast(gates.device.type, enabled=False):
            return torch.einsum("be,eor->bor", gates, self.weight.float())


class TimestepGate(nn.Module):
    """g(t) = softmax(W t_emb + b), or its sigmoid, always in fp32; zero parameters at the start, so all gates are
    equal."""

    def __init__(self, time_dim: int, experts: int, device: torch.device, kind: GateKind = "softmax") -> None:
        super().__init__()
        self.time_dim = time_dim
        self.kind = kind
        self.weight = nn.Parameter(torch.zeros(experts, time_dim, device=device, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(experts, device=device, dtype=torch.float32))

    def forward(self, emb: Tensor) -> Tensor:
        """emb [batch, time_dim] -> [batch, experts]; rows of softmax gates sum to one."""
        return mixtures(emb, self.weight, self.bias, self.kind)


def mixtures(
    emb: Float[Tensor, "batch time_dim"],
    weight: Float[Tensor, "experts time_dim"],
    bias: Float[Tensor, " experts"],
    kind: GateKind,
) -> Float[Tensor, "batch experts"]:
    """The gates of one layer, in fp32."""
    with torch.autocast(emb.device.type, enabled=False):
        logits = F.linear(emb.float(), weight.float(), bias.float())
        return logits.softmax(dim=-1) if kind == "softmax" else logits.sigmoid()


class TimestepGates(nn.Module, BaseTunerLayer):
    """The gates of some adapters, which peft and diffusers switch, delete and unload as those of any layer.

    A layer holds its own; a network whose layers share theirs holds them on its root, as ``NETWORK_GATES``.
    """

    adapter_layer_names: tuple[str, ...] = ("td_router",)
    other_param_names: tuple[str, ...] = ("r",)

    def __init__(self, base_layer: nn.Module | None = None) -> None:
        super().__init__()
        # Unloading puts the base layer where the gates were.
        self.base_layer = nn.Identity() if base_layer is None else base_layer
        self.td_router = nn.ModuleDict()
        self.r: dict[str, int] = {}  # what diffusers counts adapters by
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Gates alone are never merged."""

    def unmerge(self) -> None:
        """Gates alone are never merged."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """Gates alone have no strength."""

    def scale_layer(self, scale: float) -> None:
        """Gates alone have no strength."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """Gates alone have no strength."""


class TDLoraLayer(TimestepGates):
    """A frozen linear layer whose low-rank update depends on the timestep embedding found in ``timestep_state``.

    The base may be quantised, by any backend that peft resolves. Merged layers are not: they hold the sum in a plain
    nn.Linear, since to quantise it anew would lose the update's finer part.

    The start is an exact no-op. In the first step the gradient of A is exactly zero (the mixed B is zero), and so is
    the gate row of the last expert when their number is odd; experts and gates learn from the first step on, and from
    the second on every gradient is non-zero. The softmax gate of a single expert is constant and never learns.
    """

    adapter_layer_names = ("td_down", "td_up", "td_router")
    other_param_names = ("r", "alpha", "scaling", "dropout")
    _unmerged_weight: Tensor | None

    def __init__(
        self,
        base_layer: Any,
        name: str,
        timestep_state: TimestepState,
        quantization_backend: QuantizationBackend | None = None,
    ) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.name = name
        self.timestep_state = timestep_state
        self.quantization_backend = quantization_backend
        # In a tuple, so that the root alone has them among its modules and parameters.
        self._network_gates: tuple[TimestepGates, ...] = ()
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.td_down, self.td_up = nn.ModuleDict(), nn.ModuleDict()
        # While merged: the base weight of before, or (in a tuple, so that it is no submodule) the quantised layer.
        self.register_buffer("_unmerged_weight", None, persistent=False)
        self._unmerged_layer: tuple[Any, ...] = ()

    def add_adapter(
        self,
        adapter: str,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        experts: int,
        time_dim: int,
        noise: float,
        seed: int,
        gate: GateKind = "softmax",
        network_gates: TimestepGates | None = None,
    ) -> None:
        """Create the fp32 parameters of one adapter; they depend on (seed, adapter, layer name) alone.

        Args:
            network_gates: Those of the root, to which the adapter's gate is added unless it is there, in place of a
                gate of the layer's own.
        """
        device = self._get_base_layer_device_and_dtype(self.base_layer)[0] or torch.device("cpu")
        self.r[adapter], self.alpha[adapter], self.dropout[adapter] = rank, alpha, dropout
        self.set_scale(adapter, 1.0)
        generator = keyed_generator(seed, "td_lora", adapter, self.name)
        down, up = SharedDown(self.in_features, rank, device), ExpertUp(self.out_features, rank, experts, device)
        down.reset(generator)
        up.reset(generator, noise)
        self.td_down[adapter], self.td_up[adapter] = down, up
        holder: TimestepGates = self
        if network_gates is not None:
            self._network_gates, holder = (network_gates,), network_gates
        if adapter not in holder.td_router:
            holder.td_router[adapter] = TimestepGate(time_dim, experts, device, gate)
            holder.r[adapter] = rank

    def down(self, adapter: str) -> SharedDown:
        """A of an adapter."""
        return cast(SharedDown, self.td_down[adapter])

    def up(self, adapter: str) -> ExpertUp:
        """The experts of an adapter."""
        return cast(ExpertUp, self.td_up[adapter])

    def gate(self, adapter: str) -> TimestepGate:
        """The gate of an adapter; gate(adapter)(emb) are the mixtures [batch, experts]."""
        for holder in (self, *self._network_gates):
            if adapter in holder.td_router:
                return cast(TimestepGate, holder.td_router[adapter])
        raise ValueError(f"{self.name}: no adapter {adapter!r}; there are {', '.join(self.r) or 'none'}")

    # --- the forward pass

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [rows, ..., in_features] -> [rows, ..., out_features]; rows is a multiple of the embedding's batch.

        Samples are the outermost axis of the rows (as in Latte's spatial and temporal layouts). Packed tokens
        [tokens, in_features] need an embedding of one row. Raises ValueError where the mapping is not known.
        """
        if self._disable_adapters and self.merged:
            self.unmerge()  # as peft's own layers do
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter in self._live_adapters():
            result = result + self._update(adapter, x).to(result.dtype)
        return result

    def _live_adapters(self) -> list[str]:
        if self._disable_adapters or self.merged:
            return []
        return self._known(self.active_adapters)

    def _update(self, adapter: str, x: Tensor) -> Tensor:
        emb = self._embedding(adapter)
        self._check_rows(x, len(emb))
        mixed = self.mixed_experts(emb, adapter)  # [batch, out_features, rank]
        z = self.down(adapter)(F.dropout(x, self.dropout[adapter], self.training))  # [rows, ..., rank]
        mixed = mixed.to(z.dtype)
        if len(mixed) == 1:
            return F.linear(z, mixed[0])
        per_sample = z.reshape(len(mixed), -1, z.shape[-1])  # the rows of a sample are neighbours
        return torch.bmm(per_sample, mixed.transpose(1, 2)).reshape(*z.shape[:-1], self.out_features)

    def _embedding(self, adapter: str) -> Tensor:
        emb = self.timestep_state.emb
        if emb is None:
            raise ValueError(
                f"{self.name}: no timestep embedding is known here. The layer ran outside the model's forward, before "
                "the embedder, or in a recomputation that does not carry it (use checkpoint_with_timestep(model))"
            )
        # Not the weight's shape: outside its module's forward a parameter may be a placeholder (ZeRO-3).
        time_dim = self.gate(adapter).time_dim
        if emb.ndim != 2 or emb.shape[1] != time_dim:
            raise ValueError(f"{self.name}: expected a timestep embedding [batch, {time_dim}], got {list(emb.shape)}")
        # An expanded row (stride 0) is known to be the same for all samples: mix once.
        return emb[:1] if emb.stride(0) == 0 and len(emb) > 1 else emb

    def _check_rows(self, x: Tensor, batch: int) -> None:
        if batch == 1 or (x.ndim >= 2 and x.shape[0] == batch):
            return
        if x.ndim == 2:
            raise ValueError(
                f"{self.name}: input {list(x.shape)} has no sample axis, so its rows cannot be assigned to "
                f"{batch} timesteps; unpack it, or open the scope with the one embedding that all rows share"
            )
        if x.ndim < 2 or x.shape[0] == 0 or x.shape[0] % batch:
            raise ValueError(f"{self.name}: input {list(x.shape)} has rows that are no multiple of the batch {batch}")

    def mixed_experts(self, emb: Float[Tensor, "batch time_dim"], adapter: str) -> Float[Tensor, "batch out rank"]:
        """scaling * sum_i g_i(t) B_i at each timestep, in fp32."""
        return self.up(adapter)(self.gate(adapter)(emb) * self.scaling[adapter])

    # --- the merged weight

    def weight_at(self, t_emb: Float[Tensor, "1 time_dim"]) -> Float[Tensor, "out in"]:
        """The weight of the plain linear layer that equals this one at a timestep; fp32 math, the base's dtype.

        Needs whole parameters (not those of a ZeRO-3 model). Raises ValueError if ``t_emb`` is not one row.
        """
        if t_emb.ndim != 2 or t_emb.shape[0] != 1:
            raise ValueError(f"{self.name}.weight_at: expected one embedding [1, dim], got {list(t_emb.shape)}")
        base = self.base_weight()
        if self._disable_adapters:
            return base
        weight = base.float()
        with torch.autocast(t_emb.device.type, enabled=False):
            for adapter in self._known(self.active_adapters):
                weight = weight + self.mixed_experts(t_emb, adapter)[0] @ self.down(adapter).weight.float()
        return weight.to(base.dtype)

    def base_weight(self) -> Float[Tensor, "out in"]:
        """The weight without adapters, dequantised."""
        if self.quantization_backend is not None:
            layer = self._unmerged_layer[0] if self._unmerged_layer else self.base_layer
            return self.quantization_backend.get_base_weight(layer)
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight if self._unmerged_weight is None else self._unmerged_weight

    def low_rank_at(self, t_emb: Float[Tensor, "1 time_dim"]) -> tuple[Tensor, Tensor] | None:
        """(down [rank, in], up [out, rank]) in fp32, ranks of all active adapters together: ``weight_at`` is the base
        weight plus ``up @ down``. None where no adapter acts."""
        active = [] if self._disable_adapters else self._known(self.active_adapters)
        if not active:
            return None
        with torch.autocast(t_emb.device.type, enabled=False):
            ups = [self.mixed_experts(t_emb, adapter)[0] for adapter in active]
        return torch.cat([self.down(a).weight.float() for a in active]), torch.cat(ups, dim=1)

    @torch.no_grad()
    def merge_at(self, t_emb: Float[Tensor, "1 time_dim"]) -> None:
        """Put the weight at one timestep into the base layer; what was there is kept for ``unmerge``.

        A quantised base layer gives way to a plain nn.Linear.
        """
        merged = self.weight_at(t_emb).detach().clone()
        if self.quantization_backend is None:
            if self._unmerged_weight is None:
                self._unmerged_weight = cast(Tensor, self.base_layer.weight).data
            self.base_layer.weight.data = merged
        else:
            self._unmerged_layer = self._unmerged_layer or (self.base_layer,)
            self.base_layer = _Dequantised(merged, self._unmerged_layer[0].bias)
        self.merged_adapters = list(self.active_adapters)

    def unmerge(self) -> None:
        """Put back what was there, exactly. Nothing happens if nothing is merged."""
        if self._unmerged_weight is not None:
            self.base_layer.weight.data = self._unmerged_weight
        if self._unmerged_layer:
            (self.base_layer,) = self._unmerged_layer
        self._unmerged_weight = None
        self._unmerged_layer = ()
        self.merged_adapters = []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible: the weight depends on the timestep."""
        raise ValueError(f"{self.name}: the weight depends on the timestep; use merge_at(model, t_emb) or mean_lora")

    # --- scales (diffusers' joint_attention_kwargs={"scale": ...} and set_adapters use these)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make the strength of an adapter ``scale`` times alpha / rank."""
        if adapter in self.r:
            self.scaling[adapter] = scale * self.alpha[adapter] / self.r[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters."""
        for adapter in self._known(self.active_adapters):
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo ``scale_layer(scale)``; without a value go back to alpha / rank."""
        for adapter in self._known(self.active_adapters):
            if scale is None:
                self.set_scale(adapter, 1.0)
            else:
                self.scaling[adapter] /= scale

    def _known(self, adapters: Iterable[str]) -> list[str]:
        return [adapter for adapter in adapters if adapter in self.r]


class _Dequantised(nn.Linear):
    """A linear layer that computes in its input's dtype, as quantised ones do."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)
