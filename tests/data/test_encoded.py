"""Shards of encoded samples, made here without encoders: what is indexed, and what is not."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from safetensors.torch import load, save
from torch import Tensor

from dydit_scale.data.decode import BadSampleError
from dydit_scale.data.encoded import (
    EMPTY_FILE,
    ENCODERS_FILE,
    MAX_HEADER_BYTES,
    Encoding,
    Entry,
    SourceInfo,
    caption_tensor,
    decode_entry,
    decode_tensors,
    empty_bytes,
    encoding_bytes,
    pack_sample,
    way_digest,
)
from dydit_scale.data.index import load_index
from dydit_scale.data.loader import DataConfig, make_loader
from dydit_scale.data.shards import build_index
from dydit_scale.workflows.summarize import summarize
from tests.data.test_loader import change as break_bytes

Samples = dict[str, dict[str, bytes]]
KEYS = ("a", "b", "c", "d")
SHARD = "shard-000000.tar"


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


EMPTY = empty_bytes({"text": drawn(1, 6), "pooled": drawn(5)})
ENCODING = Encoding(
    family="flux", encoders={"vae": "v"}, image_size=12, sizes=[[16, 8], [12, 12], [8, 16]], text_tokens=5,
    computed="fp32", dtype="fp32", source="s",
    channels=4, stride=2, spread=True, text={"text": [5, 6], "pooled": [5]},
    empty=hashlib.sha256(EMPTY).hexdigest(),
)  # fmt: skip


def entry(key: str, **changes: Any) -> Entry:
    info = SourceInfo(shard=SHARD, key=key, width=40, height=80, media_sha256="m", caption_sha256="c")
    values = {"encoding": way_digest(ENCODING), "source": info, "height": 16, "width": 8}
    return Entry(**(values | {"captions": ["one", "the other"]} | changes))


def tensors(captions: int = 2) -> dict[str, Tensor]:
    found = {"mean": drawn(4, 8, 4), "std": drawn(4, 8, 4).exp()}
    for n in range(captions):
        found |= {caption_tensor(n, "text"): drawn(2 + n, 6) + n, caption_tensor(n, "pooled"): drawn(5) + n}
    return found


def write_world(folder: Path, spoil: Callable[[Samples], object] = lambda samples: None) -> Path:
    """Four samples of which the third is bad; ``spoil`` may change their files before they are written."""
    folder.mkdir(exist_ok=True)
    (folder / ENCODERS_FILE).write_bytes(encoding_bytes(ENCODING))
    (folder / EMPTY_FILE).write_bytes(EMPTY)
    samples: Samples = {key: pack_sample(entry(key), tensors()) for key in KEYS}
    samples["c"] = pack_sample(entry("c", captions=[], height=0, width=0, bad="broken image"), {})
    spoil(samples)
    with (folder / SHARD).open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
        for key, sample in samples.items():
            writer.write({"__key__": key, **sample})
    return folder


def change(extension: str, edit: Callable[[Any], object]) -> Callable[[Samples], None]:
    """Edit a file of sample b: the object in its JSON, or its tensors; a result takes their place."""

    def spoil(samples: Samples) -> None:
        data = samples["b"][extension]
        found = json.loads(data) if extension == "json" else load(data)
        done = edit(found)
        found = found if done is None else done
        if isinstance(found, bytes):
            samples["b"][extension] = found
        elif extension == "json":
            samples["b"][extension] = json.dumps(found).encode()
        else:
            samples["b"][extension] = save(found, {"entry": hashlib.sha256(samples["b"]["json"]).hexdigest()})

    return spoil


def in_tensors(**changes: Tensor | None) -> Callable[[Samples], None]:
    def edit(found: dict[str, Tensor]) -> dict[str, Tensor]:
        new = {name.replace("_", "."): tensor for name, tensor in changes.items()}
        return {name: tensor for name, tensor in (found | new).items() if tensor is not None}

    return change("safetensors", edit)


def swap(extension: str) -> Callable[[Samples], None]:
    def spoil(samples: Samples) -> None:
        samples["b"][extension], samples["d"][extension] = samples["d"][extension], samples["b"][extension]

    return spoil


def rename(samples: Samples) -> None:
    samples["z"] = samples.pop("b")


def header(text: bytes, size: int | None = None) -> Callable[[Samples], None]:
    return change("safetensors", lambda found: (len(text) if size is None else size).to_bytes(8, "little") + text)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("it was unpickled",))


NAN = drawn(4, 8, 4)
NAN[0, 0, 0] = float("nan")
DAMAGES: dict[str, tuple[Callable[[Samples], object], str]] = {
    "tensors of another sample": (swap("safetensors"), "the tensors were made for another entry"),
    "entry of another sample": (swap("json"), r"the entry is of shard-000000\.tar sample 'd': renamed or moved"),
    "edited caption": (change("json", lambda e: e["captions"].__setitem__(0, "x")), "were made for another entry"),
    "edited label": (change("json", lambda e: e.update(label=3)), "were made for another entry"),
    "renamed": (rename, "the entry is of shard-000000.tar sample 'b': renamed or moved"),
    "no tensors": (lambda s: s["b"].pop("safetensors"), "no safetensors beside the entry"),
    "no entry": (lambda s: s["b"].pop("json"), "safetensors in an encoded sample, expected json and safetensors"),
    "a picture": (lambda s: s["b"].update(png=b""), "json, png, safetensors in an encoded sample"),
    "a pickle": (lambda s: s["b"].update(pyd=pickle.dumps(_Bomb())), "json, pyd, safetensors in an encoded sample"),
    "pickled tensors": (change("safetensors", lambda _: pickle.dumps(_Bomb())), "no safetensors file: a header of"),
    "NaN": (in_tensors(mean=NAN), "latents has values that are NaN or infinite"),
    "infinite text": (in_tensors(caption_1_pooled=drawn(5) / 0), "pooled has values that are NaN or infinite"),
    "negative std": (in_tensors(std=-drawn(4, 8, 4).exp()), "a negative standard deviation"),
    "no std": (in_tensors(std=None), "no tensor 'std'"),
    "no text": (in_tensors(caption_1_text=None), "no tensor 'caption.1.text'"),
    "other latents": (in_tensors(mean=drawn(4, 8, 8)), r"latents .*\[4, 8, 8\], expected fp32 \[4, 8, 4\]"),
    "other dtype": (in_tensors(mean=drawn(4, 8, 4).half()), r"latents torch\.float16"),
    "long text": (in_tensors(caption_0_text=drawn(6, 6)), r"\[6, 6\], expected fp32 \[5, 6\] or shorter"),
    "no tokens": (in_tensors(caption_0_text=drawn(0, 6)), r"\[0, 6\], expected fp32 \[5, 6\] or shorter"),
    "wide text": (in_tensors(caption_0_text=drawn(2, 7)), r"\[2, 7\], expected fp32 \[5, 6\]"),
    "unknown tensor": (in_tensors(caption_2_text=drawn(2, 6)), r"unknown tensors caption\.2\.text"),
    "cut tensors": (change("safetensors", lambda found: save(found)[:-5]), "no whole safetensors file"),
    "no bytes": (change("safetensors", lambda found: b""), "no safetensors file"),
    "huge header": (header(b" " * (MAX_HEADER_BYTES + 8)), "no safetensors file: a header of 1048584 bytes"),
    "header beyond": (header(b"{}", 1 << 40), "no safetensors file: a header of"),
    "nested header": (header(b"[" * 500_000), "its header is nested"),
    "header of another kind": (header(b"[]"), "its header is no JSON object"),
    "no JSON": (change("json", lambda e: b"{"), "broken entry of an encoded sample"),
    "another format": (change("json", lambda e: e.update(format="x")), "expected the format 'dydit-encoded-v2'"),
    "odd captions": (change("json", lambda e: e.update(captions=[1])), "must be strings"),
    "odd digest": (change("json", lambda e: e.update(encoding=1)), "must be strings"),
    "no digest": (change("json", lambda e: e.__delitem__("encoding")), "missing 1 required .* 'encoding'"),
    "odd size": (change("json", lambda e: e.update(height=-2)), "height is -2"),
    "odd key": (change("json", lambda e: e.update(more=1)), "unexpected keyword argument 'more'"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_sample_is_bad_and_keeps_its_place(tmp_path: Path, damage: str) -> None:
    spoil, reason = DAMAGES[damage]
    index = build_index(write_world(tmp_path, spoil), progress=False)
    places = {sample: index.key(sample) for sample in index.bad}
    first = next(sample for sample, key in places.items() if key in ("b", "z"))
    with pytest.raises(ValueError, match=reason):
        raise ValueError(index.bad[first])
    swapped = ["d"] if "another sample" in damage else []
    assert sorted(places.values()) == sorted([places[first], "c", *swapped]) and index.num_samples == 4
    assert load_index(tmp_path).bad == index.bad


def test_sound_samples_are_read(tmp_path: Path) -> None:
    index = build_index(write_world(tmp_path), progress=False)
    assert index.bad == {2: "broken image"} and list(index.columns.sizes["width"]) == [40] * 4
    assert (index.labels, index.frames) == (None, None)
    config = DataConfig(path=str(tmp_path), caption_dropout=0.0, image_size=12, buckets=True, bucket_step=4)
    loader = make_loader(
        config, load_index(tmp_path), seed=0, rank=0, world_size=1, global_batch=8, micro_batch=8, consumed=0
    )
    batch = next(iter(loader))
    assert batch.pixels is None and batch.encoded is not None
    assert batch.encoded.moments.shape == (8, 8, 8, 4) and set(batch.captions) == {"one", "the other"}
    for row, caption in enumerate(batch.captions):
        number = ("one", "the other").index(caption)
        text = batch.encoded.text["text"][row]
        assert batch.encoded.lengths[row] == 2 + number, "each caption comes with its own embedding"
        assert torch.equal(text[: 2 + number], drawn(2 + number, 6) + number) and not text[2 + number :].any()
        assert torch.equal(batch.encoded.text["pooled"][row], drawn(5) + number)
        assert torch.equal(batch.encoded.moments[row], torch.cat([drawn(4, 8, 4), drawn(4, 8, 4).exp()]))


def test_the_encoding_belongs_to_the_index(tmp_path: Path) -> None:
    index = build_index(write_world(tmp_path), progress=False)
    assert index.encoding is not None
    path = tmp_path / ENCODERS_FILE
    path.write_bytes(encoding_bytes(replace(index.encoding, encoders={"vae": "w"})))
    with pytest.raises(ValueError, match=r"encoders\.json does not belong to index\.json"):
        load_index(tmp_path)
    with pytest.raises(ValueError, match="was encoded otherwise"):
        build_index(tmp_path, progress=False)
    path.write_bytes(encoding_bytes(replace(index.encoding, source="t")))
    assert build_index(tmp_path, progress=False).digest != index.digest
    path.unlink()
    with pytest.raises(ValueError, match=r"encoders\.json does not belong to index\.json"):
        load_index(tmp_path)
    plain = build_index(tmp_path, progress=False)
    assert len(plain.bad) == 4 and plain.encoding is None and "image missing" in plain.bad[0]


def test_a_shard_of_another_set_is_refused(tmp_path: Path) -> None:
    """Shapes, sizes, names and keys are the same, but another autoencoder made it."""
    other = way_digest(replace(ENCODING, encoders={"vae": "w"}))
    made = pack_sample(entry("b", encoding=other), tensors())
    write_world(tmp_path, lambda samples: samples.update(b=made))
    said = rf"{SHARD}: sample 'b' was encoded otherwise \({other[:12]}\) than encoders\.json says"
    with pytest.raises(ValueError, match=said):
        build_index(tmp_path, progress=False)
    with pytest.raises(ValueError, match=said) as told:
        decode_tensors(made["safetensors"], decode_entry(made["json"]), ENCODING)
    assert not isinstance(told.value, BadSampleError), "no other sample may take its place"


def test_the_way_of_encoding_is_all_but_the_source() -> None:
    assert way_digest(replace(ENCODING, source="t")) == way_digest(ENCODING)
    other = [replace(ENCODING, encoders={"vae": "w"}), replace(ENCODING, computed="bf16"), replace(ENCODING, empty="e")]
    assert len({way_digest(encoding) for encoding in (ENCODING, *other)}) == 4


@pytest.mark.parametrize(
    ("file", "data", "said"),
    [
        (ENCODERS_FILE, b"{", "broken or foreign"),
        (ENCODERS_FILE, b'{"format": "x"}', "expected 'dydit-encoded-v2'.; encode the data again into an empty folder"),
        (ENCODERS_FILE, b'{"format": "dydit-encoded-v2", "vae": 1}', "unexpected keyword argument"),
        (EMPTY_FILE, empty_bytes({"text": drawn(2, 6), "pooled": drawn(5)}), "does not belong to encoders.json"),
        (EMPTY_FILE, None, "no such file"),
    ],
)
def test_broken_files_beside_the_shards_are_refused(tmp_path: Path, file: str, data: bytes | None, said: str) -> None:
    folder = write_world(tmp_path)
    (folder / file).unlink()
    if data is not None:
        (folder / file).write_bytes(data)
    with pytest.raises(ValueError, match=f"{file}: .*{said}"):
        build_index(folder, progress=False)


def lay_four(samples: Samples) -> None:
    """Four more samples, lying where the others stand."""
    for key in "efgh":
        info = SourceInfo(shard=SHARD, key=key, width=80, height=40, media_sha256="m", caption_sha256="c")
        lying = {"mean": drawn(4, 4, 8), "std": drawn(4, 4, 8).exp()}
        samples[key] = pack_sample(entry(key, source=info, height=8, width=16), tensors() | lying)


def test_a_substitute_comes_from_its_own_bucket(tmp_path: Path) -> None:
    index = build_index(write_world(tmp_path, lay_four), progress=False)
    for sample in (1, 5):
        break_bytes(index, sample, "image")
    config = DataConfig(path=str(tmp_path), image_size=12, buckets=True, bucket_step=4, bucket_batch=4)
    quarantine = tmp_path / "quarantine.jsonl"
    loader = make_loader(
        config, index, seed=0, rank=0, world_size=1, global_batch=4, micro_batch=4, consumed=0, quarantine=quarantine
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = list(islice(iter(loader), 40))
    told = {json.loads(line)["key"] for line in quarantine.read_text().splitlines()}
    assert told == {"b", "c", "f"}, "no good sample of another size was tried"
    shapes = set()
    for batch in batches:
        assert batch.encoded is not None
        shapes.add(shape := tuple(batch.encoded.moments.shape[-2:]))
        assert set(batch.keys) <= ({"a", "d"} if shape == (8, 4) else {"e", "g", "h"})
    assert shapes == {(8, 4), (4, 8)}


def test_the_page_says_why_it_shows_no_pictures(tmp_path: Path) -> None:
    build_index(write_world(tmp_path), progress=False)
    lines = summarize(tmp_path)
    assert any(line.startswith("examples: none, these are latents") for line in lines)
    page = (tmp_path / "summary.html").read_text(encoding="utf-8")
    assert "encoded samples are latents, not pictures" in page and "<img" not in page
