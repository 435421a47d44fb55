"""What is refused before any expensive work."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from dydit_scale.train import preflight
from dydit_scale.train.__main__ import main
from dydit_scale.train.exits import Exit
from dydit_scale.train.preflight import disagreements
from tests.train.small_run import small_world

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_world(tmp_path_factory.mktemp("small"))


def test_disagreements_name_the_values_and_their_ranks() -> None:
    facts = [{"a": "1", "b": "x"}, {"a": "1", "b": "y"}, {"a": "1", "b": "x", "c": "z"}]
    assert disagreements(facts) == ["b: x on ranks 0, 2; y on rank 1", "c: None on ranks 0, 1; z on rank 2"]
    assert disagreements(facts[:1]) == []


def test_a_disk_too_small_for_the_checkpoints_is_told(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(0, 0, 1000)

    monkeypatch.setattr(preflight.shutil, "disk_usage", usage)
    assert main([str(recipe), f"run={tmp_path}"]) == Exit.BAD_CONFIG
    assert "0.00 GB free; free space, lower train.keep" in capsys.readouterr().err
    assert asked == [tmp_path] and not (tmp_path / "checkpoints").exists()


def test_a_folder_that_cannot_be_written_is_told(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(recipe), f"run={tmp_path / 'file'}"]) == Exit.BAD_CONFIG
    assert "cannot be written" in capsys.readouterr().err

    def refuse(descriptor: int) -> None:
        raise OSError("the disk is read-only")

    monkeypatch.setattr(preflight.os, "fsync", refuse)
    assert main([str(recipe), f"run={tmp_path / 'run'}"]) == Exit.BAD_CONFIG
    assert "cannot be written: the disk is read-only" in capsys.readouterr().err


def test_too_many_bad_samples_have_a_code_of_their_own(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_world(tmp_path)
    shard = sorted((tmp_path / "shards").glob("*.tar"))[0]
    data = bytearray(shard.read_bytes())
    for start in range(600, len(data) - 2048, 512):
        if data[start - 88 : start - 83] != b"ustar" and data[start + 257 : start + 262] != b"ustar":
            data[start + 9] ^= 1
    shard.write_bytes(data)
    assert main([str(tmp_path / "recipe.yaml"), "data.bad_samples=0"]) == Exit.BAD_DATA
    assert "more than the budget of 0" in capsys.readouterr().err


def test_a_stream_is_trained_on_and_resumed_with_a_word_about_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [str(small_world(tmp_path)), "data.mode=stream", "train.evaluate_every=0", "train.ema=null"]
    for index in (tmp_path / "shards").glob("index*"):
        index.unlink()
    assert main([*changes, "train.steps=1"]) == Exit.DONE
    told = capsys.readouterr().out
    assert "3 shards as a stream, their captions, classes and integrity not checked" in told and "exact" not in told
    assert main([*changes, "train.steps=2", "--resume"]) == Exit.DONE
    told = capsys.readouterr().out
    assert told.count("with the data shuffled anew: a resume of a stream is not exact") == 1
