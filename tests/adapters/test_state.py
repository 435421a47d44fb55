"""Saving and loading: round trips, and files that must be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dydit_scale.adapters.state import (
    ADAPTER_FILE,
    CONFIG_FILE,
    ROUTERS_FILE,
    load_td_lora,
    router_state,
    save_td_lora,
    td_lora_state,
)
from dydit_scale.adapters.td_lora import TDLoraConfig, add_td_lora
from tests.adapters.tiny import (
    FLUX_LAYERS,
    DynamicMLP,
    adapted_flux,
    adapted_mlp,
    embeddings,
    flux_config,
    flux_inputs,
    mlp_config,
    tiny_flux,
    tiny_mlp,
    tokens,
)

TIMES = torch.tensor([0.1, 0.5, 0.9])


def trained_mlp() -> DynamicMLP:
    model = adapted_mlp()
    with torch.no_grad():
        for block in model.blocks:
            block["dy_token"].weight.fill_(0.7)
    return model


def test_flux_round_trip_into_a_fresh_model(tmp_path: Path) -> None:
    model = adapted_flux(rank_pattern={"to_q": 4}, alpha_pattern={"to_v": 5.0})
    save_td_lora(model, tmp_path, metadata={"step": "12"})
    fresh = tiny_flux()
    loaded = load_td_lora(fresh, tmp_path)
    assert torch.equal(fresh(**flux_inputs(TIMES)).sample, model(**flux_inputs(TIMES)).sample)
    assert loaded.metadata == {"step": "12"}
    assert loaded.config.rank_pattern == {"to_q": 4}
    assert not (tmp_path / ROUTERS_FILE).exists()
    trained = [name for name, p in fresh.named_parameters() if p.requires_grad]
    assert len(trained) == 4 * FLUX_LAYERS
    assert all(".td_" in name for name in trained)


def test_loading_into_a_model_that_has_the_adapter(tmp_path: Path) -> None:
    model = adapted_flux()
    save_td_lora(model, tmp_path)
    again = add_td_lora(tiny_flux(), flux_config())
    load_td_lora(again, tmp_path)
    assert torch.equal(again(**flux_inputs(TIMES)).sample, model(**flux_inputs(TIMES)).sample)
    other = add_td_lora(tiny_flux(), flux_config(alpha=1.0))
    with pytest.raises(ValueError, match=r"has alpha 1.0, the file has 3.0"):
        load_td_lora(other, tmp_path)


def test_dynamic_round_trip_carries_the_routers(tmp_path: Path) -> None:
    model, x, emb = trained_mlp(), tokens(3), embeddings(3)
    save_td_lora(model, tmp_path)
    assert sorted(load_file(tmp_path / ROUTERS_FILE)) == sorted(router_state(model))
    assert len(router_state(model)) == 4
    fresh = tiny_mlp()
    assert load_td_lora(fresh, tmp_path).skipped_routers == ()
    assert torch.equal(fresh(x, emb), model(x, emb))


def test_routers_can_be_left_in_the_folder_but_not_go_missing(tmp_path: Path) -> None:
    save_td_lora(trained_mlp(), tmp_path)
    fresh = tiny_mlp()
    loaded = load_td_lora(fresh, tmp_path, routers=False)
    assert len(loaded.skipped_routers) == 4
    assert torch.equal(fresh.blocks[0]["dy_token"].weight, tiny_mlp().blocks[0]["dy_token"].weight)
    (tmp_path / ROUTERS_FILE).unlink()
    with pytest.raises(ValueError, match="found none"):
        load_td_lora(tiny_mlp(), tmp_path)


def test_a_static_model_takes_the_adapter_of_a_dynamic_one(tmp_path: Path) -> None:
    save_td_lora(adapted_flux(), tmp_path, extra={"dy_width.weight": torch.ones(2)})
    assert load_td_lora(tiny_flux(), tmp_path).skipped_routers == ("dy_width.weight",)
    save_td_lora(adapted_flux(), tmp_path)
    assert not (tmp_path / ROUTERS_FILE).exists(), "routers of an earlier save"


def test_a_gathered_state_is_saved_in_place_of_the_parameters(tmp_path: Path) -> None:
    model = trained_mlp()
    full = {name: torch.full_like(p, 0.25) for name, p in model.named_parameters()}
    save_td_lora(model, tmp_path, full_state=full)
    tensors = load_file(tmp_path / ADAPTER_FILE) | load_file(tmp_path / ROUTERS_FILE)
    assert len(tensors) == 4 * 4 + 4
    assert all((tensor == 0.25).all() for tensor in tensors.values())
    full.pop("blocks.0.fc1.td_up.default.weight")
    with pytest.raises(ValueError, match=r"lacks 1 parameters, first: blocks\.0\.fc1\.td_up\.default\.weight"):
        save_td_lora(model, tmp_path, full_state=full)


def test_peft_reads_the_folder(tmp_path: Path) -> None:
    model = adapted_flux()
    save_td_lora(model, tmp_path)
    wrapped = PeftModel.from_pretrained(tiny_flux(), str(tmp_path))
    assert torch.equal(wrapped(**flux_inputs(TIMES)).sample, model(**flux_inputs(TIMES)).sample)


def test_names_carry_neither_lora_nor_the_adapter(tmp_path: Path) -> None:
    names = td_lora_state(adapted_mlp())
    assert "blocks.0.fc1.td_up.weight" in names
    assert len(names) == 16
    assert not any("lora" in name or "default" in name for name in names)


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_values_that_are_not_finite_are_not_saved(tmp_path: Path, value: float, message: str) -> None:
    model = adapted_mlp()
    with torch.no_grad():
        model.blocks[0]["fc1"].td_up["default"].weight[0, 0, 0] = value
    with pytest.raises(ValueError, match=rf"blocks\.0\.fc1\.td_up\.weight has values.*{message}"):
        save_td_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_and_empty_tensors_are_not_saved(tmp_path: Path) -> None:
    model = adapted_mlp()
    with pytest.raises(ValueError, match="routers: dy_x has no elements"):
        save_td_lora(model, tmp_path / "out", extra={"dy_x": torch.empty(0)})
    model.blocks[1]["fc2"].td_down["default"].weight.data = torch.empty(0)  # a ZeRO-3 placeholder
    with pytest.raises(ValueError, match=r"blocks\.1\.fc2\.td_down\.weight has no elements"):
        save_td_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


PREFIX = "base_model.model."


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(PREFIX + name)


def with_tensor(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({PREFIX + name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("blocks.0.fc1.td_up.weight"), r"1 names missing \(first: blocks\.0\.fc1\.td_up\.weight"),
        (
            with_tensor("blocks.7.fc1.td_up.weight", torch.ones(1)),
            r"1 unexpected \(first: blocks\.7\.fc1\.td_up\.weight",
        ),
        (
            with_tensor("blocks.0.fc1.td_up.weight", torch.ones(4, 3, 2)),
            r"expected shape \[4, 16, 2\], got \[4, 3, 2\]",
        ),
        (with_tensor("blocks.0.fc1.td_up.weight", torch.full((4, 16, 2), torch.nan)), r"fc1\.td_up\.weight has values"),
        (with_tensor("blocks.0.fc1.td_up.weight", torch.ones(4, 0, 2)), "has no elements"),
        (dict.clear, "expected tensors, got none"),
    ],
)
def test_files_that_do_not_fit_leave_the_model_as_it_was(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    save_td_lora(adapted_mlp(), tmp_path)
    tensors = load_file(tmp_path / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, tmp_path / ADAPTER_FILE)
    model = tiny_mlp()
    with pytest.raises(ValueError, match=message):
        load_td_lora(model, tmp_path)
    assert list(model.state_dict()) == list(tiny_mlp().state_dict())


@pytest.mark.parametrize("name", [ADAPTER_FILE, ROUTERS_FILE, CONFIG_FILE])
@pytest.mark.parametrize("damage", ["truncated", "missing", "noise"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    save_td_lora(adapted_mlp(), tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"\xff" * len(content))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_td_lora(tiny_mlp(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "expected peft_type 'TDLORA', got 'LORA'"),
        ({"extra_key": 1}, r"unknown keys \['extra_key'\]"),
        ({"alpha": "much"}, "wrong type"),
        ({"rank": 3}, r"expected shape \[3, 8\], got \[2, 8\]"),
        ({"target_modules": ["fc1"]}, "8 unexpected"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    save_td_lora(adapted_mlp(), tmp_path)
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        load_td_lora(tiny_mlp(), tmp_path)


def test_the_config_round_trips(tmp_path: Path) -> None:
    config = mlp_config(rank_pattern={"fc1": 3}, alpha_pattern={"fc2": 2.0}, seed=5, dropout=0.25)
    save_td_lora(add_td_lora(tiny_mlp(), config), tmp_path)
    loaded = load_td_lora(tiny_mlp(), tmp_path).config
    assert loaded == config
    assert isinstance(loaded, TDLoraConfig)


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    model, metadata = adapted_flux(), {f"key {i}": 'ä\n"value"' for i in range(9)}
    folders = [save_td_lora(model, tmp_path / str(i), metadata=metadata) for i in range(4)]
    for name in (ADAPTER_FILE, "adapter_config.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name
    with safe_open(folders[0] / ADAPTER_FILE, "pt") as file:
        assert {key: file.metadata()[key] for key in metadata} == metadata
