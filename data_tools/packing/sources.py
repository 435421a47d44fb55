"""Sources: a folder of pictures and clips, tables that list or hold them, or a saved HF data set, as a list of inputs.

Listing reads no picture and no text beside it; only tables are read whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from data_tools.packing.config import PackConfig
from data_tools.packing.inputs import (
    MEDIA_EXTENSIONS,
    TEXT_EXTENSIONS,
    UNREADABLE,
    Cell,
    Dropped,
    File,
    Input,
    UnfitError,
    check_captions,
    check_label,
    extension_of,
    find_file,
)
from data_tools.packing.tables import (
    TABLE_EXTENSIONS,
    Columns,
    Row,
    choose_columns,
    class_names,
    column_names,
    read_rows,
)

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

_PART_OF_SPLIT = re.compile(r"(.*)-\d+-of-\d+")


@dataclass(kw_only=True)
class Listing:
    """What a source holds."""

    inputs: list[Input] = field(default_factory=list)
    """By name; those of a table in its order."""
    dropped: list[Dropped] = field(default_factory=list)
    """Found unfit already."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Files that are no inputs, by extension."""
    tables: list[str] = field(default_factory=list)
    """Those of them that are tables, by their paths in the source."""
    classes: list[str] | None = None
    """Names of the labels, if they have any."""
    notes: list[str] = field(default_factory=list)
    """Guesses that the user should see."""

    def drop(self, name: str, error: UnfitError) -> None:
        self.dropped.append(Dropped(name, error.reason, error.detail))


def list_source(source: Path, config: PackConfig, *, progress: bool = True) -> Listing:
    """All inputs of ``source``: a folder, a table, a pattern of tables (``data/train-*.parquet``) or what HF
    ``datasets`` saved.

    Raises ValueError on a source that does not exist or holds none, a broken table, columns that cannot be told.
    """
    tables = _tables(source)
    listing = _list_tables(tables, config, progress) if tables else _list_folder(source, config, progress)
    if config.labels_from == "folder":
        _label_by_folder(listing)
    _number_labels(listing, source)
    if not listing.inputs and not listing.dropped:
        found = ", ".join(f"{count} {what}" for what, count in listing.ignored.most_common(8)) or "nothing"
        raise ValueError(f"{source}: no pictures or clips (found: {found}); expected {', '.join(MEDIA_EXTENSIONS)}")
    return listing


