from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dydit_scale.train.recompute import checkpoint_function


class Block(nn.Module):
    """Four linear layers and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return nn.functional.scaled_dot_product_attention(x, x, x)


class Counted(TorchDispatchMode):
    """Counts linear layers and attentions that are computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = self.attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.linear += "addmm" in name
        self.attention += "scaled_dot_product" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


def computed_again(kind: str, every: int = 1) -> tuple[tuple[int, int], list[Tensor]]:
    """Linear layers and attentions in a backward over three blocks, and its gradients."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(3))
    function = nn.Module.__call__ if kind == "none" else checkpoint_function(blocks, list(blocks), kind, every)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    with Counted() as counted:
        for block in blocks:
            x = function(block, x)
        first = counted.linear, counted.attention
        assert first == (12, 3)
        x.square().sum().backward()
    again = counted.linear - first[0], counted.attention - first[1]
    return again, [p.grad for p in blocks.parameters() if p.grad is not None]


def test_what_is_computed_a_second_time() -> None:
    _, expected = computed_again("none")
    for kind, every, again in (
        ("none", 1, (0, 0)),
        ("full", 1, (12, 3)),
        ("full", 2, (8, 2)),  # the first and the third block
        ("selective", 1, (6, 0)),  # each second product, and no attention
    ):
        found, gradients = computed_again(kind, every)
        assert found == again, (kind, every)
        assert len(gradients) == len(expected) == 24
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
