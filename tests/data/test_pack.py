"""Packing: what is packed and what is reported, restarts, processes and machines; always the same bytes."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import select
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools import pack as pack_module
from data_tools.pack import REPORT_FILE, Part, describe, pack
from data_tools.packing import duplicates, writing
from data_tools.packing.config import PackConfig
from data_tools.packing.media import Media
from dydit_scale.cli.main import main
from dydit_scale.data.decode import decode_image
from dydit_scale.data.shards import load_index

SMALL = PackConfig(samples_per_shard=3)


def png(number: int, size: tuple[int, int] = (6, 4)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(number).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
        file, "PNG"
    )
    return file.getvalue()


def put(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def captioned(folder: Path, count: int) -> Path:
    for number in range(count):
        put(folder, {f"{number:02d}.png": png(number), f"{number:02d}.txt": f"picture {number}\n"})
    return folder


def packed(out: Path) -> list[dict[str, Any]]:
    """All samples in the order of the shards, as webdataset reads them."""
    tars = sorted(str(path) for path in out.glob("*.tar"))
    found = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    return [dict(sample) | {"json": json.loads(sample["json"])} for sample in found]


def report(out: Path, name: str = REPORT_FILE) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]


def tars(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


def test_pictures_and_captions_come_back(tmp_path: Path) -> None:
    source = captioned(tmp_path / "in", 7)
    summary = pack(source, tmp_path / "out", SMALL)
    assert (summary.total, summary.packed, summary.written, summary.found) == (7, 7, 3, 0)
    samples = packed(tmp_path / "out")
    assert [sample["__key__"] for sample in samples] == [f"{n:02d}" for n in range(7)]
    assert [sample["png"] for sample in samples] == [png(n) for n in range(7)]
    assert [sample["txt"].decode() for sample in samples] == [f"picture {n}" for n in range(7)]
    assert samples[4]["json"] == {"source": "04.png"}
    index = load_index(tmp_path / "out")
    assert (index.num_samples, index.bad) == (7, {})
    assert summary.index is not None and summary.index.digest == index.digest
    assert report(tmp_path / "out") == []


def test_shards_are_bounded_by_samples_and_by_bytes(tmp_path: Path) -> None:
    source = tmp_path / "in"
    sizes = {"a": 600, "b": 300, "c": 300, "d": 800, "e": 100}
    for number, (name, side) in enumerate(sizes.items()):
        put(source, {f"{name}.png": png(number, (side, 600)), f"{name}.txt": name})
    assert [(source / f"{n}.png").stat().st_size >> 10 for n in sizes] == [1056, 528, 528, 1408, 176]
    index = pack(source, tmp_path / "out", PackConfig(shard_mib=1)).index
    assert index is not None and [shard.count for shard in index.shards] == [1, 1, 1, 1, 1]
    index = pack(source, tmp_path / "two", PackConfig(shard_mib=2)).index
    assert index is not None and [shard.count for shard in index.shards] == [2, 2, 1]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_processes_does_not_show(tmp_path: Path, workers: int) -> None:
    source = captioned(tmp_path / "in", 10)
    put(source, {"03.png": b"broken", "11.png": png(2), "11.txt": "twice"})
    one = pack(source, tmp_path / "one", SMALL, workers=1)
    many = pack(source, tmp_path / "many", SMALL, workers=workers)
    assert len(tars(tmp_path / "one")) == 4
    assert tars(tmp_path / "one") == tars(tmp_path / "many")
    assert report(tmp_path / "one") == report(tmp_path / "many")
    assert (one.packed, one.dropped) == (many.packed, many.dropped) == (9, {"broken picture": 1, "duplicate": 1})


def test_parts_make_the_same_shards_and_a_run_without_parts_ends_them(tmp_path: Path) -> None:
    source = captioned(tmp_path / "in", 10)
    put(source, {"03.png": b"broken", "11.png": png(2), "11.txt": "twice"})
    whole = pack(source, tmp_path / "whole", SMALL)
    # One machine without a view of the other's folder, and two that share one.
    for out in (tmp_path / "apart", tmp_path / "shared"):
        first = pack(source, out, SMALL, part=Part(1, 2))
        if out.name == "apart":
            assert sorted(tars(out)) == ["shard-000000.tar", "shard-000002.tar"]
        second = pack(source, out, SMALL, part=Part(2, 2))
        assert first.index is None and not (out / "index.json").exists()
        assert tars(out) == tars(tmp_path / "whole")
        assert first.total + second.total == whole.total == 11
        assert first.dropped + second.dropped == whole.dropped
    lines = report(out, "pack-report-1-of-2.jsonl") + report(out, "pack-report-2-of-2.jsonl")
    assert sorted(line["input"] for line in lines) == ["03.png", "11.png"]
    ended = pack(source, out, SMALL)
    assert (ended.written, ended.found, ended.packed) == (0, 4, 9)
    assert report(out) == report(tmp_path / "whole")
    assert load_index(out).digest == load_index(tmp_path / "whole").digest


def in_child(run: Callable[[], Any]) -> multiprocessing.process.BaseProcess:
    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    return child


@pytest.mark.parametrize("survived", [0, 1, 4, 8])
def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int) -> None:
    source = captioned(tmp_path / "in", 10)
    pack(source, tmp_path / "whole", SMALL)

    def killed() -> None:
        calls = iter(range(survived))

        def prepare(*args: Any) -> Media:
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        original, writing.prepare = writing.prepare, prepare
        pack(source, tmp_path / "out", SMALL, workers=1, progress=False)

    child = in_child(killed)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert sorted(tars(tmp_path / "out")) == [f"shard-{n:06d}.tar" for n in range(survived // 3)]
    assert len(list((tmp_path / "out" / ".pack").glob("*.1-of-1"))) == 1
    summary = pack(source, tmp_path / "out", SMALL)
    assert (summary.found, summary.written) == (survived // 3, 4 - survived // 3)
    assert tars(tmp_path / "out") == tars(tmp_path / "whole")
    assert list((tmp_path / "out" / ".pack").glob("*.1-of-1")) == []


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    source = captioned(tmp_path / "in", 6)
    reader, writer = os.pipe()

    def stuck(*args: Any) -> Media:
        os.write(writer, b".")
        time.sleep(120)
        raise AssertionError("slept through")

    def run() -> None:
        os.close(reader)
        writing.prepare = stuck
        pack(source, tmp_path / "out", SMALL, workers=2, progress=False)

    child = in_child(run)
    os.close(writer)
    assert os.read(reader, 1) == b"."
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    while select.select([reader], [], [], 60)[0]:
        if not os.read(reader, 1):
            break  # the last worker closed its end
    else:
        pytest.fail("workers outlive their parent")
    os.close(reader)


def test_a_dead_worker_is_an_error_and_the_next_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = captioned(tmp_path / "in", 6)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "prepare", lambda *args: os._exit(9))
        with pytest.raises(ValueError, match="process that packs died"):
            pack(source, tmp_path / "out", SMALL, workers=2)
    assert pack(source, tmp_path / "out", SMALL).packed == 6


def test_whole_shards_are_left_alone_and_damaged_ones_written_again(tmp_path: Path) -> None:
    source, out = captioned(tmp_path / "in", 7), tmp_path / "out"
    pack(source, out, SMALL)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    first, middle, last = sorted(out.glob("*.tar"))
    bytes_before = tars(out)
    middle.write_bytes(middle.read_bytes()[:1000])
    last.unlink()
    summary = pack(source, out, SMALL)
    assert (summary.found, summary.written) == (1, 2)
    assert tars(out) == bytes_before
    assert first.stat().st_mtime_ns == before[first.name]


def test_an_input_that_could_not_be_read_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = captioned(tmp_path / "in", 4), tmp_path / "out"
    original = writing.read_file

    def failing(file: Any, limit: int) -> bytes:
        if file.path.endswith("01.png"):
            raise writing.UnfitError(writing.UNREADABLE, "I/O error")
        return original(file, limit)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "read_file", failing)
        summary = pack(source, out, SMALL)
    assert (summary.packed, summary.dropped) == (3, {"unreadable": 1})
    summary = pack(source, out, SMALL)
    assert (summary.packed, summary.found, summary.written) == (4, 1, 1)
    assert report(out) == []


def test_files_that_vanish_or_change_under_way_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, original = captioned(tmp_path / "in", 4), pack_module.make_plan

    def meanwhile(*args: Any, **options: Any) -> Any:
        made = original(*args, **options)
        (source / "00.png").unlink()
        (source / "01.png").write_bytes(png(9) + b" ")
        (source / "02.txt").unlink()
        return made

    monkeypatch.setattr(pack_module, "make_plan", meanwhile)
    summary = pack(source, tmp_path / "out", SMALL)
    assert (summary.packed, summary.dropped) == (1, {"unreadable": 3})
    assert "01.png changed since it was listed" in report(tmp_path / "out")[1]["detail"]


def test_other_inputs_or_options_are_refused_by_name(tmp_path: Path) -> None:
    source, out = captioned(tmp_path / "in", 4), tmp_path / "out"
    pack(source, out, SMALL)
    with pytest.raises(ValueError, match=r"max_side was None, now 64, samples_per_shard was 3, now 2\)"):
        pack(source, out, PackConfig(samples_per_shard=2, max_side=64))
    put(source, {"00.txt": "another text", "04.png": png(4)})
    (source / "01.png").unlink()
    with pytest.raises(ValueError, match=r"1 new \(04.png\); 1 gone \(01.png\); 1 changed \(00.png\)"):
        pack(source, out, SMALL)


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    source, out = captioned(tmp_path / "in", 4), tmp_path / "out"
    with pytest.raises(ValueError, match="lies inside the source"):
        pack(source, source / "shards")
    with pytest.raises(ValueError, match="got the file"):
        pack(source, source / "00.png")
    with pytest.raises(ValueError, match="no such folder or table"):
        pack(tmp_path / "none", out)
    with pytest.raises(ValueError, match=r"no pictures or clips \(found: 1 .xyz\)"):
        pack(put(tmp_path / "empty", {"a.xyz": ""}), out)
    with pytest.raises(ValueError, match="expected 1/2 to 2/2, got 3/2"):
        pack(source, out, part=Part(3, 2))
    assert not out.exists()
    put(out, {"other.tar": b""})
    with pytest.raises(ValueError, match=r"already holds other shards \(other.tar\)"):
        pack(source, out)
    (out / "other.tar").unlink()
    pack(source, out, SMALL)
    put(out, {"other.tar": b""})
    with pytest.raises(ValueError, match=r"shards that are not of this source \(other.tar\)"):
        pack(source, out, SMALL)


def test_two_runs_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = captioned(tmp_path / "in", 4), tmp_path / "out"
    refused: list[str] = []
    begun: list[bool] = []

    def second(*args: Any) -> Media:
        if not begun:
            begun.append(True)
            with pytest.raises(ValueError, match="another run is packing there") as caught:
                pack(source, out, SMALL, workers=1)
            refused.append(str(caught.value))
        return original(*args)

    original = writing.prepare
    monkeypatch.setattr(writing, "prepare", second)
    pack(source, out, SMALL, workers=1)
    assert len(refused) == 1


def test_nothing_packed_is_an_error_that_names_the_report(tmp_path: Path) -> None:
    source = put(tmp_path / "in", {"a.png": b"no picture", "a.txt": "a", "b.png": png(1)})
    with pytest.raises(ValueError, match=r"nothing could be packed \(broken picture 1, no caption 1\); see .*report"):
        pack(source, tmp_path / "out")
    assert {line["input"] for line in report(tmp_path / "out")} == {"a.png", "b.png"}
    assert list((tmp_path / "out").glob("*.tar")) == []


# Duplicates


def test_of_equal_bytes_the_first_fit_one_stays(tmp_path: Path) -> None:
    source = put(tmp_path / "in", {f"{n}.png": png(n) for n in range(8)})
    put(source, {f"{n}.txt": f"picture {n}" for n in range(8)})
    # Of 1 = 5 = 7 the first has no usable caption; 3 = 6 lie in different shards.
    put(source, {"5.png": png(1), "7.png": png(1), "6.png": png(3), "1.txt": "  "})
    summary = pack(source, tmp_path / "out", SMALL)
    assert [sample["__key__"] for sample in packed(tmp_path / "out")] == ["0", "2", "3", "4", "5"]
    assert [(line["input"], line["reason"], line["detail"]) for line in report(tmp_path / "out")] == [
        ("1.png", "duplicate", "has the bytes of 5.png"),
        ("6.png", "duplicate", "has the bytes of 3.png"),
        ("7.png", "duplicate", "has the bytes of 5.png"),
    ]
    assert summary.dropped == {"duplicate": 3}
    everything = pack(source, tmp_path / "all", PackConfig(keep_duplicates=True))
    assert (everything.packed, everything.dropped) == (7, {"no caption": 1})


def test_only_files_of_equal_size_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = captioned(tmp_path / "in", 3)
    put(source, {"02.png": png(2, (20, 20)), "01.png": png(0)})
    read: list[str] = []
    original = duplicates.read_file
    monkeypatch.setattr(
        duplicates, "read_file", lambda file, limit: read.append(Path(file.path).name) or original(file, limit)
    )
    assert pack(source, tmp_path / "out").dropped == {"duplicate": 1}
    assert sorted(read) == ["00.png", "01.png"]
    pack(source, tmp_path / "out")
    assert len(read) == 2, "hashes are kept with the plan"


# Keys and order


def test_keys_are_safe_and_unique(tmp_path: Path) -> None:
    names = ["a.b.png", "a_b.png", "a b.png", "x/ä-é.png", "x/" + "long" * 40 + ".png", "plain.png", "plain.webp"]
    source = tmp_path / "in"
    for number, name in enumerate(names):
        picture = png(number)
        if name.endswith("webp"):
            file = io.BytesIO()
            decode_image(picture).save(file, "WEBP")
            picture = file.getvalue()
        put(source, {name: picture})
    pack(source, tmp_path / "out", PackConfig(caption_from="name"))
    keys = {sample["json"]["source"]: sample["__key__"] for sample in packed(tmp_path / "out")}
    assert len(set(keys.values())) == len(names) == len(keys)
    assert keys["x/ä-é.png"] == "x/ä-é"
    assert {key[:4] for name, key in keys.items() if name.startswith("a")} == {"a_b-"}
    assert len(keys[names[4]]) < 140
    assert {key[:6] for name, key in keys.items() if name.startswith("plain")} == {"plain-"}


def test_shuffling_mixes_and_repeats(tmp_path: Path) -> None:
    source = captioned(tmp_path / "in", 12)
    config = PackConfig(samples_per_shard=4, shuffle=True)
    pack(source, tmp_path / "a", config)
    pack(source, tmp_path / "b", config, workers=1)
    order = [sample["__key__"] for sample in packed(tmp_path / "a")]
    assert sorted(order) == [f"{n:02d}" for n in range(12)] != order
    assert tars(tmp_path / "a") == tars(tmp_path / "b")


# Completeness

KINDS = {
    "good": lambda n: {f"{n}.png": png(n), f"{n}.txt": f"picture {n}"},
    "same": lambda n: {f"{n}.png": png(1000), f"{n}.txt": "the same"},
    "bare": lambda n: {f"{n}.png": png(n)},
    "empty": lambda n: {f"{n}.png": b"", f"{n}.txt": "empty"},
    "broken": lambda n: {f"{n}.jpg": b"\xff\xd8\xff" + bytes(20), f"{n}.txt": "broken"},
    "small": lambda n: {f"{n}.png": png(n, (2, 9)), f"{n}.txt": "small"},
    "long": lambda n: {f"{n}.png": png(n, (4, 40)), f"{n}.txt": "long"},
    "wordy": lambda n: {f"{n}.png": png(n), f"{n}.txt": "word " * 20},
    "json": lambda n: {f"{n}.png": png(n), f"{n}.json": '{"caption": "from json", "label": 3}'},
    "torn": lambda n: {f"{n}.png": png(n), f"{n}.json": '{"caption": '},
    "link": lambda n: {f"{n}.link.png": b""},
    "film": lambda n: {f"{n}.mp4": b"\0\0\0\x10ftypisom", f"{n}.txt": "no film"},
    "other": lambda n: {f"{n}.xyz": b"?"},
}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(sorted(KINDS)), max_size=14), st.integers(1, 4), st.integers(1, 3))
def test_every_input_is_packed_or_reported_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], per_shard: int, parts: int
) -> None:
    source = captioned(tmp_path_factory.mktemp("in") / "in", 1)
    for number, kind in enumerate(kinds, 1):
        put(source, KINDS[kind](number))
        if kind == "link":
            (source / f"{number}.link.png").unlink()
            (source / f"{number}.link.png").symlink_to("/etc/hostname")
    inputs = sorted(path.name for path in source.iterdir() if path.suffix in (".png", ".jpg", ".mp4"))
    config = PackConfig(samples_per_shard=per_shard, min_side=3, max_aspect=5, max_caption=50)
    out = tmp_path_factory.mktemp("out")
    for number in range(parts - 1):  # the run without parts makes the others
        pack(source, out, config, part=Part(number + 1, parts), workers=1, progress=False)
    summary = pack(source, out, config, workers=1, progress=False)
    seen = [sample["json"]["source"] for sample in packed(out)] + [line["input"] for line in report(out)]
    assert sorted(seen) == inputs
    assert summary.total == len(inputs)
    assert summary.ignored[".xyz"] == kinds.count("other")
    good = sum(kinds.count(kind) for kind in ("good", "json")) + ("same" in kinds) + 1
    assert summary.packed == good
    assert load_index(out).bad == {}


# The command


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = captioned(tmp_path / "in", 5)
    put(source, {"05.png": png(2), "05.txt": "twice", "06.png": png(6), "notes.doc": "?", ".hidden": "?"})
    asked = ["data", "pack", str(source), str(tmp_path / "out"), "--samples-per-shard", "2", "--workers", "1"]
    assert main([*asked, "--part", "2/2"]) == 0
    assert "part 2 of 2; when all are packed" in capsys.readouterr().out
    assert main(asked) == 0
    said = capsys.readouterr().out
    for line in (
        "7 inputs: 5 packed, 2 dropped",
        "dropped: duplicate 1, no caption 1; each with its reason in ",
        "other files, ignored: .doc 1, hidden 1",
        "shards: 2 written, 1 found whole",
        "out: 5 samples in 3 shards, digest ",
    ):
        assert line in said
    assert main([*asked, "--min-side", "9"]) == 64
    assert "min_side was 1, now 9" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*asked, "--part", "half"])


def test_summary_counts_what_was_converted_and_left_out(tmp_path: Path) -> None:
    source = captioned(tmp_path / "in", 2)
    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (1, 2, 3, 90)).save(file, "PNG")
    put(source, {"a.png": file.getvalue(), "a.json": '{"captions": ["short", "a caption that is far too long"]}'})
    summary = pack(source, tmp_path / "out", PackConfig(max_caption=12))
    lines = list(describe(summary))
    assert lines[0] == "3 inputs: 3 packed, 0 dropped"
    assert "captions left out of packed samples: 1" in lines[1]
    assert lines[2] == "  converted: transparency 1"
    assert report(tmp_path / "out") == [
        {"input": "a.png", "reason": "caption left out", "detail": "caption of 30 characters, more than 12"}
    ]
    assert Counter(sample.get("txt") for sample in packed(tmp_path / "out"))[b"short"] == 1
