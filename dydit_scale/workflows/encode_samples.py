"""The samples of ``dydit data encode``: read from the source, through the encoders, into the two files of each."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dydit_scale.data.decode import BadSampleError, scale_values
from dydit_scale.data.encoded import DTYPES, TEXT, Entry, SourceInfo, caption_tensor, empty_bytes, pack_sample
from dydit_scale.data.index import ShardIndex
from dydit_scale.data.loader import BadDataError
from dydit_scale.data.reader import Failure, Source, SourceReader
from dydit_scale.models.encoders import Posterior
from dydit_scale.models.family import frozen_parts
from dydit_scale.models.loading import family_of_base, load_pipeline
from dydit_scale.train.recipe import Recipe

Packed = dict[str, Any]
"""A sample as webdataset writes it."""


class Encoder:
    """A pipeline's autoencoder and text encoders."""

    def __init__(self, recipe: Recipe, dtype: str, batch: int, device: torch.device) -> None:
        self._recipe, self._family, self._device = recipe, family_of_base(recipe.model.base), device
        self._computed, self._dtype, self.batch = DTYPES[recipe.engine.precision], DTYPES[dtype], batch
        self.pipeline = load_pipeline(recipe.model.base, self._family, self._computed)
        for part in frozen_parts(self.pipeline):
            part.to(device)

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """What an ``Encoding`` says of the encoders' output."""
        side = self._recipe.data.image_size
        mean, std = self._posterior([torch.zeros(3, side, side, dtype=torch.uint8)])
        text = {name: list(tensor.shape[1:]) for name, tensor in self._embed([""]).items() if name != "mask"}
        return {
            "channels": mean.shape[1],
            "stride": side // mean.shape[-1],
            "spread": std is not None,
            "text": text,
            "empty": _sha256(self.empty()) if text else None,
        }

    @torch.no_grad()
    def empty(self) -> bytes:
        """The file of the empty prompt's embeddings."""
        return empty_bytes(self._texts([""])[0])

    @torch.no_grad()
    def encode(self, sources: Sequence[Source]) -> list[dict[str, Tensor]]:
        """The tensors of each sample by their names in its file."""
        found = self._latents([source.pixels for source in sources])
        captions = [self.captions(source) for source in sources]
        texts = iter(self._texts([caption for own in captions for caption in own]))
        for tensors, own in zip(found, captions, strict=True):
            for number, text in enumerate(islice(texts, len(own))):
                tensors |= {caption_tensor(number, name): tensor for name, tensor in text.items()}
        return found

    def captions(self, source: Source) -> list[str]:
        """A sample's captions; where text is read, there is one at least."""
        return list(source.captions) or [""] * self._family.reads_text

    def _latents(self, pictures: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Mean and, if there is one, standard deviation; the pictures and frames of a size go together, ``batch`` at a
        time."""
        found: list[dict[str, Tensor]] = [{} for _ in pictures]
        for size in {picture.shape[-2:] for picture in pictures}:
            rows = [n for n, picture in enumerate(pictures) if picture.shape[-2:] == size]
            frames = [frame for n in rows for frame in pictures[n].reshape(-1, *pictures[n].shape[-3:])]
            counts = [pictures[n].shape[:-3].numel() for n in rows]
            for name, moments in zip(("mean", "std"), self._posterior(frames), strict=True):
                for n, own in zip(rows, () if moments is None else moments.split(counts), strict=moments is not None):
                    found[n][name] = _copy(own.reshape(*pictures[n].shape[:-3], *own.shape[1:]))
        return found

    def _posterior(self, frames: list[Tensor]) -> Posterior:
        means: list[Tensor] = []
        stds: list[Tensor] = []
        for start in range(0, len(frames), self.batch):
            # Scaled where training does it: a GPU may round the division otherwise.
            pixels = scale_values(torch.stack(frames[start : start + self.batch])).to(self._device)
            with self._precision():
                mean, std = self._family.posterior(self.pipeline, pixels)
            means.append(mean.to("cpu", self._dtype))
            stds += [] if std is None else [std.to("cpu", self._dtype)]
        return Posterior(torch.cat(means), torch.cat(stds) if stds else None)

    def _texts(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """The embeddings of each caption, those of its tokens as long as it is."""
        found = []
        for start in range(0, len(captions), self.batch):
            embedded = self._embed(captions[start : start + self.batch])
            for row in range(len(captions[start : start + self.batch])):
                own = {name: tensor[row] for name, tensor in embedded.items()}
                if (mask := own.pop("mask", None)) is not None:
                    own[TEXT] = own[TEXT][: int(mask.sum())]
                found.append({name: _copy(tensor.to("cpu", self._dtype)) for name, tensor in own.items()})
        return found

    def _embed(self, captions: Sequence[str]) -> dict[str, Tensor]:
        with self._precision():
            return self._family.embed(self.pipeline, captions, self._recipe.model.text_tokens)

    def _precision(self) -> AbstractContextManager[None]:
        """As in training, which encodes under the engine's autocast."""
        bf16 = self._computed == torch.bfloat16
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=bf16)


