"""``dydit data encode``: latents and text embeddings of a recipe's data, computed once, as shards of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import webdataset
from tqdm import tqdm

from dydit_scale.data.buckets import config_buckets
from dydit_scale.data.dataset import load_data
from dydit_scale.data.encoded import (
    DTYPES,
    EMPTY_FILE,
    ENCODERS_FILE,
    MAX_ENTRY_BYTES,
    Encoding,
    Entry,
    decode_entry,
    encoding_bytes,
    find_encoding,
    read_empty,
    way_digest,
)
from dydit_scale.data.index import INDEX_FILE, ShardIndex, file_sha256, load_index
from dydit_scale.data.loader import BadDataError
from dydit_scale.data.processes import default_workers
from dydit_scale.data.shards import index_folder
from dydit_scale.data.tar import read_at, walk_members
from dydit_scale.models.loading import encoder_digests, family_of_base
from dydit_scale.parallel.world import World, barrier, on_main
from dydit_scale.train.checks import check_data
from dydit_scale.train.recipe import Recipe
from dydit_scale.workflows.encode_samples import Encoder, Packed, Packer, read_sources
from dydit_scale.workflows.folders import locked, told_when_full

LOCK_FILE = ".encode.lock"
ASIDE = ".encoding-"
MISSING = "the shards that are missing"
MADE = ".made.json"
"""Ends the name of the file beside a shard that says what it was made of."""


@dataclass(frozen=True)
class Encoded:
    """What was done."""

    index: ShardIndex
    written: int
    """Shards that were encoded now; the others were there."""


@dataclass(frozen=True)
class Plan:
    """What is to be done, the same on every rank."""

    encoding: Encoding
    shards: list[int]
    """Numbers of the source's shards that are to be encoded."""
    gone: list[str]
    """Shards to take away, whose source is gone."""
    fresh: bool
    """Whether nothing is there yet, and the encoding does not know its encoders' output."""


def encode_data(
    recipe: Recipe, out: Path, world: World, *, dtype: str | None = None, batch: int = 16, update: bool = False
) -> Encoded:
    """Encode the data of a recipe into the folder ``out``; every rank takes whole shards. Collective.

    The shards have the names, keys and order of the source's, and what is bad there is bad here, so that a seed gives
    the same stream of samples. A shard appears when it is whole; a second call goes on with those that are missing.

    Args:
        dtype: of what is stored, one of ``DTYPES``; None for the precision in which the encoders compute (the
            recipe's), which loses nothing.
        batch: pictures, frames or captions that go through an encoder at a time; as many pictures are held, or of clips
            so many that they have as many frames.
        update: encode again the shards whose source changed since, and take away those whose source is gone.

    Raises ValueError, before anything is loaded, if ``out`` holds something else, was made by other encoders (naming
    them) or of other data (without ``update``), or the recipe's model cannot learn from the data; later, if the source
    is not as indexed or the disk is full.
    """
    dtype = recipe.engine.precision if dtype is None else dtype
    if dtype not in DTYPES or batch < 1:
        raise ValueError(f"expected a dtype of {', '.join(DTYPES)} and a batch of 1 or more; got {dtype}, {batch}")
    if recipe.data.sources:
        raise ValueError("data.sources: encode one at a time, each into a folder of its own: data.path=FOLDER")
    (index,) = load_data(recipe.data).indexes
    on_main(world, lambda: _check_source(recipe, index, out))
    with locked(out, world, LOCK_FILE, "encodes into it"):
        plan = on_main(world, lambda: _plan(recipe, index, out, dtype, update))
        encoder = Encoder(recipe, dtype, batch, world.device) if plan.shards else None
        encoding = on_main(world, lambda: _begin(out, plan, encoder))
        if encoder is not None:
            _encode_share(recipe, index, out, replace(plan, encoding=encoding), encoder, world)
            barrier(world)
        made = on_main(world, lambda: _finish(out, index))
    return Encoded(made, len(plan.shards))


