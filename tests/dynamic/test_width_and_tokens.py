from __future__ import annotations

import pytest
import torch

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.masks import GateNoise
from dydit_scale.dynamic.tokens import make_token_router, route_tokens
from dydit_scale.dynamic.width import WidthRouter


def width_router(**changes: object) -> WidthRouter:
    settings = {"layers": 3, "dim": 8, "heads": 4, "groups": 6, "bias": 3.0, "temperature": 1.0, **changes}
    return WidthRouter(**settings)  # type: ignore[arg-type]


def test_everything_starts_on_and_unit_0_stays_on() -> None:
    router = width_router()
    t_emb = torch.randn(5, 8)
    masks = router(t_emb, "threshold")
    assert masks.heads.shape == (3, 5, 4) and masks.groups.shape == (3, 5, 6)
    assert bool(masks.heads.eq(1).all()) and bool(masks.groups.eq(1).all())
    for unit_router in (router.heads, router.groups):
        torch.nn.init.constant_(unit_router.bias, -50.0)
    off = router(t_emb, "threshold")
    assert bool(off.heads[..., 0].eq(1).all()) and not off.heads[..., 1:].any()


def test_each_sample_has_the_masks_of_its_own_timestep() -> None:
    router = width_router()
    for unit_router in (router.heads, router.groups):
        torch.nn.init.normal_(unit_router.weight, generator=torch.Generator().manual_seed(0))
        torch.nn.init.zeros_(unit_router.bias)
    t_emb = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    together = router(t_emb, "threshold")
    assert 0 < float(together.heads.mean()) < 1
    for i in range(5):
        assert torch.equal(router(t_emb[i : i + 1], "threshold").heads[:, 0], together.heads[:, i])


def test_noise_for_unit_0_is_not_used_and_the_rest_is() -> None:
    router = width_router()
    noise = GateNoise(torch.full((3, 2, 4), -100.0), torch.full((3, 2, 6), 100.0), torch.zeros(3, 2, 1))
    masks = router(torch.randn(2, 8), noise)
    assert masks.heads.sum(-1).eq(1).all() and masks.groups.sum(-1).eq(6).all()


def test_routing_is_in_fp32_under_autocast() -> None:
    router = width_router()
    t_emb = torch.randn(2, 8)
    noise = GateNoise(torch.randn(3, 2, 4), torch.randn(3, 2, 6), torch.zeros(3, 2, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(t_emb, noise)
    assert inside.heads.dtype == torch.float32 and torch.equal(inside.heads, router(t_emb, noise).heads)


@pytest.mark.parametrize("kind", ["dit", "flux"])
@pytest.mark.parametrize("bottleneck", [0, 4])
def test_token_routers_start_on_and_see_what_they_should(kind: str, bottleneck: int) -> None:
    router = make_token_router(DynamicConfig(token_router=kind, token_bottleneck=bottleneck), 32)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    x, temb, text = (torch.randn(2, *s, 32, generator=g) for s in ((7,), (), (3,)))
    assert route_tokens(router, x, temb, text, None, 1.0).eq(1).all()
    for p in router.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=g)
    before = router(x, temb, text)
    assert before.shape == (2, 7)
    depends = [
        not torch.equal(before, router(*other))
        for other in ((x + 1.5 * x.roll(1, -1), temb, text), (x, -temb, text), (x, temb, -text))
    ]
    assert depends == [True, kind == "flux", kind == "flux"]
    assert route_tokens(router, x.bfloat16(), temb.bfloat16(), text.bfloat16(), None, 1.0).dtype == torch.float32
