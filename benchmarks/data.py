"""How fast samples are read: by this project's reader, by plain webdataset, and as a raw read of the same tars.

    python benchmarks/data.py OUT                 # a quarter of an hour; OUT is on the disk to measure
    python benchmarks/data.py OUT --quick         # few samples, to see that it runs; writes to OUT

Two kinds of data: pictures of about 40 KB, and encoded samples of 196 KB. For each, with 0, 2 and 4 workers and all of
them in turn within each repetition: "reader" and "webdataset" get the bytes of samples, the reader in its shuffled
order and with checksums, webdataset in the order of the shards. The bytes stay in the workers, since otherwise the pipe
between processes is measured, and are read in four epochs, since the workers' start is part of the time. "decoded" are
tensors of one epoch, of pictures by the same functions, and come back. "raw" is one process that reads the tars from
end to end; "raw, checked" takes the CRC32 of their bytes, too. The files lie in the page cache. Beside it: the time to
index, and the most memory that reading all over an index of ten million samples takes.

Writes benchmarks/results/data.json.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import webdataset
from isal.isal_zlib import crc32
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dydit_scale.data.decode import decode_caption, decode_image, image_tensor
from dydit_scale.data.encoded import (
    ENCODERS_FILE,
    Encoding,
    Entry,
    SourceInfo,
    caption_tensor,
    encoding_bytes,
    pack_sample,
    way_digest,
)
from dydit_scale.data.gather import SCANNED, Gatherer, ScannedShard
from dydit_scale.data.index import ShardIndex, ShardInfo, load_index, save_index
from dydit_scale.data.loader import DataConfig, make_loader
from dydit_scale.data.position import SampleOrder
from dydit_scale.data.reader import SourceReader
from dydit_scale.data.shards import build_index, write_shards
from dydit_scale.data.tar import BLOCK
from dydit_scale.sampling.speed import machine

ROOT = Path(__file__).parents[1]
WORKERS = (0, 2, 4)
SIDE, QUALITY = 256, 92
"""Of the pictures: noise over a gradient, which makes JPEGs of about 40 KB."""
ENCODING = Encoding(
    family="flux", encoders={}, image_size=SIDE, sizes=[[SIDE, SIDE]], text_tokens=16, computed="bf16", dtype="bf16",
    source="", channels=16, stride=8, spread=True, text={"text": [16, 4096]}, empty=None,
)  # fmt: skip
"""Mean and deviation of a 256-pixel picture in 16 channels and some text, in 16 bits: 192 KiB."""
BATCH = 16
EPOCHS = 4
"""Passes over the bytes: one alone is so short that the start of the workers is half of it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the shards, on the disk to measure")
    parser.add_argument("--repeat", type=int, help="(default: 5, with --quick 2)")
    parser.add_argument("--samples", type=int, help="in each kind of data (default: 8192, with --quick 512)")
    parser.add_argument(
        "--simulated", type=int, help="samples of the index whose memory is taken (default: 10 million, 100,000)"
    )
    parser.add_argument("--quick", action="store_true", help="few samples; write the results to OUT")
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory is not None:
        print(json.dumps(memory(args.memory)))
        return
    usual = {"samples": (8192, 512), "simulated": (10_000_000, 100_000), "repeat": (5, 2)}
    for name, values in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, values[args.quick])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    result: dict[str, Any] = {**machine(torch.device("cpu")), "samples": args.samples, "repeat": args.repeat}
    result["versions"] |= {name: version(name) for name in ("webdataset", "isal", "pillow", "numpy")}
    for kind, make in (("pictures", pictures), ("latents", latents)):
        folder = args.out / f"{kind}-{args.samples}"
        if not folder.exists():
            make(folder, args.samples)
        result[kind] = compare(folder, kind, args.repeat)
    result["memory"] = memory_of_many(args.out, args.simulated)
    out = (args.out if args.quick else ROOT / "benchmarks" / "results") / "data.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"results: {out}")


