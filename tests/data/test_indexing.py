"""dydit data index: the same bytes however it is run, duplicates found, other tools' indexes compared."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shlex
import struct
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dydit_scale.cli.main import main
from dydit_scale.data import gather
from dydit_scale.data import shards as shards_module
from dydit_scale.data.files import SampleFiles
from dydit_scale.data.index import load_index
from dydit_scale.data.processes import Advance, run_jobs
from dydit_scale.data.shards import build_index, index_folder

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000002000000030802000000368849d600000014494441547"
    "89c636465636760606062606040500001a800187780d7f10000000049454e44ae426082"
)
GOLDEN = {
    "index-key-ends.npy": "0498bb0bc77204a8e6bd6e030273bee4e2b1e6caaa649618dc8f5ef1954e6f69",
    "index-keys.npy": "dfb0c98a38e0f0652d1ba3bb3be78dd298e6dfe3f0bc45571ba8cfda4d36ccbd",
    "index-labels.npy": "2f46210a85973f824a4a36187a07d7962fded51b5aa5c2c99e1ddc74ab454eaf",
    "index-samples.npy": "10bc5f52d7f103b354c8e9fef5c51b75c57e48fba2cdd6935acdc422afbb2e22",
    "index-sizes.npy": "2e2909687eb7258799107a4180b67bf32b84986b412e845dea45d7fc60ccd57d",
}
"""SHA-256 of the arrays of the index of ``folder``."""
DIGEST = "3008ab12c6938b30533895848ed5d7c1b84ed0ea5b31c6abbed251e555fc53f4"


def write_tar(path: Path, files: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def files(first: int) -> list[tuple[str, bytes]]:
    """Four samples: a sound one, one with a broken caption, one without a label, one with a JSON."""
    parts: list[dict[str, bytes]] = [
        {"png": PIXEL, "txt": f"picture {first}".encode(), "cls": str(first).encode()},
        {"png": PIXEL, "txt": b"\xff", "cls": str(first + 1).encode()},
        {"png": PIXEL, "txt": f"picture {first + 2}".encode()},
        {"json": b'{"caption": "yes", "label": 3}', "png": PIXEL},
    ]
    return [(f"ü/{first + n:04d}.{end}", data) for n, part in enumerate(parts) for end, data in part.items()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of four samples, and one that is cut off."""
    for number in range(3):
        write_tar(tmp_path / f"s{number}.tar", files(4 * number))
    (tmp_path / "s9.tar").write_bytes((tmp_path / "s0.tar").read_bytes()[:700])
    return tmp_path


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("index*"))}


def test_the_index_is_the_same_however_it_is_made(folder: Path) -> None:
    index = build_index(folder, bad_shards=1, progress=False)
    made = hashes(folder)
    assert {name: made[name] for name in GOLDEN} == GOLDEN
    assert index.digest == DIGEST
    assert sorted(index.bad) == [1, 5, 9] and list(index.broken) == ["s9.tar"]
    assert set(made) == {*GOLDEN, "index.json"}
    for workers, update in ((1, False), (3, False), (9, False), (1, True), (3, True)):
        done = index_folder(folder, bad_shards=1, workers=workers, update=update, progress=False)
        assert hashes(folder) == made, (workers, update)
        assert done.reused == (3 if update else 0)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", *5 * [".npy"], *4 * [".tar"]]


def test_update_scans_only_what_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "s9.tar").unlink()
    build_index(folder, progress=False)
    times = (folder / "s1.tar").stat()
    changed = (folder / "s1.tar").read_bytes().replace(b"picture 4", b"pictuse 4")
    (folder / "s1.tar").write_bytes(changed)
    os.utime(folder / "s1.tar", ns=(times.st_atime_ns, times.st_mtime_ns))
    write_tar(folder / "a.tar", [("a.png", PIXEL), ("a.txt", b"new")])
    (folder / "s0.tar").rename(folder / "moved.tar")
    scanned: list[str] = []
    scan = shards_module._scan_whole

    def noting(path: Path, *settings: Any) -> tuple[bytes, np.ndarray, dict[int, str]]:
        scanned.append(path.name)
        return scan(path, *settings)

    monkeypatch.setattr(shards_module, "_scan_whole", noting)
    done = index_folder(folder, update=True, progress=False)
    assert (scanned, done.reused) == (["a.tar", "moved.tar", "s1.tar"], 1)
    updated = hashes(folder)
    build_index(folder, progress=False)
    assert hashes(folder) == updated


