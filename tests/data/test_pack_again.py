"""Packing again into a folder that earlier runs left, or that other machines pack into at the same time."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools import pack as pack_module
from data_tools.pack import REPORT_FILE, UNUSABLE, PackSummary, Part, describe
from data_tools.packing import duplicates, writing
from data_tools.packing.config import PackConfig
from data_tools.packing.inputs import UNREADABLE, UnfitError
from data_tools.packing.media import Media
from data_tools.packing.plan import INPUTS_FILE, PLAN_FILE, replace_file
from dydit_scale.data.index import INDEX_FILE, file_sha256
from dydit_scale.data.shards import load_index


def pack(source: Path, out: Path, **options: Any) -> PackSummary:
    config = PackConfig(samples_per_shard=3, min_side=options.pop("min_side", 1))
    return pack_module.pack(source, out, config, progress=False, **({"workers": 1} | options))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Seven captioned pictures, whose files have one size."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(7):
        file = io.BytesIO()
        Image.fromarray(np.random.RandomState(number).randint(0, 256, (4, 6, 3), dtype=np.uint8)).save(file, "BMP")
        (folder / f"{number}.bmp").write_bytes(file.getvalue())
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


def tars(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


def report(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / REPORT_FILE).read_text(encoding="utf-8").splitlines()]


def unreadable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original = writing.read_file

    def read_file(file: Any, limit: int) -> bytes:
        if file.path.endswith(name):
            raise UnfitError(UNREADABLE, "I/O error")
        return original(file, limit)

    monkeypatch.setattr(writing, "read_file", read_file)


# The index


def test_an_index_does_not_outlive_a_shard_that_a_part_writes_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        unreadable(patch, "4.bmp")
        for number in (1, 2):
            pack(source, out, part=Part(number, 2))
        assert pack(source, out).packed == 6
    old = {path: path.read_bytes() for path in out.glob("index*")}
    assert pack(source, out, part=Part(1, 2)).written == 0
    assert (out / INDEX_FILE).read_bytes() == old[out / INDEX_FILE], "it is still that of all shards"
    assert pack(source, out, part=Part(2, 2)).written == 1
    assert not (out / INDEX_FILE).exists()
    summary = pack(source, out)
    assert (summary.written, summary.found) == (0, 3)
    assert load_index(out).num_samples == summary.packed == 7
    # Earlier versions let the old one lie.
    for path, data in old.items():
        path.write_bytes(data)
    assert load_index(out).num_samples == 6, "the shards have their sizes"
    pack(source, out)
    assert load_index(out).num_samples == 7


def test_a_run_that_ends_before_it_indexes_leaves_no_old_index(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    pack(source, out)
    (out / "shard-000001.tar").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pack_module, "index_folder", interrupted)
        pack(source, out)
    assert sorted(tars(out)) == [f"shard-{n:06d}.tar" for n in range(3)]
    assert not (out / INDEX_FILE).exists()
    assert pack(source, out).written == 0
    assert load_index(out).num_samples == 7


def interrupted(*args: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


def test_an_index_that_is_right_is_not_made_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pack(source, tmp_path / "out").index
    monkeypatch.setattr(pack_module, "index_folder", interrupted)
    monkeypatch.setattr(pack_module, "run_jobs", interrupted)
    again = pack(source, tmp_path / "out").index
    assert first is not None and again is not None and first.digest == again.digest


def test_what_the_index_finds_unusable_is_reported(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = writing.prepare

    def prepare(data: bytes, *args: Any) -> Media:
        return Media("png", b"torn", ()) if data == (source / "3.bmp").read_bytes() else original(data, *args)

    monkeypatch.setattr(writing, "prepare", prepare)
    for _ in range(2):
        summary = pack(source, tmp_path / "out")
        assert [(line["input"], line["reason"]) for line in report(tmp_path / "out")] == [("3.bmp", UNUSABLE)]
        assert "no PNG, JPEG or WebP picture" in report(tmp_path / "out")[0]["detail"]
        assert any(line.startswith(f"  {UNUSABLE}: 1, each ") for line in describe(summary))


# Damage


def test_shards_of_other_bytes_are_written_again_before_they_are_indexed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in (1, 2):
        pack(source, out, part=Part(number, 2))
    whole = tars(out)
    for name, data in whole.items():
        kept = json.loads((out / ".pack" / f"{name}.json").read_text())
        assert (kept["sha256"], kept["bytes"]) == (file_sha256(out / name), len(data))
    damaged = bytearray(whole["shard-000001.tar"])
    damaged[700] ^= 1
    (out / "shard-000001.tar").write_bytes(damaged)
    assert pack(source, out, part=Part(2, 2)).written == 0, "parts go by the size"
    summary = pack(source, out, workers=2)
    assert (summary.written, summary.found) == (1, 2)
    assert tars(out) == whole
    assert load_index(out).bad == {}


def test_records_of_earlier_versions_have_no_hash(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(source, out)
    for path in (out / ".pack").glob("*.tar.json"):
        fields = json.loads(path.read_text())
        del fields["sha256"]
        path.write_text(json.dumps(fields))
    assert pack(source, out).written == 0
    (out / INDEX_FILE).unlink()
    summary = pack(source, out)
    assert summary.written == 0 and summary.index is not None and summary.index.num_samples == 7


# Several machines


def test_files_are_replaced_whole_whoever_else_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"

    def lines() -> Iterator[str]:
        yield "first, "
        replace_file(path, ["other"])  # as from another machine, where the process may have the same number
        assert path.read_text() == "other"
        yield "whole"

    replace_file(path, lines())
    assert path.read_text() == "first, whole"
    with pytest.raises(ZeroDivisionError):
        replace_file(path, (str(1 // n) for n in (1, 0)))
    assert [(left.name, left.read_text()) for left in tmp_path.iterdir()] == [("plan.json", "first, whole")]


def in_child(run: Callable[[], Any]) -> multiprocessing.process.BaseProcess:
    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    return child


def no_file(*args: Any) -> bytes:
    raise AssertionError("an input was read to be compared")


def test_a_part_waits_for_the_plan_of_another_and_compares_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, (reader, writer), (begin, begun) = tmp_path / "out", os.pipe(), os.pipe()
    original = pack_module.make_plan

    def second() -> None:
        os.close(begun)
        os.read(begin, 1)
        monkeypatch.setattr(duplicates, "read_file", no_file)
        monkeypatch.setattr(pack_module.tqdm, "write", lambda text, file: os.write(writer, text.encode()))
        assert pack(source, out, part=Part(2, 2)).written == 1

    def meanwhile(*args: Any, **options: Any) -> Any:
        os.write(begun, b".")
        said.append(os.read(reader, 1000).decode())
        return original(*args, **options)

    child = in_child(second)  # before this process holds locks that it would share
    os.close(writer)
    said: list[str] = []
    monkeypatch.setattr(pack_module, "make_plan", meanwhile)
    assert pack(source, out, part=Part(1, 2)).written == 2
    child.join()
    for end in (reader, begin, begun):
        os.close(end)
    assert said == [f"{out}: another part makes the plan; waiting for it"]
    assert child.exitcode == 0
    assert sorted(tars(out)) == [f"shard-{n:06d}.tar" for n in range(3)]


def test_options_of_a_part_that_waited_are_held_against_the_plan(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "out", part=Part(1, 2))
    with pytest.raises(ValueError, match="min_side was 1, now 2"):
        pack(source, tmp_path / "out", part=Part(2, 2), min_side=2)


@pytest.mark.parametrize("torn", [False, True])
def test_a_run_killed_while_it_compares_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    original, state = duplicates.read_file, tmp_path / "out" / ".pack"
    read: list[str] = []

    def counted(file: Any, limit: int) -> bytes:
        read.append(Path(file.path).name)
        return original(file, limit)

    def killed() -> None:
        def read_file(file: Any, limit: int) -> bytes:
            if file.path.endswith("4.bmp"):
                while (state / "hashes-2-of-2.jsonl").read_bytes().count(b"\n") < 5:
                    pass
                os.kill(os.getpid(), signal.SIGKILL)
            return original(file, limit)

        duplicates.read_file = read_file
        pack(source, tmp_path / "out", part=Part(2, 2))

    child = in_child(killed)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (state / PLAN_FILE).exists()
    if torn:
        path = state / "hashes-2-of-2.jsonl"
        path.write_bytes(path.read_bytes()[:-9])
    (source / "0.bmp").touch()  # changed, for all that can be told
    monkeypatch.setattr(duplicates, "read_file", counted)
    pack(source, tmp_path / "out", part=Part(1, 2))
    assert sorted(read) == ["0.bmp", *(["3.bmp"] if torn else []), "4.bmp", "5.bmp", "6.bmp"]
    assert list(state.glob("hashes-*")) == []
    pack(source, tmp_path / "whole")
    assert (state / INPUTS_FILE).read_bytes() == (tmp_path / "whole" / ".pack" / INPUTS_FILE).read_bytes()