def _plan(recipe: Recipe, index: ShardIndex, out: Path, dtype: str, update: bool) -> Plan:
    """What is missing in ``out``, or does not belong there any more."""
    family = family_of_base(recipe.model.base)
    wanted = Encoding(
        family=family.name,
        encoders=encoder_digests(recipe.model.base),
        image_size=recipe.data.image_size,
        sizes=[list(bucket) for bucket in config_buckets(recipe.data)],
        text_tokens=recipe.model.text_tokens,
        computed=recipe.engine.precision,
        dtype=dtype,
        source=index.digest,
        channels=1, stride=1, spread=False, text={}, empty=None,  # until the encoders are asked
    )  # fmt: skip
    found, shards = find_encoding(out), range(len(index.shards))
    if found is None:
        if held := sorted(path.name for path in (*out.glob("*.tar"), *out.glob(INDEX_FILE))):
            raise ValueError(f"{out}: holds shards that are not encoded ({_listed(held)}); choose another OUT")
        return Plan(wanted, list(shards), [], True)
    _check_same(out, found, wanted)
    encoding = replace(found, source=index.digest)
    made = [_made(out, shard.name) for shard in index.shards]
    todo = [n for n in shards if made[n] != _making(index, n, encoding)]
    gone = sorted({p.name for p in out.glob("*.tar")} - {shard.name for shard in index.shards})
    if foreign := [name for name in gone if _made(out, name) is None]:
        raise ValueError(f"{out}: {_listed(foreign)} were not encoded here; take them away, or choose another OUT")
    if found.source != index.digest and not update:
        stale = [index.shards[n].name for n in todo if made[n] is not None] + gone
        raise ValueError(
            f"{out}: {recipe.data.path} is not what was encoded here: {_listed(stale)} no longer belong to it, and "
            f"{len(todo)} shards are to be encoded. Add --update to do that here, or choose another OUT"
        )
    return Plan(encoding, todo, gone, False)


def _check_source(recipe: Recipe, index: ShardIndex, out: Path) -> None:
    if index.encoding is not None:
        raise ValueError(f"data.path {recipe.data.path}: encoded already; give the shards that it was made of")
    if out.resolve() == index.folder.resolve():
        raise ValueError(f"{out}: is the source itself; choose another OUT")
    if len(index.bad) > recipe.data.bad_samples:
        first = min(index.bad)
        raise BadDataError(
            f"{index.place}: {len(index.bad)} bad samples, more than the budget of {recipe.data.bad_samples} "
            f"(data.bad_samples); first: {index.name(first)}: {index.bad[first]}"
        )
    if recipe.data.fps is not None and index.frames is not None:
        raise ValueError("data.fps: encoded clips hold no times; take data.frame_stride, or train on the clips")
    check_data(recipe, index)


def _check_same(out: Path, found: Encoding, wanted: Encoding) -> None:
    """ValueError, with all that differs, if ``out`` was made in another way; its source may differ."""
    size = "image_size" if found.image_size != wanted.image_size else "sizes"
    names = ("family", size, "text_tokens", "computed", "dtype")
    pairs = [(name, getattr(found, name), getattr(wanted, name)) for name in names]
    for name in sorted(found.encoders.keys() | wanted.encoders.keys()):
        pairs.append((name, found.encoders.get(name, "none")[:12], wanted.encoders.get(name, "none")[:12]))
    if different := [f"{name} {before}, now {now}" for name, before, now in pairs if before != now]:
        raise ValueError(
            f"{out}: was encoded otherwise: {'; '.join(different)}. Two would be mixed: put these back, or choose "
            "another OUT"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) + more) if names else "no shards"


def _made_file(out: Path, shard: str) -> Path:
    return out / f"{shard}{MADE}"


def _making(index: ShardIndex, number: int, encoding: Encoding) -> dict[str, Any]:
    """What a shard's content depends on."""
    shard = index.shards[number]
    rows = range(*index.starts[number : number + 2])
    bad = [[row - rows.start, index.bad[row]] for row in rows if row in index.bad] if index.bad else []
    return {"shard": shard.name, "source_sha256": shard.sha256, "bad": bad, "encoding": way_digest(encoding)}


