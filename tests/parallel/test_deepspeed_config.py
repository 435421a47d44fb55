from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dydit_scale.parallel.deepspeed_config import deepspeed_config
from dydit_scale.parallel.engine import EngineConfig
from dydit_scale.parallel.world import World

TWO = World(rank=0, world_size=2)


def made(values: Any, tmp_path: Path, **settings: Any) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return deepspeed_config(EngineConfig(name="zero", deepspeed=str(path), **settings), TWO, 3)


def test_every_value_that_touches_the_numbers_is_written_out() -> None:
    config = deepspeed_config(EngineConfig(name="zero", clip_norm=0.0, zero_stage=3, offload="parameters"), TWO, 3)
    assert config["gradient_clipping"] == 0.0, "DeepSpeed clips at 1 where nothing is said"
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (6, 3)
    zero = config["zero_optimization"]
    assert zero["stage"] == 3 and zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == "cpu"


def test_the_users_json_is_laid_over_it(tmp_path: Path) -> None:
    mine = {"zero_optimization": {"overlap_comm": True, "stage": 2}, "comms_logger": {"enabled": True}}
    agreeing = {"train_batch_size": "auto", "gradient_clipping": 1.0, "fp16": {"enabled": "auto"}, "amp": {}}
    config = made({**mine, **agreeing}, tmp_path)
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["comms_logger"] == {"enabled": True}
    del config["comms_logger"], config["zero_optimization"]["overlap_comm"]
    plain = deepspeed_config(EngineConfig(name="zero"), TWO, 3)
    del plain["zero_optimization"]["overlap_comm"]
    assert config == plain


def test_parameters_that_are_offloaded_may_go_to_nvme(tmp_path: Path) -> None:
    mine = {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/nvme", "buffer_count": 8}}}
    config = made(mine, tmp_path, zero_stage=3, offload="parameters")
    expected = {"device": "nvme", "nvme_path": "/nvme", "buffer_count": 8, "pin_memory": False}
    assert config["zero_optimization"]["offload_param"] == expected
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gradient_clipping": 0.5}, r"gradient_clipping is 0.5, the recipe says 1.0; .* set engine.clip_norm"),
        ({"zero_optimization": {"stage": 3}}, "stage is 3, the recipe says 2; .* set engine.zero_stage"),
        ({"train_batch_size": 64}, "train_batch_size is 64, the recipe says 6; .* train.batch_size"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is .* the recipe says nothing; .* train.lr"),
        ({"bf16": {"enabled": True}}, "bf16 is .* set engine.precision"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param.device is .* engine.offload"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param.device is .* engine.offload"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "cannot be averaged and saved"),
        ({"communication_data_type": "bf16"}, "for every engine; take it out"),
        ("[1]", "expected a JSON object, got list"),
        ("{", "not readable as JSON"),
    ],
)
def test_contradictions_are_named(values: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        made(values, tmp_path)


def test_the_file_must_be_there(tmp_path: Path) -> None:
    config = EngineConfig(name="zero", deepspeed=str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json: not readable"):
        deepspeed_config(config, TWO, 1)
