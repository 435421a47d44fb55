"""The parts of a pipeline from a folder or the hub, checked."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.model_loading_utils import _CLASS_REMAPPING_DICT
from safetensors import SafetensorError, safe_open

from dydit_scale.models.family import Family, frozen_parts
from dydit_scale.models.registry import family_named


def family_of_base(base: str) -> Family:
    """The family of a pipeline's folder or hub name, by the class that its model_index.json names.

    Raises ValueError if there is none, or no such file.
    """
    _check_folder(base)
    try:
        config = DiffusionPipeline.load_config(base)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.base {base}: its model_index.json cannot be read: {error}") from error
    return family_named(config["_class_name"], f"model.base {base}")


def load_pipeline(base: str, family: Family, dtype: torch.dtype = torch.float32, *, text_encoders: bool = True) -> Any:
    """The pipeline around the transformer (scheduler, autoencoder, text encoders, tokenizers), without it.

    Args:
        text_encoders: False leaves them out too, for data that brings embeddings.
    """
    _check_folder(base)
    cls = family.pipeline_class
    left_out = ["transformer"]
    try:
        if not text_encoders:
            left_out += [name for name in cls.load_config(base) if name.startswith("text_encoder")]
        pipe = cls.from_pretrained(base, **dict.fromkeys(left_out), dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"model.base {base}: it does not load as a {cls.__name__}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    for part in frozen_parts(pipe):
        part.requires_grad_(False).eval()
    return pipe


def load_transformer(base: str, family: Family, *, from_scratch: bool = False) -> Any:
    """The transformer of a pipeline's folder or hub name in fp32, strictly: every weight must be there and fit.

    It is of the family's static class, or of its dynamic one where the folder says so or the family trains that.

    Raises:
        ValueError: the folder has none, or a weight is missing, too much, or of another shape (the first is named).
    """
    _check_folder(base)
    cls: Any = transformer_class(base, family)
    if from_scratch:
        return family.trainable(cls.from_config(cls.load_config(base, subfolder="transformer")))
    if Path(base).is_dir():
        _check_weights(Path(base) / "transformer", cls)
    try:
        model, info = cls.from_pretrained(base, subfolder="transformer", dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"base {base}: its transformer does not load as {cls.__name__}: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"base {base}: {len(missing)} weights are missing, first {missing[0]}")
    return family.trainable(model)


def transformer_config(base: str, family: Family) -> dict[str, Any]:
    """The ``config.json`` of a base's transformer.

    Raises ValueError if it cannot be read.
    """
    try:
        return family.static_class.load_config(base, subfolder="transformer")
    except (OSError, ValueError) as error:
        raise ValueError(f"base {base}: the config of its transformer cannot be read: {error}") from error


def transformer_class(base: str, family: Family) -> type[ModelMixin]:
    """The static or dynamic class of the family that a base's transformer is of; ValueError if it is of another."""
    known = {cls.__name__: cls for cls in (family.static_class, family.dynamic_class)}
    config = transformer_config(base, family)
    name = config.get("_class_name")
    name = _CLASS_REMAPPING_DICT.get(name, {}).get(config.get("norm_type"), name)  # older files: Transformer2DModel
    if name not in known:
        raise ValueError(f"base {base}: its transformer is a {name}; expected {' or '.join(known)}")
    return known[name]


def _check_folder(base: str) -> None:
    looks_local = base.startswith((".", "/", "~")) or base.count("/") != 1
    if looks_local and not (Path(base) / "model_index.json").is_file():
        raise ValueError(f"model.base {base}: expected the folder of a pipeline (with model_index.json) or a hub name")


def _check_weights(folder: Path, cls: Any) -> None:
    """Compare names and shapes in the files with what the config asks for, without reading a weight."""
    with init_empty_weights():
        wanted = {name: tuple(t.shape) for name, t in cls.from_config(cls.load_config(folder)).state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"base {path}: damaged or truncated: {error}") from error
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"base {folder}: {name}: config.json asks for {wanted.get(name, 'no such weight')}, "
                f"the file holds {found.get(name, 'no such weight')}; the weights do not belong to this config"
            )


_UNSTABLE = ("_diffusers_version", "_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Keys of a config.json that say who wrote it, not what it computes."""


@functools.cache
def encoder_digests(base: str) -> dict[str, str]:
    """SHA-256 of each part of a base that makes latents and embeddings (autoencoder, text encoders, tokenizers), by its
    name: over the files of its folder. A base on the hub is fetched as for training."""
    _check_folder(base)
    folder = Path(base) if Path(base).is_dir() else Path(DiffusionPipeline.download(base))
    parts = [p for p in sorted(folder.iterdir()) if p.name.startswith(("vae", "text_encoder", "tokenizer"))]
    return {part.name: _part_digest(part) for part in parts if part.is_dir()}


def _part_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        if path.name == "config.json":
            config = json.loads(path.read_text(encoding="utf-8"))
            stable = {name: value for name, value in config.items() if name not in _UNSTABLE}
            digest.update(json.dumps(stable, sort_keys=True).encode())
        else:
            _add_file(digest, path)
    return digest.hexdigest()


def base_digest(base: str) -> str:
    """What identifies the transformer of a base: the SHA-256 of its weight files, or the name of a base on the hub."""
    files = sorted((Path(base) / "transformer").glob("*.safetensors"))
    if not files:
        return base
    digest = hashlib.sha256()
    for path in files:
        _add_file(digest, path)
    return digest.hexdigest()


def _add_file(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
