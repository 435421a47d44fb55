"""Writing and indexing of shards: what is sound comes back exactly, what is damaged is named."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from dydit_scale.data.shards import ShardIndex, build_index, load_index, write_shards
from dydit_scale.data.tar import walk_members


def png(number: int, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (number % 256, 40, 200)).save(file, "PNG")
    return file.getvalue()


def samples(count: int, first: int = 0) -> Iterator[dict[str, bytes | str]]:
    for number in range(first, first + count):
        yield {"__key__": f"{number:06d}", "png": png(number), "txt": f"picture {number}"}


def write_tar(path: Path, files: list[tuple[str, bytes]], **options: int) -> None:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def stored(index: ShardIndex, sample: int, part: str) -> bytes:
    place = getattr(index.record(sample), part)
    data = (index.folder / index.shards[index.shard_of(sample)].name).read_bytes()
    part_bytes = data[place.offset : place.offset + place.bytes]
    assert zlib.crc32(part_bytes) == place.crc
    return part_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One shard of ten samples, indexed."""
    write_shards(samples(10), tmp_path / "shards", samples_per_shard=10)
    return tmp_path / "shards"


def test_what_is_written_is_indexed(tmp_path: Path) -> None:
    index = write_shards(samples(10), tmp_path / "a 50%d", samples_per_shard=4)
    assert [(shard.name, shard.count) for shard in index.shards] == [
        ("shard-000000.tar", 4),
        ("shard-000001.tar", 4),
        ("shard-000002.tar", 2),
    ]
    assert index.folder == tmp_path / "a 50%d"
    assert (index.num_samples, index.bad) == (10, {})
    for number in range(10):
        assert index.key(number) == f"{number:06d}"
        assert stored(index, number, "image") == png(number)
        assert stored(index, number, "caption") == f"picture {number}".encode()
    assert index.columns.sizes["width"].tolist() == [8] * 10
    assert sorted(path.suffix for path in index.folder.iterdir()) == [".json", *4 * [".npy"], ".tar", ".tar", ".tar"]


def test_webdataset_reads_the_shards_too(folder: Path) -> None:
    read = list(webdataset.WebDataset(str(folder / "shard-000000.tar"), shardshuffle=False))
    assert [(sample["__key__"], sample["png"], sample["txt"]) for sample in read] == [
        (f"{number:06d}", png(number), f"picture {number}".encode()) for number in range(10)
    ]


def test_loaded_index_equals_the_built_one(folder: Path) -> None:
    built, loaded = build_index(folder), load_index(folder)
    assert (loaded.shards, loaded.digest, loaded.bad) == (built.shards, built.digest, built.bad)
    assert all(map(np.array_equal, loaded.columns, built.columns))
    assert np.array_equal(loaded.key_bytes, built.key_bytes)


def test_digest_follows_the_samples(tmp_path: Path) -> None:
    def digest(name: str, some: list[dict[str, bytes | str]], per_shard: int = 2) -> str:
        return write_shards(some, tmp_path / name, samples_per_shard=per_shard).digest

    some = list(samples(4))
    same = digest("a", some)
    assert digest("b", some) == same
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    changed = [
        digest("caption", [*some[:3], some[3] | {"txt": "picture 4"}]),
        digest("image", [*some[:3], some[3] | {"png": png(9)}]),
        digest("key", [*some[:3], some[3] | {"__key__": "000009"}]),
        digest("order", [*some[:2], some[3], some[2]]),
        digest("sharding", some, per_shard=4),
        digest("fewer", some[:3]),
    ]
    assert len({same, *changed}) == 7


def test_writing_refuses_a_used_folder_and_leaves_nothing_when_it_fails(folder: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"already holds shards \(index.json, shard-000000.tar\)"):
        write_shards(samples(3), folder, samples_per_shard=2)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

    def failing() -> Iterator[dict[str, bytes | str]]:
        yield from samples(5)
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        write_shards(failing(), tmp_path / "new", samples_per_shard=2)
    with pytest.raises(ValueError, match="source is empty"):
        write_shards([], tmp_path / "new", samples_per_shard=2)
    with pytest.raises(ValueError, match=r"sample key 'a\.b'"):
        write_shards([{"__key__": "a.b", "png": png(0), "txt": ""}], tmp_path / "new", samples_per_shard=2)
    with pytest.raises(ValueError, match="sample key None"):
        write_shards([{"png": png(0), "txt": ""}], tmp_path / "new", samples_per_shard=2)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("stem", ["./b/0001", "ü/größe", "long/" + "x" * 80 + "/" + "y" * 60])
