"""Parameters and MACs of published models, from their configs on the meta device, against the published figures."""

from __future__ import annotations

from typing import Any

import pytest
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from torch import nn

from dydit_scale.models.dit import DIT_PATCHES, DIT_SIZES, DyDiTTransformer2DModel, dit_config
from dydit_scale.models.flux import DyFluxTransformer2DModel

IMAGE_1024, TEXT = 4096, 512
"""FLUX's tokens for a picture of 1024 x 1024 pixels and for text."""


def published_dit(name: str, **options: Any) -> DyDiTTransformer2DModel:
    with init_empty_weights():
        return DyDiTTransformer2DModel(**dit_config(name, **options))


def flux(cls: type, **options: Any) -> Any:
    with init_empty_weights():
        return cls(**options)


def parameters(model: nn.Module, routers: bool = False) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if (".dy_" in f".{n}") is routers)


def test_dit() -> None:
    """Parameters: DiT, table 4, in millions. MACs: DiT, table 4, in units of 1e9; tokens of a 256 px picture."""
    found = {}
    for name in (f"{size}/{patch}" for size in DIT_SIZES for patch in DIT_PATCHES):
        model = published_dit(name)
        found[name] = (parameters(model) / 1e6, model.cost((32 // model.patch_size) ** 2).static / 1e9)
    expected = {
        "S/2": (33, 6.06), "S/4": (33, 1.41), "S/8": (33, 0.36),
        "B/2": (130, 23.01), "B/4": (130, 5.56), "B/8": (131, 1.42),
        "L/2": (458, 80.71), "L/4": (458, 19.70), "L/8": (459, 5.01),
        "XL/2": (675, 118.64), "XL/4": (675, 29.05), "XL/8": (676, 7.39),
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, (millions, giga) in expected.items():
        assert found[name][0] == pytest.approx(millions, abs=0.75), name
        assert found[name][1] == pytest.approx(giga, abs=0.006, rel=3e-4), name


def test_sit_is_dit_with_or_without_a_variance() -> None:
    """SiT-XL/2: 675 M (SiT, table 1); learned variance adds its half of the last layer."""
    with_variance, without = published_dit("SiT-XL/2"), published_dit("SiT-XL/2", learn_sigma=False)
    assert parameters(with_variance) == parameters(published_dit("XL/2"))
    assert parameters(with_variance) - parameters(without) == 16 * (1152 + 1)
    assert round(parameters(without) / 1e6) == 675
    assert without.config["out_channels"] == 4 and without.cost(256).static / 1e9 == pytest.approx(118.6, abs=0.05)


def test_dit_at_512_pixels_and_its_routers() -> None:
    """DiT, table 3: 524.6 GMACs; DyDiT: 678 M parameters against 675 M."""
    large = published_dit("DiT-XL/2", sample_size=64)
    assert large.config["out_channels"] == 8 and large.cost(1024).static / 1e9 == pytest.approx(524.6, abs=0.1)
    assert parameters(large, routers=True) / 1e6 == pytest.approx(3.295, abs=0.001)


def test_unknown_sizes_are_refused() -> None:
    for name in ("XL", "XL/3", "M/2"):
        with pytest.raises(ValueError, match=f"expected one of S/2, .*got '{name}'"):
            dit_config(name)


@pytest.mark.parametrize(
    ("options", "billions"),
    [
        ({"guidance_embeds": True}, 11.90),  # dev
        ({"guidance_embeds": False}, 11.89),  # schnell
        ({"guidance_embeds": True, "num_layers": 8}, 8.16),  # flux.1-lite-8B
    ],
    ids=["dev", "schnell", "lite"],
)
def test_flux(options: dict[str, Any], billions: float) -> None:
    """Parameters of the released checkpoints, in units of 1e9."""
    dynamic = flux(DyFluxTransformer2DModel, **options)
    assert parameters(dynamic) == parameters(flux(FluxTransformer2DModel, **options))
    assert parameters(dynamic) / 1e9 == pytest.approx(billions, abs=0.005)


def test_flux_lites_macs() -> None:
    """DyFLUX's base, flux.1-lite: 30.0e12 MACs at 1024 px."""
    model = flux(DyFluxTransformer2DModel, guidance_embeds=True, num_layers=8)
    assert model.cost(IMAGE_1024, TEXT).static / 1e12 == pytest.approx(30.0, abs=0.05)