def test_update_without_a_whole_index_scans_everything(folder: Path) -> None:
    done = index_folder(folder, bad_shards=1, update=True, progress=False)
    made = hashes(folder)
    (folder / "index-keys.npy").write_bytes(b"")
    again = index_folder(folder, bad_shards=1, update=True, progress=False)
    assert (done.reused, again.reused, hashes(folder)) == (0, 0, made)


def test_labels_come_and_go_with_an_update(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", PIXEL), ("a.txt", b"a")])
    assert build_index(tmp_path, progress=False).labels is None
    write_tar(tmp_path / "b.tar", [("b.png", PIXEL), ("b.cls", b"7")])
    index = index_folder(tmp_path, update=True, progress=False).index
    assert index.labels is not None and index.labels.tolist() == [-1, 7]
    (tmp_path / "b.tar").unlink()
    assert index_folder(tmp_path, update=True, progress=False).index.labels is None
    assert not (tmp_path / "index-labels.npy").exists()


@pytest.mark.parametrize("update", [False, True])
def test_one_key_in_two_shards_is_found_however_many_lie_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: bool
) -> None:
    for number in range(20):
        keys = [f"{number:02d}-{row}" for row in range(number % 3 + 1)]
        write_tar(
            tmp_path / f"{number:02d}.tar", [(f"{k}.{e}", d) for k in keys for e, d in (("png", PIXEL), ("txt", b"x"))]
        )
    index = build_index(tmp_path, progress=False)
    assert [index.key(sample) for sample in range(3)] == ["00-0", "01-0", "01-1"]
    write_tar(tmp_path / "99.tar", [("01-1.png", PIXEL), ("01-1.txt", b"x")])
    with pytest.raises(ValueError, match=r"^99.tar: sample '01-1' is also in 01.tar; keys must differ, rename one$"):
        index_folder(tmp_path, update=update, progress=False)
    # Hashes that collide are no duplicates, and hide none.
    monkeypatch.setattr(gather, "hash_keys", lambda shard: np.zeros(len(shard.rows), "<u8"))
    with pytest.raises(ValueError, match=r"^99.tar: sample '01-1' is also in 01.tar"):
        index_folder(tmp_path, update=update, progress=False)
    (tmp_path / "99.tar").unlink()
    assert index_folder(tmp_path, update=update, progress=False).index.num_samples == index.num_samples


def test_json_grows_with_shards_and_bad_samples_alone(tmp_path: Path) -> None:
    def size(samples: int) -> int:
        pairs = (("png", PIXEL), ("txt", b"x"))
        write_tar(tmp_path / "a.tar", [(f"{n:05d}.{e}", d) for n in range(samples) for e, d in pairs])
        build_index(tmp_path, progress=False)
        return (tmp_path / "index.json").stat().st_size

    assert abs(size(200) - size(2)) < 8


# --- jobs in processes ----------------------------------------------------------------------------------------------


def double(job: int, advance: Advance) -> int:
    advance(job)
    if job == 50:
        raise ValueError("fifty is too many")
    if job == 60:
        os.kill(os.getpid(), 9)
    return 2 * job


@pytest.mark.parametrize("workers", [1, 3])
def test_jobs_come_in_order_and_their_errors_too(workers: int) -> None:
    def run(jobs: range) -> list[int]:
        return list(run_jobs(double, jobs, workers=workers, total_bytes=0, title="doubling", progress=False))

    assert run(range(40)) == list(range(0, 80, 2))
    with pytest.raises(ValueError, match="fifty is too many"):
        run(range(45, 55))
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        list(run_jobs(double, [1], workers=0, total_bytes=0, title="doubling"))


def test_a_killed_process_is_an_error_not_a_wait() -> None:
    with pytest.raises(ValueError, match=r"doubling: a worker process was killed .*--workers"):
        list(run_jobs(double, range(55, 65), workers=2, total_bytes=0, title="doubling", progress=False))


