"""Crafted shards, members, names and pictures: nothing is executed, memory stays bounded, what is refused is named."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import resource
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from dydit_scale.cli.main import main
from dydit_scale.data.decode import MAX_PIXELS
from dydit_scale.data.loader import DataConfig, make_loader
from dydit_scale.data.shards import build_index, load_index
from tests.data.test_shards import GOOD, png, write_tar


def read_all(folder: Path) -> set[str]:
    """The keys that training sees of a small folder."""
    config = DataConfig(path=str(folder), image_size=8)
    loader = make_loader(
        config, load_index(folder), seed=0, rank=0, world_size=1, global_batch=4, micro_batch=4, consumed=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {key for batch in islice(iter(loader), 20) for key in batch.keys}


# --- members --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.BLKTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"V", b"M", b"D", b"N"])
def test_other_types_of_members_are_refused(tmp_path: Path, kind: bytes) -> None:
    write_tar(tmp_path / "a.tar", GOOD)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[156:157] = kind
    data[148:156] = b"%06o\0 " % sum(b" " * 8 + data[:148] + data[156:512])
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"a.tar: member 'a.png' is a folder, link or device \(tar type b'.*'\)"):
        build_index(tmp_path)


@pytest.mark.parametrize("claim", [1 << 33, 1 << 62, -1, -1024])
def test_members_that_claim_more_than_there_is_are_refused(tmp_path: Path, claim: int) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("a.png")
        member.size = claim
        tar.fileobj.write(member.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(
        ValueError, match=rf"a.tar: sample 'a', member 'a.png': says {claim} bytes at 512, but the shard"
    ):
        build_index(tmp_path)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"size": "99999999999999"}, "says 99999999999999 bytes"),
        ({"size": "-5"}, "an extended tar header gives the size '-5'"),
        ({"GNU.sparse.major": "1", "GNU.sparse.realsize": "9" * 12}, "sparse files .* are not supported"),
        ({"path": "../../etc/a.png"}, "unsafe member name '../../etc/a.png'"),
        ({"path": "/etc/a.png"}, "unsafe member name '/etc/a.png'"),
    ],
)
def test_extended_headers_are_not_trusted(tmp_path: Path, headers: dict[str, str], message: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in GOOD:
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(data), headers
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match=rf"a.tar: .*{message}"):
        build_index(tmp_path)


def test_members_beyond_the_limits_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dydit_scale.data.shards.MAX_IMAGE_BYTES", 2000)
    monkeypatch.setattr("dydit_scale.data.shards.MAX_VIDEO_BYTES", 3000)
    huge = [("h.png", bytes(2001)), ("h.txt", b"x"), ("v.mp4", bytes(3001)), ("v.txt", b"x")]
    write_tar(tmp_path / "a.tar", [*GOOD, *huge])
    most, read = 0, os.pread

    def watched(fd: int, size: int, offset: int) -> bytes:
        nonlocal most
        most = max(most, size)
        return read(fd, size, offset)

    monkeypatch.setattr("os.pread", watched)
    assert build_index(tmp_path).bad == {
        1: "image of 2001 bytes, more than the limit of 2000",
        2: "video of 3001 bytes, more than the limit of 3000",
    }
    assert 0 < most <= 2000


def test_shards_that_are_no_files_are_refused_and_links_to_files_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(tmp_path / "elsewhere", GOOD)
    (folder / "link.tar").symlink_to(tmp_path / "elsewhere")
    assert build_index(folder).num_samples == load_index(folder).num_samples == 1
    makers: list[Callable[[Path], object]] = [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("nowhere")]
    for make in makers:
        make(folder / "odd.tar")
        with pytest.raises(ValueError, match=r"shards: no regular files, or links to none: odd\.tar"):
            build_index(folder)
        with pytest.raises(ValueError, match=r"odd\.tar is not in the index"):
            load_index(folder)
        (folder / "odd.tar").rmdir() if (folder / "odd.tar").is_dir() else (folder / "odd.tar").unlink()


# --- code -----------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.canary), "w")


def payloads(canary: Path) -> dict[str, bytes]:
    """By extension, what runs when the decoder is used that goes by it."""
    pickled = pickle.dumps(Bomb(canary))
    saved, array = io.BytesIO(), io.BytesIO()
    torch.save(Bomb(canary), saved)
    np.save(array, np.array([Bomb(canary)], dtype=object), allow_pickle=True)
    for load in (
        lambda: pickle.loads(pickled),
        lambda: torch.load(io.BytesIO(saved.getvalue()), weights_only=False),
        lambda: np.load(io.BytesIO(array.getvalue()), allow_pickle=True),
    ):
        load()
        assert canary.exists(), "the payload is harmless, so the test would be"
        canary.unlink()
    script = f"#!/bin/sh\ntouch {canary}\n".encode()
    names = {"pkl": pickled, "pickle": pickled, "pyd": pickled, "pth": saved.getvalue(), "pt": saved.getvalue()}
    names |= {"pkl.gz": gzip.compress(pickled), "gz": gzip.compress(bytes(1 << 22)), "npy": array.getvalue()}
    return names | {"npz": array.getvalue(), "ten": pickled, "mp": pickled, "sh": script, "py": script, "so": script}


def test_nothing_in_a_shard_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "shards"
    folder.mkdir()
    evil = payloads(canary)
    pickled = evil["pkl"]
    files = []
    for number, (extension, data) in enumerate(evil.items()):
        files += [
            (f"beside{number}.png", png(number)),
            (f"beside{number}.txt", b"x"),
            (f"beside{number}.{extension}", data),
        ]
        files += [(f"alone{number}.{extension}", data), (f"alone{number}.txt", b"x")]
    disguised = ("png", "jpg", "jpeg", "webp", "mp4", "webm", "mkv")
    for extension in disguised:
        files += [(f"as-{extension}.{extension}", pickled), (f"as-{extension}.txt", b"x")]
    for extension in ("txt", "cls", "json"):
        files += [(f"as-{extension}.png", png(1)), (f"as-{extension}.{extension}", pickled)]
    write_tar(folder / "a.tar", files)
    assert main(["data", "index", str(folder)]) == 0
    said = capsys.readouterr().out
    index = load_index(folder)
    reasons = {index.key(number): reason for number, reason in index.bad.items()}
    for number, extension in enumerate(evil):
        assert f"beside{number}" not in reasons
        assert reasons[f"alone{number}"].startswith(f"image missing (found: {', '.join(sorted([extension, 'txt']))})")
        assert index.ignored[extension] == 2
    assert f"2 .{next(iter(evil))}" in said and "ignored: members that are no part of a sample" in said
    for extension in disguised:
        assert reasons[f"as-{extension}"].startswith(("broken image", "broken video"))
    for extension, fault in {"txt": "broken caption", "json": "broken caption", "cls": "label of"}.items():
        assert reasons[f"as-{extension}"].startswith(fault)
    assert len(reasons) == len(evil) + len(disguised) + 3
    assert read_all(folder) == {f"beside{number}" for number in range(len(evil))}
    assert not canary.exists()


def test_an_index_is_not_unpickled(tmp_path: Path) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "a.tar", GOOD)
    build_index(folder)
    for name in ("index-samples.npy", "index-keys.npy"):
        kept = {path: path.read_bytes() for path in folder.iterdir()}
        content = json.loads((folder / "index.json").read_text())
        for data in (payloads(canary)["npy"], payloads(canary)["pkl"]):
            (folder / name).write_bytes(data)
            content["arrays"][name] = hashlib.sha256(data).hexdigest()
            (folder / "index.json").write_text(json.dumps(content))
            with pytest.raises(ValueError, match="torn or foreign index"):
                load_index(folder)
        for path, data in kept.items():
            path.write_bytes(data)
    assert load_index(folder).num_samples == 1
    assert not canary.exists()


@pytest.mark.parametrize(
    "path",
    ["pipe:touch {}", "pipe:touch {} |", "pipe:cat {}/a.tar", "file:{}", "`touch {}`", "$(touch {})", "a; touch {};"],
)
def test_commands_for_paths_are_refused(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **options: object) -> None:
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr("subprocess.Popen.__init__", forbidden)
    monkeypatch.setattr("os.system", forbidden)
    canary = tmp_path / "canary"
    for call in (load_index, build_index):
        with pytest.raises(ValueError):
            call(path.format(canary))
    assert not canary.exists()


def test_evil_names_are_only_names(tmp_path: Path) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "shards"
    folder.mkdir()
    touch = f"touch {canary}".replace("/", "\\x2f")
    names = [
        f"$({touch})",
        f"`{touch}`",
        f"; {touch} #",
        "-rf",
        "%s%n{0}{__class__}",
        "*",
        "~",
        "pipe:x",
        "\\\\x\\c",
        "'\"",
    ]
    for number, name in enumerate(names):
        write_tar(
            folder / f"{name}.tar", [(f"{name}{number}.png", png(number)), (f"{name}{number}.txt", name.encode())]
        )
    assert build_index(folder).num_samples == len(names)
    assert read_all(folder) == {f"{name}{number}" for number, name in enumerate(names)}
    assert not canary.exists()


# --- pictures and clips ---------------------------------------------------------------------------------------------


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def grey_png(width: int, height: int, *chunks: bytes, claim: tuple[int, int] | None = None) -> bytes:
    """A black PNG, made without its pixels ever being there at once, that may claim another size."""
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *(claim or (width, height)), 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def claims(data: bytes, at: int, size: bytes) -> bytes:
    return data[:at] + size + data[at + len(size) :]


def wide_clip(width: int, height: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(width, height, "yuv420p")))
        container.mux(stream.encode())
    return file.getvalue()


def pictures() -> dict[str, tuple[str, bytes, str | tuple[int, int]]]:
    """Extension, bytes, and the size or the reason that is expected."""
    photo = Image.fromarray(np.random.RandomState(0).randint(0, 256, (24, 40, 3), dtype=np.uint8))
    jpeg, webp = saved(photo, "JPEG"), saved(photo.convert("RGBA"), "WEBP", lossless=True, exif=b"Exif\0\0")
    frame_header = jpeg.index(b"\xff\xc0") + 5
    turned = Image.Exif()
    turned[0x0112] = 6
    moving = {"save_all": True, "append_images": [Image.new("RGB", (40, 24), "red")], "duration": 100}
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 1_500_000)
    bomb = zlib.compress(bytes(1 << 26), 9)
    limit = f"more than the limit of {MAX_PIXELS}"
    return {
        "png-claim": ("png", grey_png(4, 4, claim=(60_000, 60_000)), "DecompressionBombError"),
        "png-true": ("png", grey_png(8200, 8192), limit),
        "png-largest": ("png", grey_png(8192, 8192), (8192, 8192)),
        "png-strip": ("png", grey_png(1, 70_000), "more on a side than the limit of 65536"),
        "jpeg-claim": ("jpg", claims(jpeg, frame_header, b"\xff\xff\xff\xff"), "DecompressionBombError"),
        "webp-claim": ("webp", claims(webp, 24, b"\xfe\x3f\x00\xff\x3f\x00"), "broken image"),
        "text-bomb": ("png", grey_png(4, 4, chunk(b"zTXt", b"a\0\0" + bomb)), "broken image"),
        "itext-bomb": ("png", grey_png(4, 4, chunk(b"iTXt", b"a\0\1\0\0\0" + bomb)), "broken image"),
        "profile-bomb": ("png", grey_png(4, 4, chunk(b"iCCP", b"a\0\0" + bomb)), "broken image"),
        "long-text": ("png", saved(photo, "PNG", pnginfo=text), (40, 24)),
        "long-profile": ("jpg", saved(photo, "JPEG", icc_profile=bytes(2_000_000)), (40, 24)),
        "cut-jpeg": ("jpg", jpeg[:-200], "broken image"),
        "cmyk": ("jpg", saved(photo.convert("CMYK"), "JPEG"), (40, 24)),
        "deep": ("png", saved(Image.new("I;16", (40, 24)), "PNG"), (40, 24)),
        "moving-webp": ("webp", saved(photo, "WEBP", **moving), (40, 24)),
        "moving-png": ("png", saved(photo, "PNG", **moving), (40, 24)),
        "one-pixel": ("png", grey_png(1, 1), (1, 1)),
        "turned": ("jpg", saved(photo, "JPEG", exif=turned), (24, 40)),
        "broken-exif": ("webp", saved(photo, "WEBP", exif=b"Exif\0\0garbage"), (40, 24)),
        "gif": ("png", saved(photo, "GIF"), "no PNG, JPEG or WebP picture"),
        "svg": (
            "png",
            b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
            "broken image",
        ),
        "wide-clip": ("mp4", wide_clip(4100, 4100), "video of 4100 x 4100 pixels, more than the limit"),
    }


def index_within(folder: Path, mib: int) -> None:
    """Index a folder in a process that may take so much more memory than it has."""

    def index() -> None:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (mib << 20),) * 2)
        build_index(folder, progress=False)

    process = multiprocessing.get_context("fork").Process(target=index, daemon=True)
    process.start()
    process.join(120)
    process.kill()
    process.join()
    assert process.exitcode == 0


def test_hostile_pictures_stay_within_memory_and_are_converted_or_named(tmp_path: Path) -> None:
    """640 MiB hold the largest picture that is allowed while it becomes RGB."""
    cases = pictures()
    files = [
        file
        for key, (extension, data, _) in cases.items()
        for file in ((f"{key}.{extension}", data), (f"{key}.txt", b"x"))
    ]
    write_tar(tmp_path / "a.tar", files)
    index_within(tmp_path, 640)
    index = load_index(tmp_path)
    sizes = {index.key(number): size.item() for number, size in enumerate(index.columns.sizes)}
    reasons = {index.key(number): reason for number, reason in index.bad.items()}
    assert len(sizes) == len(cases)
    for key, (_, _, expected) in cases.items():
        if isinstance(expected, str):
            assert expected in reasons[key], key
        else:
            assert key not in reasons and sizes[key] == expected, key
    assert len(reasons) == sum(isinstance(expected, str) for _, _, expected in cases.values()) == 12
