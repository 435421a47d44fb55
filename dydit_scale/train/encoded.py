"""Training on latents and embeddings that were computed before: what stands for autoencoder and text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit_scale.data.buckets import config_buckets
from dydit_scale.data.encoded import TEXT, EncodedBatch, Encoding, read_empty
from dydit_scale.data.remote import RemoteFolder
from dydit_scale.data.shards import ShardIndex
from dydit_scale.data.stream import ShardStream
from dydit_scale.models.encoders import Posterior
from dydit_scale.models.loading import encoder_digests, family_of_base
from dydit_scale.train.recipe import Recipe


class EncodedInputs:
    """From encoded batches to what the encoders would have given."""

    def __init__(self, folder: Path | RemoteFolder, encoding: Encoding) -> None:
        self._encoding, self._empty = encoding, read_empty(folder, encoding)

    @property
    def stride(self) -> int:
        """Pixels along a side of one latent."""
        return self._encoding.stride

    def posterior(self, batch: EncodedBatch, device: torch.device) -> Posterior:
        """The autoencoder's distribution [batch, *frames, channels, rows, cols]."""
        moments = batch.moments.to(device)
        mean, std = moments.chunk(2, dim=-3) if self._encoding.spread else (moments, None)
        return Posterior(mean, std)

    def text(
        self, batch: EncodedBatch, captions: Sequence[str], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor] | None:
        """What ``Family.embed`` gives for ``captions``: those of the batch, once or several times over, of which the
        empty ones were dropped. None for families of classes."""
        if not self._encoding.text:
            return None
        rows = torch.arange(len(captions)) % len(batch.lengths)
        dropped = torch.tensor([not caption for caption in captions])
        tokens = self._encoding.text[TEXT][0]
        embedded = {}
        for name, tensors in batch.text.items():
            empty = self._empty[name]
            if name == TEXT:
                tensors, empty = (F.pad(t, (0, 0, 0, tokens - t.shape[-2])) for t in (tensors, empty))
            found = tensors[rows]
            found[dropped] = empty
            embedded[name] = found.to(device, dtype)
        lengths = torch.where(dropped, len(self._empty[TEXT]), batch.lengths[rows])
        return embedded | {"mask": (torch.arange(tokens) < lengths[:, None]).long().to(device)}


def check_encoded(recipe: Recipe, index: ShardIndex | ShardStream) -> None:
    """ValueError, with all that differs, if encoded data were not made by the encoders of the recipe's base, or for
    pictures or captions of another size."""
    encoding = None if isinstance(index, ShardStream) else index.encoding
    base = recipe.model.base
    if isinstance(index, ShardStream) or encoding is None:
        return
    read_empty(index.home, encoding)
    family, theirs = family_of_base(base), encoder_digests(base)
    pairs: list[tuple[str, object, object]] = [
        ("data.image_size", encoding.image_size, recipe.data.image_size),
        ("vae", _short(encoding.encoders.get("vae")), _short(theirs.get("vae"))),
    ]
    if encoding.image_size == recipe.data.image_size:
        sizes = [list(bucket) for bucket in config_buckets(recipe.data)]
        pairs.append(("pixel sizes (data.buckets)", encoding.sizes, sizes))
    if family.reads_text:
        pairs += [("family", encoding.family, family.name)]
        pairs += [("model.text_tokens", encoding.text_tokens, recipe.model.text_tokens)]
        names = sorted((encoding.encoders.keys() | theirs.keys()) - {"vae"})
        pairs += [(name, _short(encoding.encoders.get(name)), _short(theirs.get(name))) for name in names]
    if different := [f"{name} {made}, now {now}" for name, made, now in pairs if made != now]:
        raise ValueError(
            f"{index.place}: encoded otherwise than model.base {base} and the recipe would: {'; '.join(different)}. "
            "Put these back, or encode the source for this recipe into another folder with `dydit data encode`"
        )


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
