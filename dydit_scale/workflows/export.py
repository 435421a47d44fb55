"""``dydit export``: adapters and models out of a run, each loaded back by its own consumer and compared."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dydit_scale.workflows.exports.card import card_place, write_card
from dydit_scale.workflows.exports.common import LARGEST_ERROR, Errors, ExportOptions, ExportRow
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


class Format(NamedTuple):
    """One kind of export."""

    write: Callable[[LoadedRun, Path, ExportOptions], Errors]
    """Writes to the path and verifies; ValueError if the run does not have it, or the verification fails."""
    file: str
    """Name of the file or folder."""
    routers: bool = False
    """Whether it keeps the routers of a dynamic run; the others are for the complete model, at full cost."""


FORMATS = {
    "td-lora": Format(write_native, "td_lora", routers=True),
    "diffusers": Format(write_diffusers, "pytorch_lora_weights.safetensors"),
    "peft": Format(write_peft, "peft"),
    "kohya": Format(functools.partial(write_fused, style="kohya"), "kohya.safetensors"),
    "comfyui": Format(functools.partial(write_fused, style="comfyui"), "comfyui.safetensors"),
    "lora-ranges": Format(write_ranges, "lora_ranges"),
    "lora-experts": Format(write_experts, "lora_experts"),
    "pipeline": Format(write_pipeline, "pipeline", routers=True),
    "static": Format(write_static, "static"),
}


def export_run(
    folder: Path,
    formats: Sequence[str],
    *,
    out: Path | None = None,
    steps: int = 28,
    ranges: int = 4,
    force: bool = False,
    license: str | None = None,
) -> list[ExportRow]:
    """Write and verify each format, with a model card; returns (and adds to ``export/export.json``) a row for each.

    The adapter as it is: ``td-lora``, with the routers. As a plain LoRA for the complete model, without routers, of a
    TD-LoRA the mean over the sampler's timesteps: ``diffusers`` (one file), ``peft`` (a folder), ``kohya`` and
    ``comfyui`` (one file in the original FLUX layers). As several plain LoRAs that ``load_lora_schedule`` lets take
    turns: ``lora-ranges`` (means over ranges of timesteps) and ``lora-experts`` (one for each expert and a table of
    gates, exact at the sampler's timesteps). As a whole pipeline, the adapter merged in as its plain LoRA:
    ``pipeline``, dynamic if the run is, and ``static``, without routers.

    Earlier exports of the run are replaced once the new ones are verified. Raises ValueError for a format that the run
    does not have, a place that is taken by something else, an approximation that misses more than ``LARGEST_ERROR``
    (unless ``force``), or a file that fails its verification, which is then not kept.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"export format {unknown[0]!r}: expected one of {', '.join(FORMATS)}")
    run = load_run(folder, device="cpu", fp32=True)
    out = out or run.folder / "export"
    log = run.folder / "export" / "export.json"
    ours = {_place(run, row) for row in _read(log)}
    for name in formats:
        if (target := out / FORMATS[name].file).exists() and target.resolve() not in ours:
            raise ValueError(f"{target} exists and is no export of this run; move it away, or choose another --out")
    card_place(out)
    out.mkdir(parents=True, exist_ok=True)
    options = ExportOptions(steps=steps, ranges=ranges, force=force, license=license)
    rows = []
    for name in formats:
        rows.append(_export(run, name, out, options))
        every = _record(run, log, rows[-1])
        write_card(run, out, [row for row in every if _place(run, row).is_relative_to(out.resolve())], license)
    return rows


def _export(run: LoadedRun, name: str, out: Path, options: ExportOptions) -> ExportRow:
    """Write aside, verify, and put in place."""
    kind = FORMATS[name]
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as aside:
        errors = kind.write(run, Path(aside) / kind.file, options)
        if not math.isfinite(errors.output) or (errors.output > LARGEST_ERROR and not options.force):
            raise ValueError(
                f"{name}: the outputs miss {errors.output:.3f} of the adapter's effect, more than {LARGEST_ERROR}; "
                "use a closer format (td-lora is exact), or --force"
            )
        for made in Path(aside).iterdir():
            place = out / made.name
            if place.is_dir():
                shutil.rmtree(place)
            os.replace(made, place)
    path = out / kind.file
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {
        "format": name,
        "path": str(path),
        "bytes": sum(file.stat().st_size for file in files),
        "error_mean": errors.weights,
        "error_max": errors.worst,
        "output_error": errors.output,
        "routers": kind.routers if run.recipe.dynamic is not None else None,
        "verified": True,
    }


def _record(run: LoadedRun, log: Path, row: ExportRow) -> list[ExportRow]:
    """Put a row into the log, its path as seen from the run, in place of an earlier one there; returns all that still
    exist."""
    place = Path(row["path"]).resolve()
    home = run.folder.resolve()
    seen = place.relative_to(home).as_posix() if place.is_relative_to(home) else str(place)
    kept = [old for old in _read(log) if _place(run, old) != place and _place(run, old).exists()]
    rows = [*kept, ExportRow({**row, "path": seen})]
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(json.dumps(rows, indent=1))
    return rows


def _read(log: Path) -> list[ExportRow]:
    return json.loads(log.read_text()) if log.is_file() else []


def _place(run: LoadedRun, row: ExportRow) -> Path:
    """Where a row's file lies."""
    return (run.folder / row["path"]).resolve()
