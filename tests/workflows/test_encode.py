"""Encoding: what it writes, how it goes on, and what it refuses."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from safetensors.torch import load
from torch import Tensor

from dydit_scale.cli.main import main
from dydit_scale.data.index import load_index
from dydit_scale.data.loader import BadDataError
from dydit_scale.data.reader import Source
from dydit_scale.data.shards import build_index, index_folder
from dydit_scale.data.tar import split_name, walk_members
from dydit_scale.models import family
from dydit_scale.models.loading import encoder_digests
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.parallel.world import World
from dydit_scale.train.checks import check_data
from dydit_scale.train.encoded import check_encoded
from dydit_scale.train.loop import train
from dydit_scale.train.recipe import save_recipe
from dydit_scale.workflows import encode as workflow
from dydit_scale.workflows.encode import encode_data
from dydit_scale.workflows.encode_samples import Encoder, Packer
from tests.parallel.launch import Ranks
from tests.train.encoded_worlds import encode, encoded_recipe, spoil, write_vae, write_world

Sample = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base/``, ``shards/`` of 5, 5 and 2 samples, of which the second is bad, and ``encoded/``."""
    folder = tmp_path_factory.mktemp("made")
    write_world(folder, "flux")
    spoil(folder)
    encode(folder, "flux", folder / "encoded")
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A copy of all of it that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "world"))


def samples_of(shard: Path) -> dict[str, dict[str, bytes]]:
    data, found = shard.read_bytes(), {}
    for name, offset, size, _ in walk_members(shard):
        key, extension = split_name(name)
        found.setdefault(key, {})[extension] = data[offset : offset + size]
    return found


