"""Pictures and clips as shards hold them: the original bytes where all readers agree on them, else converted once.

A picture is kept as it is if it is a PNG, JPEG or WebP of one upright opaque frame in sRGB with 8 bits a channel. A
clip is always kept as it was encoded; one in a QuickTime or AVI file moves to an MP4.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageColor

from data_tools.packing.config import PackConfig
from data_tools.packing.inputs import CLIP_EXTENSIONS, UnfitError
from dydit_scale.data.decode import MAX_IMAGE_BYTES, TURNS, BadSampleError, check_size
from dydit_scale.data.video import MAX_VIDEO_BYTES, VIDEO_EXTENSIONS, MissingPackageError, require_av, scan_clip

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

# A camera's JPEG with a second picture behind the first opens as MPO.
_KEPT_FORMATS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
_KEPT_MODES = ("L", "P", "RGB", "RGBA", "LA", "PA")
_SAVED: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "quality": 95},
}
_ORIENTATION = 0x0112
# What libav calls the containers that are moved to MP4.
_DEMUXERS = {"mov": "mov", "m4v": "mov", "avi": "avi"}
_SAME_COLOUR = 2  # of 255: what rounding alone makes of sRGB


class Media(NamedTuple):
    """A picture or clip for a shard."""

    extension: str
    data: bytes
    changes: tuple[str, ...]
    """What was converted; nothing if the bytes are the original's."""


def prepare(data: bytes, extension: str, config: PackConfig) -> Media:
    """The picture or clip in ``data``, checked and, where it must be, converted; UnfitError if it cannot be packed.

    Raises MissingPackageError for clips where PyAV is not installed.
    """
    if extension in CLIP_EXTENSIONS:
        return _prepare_clip(data, extension, config)
    if len(data) > MAX_IMAGE_BYTES:
        raise UnfitError("over a limit", f"{len(data)} bytes, more than {MAX_IMAGE_BYTES}")
    with _as_unfit("broken picture"):
        return _prepare_picture(data, config)


def _prepare_picture(data: bytes, config: PackConfig) -> Media:
    opened = Image.open(io.BytesIO(data), formats=FORMATS)
    kind = str(opened.format)
    try:
        check_size(*opened.size)
    except BadSampleError as error:
        raise UnfitError("over a limit", str(error)) from error
    changes = [] if kind in _KEPT_FORMATS else ["format"]
    if kind != "MPO" and getattr(opened, "is_animated", False):
        if config.animated == "refuse":
            raise UnfitError("animated", "has several frames")
        changes.append("animation")
    opened.load()
    image = _upright(_to_8_bits(opened, changes), changes)
    _check_shape(*image.size, config)
    image = _shrink(_on_background(_to_srgb(image, changes), config.background, changes), config.max_side, changes)
    if not changes:
        return Media(_KEPT_FORMATS[kind], data, ())
    chosen = {"auto": "jpg" if kind in ("JPEG", "MPO") else "png", "jpeg": "jpg"}.get(config.format, config.format)
    file = io.BytesIO()
    plain = image.convert("RGB")
    # Pillow would write the profile and EXIF data of the original beside pixels that they no longer fit.
    plain.info.clear()
    plain.save(file, **_SAVED[chosen])
    return Media(chosen, file.getvalue(), tuple(changes))


def _to_8_bits(image: Image.Image, changes: list[str]) -> Image.Image:
    if image.mode.startswith("I;16"):
        changes.append("16 bits")
        grey = np.asarray(image, dtype=np.uint32)
        return _with_info(Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)), image)
    if image.mode in ("I", "F"):
        raise UnfitError("unknown depth", f"pixels of mode {image.mode}, whose range is not told; save it with 8 bits")
    return image


def _upright(image: Image.Image, changes: list[str]) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    # The reader, like Pillow, would fail on such a picture, though its pixels are sound.
    except Exception:
        changes.append("broken EXIF")
        return image
    if orientation not in TURNS:
        return image
    changes.append("orientation")
    return image.transpose(TURNS[orientation])


def _to_srgb(image: Image.Image, changes: list[str]) -> Image.Image:
    """The colours in sRGB, the alpha channel as it was."""
    profile = image.info.get("icc_profile")
    transform = _transform(profile, image.mode == "CMYK") if isinstance(profile, bytes) else None
    if transform is None:
        if image.mode not in _KEPT_MODES:
            changes.append("colour space")
            return image.convert("RGB") if image.mode != "1" else image.convert("L")
        return image
    changes.append("ICC profile")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    # An L picture would take an RGB profile's transform for one of three channels.
    plain = image.convert(transform.input_mode) if image.mode != transform.input_mode else image
    srgb = ImageCms.applyTransform(plain, transform)
    assert srgb is not None, "a transform that is not in place gives a picture"
    if alpha is not None:
        srgb.putalpha(alpha)
    return srgb


