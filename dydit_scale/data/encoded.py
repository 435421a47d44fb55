"""Encoded data sets: latents and text embeddings that were computed once, in shards like any others.

A sample is ``KEY.json`` (what it was made from) and ``KEY.safetensors`` (what was made of it); what was bad in the
source is a ``KEY.json`` with the reason alone, so that every sample keeps its place. Beside the shards
``encoders.json`` says how all of it was made, and ``empty.safetensors`` holds the embeddings of the empty prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64, Shaped
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dydit_scale.data.decode import MAX_LABEL, BadSampleError
from dydit_scale.data.remote import RemoteFolder

ENCODERS_FILE = "encoders.json"
EMPTY_FILE = "empty.safetensors"
FORMAT = "dydit-encoded-v2"
ENTRY_EXTENSION, TENSORS_EXTENSION = "json", "safetensors"
MAX_ENTRY_BYTES = 1 << 23
MAX_TENSOR_BYTES = 1 << 31
MAX_HEADER_BYTES = 1 << 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_METADATA = re.compile(rb'\{"__metadata__":\{"entry":"[0-9a-f]{64}"\},')
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What safetensors calls them."""
TEXT = "text"
"""The embeddings of a caption's tokens, as long as the caption; others have one shape for all."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a data set was encoded: the content of ``encoders.json``."""

    family: str
    """Of the pipeline whose captions were embedded."""
    encoders: dict[str, str]
    """SHA-256 of autoencoder, text encoders and tokenizers by name."""
    image_size: int
    """``data.image_size`` of the recipe."""
    sizes: list[list[int]]
    """Height and width of each bucket of the recipe, in pixels; of the square alone without ``data.buckets``."""
    text_tokens: int
    """``model.text_tokens`` of the recipe."""
    computed: str
    """Precision of the encoders, one of ``DTYPES``."""
    dtype: str
    """Of what is stored, one of ``DTYPES``."""
    source: str
    """Digest of the index of the shards that were encoded."""
    channels: int
    """Of the latents."""
    stride: int
    """Pixels along a side of one latent."""
    spread: bool
    """Whether the autoencoder's distribution has a width, stored as ``std``."""
    text: dict[str, list[int]]
    """Shapes of a caption's embeddings by name, ``text`` at full length; empty for families of classes."""
    empty: str | None
    """SHA-256 of ``empty.safetensors``; None for families of classes."""

    def __hash__(self) -> int:
        return hash(self.source)  # lists and dicts have none

    def __post_init__(self) -> None:
        for name in (self.computed, self.dtype):
            if name not in DTYPES:
                raise ValueError(f"{ENCODERS_FILE}: dtype {name!r}, expected one of {', '.join(DTYPES)}")
        if min(self.channels, self.stride, self.image_size) < 1:
            raise ValueError(f"{ENCODERS_FILE}: channels, stride and image_size must be 1 or more")
        for name, shape in self.text.items():
            if not shape or any(type(length) is not int or length < 1 for length in shape):
                raise ValueError(f"{ENCODERS_FILE}: {name} has the shape {shape!r}, expected lengths of 1 or more")


class SourceInfo(NamedTuple):
    """Which sample was encoded."""

    shard: str
    key: str
    width: int
    """Of the picture as it was, in pixels."""
    height: int
    media_sha256: str
    """Of the bytes of picture or clip; "" for a bad sample."""
    caption_sha256: str
    """Of the bytes of the file that holds the caption; "" if there is none."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A sample's ``KEY.json``."""

    encoding: str
    """``way_digest`` of the set that it belongs to."""
    source: SourceInfo
    height: int = 0
    """Pixels that were encoded, after resizing and cropping."""
    width: int = 0
    frames: int = 0
    """Of a clip, all of them; 0 for a picture."""
    captions: list[str] = field(default_factory=list)
    label: int = -1
    """-1 for none."""
    bad: str | None = None
    """Why the sample could not be encoded."""


class Decoded(NamedTuple):
    """What an encoded sample holds."""

    moments: Shaped[Tensor, "*frames moments rows cols"]
    """The mean and behind it, where there is one, the standard deviation, along the channels."""
    texts: list[dict[str, Tensor]]
    """Embeddings of each caption by name."""


