"""``dydit export``: adapters and models out of a run, each loaded back by its own consumer and compared."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dydit_scale.workflows.exports.card import write_card
from dydit_scale.workflows.exports.common import ExportOptions
from dydit_scale.workflows.exports.loras import (
    write_diffusers,
    write_experts,
    write_fused,
    write_native,
    write_peft,
    write_ranges,
)
from dydit_scale.workflows.exports.models import write_pipeline, write_static
from dydit_scale.workflows.runs import LoadedRun, load_run


def export_run(
    folder: Path,
    formats: list[str],
    *,
    out: Path | None = None,
    steps: int = 28,
    ranges: int = 4,
    force: bool = False,
    license: str = "other",
) -> list[dict[str, Any]]:
    """Write and verify each format, and a model card; returns (and adds to ``export/export.json``) a row for each.

    The adapter as it is: ``td-lora``, with the routers. As a plain LoRA for the static model, without routers, of a
    TD-LoRA the mean over the sampler's timesteps: ``diffusers`` (one file), ``peft`` (a folder), ``kohya`` and
    ``comfyui`` (one file in the original FLUX layers). As several plain LoRAs that ``load_lora_schedule`` lets take
    turns: ``lora-ranges`` (means over ranges of timesteps) and ``lora-experts`` (one for each expert and a table of
    gates, exact at the sampler's timesteps). As a whole pipeline, the adapter merged in as its plain LoRA:
    ``pipeline``, dynamic if the run is, and ``static``, without routers.

    Raises ValueError for a format that the run does not have, or whose file fails its verification.
    """
    run = load_run(folder, device="cpu", fp32=True)
    out = out or run.folder / "export"
    out.mkdir(parents=True, exist_ok=True)
    options, rows = ExportOptions(steps=steps, ranges=ranges, force=force), []
    for name in formats:
        if name not in _WRITERS:
            raise ValueError(f"export format {name!r}: expected one of {', '.join(FORMATS)}")
        rows.append({"format": name, **_WRITERS[name](run, out, options)})
        if run.recipe.dynamic is not None:
            rows[-1]["routers"] = name in WITH_ROUTERS
    every = _record(run.folder / "export" / "export.json", rows)
    write_card(run, out, every, license)
    return rows


def _record(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add rows to the file, in place of earlier ones of their formats; returns all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.is_file() else []
    kept = [r for r in old if r["format"] not in {row["format"] for row in rows}]
    path.write_text(json.dumps(kept + rows, indent=1))
    return kept + rows


_WRITERS: dict[str, Callable[[LoadedRun, Path, ExportOptions], dict[str, Any]]] = {
    "td-lora": write_native,
    "diffusers": write_diffusers,
    "peft": write_peft,
    "kohya": functools.partial(write_fused, style="kohya"),
    "comfyui": functools.partial(write_fused, style="comfyui"),
    "lora-ranges": write_ranges,
    "lora-experts": write_experts,
    "pipeline": write_pipeline,
    "static": write_static,
}
FORMATS = tuple(_WRITERS)
WITH_ROUTERS = ("td-lora", "pipeline")
"""The formats that keep the routers of a dynamic run; the others are for the complete model, at full cost."""
