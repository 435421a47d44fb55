"""Clips in and out of MP4, WebM and Matroska bytes by PyAV, which is needed for video alone (the extra ``video``).

The container is told from the first bytes and named to the demuxer: left to guess, libav may take a file for a playlist
and open what it lists.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image
from torch import Tensor

from dydit_scale.data.decode import BadSampleError, image_tensor

VIDEO_EXTENSIONS = ("mp4", "webm", "mkv")
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "ffv1")
MAX_VIDEO_BYTES = 1 << 28
MAX_FRAME_PIXELS = 1 << 24
MAX_FRAMES = 1 << 13

# Also by their decoders' names. libav opens no other decoder, not even to find out what a file holds.
_DECODERS = {"codec_whitelist": ",".join((*CODECS, "libdav1d", "libaom-av1"))}
_NO_FRAME = "broken video (no frame can be decoded)"
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


class MissingPackageError(ValueError):
    """A package of an extra is needed; the message says what to install."""


class ClipInfo(NamedTuple):
    """What a clip holds, by decoding all of it."""

    frames: int
    width: int
    """Of the first frame, in pixels, upright."""
    height: int
    seconds: float
    """From the first frame's time to the end of the last; 0 where the frames' times do not rise or are not told."""


def require_av() -> Any:
    """PyAV's module; MissingPackageError, naming the extra, where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise MissingPackageError(
            f"video needs PyAV, which cannot be imported ({error}); run `pip install 'dydit_scale[video]'`"
        ) from error
    return av


def scan_clip(data: bytes) -> ClipInfo:
    """Decode a whole clip and tell its length and size; BadSampleError if it is broken, foreign or beyond a limit."""
    stamps: list[int | None] = []
    first = last = None
    with closing(_frames(data)) as frames:
        for last in frames:
            first = first or last
            stamps.append(last.pts)
            if len(stamps) > MAX_FRAMES:
                raise BadSampleError(f"video of more frames than the limit of {MAX_FRAMES}")
    if first is None or last is None:
        raise BadSampleError(_NO_FRAME)
    return ClipInfo(len(stamps), *_upright(first).size, float(_ticks(stamps, last.duration) * first.time_base))


def decode_clip(data: bytes, wanted: range, height: int, width: int) -> Float32[Tensor, "frames 3 height width"]:
    """The frames numbered ``wanted``, as ``decode.image_tensor`` makes pictures.

    Frames are numbered from 0 in the order in which they are shown, whatever their times, so a variable frame rate is
    no special case. All frames before the last wanted one are decoded, which suits clips, not films.
    Raises BadSampleError if the clip is too short, broken, foreign or beyond a limit.
    """
    tensors, count = [], 0
    with closing(_frames(data)) as frames:
        for count, frame in enumerate(frames, 1):
            if count - 1 in wanted:
                tensors.append(image_tensor(_upright(frame), height, width))
            if len(tensors) == len(wanted):
                return torch.stack(tensors)
    raise BadSampleError(f"clip of {count} frames, expected at least {wanted[-1] + 1}")


def first_frame(data: bytes) -> Image.Image:
    """The first frame, upright; BadSampleError if it cannot be decoded, or the clip is foreign or beyond a limit."""
    with closing(_frames(data)) as frames:
        for frame in frames:
            return _upright(frame)
    raise BadSampleError("broken video (no frame can be decoded)")


def decode_clip_at(
    data: bytes, times: Sequence[float], height: int, width: int
) -> Float32[Tensor, "frames 3 height width"]:
    """The frames shown at ``times``, in seconds after the first frame's, rising: at each the last that begins by then.

    A frame comes twice where ``times`` are closer than the frames, and the last one for times beyond it. Decoding
    begins at the key frame before the first of ``times``; the frames are those that decoding all would give.
    Raises BadSampleError if the clip is broken, foreign or beyond a limit.
    """
    try:
        shown = _shown_at(_frames_from(data, times[0]), times)
        return torch.stack([image_tensor(image, height, width) for image in shown])
    except BadSampleError:
        # Not every key frame can be entered at; what is broken on its own account fails again.
        shown = _shown_at(_frames(data), times)
        return torch.stack([image_tensor(image, height, width) for image in shown])


