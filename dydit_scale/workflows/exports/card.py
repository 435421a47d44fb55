"""The model card beside exported files: what they are, what they cost, how to load each in a few lines."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.models.registry import family_of
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.workflows.exports.common import ExportRow
from dydit_scale.workflows.runs import LoadedRun

NAMES, SAMPLES = ("README.md", "MODEL_CARD.md"), "dydit_samples.png"
MARK = "<!-- written by dydit export, and written anew by the next one -->"


def write_card(run: LoadedRun, out: Path, rows: Sequence[ExportRow], license: str | None) -> Path:
    """Write ``README.md`` (with the front matter that huggingface.co reads) and the run's last samples to ``out``.

    Where a ``README.md`` of other origin is, the card is ``MODEL_CARD.md``; see ``card_place``.

    Args:
        rows: Of the files in ``out``, their paths as seen from the run.
        license: Of the weights, as the hub names it; None for that of the card that is replaced, or "other".
    """
    card = card_place(out)
    files = [
        {**row, "file": (run.folder / row["path"]).resolve().relative_to(out.resolve()).as_posix()} for row in rows
    ]
    parts = [_front_matter(run, license or _license_of(card)), MARK, f"# {run.recipe.name}", _summary(run)]
    parts += [_samples(run, out), "## Use", _USE, *(_use(run, row) for row in files)]
    parts += ["## Files", _table(run, files), "## Training", _recipe(run)]
    card.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return card


def card_place(out: Path) -> Path:
    """The first name for the card that is free, or that an earlier card has. Raises ValueError if there is none."""
    for card in (out / name for name in NAMES):
        if not card.exists() or MARK in card.read_text(encoding="utf-8"):
            return card
    raise ValueError(f"{out} holds {' and '.join(NAMES)} that no export wrote; choose another --out")


_USE = "In the folder of these files:"


def _license_of(card: Path) -> str:
    """The licence that an earlier card states; "other" without one."""
    if not card.is_file():
        return "other"
    found = yaml.safe_load(card.read_text(encoding="utf-8").split("---\n")[1])
    return str(found.get("license", "other"))


def _front_matter(run: LoadedRun, license: str) -> str:
    adapter, family = run.recipe.adapter.kind, family_of(run.pipeline)
    fields: dict[str, Any] = {"license": license, "library_name": "diffusers"}
    if not Path(run.recipe.model.base).exists():  # else it is no name of the hub
        fields["base_model"] = run.recipe.model.base
    if family.reads_text:
        fields["pipeline_tag"] = "text-to-video" if family.makes_videos else "text-to-image"
    tags = {"none": [], "routers": [], "lora": ["lora"], "td_lora": ["lora", "td-lora"]}[adapter]
    fields["tags"] = ["dydit-scale", *(["dynamic"] if run.recipe.dynamic is not None else []), *tags]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False).strip()}\n---"


def _summary(run: LoadedRun) -> str:
    recipe = run.recipe
    kind = {
        "none": "All weights of",
        "routers": "Routers for",
        "lora": f"A LoRA of rank {recipe.adapter.rank} for",
        "td_lora": f"A TD-LoRA of rank {recipe.adapter.rank} with {recipe.adapter.experts} experts for",
    }[recipe.adapter.kind]
    step = run.checkpoint.step
    size = f"{step:,} steps of {recipe.train.batch_size} samples at {recipe.data.image_size} px"
    size += " and other aspect ratios of that area" if recipe.data.buckets else ""
    text = f"{kind} `{recipe.model.base}`, trained for {size} with dydit_scale."
    records = [r for r in read_metrics(run.folder / "metrics.jsonl") if r["step"] < step]
    ratios = [r["ratio_eval"] for r in records if "ratio_eval" in r]
    if recipe.dynamic is not None and ratios:
        text += (
            f" With its routers, the model is dynamic: at evaluation it needed {ratios[-1]:.2f} of the static model's "
            f"multiply-accumulates (target {recipe.cost.target:.2f})."
        )
    return text


def _samples(run: LoadedRun, out: Path) -> str:
    found = sorted((run.folder / "samples").glob("step-*.png"))
    if not found:
        return ""
    shutil.copyfile(found[-1], out / SAMPLES)
    return f"![samples]({SAMPLES})\n\nPrompts: {', '.join(run.recipe.train.sample_prompts)}."


def _use(run: LoadedRun, row: dict[str, Any]) -> str:
    cls = type(run.pipeline).__name__
    home = "diffusers" if type(run.pipeline).__module__.startswith("diffusers.") else "dydit_scale"
    start = [f"from {home} import {cls}", "", f'pipe = {cls}.from_pretrained("{run.recipe.model.base}")']
    file, kind = row["file"], row["format"]
    if kind == "td-lora":
        dynamic = run.recipe.dynamic
        if dynamic is None and isinstance(run.network, family_of(run.pipeline).dynamic_class):
            dynamic = DynamicConfig(heads=False, mlp=False, tokens=False)  # the class this family is trained in
        make = [f"pipe.transformer = dy.make_dynamic(pipe.transformer, {_call(dynamic)})"] if dynamic else []
        lines = ["import dydit_scale as dy", *start, *make, f'dy.load_td_lora(pipe.transformer, "{file}")']
    elif kind in ("diffusers", "kohya"):
        lines = [*start, f'pipe.load_lora_weights(".", weight_name="{file}")']
    elif kind == "peft":
        lines = ["from peft import PeftModel", *start, f'PeftModel.from_pretrained(pipe.transformer, "{file}")']
    elif kind in ("lora-ranges", "lora-experts"):
        lines = ["import dydit_scale as dy", *start, f'dy.load_lora_schedule(pipe, "{file}")']
    elif kind in ("pipeline", "static"):
        foreign = home == "diffusers" and row["routers"]
        ours = ["import dydit_scale  # for the class of the transformer"] if foreign else []
        lines = [*ours, start[0], "", f'pipe = {cls}.from_pretrained("{file}")']
    elif kind == "comfyui":
        return f"**{kind}**: put `{file}` into ComfyUI's `models/loras` and choose it in a LoRA loader."
    else:
        raise ValueError(f"model card: no example for format {kind!r}")
    return f"**{kind}**\n\n```python\n" + "\n".join(lines) + "\n```"


def _call(dynamic: DynamicConfig) -> str:
    """``DynamicConfig(...)`` with what differs from its defaults."""
    plain = DynamicConfig()
    given = [
        f"{f.name}={getattr(dynamic, f.name)!r}"
        for f in dataclasses.fields(dynamic)
        if getattr(dynamic, f.name) != getattr(plain, f.name)
    ]
    return f"dy.DynamicConfig({', '.join(given)})"


def _table(run: LoadedRun, files: Sequence[dict[str, Any]]) -> str:
    routers = {True: "yes", False: "no", None: "none trained"}
    lines = ["| format | file | MB | routers | error in the weights | in the output |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['format']} | `{row['file']}` | {row['bytes'] / 1e6:.2f} | {routers[row['routers']]} "
        f"| {row['error_mean']:.3f} | {row['output_error']:.3f} |"
        for row in files
    ]
    notes = ["Each was read back and compared with the run."]
    if not run.recipe.adapter.is_lora:
        notes.append("Errors are shares of the output, from rounding to fp16.")
    else:
        notes.append("Errors are shares of what the adapter does: a plain LoRA cannot vary with the timestep.")
    if run.recipe.dynamic is not None:
        notes.append("Without routers the complete model runs, at full cost.")
    return "\n".join(lines) + "\n\n" + " ".join(notes)


def _recipe(run: LoadedRun) -> str:
    text = (run.folder / "recipe.yaml").read_text(encoding="utf-8").strip()
    return f"<details><summary>recipe.yaml</summary>\n\n```yaml\n{text}\n```\n\n</details>"