class EncodedBatch(NamedTuple):
    """What stands for the pixels of a micro-batch, and for its captions' way through the text encoders."""

    moments: Shaped[Tensor, "batch *frames moments rows cols"]
    """Of the pictures or frames as ``Batch.pixels`` would show them: mean and, behind it, standard deviation."""
    text: dict[str, Shaped[Tensor, "captions ..."]]
    """Embeddings of the captions (each followed by those of its pictures), dropped ones included; ``text`` is as long
    as its longest."""
    lengths: Int64[Tensor, " captions"]
    """Tokens of each in ``text``."""


def encoding_bytes(encoding: Encoding) -> bytes:
    """The content of ``encoders.json``."""
    return json.dumps({"format": FORMAT, **asdict(encoding)}, indent=1, sort_keys=True).encode()


def encoding_digest(encoding: Encoding) -> str:
    """SHA-256 of ``encoders.json``."""
    return hashlib.sha256(encoding_bytes(encoding)).hexdigest()


@lru_cache(maxsize=64)
def way_digest(encoding: Encoding) -> str:
    """SHA-256 of the way in which samples are encoded: of ``encoders.json`` without the source."""
    return encoding_digest(replace(encoding, source=""))


def find_encoding(folder: Path | RemoteFolder) -> Encoding | None:
    """The ``encoders.json`` of a folder, None if its shards are no encoded ones; ValueError if it is broken or of
    another format, RemoteError if the object store cannot be read."""
    data = _read_file(folder, ENCODERS_FILE)
    if data is None:
        return None
    try:
        content = json.loads(data.decode("utf-8"))
        if (found := content.pop("format")) != FORMAT:
            raise ValueError(f"format {found!r}, expected {FORMAT!r}")
        return Encoding(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder}/{ENCODERS_FILE}: broken or foreign ({error}); encode the data again into an empty folder, or "
            "restore the file from its source"
        ) from error


def empty_bytes(text: Mapping[str, Tensor]) -> bytes:
    """The content of ``empty.safetensors``."""
    return save({name: tensor.contiguous() for name, tensor in text.items()})


def read_empty(folder: Path | RemoteFolder, encoding: Encoding) -> dict[str, Tensor]:
    """The empty prompt's embeddings; ValueError if they are not those that ``encoders.json`` names, RemoteError if the
    object store cannot be read."""
    if encoding.empty is None:
        return {}
    data = _read_file(folder, EMPTY_FILE)
    try:
        if data is None:
            raise ValueError("no such file")
        if hashlib.sha256(data).hexdigest() != encoding.empty:
            raise ValueError(f"it does not belong to {ENCODERS_FILE}")
        places, size = _parse(_header(data))
        text = _text_places(places, encoding, "")
        return {
            name: _tensor(memoryview(bytearray(data)), _data_start(data, size), place) for name, place in text.items()
        }
    except ValueError as error:
        place = f"{folder}/{EMPTY_FILE}"
        raise ValueError(f"{place}: {error}; restore the file from its source, or encode the data again") from error


def _read_file(folder: Path | RemoteFolder, name: str) -> bytes | None:
    """A file beside the shards; None if there is none."""
    if isinstance(folder, Path):
        return (folder / name).read_bytes() if (folder / name).is_file() else None
    size = folder.size(name)
    return None if size is None else folder.read(name, 0, size)