def encode_mp4(frames: np.ndarray, fps: int, *, lossless: bool = False) -> bytes:
    """An H.264 MP4 of ``frames`` (uint8 [frames, height, width, 3]); the same bytes for the same frames and libraries.

    As a rule the pixels are yuv420p, which every browser plays and which needs even sides; with ``lossless`` they are
    RGB and come back exactly. MissingPackageError without PyAV.
    """
    av, file = require_av(), io.BytesIO()
    codec, pixels = ("libx264rgb", "rgb24") if lossless else ("libx264", "yuv420p")
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=fps, options={"qp": "0"} if lossless else {"crf": "16"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        # More threads give other bytes.
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _shown_at(frames: Generator[Any, None, None], times: Sequence[float]) -> Iterator[Image.Image]:
    """The picture shown at each of ``times``; ``frames`` begin with the first frame of all."""
    with closing(frames):
        first = shown = next(frames, None)
        if first is None:
            raise BadSampleError(_NO_FRAME)
        waiting = list(times)
        for frame in frames:
            if frame.pts is None or first.pts is None:
                raise BadSampleError("broken video (a frame without a time)")
            while waiting and waiting[0] < _since(first, frame.pts):
                waiting.pop(0)
                yield _upright(shown)
            if not waiting:
                return
            shown = frame
        yield from [_upright(shown)] * len(waiting)


def _since(first: Any, stamp: int) -> float:
    """Seconds from the frame ``first`` to a time in its ticks."""
    return float((stamp - first.pts) * first.time_base)


def _ticks(stamps: list[int | None], last: int) -> int:
    """Ticks from the first of ``stamps`` to the end of the last frame, which lasts ``last`` or as long as the one
    before it; 0 if they do not rise."""
    known = [stamp for stamp in stamps if stamp is not None]
    gaps = [after - before for before, after in pairwise(known)]
    if len(known) < len(stamps) or min(gaps, default=1) < 1:
        return 0
    return sum(gaps) + (last or sum(gaps[-1:]))


def _frames(data: bytes) -> Generator[Any, None, None]:
    """The decoded frames in the order in which they are shown; BadSampleError for what is broken or not allowed."""
    with _opened(data) as (container, stream):
        yield from map(_checked_frame, container.decode(stream))


def _frames_from(data: bytes, start: float) -> Generator[Any, None, None]:
    """The first frame, and the frames from a key frame on that is shown by ``start`` (seconds after the first).

    Raises BadSampleError, as for a broken clip, where the clip cannot be entered at that key frame.
    """
    with _opened(data) as (container, stream):
        first = _checked_frame(next(container.decode(stream)))
        yield first
        key = _last_key(container, stream, first, start)
        # MP4 files are searched by decoding time; Matroska, where it is not always known, may end up earlier.
        container.seek(key.pts if key.dts is None else key.dts, stream=stream)
        # Frames stored behind the key frame but shown before it (an open group of pictures) lack what they refer to.
        packets = (packet for packet in container.demux(stream) if packet.pts is None or packet.pts >= key.pts)
        frames = chain.from_iterable(packet.decode() for packet in packets)
        entered = next(frames)
        if entered.pts != key.pts or not entered.key_frame:
            raise BadSampleError("video that cannot be entered at a key frame")
        yield from map(_checked_frame, chain([entered], frames))


def _last_key(container: Any, stream: Any, first: Any, start: float) -> Any:
    """The packet of the last key frame that is shown ``start`` seconds after the frame ``first`` or before."""
    key = None
    container.seek(stream.start_time or 0, stream=stream)
    for packet in container.demux(stream):
        if packet.dts is not None and _since(first, packet.dts) > start:
            break
        if packet.is_keyframe and packet.pts is not None and _since(first, packet.pts) <= start:
            key = packet
    if key is None:
        raise BadSampleError("video without a key frame at its start")
    return key


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[Any, Any]]:
    """The container and its checked video stream; what libav raises meanwhile becomes a BadSampleError."""
    av = require_av()
    if len(data) > MAX_VIDEO_BYTES:
        raise BadSampleError(f"video of {len(data)} bytes, more than the limit of {MAX_VIDEO_BYTES}")
    try:
        kind = _container(data)
        with av.open(io.BytesIO(data), format=kind, options=_DECODERS, metadata_errors="replace") as container:
            yield container, _checked_stream(container)
    except BadSampleError:
        raise
    # libav's errors derive from a dozen built-in types, and PyAV adds IndexError and others of its own.
    except Exception as error:
        raise BadSampleError(f"broken video ({type(error).__name__}: {error})") from error