def _made(out: Path, shard: str) -> dict[str, Any] | None:
    """What a shard in ``out`` was made of; None if it is not there, or its size or first sample are others."""
    try:
        made = json.loads(_made_file(out, shard).read_text(encoding="utf-8"))
        del made["sha256"]
        whole = made.pop("bytes") == (out / shard).stat().st_size
        return made if whole and _first_entry(out / shard).encoding == made["encoding"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _first_entry(shard: Path) -> Entry:
    for member in walk_members(shard):
        with shard.open("rb") as file:
            return decode_entry(read_at(file.fileno(), member.offset, min(member.size, MAX_ENTRY_BYTES)))
    raise ValueError(f"{shard}: holds no samples")


def _begin(out: Path, plan: Plan, encoder: Encoder | None) -> Encoding:
    """Make ``out`` ready for the plan's shards; the encoding with all that it says."""
    encoding = plan.encoding
    for path in out.glob(f"{ASIDE}*"):
        path.unlink()
    if plan.shards or plan.gone or find_encoding(out) != encoding:
        (out / INDEX_FILE).unlink(missing_ok=True)
    for name in plan.gone:
        _made_file(out, name).unlink()
        (out / name).unlink()
    if plan.fresh and encoder is not None:
        encoding = replace(encoding, **encoder.measure())
        if encoding.text:
            _write(out / EMPTY_FILE, encoder.empty())
    read_empty(out, encoding)
    _write(out / ENCODERS_FILE, encoding_bytes(encoding))
    return encoding


def _finish(out: Path, source: ShardIndex) -> ShardIndex:
    """The index of the whole: that which is there, if nothing was done, or a new one."""
    if missing := [shard.name for shard in source.shards if not (out / shard.name).is_file()]:
        raise ValueError(f"{out}: {_listed(missing)} are missing; have all ranks written to the same folder?")
    index = load_index(out) if (out / INDEX_FILE).is_file() else index_folder(out, workers=default_workers()).index
    written = {shard.name: json.loads(_made_file(out, shard.name).read_bytes())["sha256"] for shard in index.shards}
    if other := [shard.name for shard in index.shards if shard.sha256 != written[shard.name]]:
        (out / INDEX_FILE).unlink()
        raise ValueError(f"{out}: {_listed(other)} are not as they were written here; delete them and run it again")
    shards = [[(shard.name, shard.count) for shard in of.shards] for of in (index, source)]
    assert shards[0] == shards[1], f"{out}: other shards than the source"
    assert bytes(index.key_bytes) == bytes(source.key_bytes), f"{out}: other keys than the source"
    return index


def _encode_share(recipe: Recipe, index: ShardIndex, out: Path, plan: Plan, encoder: Encoder, world: World) -> None:
    """This rank's shards, one after another."""
    own = plan.shards[world.rank :: world.world_size]
    ranges = [range(*index.starts[n : n + 2]) for n in own]
    sources = read_sources(recipe, index, [sample for samples in ranges for sample in samples])
    packer = Packer(index, encoder, way_digest(plan.encoding), recipe.data.bad_samples)
    title = "encoding" + (f" (rank 0 of {world.world_size})" if world.world_size > 1 else "")
    hidden = None if world.is_main else True
    with tqdm(total=sum(map(len, ranges)), desc=title, unit="sample", disable=hidden) as bar:
        for number, samples in zip(own, ranges, strict=True):
            making = _making(index, number, plan.encoding)
            _write_shard(out, index.shards[number].name, packer.pack(samples, sources), making, bar)


def _write_shard(out: Path, name: str, samples: Iterator[Packed], making: dict[str, Any], bar: tqdm) -> None:
    """Write a shard aside and move it to its place; only then say what it was made of."""
    aside = out / f"{ASIDE}{name}.part"
    with told_when_full(out, MISSING):
        with aside.open("wb") as file:
            # pax headers take names of any length; short ones are written as they always were
            with webdataset.TarWriter(file, encoder=False, mtime=0, compress=False, format="PAX_FORMAT") as writer:
                for sample in samples:
                    writer.write(sample)
                    bar.update()
            file.flush()
            os.fsync(file.fileno())
        made = {**making, "bytes": aside.stat().st_size, "sha256": file_sha256(aside)}
        os.replace(aside, out / name)
        _write(_made_file(out, name), json.dumps(made, indent=1, sort_keys=True).encode())


def _write(path: Path, data: bytes) -> None:
    aside = path.with_name(f"{ASIDE}{path.name}.part")
    with told_when_full(path.parent, MISSING), aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
