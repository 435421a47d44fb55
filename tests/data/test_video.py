"""Clips: exact frames by their order, limits and damage found, and the same clips for every number of ranks."""

from __future__ import annotations

import io
import struct
import sys
import warnings
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from dydit_scale.data.decode import BadSampleError
from dydit_scale.data.loader import Batch, DataConfig, Loader, make_loader
from dydit_scale.data.shards import ShardIndex, build_index, write_shards
from dydit_scale.data.video import decode_clip, encode_mp4, scan_clip
from dydit_scale.diffusion.randomness import keyed_seed

SIDE = 16


def numbered(clip: int, frames: int) -> np.ndarray:
    """Noise, so that every frame of every clip differs from all others."""
    return np.random.RandomState([clip, frames]).randint(0, 256, (frames, SIDE, SIDE, 3), dtype=np.uint8)


def encoded(frames: np.ndarray, kind: str, codec: str, pixels: str, times: list[int] | None = None) -> bytes:
    # Not lossless, two frames out of three refer to later ones, which are stored before them.
    options = {"libx264rgb": {"qp": "0"}, "libx264": {"crf": "4", "bf": "2", "b_strategy": "0", "sc_threshold": "0"}}
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=8, options=options.get(codec, {}))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, 80)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = times[number] if times else 10 * number, Fraction(1, 80)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file.getvalue()


def as_bytes(pixels: torch.Tensor) -> np.ndarray:
    return rearrange(((pixels + 1) * 127.5).round().to(torch.uint8), "... c h w -> ... h w c").numpy()


def test_lossless_clips_come_back_exactly() -> None:
    frames = numbered(0, 12)
    data = encode_mp4(frames, 8, lossless=True)
    assert data == encode_mp4(frames, 8, lossless=True)
    assert scan_clip(data) == (12, SIDE, SIDE)
    assert (as_bytes(decode_clip(data, range(12), SIDE, SIDE)) == frames).all()
    assert (as_bytes(decode_clip(data, range(3, 11, 3), SIDE, SIDE)) == frames[3:11:3]).all()
    assert decode_clip(data, range(2), 8, 8).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("kind", "codec", "pixels"), [("matroska", "libx264rgb", "rgb24"), ("webm", "libvpx-vp9", "yuv420p")]
)
def test_other_containers_are_read(kind: str, codec: str, pixels: str) -> None:
    ramp = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None, None, None] * 30, (8, 32, 32, 3)).copy()
    data = encoded(ramp, kind, codec, pixels)
    assert scan_clip(data) == (8, 32, 32)
    found = as_bytes(decode_clip(data, range(8), 32, 32)).astype(int)
    assert abs(found - ramp).max() <= (0 if pixels == "rgb24" else 6)


def test_frames_count_as_they_are_shown_whatever_their_times() -> None:
    frames = np.broadcast_to(np.arange(9, dtype=np.uint8)[:, None, None, None] * 28, (9, SIDE, SIDE, 3)).copy()
    data = encoded(frames, "mp4", "libx264", "yuv420p", times=[0, 1, 2, 30, 31, 90, 200, 201, 500])
    with av.open(io.BytesIO(data)) as container:
        packets = [p for p in container.demux(video=0) if p.pts is not None]
    assert [p.pts for p in packets] != sorted(p.pts for p in packets), "expected frames stored out of order"
    assert abs(as_bytes(decode_clip(data, range(0, 9, 2), SIDE, SIDE)).astype(int) - frames[::2]).max() < 14


