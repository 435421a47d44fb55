"""Clips: exact frames by their order, limits and damage found, and the same clips for every number of ranks."""

from __future__ import annotations

import io
import struct
import sys
import warnings
from collections.abc import Generator, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from dydit_scale.data import video
from dydit_scale.data.decode import BadSampleError
from dydit_scale.data.index import compute_digest, load_index, save_index
from dydit_scale.data.loader import Batch, DataConfig, Loader, make_loader
from dydit_scale.data.shards import ShardIndex, build_index, write_shards
from dydit_scale.data.video import decode_clip, decode_clip_at, encode_mp4, scan_clip
from dydit_scale.diffusion.randomness import keyed_seed

SIDE = 16


def numbered(clip: int, frames: int) -> np.ndarray:
    """Noise, so that every frame of every clip differs from all others."""
    return np.random.RandomState([clip, frames]).randint(0, 256, (frames, SIDE, SIDE, 3), dtype=np.uint8)


def encoded(
    frames: np.ndarray,
    kind: str,
    codec: str,
    pixels: str,
    times: list[int] | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    # Not lossless, two frames out of three refer to later ones, which are stored before them.
    usual = {"libx264rgb": {"qp": "0"}, "libx264": {"crf": "4", "bf": "2", "b_strategy": "0", "sc_threshold": "0"}}
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=8, options=options or usual.get(codec, {}))
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
    assert scan_clip(data) == (12, SIDE, SIDE, 12 / 8)
    assert (as_bytes(decode_clip(data, range(12), SIDE, SIDE)) == frames).all()
    assert (as_bytes(decode_clip(data, range(3, 11, 3), SIDE, SIDE)) == frames[3:11:3]).all()
    assert decode_clip(data, range(2), 8, 8).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("kind", "codec", "pixels"), [("matroska", "libx264rgb", "rgb24"), ("webm", "libvpx-vp9", "yuv420p")]
)
def test_other_containers_are_read(kind: str, codec: str, pixels: str) -> None:
    ramp = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None, None, None] * 30, (8, 32, 32, 3)).copy()
    data = encoded(ramp, kind, codec, pixels)
    assert scan_clip(data) == (8, 32, 32, 1)
    assert abs(as_bytes(decode_clip(data, range(8), 32, 32)).astype(int) - ramp).max() <= (
        0 if pixels == "rgb24" else 6
    )


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
    assert scan_clip(bytes(data)) == (8, *want.shape[2:0:-1], 1)
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
        (with_sound(None), "no video stream"),
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