# --- index files of other tools -------------------------------------------------------------------------------------


def write_energon(shard: Path) -> Path:
    """As Energon's preparation does it: where each sample's first member begins, and where the reader stops."""
    offsets, last = [], None
    with tarfile.open(shard) as tar:
        for member in tar:
            key = member.name.split(".")[0]
            offsets += [member.offset] if key != last else []
            last = key
        offsets.append(tar.offset)
    path = shard.with_suffix(".tar.idx")
    path.write_bytes(struct.pack(f"<{len(offsets)}Q", *offsets))
    return path


def write_webshart(shard: Path, *, as_list: bool = False) -> Path:
    with tarfile.open(shard) as tar:
        entries = {member.name: {"offset": member.offset_data, "length": member.size} for member in tar}
    listed = [{"path": name, **entry} for name, entry in entries.items()] if as_list else entries
    sha256 = hashlib.sha256(shard.read_bytes()).hexdigest()
    path = shard.with_suffix(".json")
    path.write_text(json.dumps({"filesize": shard.stat().st_size, "hash_lfs": sha256, "files": listed}))
    return path


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("update", [False, True])
def test_indexes_of_other_tools_agree(tmp_path: Path, tar_format: int, update: bool) -> None:
    stem = "long/" + "x" * 80 + "/" + "y" * 60
    for number in range(3):
        names = [(f"{stem}{number}{row}.{e}", d) for row in range(3) for e, d in (("png", PIXEL), ("txt", b"x"))]
        write_tar(tmp_path / f"{number}.tar", [*names, (f"{number}.png", PIXEL), (f"{number}.cls", b"1")], tar_format)
    build_index(tmp_path, progress=False)
    before = hashes(tmp_path)
    for number in range(2):
        write_energon(tmp_path / f"{number}.tar")
        write_webshart(tmp_path / f"{number + 1}.tar", as_list=number == 1)
    (tmp_path / "0.json").write_text('{"made by": "hand"}')
    done = index_folder(tmp_path, update=update, progress=False)
    assert done.foreign == {"energon": 2, "webshart": 2}
    assert hashes(tmp_path) == before


def shifted(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(struct.pack("<Q", 4 * 1024), struct.pack("<Q", 4 * 1024 + 512)))


