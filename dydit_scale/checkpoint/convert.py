"""Weights taken out of a checkpoint, ours or another system's, into one plain safetensors file."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dydit_scale.checkpoint.files import rename_synced
from dydit_scale.checkpoint.manifest import MANIFEST, read_manifest
from dydit_scale.checkpoint.state import of_kind
from dydit_scale.checkpoint.store import Checkpoint, load_checkpoint, open_checkpoint
from dydit_scale.checkpoint.survey import checkpoints_of
from dydit_scale.checkpoint.tensor_file import Kind, dtype_name, write_tensor_file

Layout = Literal["ours", "deepspeed", "dcp"]
Weights = Literal["ema", "param"]
_TITLES = {"deepspeed": "a DeepSpeed checkpoint", "dcp": "a torch.distributed checkpoint"}


class Converted(NamedTuple):
    """What was written."""

    title: str
    """What the source was."""
    tensors: int
    bytes: int


class Source(NamedTuple):
    """Tensors by name, to be read one at a time."""

    title: str
    kinds: Mapping[str, Kind]
    read: Callable[[str], Tensor]


def convert(
    source: Path,
    out: Path,
    *,
    step: int | None = None,
    weights: Weights | None = None,
    prefix: str | None = None,
    trust_pickle: bool = False,
) -> Converted:
    """Write full tensors under their names into ``out``, one file; one tensor at a time is in memory.

    Args:
        source: A run of ours or one of its checkpoints; a folder of DeepSpeed (ZeRO 1, 2, 3) or of
            torch.distributed.checkpoint.
        step: Of a run of ours; None for the newest one that is whole.
        weights: Of ours: the averaged or the plain ones; None for the averaged ones where there are any.
        prefix: Take only names that begin so, and leave that out of them. None takes all; of
            torch.distributed.checkpoint those below ``model.`` where there are any.
        trust_pickle: The other systems' checkpoints are pickle, and to open one runs whatever code is in it.

    Raises ValueError if the source is no checkpoint, is pickle and not trusted, or ``out`` exists; CheckpointError if
    it is damaged.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another name")
    layout = layout_of(source)
    if layout != "ours" and not trust_pickle:
        raise ValueError(
            f"{source}: this is {_TITLES[layout]}, which is pickle: to open it runs whatever code is in it. "
            "If you trust where it comes from, add --trust-pickle"
        )
    if layout == "ours":
        found = _ours(source, step, weights)
    else:
        found = _deepspeed(source) if layout == "deepspeed" else _dcp(source)
    names = _chosen(found, prefix if prefix is not None or layout != "dcp" else "model.", strict=prefix is not None)
    kinds = {name: found.kinds[there] for name, there in names.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.tmp")
    try:
        written = write_tensor_file(draft, kinds, lambda name: found.read(names[name]))
        rename_synced(draft, out)
    finally:
        draft.unlink(missing_ok=True)
    return Converted(found.title, len(kinds), written.bytes)


def layout_of(source: Path) -> Layout:
    """Whose checkpoint it is, by the names of its files; none with tensors is opened. ValueError if nobody's."""
    if not source.is_dir():
        raise ValueError(f"{source}: expected the folder of a checkpoint or a run, found none")
    if (source / ".metadata").is_file():
        return "dcp"
    if _deepspeed_tag(source) is not None:
        return "deepspeed"
    if not (source / MANIFEST).is_file():
        try:
            checkpoints_of(source)
        except ValueError as error:
            raise ValueError(
                f"{source}: no checkpoint of dydit_scale ({MANIFEST} or step-*), DeepSpeed (*_optim_states.pt) or "
                "torch.distributed (.metadata) in it"
            ) from error
    return "ours"


def _chosen(found: Source, prefix: str | None, *, strict: bool) -> dict[str, str]:
    """Names to write -> names in the source."""
    names = {name: name for name in found.kinds}
    if prefix:
        below = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
        if strict and not below:
            raise ValueError(f"no name begins with {prefix!r}; the first is {next(iter(names), None)!r}")
        names = below or names
    if not names:
        raise ValueError(f"{found.title}: there are no tensors in it")
    return names


def _ours(source: Path, step: int | None, weights: Weights | None) -> Source:
    if (source / MANIFEST).is_file():
        if step is not None:
            raise ValueError(f"{source}: is one checkpoint; a step belongs to a run")
        checkpoint: Checkpoint | None = open_checkpoint(source)
    else:
        checkpoint = load_checkpoint(checkpoints_of(source), step)
    assert checkpoint is not None, f"{source}: layout_of found checkpoints"
    manifest = read_manifest(checkpoint.path)
    averaged = any(name.startswith("ema.") for name in manifest.tensors)
    if weights == "ema" and not averaged:
        raise ValueError(f"{source}: the run kept no average of its weights; take the weights param")
    kind = weights or ("ema" if averaged else "param")
    tensors = of_kind(checkpoint, kind)
    kinds = {name: manifest.tensors[f"{kind}.{name}"].kind for name in tensors}
    return Source(f"step {checkpoint.step}, {kind} weights", kinds, tensors.__getitem__)


def _deepspeed_tag(source: Path) -> Path | None:
    """The folder with the optimizer states, of which every rank has a file; None if there is none."""
    folders = [source]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        folders.append(source / Path((source / "latest").read_text().strip()).name)
    return next((folder for folder in folders if any(folder.glob("*_optim_states.pt"))), None)


def _deepspeed(source: Path) -> Source:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = _deepspeed_tag(source)
    assert folder is not None, f"{source}: layout_of found one"
    with contextlib.redirect_stdout(io.StringIO()):
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name, lazy_mode=True)
    whole = folder / "mp_rank_00_model_states.pt"
    if whole.is_file():  # of stage 1 DeepSpeed's own function leaves out the frozen weights
        module = torch.load(whole, map_location="cpu", mmap=True, weights_only=False)["module"]
        state = {**{name: tensor for name, tensor in module.items() if isinstance(tensor, Tensor)}, **state}
    kinds = {name: Kind(dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.items()}
    return Source(f"DeepSpeed, {folder.name}", kinds, lambda name: state[name].contiguous())


def _dcp(source: Path) -> Source:
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = FileSystemReader(source).read_metadata().state_dict_metadata
    tensors = {name: entry for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
    kinds = {name: Kind(dtype_name(entry.properties.dtype), tuple(entry.size)) for name, entry in tensors.items()}

    def read(name: str) -> Tensor:
        state = {name: torch.empty(tensors[name].size, dtype=tensors[name].properties.dtype)}
        load(state, storage_reader=FileSystemReader(source), no_dist=True)
        return state[name]

    return Source("torch.distributed.checkpoint", kinds, read)
