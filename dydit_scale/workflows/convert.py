"""``dydit convert``: checkpoints of other projects into model folders of diffusers' layout, and back."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from torch import Tensor

from dydit_scale.adapters.tensor_file import check_tensors, read_tensors, write_tensors
from dydit_scale.models.convert import Converted, to_diffusers, to_original
from dydit_scale.models.family import Family
from dydit_scale.models.keys.layout import Layout
from dydit_scale.models.registry import all_families

_PICKLED = (".pt", ".pth")
_WRAPPERS = ("ema", "model", "module")
"""Keys that hold weights in training files, the preferred first."""
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class Conversion(NamedTuple):
    """What was converted."""

    layout: Layout
    tensors: int
    weights: str
    """Which weights of a training file were taken; empty for a plain file."""


def convert(
    source: Path,
    out: Path,
    *,
    to: str = "diffusers",
    weights: str | None = None,
    heads: int | None = None,
    parts: str | None = None,
    pipeline: str | None = None,
) -> Conversion:
    """Write the model folder ``out`` of an original file, or (``to="original"``) the file ``out`` of a model folder.

    Args:
        weights: "ema" or "model" of a training file; default: ema where there is one.
        heads: attention heads, where neither the file nor the published sizes tell them.
        parts: folder or hub name of what belongs around the transformer (an autoencoder for pictures or clips of
            classes, a pipeline otherwise); ``out`` is a whole pipeline then, which a recipe takes as its base.
        pipeline: class of that pipeline, where the layout alone does not tell it: DiT and SiT have the same.

    Raises:
        ValueError: ``out`` exists, or the source is not a whole checkpoint of a known layout; nothing is written then.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; choose another place, or remove it first")
    if to == "diffusers":
        if pipeline and not parts:
            raise ValueError(f"--pipeline {pipeline}: say with --parts what to put around the transformer")
        state, taken = read_checkpoint(source, weights)
        converted = to_diffusers(state, str(source), heads)
        with _aside(out) as folder:
            if parts:
                _pipeline(converted, _family(converted.layout.target, pipeline), parts).save_pretrained(folder)
            else:
                _write_model(folder, converted.tensors, converted.config)
        return Conversion(converted.layout, len(converted.tensors), taken)
    if to != "original":
        raise ValueError(f"to: expected 'diffusers' or 'original'; got {to!r}")
    if weights or heads or parts or pipeline:
        raise ValueError("--weights, --heads, --parts and --pipeline are for original files, not for model folders")
    if out.suffix not in (".safetensors", *_PICKLED):
        raise ValueError(f"{out}: expected a name that ends in .safetensors, .pt or .pth")
    folder_state, config, folder = _read_folder(source)
    layout, original = to_original(folder_state, config, str(folder))
    _write_file(out, original, layout)
    return Conversion(layout, len(original), "")


def read_checkpoint(path: Path, weights: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The weights of a file by name, and the wrapper they came from ("" for none). Nothing is unpickled but tensors,
    plain values and argparse namespaces.

    Raises:
        ValueError: the file is missing, damaged, of another kind, or has not the weights asked for.
    """
    if path.suffix == ".safetensors":
        if weights:
            raise ValueError(f"{path}: --weights {weights}: a safetensors file has one set of weights")
        return read_tensors(path).tensors, ""
    if path.suffix not in _PICKLED:
        raise ValueError(f"{path}: expected a .safetensors, .pt or .pth file")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: refused, because it holds more than weights and plain values ({reason})") from error
    except (RuntimeError, EOFError, ValueError, LookupError) as error:
        raise ValueError(f"{path}: not a whole checkpoint of torch.save ({error}); fetch it again") from error
    state, taken = _unwrapped(loaded, path, weights)
    check_tensors(state, str(path))
    return state, taken


def _unwrapped(loaded: Any, path: Path, weights: str | None) -> tuple[dict[str, Tensor], str]:
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(loaded).__name__}")
    sets = [name for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)]
    if weights and weights not in sets:
        raise ValueError(f"{path}: --weights {weights}: the file has {', '.join(sets) or 'one set of weights only'}")
    taken = weights or next(iter(sets), "")
    state = loaded[taken] if taken else loaded
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: {name} is a {type(value).__name__}; expected tensors, or dicts of them under "
                f"{', '.join(_WRAPPERS)}"
            )
    return dict(state), taken


def _read_folder(source: Path) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
    """All shards and the config of a model folder, or of the transformer in a pipeline's folder."""
    folder = source / "transformer" if (source / "model_index.json").is_file() else source
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise ValueError(f"{source}: expected a model folder with config.json and .safetensors files")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'}: expected an object, got {type(config).__name__}")
    state: dict[str, Tensor] = {}
    for file in files:
        tensors = read_tensors(file).tensors
        if double := state.keys() & tensors.keys():
            raise ValueError(f"{file}: {min(double)} is in another file of the folder too; remove the one that is old")
        state |= tensors
    return state, config, folder


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` at the end, or goes away after an error."""
    aside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_model(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    write_tensors(folder / WEIGHTS_FILE, tensors, {})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _family(model: str, pipeline: str | None) -> Family:
    """The family of a transformer's class; the first of several unless ``pipeline`` names one."""
    fitting = {
        family.pipeline_class.__name__: family
        for family in all_families()
        if model in (family.static_class.__name__, family.dynamic_class.__name__)
    }
    chosen = pipeline or next(iter(fitting))
    if chosen not in fitting:
        raise ValueError(f"--pipeline {pipeline}: a {model} belongs into {' or '.join(fitting)}")
    return fitting[chosen]


def _pipeline(converted: Converted, family: Family, parts: str) -> DiffusionPipeline:
    """A whole pipeline, with the transformer as it is trained: so DiT computes what the original does."""
    classes: dict[str, Any] = {cls.__name__: cls for cls in (family.static_class, family.dynamic_class)}
    with init_empty_weights():
        transformer = classes[converted.layout.target].from_config(converted.config)
    transformer.load_state_dict(converted.tensors, assign=True)  # there is nothing yet to copy into
    try:
        return family.pipeline_of(family.trainable(transformer), parts)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--parts {parts}: not what {family.pipeline_class.__name__} needs around its transformer: {error}"
        ) from error


def _write_file(out: Path, tensors: dict[str, Tensor], layout: Layout) -> None:
    """A safetensors file, or what the original's own ``torch.load`` expects, written aside and moved into place."""
    if out.suffix == ".safetensors":
        return write_tensors(out, tensors, {})
    check_tensors(tensors, str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.tmp")
    # Copies: torch.save would store all of the tensor that a slice is a view of.
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    try:
        torch.save({layout.wrapper: state} if layout.wrapper else state, aside)
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
