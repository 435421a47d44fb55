"""Run on two ranks: a dynamic FLUX whose tokens are spread over them computes what it computes alone."""

from __future__ import annotations

import pytest
import torch
from diffusers import ContextParallelConfig
from torch import Tensor

from dydit_scale.parallel.world import close, init_world
from tests.models.tiny import inputs, scramble, tiny_dynamic


def main() -> None:
    world = init_world(device="cpu")
    model, x = scramble(tiny_dynamic(token_router="dit")), even(inputs([0.2, 0.9]))
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it; without an accelerator it is 0
    with torch.no_grad():
        alone = model(**x).sample
        calls = count_tokens(model)
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        together = model(**x, return_dict=False)[0]  # as pipelines call it; diffusers takes no output class here
    with pytest.raises(ValueError, match="a context parallel model runs masked"):
        model.pack(torch.tensor([0.2]))
    image, text = x["hidden_states"].shape[1], x["encoder_hidden_states"].shape[1]
    assert calls == {"image": image // 2, "text": text // 2}, calls
    difference = (together - alone).abs().max().item()
    assert difference < 1e-5, difference
    close(world)


def even(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the last text token: each rank takes equally many."""
    return x | {"encoder_hidden_states": x["encoder_hidden_states"][:, :-1], "txt_ids": x["txt_ids"][:-1]}


def count_tokens(model: torch.nn.Module) -> dict[str, int]:
    """How many tokens the first block of the model gets, once it has run."""
    seen: dict[str, int] = {}

    def look(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.update(image=args[0].shape[1], text=args[1].shape[1])

    model.transformer_blocks[0].register_forward_pre_hook(look)
    return seen


if __name__ == "__main__":
    main()
