"""Memory that others report for training FLUX.1-dev, beside what the planner computes for their settings.

Their trainers keep weights and moments in other types than ours, so the types are part of a setting; activations are
traced on the same network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from dydit_scale.planning.bases import find_base
from dydit_scale.planning.memory import Layout, find_peak, holdings
from dydit_scale.planning.network import Planned
from dydit_scale.planning.trace import Segment, trace_step
from dydit_scale.train.recipe import Recipe, build

_BASE = "black-forest-labs/FLUX.1-dev"
_ATTENTION = r".*transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)"
_ALL = (
    r".*transformer_blocks\.\d+\..*(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|net\.0\.proj|net\.2|proj_mlp|"
    r"proj_out|linear)"
)
CONTEXT = 0.7e9
"""Bytes of the CUDA context and libraries' workspaces."""


@dataclass(frozen=True, kw_only=True)
class Reported:
    """A figure and the settings that it is said to hold for."""

    setup: str
    source: str
    gigabytes: float
    relation: str = "="
    """``=`` a measured or estimated amount, ``>`` more than it is needed, ``<`` that much is enough."""
    rank: int | None = None
    """Of LoRA; None where all weights learn."""
    everywhere: bool = False
    """LoRA on all linear layers of the blocks, modulation included; on attention alone otherwise."""
    side: int = 512
    """Pixels."""
    batch: int = 1
    """Samples of a GPU at a time."""
    recompute: bool = True
    trained: tuple[float, float, float] = (4, 4, 8)
    """Bytes of weight, gradient and moments for each trainable parameter."""
    shards: int = 1
    """GPUs that share the moments."""
    encoders: bool = False
    """Autoencoder and text encoders stay on the GPU."""
    note: str = ""
    """What explains a difference."""


FIGURES = (
    Reported(
        setup="LoRA r16, 512², batch 1, bf16, compiled", source="unsloth PR 6839, B200", gigabytes=24.7, rank=16
    ),
    Reported(
        setup="LoRA r4, 512x768, batch 1, bf16, 8-bit Adam, embeddings cached", rank=4, side=640,
        source="Hugging Face blog flux-qlora, 2025-06", gigabytes=26, trained=(4, 4, 2),
        note="traced at 640², which has 4 % more pixels",
    ),
    Reported(
        setup="LoRA r128, 1024², batch 1, bf16, 8-bit Adam", source="sd-scripts PR 1374, A6000", gigabytes=44.2,
        rank=128, everywhere=True, side=1024, trained=(4, 4, 2), encoders=True,
        note="assumed: all linear layers of blocks, fp32 LoRA, text encoders on the GPU",
    ),
    Reported(
        setup="LoRA r16 on all layers, bf16", source="SimpleTuner, quickstart/FLUX", gigabytes=30, relation=">",
        rank=16, everywhere=True, side=1024, recompute=True, encoders=True,
        note="a lower bound for a range of settings",
    ),
    Reported(
        setup="LoRA r16, all parts of the pipeline on the GPU, 1024²", source="diffusers README_flux", gigabytes=40,
        relation=">", rank=16, side=1024, recompute=False, encoders=True, note="a lower bound",
    ),
    Reported(
        setup="all weights, bf16 with its moments", source="Hugging Face blog flux-qlora (estimate)", gigabytes=120,
        trained=(2, 2, 4),
        note="missed: an estimate that names no setting; ours has 8 bytes a parameter; with fp32 moments 12, 144 GB",
    ),
    Reported(
        setup="all weights, bf16, 8-bit Adam, embeddings cached, 1024²", source="sd-scripts, thread 1517, A100 80 GB",
        gigabytes=80, relation="<", side=1024, trained=(2, 2, 2),
    ),
    Reported(
        setup="all weights, bf16, ZeRO-1 over 32 H100 80 GB, 1024², batch 8", gigabytes=80, relation="<", side=1024,
        source="SimpleTuner, DISTRIBUTED", batch=8, trained=(2, 2, 12), shards=32,
    ),
)  # fmt: skip


class Reproduced(NamedTuple):
    """A reported figure and ours."""

    reported: Reported
    gigabytes: float
    parts: dict[str, float]
    """GB by name."""

    @property
    def holds(self) -> bool:
        """Within 10 %, or on the right side of a bound."""
        theirs = self.reported.gigabytes
        if self.reported.relation == "=":
            return math.isclose(self.gigabytes, theirs, rel_tol=0.1)
        return self.gigabytes > theirs if self.reported.relation == ">" else self.gigabytes <= theirs


def reproduce(figure: Reported) -> Reproduced:
    """What the planner computes for the settings of a figure."""
    recipe, base = _recipe(figure), find_base(_BASE)
    planned = Planned.build(recipe, base)
    own = holdings(recipe, planned, encoded=not figure.encoders)
    weight, gradient, moments = figure.trained
    trained = own.whole.trainable // 4  # numbers: they are fp32 here
    frozen, segments = own.whole.frozen, trace_step(recipe, base, figure.batch, gpu=True)
    if figure.rank is None:  # traced with a small LoRA, whose weights stay frozen in bf16: no copies by autocast
        trained, frozen = own.whole.frozen // 2, 0
        segments = [_with_all_gradients(s, [u.frozen // 2 for u in own.units]) for s in segments]
    how = Layout(
        kept={
            "weights": frozen + int(weight * trained) + own.buffers,
            "optimiser": int(moments * trained / figure.shards),
            "encoders": own.encoders,
            "context": int(CONTEXT),
        },
        gradients=lambda before, within: int(gradient / 4 * (before + within)),
        step=int(gradient * trained),
    )
    peak = find_peak(segments, how)
    return Reproduced(figure, peak.total / 1e9, {name: size / 1e9 for name, size in peak.items.items()})


def _with_all_gradients(segment: Segment, numbers: list[int]) -> Segment:
    """The segment as if all weights of its block learnt."""
    learnt = segment.backward and segment.unit is not None
    return segment._replace(gradients=4 * numbers[segment.unit] if learnt and segment.unit is not None else 0)


def _recipe(figure: Reported) -> Recipe:
    values = {
        "name": "reported",
        "run": "runs/reported",
        "model": {"base": _BASE},
        "data": {"path": "data", "image_size": figure.side},
        "adapter": {
            "kind": "lora", "rank": figure.rank or 1, "targets": _ALL if figure.everywhere else _ATTENTION,
        },
        "train": {
            "steps": 1, "batch_size": figure.batch, "ema": None,
            "gradient_checkpointing": "full" if figure.recompute else "none",
        },
        "engine": {"precision": "bf16"},
    }  # fmt: skip
    return build(Recipe, values, where="")


def as_markdown() -> str:
    """All figures as a table."""
    lines = [
        "| setup | source | published, GB | ours, GB | difference | |",
        "|---|---|---|---|---|---|",
    ]
    for figure in FIGURES:
        found = reproduce(figure)
        sign = "" if figure.relation == "=" else f"{figure.relation} "
        apart = f"{100 * (found.gigabytes / figure.gigabytes - 1):+.0f} %" if not sign else "holds" * found.holds
        lines.append(
            f"| {figure.setup} | {figure.source} | {sign}{figure.gigabytes:g} | {found.gigabytes:.1f} | {apart} "
            f"| {figure.note} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    from dydit_scale.models.quiet import quiet_libraries

    quiet_libraries()
    print(as_markdown())
