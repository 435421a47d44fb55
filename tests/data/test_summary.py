"""dydit data summarize: the numbers are those of the data, and the page shows them and loads nothing."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dydit_scale.cli.main import main
from dydit_scale.data import summary as summary_module
from dydit_scale.data.index import load_index
from dydit_scale.data.loader import DataConfig
from dydit_scale.data.shards import write_shards
from dydit_scale.data.summary import Repeated, summarize_index, use_of
from dydit_scale.data.video import encode_mp4
from dydit_scale.workflows.summarize import summarize


def png(width: int, height: int, colour: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (colour % 256, 40, 200)).save(file, "PNG")
    return file.getvalue()


SIZES = [(8, 8), (16, 8), (8, 16), (64, 64), (128, 64)]


def samples() -> Iterator[dict[str, bytes | str]]:
    """Five sizes six times over, every sixth broken, the captions of the others of 0 to 5 words."""
    for number in range(30):
        width, height = SIZES[number % 5]
        sample: dict[str, bytes | str] = {"__key__": f"{number:03d}", "png": png(width, height, number)}
        if number % 6 == 5:
            sample |= {"png": b"broken", "txt": "x"}
        elif number % 6 == 4:
            sample |= {"cls": str(number % 3)}
        else:
            sample |= {"txt": " ".join(["<b>word</b>"] * (number % 6))}
        yield sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(samples(), tmp_path / "shards", samples_per_shard=8, progress=False)
    return tmp_path / "shards"


def test_numbers_are_those_of_the_data(folder: Path) -> None:
    summary = summarize_index(load_index(folder))
    captions = summary.captions
    assert (int(summary.good.sum()), len(summary.index.bad), summary.changed) == (25, 5, ())
    assert (captions.present, captions.read, captions.empty) == (20, 20, 5)
    assert sorted(captions.words.tolist()) == sorted([0, 1, 2, 3] * 5)
    assert sorted(captions.characters.tolist()) == sorted([0, 11, 23, 35] * 5)
    assert (captions.compared, captions.distinct) == (20, 4)
    assert set(captions.repeated) == {Repeated(" ".join(["<b>word</b>"] * words), 5) for words in range(4)}
    assert [(number, name) for _, number, name in summary.reasons] == [(5, "shard-000000.tar sample '005'")]
    assert summary.column("width").tolist() == [SIZES[n % 5][0] for n in range(30) if n % 6 != 5]
    assert summary.shard_bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))


def test_examples_are_drawn_once_each_and_always_the_same(folder: Path) -> None:
    first, again = (summarize_index(load_index(folder)).examples for _ in range(2))
    assert [example.name for example in first] == [example.name for example in again]
    assert len({example.name for example in first}) == len(first) == 24
    for example in first:
        number = int(example.name[-4:-1])
        assert example.size == SIZES[number % 5] and example.picture.shape == (*example.size[::-1], 3)
        assert (example.picture == (number, 40, 200)).all()
        assert example.caption == (None if number % 6 == 4 else " ".join(["<b>word</b>"] * (number % 6)))
        assert example.label == (number % 3 if number % 6 == 4 else None)


def test_only_so_many_captions_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = summary_module.ShardFiles.read

    def noting(self: summary_module.ShardFiles, shard: str, offset: int, buffer: memoryview) -> int:
        reads.append(shard)
        return read(self, shard, offset, buffer)

    monkeypatch.setattr(summary_module.ShardFiles, "read", noting)
    monkeypatch.setattr(summary_module, "CAPTIONS_READ", 7)
    monkeypatch.setattr(summary_module, "EXAMPLES", 2)
    monkeypatch.setattr(summary_module, "REPEATED", 1)
    captions = summarize_index(load_index(folder)).captions
    assert (captions.present, captions.read, captions.distinct) == (20, 7, 4)
    assert 7 + 1 + 2 <= len(reads) <= 7 + 1 + 4
    assert set(reads) == {shard.name for shard in load_index(folder).shards}


def test_what_changed_since_is_said(folder: Path) -> None:
    shard = folder / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"word</b> <b>word</b> <b>word", b"word</b> <b>word</b> <b>werd", 1))
    summary = summarize_index(load_index(folder))
    assert summary.captions.read == 19
    assert set(summary.changed) == {"shard-000000.tar sample '003': caption checksum (CRC32) differs from the index"}
    assert any(line.startswith("changed since indexed: ") for line in summarize(folder))
    assert "dydit data check" in (folder / "summary.html").read_text()


def test_what_a_recipe_makes_of_the_samples(folder: Path) -> None:
    summary = summarize_index(load_index(folder))
    (square,) = use_of(summary, "square", DataConfig(path="x", image_size=32)).buckets
    # 8 x 8, 16 x 8 and 8 x 16 are enlarged; a square keeps half of what is twice as wide.
    assert (square.bucket, square.samples, square.enlarged) == ((32, 32), 25, 15)
    assert square.kept == pytest.approx((2 * 1 + 3 * 0.5) / 5)
    config = DataConfig(path="x", image_size=64, buckets=True, bucket_step=16, max_aspect=2.0)
    use = use_of(summary, "buckets", config)
    assert sum(one.samples for one in use.buckets) == 25 and use.short == 0
    held = {(one.bucket.width, one.bucket.height): one for one in use.buckets if one.samples}
    assert {size: one.samples for size, one in held.items()} == {(48, 80): 5, (64, 64): 10, (80, 48): 10}
    assert held[64, 64].enlarged == 5 and held[64, 64].kept == 1
    assert held[80, 48].kept == pytest.approx((80 / 48) / 2)
    assert all(np.isnan(one.kept) for one in use.buckets if not one.samples)
    clips = use_of(summary, "clips", DataConfig(path="x", frames=2))
    assert clips.short == 25


def test_clips_show_their_first_frame_and_short_ones_are_counted(tmp_path: Path) -> None:
    def clip(length: int) -> bytes:
        frames = np.zeros((length, 16, 32, 3), np.uint8)
        frames[0] = 200
        return encode_mp4(frames, 8, lossless=True)

    some = [{"__key__": f"{length}", "mp4": clip(length), "txt": "a clip"} for length in (2, 5, 9)]
    write_shards(some, tmp_path / "clips", samples_per_shard=9, progress=False)
    summary = summarize_index(load_index(tmp_path / "clips"))
    assert summary.clips is not None and summary.clips.tolist() == [2, 5, 9]
    for example, length in zip(summary.examples, (2, 5, 9), strict=True):
        assert (example.frames, example.picture.shape) == (length, (16, 32, 3))
        assert (example.picture == 200).all()
    assert use_of(summary, "", DataConfig(path="x", frames=3, frame_stride=2)).short == 1
    lines = summarize(tmp_path / "clips", out=tmp_path / "page.html")
    assert "clips: 3, of 2 to 9 frames" in lines


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.targets += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_shows_the_numbers_and_loads_nothing(folder: Path, tmp_path: Path) -> None:
    lines = summarize(folder, out=tmp_path / "new" / "page.html", image_size=64, buckets=True)
    page = (tmp_path / "new" / "page.html").read_text()
    parser = _Links()
    parser.feed(page)
    assert parser.open.count("img") == 24 and "script" not in parser.open
    assert all(target.startswith(("#", "data:image/")) for target in parser.targets)
    assert "<b>word" not in page and "&lt;b&gt;word&lt;/b&gt;" in page
    sections = re.findall(r'<section id="(\w+)"', page)
    assert sections == ["examples", "pictures", "captions", "labels", "buckets", "unusable"]
    for size in {(8, 8), (16, 8), (8, 16), (64, 64), (128, 64)}:
        assert f"<title>{size[0]} × {size[1]}: 5</title>" in page
    assert "25 of 25 good samples are used" in page
    assert lines[0].startswith("30 samples in 4 shards")
    assert any(line.startswith("unusable: 5 × broken image") for line in lines)


def test_a_data_set_of_bad_samples_has_a_page_too(tmp_path: Path) -> None:
    broken = [{"__key__": f"{number}", "png": b"broken", "txt": "x"} for number in range(3)]
    write_shards(broken, tmp_path / "shards", samples_per_shard=9, progress=False)
    assert any(line.startswith("unusable: 3 ×") for line in summarize(tmp_path / "shards", image_size=8))


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "shapes" / "demo.yaml"
    assert main(["data", "summarize", str(folder), "--recipes", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert f"{recipe}: 25 of 25 good samples are used" in out and f"page: {folder / 'summary.html'}" in out
    assert main(["data", "summarize", str(folder), "--buckets"]) == 64
    assert "add --image-size" in capsys.readouterr().err
    assert main(["data", "summarize", str(folder), "--recipes", str(folder / "none.yaml")]) == 64
    assert load_index(folder).num_samples == 30