def test_tars_of_other_writers_are_read(tmp_path: Path, tar_format: int, stem: str) -> None:
    write_tar(tmp_path / "a.tar", [(f"{stem}.png", png(1)), (f"{stem}.txt", b"one")], format=tar_format)
    index = build_index(tmp_path)
    assert (index.num_samples, index.bad, index.key(0)) == (1, {}, stem)
    assert (stored(index, 0, "image"), stored(index, 0, "caption")) == (png(1), b"one")


def test_webdataset_with_its_own_settings_writes_readable_shards(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "own-%03d.tar"), verbose=0) as writer:
        writer.write({"__key__": "7", "png": png(7), "json": {"caption": "seven"}, "seg.png": png(8)})
    assert b"mtime=" in (tmp_path / "own-000.tar").read_bytes(), "expected extended headers in this tar"
    index = build_index(tmp_path)
    assert (index.num_samples, index.bad) == (1, {})
    assert stored(index, 0, "image") == png(7)
    assert json.loads(stored(index, 0, "caption")) == {"caption": "seven"}


# --- damage ---------------------------------------------------------------------------------------------------------


def header_at(data: bytes, member: str) -> int:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmember(member).offset


def truncate_in_data(data: bytes) -> bytes:
    return data[: header_at(data, "000004.png") + 512 + 20]


def truncate_at_header(data: bytes) -> bytes:
    return data[: header_at(data, "000004.png")]


def truncate_inside_header(data: bytes) -> bytes:
    return data[: header_at(data, "000004.png") + 100]


def truncate_before_last_member(data: bytes) -> bytes:
    return data[: header_at(data, "000004.txt")]


def truncate_in_end_mark(data: bytes) -> bytes:
    return data[: header_at(data, "000009.txt") + 3 * 512]


def flip_header_bit(data: bytes) -> bytes:
    at = header_at(data, "000004.png") + 130
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def zero_a_header(data: bytes) -> bytes:
    at = header_at(data, "000004.txt")
    return data[:at] + bytes(1024) + data[at + 1024 :]


def append_another_tar(data: bytes) -> bytes:
    return data + data


