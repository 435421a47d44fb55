from __future__ import annotations

import pytest
import torch
from torch import nn

from dydit_scale.dynamic.packing import (
    CutLinear,
    Piece,
    add_on_rows,
    chosen_rows,
    fold,
    pieces,
    shallow,
    take_rows,
)


def test_slices_are_rows_and_columns_and_views_where_they_can_be() -> None:
    linear = nn.Linear(6, 8)
    rows, cols = torch.tensor([1, 4, 5]), torch.tensor([2, 3, 4])
    cut = CutLinear([linear], rows=rows, cols=cols)
    assert torch.equal(cut.weight, linear.weight[rows][:, cols]) and torch.equal(cut.bias, linear.bias[rows])
    assert not cut.weight.requires_grad
    run = CutLinear([linear], rows=torch.arange(2, 6))
    assert run.weight.untyped_storage().data_ptr() == linear.weight.untyped_storage().data_ptr()
    assert CutLinear([linear], bias=False).bias is None


def test_a_timestep_dependent_layer_is_cut_at_its_timestep() -> None:
    class Scaled(nn.Linear):
        def weight_at(self, t_emb: torch.Tensor) -> torch.Tensor:
            return self.weight * t_emb.sum()

    layer, t_emb = Scaled(4, 4), torch.tensor([[1.0, 2.0]])
    assert torch.equal(CutLinear([layer], rows=torch.tensor([0, 2]), t_emb=t_emb).weight, layer.weight[[0, 2]] * 3)
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer))
    folded = fold(net, t_emb)
    assert folded[0] is net[0] and type(folded[1][0]) is CutLinear and net[1][0] is layer
    assert torch.equal(folded[1][0].weight, layer.weight * 3)
    plain = nn.Sequential(nn.Linear(2, 2))
    assert fold(plain, t_emb) is plain


def test_quantised_weights_are_refused() -> None:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised in a way that peft does not know"):
        CutLinear([layer])


def test_shallow_clones_share_tensors_and_change_alone() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    clone = shallow(net, extra=3)
    clone[1] = nn.Tanh()
    assert isinstance(net[1], nn.ReLU) and clone[0] is net[0] and not hasattr(net, "extra")


def test_rows_are_taken_and_added_with_gradients() -> None:
    draw = torch.Generator().manual_seed(0)
    x, stream, gate, done = (
        torch.randn(shape, generator=draw, dtype=torch.double).requires_grad_()
        for shape in ((6, 2), (2, 3, 2), (2, 2), (3, 2))
    )
    rows = torch.tensor([0, 4, 5])
    assert torch.equal(take_rows(x, rows), x[rows])
    assert torch.autograd.gradcheck(lambda x: take_rows(x, rows), x)
    plain = stream.flatten(0, 1).index_add(0, rows, done * gate[rows // 3]).view_as(stream)
    assert torch.allclose(add_on_rows(stream, rows, done, gate), plain, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda *inputs: add_on_rows(inputs[0], rows, *inputs[1:]), (stream, done, gate))


def test_work_lands_on_the_chosen_rows_with_their_samples_gate() -> None:
    keep = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    rows = chosen_rows(keep)
    assert rows.tolist() == [0, 2, 5]
    x = torch.zeros(2, 3, 1)
    Piece(rows, rows // 3, 3).add_(x, torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[10.0], [100.0]]))
    assert x.squeeze(-1).tolist() == [[10.0, 0.0, 20.0], [0.0, 0.0, 300.0]]


@pytest.mark.parametrize("count", [0, 3, 64, 67, 130])
def test_pieces_hold_each_row_once_in_few_sizes(count: int) -> None:
    rows = torch.arange(400)[torch.randperm(400, generator=torch.Generator().manual_seed(count))[:count]]
    (whole,) = pieces(rows, 200, in_few_sizes=False)
    assert torch.equal(whole.rows, rows) and whole.length == count
    found = pieces(rows, 200, in_few_sizes=True)
    assert torch.equal(torch.cat([rows[:0], *(piece.rows[: piece.length] for piece in found)]), rows)
    assert all(len(piece.rows) % 64 == 0 or (len(piece.rows) % 4 == 0 and len(piece.rows) < 68) for piece in found)

    x, gate = torch.randn(2, 200, 3), torch.randn(2, 3)
    expected = x.flatten(0, 1).clone()
    expected[rows] += gate[rows // 200] * expected[rows].square()
    for piece in found:
        piece.add_(x, piece.taken(x).square(), gate)
    assert torch.allclose(x.flatten(0, 1), expected)