def json_edit(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return change


WRONG: list[tuple[Callable[[Path], Path], Callable[[Path], object], str]] = [
    (write_energon, shifted, r"a.tar.idx has 4608 for the start of member '2.png', which is at 4096"),
    (write_energon, lambda path: path.write_bytes(path.read_bytes()[:-8]), r"a.tar.idx lists 3 samples, expected 4"),
    (write_energon, lambda path: path.write_bytes(path.read_bytes()[:-3]), r"a.tar.idx has 37 bytes, no multiple of 8"),
    (write_energon, lambda path: path.write_bytes(b""), r"a.tar.idx lists -1 samples, expected 4"),
    (
        write_energon,
        lambda path: path.write_bytes(path.read_bytes()[:-8] + struct.pack("<Q", 9000)),
        r"a.tar.idx ends at 9000, the last member '3.txt' at 8192",
    ),
    (
        write_webshart,
        json_edit(lambda content: content["files"]["1.txt"].update(offset=7)),
        r"a.json has \(offset, length\) \(7, 1\) for member '1.txt', which lies at \(3584, 1\)",
    ),
    (
        write_webshart,
        json_edit(lambda content: content["files"].pop("1.txt")),
        r"a.json does not list member '1.txt', which lies at \(3584, 1\)",
    ),
    (
        write_webshart,
        json_edit(lambda content: content["files"].update({"9.png": {"offset": 1, "length": 1}})),
        r"a.json lists member '9.png', which is not in the shard",
    ),
    (
        write_webshart,
        json_edit(lambda content: content.update(filesize=5)),
        r"a.json says the shard has 5 bytes, but it has 10240",
    ),
    (
        write_webshart,
        json_edit(lambda content: content.update(hash_lfs="00")),
        r"a.json has hash_lfs '00', but the shard's SHA-256 is [0-9a-f]{64}",
    ),
    (
        write_webshart,
        json_edit(lambda content: content["files"].update({"1.txt": 3})),
        r"a.json holds 3 where a member's offset and length belong",
    ),
]


@pytest.mark.parametrize(("write", "change", "message"), WRONG, ids=[str(n) for n in range(len(WRONG))])
def test_an_index_that_disagrees_names_shard_and_member(
    tmp_path: Path, write: Callable[[Path], Path], change: Callable[[Path], object], message: str
) -> None:
    pairs = (("png", PIXEL), ("txt", b"x"))
    write_tar(tmp_path / "a.tar", [(f"{n}.{e}", d) for n in range(4) for e, d in pairs])
    file = write(tmp_path / "a.tar")
    assert index_folder(tmp_path, progress=False).foreign == {("energon" if write is write_energon else "webshart"): 1}
    change(file)
    with pytest.raises(ValueError, match=f"^a.tar: {message}. The shard was changed since, .* remove {file.name}"):
        index_folder(tmp_path, bad_shards=5, progress=False)


def test_the_command_says_what_agrees_and_what_was_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_energon(folder / "s1.tar")
    assert main(["data", "index", str(folder)]) == 64
    assert "s9.tar: after sample" in capsys.readouterr().err
    assert main(["data", "index", str(folder), "--bad-shards", "1", "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "energon index agrees: 1 of 3 shards" in out and "unchanged" not in out
    assert main(["data", "index", str(folder), "--bad-shards", "1", "--update"]) == 0
    assert "unchanged: 3 of 3 shards" in capsys.readouterr().out
    assert load_index(folder).num_samples == 12


def oserror(number: int) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    monkeypatch.setattr(shards_module, "_index_shard", lambda *job, **settings: pytest.fail("read"))
    monkeypatch.setattr(gather.tempfile, "TemporaryFile", oserror(number))
    assert main(["data", "index", str(folder), "--workers", "1"]) == 64
    told = capsys.readouterr().err
    assert told.startswith(f"error: {folder}: no index can be written beside the shards") and "Traceback" not in told
    assert f"mkdir LINKS && ln -s {folder}/* LINKS && dydit data index LINKS" in told


def test_the_advice_for_a_folder_that_cannot_be_written_works(folder: Path) -> None:
    write_energon(folder / "s1.tar")
    before = {path.name for path in folder.iterdir()}
    (folder / "it's").mkdir()
    links = folder / "it's" / "links"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gather.tempfile, "TemporaryFile", oserror(errno.EACCES))
        with pytest.raises(ValueError, match="no index can be written") as told:
            index_folder(folder, bad_shards=1, progress=False)
    advice = str(told.value).partition("links to them: ")[2].replace("LINKS", shlex.quote(str(links)))
    subprocess.run(advice.rpartition(" && ")[0], shell=True, check=True)
    done = index_folder(links, bad_shards=1, progress=False)
    assert done.foreign == {"energon": 1} and done.index.digest == DIGEST
    files = SampleFiles(load_index(links)).read(0)
    assert bytes(files.image) == PIXEL and bytes(files.caption or b"") == b"picture 0"
    assert {path.name for path in folder.iterdir()} == {*before, "it's"}


@pytest.mark.parametrize("at", ["TemporaryFile", "posix_fallocate", "save"])
def test_a_full_disk_is_told_and_leaves_the_old_index_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    build_index(folder, bad_shards=1, progress=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_tar(folder / "s5.tar", files(40))
    holder = {"TemporaryFile": gather.tempfile, "posix_fallocate": gather.os, "save": np}[at]
    monkeypatch.setattr(holder, at, oserror(errno.ENOSPC))
    with pytest.raises(ValueError, match=rf"^{folder}: the disk is full .* no index was written; free some space"):
        build_index(folder, bad_shards=1, progress=False)
    monkeypatch.undo()
    (folder / "s5.tar").unlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert load_index(folder).digest == DIGEST


def test_an_index_of_another_tool_that_cannot_be_read_counts_as_a_broken_shard(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "agreeing_indexes", oserror(errno.EACCES))
    with pytest.raises(ValueError, match=r"^s0\.tar: cannot be read .*Permission denied"):
        build_index(folder, progress=False)