def with_sound(frames: np.ndarray | None) -> bytes:
    """An MP4 whose first stream is silence and whose second, if there are frames, is lossless H.264."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=16_000)
        if frames is not None:
            stream = container.add_stream("libx264rgb", rate=8, options={"qp": "0"})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 16_000, 0
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    return file.getvalue()


# --- clips by time --------------------------------------------------------------------------------------------------


def shown(data: bytes, times: list[float], side: int = SIDE) -> np.ndarray:
    return as_bytes(decode_clip_at(data, times, side, side))


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
@pytest.mark.parametrize("begin", [0, 33])
def test_frames_are_those_shown_at_the_times(kind: str, begin: int) -> None:
    """Whatever the gaps between frames, and whenever the first is shown."""
    frames, stamps = numbered(0, 8), [0, 1, 2, 20, 21, 40, 41, 80]
    data = encoded(frames, kind, "libx264rgb", "rgb24", times=[begin + stamp for stamp in stamps])
    times = [(stamp + part) / 80 for stamp in range(0, 81, 3) for part in (0.2, 0.8)]
    want = [max(n for n, stamp in enumerate(stamps) if stamp <= time * 80) for time in times]
    assert (shown(data, times) == frames[want]).all()
    for start in (0, 5, 30, 40, len(times) - 1):
        assert (shown(data, times[start:]) == frames[want[start:]]).all()
    assert scan_clip(data).seconds == pytest.approx(1 + 1 / 8), "the last frame lasts as long as the encoder says"


def test_faster_than_the_source_frames_repeat() -> None:
    frames = numbered(0, 4)
    data = encode_mp4(frames, 8, lossless=True)
    assert (shown(data, [n / 16 for n in range(8)]) == frames[[0, 0, 1, 1, 2, 2, 3, 3]]).all()
    assert (shown(data, [0.4, 7.0]) == frames[[3, 3]]).all()


GROUPS = {
    "closed": ("libx264", "mp4", {"bf": "3", "g": "12", "sc_threshold": "0"}),
    "open": ("libx264", "mp4", {"bf": "3", "g": "12", "sc_threshold": "0", "x264-params": "open-gop=1"}),
    "open in matroska": ("libx264", "matroska", {"bf": "3", "g": "12", "x264-params": "open-gop=1"}),
    "refreshed by columns": ("libx264", "mp4", {"g": "12", "x264-params": "intra-refresh=1"}),
    "open hevc": ("libx265", "mp4", {"x265-params": "keyint=12:min-keyint=12:open-gop=1:bframes=3:log-level=none"}),
    "hidden frames": ("libvpx-vp9", "webm", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "10"}),
    "part 2": ("mpeg4", "mp4", {"g": "12", "bf": "2"}),
}
ENTERED_AT_EVERY_KEY_FRAME = {"closed", "open hevc", "hidden frames", "part 2"}


@pytest.mark.parametrize("name", GROUPS)
def test_entering_in_the_middle_gives_what_decoding_all_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, kind, options = GROUPS[name]
    blocks = np.random.RandomState(0).randint(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    data = encoded(np.stack([np.roll(blocks, n, axis=1) for n in range(40)]), kind, codec, "yuv420p", options=options)
    assert (scan_clip(data).frames, scan_clip(data).seconds) == (40, pytest.approx(5, abs=0.01))
    want = as_bytes(decode_clip(data, range(40), 48, 64))
    from_the_start, decoded, real, checked = 0, 0, video._frames, video._checked_frame

    def counted(data: bytes) -> Generator[object, None, None]:
        nonlocal from_the_start
        from_the_start += 1
        return real(data)

    def seen(frame: object) -> object:
        nonlocal decoded
        decoded += 1
        return checked(frame)

    monkeypatch.setattr(video, "_frames", counted)
    monkeypatch.setattr(video, "_checked_frame", seen)
    for number in range(40):
        found = as_bytes(decode_clip_at(data, [(number + 0.5) / 8], 48, 64))
        assert (found[0] == want[number]).all(), number
    assert (from_the_start == 0) == (name in ENTERED_AT_EVERY_KEY_FRAME)
    assert decoded < (40 * 15 if name in ENTERED_AT_EVERY_KEY_FRAME else 40 * 35), "of 40 * 21 from the start each time"


def test_turned_clips_with_sound_and_an_edit_list_are_read_by_time() -> None:
    frames = numbered(0, 8)
    data = bytearray(with_sound(frames))
    assert scan_clip(bytes(data)) == (8, SIDE, SIDE, 1)
    assert (shown(bytes(data), [0.3, 0.6]) == frames[[2, 4]]).all()
    # The second track's display matrix: a quarter turn.
    at = data.index(b"tkhd", data.index(b"tkhd") + 4) + 4 + 40
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    assert (shown(bytes(data), [0.3, 0.6]) == np.rot90(frames, -1, axes=(1, 2))[[2, 4]]).all()
    # The edit list of a plain clip, changed to begin at its third frame (of ticks of 1/80 s at 8 frames a second).
    plain = bytearray(encoded(frames, "mp4", "libx264rgb", "rgb24"))
    with av.open(io.BytesIO(plain)) as container:
        tick = container.streams.video[0].time_base
    at = plain.index(b"elst") + 4 + 8  # after version, flags and count: duration, media time, rate
    plain[at + 4 : at + 8] = struct.pack(">i", int(Fraction(2, 8) / tick))
    assert scan_clip(bytes(plain)).frames == 6
    assert (shown(bytes(plain), [0.05, 0.3, 0.7]) == frames[[2, 4, 7]]).all()


def test_times_that_do_not_rise_are_no_times() -> None:
    assert video._ticks([3, 5, 8], 4) == 9
    assert video._ticks([3, 5, 8], 0) == 8
    assert video._ticks([3], 4) == 4 and video._ticks([3], 0) == 0
    for stamps in ([3, 3, 4], [3, 5, 4], [0, None, 2], [None]):
        assert video._ticks(stamps, 1) == 0


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


@pytest.mark.parametrize("fps", [4.0, 8.0, 20.0])
def test_clips_by_time_start_where_seed_and_position_say(tmp_path: Path, fps: float) -> None:
    lengths = [8, 9, 12, 20]
    index = clips(tmp_path / "clips", lengths)
    assert index.seconds is not None and index.seconds.tolist() == [length / 8 for length in lengths]
    starts, repeats = set(), 0
    for batch in take(loader(index, frames=4, fps=fps), 10):
        for row, (position, key) in enumerate(zip(batch.positions.tolist(), batch.keys, strict=True)):
            length = lengths[int(key)]
            start = (length / 8 - 3 / fps) * keyed_seed(5, "clip start", position) / 2**63
            want = [int(8 * (start + number / fps)) for number in range(4)]
            assert (as_bytes(batch.pixels[row]) == numbered(int(key), length)[want]).all()
            starts.add(want[0])
            repeats += len(want) - len(set(want))
    assert len(starts) > 4
    assert (repeats > 0) == (fps > 8)


def test_clips_too_short_for_their_time_are_named(tmp_path: Path) -> None:
    index = clips(tmp_path / "clips", [8, 16], pictures=1)
    with pytest.warns(UserWarning) as warned:
        keys = {key for batch in take(loader(index, frames=5, fps=4), 6) for key in batch.keys}
    assert keys == {"0001"}
    assert sorted(str(warning.message).split(": ", 1)[1].split(";")[0] for warning in warned) == [
        "a picture, expected more than 1 s (data.frames, data.fps)",
        "clip of 1 s, expected more than 1 s (data.frames, data.fps)",
    ]
    assert len(take(loader(clips(tmp_path / "just", [9]), frames=5, fps=4), 1)) == 1
    with pytest.raises(ValueError, match=r"longest clip lasts 2 s, but data.frames and data.fps ask for .* than 2 s"):
        loader(index, frames=9, fps=4)
    with pytest.raises(ValueError, match=r"there are pictures only, but data.frames and data.fps ask"):
        loader(clips(tmp_path / "pictures", [], pictures=2), frames=2, fps=4)


def test_indexes_without_durations_ask_to_be_made_again(tmp_path: Path) -> None:
    old = replace(clips(tmp_path / "clips", [8, 16]), seconds=None)
    old = replace(old, digest=compute_digest(old))
    save_index(old)
    assert not (tmp_path / "clips" / "index-seconds.npy").exists()
    old = load_index(tmp_path / "clips")
    assert len(take(loader(old, frames=5), 2)) == 2
    with pytest.raises(ValueError, match=r"data.fps needs the clips' durations.*run `dydit data index .*clips`"):
        loader(old, frames=5, fps=4)
    assert len(take(loader(build_index(tmp_path / "clips"), frames=3, fps=4), 2)) == 2


@pytest.mark.parametrize("by", [{"frame_stride": 1}, {"fps": 6.5}])
def test_clips_do_not_depend_on_ranks_workers_or_restarts(tmp_path: Path, by: dict[str, float]) -> None:
    index = clips(tmp_path / "clips", [8, 9, 12, 20, 8, 16, 10])
    settings = {"frames": 6, "images_per_clip": 2, "caption_dropout": 0.3} | by
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
    changed = index.record(1).image
    shard = index.folder / index.shards[index.shard_of(1)].name
    with shard.open("r+b") as file:
        file.seek(changed.offset + 300)
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