@lru_cache(maxsize=16)
def _transform(profile: bytes, is_cmyk: bool) -> ImageCms.ImageCmsTransform | None:
    """From the profile's colours to sRGB; None if they are sRGB already, or it is broken or made for other pictures,
    which viewers take for sRGB too."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(opened.profile.xcolor_space.strip())
        if mode is None or (mode == "CMYK") != is_cmyk:
            return None
        transform = ImageCms.buildTransform(
            opened,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        colours = _colour_cube().convert(mode)
        made = ImageCms.applyTransform(colours, transform)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    assert made is not None, "a transform that is not in place gives a picture"
    difference = np.asarray(made, dtype=int) - np.asarray(colours.convert("RGB"), dtype=int)
    return None if mode != "CMYK" and abs(difference).max() <= _SAME_COLOUR else transform


def _colour_cube() -> Image.Image:
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1)
    return Image.fromarray(cube.reshape(len(steps), -1, 3))


def _on_background(image: Image.Image, background: str, changes: list[str]) -> Image.Image:
    """The picture over the background, mixed in sRGB as browsers do; an opaque one as it is."""
    if not image.has_transparency_data:
        return image
    layers = image.convert("RGBA")
    if layers.getchannel("A").getextrema() == (255, 255):
        return image
    changes.append("transparency")
    ground = Image.new("RGBA", image.size, ImageColor.getrgb(background)[:3])
    return Image.alpha_composite(ground, layers).convert("RGB")


def _shrink(image: Image.Image, max_side: int | None, changes: list[str]) -> Image.Image:
    longer = max(image.size)
    if max_side is None or longer <= max_side:
        return image
    changes.append("size")
    width, height = (max(1, round(side * max_side / longer)) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _with_info(image: Image.Image, source: Image.Image) -> Image.Image:
    image.info = {name: source.info[name] for name in ("exif", "icc_profile") if name in source.info}
    return image


def _check_shape(width: int, height: int, config: PackConfig) -> None:
    shorter, longer = sorted((width, height))
    if shorter < config.min_side:
        raise UnfitError("too small", f"{width} x {height} pixels, expected sides of at least {config.min_side}")
    if config.max_aspect is not None and longer > config.max_aspect * shorter:
        raise UnfitError("aspect", f"{width} x {height} pixels, more than {config.max_aspect:g} to 1")


# Clips


def kind_of(data: bytes) -> str:
    """An extension for bytes without a name, by how they begin; ``png`` stands for all pictures."""
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "mkv"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    if data[4:8] == b"ftyp" and data[8:12] not in (b"avif", b"avis", b"mif1", b"msf1"):
        return "mov" if data[8:12] == b"qt  " else "mp4"
    return "png"


def _prepare_clip(data: bytes, extension: str, config: PackConfig) -> Media:
    if len(data) > MAX_VIDEO_BYTES:
        raise UnfitError("over a limit", f"{len(data)} bytes, more than {MAX_VIDEO_BYTES}")
    require_av()
    changes: tuple[str, ...] = ()
    try:
        if extension not in VIDEO_EXTENSIONS:
            with _as_unfit("broken clip"):
                data = _to_mp4(data, _DEMUXERS[extension])
            extension, changes = "mp4", ("container",)
        clip = scan_clip(data)
    except BadSampleError as error:
        raise UnfitError("broken clip", str(error)) from error
    _check_shape(clip.width, clip.height, config)
    if clip.frames < config.min_frames:
        raise UnfitError("too few frames", f"{clip.frames}, expected at least {config.min_frames}")
    return Media(extension, data, changes)


def _to_mp4(data: bytes, demuxer: str) -> bytes:
    """The first video stream in an MP4, its packets as they are."""
    av, file = require_av(), io.BytesIO()
    with (
        av.open(io.BytesIO(data), format=demuxer, metadata_errors="replace") as source,
        av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as target,
    ):
        if not source.streams.video:
            raise UnfitError("broken clip", "no video stream")
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                _give_times(packet, stream)
                packet.stream = copy
                target.mux(packet)
    return file.getvalue()


def _give_times(packet: Any, stream: Any) -> None:
    """AVI files may leave the time out at which a frame is shown."""
    if packet.dts is None and packet.pts is None:
        raise UnfitError("broken clip", f"a frame without a time (at {Fraction(stream.time_base)} s a tick)")
    packet.pts = packet.dts if packet.pts is None else packet.pts


@contextmanager
def _as_unfit(reason: str) -> Iterator[None]:
    """Errors of a decoder as UnfitError. Of its warnings, that of a decompression bomb is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except (UnfitError, MissingPackageError):
            raise
        # Pillow and libav raise dozens of unrelated types on broken bytes (SyntaxError, struct.error, ...).
        except Exception as error:
            what = "no picture of a known format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
            raise UnfitError(reason, f"{type(error).__name__}: {what}") from error