DAMAGES: list[tuple[Callable[[bytes], bytes], str]] = [
    (truncate_in_data, r"sample '000004', member '000004.png': says \d+ bytes at \d+, but the shard ends at \d+"),
    (truncate_at_header, r"after sample '000003', member '000003.txt': .* without the two zero blocks that end a tar"),
    (truncate_inside_header, r"after sample '000003', member '000003.txt': .* without a whole header"),
    (truncate_before_last_member, r"after sample '000004', member '000004.png': .* without the two zero blocks"),
    (truncate_in_end_mark, r"after sample '000009', member '000009.txt': one zero block"),
    (flip_header_bit, r"after sample '000003', member '000003.txt': damaged tar header at byte \d+ \(bad checksum\)"),
    (zero_a_header, r"after sample '000004', member '000004.png': an end mark at byte \d+, but data behind it"),
    (append_another_tar, r"after sample '000009', member '000009.txt': an end mark at byte \d+, but data behind it"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damage_is_named(folder: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    shard = folder / "shard-000000.tar"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(ValueError, match=f"^shard-000000.tar: {message}.*; copy the shard again"):
        build_index(folder)


def test_no_damage_to_a_header_goes_unseen(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    write_shards(samples(2), tmp_path / "sound", samples_per_shard=2)
    data = (tmp_path / "sound" / "shard-000000.tar").read_bytes()
    shard.write_bytes(data)
    sound = list(walk_members(shard))
    start = header_at(data, "000001.png")
    unharmed = []
    for at in range(512):
        shard.write_bytes(data[: start + at] + bytes([data[start + at] ^ 0x10]) + data[start + at + 1 :])
        try:
            assert list(walk_members(shard)) == sound
            unharmed.append(at)
        except ValueError as error:
            assert str(error).startswith("a.tar: after sample '000000'")
    # A leading zero turned blank and the last separator leave the checksum's value, and so the header, as it was.
    assert unharmed == [148, 155]


def test_no_truncation_goes_unseen(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    write_shards(samples(2), tmp_path / "sound", samples_per_shard=2)
    data = (tmp_path / "sound" / "shard-000000.tar").read_bytes()
    end = header_at(data, "000001.txt") + 4 * 512
    assert end < len(data)
    for length in range(0, end, 64):
        shard.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"^a.tar: "):
            list(walk_members(shard))
    shard.write_bytes(data[:end])
    assert len(list(walk_members(shard))) == 4


def test_changed_caption_bytes_change_digest_and_checksum(folder: Path) -> None:
    """A flip in file data cannot be seen without an older index; it makes another data set."""
    shard, before = folder / "shard-000000.tar", load_index(folder)
    shard.write_bytes(shard.read_bytes().replace(b"picture 4", b"pictuse 4"))
    after = build_index(folder)
    assert after.digest != before.digest
    assert (after.columns.places["caption_crc"] != before.columns.places["caption_crc"]).nonzero()[0].tolist() == [4]


GOOD = [("a.png", png(1)), ("a.txt", b"a")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([*GOOD, ("b.txt", b"b"), *GOOD], r"a.tar: sample 'a' comes twice"),
        ([*GOOD, *GOOD], r"a.tar: sample 'a' holds 'png' twice"),
        ([*GOOD, ("a.PNG", png(2))], r"a.tar: sample 'a' holds 'png' twice"),
        ([("/etc/a.png", png(1))], r"a.tar: unsafe member name '/etc/a.png'"),
        ([("x/../../a.png", png(1))], r"a.tar: unsafe member name 'x/../../a.png'"),
        ([("a\n.png", png(1))], r"a.tar: unsafe member name"),
        ([*GOOD, ("README", b"hello")], r"a.tar: member 'README' is no KEY.EXTENSION"),
        ([], r"a.tar: holds no samples"),
    ],
)
def test_unfit_members_are_refused(tmp_path: Path, files: list[tuple[str, bytes]], message: str) -> None:
    write_tar(tmp_path / "a.tar", files)
    with pytest.raises(ValueError, match=message):
        build_index(tmp_path)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_members_that_are_no_regular_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(ValueError, match=r"a.tar: member 'a.png/?' is a folder, link or device"):
        build_index(tmp_path)


def test_empty_file_and_keys_in_two_shards_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.tar: at its start: the shard stops at byte 0"):
        build_index(tmp_path)
    write_tar(tmp_path / "a.tar", GOOD)
    write_tar(tmp_path / "b.tar", GOOD)
    with pytest.raises(ValueError, match=r"b.tar: sample 'a' is also in a.tar"):
        build_index(tmp_path)


def test_bad_samples_are_kept_and_named(tmp_path: Path) -> None:
    cases = {
        "no-caption": ([("png", png(1))], "caption missing, and label: neither .txt nor .cls, and no .json"),
        "cut-image": ([("png", png(1)[:-30]), ("txt", b"x")], "broken image"),
        "no-picture": ([("jpg", b"hello"), ("txt", b"x")], "no PNG, JPEG or WebP picture"),
        "no-image": ([("txt", b"x")], "image missing (found: txt)"),
        "two-images": ([("jpg", png(1)), ("png", png(1)), ("txt", b"x")], "two images (png, jpg)"),
        "zeroed-caption": ([("png", png(1)), ("txt", b"x\0\0")], "broken caption (zero bytes)"),
        "json-zero": ([("json", b'{"caption": "\\u0000"}'), ("png", png(1))], "broken caption (zero bytes)"),
        "bytes-caption": ([("png", png(1)), ("txt", b"\xff\xfe")], "broken caption (UnicodeDecodeError"),
        "json-without": ([("json", b'{"text": "x"}'), ("png", png(1))], 'no string under "caption"'),
        "json-number": ([("json", b'{"caption": 3}'), ("png", png(1))], 'no string under "caption"'),
        "json-broken": ([("json", b'{"caption": '), ("png", png(1))], "broken caption (JSONDecodeError"),
        "json-deep": ([("json", b"[" * 200_000), ("png", png(1))], "broken caption (RecursionError"),
        "json-half": ([("json", b'{"caption": "\\ud800"}'), ("png", png(1))], "broken caption (UnicodeEncodeError"),
        "long-caption": ([("png", png(1)), ("txt", b"x" * (1 << 20) + b"x")], "caption of 1048577 bytes"),
        "sound": ([("json", b'{"caption": "yes"}'), ("png", png(1)), ("npy", b"anything")], None),
    }
    files = [(f"{key}.{extension}", data) for key, (parts, _) in cases.items() for extension, data in parts]
    write_tar(tmp_path / "a.tar", files)
    for index in (build_index(tmp_path), load_index(tmp_path)):
        assert index.num_samples == len(cases) == 15
        for sample, (key, (_, reason)) in enumerate(cases.items()):
            assert index.key(sample) == key
            assert (reason is None) == (sample not in index.bad)
            assert reason is None or reason in index.bad[sample]
    listed = json.loads((tmp_path / "index.json").read_text())["bad"]
    assert len(listed) == 14
    assert listed[0]["name"] == "a.tar sample 'no-caption'"


def test_labels_are_indexed(tmp_path: Path) -> None:
    cases: dict[str, tuple[dict[str, bytes], int | str]] = {
        "cls": ({"cls": b"7\n"}, 7),
        "both": ({"cls": b"0", "txt": b"x"}, 0),
        "caption": ({"txt": b"x"}, -1),
        "json": ({"json": b'{"label": 5}'}, 5),
        "json-both": ({"json": b'{"label": 4, "caption": "x"}'}, 4),
        "json-and-txt": ({"json": b'{"label": 3}', "txt": b"x"}, 3),
        "cls-first": ({"json": b'{"label": 3, "caption": "x"}', "cls": b"2"}, 2),
        "broken": ({"cls": b"cat", "txt": b"x"}, "broken label: the .cls holds b'cat'"),
        "negative": ({"cls": b"-1", "txt": b"x"}, "label -1, expected a class number"),
        "json-word": ({"json": b'{"label": "cat"}', "txt": b"x"}, 'no integer under "label"'),
        "long": ({"cls": b"1" * 65}, "label of 65 bytes, more than the limit"),
    }
    files = [
        (f"{key}.{extension}", data)
        for key, (parts, _) in cases.items()
        for extension, data in ({"png": png(1)} | parts).items()
    ]
    write_tar(tmp_path / "a.tar", files)
    for index in (build_index(tmp_path), load_index(tmp_path)):
        assert index.labels is not None and index.labels.dtype == np.int64
        for sample, (key, (_, expected)) in enumerate(cases.items()):
            assert index.key(sample) == key
            if isinstance(expected, str):
                assert expected in index.bad[sample]
            else:
                assert sample not in index.bad and index.labels[sample] == expected
        assert index.frames is None
    assert stored(index, 6, "caption") == b'{"label": 3, "caption": "x"}'
    assert not index.has_caption[0] and not index.has_caption[3]


def test_labels_are_part_of_the_digest_and_vanish_with_their_file(tmp_path: Path) -> None:
    def labelled(label: str | None) -> ShardIndex:
        write_tar(tmp_path / "a.tar", GOOD if label is None else [*GOOD, ("a.cls", label.encode())])
        return build_index(tmp_path)

    digests = {labelled(label).digest for label in ("1", "2", None)}
    assert len(digests) == 3
    assert load_index(tmp_path).labels is None and not (tmp_path / "index-labels.npy").exists()
    labelled("1")
    np.save(tmp_path / "index-labels.npy", np.array([2]))
    with pytest.raises(ValueError, match=r"index-labels.npy does not belong to index.json"):
        load_index(tmp_path)


# --- the index on disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [False, True])
@pytest.mark.parametrize("call", [build_index, load_index])
def test_folder_without_shards_says_what_to_run(tmp_path: Path, make: bool, call: Callable[[Path], ShardIndex]) -> None:
    if make:
        (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none: (no such folder of|holds no) shards.*`dydit data shapes .*none`"):
        call(tmp_path / "none")


def test_compressed_shards_are_refused(folder: Path) -> None:
    (folder / "more.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"compressed shards \(more.tar.gz\)"):
        build_index(folder)


def test_missing_index_says_what_to_run(folder: Path) -> None:
    (folder / "index.json").unlink()
    with pytest.raises(ValueError, match=r"1 shards but no index.json; run `dydit data index .*shards`"):
        load_index(folder)


@pytest.mark.parametrize("name", ["index.json", "index-samples.npy", "index-keys.npy"])
@pytest.mark.parametrize("length", [0, 150, -1])
def test_torn_index_says_what_to_run(folder: Path, name: str, length: int) -> None:
    data = (folder / name).read_bytes()
    # The JSON's last byte is needed too: it is a brace.
    (folder / name).write_bytes(data[:length])
    with pytest.raises(ValueError, match=r"torn or foreign index .*; run `dydit data index .*shards`"):
        load_index(folder)


def test_missing_array_and_foreign_content_say_what_to_run(folder: Path) -> None:
    text = (folder / "index.json").read_text()
    for changed in (text.replace("index-v2", "index-v9"), text.replace('"count": 10', '"count": 9'), "[]", "{}"):
        (folder / "index.json").write_text(changed)
        with pytest.raises(ValueError, match=r"torn or foreign index .*; run `dydit data index"):
            load_index(folder)
    (folder / "index.json").write_text(text)
    load_index(folder)
    (folder / "index-keys.npy").unlink()
    with pytest.raises(ValueError, match=r"torn or foreign index .*index-keys.npy"):
        load_index(folder)


def test_index_of_an_interrupted_rebuild_is_seen_as_torn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dydit_scale.data import index as index_module

    write_tar(folder / "more.tar", [("z.png", png(3)), ("z.txt", b"z")])

    def stop_before_the_end(source: Path, target: Path) -> None:
        if target.name == "index.json":
            raise KeyboardInterrupt
        replace(source, target)

    replace = index_module.os.replace
    monkeypatch.setattr(index_module.os, "replace", stop_before_the_end)
    with pytest.raises(KeyboardInterrupt):
        build_index(folder)
    with pytest.raises(ValueError, match=r"torn or foreign index .*does not belong to index.json"):
        load_index(folder)
    monkeypatch.undo()
    assert build_index(folder).num_samples == load_index(folder).num_samples == 11


def test_every_changed_shard_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(samples(8), folder, samples_per_shard=2)
    (folder / "shard-000000.tar").unlink()
    (folder / "shard-000002.tar").unlink()
    with (folder / "shard-000003.tar").open("ab") as file:
        file.write(b"\0")
    write_tar(folder / "new.tar", GOOD)
    with pytest.raises(ValueError) as caught:
        load_index(folder)
    message = str(caught.value)
    assert "shard-000000.tar is missing; shard-000002.tar is missing; shard-000003.tar has 10241 bytes" in message
    assert "new.tar is not in the index" in message
    assert "shard-000001" not in message
    assert "run `dydit data index" in message


def test_broken_shards_are_left_out_up_to_a_budget_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(samples(30), folder, samples_per_shard=10, progress=False)
    shards = sorted(folder.glob("*.tar"))
    whole = load_index(folder)
    shards[1].write_bytes(shards[1].read_bytes()[:3000])
    with pytest.raises(ValueError, match=shards[1].name):
        build_index(folder, progress=False)
    index = build_index(folder, bad_shards=1, progress=False)
    assert list(index.broken) == [shards[1].name] and shards[1].name in index.broken[shards[1].name]
    assert index.num_samples == whole.num_samples - whole.shards[1].count
    assert load_index(folder).broken == index.broken and index.digest != whole.digest
    for shard in (shards[0], shards[2]):
        shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(ValueError, match="2 broken shards, 1 allowed by --bad-shards"):
        build_index(folder, bad_shards=1, progress=False)
    with pytest.raises(ValueError, match="every shard is broken"):
        build_index(folder, bad_shards=9, progress=False)
