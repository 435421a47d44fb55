"""Layers of 8-bit weights beside plain ones; layers that the real libraries quantise where they are installed (the
extra: quantised)."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dydit_scale.dynamic import weight_only
from dydit_scale.dynamic.packing import CutLinear
from dydit_scale.dynamic.weight_only import WeightOnlyLinear, compress, dense_weight, quantisation_of

IN, OUT = 64, 96
ROUNDING = {"int8": 0.012, "fp8": 0.04}
"""Bounds of a product's relative error: half a step is 1/254 of the largest weight, or 1/16 of the weight itself."""


def linear(dtype: torch.dtype = torch.float32, bias: bool = True, rows: int = OUT) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(IN, rows, bias=bias).to(dtype).requires_grad_(False)


def x(dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


@pytest.fixture
def fp8_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rounding can be tested without a GPU, slowly."""
    theirs = weight_only._check_compressible
    monkeypatch.setattr(weight_only, "_check_compressible", lambda layer, kind: theirs(layer, "int8"))


@pytest.mark.usefixtures("fp8_anywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_it_computes_like_the_layer(kind: Any, bias: bool, dtype: torch.dtype) -> None:
    layer = linear(dtype, bias)
    small = compress(layer, kind)
    assert small.weight.element_size() == 1 and (small.out_features, small.in_features) == (OUT, IN)
    out, reference = small(x(dtype)), layer(x(dtype))
    assert out.dtype == dtype and out.shape == reference.shape
    assert 1e-4 < error(out, reference) < ROUNDING[kind]
    assert not list(small.parameters())


@pytest.mark.usefixtures("fp8_anywhere")
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_each_row_has_its_own_scale(kind: Any) -> None:
    layer = linear()
    layer.weight.mul_(torch.logspace(-6, 6, OUT)[:, None])
    layer.weight[7] = 0
    small = compress(layer, kind)
    dense = small.dense_weight(torch.float32)
    errors = (dense - layer.weight).norm(dim=1) / layer.weight.norm(dim=1).clamp_min(1e-30)
    assert errors.max() < ROUNDING[kind] and torch.equal(dense[7], torch.zeros(IN))


@pytest.mark.usefixtures("fp8_anywhere")
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_cutting_rows_and_compressing_commute(kind: Any) -> None:
    layer, rows = linear(torch.bfloat16), torch.tensor([1, 5, 6, 40])
    whole, cut = compress(layer, kind), compress(CutLinear([layer], rows=rows), kind)
    assert torch.equal(cut.weight.float(), whole.weight[rows].float())
    assert torch.equal(cut.scale, whole.scale[rows])
    assert torch.equal(cut.bias, whole.bias[rows])


def test_what_int8_holds_already_is_kept() -> None:
    layer = linear()
    once = compress(layer, "int8")
    layer.weight.copy_(dense_weight(once))
    assert torch.equal(compress(layer, "int8").weight, once.weight)


def test_large_sums_in_half_precision_stay_finite() -> None:
    layer = nn.Linear(4096, 2, bias=False, dtype=torch.float16).requires_grad_(False)
    layer.weight.fill_(0.01)
    out = compress(layer, "int8")(torch.full((1, 4096), 100.0, dtype=torch.float16))
    torch.testing.assert_close(out, torch.full((1, 2), 4096.0, dtype=torch.float16), rtol=0.01, atol=0)


def test_a_row_below_the_range_of_half_precision_is_zero() -> None:
    layer = linear(torch.float16)
    layer.weight[3] = 1e-7
    small = compress(layer, "int8")
    assert not small.dense_weight(torch.float16)[3].any() and small(x(torch.float16)).isfinite().all()


class Adapted(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def not_finite() -> nn.Linear:
    layer = linear()
    layer.weight[1, 2] = torch.inf
    return layer


@pytest.mark.parametrize(
    "layer, kind, message",
    [
        (linear(), "int4", "expected 'int8' or 'fp8', got 'int4'"),
        (linear(), "fp8", r"fp8 weights on cpu in torch\.float32: .*use int8"),
        (linear(torch.float64), "int8", r"int8 weights on cpu: .*got torch\.float64"),
        (nn.Linear(2, 2, device="meta"), "int8", "on meta: the weight has no values"),
        (not_finite(), "int8", r"the weight \[96, 64\] has no elements, or some that are not finite"),
        (linear(rows=0), "int8", r"the weight \[0, 64\] has no elements"),
        (Adapted(2, 2), "int8", "expected a plain nn.Linear, got Adapted.*dequantise first"),
        (compress(linear(), "int8"), "int8", "expected a plain nn.Linear, got WeightOnlyLinear"),
    ],
)
def test_what_cannot_be_compressed_is_refused(layer: Any, kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"compress: .*{message}"):
        inspect.unwrap(compress)(layer, kind)  # without the checks of types that tests put around it


def test_a_plain_weight_is_shared() -> None:
    layer = linear(torch.bfloat16)
    assert dense_weight(layer).data_ptr() == layer.weight.data_ptr() and quantisation_of(layer) is None
    assert dense_weight(layer, torch.float32).dtype == torch.float32


def test_a_compressed_layer_gives_back_its_weight() -> None:
    small = compress(linear(torch.bfloat16), "int8")
    assert error(dense_weight(small), linear().weight) < 0.02 and dense_weight(small).dtype == torch.bfloat16


def test_unknown_quantisation_is_told() -> None:
    layer = linear()
    layer.weight = nn.Parameter(torch.zeros(OUT, IN, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"dense_weight: Linear has a weight of .*torch\.int8.*peft does not know"):
        dense_weight(layer)


def quantised(kind: str, dtype: torch.dtype) -> Any:
    layer = linear(dtype)
    if kind.startswith("torchao"):
        torchao = pytest.importorskip("torchao.quantization")
        configs = {"torchao int8": "Int8WeightOnlyConfig", "torchao fp8": "Float8WeightOnlyConfig"}
        net = nn.Sequential(layer)
        torchao.quantize_(net, getattr(torchao, configs[kind])())
        return net[0]
    bnb = pytest.importorskip("bitsandbytes")
    if kind == "bnb int8":
        other = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    else:
        other = bnb.nn.Linear4bit(IN, OUT, compute_dtype=dtype, quant_type=kind.removeprefix("bnb "))
    other.load_state_dict(layer.state_dict())
    other.bias.data = other.bias.data.to(dtype)
    return other.requires_grad_(False).to("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind, rounding",
    [("torchao int8", 0.012), ("torchao fp8", 0.04), ("bnb int8", 0.012), ("bnb nf4", 0.15), ("bnb fp4", 0.2)],
)
def test_the_weight_of_a_quantised_layer_is_dequantised(kind: str, rounding: float, dtype: torch.dtype) -> None:
    layer = quantised(kind, dtype)
    assert quantisation_of(layer) is not None
    weight = dense_weight(layer)
    assert type(weight) is Tensor and weight.dtype == dtype and not weight.requires_grad
    assert 1e-4 < error(weight, linear().weight) < rounding
    plain = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    assert error(plain(x(dtype)), layer(x(dtype))) < 0.02  # some round the input too
    assert dense_weight(layer, torch.float16).dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_on_a_gpu(kind: Any) -> None:
    layer = linear(torch.bfloat16).cuda()
    small = compress(layer, kind)
    assert isinstance(small, WeightOnlyLinear) and small.weight.is_cuda
    assert 1e-4 < error(small(x(torch.bfloat16).cuda()), layer(x(torch.bfloat16).cuda())) < ROUNDING[kind]