def pack_sample(entry: Entry, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The two files of a sample by extension; of a bad one the entry alone.

    The tensors carry the hash of the entry, so that neither can be exchanged unnoticed, and the entry says in which way
    they were encoded.
    """
    data = json.dumps(
        {"format": FORMAT, **asdict(entry), "source": entry.source._asdict()}, ensure_ascii=False, sort_keys=True
    ).encode()
    if entry.bad is not None:
        return {ENTRY_EXTENSION: data}
    metadata = {"entry": hashlib.sha256(data).hexdigest()}
    return {ENTRY_EXTENSION: data, TENSORS_EXTENSION: save(dict(tensors), metadata)}


def caption_tensor(number: int, name: str) -> str:
    """How the file calls an embedding of the ``number``-th caption."""
    return f"caption.{number}.{name}"


def decode_entry(data: bytes) -> Entry:
    """A sample's ``KEY.json``; BadSampleError if it is broken."""
    try:
        content = json.loads(data.decode("utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError(f"expected the format {FORMAT!r}")
        entry = Entry(**(content | {"source": SourceInfo(**content["source"])}))
        _check_entry(entry)
        return entry
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadSampleError(f"broken entry of an encoded sample ({type(error).__name__}: {error})") from error


def _check_entry(entry: Entry) -> None:
    whole = {"height": entry.height, "width": entry.width, "frames": entry.frames, "label": entry.label}
    whole |= {"source.width": entry.source.width, "source.height": entry.source.height}
    for name, number in whole.items():
        if type(number) is not int or not -1 <= number <= MAX_LABEL or (number < 0 and name != "label"):
            raise ValueError(f"{name} is {number!r}")
    texts = [*entry.captions, entry.encoding, entry.source.shard, entry.source.key]
    texts += [] if entry.bad is None else [entry.bad]
    if type(entry.captions) is not list or not all(isinstance(text, str) for text in texts):
        raise ValueError("captions, encoding, shard, key and reason must be strings")


def decode_tensors(data: bytes | memoryview, entry: Entry, encoding: Encoding) -> Decoded:
    """A sample's ``KEY.safetensors``, with the names, shapes and dtype that belong to its entry; else
    BadSampleError. The tensors lie in ``data`` where that may be written to.

    A plain ValueError if it was encoded in another way than the set: then its whole shard is foreign."""
    if entry.encoding != (way := way_digest(encoding)):
        raise ValueError(
            f"{entry.source.shard}: sample {entry.source.key!r} was encoded otherwise ({entry.encoding[:12]}) than "
            f"{ENCODERS_FILE} says ({way[:12]}), so the shard is of another set; put this set's own there, or delete "
            "it and run `dydit data encode` again"
        )
    try:
        header = _METADATA.sub(b"{", _header(data), count=1)
        plan = _plan(encoding, header, entry.height, entry.width, entry.frames, len(entry.captions))
        start = _data_start(data, plan.bytes)
    except (ValueError, KeyError) as error:
        reason = f"no tensor {error}" if isinstance(error, KeyError) else str(error)
        raise BadSampleError(f"broken encoded sample ({reason})") from error
    view = memoryview(data)
    buffer = memoryview(bytearray(data)) if view.readonly else view
    moments = [_tensor(buffer, start, place) for place in plan.moments]
    texts = [{name: _tensor(buffer, start, place) for name, place in text.items()} for text in plan.texts]
    return Decoded(moments[0] if len(moments) == 1 else torch.cat(moments, dim=-3), texts)


class _Place(NamedTuple):
    """A tensor in a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Bytes from the start of the data."""


class _Plan(NamedTuple):
    """Where a sample's tensors lie."""

    moments: list[_Place]
    texts: list[dict[str, _Place]]
    bytes: int
    """Of all tensors."""


@lru_cache(maxsize=1024)
def _plan(encoding: Encoding, header: bytes, height: int, width: int, frames: int, captions: int) -> _Plan:
    """The places of all tensors, checked; samples of one size with captions of one length have the same header, and
    reading it takes longer than reading the tensors. ValueError, or KeyError of a name that is missing."""
    places, size = _parse(header)
    moments = [places.pop(name) for name in (("mean", "std") if encoding.spread else ("mean",))]
    shape = (*([frames] if frames else []), encoding.channels, height // encoding.stride, width // encoding.stride)
    for place in moments:
        if place.shape != shape or place.dtype != DTYPES[encoding.dtype]:
            raise ValueError(f"latents {place.dtype} {list(place.shape)}, expected {encoding.dtype} {list(shape)}")
    numbers = range(captions if encoding.text else 0)
    texts = [_text_places(places, encoding, caption_tensor(number, "")) for number in numbers]
    if unknown := places.keys() - {caption_tensor(n, name) for n in numbers for name in encoding.text}:
        raise ValueError(f"unknown tensors {', '.join(sorted(unknown)[:3])}")
    first, *others = moments
    if others and not frames and others[0].begin == first.begin + prod(shape) * first.dtype.itemsize:
        moments = [first._replace(shape=(2 * shape[0], *shape[1:]))]  # they lie side by side: nothing to join
    return _Plan(moments, texts, size)


def check_tensors(data: bytes, entry_data: bytes, decoded: Decoded, encoding: Encoding) -> None:
    """What is looked at once, when a sample is indexed: the tensors are finite, and were made of this entry."""
    named = {name: tensor for text in decoded.texts for name, tensor in text.items()} | {"latents": decoded.moments}
    for name, tensor in named.items():
        if not torch.isfinite(tensor).all():
            raise BadSampleError(f"broken encoded sample ({name} has values that are NaN or infinite)")
    if encoding.spread and bool((decoded.moments[..., encoding.channels :, :, :] < 0).any()):
        raise BadSampleError("broken encoded sample (a negative standard deviation)")
    if json.loads(_header(data)).get("__metadata__", {}).get("entry") != hashlib.sha256(entry_data).hexdigest():
        raise BadSampleError("the tensors were made for another entry (caption, picture or label) than the .json")


def join_texts(texts: Sequence[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Int64[Tensor, " captions"]]:
    """Embeddings of several captions in one tensor each, ``text`` filled with zeros to the longest; and its lengths."""
    lengths = torch.tensor([len(text.get(TEXT, ())) for text in texts])
    columns = {name: [text[name] for text in texts] for name in texts[0]}
    ragged = {TEXT} if len(set(lengths.tolist())) > 1 else set()  # stacking is several times faster than padding
    joined = {n: pad_sequence(c, batch_first=True) if n in ragged else torch.stack(c) for n, c in columns.items()}
    return joined, lengths


def _text_places(places: Mapping[str, _Place], encoding: Encoding, prefix: str) -> dict[str, _Place]:
    """The embeddings of one caption, whose names in the file begin with ``prefix``."""
    found = {}
    for name, (tokens, *shape) in encoding.text.items():
        place = places[prefix + name]
        length = place.shape[0] if name == TEXT and place.shape else tokens
        if place.shape != (length, *shape) or not 1 <= length <= tokens or place.dtype != DTYPES[encoding.dtype]:
            raise ValueError(
                f"{prefix}{name} {place.dtype} {list(place.shape)}, expected {encoding.dtype} {[tokens, *shape]}"
                + (" or shorter" if name == TEXT else "")
            )
        found[name] = place
    return found


def _tensor(buffer: memoryview, start: int, place: _Place) -> Tensor:
    """A tensor of a file whose data begin at ``start``; it lies in ``buffer``."""
    count = prod(place.shape)
    return torch.frombuffer(buffer, dtype=place.dtype, count=count, offset=start + place.begin).view(place.shape)


def _header(data: bytes | memoryview) -> bytes:
    """The header of a safetensors file, whose length is looked at first."""
    size = int.from_bytes(data[:8], "little")
    if not 2 <= size <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(f"no safetensors file: a header of {size} bytes in {len(data)}")
    return bytes(data[8 : 8 + size])


def _data_start(data: bytes | memoryview, size: int) -> int:
    """Where the tensors of a safetensors file begin; ValueError unless ``size`` bytes of them end it."""
    start = 8 + int.from_bytes(data[:8], "little")
    if start + size != len(data) or start % 8:
        raise ValueError(f"no whole safetensors file: {len(data) - start} bytes of tensors, expected {size}")
    return start


def _parse(header: bytes) -> tuple[dict[str, _Place], int]:
    """Where the tensors of a safetensors file lie, and how many bytes they take together."""
    try:
        listed = json.loads(header)
    except RecursionError as error:
        raise ValueError("no safetensors file: its header is nested") from error
    if not isinstance(listed, dict):
        raise ValueError("no safetensors file: its header is no JSON object")
    listed.pop("__metadata__", None)
    places = {}
    for name, told in listed.items():
        try:
            dtype, shape, (begin, end) = _STORED[told["dtype"]], tuple(told["shape"]), told["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
            if not whole or end - begin != prod(shape) * dtype.itemsize or begin % dtype.itemsize:
                raise ValueError(f"bytes {begin} to {end} are not those of {told['dtype']} {list(shape)}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no whole safetensors file: {name}: {error}") from error
        places[name] = _Place(dtype, shape, begin)
    return places, max((place.begin + prod(place.shape) * place.dtype.itemsize for place in places.values()), default=0)