class _Sources(Dataset[Any]):
    """``sources[number]`` is a sample to encode, why it is bad, or what is wrong with the shards."""

    def __init__(self, recipe: Recipe, index: ShardIndex) -> None:
        self._index = index
        config = replace(recipe.data, frames=1, images_per_clip=0)  # all frames are read, whatever training takes
        self._reader = SourceReader(config, index, source=0, seed=0, order_seed=0)

    def __getitem__(self, sample: int) -> Source | str | Failure:
        if sample in self._index.bad:
            return self._index.bad[sample]
        try:
            return self._reader.read_source(sample)
        except BadSampleError as error:
            folder, name = self._index.place, self._index.name(sample)
            return Failure(
                f"{folder}: {name}: {error}, but it was good when it was indexed; restore the shard, or index it again "
                f"with `dydit data index {folder}`",
                traceback.format_exc(),
            )
        except (ValueError, OSError) as error:
            return Failure(str(error), traceback.format_exc())


def read_sources(recipe: Recipe, index: ShardIndex, samples: Sequence[int]) -> Iterator[Source | str]:
    """The samples in turn, or why they are bad; ValueError if the shards are not as they were indexed."""
    loader: DataLoader[Any] = DataLoader(
        _Sources(recipe, index),
        batch_size=None,
        sampler=samples,
        num_workers=recipe.data.workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),
    )
    for found in loader:
        if isinstance(found, Failure):
            raise ValueError(found.message) from RuntimeError(found.trace)
        yield found


def _unchanged(found: Any) -> Any:
    return found


class Packer:
    """Encoded samples as they are written; counts those that the encoders could not encode."""

    def __init__(self, index: ShardIndex, encoder: Encoder, way: str, budget: int) -> None:
        self._index, self._encoder, self._way, self._budget = index, encoder, way, budget
        self._refused: list[str] = []

    def pack(self, samples: range, sources: Iterator[Source | str]) -> Iterator[Packed]:
        """A shard's samples in order."""
        for part in self._parts(samples, islice(sources, len(samples))):
            encoded = iter(self._encoder.encode([source for _, source in part if not isinstance(source, str)]))
            for sample, source in part:
                yield self._packed(sample, source, {} if isinstance(source, str) else next(encoded))

    def _parts(self, samples: range, sources: Iterator[Source | str]) -> Iterator[list[tuple[int, Source | str]]]:
        """The samples, as many at a time as make a batch of pictures or frames."""
        part: list[tuple[int, Source | str]] = []
        frames = 0
        for sample, source in zip(samples, sources, strict=True):
            part.append((sample, source))
            frames += 1 if isinstance(source, str) else source.pixels.shape[:-3].numel()
            if frames >= self._encoder.batch or sample == samples[-1]:
                yield part
                part, frames = [], 0

    def _packed(self, sample: int, source: Source | str, tensors: dict[str, Tensor]) -> Packed:
        bad = source if isinstance(source, str) else self._not_finite(sample, tensors)
        labels, frames = self._index.labels, self._index.frames
        pixels_wide, pixels_high = self._index.columns.sizes[sample].item()
        key = self._index.key(sample)
        media, caption = ("", "") if isinstance(source, str) else map(_sha256, (source.media, source.caption))
        info = SourceInfo(
            shard=self._index.shards[self._index.shard_of(sample)].name,
            key=key,
            width=pixels_wide,
            height=pixels_high,
            media_sha256=media,
            caption_sha256=caption,
        )
        height, width = (0, 0) if isinstance(source, str) else source.pixels.shape[-2:]
        entry = Entry(
            encoding=self._way,
            source=info,
            height=height,
            width=width,
            frames=0 if frames is None else int(frames[sample]),
            captions=[] if isinstance(source, str) else self._encoder.captions(source),
            label=-1 if labels is None else int(labels[sample]),
            bad=bad,
        )
        return {"__key__": key, **pack_sample(entry, tensors)}

    def _not_finite(self, sample: int, tensors: dict[str, Tensor]) -> str | None:
        """Why a sample cannot be used, if the encoders give infinities or NaN; BadDataError if they do too often."""
        wrong = next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
        if wrong is None:
            return None
        reason = f"the encoders' {wrong} has values that are NaN or infinite"
        self._refused.append(f"{self._index.name(sample)}: {reason}")
        if len(self._refused) + len(self._index.bad) > self._budget:
            raise BadDataError(
                f"{self._index.place}: {len(self._refused)} samples cannot be encoded, {len(self._index.bad)} are bad "
                f"anyway, more than the budget of {self._budget} (data.bad_samples); first: "
                f"{'; '.join(self._refused[:3])}. Encode with engine.precision=fp32 and --dtype fp32, or raise "
                "data.bad_samples"
            )
        return reason


def _copy(tensor: Tensor) -> Tensor:
    """Of its own memory and in plain order, as safetensors asks."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if data else ""