def _tables(source: Path) -> list[Path]:
    """The tables that ``source`` names; none for a folder of files."""
    if source.is_file():
        if extension_of(source.name) not in TABLE_EXTENSIONS:
            raise ValueError(f"{source}: expected a folder or a table ({', '.join(TABLE_EXTENSIONS)})")
        return [source]
    if not source.is_dir():
        tables = sorted(source.parent.glob(source.name)) if "*" in source.name else []
        if not tables or any(extension_of(table.name) not in TABLE_EXTENSIONS for table in tables):
            raise ValueError(f"{source}: no such folder or table")
        return tables
    if (source / "dataset_dict.json").is_file():
        splits = json.loads((source / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise ValueError(f"{source}: a saved data set of several splits; give one of them: {source}/{splits[0]}, ...")
    if (source / "state.json").is_file() and (source / "dataset_info.json").is_file():
        state = json.loads((source / "state.json").read_text(encoding="utf-8"))
        return [source / Path(entry["filename"]).name for entry in state["_data_files"]]
    return []


# Folders


def _list_folder(source: Path, config: PackConfig, progress: bool) -> Listing:
    root, listing = source.resolve(), Listing()
    media: dict[str, File] = {}
    texts: dict[str, list[tuple[str, File]]] = {}
    tables: list[str] = []
    for entry in tqdm(_walk(root, listing), desc="listing", unit="file", disable=None if progress else True):
        name = Path(entry.path).relative_to(root).as_posix()
        extension = extension_of(name)
        if extension in TABLE_EXTENSIONS:
            tables.append(name)
        elif extension in MEDIA_EXTENSIONS or extension in TEXT_EXTENSIONS:
            try:
                file = _check_entry(entry, name, root)
            except UnfitError as error:
                listing.drop(_printable(name), error)
                continue
            if extension in MEDIA_EXTENSIONS:
                media[name] = file
            else:
                texts.setdefault(_stem(name), []).append((name, file))
        else:
            listing.ignored[f".{extension}" if extension else "without extension"] += 1
    metadata = [name for name in tables if PurePosixPath(name).name in METADATA_FILES]
    if not media and tables and not (metadata and listing.dropped):
        return _list_tables([root / name for name in _one_split(source, sorted(tables))], config, progress)
    listing.tables = sorted(set(tables) - set(metadata))
    listing.ignored.update(f".{extension_of(name)}" for name in listing.tables)
    for stem in texts.keys() - {_stem(name) for name in media}:
        listing.ignored["texts without a picture"] += len(texts[stem])
    for name in sorted(media):
        beside = tuple(file for _, file in sorted(texts.get(_stem(name), ())))
        listing.inputs.append(Input(name=name, file=media[name], size=media[name].size, texts=beside))
    for name in sorted(metadata):
        _lay_metadata(root, name, listing, config)
    return listing


def _walk(root: Path, listing: Listing) -> Iterator[os.DirEntry[str]]:
    """Everything below ``root`` but folders and hidden files, in any order."""
    folders = [str(root)]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        listing.ignored["hidden"] += 1
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif _links_to_folder(entry):
                        listing.dropped.append(_linked_folder(Path(entry.path).relative_to(root)))
                    else:
                        yield entry
        except OSError as error:
            raise ValueError(f"{folder}: cannot be listed ({error.strerror}); make it readable") from error


def _links_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _linked_folder(path: Path) -> Dropped:
    return Dropped(_printable(path.as_posix()), "link to a folder", "links to folders are not followed")


def _check_entry(entry: os.DirEntry[str], name: str, root: Path) -> File:
    if _printable(name) != name:
        raise UnfitError("bad name", "its name is no UTF-8; rename it")
    if entry.is_symlink():
        return find_file(Path(entry.path), root)
    try:
        state = entry.stat(follow_symlinks=False)
    except OSError as error:
        raise UnfitError(UNREADABLE, str(error)) from error
    if not entry.is_file(follow_symlinks=False):
        raise UnfitError("no regular file", "a pipe, socket or device")
    return File(entry.path, state.st_size, state.st_mtime_ns)


def _lay_metadata(root: Path, name: str, listing: Listing, config: PackConfig) -> None:
    """Give the inputs below a metadata file what its rows say of them, in place of the files beside them."""
    columns = choose_columns(column_names(root / name), config, name)
    listing.notes.append(_note(name, columns))
    named: dict[str, Input] = {}
    folder = PurePosixPath(name).parent
    places = {item.name: place for place, item in enumerate(listing.inputs)}
    for row in read_rows(root / name, columns):
        path = os.path.normpath(folder / str(row.values[columns.media]))
        try:
            if path not in places:
                raise UnfitError(UNREADABLE, f"named in {name}, but not among the pictures and clips there")
            listing.inputs[places[path]] = _told(listing.inputs[places[path]], row, columns, named)
        except UnfitError as error:
            listing.drop(_printable(path) if path not in places else f"{name}#{row.number}", error)


def _told(item: Input, row: Row, columns: Columns, named: dict[str, Input]) -> Input:
    """``item`` with the captions and label of ``row`` added to those of earlier rows, which ``named`` keeps."""
    earlier = named.get(item.name, replace(item, texts=(), captions=(), label=None))
    captions, label = _said(row, columns)
    if None not in (label, earlier.label) and label != earlier.label:
        raise UnfitError("bad label", f"another row gives {item.name} the label {earlier.label}, this one {label}")
    label = earlier.label if label is None else label
    named[item.name] = replace(earlier, captions=earlier.captions + captions, label=label)
    return named[item.name]


# Tables


def _one_split(source: Path, names: list[str]) -> list[str]:
    splits = {match[1] if (match := _PART_OF_SPLIT.fullmatch(_stem(name))) else _stem(name) for name in names}
    if len(splits) > 1:
        raise ValueError(
            f"{source}: holds several tables ({', '.join(sorted(splits)[:5])}) and no pictures; give one of them, or a "
            f"pattern such as '{source}/{sorted(splits)[0]}*'"
        )
    return names


def _list_tables(tables: list[Path], config: PackConfig, progress: bool) -> Listing:
    listing = Listing()
    named: dict[str, Input] = {}
    root = (Path(config.root) if config.root is not None else tables[0].parent).resolve()
    columns = choose_columns(column_names(tables[0]), config, str(tables[0]))
    listing.notes.append(_note(tables[0].name, columns))
    listing.classes = class_names(tables[0], columns.label)
    items: dict[str, Input] = {}
    for table in tables:
        file = find_file(table, table.parent.resolve())
        bar = tqdm(
            read_rows(table, columns), desc=f"reading {table.name}", unit="row", disable=None if progress else True
        )
        for row in bar:
            place = f"{table.name}#{row.number}"
            try:
                item = _row_input(row, columns, place, file, root)
                if item.cell and config.shuffle and table.suffix == ".parquet":
                    raise ValueError(f"{table}: pictures inside a parquet file are read in order; leave --shuffle out")
                items[item.name] = _told(item, row, columns, named)
            except UnfitError as error:
                listing.drop(place, error)
    listing.inputs = list(items.values())
    return listing


def _row_input(row: Row, columns: Columns, place: str, file: File, root: Path) -> Input:
    value = row.values[columns.media]
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        cell, sha256 = Cell(row.group, row.place, columns.media), hashlib.sha256(data).hexdigest()
        return Input(name=place, file=file, cell=cell, size=len(data), sha256=sha256)
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str) or not path:
        raise UnfitError("no picture", f"the column {columns.media!r} holds {str(value)[:40]!r}")
    if re.match(r"\w+://", path):
        raise UnfitError("no picture", f"{path[:200]} is an address; fetch it first")
    try:
        found = find_file(root / path, root)
    except UnfitError as error:
        raise UnfitError(error.reason, f"{_printable(path)}: {error.detail}") from error
    if extension_of(path) not in MEDIA_EXTENSIONS:
        raise UnfitError("no picture", f"{_printable(path)}: expected {', '.join(MEDIA_EXTENSIONS)}")
    return Input(name=Path(os.path.normpath(root / path)).relative_to(root).as_posix(), file=found, size=found.size)


def _said(row: Row, columns: Columns) -> tuple[tuple[str, ...], int | str | None]:
    captions = check_captions(row.values[columns.caption]) if columns.caption else ()
    label: Any = row.values[columns.label] if columns.label else None
    if isinstance(label, str):
        # A csv has no numbers of its own.
        label = int(label) if re.fullmatch(r"\d{1,18}", label) else label or None
    return captions, label if label is None or isinstance(label, str) else check_label(label)


def _note(where: str, columns: Columns) -> str:
    texts = "".join(
        f", {what} from {name!r}" for what, name in (("captions", columns[1]), ("labels", columns[2])) if name
    )
    return f"{where}: pictures or clips from column {columns.media!r}{texts}"


# Labels


def _label_by_folder(listing: Listing) -> None:
    """Label the inputs by the first folder of their path."""
    for item in listing.inputs:
        if "/" not in item.name:
            listing.drop(item.name, UnfitError("no class", "lies in no folder, which would name its class"))
    inside = [item for item in listing.inputs if "/" in item.name]
    listing.inputs = [replace(item, label=item.name.split("/", 1)[0]) for item in inside]


def _number_labels(listing: Listing, source: Path) -> None:
    """Labels that are names become their places among all names in order, which become ``listing.classes``."""
    names = sorted({item.label for item in listing.inputs if isinstance(item.label, str)})
    if not names:
        return
    number = next((item for item in listing.inputs if isinstance(item.label, int)), None)
    if number is not None:
        raise ValueError(
            f"{source}: labels are numbers ({number.name}: {number.label}) and names ({names[0]!r}); choose one kind"
        )
    places: dict[int | str | None, int] = {name: place for place, name in enumerate(names)}
    listing.classes = names
    listing.inputs = [replace(item, label=places.get(item.label)) for item in listing.inputs]


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")