def pictures(folder: Path, count: int) -> None:
    def samples() -> Iterator[dict[str, bytes | str]]:
        ramp = np.linspace(0, 160, SIDE)
        for number in range(count):
            noise = np.random.RandomState(number).randint(0, 96, (SIDE, SIDE, 3))
            file = io.BytesIO()
            Image.fromarray((ramp[:, None, None] + noise).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
            text = f"noise over a gradient, number {number}"
            yield {"__key__": f"{number:08d}", "jpg": file.getvalue(), "txt": text}

    write_shards(samples(), folder, samples_per_shard=per_shard(count))


def latents(folder: Path, count: int) -> None:
    """As ``dydit data encode`` writes them, of random numbers."""
    folder.mkdir(parents=True)
    (folder / ENCODERS_FILE).write_bytes(encoding_bytes(ENCODING))
    way = way_digest(ENCODING)
    for number in range(0, count, per_shard(count)):
        shard = folder / f"shard-{number // per_shard(count):06d}.tar"
        with shard.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
            for row in range(number, min(count, number + per_shard(count))):
                generator, key = torch.Generator().manual_seed(row), f"{row:08d}"
                source = SourceInfo(shard.name, key, SIDE, SIDE, "0" * 64, "0" * 64)
                entry = Entry(encoding=way, source=source, height=SIDE, width=SIDE, captions=[f"number {row}"])
                shapes = {"mean": (16, 32, 32), "std": (16, 32, 32), caption_tensor(0, "text"): (16, 4096)}
                tensors = {name: torch.rand(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
                writer.write({"__key__": key, **pack_sample(entry, tensors)})
    build_index(folder)


def per_shard(count: int) -> int:
    return max(16, count // 16)


def compare(folder: Path, kind: str, repeat: int) -> dict[str, Any]:
    """Median samples per second of all ways to read ``folder``, and the time to index it."""
    began = time.perf_counter()
    index = build_index(folder)
    result: dict[str, Any] = {
        "index_seconds": time.perf_counter() - began,
        "load_index_seconds": timed(lambda: load_index(folder))[0],
        "bytes_per_sample": sum(shard.bytes for shard in index.shards) / index.num_samples,
    }
    ways: dict[str, Callable[[], float]] = {"raw": lambda: raw(index), "raw, checked": lambda: raw(index, check=True)}
    for workers in WORKERS:
        ways[f"reader {workers}"] = lambda n=workers: rate(bytes_of_reader(index, n), index, EPOCHS)
        ways[f"webdataset {workers}"] = lambda n=workers: rate(bytes_of_webdataset(index, n), index, EPOCHS)
        ways[f"decoded reader {workers}"] = lambda n=workers: rate(decoded_by_reader(index, n), index)
        if kind == "pictures":
            ways[f"decoded webdataset {workers}"] = lambda n=workers: rate(decoded_by_webdataset(index, n), index)
    for way in ways.values():  # fills the page cache
        way()
    rows = {name: [] for name in ways}
    for number in range(repeat):
        for name, way in ways.items():
            rows[name].append(way())
        print(f"{kind}, repetition {number + 1} of {repeat}: " + ", ".join(f"{n} {r[-1]:.0f}" for n, r in rows.items()))
    medians = {name: statistics.median(found) for name, found in rows.items()}
    result["samples_per_second"] = medians
    result["reader_of_webdataset"] = {str(n): medians[f"reader {n}"] / medians[f"webdataset {n}"] for n in WORKERS}
    for way in ("reader", "decoded reader"):
        result[f"raw_of_{way.replace(' ', '_')}"] = {str(n): medians["raw"] / medians[f"{way} {n}"] for n in WORKERS}
    result["checked_raw_of_reader"] = {str(n): medians["raw, checked"] / medians[f"reader {n}"] for n in WORKERS}
    return result | {"rows": rows}


def rate(batches: Iterable[int], index: ShardIndex, epochs: int = 1) -> float:
    """Samples per second over so many passes, from before the workers start; ``batches`` tells the size of each
    batch."""
    gc.collect()
    seconds, count = timed(lambda: sum(batches))
    assert abs(count - epochs * index.num_samples) < 8 * BATCH, (count, epochs, index.num_samples)
    return count / seconds


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def raw(index: ShardIndex, check: bool = False) -> float:
    """One process reads every shard from end to end, and takes the CRC32 of its bytes if ``check``."""

    def read() -> None:
        for shard in EPOCHS * index.shards:
            with (index.folder / shard.name).open("rb", buffering=0) as file:
                while data := file.read(1 << 20):
                    if check:
                        crc32(data)

    return EPOCHS * index.num_samples / timed(read)[0]


def source_reader(index: ShardIndex) -> SourceReader:
    config = DataConfig(path=str(index.folder), image_size=SIDE, caption_dropout=0)
    return SourceReader(config, index, source=0, seed=0, order_seed=0)


class ReaderBytes(Dataset[Any]):
    """Reads what a ``Reader`` would decode in some epochs, batch by batch, in its order and with its checks; gives the
    sizes."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self.reader = source_reader(index)
        self.order = SampleOrder([shard.count for shard in index.shards], 0)

    def __len__(self) -> int:
        return EPOCHS * self.index.num_samples // BATCH

    def __getitem__(self, number: int) -> list[int]:
        self.reader._files.forget()
        places = self.order.places(range(number * BATCH, (number + 1) * BATCH))
        found = [self.reader._files.read(self.index.starts[place.shard] + place.row) for place in places]
        return [len(files.image) + len(files.caption or b"") for files in found]


def bytes_of_reader(index: ShardIndex, workers: int) -> Iterator[int]:
    return map(len, DataLoader(ReaderBytes(index), batch_size=None, num_workers=workers, collate_fn=list))


def bytes_of_webdataset(index: ShardIndex, workers: int) -> Iterator[int]:
    sizes = plain(index).repeat(EPOCHS).map(size_of_sample).batched(BATCH, collation_fn=list)
    return map(len, DataLoader(sizes, batch_size=None, num_workers=workers, collate_fn=list))


def size_of_sample(sample: dict[str, Any]) -> int:
    return sum(len(data) for data in sample.values() if isinstance(data, bytes))


def decoded_by_reader(index: ShardIndex, workers: int) -> Iterator[int]:
    config = DataConfig(path=str(index.folder), image_size=SIDE, caption_dropout=0, workers=workers)
    loader = make_loader(config, index, seed=0, rank=0, world_size=1, global_batch=BATCH, micro_batch=BATCH, consumed=0)
    return (len(batch.keys) for batch in islice(loader, index.num_samples // BATCH))


def decoded_by_webdataset(index: ShardIndex, workers: int) -> Iterator[int]:
    batches = plain(index).map(decode).batched(BATCH, collation_fn=stack)
    return (len(captions) for _, captions in DataLoader(batches, batch_size=None, num_workers=workers))


def plain(index: ShardIndex) -> Any:
    shards = [str(index.folder / shard.name) for shard in index.shards]
    return webdataset.WebDataset(shards, shardshuffle=False)


def decode(sample: dict[str, Any]) -> tuple[torch.Tensor, str]:
    return image_tensor(decode_image(sample["jpg"]), SIDE, SIDE), decode_caption(sample["txt"])


def stack(rows: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, tuple[str, ...]]:
    return torch.stack([pixels for pixels, _ in rows]), tuple(caption for _, caption in rows)


def memory_of_many(out: Path, samples: int) -> dict[str, Any]:
    """Memory of a fresh process that reads all over the simulated index of ``samples`` samples."""
    folder = out / f"simulated-{samples}"
    if not (folder / "index.json").exists():
        simulate(folder, samples)
    command = [sys.executable, __file__, str(out), "--memory", str(folder)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"memory at {samples} samples: {found}")
    return {"samples": samples, **found}


def simulate(folder: Path, samples: int, shards: int = 1000) -> None:
    """An index, made as ``dydit data index`` makes it, of shards that are holes: files of zeros of the right size.

    The first picture of each shard is larger than 64 KiB, so that sizes take four bytes as they do in real data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size, text, large = 4096, 80, 1 << 17
    step = size + 3 * BLOCK
    rows = np.zeros(samples // shards, SCANNED)
    rows["image_offset"] = large + np.arange(len(rows)) * step + BLOCK
    rows["image_offset"][0] = BLOCK
    rows["image_bytes"], rows["image_crc"] = size, zlib.crc32(bytes(size))
    rows["image_bytes"][0], rows["image_crc"][0] = large, zlib.crc32(bytes(large))
    rows["caption_offset"] = rows["image_offset"] + rows["image_bytes"] + BLOCK
    rows["caption_bytes"], rows["caption_crc"] = text, zlib.crc32(bytes(text))
    rows["width"], rows["height"], rows["label"] = 4000, 3000, -1
    rows["key_end"] = np.arange(1, len(rows) + 1) * 10
    with Gatherer(folder) as gatherer:
        for number in tqdm(range(shards), desc="simulating", unit="shard"):
            info = ShardInfo(
                name=f"shard-{number:06d}.tar", bytes=large + (len(rows) + 1) * step, sha256="", count=len(rows)
            )
            with (folder / info.name).open("wb") as file:
                file.truncate(info.bytes)
            keys = "".join(f"{number * len(rows) + row:010d}" for row in range(len(rows))).encode()
            gatherer.add(ScannedShard(info, rows, keys, {}))
        save_index(gatherer.index({}, None))


def memory(folder: Path) -> dict[str, float]:
    """MiB that loading the index, making a reader and reading all over an epoch add to this process.

    ``private`` is what no other process can share; ``shared`` are pages of the index's files, which all processes of a
    machine have in common and the system takes back when it needs them. ``most`` is the greatest sum of both while
    reading; ``all_pages`` is the sum when every sample was looked up without giving pages back.
    """
    process = psutil.Process()
    began = Memory.of(process)
    seconds, index = timed(lambda: load_index(folder))
    loaded = Memory.of(process)
    reader = source_reader(index)
    stride = max(1, index.num_samples // 200_000)
    peak = Memory(0, 0)
    for number, position in enumerate(range(0, index.num_samples, stride)):
        place = reader._order[position]
        sample = index.starts[place.shard] + place.row
        reader._files.forget()
        reader._files.read(sample)
        index.key(sample)
        if number % 1000 == 999:
            peak = max(peak, Memory.of(process), key=sum)
    for sample in range(0, index.num_samples, 64):
        index.record(sample)
        index.key(sample)
    everything = Memory.of(process)
    return {
        "load_index_seconds": seconds,
        "private_after_load_mib": loaded.private - began.private,
        "shared_after_load_mib": loaded.shared - began.shared,
        "private_mib": peak.private - began.private,
        "shared_mib": peak.shared - began.shared,
        "most_mib": sum(peak) - sum(began),
        "all_pages_mib": sum(everything) - sum(began),
        "uss_mib": process.memory_full_info().uss / 2**20,
        "index_files_mib": sum(os.path.getsize(path) for path in folder.glob("index*")) / 2**20,
    }


class Memory(NamedTuple):
    """MiB of a process."""

    private: float
    shared: float

    @classmethod
    def of(cls, process: psutil.Process) -> Memory:
        info = process.memory_info()
        return cls((info.rss - info.shared) / 2**20, info.shared / 2**20)


if __name__ == "__main__":
    main()