def write(shard: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with shard.open("wb") as file:
        writer = webdataset.TarWriter(file, encoder=False, mtime=0, compress=False)
        for key, sample in samples.items():
            writer.write({"__key__": key, **sample})
        writer.close()


def recaption(folder: Path, shard: str, key: str, caption: str) -> None:
    """Change a caption of the source and index it again."""
    samples = samples_of(folder / "shards" / shard)
    samples[key]["txt"] = caption.encode()
    write(folder / "shards" / shard, samples)
    build_index(folder / "shards", progress=False)


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_sample_says_what_it_was_made_of(made: Path) -> None:
    source, encoded = (load_index(made / name) for name in ("shards", "encoded"))
    assert [(s.name, s.count) for s in encoded.shards] == [(s.name, s.count) for s in source.shards]
    assert bytes(encoded.key_bytes) == bytes(source.key_bytes) and encoded.bad == source.bad and len(source.bad) == 1
    assert (encoded.columns.sizes == source.columns.sizes).all()
    checked = 0
    for shard in source.shards:
        pictures, found = (samples_of(made / name / shard.name) for name in ("shards", "encoded"))
        for key, sample in found.items():
            entry = json.loads(sample["json"])
            assert entry["source"]["key"] == key and entry["source"]["shard"] == shard.name
            if entry["bad"] is not None:
                assert sample.keys() == {"json"}
                continue
            assert entry["captions"] == [pictures[key]["txt"].decode()]
            assert entry["source"]["media_sha256"] == hashlib.sha256(pictures[key]["png"]).hexdigest()
            assert entry["source"]["caption_sha256"] == hashlib.sha256(pictures[key]["txt"]).hexdigest()
            tensors = load(sample["safetensors"])
            assert {n: tuple(t.shape) for n, t in tensors.items()} == {
                "mean": (12, 8, 8), "std": (12, 8, 8), "caption.0.text": (12, 64), "caption.0.pooled": (64,),
            }  # fmt: skip
            assert tensors["std"].min() > 0
            checked += 1
    assert checked == 11


@pytest.mark.parametrize("family", ["pixart", "latte"])
def test_masked_text_is_stored_at_its_own_length(tmp_path: Path, family: str) -> None:
    write_world(tmp_path, family, samples=6)
    encode(tmp_path, family, tmp_path / "encoded")
    lengths = set()
    for shard in sorted((tmp_path / "encoded").glob("*.tar")):
        for sample in samples_of(shard).values():
            (caption,) = json.loads(sample["json"])["captions"]
            text = load(sample["safetensors"])["caption.0.text"]
            assert len(text) == len(caption.split()) + 1  # whole words and the end
            lengths.add(len(text))
    assert len(lengths) > 1
    full = json.loads((tmp_path / "encoded" / "encoders.json").read_text())["text"]["text"]
    assert full == [12 if family == "pixart" else 120, 64]


def test_it_goes_on_where_it_was_stopped(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, asked = Packer.pack, []

    def stopped(self: Packer, samples: range, sources: Iterator[Any]) -> Iterator[Sample]:
        asked.append(samples)
        for n, sample in enumerate(pack(self, samples, sources)):
            if samples.start and n == 3:
                raise KeyboardInterrupt
            yield sample

    monkeypatch.setattr(Packer, "pack", stopped)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        encode(made, "flux", out)
    assert [path.name for path in out.glob("*.tar")] == ["shard-000000.tar"] and list(out.glob(".encoding-*"))
    with pytest.raises(ValueError, match=r"no index\.json"):
        load_index(out)
    before = times(out)
    monkeypatch.setattr(Packer, "pack", pack)
    (out / "shard-000000.tar.made.json").replace(tmp_path / "kept")  # as if killed before it was written
    assert encode(made, "flux", out).written == 3
    (out / "shard-000001.tar").unlink()
    (out / "index.json").unlink()
    again = times(out)
    assert encode(made, "flux", out).written == 1
    assert again["shard-000000.tar"] == times(out)["shard-000000.tar"] != before["shard-000000.tar"]
    assert content(out) == content(made / "encoded")
    assert asked == [range(5), range(5, 10)]
    assert encode(made, "flux", out).written == 0 and content(out) == content(made / "encoded")


def test_a_changed_caption_is_encoded_again_when_asked(world: Path) -> None:
    out, before = world / "encoded", times(world / "encoded")
    recaption(world, "shard-000001.tar", "000007", "a yellow cross")
    with pytest.raises(ValueError, match=r"shard-000001\.tar no longer belong to it, and 1 shards .* --update"):
        encode(world, "flux", out)
    assert times(out) == before and load_index(out)
    done = encode(world, "flux", out, update=True)
    assert done.written == 1
    changed = {name for name, time in times(out).items() if time != before[name]}
    assert changed == {"shard-000001.tar"}
    sample = samples_of(out / "shard-000001.tar")["000007"]
    assert json.loads(sample["json"])["captions"] == ["a yellow cross"]
    encode(world, "flux", world / "afresh")
    assert content(world / "afresh") == content(out)


def test_shards_come_and_go_with_the_source(world: Path) -> None:
    out, before = world / "encoded", times(world / "encoded")
    added = {f"{9000 + n}": sample for n, sample in enumerate(samples_of(world / "shards/shard-000000.tar").values())}
    (world / "shards" / "shard-000002.tar").unlink()
    write(world / "shards" / "shard-000003.tar", added)
    build_index(world / "shards", progress=False)
    with pytest.raises(ValueError, match=r"shard-000002\.tar no longer belong to it, and 1 shards are to be encoded"):
        encode(world, "flux", out)
    done = encode(world, "flux", out, update=True)
    assert [shard.name[-6:] for shard in done.index.shards] == ["00.tar", "01.tar", "03.tar"] and len(
        done.index.bad
    ) == 2
    assert {name for name, time in times(out).items() if before.get(name) == time} == {
        "shard-000000.tar", "shard-000001.tar",
    }  # fmt: skip
    assert not list(out.glob("shard-000002*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "bf16"}, r"otherwise: dtype fp32, now bf16\."),
        ({"data": {"path": "", "image_size": 8}}, r"otherwise: image_size 16, now 8\."),
        ({"engine": {"precision": "bf16"}}, r"otherwise: computed fp32, now bf16; dtype fp32, now bf16\."),
        ({"vae": 1}, r"otherwise: vae [0-9a-f]{12}, now [0-9a-f]{12}\. .* another OUT"),
    ],
)
def test_two_ways_of_encoding_are_not_mixed(world: Path, options: dict[str, Any], said: str) -> None:
    before = content(world / "encoded")
    if options.pop("vae", None):
        shutil.rmtree(world / "base" / "vae")
        write_vae(world / "base", seed=1)
    if "data" in options:
        options["data"]["path"] = str(world / "shards")
    for update in (False, True):
        with pytest.raises(ValueError, match=said):
            encode(world, "flux", world / "encoded", update=update, **options)
    assert content(world / "encoded") == before


def test_a_shard_of_another_encoder_is_found_and_made_anew(world: Path) -> None:
    """Source, names, keys, shapes and sizes are the same."""
    out, name = world / "encoded", "shard-000001.tar"
    (world / "base" / "vae").rename(world / "kept")
    write_vae(world / "base", seed=1)
    encoder_digests.cache_clear()
    encode(world, "flux", world / "other")
    shutil.rmtree(world / "base" / "vae")
    (world / "kept").rename(world / "base" / "vae")
    encoder_digests.cache_clear()
    before, (theirs, ours) = content(out), (world / folder / name for folder in ("other", "encoded"))
    assert theirs.stat().st_size == ours.stat().st_size and theirs.read_bytes() != ours.read_bytes()
    shutil.copy2(theirs, ours)
    with pytest.raises(ValueError, match=r"shard-000001\.tar: sample '000005' was encoded otherwise .* another set"):
        index_folder(out, progress=False)
    assert encode(world, "flux", out).written == 1
    assert content(out) == before


def test_a_shard_of_an_earlier_source_is_refused(world: Path) -> None:
    """By the same encoders, of the same size: every sample is sound."""
    out, name = world / "encoded", "shard-000001.tar"
    old = (out / name).read_bytes()
    (caption,) = json.loads(samples_of(out / name)["000007"]["json"])["captions"]
    recaption(world, name, "000007", caption[::-1])
    encode(world, "flux", out, update=True)
    new = content(out)
    assert len(new[name]) == len(old) and new[name] != old
    (out / name).write_bytes(old)
    build_index(out, progress=False)
    with pytest.raises(ValueError, match=rf"{name} are not as they were written here; delete them"):
        encode(world, "flux", out)
    assert not (out / "index.json").exists(), "nothing trains on it"
    (out / name).unlink()
    assert encode(world, "flux", out).written == 1
    assert content(out) == new


def test_long_clips_go_through_the_encoder_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six clips of 17 frames in two shards: few are held and fewer encoded at a time; what comes of it is the same, but
    for the rounding of convolutions over another number of frames."""
    write_world(tmp_path, "latte", samples=6)
    held: list[int] = []
    encoded: list[int] = []
    encode_sources, posterior_of = Encoder.encode, family.posterior_of

    def encode_counted(self: Encoder, sources: Sequence[Source]) -> list[dict[str, Tensor]]:
        assert all(source.pixels.dtype == torch.uint8 for source in sources)
        held.append(sum(len(source.pixels) for source in sources))
        return encode_sources(self, sources)

    def posterior_counted(vae: Any, pixels: Tensor) -> Any:
        encoded.append(len(pixels))
        return posterior_of(vae, pixels)

    monkeypatch.setattr(Encoder, "encode", encode_counted)
    monkeypatch.setattr(family, "posterior_of", posterior_counted)
    recipe = encoded_recipe(tmp_path, "latte", tmp_path / "shards")
    few, more = (4, [17] * 6, [1, *[4, 4, 4, 4, 1] * 6]), (20, [34, 34, 17, 17], [1, 20, 14, 20, 14, 17, 17])
    for batch, clips, parts in (few, more):
        held.clear()
        encoded.clear()
        encode_data(recipe, tmp_path / f"{batch}", World(), batch=batch)
        assert (held, encoded) == (clips, parts), batch
    encode_data(recipe, tmp_path / "1000", World(), batch=1000)
    assert held[-2:] == [85, 17]
    few_at_a_time, all_at_once = (
        {key: load(sample["safetensors"]) for n in (0, 1) for key, sample in samples_of(found[n]).items()}
        for found in (sorted((tmp_path / name).glob("*.tar")) for name in ("4", "1000"))
    )
    assert len(few_at_a_time) == 6 and few_at_a_time["000000"]["mean"].shape == (17, 12, 8, 8)
    torch.testing.assert_close(few_at_a_time, all_at_once, atol=1e-5, rtol=1e-5)


def test_folders_of_other_things_are_refused(world: Path) -> None:
    shards = content(world / "shards")
    with pytest.raises(ValueError, match="is the source itself"):
        encode(world, "flux", world / "shards")
    shutil.copytree(world / "shards", world / "copy")
    with pytest.raises(ValueError, match=r"holds shards that are not encoded \(index\.json, shard-000000\.tar"):
        encode(world, "flux", world / "copy")
    assert content(world / "shards") == shards
    recipe = encoded_recipe(world, "flux", world / "encoded")
    with pytest.raises(ValueError, match="encoded already"):
        encode_data(recipe, world / "twice", World())
    (world / "file").write_text("")
    with pytest.raises(ValueError, match="a file is in the place of the folder"):
        encode(world, "flux", world / "file")
    (world / "encoded" / "mine.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"mine\.tar were not encoded here"):
        encode(world, "flux", world / "encoded")


def test_one_process_at_a_time(world: Path) -> None:
    with (world / "encoded" / workflow.LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process encodes into it"):
            encode(world, "flux", world / "encoded")
    encode(world, "flux", world / "encoded")


def test_a_source_that_is_not_as_indexed_stops_it(world: Path) -> None:
    shard = world / "shards" / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[data.index(b"\x89PNG") + 60] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-000001\.tar sample '000005': image checksum .* index it again"):
        encode(world, "flux", world / "out")
    assert [path.name for path in (world / "out").glob("*.tar")] == ["shard-000000.tar"]


def test_what_the_encoders_cannot_encode_is_bad_up_to_the_budget(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = Encoder._latents

    def overflowing(self: Encoder, pictures: list[Tensor]) -> list[dict[str, Tensor]]:
        found = latents(self, pictures)
        found[0]["mean"][0, 0, 0] = torch.inf
        return found

    monkeypatch.setattr(Encoder, "_latents", overflowing)
    data = {"path": str(world / "shards"), "image_size": 16, "bad_samples": 3}
    with pytest.raises(BadDataError, match=r"3 samples cannot be encoded, 1 are bad anyway, .* of 3 "):
        encode(world, "flux", world / "out", data=data)
    index = encode(world, "flux", world / "out", data={**data, "bad_samples": 7}).index
    assert sorted(index.bad) == [0, 1, 4, 5, 9, 10] and index.num_samples == 12
    assert index.bad[0] == "the encoders' mean has values that are NaN or infinite"


def test_a_full_disk_is_told_and_survived(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def full(handle: int) -> None:
        if os.path.basename(os.readlink(f"/proc/self/fd/{handle}")) == ".encoding-shard-000001.tar.part":
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="the disk is full; free some space and run the command again"):
        encode(world, "flux", world / "out")
    monkeypatch.setattr(os, "fsync", real)
    assert encode(world, "flux", world / "out").written == 2
    assert content(world / "out") == content(world / "encoded")


def test_keys_of_any_length_and_alphabet_stay(world: Path) -> None:
    shard = world / "shards" / "shard-000002.tar"
    samples = list(samples_of(shard).values())
    with shard.open("wb") as file:
        writer = webdataset.TarWriter(file, encoder=False, mtime=0, compress=False, format="PAX_FORMAT")
        for key, sample in zip(("größe/" + "k" * 300, "ключ"), samples, strict=True):
            writer.write({"__key__": key, **sample})
        writer.close()
    source = build_index(world / "shards", progress=False)
    index = encode(world, "flux", world / "out").index
    assert index.key(11) == "ключ" and bytes(index.key_bytes) == bytes(source.key_bytes)


def test_encoded_data_are_checked_and_summarized(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = world / "encoded"
    assert main(["data", "check", str(folder)]) == 0
    assert main(["data", "summarize", str(folder), "--out", str(world / "page.html")]) == 0
    said = capsys.readouterr().out
    assert "12 samples in 3 shards" in said and "changed" not in said and (world / "page.html").is_file()
    with (folder / "empty.safetensors").open("ab") as file:
        file.write(b"!")
    assert main(["data", "check", str(folder), "--quick"]) == 1
    assert "empty.safetensors: torn" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"empty\.safetensors: it does not belong"):
        check_encoded(encoded_recipe(world, "flux", folder), load_index(folder))


def test_shards_of_clips_are_reused(tmp_path: Path) -> None:
    write_world(tmp_path, "latte")
    encode(tmp_path, "latte", tmp_path / "encoded")
    index = load_index(tmp_path / "encoded")
    assert index.frames is not None and index_folder(tmp_path / "encoded", update=True).reused == len(index.shards)


def test_clips_by_time_are_refused(tmp_path: Path) -> None:
    write_world(tmp_path, "latte")
    recipe = encoded_recipe(tmp_path, "latte", tmp_path / "shards")
    timed = replace(recipe, data=replace(recipe.data, fps=4.0, frame_stride=1))
    with pytest.raises(ValueError, match=r"data\.fps: encoded clips hold no times"):
        encode_data(timed, tmp_path / "encoded", World())
    encode(tmp_path, "latte", tmp_path / "encoded")
    timed = replace(timed, data=replace(timed.data, path=str(tmp_path / "encoded")))
    with pytest.raises(ValueError, match=r"encoded clips hold no times for data\.fps"):
        check_data(timed, load_index(tmp_path / "encoded"))


def test_the_command(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = world / "recipe.yaml", world / "out"
    save_recipe(encoded_recipe(world, "flux", world / "elsewhere"), recipe)
    words = ["data", "encode", str(recipe), f"data.path={world / 'shards'}", str(out), "--batch", "4"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "unusable: shard-000000.tar sample '000001': broken image" in said
    assert f"{out}: 12 samples in 3 shards, 1 of them unusable, 3 encoded now" in said
    assert content(out) == content(world / "encoded")
    assert main(words) == 0 and "0 encoded now" in capsys.readouterr().out
    assert main(words[:4]) == 64
    assert "expected one folder OUT" in capsys.readouterr().err


@pytest.mark.launch
@pytest.mark.slow
def test_two_ranks_encode_and_train_as_one_does_on_pixels(made: Path, tmp_path: Path) -> None:
    with Ranks("tests.workflows.encode_ranks", str(made), str(tmp_path)) as ranks:
        train(encoded_recipe(made, "flux", made / "shards", run=str(tmp_path / "pixels-run")), World())
        ranks.wait()
    assert content(tmp_path / "encoded") == content(made / "encoded")
    ours, theirs = (read_metrics(tmp_path / f"{name}-run" / "metrics.jsonl") for name in ("encoded", "pixels"))
    losses = [record["loss"] for record in theirs if "loss" in record]
    assert len(losses) == 3
    assert [record["loss"] for record in ours if "loss" in record] == pytest.approx(losses, abs=1e-5)
