"""TD-LoRA over quantised bases: by a small scheme of this file, and by the real libraries where they are installed (the
extra: quantised)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft.utils import quantization_utils
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from dydit_scale.adapters.state import load_td_lora, save_td_lora
from dydit_scale.adapters.td_lora import add_td_lora, merge_at, td_layers, unmerge
from dydit_scale.dynamic.timestep import TimestepState
from tests.adapters.tiny import TIME_DIM, embeddings, flux_config, mlp_config, shake
from tests.models.tiny import inputs as flux_inputs
from tests.models.tiny import scramble, tiny_dynamic

DIM = 64


class Net(nn.Module):
    """Two layers wide enough to be quantised in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.timestep_state = TimestepState()
        self.fc1, self.fc2 = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        with self.timestep_state.scope(t_emb):
            return x + self.fc2(self.fc1(x).relu())


def plain() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


class Int8Linear(nn.Module):
    """Rows as int8 with a scale each."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight * self.scale).to(x.dtype), self.bias.to(x.dtype))


class Backend(QuantizationBackend):
    def get_base_weight(self, base_layer: Any) -> Tensor:
        return base_layer.weight * base_layer.scale


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the scheme of this file one that peft knows."""
    theirs = quantization_utils.resolve_quantization_backend

    def resolve(base: nn.Module, **options: Any) -> QuantizationBackend | None:
        return Backend() if isinstance(base, Int8Linear) else theirs(base, **options)

    monkeypatch.setattr(quantization_utils, "resolve_quantization_backend", resolve)


def quantised(kind: str) -> Any:
    """The same weights, quantised."""
    net: Any = plain()
    if kind == "own int8":
        net.fc1, net.fc2 = Int8Linear(net.fc1), Int8Linear(net.fc2)
        return net
    if kind == "torchao int8":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(net, torchao.Int8WeightOnlyConfig())
        return net
    bnb = pytest.importorskip("bitsandbytes")
    for name, linear in (("fc1", net.fc1), ("fc2", net.fc2)):
        sizes = (linear.in_features, linear.out_features)
        if kind == "bnb nf4":
            layer = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        layer.load_state_dict(linear.state_dict())
        setattr(net, name, layer.to("cpu"))
    return net


each = pytest.mark.parametrize("kind", ["own int8", "torchao int8", "bnb nf4", "bnb int8"])
X = torch.randn(3, 5, DIM, generator=torch.Generator().manual_seed(1))


@each
def test_it_starts_as_nothing_learns_and_is_the_plain_update(kind: str) -> None:
    base = quantised(kind)
    before = base(X, embeddings(3))
    model = add_td_lora(copy.deepcopy(base), mlp_config(experts=3))
    assert torch.equal(model(X, embeddings(3)), before)
    shake(model)
    model(X, embeddings(3)).square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8 and all(p.grad is not None and p.grad.any() for p in trained.values())
    reference = shake(add_td_lora(plain(), mlp_config(experts=3)))
    for name, layer in td_layers(model).items():
        other, x = td_layers(reference)[name], torch.randn(3, 5, layer.in_features)
        updates = []
        for one in (layer, other):
            with one.timestep_state.scope(embeddings(3)):
                updates.append(one(x) - one.base_layer(x))
        torch.testing.assert_close(*updates, rtol=1e-4, atol=1e-4)
        assert updates[0].abs().max() > 0.1


@each
def test_merged_it_is_plain_and_unmerged_quantised_again(kind: str) -> None:
    model: Any = shake(add_td_lora(quantised(kind), mlp_config(experts=3)))
    emb = embeddings(1)
    with torch.no_grad():
        before, bases = model(X, emb), [layer.base_layer for layer in td_layers(model).values()]
        merge_at(model, emb)
        # the activations of quantised layers may be rounded too
        assert (model(X, emb) - before).norm() < 0.02 * before.norm()
        assert all(type(layer.base_layer.weight.data) is Tensor for layer in td_layers(model).values())
        assert not [name for name in model.state_dict() if "unmerged" in name]
        merge_at(model, embeddings(2)[1:])
        unmerge(model)
        assert torch.equal(model(X, emb), before)
    assert all(layer.base_layer is base for layer, base in zip(td_layers(model).values(), bases, strict=True))


@each
def test_its_adapter_is_that_of_any_base(kind: str, tmp_path: Any) -> None:
    model = shake(add_td_lora(quantised(kind), mlp_config(experts=3)))
    save_td_lora(model, tmp_path)
    other: Any = plain()
    load_td_lora(other, tmp_path)
    for name, layer in td_layers(model).items():
        assert torch.equal(layer.up("default").weight, td_layers(other)[name].up("default").weight)
    again: Any = quantised(kind)
    load_td_lora(again, tmp_path)
    assert torch.equal(again(X, embeddings(3)), model(X, embeddings(3)))
    assert td_layers(again)["fc1"].gate("default").time_dim == TIME_DIM


@each
def test_a_half_precision_model_with_one_gate_for_all_layers(kind: str) -> None:
    if kind == "torchao int8":
        pytest.skip("its weights are cast when they are quantised, not afterwards")
    model: Any = quantised(kind)
    for layer in (model.fc1, model.fc2):
        layer.bias.data = layer.bias.data.bfloat16()
    shake(add_td_lora(model, mlp_config(experts=3, gate_scope="network")))
    x, emb = X.bfloat16(), embeddings(1)
    with torch.no_grad():
        before = model(x, emb)
        merge_at(model, emb)
        merged = model(x, emb)
    assert before.dtype == merged.dtype == torch.bfloat16
    assert (merged - before).norm() < 0.03 * before.norm()


@pytest.mark.parametrize("kind", ["base", "td_lora"])
@torch.no_grad()
def test_packing_cuts_what_it_dequantises(kind: str) -> None:
    model: Any = scramble(tiny_dynamic())
    for block in model.transformer_blocks:
        block.ff.net[2], block.attn.to_q = Int8Linear(block.ff.net[2]), Int8Linear(block.attn.to_q)
    if kind == "td_lora":
        model = shake(add_td_lora(model, flux_config()))
    expected = model(**flux_inputs([0.5, 0.2])).sample
    for options in ({}, {"max_bytes": 10**6}, {"kernel_layout": False}):
        assert model.pack(torch.tensor([0.5, 0.2]), **options).bytes > 0
        torch.testing.assert_close(model(**flux_inputs([0.5, 0.2])).sample, expected, atol=1e-5, rtol=1e-4)