def _checked_stream(container: Any) -> Any:
    """The video stream, cover pictures aside, of an allowed codec and within the limits that its header can tell."""
    stream = container.streams.best("video")
    if stream is None:
        raise BadSampleError("broken video (no video stream)")
    codec = stream.codec_context.codec.canonical_name
    if codec not in CODECS:
        raise BadSampleError(f"video of codec {codec}, expected one of {', '.join(CODECS)}")
    _check_size(stream.codec_context)
    if stream.frames > MAX_FRAMES:
        raise BadSampleError(f"video of {stream.frames} frames, more than the limit of {MAX_FRAMES}")
    # The stream itself can name another size than the header; libav then stops before it allocates.
    stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS), "err_detect": "explode"}
    stream.codec_context.thread_count = 1
    return stream


def _checked_frame(frame: Any) -> Any:
    _check_size(frame)
    if frame.is_corrupt:
        raise BadSampleError("broken video (a damaged frame)")
    return frame


def _check_size(of: Any) -> None:
    if of.width * of.height > MAX_FRAME_PIXELS:
        raise BadSampleError(f"video of {of.width} x {of.height} pixels, more than the limit of {MAX_FRAME_PIXELS}")


def _upright(frame: Any) -> Image.Image:
    """The frame in RGB, turned as its display matrix says (by quarters)."""
    try:
        image: Image.Image = frame.to_image()
    # Of the same sort as what decoding raises.
    except Exception as error:
        raise BadSampleError(f"broken video ({type(error).__name__}: {error})") from error
    return image.rotate(round(frame.rotation / 90) % 4 * 90, expand=True)


def _container(data: bytes) -> str:
    """libav's name of the container, all of which must be there: cut Matroska files decode without an error."""
    if data[4:8] == b"ftyp":
        name, end = "mp4", _end_of_boxes(data)
    elif data[:4] == _EBML:
        name, end = "matroska", _end_of_segment(data)
    else:
        raise BadSampleError("broken video (no MP4, WebM or Matroska file)")
    if end > len(data):
        raise BadSampleError(f"broken video (cut off: {len(data)} bytes of {end})")
    return name


def _end_of_boxes(data: bytes) -> int:
    """Where the last top-level box of an MP4 says it ends (ISO/IEC 14496-12, 4.2)."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:  # a 64-bit size follows
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size == 0:  # up to the end
            return len(data)
        if size < 8:
            raise BadSampleError(f"broken video (a box of {size} bytes)")
        at += size
    return at


def _end_of_segment(data: bytes) -> int:
    """Where the segment of a Matroska file says it ends (RFC 8794, section 4; RFC 9559)."""
    at, _ = _ebml_end(data, 4)
    if data[at : at + 4] != _SEGMENT:
        raise BadSampleError("broken video (a Matroska file without a segment)")
    end, known = _ebml_end(data, at + 4)
    return end if known else len(data)


def _ebml_end(data: bytes, at: int) -> tuple[int, bool]:
    """Where the element ends whose size is written at ``at``, and whether it is known (all ones: it is not)."""
    head = data[at] if at < len(data) else 0
    length = 9 - head.bit_length()
    if length > 8:
        raise BadSampleError("broken video (a malformed Matroska header)")
    bits = 7 * length
    size = int.from_bytes(data[at : at + length], "big") & ((1 << bits) - 1)
    return at + length + size, size != (1 << bits) - 1
