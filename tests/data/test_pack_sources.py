"""Where inputs, captions and labels come from: folders, metadata, tables, saved data sets; and what is refused."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from data_tools.pack import REPORT_FILE, PackSummary, Part, pack
from data_tools.packing import sources
from data_tools.packing.config import PackConfig
from dydit_scale.cli.main import main
from dydit_scale.data.shards import load_index
from dydit_scale.data.video import encode_mp4


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(number).randint(0, 256, (4, 5, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def put(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def packed(source: Path, out: Path, **options: Any) -> tuple[PackSummary, dict[str, dict[str, Any]]]:
    """The summary, and the samples by the names of their inputs."""
    summary = pack(source, out, PackConfig(**options))
    found = webdataset.WebDataset(sorted(map(str, out.glob("*.tar"))), shardshuffle=False, empty_check=False)
    samples = {}
    for sample in found:
        fields = json.loads(sample["json"])
        texts = [sample["txt"].decode()] if "txt" in sample else fields.get("captions", [])
        samples[fields["source"]] = {"captions": texts, "label": sample.get("cls"), "png": sample.get("png")}
    return summary, samples


def reasons(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / REPORT_FILE).read_text(encoding="utf-8").splitlines()]
    assert len({line["input"] for line in lines}) == len(lines)
    return {line["input"]: f"{line['reason']}: {line['detail']}" for line in lines}


# Folders


def test_captions_beside_pictures(tmp_path: Path) -> None:
    source = put(tmp_path / "in", {f"{name}.png": png(number) for number, name in enumerate("abcdefg")})
    put(
        source,
        {
            "a.txt": "\ufeff  one line\n",
            "b.caption": "by another name",
            "c.json": '{"caption": "from json", "label": 7, "width": 5}',
            "d.json": '{"captions": ["first", "second", " first "]}',
            "e.txt": "of the text",
            "e.json": '{"caption": "of the json"}',
            "f.json": '{"label": 3}',
            "sub/h.PNG": png(8),
            "sub/h.TXT": "capitals",
            "alone.txt": "no picture",
        },
    )
    summary, samples = packed(source, tmp_path / "out")
    assert {name: sample["captions"] for name, sample in samples.items()} == {
        "a.png": ["one line"],
        "b.png": ["by another name"],
        "c.png": ["from json"],
        "d.png": ["first", "second"],
        "e.png": ["of the json", "of the text"],
        "f.png": [],
        "sub/h.PNG": ["capitals"],
    }
    assert [samples[name]["label"] for name in ("c.png", "f.png", "a.png")] == [b"7", b"3", None]
    assert reasons(tmp_path / "out") == {"g.png": "no caption: neither a caption nor a label"}
    assert summary.ignored == {"texts without a picture": 1}


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.txt", b"\xff\xfe", "bad caption: a.txt: 'utf-8' codec"),
        ("a.txt", b" \n", "no caption: "),
        ("a.txt", b"zero\0byte", "bad caption: broken caption (zero bytes)"),
        ("a.json", b'{"caption": "zero\\u0000byte"}', "bad caption: broken caption (zero bytes)"),
        ("a.txt", b"x" * (1 << 20) + b"x", "over a limit: "),
        ("a.json", b"[" * 100_000, "bad caption: a.json: maximum recursion depth|bad caption: a.json: Expecting"),
        ("a.json", b'["a"]', "bad caption: a.json: expected an object, got list"),
        ("a.json", b'{"caption": 5}', "bad caption: '5' (int), expected a text"),
        ("a.json", b'{"captions": [["a"]]}', "bad caption: "),
        ("a.json", b'{"caption": "\\ud800"}', "bad caption: 'utf-8' codec"),
        ("a.json", b'{"caption": "a", "label": -1}', "bad label: -1, expected a class number"),
        ("a.json", b'{"caption": "a", "label": true}', "bad label: True"),
        ("a.json", b'{"caption": null}', "no caption: "),
    ],
)
def test_broken_texts_are_reported(tmp_path: Path, name: str, text: bytes, reason: str) -> None:
    source = put(tmp_path / "in", {"a.png": png(0), name: text, "good.png": png(1), "good.txt": "good"})
    _, samples = packed(source, tmp_path / "out")
    assert list(samples) == ["good.png"]
    assert any(reasons(tmp_path / "out")["a.png"].startswith(start) for start in reason.split("|"))


def test_captions_that_are_too_long_together_are_reported(tmp_path: Path) -> None:
    long = "x" * 600_000
    source = put(tmp_path / "in", {"a.png": png(0), "a.txt": long, "a.json": json.dumps({"caption": f"{long}y"})})
    _, samples = packed(put(source, {"b.png": png(1), "b.txt": long}), tmp_path / "out")
    assert list(samples) == ["b.png"]
    assert reasons(tmp_path / "out")["a.png"].startswith("over a limit: 2 captions in a json of 12000")
    assert load_index(tmp_path / "out").bad == {}


def test_captions_are_filtered_one_by_one(tmp_path: Path) -> None:
    texts = ["ab", "abc", "abcdef", "abcdefg"]
    source = put(tmp_path / "in", {f"{n}.png": png(n) for n in range(3)})
    put(source, {"0.json": json.dumps({"captions": texts}), "1.txt": "ab", "2.txt": "abcd"})
    summary, samples = packed(source, tmp_path / "out", min_caption=3, max_caption=6)
    assert samples["0.png"]["captions"] == ["abc", "abcdef"]
    assert (summary.packed, summary.dropped, summary.left_out) == (2, {"caption length": 1}, 2)
    lines = [json.loads(line) for line in (tmp_path / "out" / REPORT_FILE).read_text().splitlines()]
    assert [line["detail"] for line in lines] == [
        "caption of 2 characters, fewer than 3",
        "caption of 2 characters, fewer than 3",
        "caption of 7 characters, more than 6",
    ]


def test_captions_from_names(tmp_path: Path) -> None:
    source = put(tmp_path / "in", {"x/black_cat--on a-mat.v2.png": png(0), "x/black_cat--on a-mat.v2.txt": "unused"})
    _, samples = packed(source, tmp_path / "out", caption_from="name")
    assert [sample["captions"] for sample in samples.values()] == [["black cat on a mat.v2"]]


def test_labels_from_folders(tmp_path: Path) -> None:
    files = {
        "dog/a.png": png(0),
        "cat/deep/b.png": png(1),
        "cat/c.png": png(2),
        "cat/c.txt": "a cat",
        "root.png": png(3),
    }
    summary, samples = packed(put(tmp_path / "in", files), tmp_path / "out", labels_from="folder")
    assert {name: sample["label"] for name, sample in samples.items()} == {
        "cat/c.png": b"0",
        "cat/deep/b.png": b"0",
        "dog/a.png": b"1",
    }
    assert samples["cat/c.png"]["captions"] == ["a cat"]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog"]
    assert reasons(tmp_path / "out")["root.png"].startswith("no class: ")
    index = load_index(tmp_path / "out")
    assert index.labels is not None and index.labels.tolist() == [0, 0, 1]
    assert summary.total == 4


def test_links_devices_and_hidden_files(tmp_path: Path) -> None:
    put(tmp_path / "outside", {"secret.png": png(1), "secret.txt": "secret"})
    source = put(
        tmp_path / "in", {"real/a.png": png(0), "real/a.txt": "real", "real/.b.png": png(2), ".git/c.png": png(3)}
    )
    (source / "inside.png").symlink_to(source / "real" / "a.png")
    (source / "inside.txt").symlink_to("real/a.txt")
    (source / "out.png").symlink_to(tmp_path / "outside" / "secret.png")
    (source / "up.png").symlink_to("../outside/secret.png")
    (source / "gone.png").symlink_to("nowhere.png")
    (source / "loop.png").symlink_to("loop.png")
    (source / "folder").symlink_to(tmp_path / "outside")
    (source / "circle").symlink_to(source)
    os.mkfifo(source / "pipe.png")
    put(source, {"text.png": png(4)})
    (source / "text.txt").symlink_to(tmp_path / "outside" / "secret.txt")
    summary, samples = packed(source, tmp_path / "out", keep_duplicates=True)
    assert {name: sample["captions"] for name, sample in samples.items()} == {
        "inside.png": ["real"],
        "real/a.png": ["real"],
    }
    found = {name: reason.partition(":")[0] for name, reason in reasons(tmp_path / "out").items()}
    assert found == {
        "circle": "link to a folder",
        "folder": "link to a folder",
        "gone.png": "unreadable",
        "loop.png": "unreadable",
        "out.png": "outside the source",
        "pipe.png": "no regular file",
        "text.png": "no caption",
        "text.txt": "outside the source",
        "up.png": "outside the source",
    }
    assert summary.ignored == {"hidden": 2}


def test_odd_names(tmp_path: Path) -> None:
    source = put(tmp_path / "in", {"new\nline.png": png(0), "per%d cent.png": png(1), "..dots...png": png(2)})
    (source / os.fsdecode(b"caf\xe9.png")).write_bytes(png(3))
    summary, samples = packed(source, tmp_path / "out", caption_from="name")
    assert sorted(samples) == ["new\nline.png", "per%d cent.png"]
    assert reasons(tmp_path / "out") == {"caf\\xe9.png": "bad name: its name is no UTF-8; rename it"}
    assert summary.ignored == {"hidden": 1}
    assert load_index(tmp_path / "out").bad == {}


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = put(tmp_path / "in", {"a.png": png(0), "deep/b.png": png(1)})
    original = os.scandir

    def scandir(folder: str) -> Any:
        if str(folder).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return original(folder)

    monkeypatch.setattr(sources.os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"deep: cannot be listed \(Permission denied\)"):
        pack(source, tmp_path / "out")


# Metadata files


def test_metadata_files_tell_of_the_pictures_below_them(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a.png", "text": "first"},
        {"file_name": "./a.png", "text": "second"},
        {"file_name": "deep/b.png", "text": "below"},
        {"file_name": "../c.png", "text": "above"},
        {"file_name": "gone.png", "text": "gone"},
        {"file_name": "/etc/passwd", "text": "absolute"},
    ]
    source = put(tmp_path / "in", {"x/a.png": png(0), "x/deep/b.png": png(1), "c.png": png(2), "d.png": png(3)})
    put(source, {"x/metadata.jsonl": "\ufeff" + "\n".join(map(json.dumps, rows)) + "\n\n", "x/a.txt": "beside"})
    put(source, {"d.txt": "beside", "x/other.jsonl": "{}"})
    summary, samples = packed(source, tmp_path / "out")
    assert {name: sample["captions"] for name, sample in samples.items()} == {
        "c.png": ["above"],
        "d.png": ["beside"],
        "x/a.png": ["first", "second"],
        "x/deep/b.png": ["below"],
    }
    assert {name: text.partition(":")[0] for name, text in reasons(tmp_path / "out").items()} == {
        "x/gone.png": "unreadable",
        "/etc/passwd": "unreadable",
    }
    assert summary.notes == ["x/metadata.jsonl: pictures or clips from column 'file_name', captions from 'text'"]
    assert summary.ignored == {".jsonl": 1}


def test_metadata_csv_with_labels(tmp_path: Path) -> None:
    table = 'file_name,prompt,label\na.png,"one, two",4\nb.png,,5\nb.png,three,\nc.png,four,x\n'
    source = put(tmp_path / "in", {f"{n}.png": png(i) for i, n in enumerate("abc")} | {"metadata.csv": table})
    with pytest.raises(ValueError, match=r"labels are numbers \(a.png: 4\) and names \('x'\)"):
        pack(source, tmp_path / "out")
    put(source, {"metadata.csv": table.replace("four,x", "four,6") + "c.png,five,7\n"})
    _, samples = packed(source, tmp_path / "out")
    assert {name: (sample["captions"], sample["label"]) for name, sample in samples.items()} == {
        "a.png": (["one, two"], b"4"),
        "b.png": (["three"], b"5"),
        "c.png": (["four"], b"6"),
    }
    assert reasons(tmp_path / "out") == {"metadata.csv#4": "bad label: another row gives c.png the label 6, this one 7"}


def test_metadata_parquet_tells_of_the_pictures(tmp_path: Path) -> None:
    source = put(tmp_path / "in", {"x/a.png": png(0), "b.png": png(1), "b.txt": "beside"})
    table = pyarrow.table({"file_name": ["a.png"], "text": ["from the table"]})
    pyarrow.parquet.write_table(table, source / "x" / "metadata.parquet")
    summary, samples = packed(source, tmp_path / "out")
    assert {name: sample["captions"] for name, sample in samples.items()} == {
        "b.png": ["beside"],
        "x/a.png": ["from the table"],
    }
    assert not summary.ignored
    # Without pictures beside it, it holds them itself.
    (tmp_path / "table").mkdir()
    pyarrow.parquet.write_table(hf_table(range(3)), tmp_path / "table" / "metadata.parquet")
    assert packed(tmp_path / "table", tmp_path / "other")[0].packed == 3


def test_where_nothing_is_packed_a_table_beside_the_pictures_is_named(tmp_path: Path) -> None:
    source = put(tmp_path / "in", {"a.png": png(0), "b.png": png(1), "captions.csv": "image,caption\na.png,one\n"})
    with pytest.raises(ValueError, match=r"no caption 2.* not read \(captions.csv\); .*`dydit data pack ") as caught:
        pack(source, tmp_path / "out")
    asked = str(caught.value).split("`")[1].split()
    assert main(asked[1:]) == 0, "in the same folder, which holds no shards yet"
    assert load_index(tmp_path / "out").num_samples == 1


# Tables


HEAD = ("image_path", "caption", "label")


def rows() -> Iterator[tuple[str, str, str]]:
    return zip(("b.png", "a.png", "c.png"), ("bee", "ant", "cow"), ("y", "x", "y"), strict=True)


def write_table(path: Path) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(HEAD, row, strict=True))) + "\n" for row in rows()))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([HEAD, *rows()])
    else:
        names, captions, labels = map(list, zip(*rows(), strict=True))
        table = pyarrow.table({"image_path": names, "caption": captions, "label": labels})
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=2)
        else:
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "arrow"])
def test_tables_of_paths(tmp_path: Path, kind: str) -> None:
    put(tmp_path / "in", {"a.png": png(0), "b.png": png(1), "c.png": png(2)})
    summary, samples = packed(write_table(tmp_path / "in" / f"rows.{kind}"), tmp_path / "out")
    assert list(samples.items()) == [
        ("b.png", {"captions": ["bee"], "label": b"1", "png": png(1)}),
        ("a.png", {"captions": ["ant"], "label": b"0", "png": png(0)}),
        ("c.png", {"captions": ["cow"], "label": b"1", "png": png(2)}),
    ]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["x", "y"]
    assert summary.notes == [
        f"rows.{kind}: pictures or clips from column 'image_path', captions from 'caption', labels from 'label'"
    ]


def test_paths_of_a_table_start_at_the_root_and_stay_there(tmp_path: Path) -> None:
    put(tmp_path / "pictures", {"a.png": png(0), "sub/b.png": png(1)})
    put(tmp_path / "elsewhere", {"c.png": png(2)})
    named = [
        "a.png",
        str(tmp_path / "pictures" / "sub" / "b.png"),
        "../elsewhere/c.png",
        "https://x.y/d.png",
        "a.txt",
        "",
    ]
    (tmp_path / "pictures" / "a.txt").write_text("text")
    put(
        tmp_path, {"tables/rows.csv": "image,caption\n" + "".join(f"{name},text {n}\n" for n, name in enumerate(named))}
    )
    _, samples = packed(tmp_path / "tables" / "rows.csv", tmp_path / "out", root=str(tmp_path / "pictures"))
    assert {name: sample["captions"] for name, sample in samples.items()} == {
        "a.png": ["text 0"],
        "sub/b.png": ["text 1"],
    }
    assert {name: text.partition(":")[0] for name, text in reasons(tmp_path / "out").items()} == {
        "rows.csv#2": "outside the source",
        "rows.csv#3": "no picture",
        "rows.csv#4": "no picture",
        "rows.csv#5": "no picture",
    }


def test_columns_are_named_or_guessed(tmp_path: Path) -> None:
    source = put(tmp_path / "in", {"a.png": png(0), "rows.csv": "wo,was,text\na.png,this,that\n"}) / "rows.csv"
    with pytest.raises(
        ValueError, match="no column with pictures or their paths among wo, was, text; name it by --image"
    ):
        pack(source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"no column 'what' \(--caption-column\) among wo, was, text"):
        pack(source, tmp_path / "out", PackConfig(image_column="wo", caption_column="what"))
    assert packed(source, tmp_path / "a", image_column="wo")[1]["a.png"]["captions"] == ["that"]
    assert packed(source, tmp_path / "b", image_column="wo", caption_column="was")[1]["a.png"]["captions"] == ["this"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "image,caption\na.png,x,y\n", "a.csv, line 2: expected 2 fields"),
        ("a.csv", "image,caption\na.png\n", "a.csv, line 2: expected 2 fields"),
        ("a.csv", 'image,caption\na.png,"x\n', "a.csv, line 2: unexpected end of data"),
        ("a.csv", "", "a.csv: holds no rows"),
        ("a.jsonl", '{"image": "a.png"}\n{"image": \n', "a.jsonl, line 2: Expecting value"),
        ("a.jsonl", '{"image": "a.png"}\n[1]\n', "a.jsonl, line 2: expected an object, got list"),
        ("torn.parquet", "", "torn.parquet: cannot be read as parquet"),
        ("a.parquet", "PAR1", "a.parquet: cannot be read as parquet"),
        ("a.arrow", "ARROW?", "a.arrow: cannot be read as arrow"),
        ("a.xlsx", "", r"a.xlsx: expected a folder or a table \(csv, tsv, jsonl, parquet, arrow\)"),
    ],
)
def test_broken_tables_are_errors_with_a_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    source = put(tmp_path / "in", {"a.png": png(0), name: text})
    if name == "torn.parquet":  # whole at its end, where its head is, but not in the middle
        whole = write_table(source / name).read_bytes()
        (source / name).write_bytes(whole[:4] + bytes(80) + whole[84:])
    with pytest.raises(ValueError, match=message):
        pack(source / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Pictures inside tables

FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


def hf_table(numbers: range) -> pyarrow.Table:
    table = pyarrow.table(
        {
            "image": [{"bytes": png(n), "path": None} for n in numbers],
            "text": [[f"picture {n}", f"again {n}"] if n % 2 else [f"picture {n}"] for n in numbers],
            "label": [n % 2 for n in numbers],
        }
    )
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})


def test_parquet_with_pictures_inside(tmp_path: Path) -> None:
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for part, numbers in enumerate((range(5), range(5, 9))):
        pyarrow.parquet.write_table(hf_table(numbers), folder / f"train-{part:05d}-of-00002.parquet", row_group_size=2)
    summary, samples = packed(tmp_path / "set", tmp_path / "out", samples_per_shard=2)
    assert [sample["png"] for sample in samples.values()] == [png(n) for n in range(9)]
    assert list(samples)[5] == "train-00001-of-00002.parquet#0"
    assert samples["train-00001-of-00002.parquet#2"]["captions"] == ["picture 7", "again 7"]
    assert [sample["label"] for sample in samples.values()] == [str(n % 2).encode() for n in range(9)]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog"]
    with pytest.raises(ValueError, match="leave --shuffle out"):
        pack(tmp_path / "set", tmp_path / "mixed", PackConfig(shuffle=True))
    # Parts and processes read the same rows.
    for part in (Part(1, 2), Part(2, 2)):
        pack(tmp_path / "set", tmp_path / "parts", PackConfig(samples_per_shard=2), part=part, workers=2)
    for path in (tmp_path / "out").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()
    assert summary.packed == 9


def test_several_splits_are_not_mixed(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        pyarrow.parquet.write_table(hf_table(range(2)), tmp_path / f"{name}.parquet")
    with pytest.raises(
        ValueError, match=r"several tables \(test, train\) and no pictures; give one of them, or a pattern"
    ):
        pack(tmp_path, tmp_path.parent / "out")
    assert pack(tmp_path / "train-*.parquet", tmp_path.parent / "out").packed == 2


def test_rows_without_a_picture_and_repeats_are_reported(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "image": pyarrow.array([png(0), None, png(0), b"torn", b""], pyarrow.binary()),
            "caption": ["a", "b", "c", "d", "e"],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    summary, samples = packed(tmp_path / "rows.parquet", tmp_path / "out")
    assert list(samples) == ["rows.parquet#0"]
    assert reasons(tmp_path / "out")["rows.parquet#2"] == "duplicate: has the bytes of rows.parquet#0"
    assert summary.dropped == {"no picture": 1, "duplicate": 1, "broken picture": 2}
    assert summary.total == 5


@pytest.mark.parametrize("file_format", [False, True])
def test_data_sets_saved_on_disk(tmp_path: Path, file_format: bool) -> None:
    split = tmp_path / "set" / "train"
    split.mkdir(parents=True)
    names = [f"data-{n:05d}-of-00002.arrow" for n in range(2)]
    for name, numbers in zip(names, (range(3), range(3, 5)), strict=True):
        table = hf_table(numbers)
        write = pyarrow.ipc.new_file if file_format else pyarrow.ipc.new_stream
        with pyarrow.OSFile(str(split / name), "wb") as file, write(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (split / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (split / "dataset_info.json").write_text("{}")
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ValueError, match=r"several splits; give one of them: .*set/train"):
        pack(tmp_path / "set", tmp_path / "out")
    _, samples = packed(split, tmp_path / "out")
    assert [sample["png"] for sample in samples.values()] == [png(n) for n in range(5)]
    mixed, _ = packed(split, tmp_path / "mixed", shuffle=True)
    assert mixed.packed == 5


# Clips


def test_clips_beside_pictures(tmp_path: Path) -> None:
    frames = np.random.RandomState(0).randint(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    mp4 = encode_mp4(frames, 8)
    # A table's bytes have no extension; they are told by how they begin.
    table = pyarrow.table({"video": [mp4, png(0)], "caption": ["a clip", "a picture"]})
    put(tmp_path / "in", {"a.mp4": mp4, "a.txt": "a clip", "b.png": png(0), "b.txt": "a picture"})
    (tmp_path / "table").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "table" / "rows.parquet")
    for name in ("in", "table"):
        summary = pack(tmp_path / name, tmp_path / f"out-{name}")
        index = load_index(tmp_path / f"out-{name}")
        assert (index.bad, summary.packed) == ({}, 2)
        assert index.frames is not None and index.frames.tolist() == [5, 0]


def test_clips_without_pyav_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = put(tmp_path / "in", {"a.mp4": b"any", "a.txt": "a clip"})
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install 'dydit_scale\[video\]'"):
        pack(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tables_without_pyarrow_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = put(tmp_path / "in", {"rows.parquet": b"any"})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'dydit_scale\[tables\]'"):
        pack(source, tmp_path / "out")


# The recipe


def test_emoji_recipe(tmp_path: Path) -> None:
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "emoji" / "unpack.py"
    spec = importlib.util.spec_from_file_location("unpack", recipe)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    waving = {"image": "1f44b.png", "name": "WAVING HAND", "skin_variations": {"1F3FB-1F3FF": {"image": "1f44b-x.png"}}}
    flag = {"image": "1f1ea.png", "name": None, "short_name": "flag-eg"}
    files = {"emoji.json": json.dumps([waving, flag]).encode(), "img/google/64/1f44b.png": png(0)}
    files |= {"img/google/64/1f44b-x.png": png(1), "img/google/64/1f1ea.png": png(2), "img/google/sheets/64.png": b""}
    with tarfile.open(tmp_path / "set.tgz", "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert module.unpack(tmp_path / "set.tgz", tmp_path / "in") == 3
    _, samples = packed(tmp_path / "in", tmp_path / "out")
    assert {name: sample["captions"] for name, sample in samples.items()} == {
        "1f1ea.png": ["flag eg"],
        "1f44b-x.png": ["waving hand, light and dark skin tone"],
        "1f44b.png": ["waving hand"],
    }