@pytest.mark.parametrize(("matrix", "turn"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_turned_clips_are_shown_upright(matrix: tuple[int, int, int, int], turn: int) -> None:
    frames = np.random.RandomState(0).randint(0, 256, (8, 16, 32, 3), dtype=np.uint8)
    data = bytearray(encode_mp4(frames, 8, lossless=True))
    at = data.index(b"tkhd") + 4 + 40  # the matrix of a version 0 track header
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    want = np.rot90(frames, turn, axes=(1, 2))
    assert scan_clip(bytes(data)) == (8, *want.shape[2:0:-1])
    side = as_bytes(decode_clip(bytes(data), range(1), SIDE, SIDE))[0]
    middle = want[0][8:24] if want.shape[1] == 32 else want[0][:, 8:24]
    assert (side == middle).all()


# --- what is refused ------------------------------------------------------------------------------------------------


def moov_first(data: bytes) -> bytes:
    """As for streaming: then a cut file opens and loses its last frames; the offsets do not matter here."""
    boxes, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        boxes.append(data[at : at + size])
        at += size
    return b"".join(sorted(boxes, key=lambda box: [b"ftyp", b"moov", b"free", b"mdat"].index(box[4:8])))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["mp4", "mp4 moov first", "matroska"])
def test_cut_clips_are_bad_samples(kind: str, share: float) -> None:
    data = encoded(numbered(0, 8), kind.split()[0], "libx264rgb", "rgb24")
    data = moov_first(data) if "moov" in kind else data
    with pytest.raises(BadSampleError, match="broken video"):
        scan_clip(data[: int(len(data) * share)])


def test_short_clips_and_limits_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_mp4(numbered(0, 8), 8, lossless=True)
    with pytest.raises(BadSampleError, match="clip of 8 frames, expected at least 10"):
        decode_clip(data, range(0, 12, 3), SIDE, SIDE)
    for name, limit, message in [
        ("MAX_VIDEO_BYTES", 1000, rf"video of {len(data)} bytes, more than the limit of 1000"),
        ("MAX_FRAME_PIXELS", 255, "video of 16 x 16 pixels, more than the limit of 255"),
        ("MAX_FRAMES", 7, "video of 8 frames, more than the limit of 7"),
    ]:
        with monkeypatch.context() as patch, pytest.raises(BadSampleError, match=message):
            patch.setattr(f"dydit_scale.data.video.{name}", limit)
            patch.setattr("dydit_scale.data.video._upright", None)  # would fail if a frame came out
            scan_clip(data)
    # Matroska does not count its frames beforehand.
    with monkeypatch.context() as patch, pytest.raises(BadSampleError, match="more frames than the limit of 7"):
        patch.setattr("dydit_scale.data.video.MAX_FRAMES", 7)
        scan_clip(encoded(numbered(0, 8), "matroska", "libx264rgb", "rgb24"))


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(encode_mp4(numbered(0, 8), 8, lossless=True))
    playlists = [f"#EXTM3U\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n", f"ffconcat version 1.0\nfile {secret}\n"]
    mjpeg = encoded(numbered(0, 8), "matroska", "mjpeg", "yuvj420p")
    for data, message in [
        *[(text.encode(), "no MP4, WebM or Matroska file") for text in playlists],
        (b"RIFF....AVI ", "no MP4, WebM or Matroska file"),
        (b"", "no MP4, WebM or Matroska file"),
        (mjpeg, "codec mjpeg, expected one of h264"),
    ]:
        with pytest.raises(BadSampleError, match=message):
            scan_clip(data)


def test_missing_pyav_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = clips(tmp_path / "clips", [8, 8])
    monkeypatch.setitem(sys.modules, "av", None)
    for attempt in (
        lambda: loader(index, frames=8),
        lambda: loader(index),
        lambda: build_index(index.folder, bad_shards=5),
        lambda: encode_mp4(numbered(0, 8), 8),
    ):
        with pytest.raises(ValueError, match=r"video needs PyAV.*run `pip install 'dydit_scale\[video\]'`"):
            attempt()


# --- batches --------------------------------------------------------------------------------------------------------


def clips(folder: Path, lengths: list[int], pictures: int = 0) -> ShardIndex:
    """Clips of some lengths, numbered and labelled, then pictures."""

    def samples() -> Iterator[dict[str, bytes | str]]:
        for number, length in enumerate(lengths):
            video = encode_mp4(numbered(number, length), 8, lossless=True)
            yield {"__key__": f"{number:04d}", "mp4": video, "txt": f"clip {number}", "cls": str(number)}
        for number in range(len(lengths), len(lengths) + pictures):
            file = io.BytesIO()
            Image.fromarray(numbered(number, 1)[0]).save(file, "PNG")
            yield {"__key__": f"{number:04d}", "png": file.getvalue(), "txt": f"clip {number}", "cls": str(number)}

    return write_shards(samples(), folder, samples_per_shard=3, progress=False)


def loader(index: ShardIndex, *, rank: int = 0, world_size: int = 1, consumed: int = 0, **config: float) -> Loader:
    return make_loader(
        DataConfig(path=str(index.folder), **{"image_size": SIDE, "caption_dropout": 0.0, **config}),
        index,
        seed=5,
        rank=rank,
        world_size=world_size,
        global_batch=4,
        micro_batch=2,
        consumed=consumed,
    )


def take(some: Loader, count: int) -> list[Batch]:
    return [batch for batch, _ in zip(some, range(count), strict=False)]


def test_clips_start_where_seed_and_position_say(tmp_path: Path) -> None:
    lengths = [8, 9, 12, 20, 8]
    index = clips(tmp_path / "clips", lengths)
    assert index.frames is not None and index.frames.tolist() == lengths
    starts = set()
    for batch in take(loader(index, frames=4, frame_stride=2), 10):
        assert batch.pixels.shape == (2, 4, 3, SIDE, SIDE)
        assert (batch.picture_captions, batch.picture_labels) == ((), None)
        for row, (position, key) in enumerate(zip(batch.positions.tolist(), batch.keys, strict=True)):
            number = int(key)
            start = keyed_seed(5, "clip start", position) % (lengths[number] - 6)
            starts.add(start)
            want = numbered(number, lengths[number])[start : start + 7 : 2]
            assert (as_bytes(batch.pixels[row]) == want).all()
            assert (batch.captions[row], int(batch.labels[row])) == (f"clip {number}", number)
    assert len(starts) > 4


def test_pictures_beside_clips_come_from_other_samples(tmp_path: Path) -> None:
    lengths = [8, 9, 12, 20]
    index = clips(tmp_path / "clips", lengths, pictures=1)
    everything = {n: numbered(n, length) for n, length in enumerate([*lengths, 1])}
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the lone picture is no clip
        batches = take(loader(index, frames=8, images_per_clip=3, caption_dropout=0.3), 20)
    for batch in batches:
        assert batch.pixels.shape == (2, 11, 3, SIDE, SIDE)
        assert batch.picture_labels is not None and batch.picture_labels.shape == (2, 3)
        for row, key in enumerate(batch.keys):
            for number, picture in enumerate(as_bytes(batch.pixels[row, 8:])):
                (source,) = [n for n, frames in everything.items() if (frames == picture).all((1, 2, 3)).any()]
                caption, label = batch.picture_captions[row][number], int(batch.picture_labels[row, number])
                assert (caption, label) in {(f"clip {source}", source), ("", -1)}
                assert source != int(key)
                seen.add((source, caption))
    assert len(seen) == 10, "every sample's picture, with its caption and without"


def test_clips_do_not_depend_on_ranks_workers_or_restarts(tmp_path: Path) -> None:
    index = clips(tmp_path / "clips", [8, 9, 12, 20, 8, 16, 10])
    settings = {"frames": 6, "images_per_clip": 2, "caption_dropout": 0.3}
    reference = take(loader(index, **settings), 8)
    ranks = [take(loader(index, rank=rank, world_size=2, workers=rank, **settings), 4) for rank in range(2)]
    resumed = take(loader(index, consumed=8, **settings), 4)
    in_turn = list(chain.from_iterable(zip(*ranks, strict=True)))
    for one, other in [*zip(reference, in_turn, strict=True), *zip(reference[4:], resumed, strict=True)]:
        for name in ("positions", "pixels", "labels", "picture_labels"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert (one.captions, one.keys, one.picture_captions) == (other.captions, other.keys, other.picture_captions)


def test_clips_serve_as_pictures(tmp_path: Path) -> None:
    index = clips(tmp_path / "clips", [8, 8, 8], pictures=3)
    found = set()
    for batch in take(loader(index), 12):
        assert batch.pixels.shape == (2, 3, SIDE, SIDE)
        for key, picture in zip(batch.keys, as_bytes(batch.pixels), strict=True):
            frames = numbered(int(key), 8 if int(key) < 3 else 1)
            found.add((key, int((frames == picture).all((1, 2, 3)).argmax())))
            assert (frames == picture).all((1, 2, 3)).any()
    assert len(found) > 9


def test_short_broken_and_changed_clips_are_substituted(tmp_path: Path) -> None:
    index = clips(tmp_path / "clips", [8, 12, 12, 5])
    changed = index.samples[1]
    shard = index.folder / index.shards[index.shard_of(1)].name
    with shard.open("r+b") as file:
        file.seek(int(changed["image_offset"]) + 300)
        file.write(b"\0\0\0\0")
    with pytest.warns(UserWarning) as warned:
        keys = {key for batch in take(loader(index, frames=8), 8) for key in batch.keys}
    assert keys == {"0000", "0002"}
    messages = sorted(str(warning.message) for warning in warned)
    assert len(messages) == 2
    assert "sample '0001': video checksum (CRC32) differs" in messages[0]
    assert "sample '0003': clip of 5 frames, expected at least 8 frames (data.frames, data.frame_stride)" in messages[1]


def test_clips_that_nobody_has_are_refused_at_once(tmp_path: Path) -> None:
    index = clips(tmp_path / "clips", [8, 12])
    with pytest.raises(ValueError, match=r"the longest clip has 12 frames, but .* ask for clips of 13 frames"):
        loader(index, frames=7, frame_stride=2)
    assert len(take(loader(clips(tmp_path / "more", [13]), frames=7, frame_stride=2), 1)) == 1
    pictures = clips(tmp_path / "pictures", [], pictures=2)
    assert pictures.frames is None
    with pytest.raises(ValueError, match="there are pictures only"):
        loader(pictures, frames=8)


def test_damaged_and_doubled_clips_are_named_in_the_index(tmp_path: Path) -> None:
    video = encode_mp4(numbered(0, 8), 8, lossless=True)
    samples = [
        {"__key__": "cut", "mp4": video[:-40], "txt": "x"},
        {"__key__": "two", "mp4": video, "mkv": video, "txt": "x"},
        {"__key__": "fine", "webm": video, "txt": "x"},
    ]
    index = write_shards(samples, tmp_path / "shards", samples_per_shard=3, progress=False)
    assert sorted(index.bad) == [0, 1]
    assert "broken video (cut off" in index.bad[0] and "two images (mp4, mkv)" in index.bad[1]
