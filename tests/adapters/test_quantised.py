"""TD-LoRA over quantised bases, by the real libraries where they are installed (the extra: quantised)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dydit_scale.adapters.state import load_td_lora, save_td_lora
from dydit_scale.adapters.td_lora import add_td_lora, merge_at, td_layers, unmerge
from dydit_scale.dynamic.timestep import TimestepState
from tests.adapters.tiny import TIME_DIM, embeddings, mlp_config, shake

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


def quantised(kind: str) -> Any:
    """The same weights, quantised."""
    net: Any = plain()
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


each = pytest.mark.parametrize("kind", ["torchao int8", "bnb nf4", "bnb int8"])
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
