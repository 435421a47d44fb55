"""A batch that shares its width: forward and backward on the active units alone give what masks give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from dydit_scale.adapters.td_lora import TDLoraConfig, add_td_lora
from dydit_scale.dynamic.masks import FrozenGates, GateNoise, SharedUnits, SubNetwork, WidthMasks
from dydit_scale.dynamic.slicing import IN, OUT, linear_on
from dydit_scale.train.recipe import AdapterConfig
from tests.models.tiny import scramble
from tests.models.tiny_families import FAMILIES, Family, each

TARGETS = AdapterConfig().targets
LEARN = ("all", "lora", "td_lora")
TIMES = (0.9, 0.5, 0.2)


def shared_network(model: Any, family: Family) -> SubNetwork:
    """The sub-network of the first timestep; the whole batch is to run it."""
    table = model.step_table(family.steps(TIMES[0]))
    masks = [table.masks(i, 0) for i in range(len(model.dynamic_blocks()))]
    return SubNetwork(tuple(SharedUnits(*masks_) for masks_ in masks))


def masked(model: Any, network: SubNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model mask every sample to ``network``, whatever its timestep."""

    def width(t_emb: Tensor, mode: Any) -> WidthMasks:
        return WidthMasks(*(m.expand(-1, len(t_emb), -1) for m in network.masks(t_emb.device) if m is not None))

    monkeypatch.setattr(model, "width_masks", width)


def learning(family: Family, learn: str, **config: Any) -> Any:
    """Scrambled routers; the adapter's weights are large enough to matter."""
    model = scramble(family.make(**config)).train()
    if learn == "td_lora":
        add_td_lora(model, TDLoraConfig(target_modules=TARGETS, rank=2, alpha=2, experts=3))
    if learn == "lora":
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS))
    if learn != "all":
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.2, generator=generator)
    for name, parameter in model.named_parameters():  # as in this phase: routers stand still
        parameter.requires_grad_(parameter.requires_grad and "dy_" not in name)
    return model


def gradients(model: Any, x: dict[str, Tensor], gates: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sample, token gates, gradient of every parameter that learns)."""
    model.zero_grad()
    torch.manual_seed(5)  # a tenth of the classes is dropped
    out = model(**x, gates=gates, collect=True)
    weights = torch.randn(out.sample.shape, generator=torch.Generator().manual_seed(4))
    (out.sample * weights).mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.sample.detach(), out.masks.tokens.detach(), found


def assert_equal(got: Any, wanted: Any) -> None:
    assert torch.allclose(got[0], wanted[0], atol=1e-5)
    assert torch.equal(got[1], wanted[1])
    assert set(got[2]) == set(wanted[2]) and len(got[2]) > 5
    scale = max(float(g.abs().max()) for g in wanted[2].values())
    for name, gradient in wanted[2].items():
        assert torch.allclose(got[2][name], gradient, rtol=1e-3, atol=1e-5 * scale), name


@each
@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_masks(
    family: Family, learn: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = learning(family, learn)
    if recompute:
        model.enable_gradient_checkpointing()
    network, x = shared_network(model, family), family.x(*TIMES)
    off = sum(int((~u.heads).sum() + (~u.groups).sum()) for u in network.layers)
    got = gradients(model, x, FrozenGates(network))
    masked(model, network, monkeypatch)
    wanted = gradients(model, x, "threshold")
    assert off > 3, "the test wants a sub-network with holes"
    assert 0 < wanted[1].mean() < 1, "and tokens that skip"
    assert_equal(got, wanted)


@each
def test_token_routers_may_go_on_learning(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    model = learning(family, "all")
    routers = {n: p for n, p in model.named_parameters() if "dy_token" in n}
    for parameter in routers.values():
        parameter.requires_grad_(True)
    network, x = shared_network(model, family), family.x(*TIMES)
    tokens = model(**x, gates="threshold", collect=True).masks.tokens
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(6))
    got = gradients(model, x, FrozenGates(network, noise))
    masked(model, network, monkeypatch)
    width = [noise.new_zeros(len(noise), len(tokens[0]), 1)] * 2
    wanted = gradients(model, x, GateNoise(*width, noise))
    assert any(got[2][name].any() for name in routers)
    assert_equal(got, wanted)


def test_released_bypass(monkeypatch: pytest.MonkeyPatch) -> None:
    flux = FAMILIES[0]
    model = learning(flux, "all", single_bypass="attn_out+mlp")
    network, x = shared_network(model, flux), flux.x(*TIMES)
    got = gradients(model, x, FrozenGates(network))
    masked(model, network, monkeypatch)
    assert_equal(got, gradients(model, x, "threshold"))


@each
def test_all_units_on_is_the_static_model(family: Family) -> None:
    model = learning(family, "all", tokens=False)
    units = shared_network(model, family).layers
    every = SubNetwork(tuple(SharedUnits(*(torch.ones_like(m) for m in (u.heads, u.groups))) for u in units))
    x = family.x(*TIMES)
    got, wanted = gradients(model, x, FrozenGates(every)), gradients(model, x, "open")
    assert_equal(got, wanted)
    if family.name != "flux":  # whose output projection is called on all of its columns in turn
        assert torch.equal(got[0], wanted[0])


@each
def test_work_follows_the_units(family: Family) -> None:
    """The products of matrices that a step makes are those of the smaller shapes."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(gates: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            gradients(model, x, gates)
        return counter.get_total_flops()

    model = learning(family, "all", tokens=False)
    first = torch.arange(4) == 0
    least = SubNetwork((SharedUnits(first, first),) * len(model.dynamic_blocks()))
    x = family.x(*TIMES)
    assert flops(FrozenGates(least)) < 0.55 * flops("open")


def test_bfloat16_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    dit = FAMILIES[1]
    model = learning(dit, "all")
    network, x = shared_network(model, dit), dit.x(*TIMES)
    exact = gradients(model, x, FrozenGates(network))
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients(model, x, FrozenGates(network))
    scale = max(float(g.abs().max()) for g in exact[2].values())
    for name, gradient in exact[2].items():
        assert half[2][name].dtype == torch.float32
        assert torch.allclose(half[2][name], gradient, rtol=0.2, atol=0.05 * scale), name


@pytest.mark.parametrize("dim", [OUT, IN])
def test_derivatives_by_finite_differences(dim: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.double).requires_grad_()

    index = torch.tensor([0, 3, 4])
    x, weight, bias = drawn(2, 3, 6 if dim == OUT else 3), drawn(5, 6), drawn(5)

    def run(*tensors: Tensor) -> Tensor:
        return linear_on(*tensors, index, dim)

    whole: Callable[..., Tensor] = torch.nn.functional.linear
    if dim == OUT:
        assert torch.allclose(run(x, weight, bias), whole(x, weight, bias)[..., index])
    assert torch.autograd.gradcheck(run, (x, weight, bias))


def test_dora_is_refused() -> None:
    dit = FAMILIES[1]
    model = learning(dit, "all")
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS, use_dora=True))
    with pytest.raises(ValueError, match="DoRA"):
        model(**dit.x(*TIMES), gates=FrozenGates(shared_network(model, dit)))
