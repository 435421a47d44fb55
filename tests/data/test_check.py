"""dydit data check: all that differs from the index is found and named."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_tools.check import Checked, check_shards
from dydit_scale.cli.main import main
from dydit_scale.data.index import load_index
from dydit_scale.data.shards import build_index, write_shards

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000002000000030802000000368849d600000014494441547"
    "89c636465636760606062606040500001a800187780d7f10000000049454e44ae426082"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four shards of three samples."""
    samples = ({"__key__": f"{number:04d}", "png": PIXEL, "txt": f"picture {number:04d}"} for number in range(12))
    write_shards(samples, tmp_path / "shards", samples_per_shard=3, progress=False)
    return tmp_path / "shards"


def check(folder: Path, *, quick: bool = False, workers: int = 1) -> Checked:
    return check_shards(folder, quick=quick, workers=workers, progress=False)


def edit(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) >= 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("quick", [False, True])
def test_what_was_indexed_passes(folder: Path, quick: bool, workers: int) -> None:
    found = check(folder, quick=quick, workers=workers)
    assert found.findings == ()
    assert found.shards == load_index(folder).shards and len(found.shards) == 4


@pytest.mark.parametrize("workers", [1, 3])
def test_everything_that_differs_is_named(folder: Path, workers: int) -> None:
    shard = [folder / f"shard-{number:06d}.tar" for number in range(4)]
    edit(shard[0], b"picture 0001", b"pictuse 0001")
    shard[1].unlink()
    edit(shard[2], b"0008.txt", b"0009.txt")
    shard[3].write_bytes(shard[3].read_bytes()[:2000])
    (folder / "more.tar").write_bytes(b"")
    told: list[str] = []
    found = check_shards(folder, workers=workers, progress=False, tell=told.append)
    assert (
        list(found.findings)
        == told
        == [
            "shard-000001.tar is missing",
            "shard-000003.tar has 2000 bytes, expected 10240",
            "more.tar is not in the index",
            "shard-000000.tar: its SHA-256 is not the one indexed; 1 of 3 samples are hit",
            "shard-000000.tar sample '0001': caption changed since indexed (CRC32)",
            "shard-000002.tar: its SHA-256 is not the one indexed, but its 3 samples are whole: headers, labels or "
            "other members changed",
            "shard-000003.tar: its SHA-256 is not the one indexed; 2 of 3 samples are hit",
            "shard-000003.tar sample '0010': picture and caption changed since indexed (CRC32)",
            "shard-000003.tar sample '0011': picture and caption changed since indexed (CRC32)",
        ]
    )
    assert list(check(folder, quick=True).findings) == told[:3]


def test_a_replaced_shard_takes_one_line(folder: Path) -> None:
    size = (folder / "shard-000001.tar").stat().st_size
    (folder / "shard-000001.tar").write_bytes(b"\1" * size)
    assert check(folder, quick=True).findings == ()
    (line,) = check(folder).findings
    assert line.startswith("shard-000001.tar: its SHA-256 is not the one indexed, nor is any of its 3 samples")


@pytest.mark.parametrize("name", ["index-keys.npy", "index-samples.npy"])
def test_a_torn_index_hides_nothing_of_the_shards(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    edit(folder / "shard-000000.tar", b"picture 0001", b"pictuse 0001")
    (folder / "shard-000003.tar").unlink()
    torn, missing, changed = check(folder).findings
    assert f"torn or foreign ({name} does not belong to index.json)" in torn and "dydit data index" in torn
    assert missing == "shard-000003.tar is missing"
    assert changed.startswith("shard-000000.tar: its SHA-256 is not the one indexed; which samples are hit cannot")


def test_folders_without_an_index_say_what_to_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such folder of shards"):
        check(tmp_path / "none")
    (folder / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index.json itself cannot be read .*`dydit data index"):
        check(folder)
    (folder / "index.json").unlink()
    with pytest.raises(ValueError, match=r"4 shards, but no index.json to compare with; run `dydit data index"):
        check(folder)


def test_shards_that_were_left_out_are_no_finding(folder: Path) -> None:
    (folder / "cut.tar").write_bytes((folder / "shard-000000.tar").read_bytes()[:2000])
    build_index(folder, bad_shards=1, progress=False)
    assert check(folder).findings == ()


def test_the_command_prints_each_finding_and_exits_with_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(folder)]) == 0
    assert "4 shards, 12 samples as indexed (by SHA-256)" in capsys.readouterr().out
    edit(folder / "shard-000002.tar", b"picture 0007", b"picture 1007")
    assert main(["data", "check", str(folder), "--quick"]) == 0
    capsys.readouterr()
    assert main(["data", "check", str(folder), "--workers", "1"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "shard-000002.tar sample '0007': caption changed since indexed (CRC32)"
    assert out[2].endswith("2 findings in 4 shards")
