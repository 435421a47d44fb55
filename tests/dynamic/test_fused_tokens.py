from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dydit_scale.dynamic import fused_tokens
from dydit_scale.dynamic.fused_tokens import fixed_rows, mlp_on_rows
from dydit_scale.dynamic.packing import chosen_rows

ROOT = Path(__file__).resolve().parents[2]
BATCH, TOKENS, DIM, HIDDEN = 2, 7, 12, 20
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (the extra: kernels)"
)


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "x": (BATCH, TOKENS, DIM), "up_weight": (HIDDEN, DIM), "up_bias": (HIDDEN,), "down_weight": (DIM, HIDDEN),
        "down_bias": (DIM,), "gate": (BATCH, DIM), "residual": (BATCH, TOKENS, DIM),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def masked(given: dict[str, Tensor], keep: Tensor, approximate: str = "tanh") -> Tensor:
    """What the packed MLP stands for: all tokens computed, the skipped ones multiplied by zero."""
    hidden = F.gelu(F.linear(given["x"], given["up_weight"], given.get("up_bias")), approximate=approximate)
    out = given["gate"][:, None] * F.linear(hidden, given["down_weight"], given.get("down_bias"))
    return given["residual"] + out * keep[..., None]


def run(given: dict[str, Tensor], rows: Tensor, activation: Any = "gelu-approximate", **options: Tensor) -> Tensor:
    """With the residual left as it is."""
    own = {"up_bias": None, "down_bias": None, **given, "residual": given["residual"].clone()}
    return mlp_on_rows(**own, rows=rows, activation=activation, **options)


def keep_mask() -> Tensor:
    keep = (torch.arange(BATCH * TOKENS) % 3 != 1).view(BATCH, TOKENS)
    assert 0 < keep.sum() < keep.numel()
    return keep


def test_the_plain_path_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    assert fused_tokens.why_plain(x, x) == "they are for CUDA, and the model is on cpu"
    monkeypatch.setattr(fused_tokens, "_is_fused", lambda x, *weights: True)
    assert fused_tokens.why_plain(x, x) is None


@pytest.mark.parametrize("activation", ["gelu-approximate", "gelu"])
def test_it_is_the_masked_mlp(activation: str) -> None:
    given, keep = inputs(), keep_mask()
    reference = masked(given, keep, "tanh" if activation == "gelu-approximate" else "none")
    torch.testing.assert_close(run(given, chosen_rows(keep), activation=activation), reference)
    without = {name: value for name, value in given.items() if not name.endswith("bias")}
    torch.testing.assert_close(run(without, chosen_rows(keep)), masked(without, keep))


def test_modulation_is_that_of_each_rows_sample() -> None:
    given, keep = inputs(), keep_mask()
    shift, scale = torch.randn(BATCH, DIM), torch.randn(BATCH, DIM)
    out = run(given, chosen_rows(keep), shift=shift, scale=scale)
    before = {**given, "x": given["x"] * (1 + scale[:, None]) + shift[:, None]}
    torch.testing.assert_close(out, masked(before, keep))


def test_padding_does_nothing() -> None:
    given, keep = inputs(), keep_mask()
    rows = chosen_rows(keep)
    expected = run(given, rows)
    padded = torch.cat([torch.tensor([-1]), rows, torch.tensor([BATCH * TOKENS, -7])])
    torch.testing.assert_close(run(given, padded), expected, rtol=0, atol=1e-6)
    for none in (torch.full((3,), -1), torch.zeros(0, dtype=torch.int64)):
        assert torch.equal(run(given, none), given["residual"])


def test_padding_reads_no_token_that_was_not_chosen() -> None:
    given = inputs()
    given["x"][0, 0] = torch.nan  # where padding is clamped to
    out = run(given, torch.tensor([3, 9, -1]))
    assert out.isfinite().all() and not torch.equal(out, given["residual"])


def test_it_takes_the_residuals_memory_only_where_that_is_safe() -> None:
    given, rows = inputs(), chosen_rows(keep_mask())
    expected, options = run(given, rows), {"activation": "gelu-approximate", "rows": rows}
    out = mlp_on_rows(**given, **options)
    assert out.data_ptr() == given["residual"].data_ptr() and torch.equal(out, expected)

    given = inputs()
    apart = torch.zeros(BATCH, TOKENS + 1, DIM)
    apart[:, 1:] = given["residual"]
    torch.testing.assert_close(mlp_on_rows(**{**given, "residual": apart[:, 1:]}, **options), expected)
    alike = given["residual"][:1, :1].expand(BATCH, TOKENS, DIM)
    kept = alike.clone()
    torch.testing.assert_close(
        mlp_on_rows(**{**given, "residual": alike}, **options), run({**given, "residual": kept}, rows)
    )
    assert torch.equal(alike, kept)


