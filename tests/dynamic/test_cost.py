from __future__ import annotations

import pytest
import torch

from dydit_scale.dynamic.cost import BlockCost, KeepRates, ModelCost
from dydit_scale.dynamic.losses import TargetSchedule, cost_loss
from dydit_scale.dynamic.masks import DynamicMasks
from dydit_scale.dynamic.ranking import head_importance, units_by_rank, units_in_place

COST = ModelCost(
    blocks=(BlockCost(fixed=1, router=2, heads=10, heads_tokens=4, groups=6, groups_tokens=20),) * 2, outside=3
)


def rates(heads: float, groups: float, tokens: float) -> KeepRates:
    return KeepRates(*(torch.full((2, 1), x) for x in (heads, groups, tokens)))


def test_macs_follow_the_shares() -> None:
    assert COST.static == 3 + 2 * 41
    assert float(COST.dynamic(rates(1, 1, 1))) == COST.static + 4  # routers come on top
    assert float(COST.dynamic(rates(0.5, 0.5, 0.5))) == 3 + 2 * (1 + 2 + 5 + 1 + 3 + 5)
    assert COST.floor(2, 2) == pytest.approx((3 + 2 * (3 + 5 + 3)) / 85)
    assert COST.floor(2, 2, tokens=False) == pytest.approx((3 + 2 * (3 + 5 + 2 + 3 + 10)) / 85)


def test_the_ratio_is_per_sample_with_gradient_to_every_gate() -> None:
    gates = [torch.ones(2, 3, n, requires_grad=True) for n in (4, 4, 8)]
    ratio = COST.ratio(DynamicMasks(*gates))
    assert ratio.shape == (3,) and ratio.dtype == torch.float32
    ratio.sum().backward()
    assert all(bool((g.grad > 0).all()) for g in gates)


def test_the_target_holds_then_ramps() -> None:
    schedule = TargetSchedule(target=0.5, hold_steps=2, ramp_steps=4)
    assert [schedule.at(s) for s in (0, 2, 3, 4, 6, 100)] == [1.0, 1.0, 0.875, 0.75, 0.5, 0.5]
    assert TargetSchedule(target=0.5, hold_steps=1, ramp_steps=0).at(1) == 0.5
    for bad in ({"target": 0.0}, {"target": 1.1}, {"target": 0.5, "ramp_steps": -1}):
        with pytest.raises(ValueError, match="target"):
            TargetSchedule(**bad)
    assert float(cost_loss(torch.tensor(0.7), 0.5)) == pytest.approx(0.04)


def test_the_most_important_members_form_unit_0() -> None:
    importance = torch.tensor([0.1, 5.0, 0.3, 4.0, 9.0, 0.2])
    assert units_by_rank(importance, 3).tolist() == [2, 0, 1, 1, 0, 2]
    assert units_in_place(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="6 channels cannot be cut into 4"):
        units_by_rank(importance, 4)
    value = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        value.weight.copy_(torch.eye(4) * torch.tensor([1.0, 1.0, 3.0, 4.0]))
    assert head_importance([(value, torch.eye(4))], 2).tolist() == pytest.approx([2**0.5, 5.0])
