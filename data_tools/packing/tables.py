"""Tables that list pictures or hold them: csv, tsv, jsonl, and parquet and Arrow files by pyarrow (the extra
``tables``)."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.packing.config import PackConfig
from data_tools.packing.inputs import MAX_BYTES, Cell, UnfitError
from dydit_scale.data.video import MissingPackageError

TEXT_TABLES = ("csv", "tsv", "jsonl")
ARROW_TABLES = ("parquet", "arrow")
TABLE_EXTENSIONS = TEXT_TABLES + ARROW_TABLES

MEDIA_COLUMNS = (
    *("file_name", "image", "img", "video", "path", "file", "filename", "image_path", "video_path", "filepath"),
    *("png", "jpg", "webp", "mp4", "bytes"),
)
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt", "description", "title", "txt")
LABEL_COLUMNS = ("label", "labels", "class")

_BATCH = 64


class Columns(NamedTuple):
    """The columns of a table that are read."""

    media: str
    caption: str | None
    label: str | None


class Row(NamedTuple):
    """A row and its place."""

    number: int
    """In the table, from 0."""
    group: int
    """In a parquet file the row group, else 0."""
    place: int
    """In that group."""
    values: dict[str, Any]


def choose_columns(names: Sequence[str], config: PackConfig, where: str) -> Columns:
    """The columns that ``config`` names or, failing that, the first with a usual name; ValueError if there is none."""
    media = _choose(names, config.image_column, MEDIA_COLUMNS, where, "--image-column")
    if media is None:
        raise ValueError(
            f"{where}: no column with pictures or their paths among {', '.join(names)}; name it by --image-column"
        )
    return Columns(
        media,
        _choose(names, config.caption_column, CAPTION_COLUMNS, where, "--caption-column"),
        _choose(names, config.label_column, LABEL_COLUMNS, where, "--label-column"),
    )


def _choose(names: Sequence[str], asked: str | None, usual: Sequence[str], where: str, option: str) -> str | None:
    if asked is not None and asked not in names:
        raise ValueError(f"{where}: no column {asked!r} ({option}) among {', '.join(names)}")
    return asked or next((name for name in usual if name in names), None)


def column_names(path: Path) -> list[str]:
    """The columns of a table; of a jsonl, those of its first line."""
    if path.suffix[1:].lower() in ARROW_TABLES:
        return list(_arrow(path).schema.names)
    first = next(_text_rows(path), None)
    if first is None:
        raise ValueError(f"{path}: holds no rows")
    return list(first)


def class_names(path: Path, column: str | None) -> list[str] | None:
    """The names of the classes in a column that HF ``datasets`` wrote, if the file has them."""
    if column is None or path.suffix[1:].lower() not in ARROW_TABLES:
        return None
    written = (_arrow(path).schema.metadata or {}).get(b"huggingface")
    feature = json.loads(written)["info"]["features"].get(column, {}) if written else {}
    return feature.get("names") if isinstance(feature, dict) else None


def read_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows in order, with the values of ``columns`` alone."""
    wanted = list(dict.fromkeys(name for name in columns if name is not None))
    if path.suffix[1:].lower() not in ARROW_TABLES:
        for number, values in enumerate(_text_rows(path)):
            yield Row(number, 0, number, {name: values.get(name) for name in wanted})
        return
    table, number = _arrow(path), 0
    for group in range(table.groups):
        place = 0
        for batch in table.read(group, wanted).to_batches(max_chunksize=_BATCH):
            for values in batch.to_pylist():
                yield Row(number, group, place, values)
                number, place = number + 1, place + 1


def read_cell(path: str, cell: Cell) -> bytes:
    """The bytes of a picture inside a table; UnfitError if there are too many."""
    value = _column(path, cell.group, cell.column)[cell.row].as_py()
    data = value["bytes"] if isinstance(value, dict) else value
    if len(data) > MAX_BYTES:
        raise UnfitError("over a limit", f"{len(data)} bytes, more than {MAX_BYTES}")
    return bytes(data)


@lru_cache(maxsize=1)
def _column(path: str, group: int, column: str) -> Any:
    return _arrow(Path(path)).read(group, [column]).column(0)


class _Arrow(NamedTuple):
    """A parquet or Arrow file."""

    schema: Any
    groups: int
    read: Callable[[int, list[str]], Any]
    """A group's table with the columns asked for."""


def _arrow(path: Path) -> _Arrow:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackageError(
            f"{path}: needs pyarrow, which cannot be imported ({error}); run `pip install 'dydit_scale[tables]'`"
        ) from error

    def read_group(group: int, names: list[str]) -> Any:
        with _readable(path, pyarrow):
            return file.read_row_group(group, names)

    with _readable(path, pyarrow):
        if path.suffix.lower() == ".parquet":
            file = pyarrow.parquet.ParquetFile(path)
            return _Arrow(file.schema_arrow, file.num_row_groups, read_group)
        mapped = pyarrow.memory_map(str(path))
        # HF datasets writes the streaming format; feather files have the other.
        opened = pyarrow.ipc.open_file if mapped.read(6) == b"ARROW1" else pyarrow.ipc.open_stream
        mapped.seek(0)
        table = opened(mapped).read_all()
        return _Arrow(table.schema, 1, lambda group, names: table.select(names))


@contextmanager
def _readable(path: Path, pyarrow: Any) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]} ({error})") from error


def _text_rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix.lower() == ".jsonl":
        yield from _json_rows(path)
        return
    csv.field_size_limit(1 << 24)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"expected {len(reader.fieldnames or ())} fields")
                yield row
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{path}, line {reader.reader.line_num}: {error}") from error


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
                yield row
