"""The layer: its formula, its start, and how rows find their timestep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dydit_scale.adapters.td_layer import TDLoraLayer
from dydit_scale.dynamic.timestep import TimestepState
from tests.adapters.tiny import TIME_DIM, embeddings, shake

GATES = ("softmax", "sigmoid")


def make_layer(
    experts: int = 4, rank: int = 3, alpha: float = 6.0, dtype: torch.dtype = torch.float32, gate: Any = "softmax"
) -> TDLoraLayer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.Linear(8, 12).to(dtype)
    layer = TDLoraLayer(base, "layer", TimestepState())
    layer.add_adapter(
        "default", rank=rank, alpha=alpha, dropout=0.0, experts=experts, time_dim=TIME_DIM, noise=2.0**-10, seed=0,
        gate=gate,
    )  # fmt: skip
    layer.set_adapter("default")
    return layer


def dense_weight(layer: TDLoraLayer, emb: Tensor) -> Tensor:
    """W(t) written out from the definition."""
    gate, up, down = layer.gate("default"), layer.up("default").weight, layer.down("default").weight
    logits = gate.weight @ emb + gate.bias
    g = logits.exp() / logits.exp().sum() if gate.kind == "softmax" else 1 / (1 + (-logits).exp())
    mixed = sum(g[i] * up[i] for i in range(len(up)))
    return layer.base_layer.weight + 2.0 * mixed @ down


def run(layer: TDLoraLayer, x: Tensor, emb: Tensor | None) -> Tensor:
    with layer.timestep_state.scope(emb):
        return layer(x)


@pytest.mark.parametrize("gate", GATES)
def test_forward_is_the_formula_for_each_sample(gate: str) -> None:
    layer = shake(make_layer(gate=gate))
    x, emb = torch.randn(3, 5, 8), embeddings(3)
    y = run(layer, x, emb)
    weights = [dense_weight(layer, e) for e in emb]
    for sample, weight in enumerate(weights):
        torch.testing.assert_close(y[sample], x[sample] @ weight.T + layer.base_layer.bias, rtol=1e-5, atol=1e-5)
    assert (weights[0] - weights[1]).abs().max() > 0.1


def test_weight_at_is_the_formula_in_the_dtype_of_the_base() -> None:
    layer = shake(make_layer())
    torch.testing.assert_close(
        layer.weight_at(embeddings(1)), dense_weight(layer, embeddings(1)[0]), rtol=1e-5, atol=1e-6
    )
    assert shake(make_layer(dtype=torch.bfloat16)).weight_at(embeddings(1)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="one embedding"):
        layer.weight_at(embeddings(2))


@pytest.mark.parametrize("experts", range(1, 10))
@pytest.mark.parametrize("gate", GATES)
def test_the_start_is_an_exact_no_op(experts: int, gate: str) -> None:
    layer = make_layer(experts=experts, gate=gate)
    x, emb = torch.randn(3, 5, 8), 100 * embeddings(3)
    assert not layer.mixed_experts(emb, "default").any()
    assert torch.equal(run(layer, x, emb), layer.base_layer(x))
    assert torch.equal(layer.weight_at(emb[:1]), layer.base_layer.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(layer, x, emb), layer.base_layer(x))


def test_experts_start_as_opposite_pairs_that_are_not_zero() -> None:
    up = make_layer(experts=5).up("default").weight
    assert torch.equal(up[1], -up[0])
    assert torch.equal(up[3], -up[2])
    assert not torch.equal(up[0], up[2])
    assert (up[:4].abs() == 2.0**-10).all()
    assert not up[4].any()


def test_gradients_reach_everything_from_the_second_step_on() -> None:
    layer = make_layer(experts=5)
    layer.base_layer.requires_grad_(False)
    x, emb, target = torch.randn(4, 5, 8), embeddings(4), torch.randn(4, 5, 12)
    parameters = dict(layer.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    assert len(trained) == 4
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    gradients = []
    for _ in range(2):
        optimizer.zero_grad()
        (run(layer, x, emb) - target).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in trained.items()})
        optimizer.step()
    assert not gradients[0]["td_down.default.weight"].any()
    assert gradients[0]["td_up.default.weight"].flatten(1).any(dim=1).all()
    assert gradients[0]["td_router.default.weight"][:4].any(dim=1).all(), (
        "experts that are zero would leave no gradient"
    )
    for name, gradient in gradients[1].items():
        assert gradient.flatten(1).any(dim=1).all() if gradient.ndim > 1 else gradient.all(), name


def test_rows_of_a_sample_are_neighbours() -> None:
    layer = shake(make_layer())
    x, emb = torch.randn(6, 5, 8), embeddings(3)
    assert torch.equal(run(layer, x, emb), run(layer, x, emb.repeat_interleave(2, dim=0)))
    torch.testing.assert_close(run(layer, x, emb)[2:4], run(layer, x[2:4], emb[1:2]))
    assert not torch.allclose(run(layer, x, emb), run(layer, x, emb.repeat(2, 1)))


def test_vectors_one_per_sample_and_extra_axes() -> None:
    layer = shake(make_layer())
    x, emb = torch.randn(3, 8), embeddings(3)
    torch.testing.assert_close(run(layer, x, emb), run(layer, x[:, None], emb)[:, 0])
    x = torch.randn(3, 2, 5, 8)
    torch.testing.assert_close(run(layer, x, emb), run(layer, x.flatten(1, 2), emb).view(3, 2, 5, 12))


def test_one_timestep_fits_every_shape_and_is_known_from_an_expanded_row() -> None:
    layer = shake(make_layer())
    x, emb = torch.randn(7, 8), embeddings(1)
    torch.testing.assert_close(run(layer, x, emb), x @ layer.weight_at(emb).T + layer.base_layer.bias)
    assert torch.equal(run(layer, x, emb.expand(3, -1)), run(layer, x, emb))


@pytest.mark.parametrize(
    ("shape", "message"), [((9, 8), "no sample axis"), ((4, 5, 8), "no multiple"), ((8,), "no multiple")]
)
def test_rows_that_cannot_be_assigned_raise(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_layer(), torch.randn(*shape), embeddings(3))


def test_a_forward_without_the_embedding_raises() -> None:
    with pytest.raises(ValueError, match="layer: no timestep embedding"):
        run(make_layer(), torch.randn(3, 5, 8), None)
    with pytest.raises(ValueError, match=r"\[batch, 16\], got \[3, 4\]"):
        run(make_layer(), torch.randn(3, 5, 8), torch.randn(3, 4))


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_base_with_fp32_parameters(autocast: bool) -> None:
    exact, layer = shake(make_layer()), shake(make_layer(dtype=torch.bfloat16))
    assert {p.dtype for name, p in layer.named_parameters() if "td_" in name} == {torch.float32}
    x, emb = torch.randn(3, 5, 8).bfloat16(), embeddings(3)
    seen: list[Tensor] = []
    layer.gate("default").register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = run(layer, x, emb)
        assert layer.mixed_experts(emb, "default").dtype == torch.float32
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(y.float(), run(exact, x.float(), emb), rtol=0.05, atol=0.05)
    torch.testing.assert_close(seen[0], exact.gate("default")(emb))
    assert layer.up("default").weight.grad.dtype == torch.float32


def test_parameters_are_read_inside_their_own_module_only() -> None:
    layer = shake(make_layer())
    x, emb = torch.randn(3, 5, 8), embeddings(3)
    with torch.no_grad():
        expected = run(layer, x, emb)
        for module in (layer.gate("default"), layer.up("default"), layer.down("default")):
            whole = {name: p.data for name, p in module.named_parameters()}

            def place(module: nn.Module, values: dict[str, Tensor]) -> None:
                for name, p in module.named_parameters():
                    p.data = values.get(name, torch.empty(0))

            place(module, {})  # what ZeRO-3 leaves of a parameter outside its module's forward
            module.register_forward_pre_hook(lambda m, args, whole=whole, place=place: place(m, whole))
            module.register_forward_hook(lambda m, args, output, place=place: place(m, {}))
        assert torch.equal(run(layer, x, emb), expected)


def test_dropout_acts_on_the_update_in_training_only() -> None:
    layer = shake(make_layer())
    x, emb = torch.randn(3, 5, 8), embeddings(3)
    y = run(layer, x, emb)
    layer.dropout["default"] = 0.5
    assert not torch.allclose(run(layer, x, emb), y)
    assert torch.equal(run(layer.eval(), x, emb), y)


def test_start_values_depend_on_seed_and_name_not_on_global_state() -> None:
    first = make_layer()
    torch.manual_seed(123)
    second = make_layer()
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