def test_gradients_are_those_of_the_masked_mlp() -> None:
    given, keep = inputs(torch.float64), keep_mask()
    grads = []
    for packed in (True, False):
        leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
        options = {"activation": "gelu-approximate", "rows": chosen_rows(keep)}
        (mlp_on_rows(**leaves, **options) if packed else masked(leaves, keep)).square().sum().backward()
        grads.append({name: value.grad for name, value in leaves.items()})
    assert len(grads[0]) == 7
    for name in given:
        torch.testing.assert_close(grads[0][name], grads[1][name])


@pytest.mark.parametrize("weights", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_8_bits_have_their_scales(weights: torch.dtype) -> None:
    given, keep = inputs(), keep_mask()
    scales = {"up_scale": torch.rand(HIDDEN) + 0.1, "down_scale": torch.rand(DIM) + 0.1}
    small = {name: (given[name] * 20).to(weights) for name in ("up_weight", "down_weight")}
    dense = {
        "up_weight": small["up_weight"].float() * scales["up_scale"][:, None],
        "down_weight": small["down_weight"].float() * scales["down_scale"][:, None],
    }
    out = run({**given, **small}, chosen_rows(keep), **scales)
    torch.testing.assert_close(out, masked({**given, **dense}, keep))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "silu"}, "expected activation 'gelu-approximate' or 'gelu', got 'silu'"),
        ({"shift": torch.zeros(BATCH, DIM)}, "shift and scale modulate together"),
        ({"gate": torch.zeros(BATCH + 1, DIM)}, r"gate: expected \[2, 12\] for x"),
        ({"down_weight": torch.zeros(DIM, HIDDEN + 1)}, r"down_weight: expected \[12, 20\].* got \[12, 21\]"),
        ({"up_bias": torch.zeros(HIDDEN - 1)}, r"up_bias: expected \[20\].* got \[19\]"),
        ({"down_scale": torch.zeros(HIDDEN)}, r"down_scale: expected \[12\].* got \[20\]"),
        ({"rows": torch.tensor([0.0])}, r"rows: expected a list of int64, got \[1\] of torch\.float32"),
        ({"residual": torch.zeros(BATCH, TOKENS + 1, DIM)}, r"residual: expected \[2, 7, 12\]"),
    ],
)
def test_what_does_not_fit_is_told(change: dict[str, Any], message: str) -> None:
    options = {**inputs(), "rows": torch.tensor([0]), "activation": "gelu-approximate", **change}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(mlp_on_rows)(**options)  # without the checks of shapes that tests put around it


def test_fixed_rows_are_the_best_of_each_sample_ascending() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [3.0, 1.0, 2.0, 0.0]])
    assert fixed_rows(scores, 2).tolist() == [1, 3, 4, 6]
    assert fixed_rows(scores, 4).tolist() == list(range(8))
    assert fixed_rows(scores, 0).shape == (0,)
    assert fixed_rows(torch.zeros(2, 4), 3).shape == (6,)  # ties do not change the shape
    with pytest.raises(ValueError, match="expected k between 0 and the 4 tokens of a sample, got 5"):
        fixed_rows(scores, 5)


def in_a_process(module: str, *args: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-m", module, *args]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_cases(found: dict[str, Any], count: int, times: float) -> None:
    """The kernels are about as near to fp64 as the plain path, and change the chosen rows alone."""
    assert len(found) == count
    for name, case in found.items():
        assert case["as meant"] and case["changed"] == case["expected"], name
        assert case["plain"] < 0.01, name
        assert case["fused"] <= times * case["plain"], f"{name}: {case}"
    assert sum(case["changed"] for case in found.values()) > 100


@needs_triton
def test_the_kernels_in_tritons_interpreter() -> None:
    # which rounds to bf16 by cutting bits off, twice as far
    check_cases(in_a_process("tests.dynamic.kernel_cases", "cpu", TRITON_INTERPRET="1"), 11, times=3)


@pytest.mark.gpu
@needs_triton
def test_the_kernels_on_a_gpu() -> None:
    check_cases(in_a_process("tests.dynamic.kernel_cases", "cuda"), 5, times=1.2)


@needs_triton
def test_the_kernels_build_for_gpus() -> None:
    found = in_a_process("tests.dynamic.kernel_builds", TRITON_INTERPRET="0")
    expected = {"80": "mma.sync", "90": "wgmma.mma_async", "100": "tcgen05.mma"}
    assert len(found) == 7
    assert found == {name: [expected[name.split()[0]]] * 2 for name in found}


@pytest.mark.gpu
@needs_triton
def test_a_cuda_graph_repeats_the_kernels() -> None:
    given = {name: value.cuda() for name, value in inputs(torch.bfloat16).items()}
    rows = fixed_rows(torch.rand(BATCH, TOKENS, device="cuda"), 3)
    expected = run(given, rows)  # the first call tunes
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(given, rows)
    graph.replay()
    assert torch.equal(out, expected)
