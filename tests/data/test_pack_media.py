"""What packing keeps as it is, what it converts, and into what."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from data_tools.packing.config import PackConfig
from data_tools.packing.inputs import UnfitError
from data_tools.packing.media import Media, kind_of, prepare
from dydit_scale.data.decode import decode_image
from dydit_scale.data.video import decode_clip, encode_mp4, scan_clip

PLAIN = PackConfig()
NOISE = np.random.RandomState(0).randint(0, 256, (12, 16, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)
# Smooth, so that JPEG changes it little.
RAMP = Image.fromarray(
    np.stack([*np.meshgrid(np.arange(48) * 4, np.arange(32) * 6), np.full((32, 48), 90)], -1).astype(np.uint8)
)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(media: Media) -> np.ndarray:
    return np.asarray(decode_image(media.data), dtype=int)


def reason(data: bytes, extension: str = "png", config: PackConfig = PLAIN) -> str:
    with pytest.raises(UnfitError) as caught:
        prepare(data, extension, config)
    return str(caught.value)


GREY = PICTURE.convert("L")
OPAQUE = PICTURE.convert("RGBA")
KEPT = {
    "rgb png": (saved(PICTURE, "PNG"), "png"),
    "grey png": (saved(GREY, "PNG"), "png"),
    "palette png": (saved(PICTURE.quantize(16), "PNG"), "png"),
    "opaque rgba png": (saved(OPAQUE, "PNG"), "png"),
    "jpeg": (saved(PICTURE, "JPEG"), "jpg"),
    "grey jpeg": (saved(GREY, "JPEG"), "jpg"),
    "jpeg with a thumbnail behind it": (
        saved(PICTURE, "MPO", save_all=True, append_images=[GREY.convert("RGB")]),
        "jpg",
    ),
    "webp": (saved(PICTURE, "WEBP"), "webp"),
    "png in sRGB": (
        saved(PICTURE, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        "png",
    ),
    "png with a broken profile": (saved(PICTURE, "PNG", icc_profile=b"no profile" * 20), "png"),
    "upright jpeg": (
        saved(PICTURE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x01\0\0\0\0\0\0"),
        "jpg",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_usable_pictures_keep_their_bytes(name: str) -> None:
    data, extension = KEPT[name]
    assert prepare(data, "png", PLAIN) == Media(extension, data, ())
    assert decode_image(data).mode == "RGB"


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "AVIF"])
def test_other_formats_become_png(kind: str) -> None:
    source = PICTURE.quantize(16) if kind == "GIF" else PICTURE
    options = {"quality": 100, "subsampling": "4:4:4"} if kind == "AVIF" else {}
    data = saved(source, kind, **options)
    media = prepare(data, "png", PLAIN)
    assert (media.extension, media.changes) == ("png", ("format",))
    with Image.open(io.BytesIO(data)) as opened:
        assert (pixels(media) == np.asarray(opened.convert("RGB"))).all()


@pytest.mark.parametrize("orientation", range(2, 9))
def test_pictures_are_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    media = prepare(saved(PICTURE, "PNG", exif=exif), "png", PLAIN)
    turned = {
        2: NOISE[:, ::-1], 3: NOISE[::-1, ::-1], 4: NOISE[::-1], 5: NOISE.swapaxes(0, 1),
        6: np.rot90(NOISE, -1), 7: NOISE[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(NOISE),
    }  # fmt: skip
    assert media.changes == ("orientation",)
    assert (pixels(media) == turned[orientation]).all()
    with Image.open(io.BytesIO(media.data)) as opened:
        assert opened.getexif().get(0x0112) is None


def test_a_turned_jpeg_stays_a_jpeg_unless_asked() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(RAMP, "JPEG", exif=exif, quality=95)
    for asked, extension in (("auto", "jpg"), ("jpeg", "jpg"), ("png", "png"), ("webp", "webp")):
        media = prepare(data, "jpg", PackConfig(format=asked))
        assert (media.extension, media.changes) == (extension, ("orientation",))
        assert abs(pixels(media) - np.rot90(np.asarray(RAMP, dtype=int), -1)).mean() < 3
    assert media == prepare(data, "jpg", PackConfig(format="webp")), "the same bytes every time"


def test_broken_exif_does_not_cost_the_picture() -> None:
    data = saved(PICTURE, "PNG", exif=b"Exif\0\0MM|*\0\0\0\x08")
    media = prepare(data, "png", PLAIN)
    assert media.changes == ("broken EXIF",)
    assert (pixels(media) == NOISE).all()
    nonsense = saved(PICTURE, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert prepare(nonsense, "png", PLAIN).data == nonsense
    assert (np.asarray(decode_image(nonsense)) == NOISE).all()


def test_other_colour_spaces_become_srgb() -> None:
    # sRGB's primaries, in the other order, show that the profile was followed.
    profile = swapped_profile()
    media = prepare(saved(RAMP, "PNG", icc_profile=profile), "png", PLAIN)
    assert media.changes == ("ICC profile",)
    red, green, blue = np.moveaxis(np.asarray(RAMP, dtype=int), -1, 0)
    assert abs(pixels(media) - np.stack([green, red, blue], -1)).max() <= 2
    with Image.open(io.BytesIO(media.data)) as opened:
        assert "icc_profile" not in opened.info
    cut = RAMP.copy()
    cut.putalpha(Image.new("L", cut.size, 0))
    both = prepare(saved(cut, "PNG", icc_profile=profile), "png", PackConfig(background="#ff8000"))
    assert both.changes == ("ICC profile", "transparency")
    assert (pixels(both) == (255, 128, 0)).all()


def swapped_profile() -> bytes:
    """The sRGB profile with the tags of its red and green exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for place in range(128 + 4, 128 + 4 + 12 * struct.unpack_from(">I", data, 128)[0], 12):
        name = bytes(data[place : place + 4])
        other = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(name, name)
        data[place : place + 4] = other
    return bytes(data)


def test_cmyk_becomes_rgb() -> None:
    media = prepare(saved(RAMP.convert("CMYK"), "JPEG", quality=95), "jpg", PLAIN)
    assert (media.extension, media.changes) == ("jpg", ("colour space",))
    assert abs(pixels(media) - np.asarray(RAMP, dtype=int)).mean() < 3
    with Image.open(io.BytesIO(media.data)) as opened:
        assert opened.mode == "RGB"


def test_16_bits_are_scaled_not_cut() -> None:
    deep = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        media = prepare(saved(Image.fromarray(deep), kind), "png", PLAIN)
        assert "16 bits" in media.changes
        assert (pixels(media) == (deep // 257)[..., None]).all()
    assert reason(saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")).startswith("unknown depth")


def test_one_bit_pictures_become_grey() -> None:
    media = prepare(saved(GREY.convert("1"), "PNG"), "png", PLAIN)
    assert media.changes == ("colour space",)
    assert set(np.unique(pixels(media))) == {0, 255}


def half_clear() -> dict[str, Image.Image]:
    alpha = np.zeros((12, 16), np.uint8)
    alpha[:, 8:] = 255
    image = PICTURE.copy()
    image.putalpha(Image.fromarray(alpha))
    palette = PICTURE.quantize(8)
    palette.info["transparency"] = palette.getpixel((0, 0))
    return {"RGBA": image, "LA": image.convert("LA"), "P": palette}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_goes_onto_the_background(mode: str) -> None:
    image = half_clear()[mode]
    options = {"transparency": image.info["transparency"]} if mode == "P" else {}
    for background, colour in (("white", (255, 255, 255)), ("#102030", (16, 32, 48))):
        media = prepare(saved(image, "PNG", **options), "png", PackConfig(background=background))
        assert media.changes == ("transparency",)
        shown = image.convert("RGBA")
        clear = np.asarray(shown)[..., 3] == 0
        assert clear.any() and (pixels(media)[clear] == colour).all()
        assert (pixels(media)[~clear] == np.asarray(shown)[~clear][:, :3]).all()


def test_half_transparent_pixels_are_mixed() -> None:
    media = prepare(saved(Image.new("RGBA", (2, 2), (0, 0, 0, 51)), "PNG"), "png", PLAIN)
    assert (pixels(media) == 204).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animated_pictures_give_their_first_frame_or_none(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = saved(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    media = prepare(data, "gif", PLAIN)
    assert "animation" in media.changes and media.extension == "png"
    assert (pixels(media) == (255, 0, 0)).all()
    assert reason(data, "gif", PackConfig(animated="refuse")) == "animated: has several frames"


def test_large_pictures_are_shrunk_in_proportion() -> None:
    image = Image.new("RGB", (300, 100), "teal")
    for longer, size in ((150, (150, 50)), (299, (299, 100)), (2, (2, 1))):
        media = prepare(saved(image, "PNG"), "png", PackConfig(max_side=longer))
        assert decode_image(media.data).size == size and media.changes == ("size",)
        assert (pixels(media) == (0, 128, 128)).all()
    assert prepare(saved(image, "PNG"), "png", PackConfig(max_side=300)).changes == ()


def test_shape_is_judged_upright_and_before_shrinking() -> None:
    data = saved(Image.new("RGB", (60, 20)), "PNG")
    assert reason(data, config=PackConfig(min_side=21)) == "too small: 60 x 20 pixels, expected sides of at least 21"
    assert prepare(data, "png", PackConfig(min_side=20, max_side=30)).changes == ("size",)
    assert reason(data, config=PackConfig(max_aspect=2.9)) == "aspect: 60 x 20 pixels, more than 2.9 to 1"
    assert prepare(data, "png", PackConfig(max_aspect=3)).data == data


def bomb() -> bytes:
    """A PNG that says it has 400 million pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


NASTY = {
    "strip": (
        saved(Image.new("L", ((1 << 16) + 1, 1)), "PNG"),
        "over a limit: image of 65537 x 1 pixels, more on a side",
    ),
    "bomb": (bomb(), "broken picture: DecompressionBomb|over a limit"),
    "truncated": (saved(PICTURE, "JPEG")[:-80], "broken picture: OSError"),
    "empty": (b"", "broken picture: UnidentifiedImageError: no picture of a known format"),
    "text": (b"#!/bin/sh\necho hello", "no picture of a known format"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture of a known format"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture of a known format"),
    "cut png": (saved(PICTURE, "PNG")[:200], "broken picture"),
}


@pytest.mark.parametrize("name", NASTY)
def test_what_is_no_sound_picture_has_a_reason(name: str) -> None:
    data, expected = NASTY[name]
    assert any(part in reason(data) for part in expected.split("|"))


# Clips

FRAMES = np.random.RandomState(1).randint(0, 256, (6, 32, 48, 3), dtype=np.uint8)


def clip(kind: str, codec: str = "libx264", rotation: int = 0, frames: int = 6) -> bytes:
    """FRAMES in a container; two of three frames refer to later ones with H.264."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream: Any = container.add_stream(codec, rate=8, options={"bf": "2"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv422p10le" if codec == "prores_ks" else "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in FRAMES[:frames]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize(("kind", "extension"), [("mp4", "mp4"), ("webm", "webm"), ("matroska", "mkv")])
def test_clips_keep_their_bytes(kind: str, extension: str) -> None:
    data = clip(kind, "libvpx-vp9" if kind == "webm" else "libx264")
    assert prepare(data, extension, PLAIN) == Media(extension, data, ())


@pytest.mark.parametrize(("kind", "codec"), [("mov", "libx264"), ("avi", "mpeg4"), ("avi", "libx264")])
def test_other_containers_move_to_mp4_without_a_change_of_frames(kind: str, codec: str) -> None:
    data = clip(kind, codec)
    media = prepare(data, kind, PLAIN)
    assert (media.extension, media.changes) == ("mp4", ("container",))
    assert scan_clip(media.data)[:3] == (6, 48, 32)
    with av.open(io.BytesIO(data)) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(io.BytesIO(media.data)) as container:
        moved = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert (np.stack(shown) == np.stack(moved)).all()
    assert media == prepare(data, kind, PLAIN), "the same bytes every time"


def test_a_turned_clip_stays_turned() -> None:
    upright, turned = (prepare(clip("mov", rotation=degrees), "mov", PLAIN).data for degrees in (0, 90))
    assert scan_clip(turned)[1:3] == (32, 48)
    plain, other = (decode_clip(data, range(1), 32, 32)[0] for data in (upright, turned))
    assert (plain.rot90(1, (1, 2)) - other).abs().max() < 0.05 or (plain.rot90(-1, (1, 2)) - other).abs().max() < 0.05


def test_clips_are_filtered_by_frames_and_shape() -> None:
    data = encode_mp4(FRAMES, 8)
    assert prepare(data, "mp4", PackConfig(min_frames=6, min_side=32)).data == data
    assert reason(data, "mp4", PackConfig(min_frames=7)) == "too few frames: 6, expected at least 7"
    assert reason(data, "mp4", PackConfig(min_side=33)).startswith("too small: 48 x 32")


@pytest.mark.parametrize(("extension", "data"), [
    ("mp4", clip("mp4")[:-300]),
    ("mov", clip("mov")[:100]),
    ("avi", b"RIFF\xff\xff\xff\xffAVI LIST"),
    ("avi", b"#EXTM3U\nfile:///etc/passwd\n"),
    ("mov", clip("mov", "prores_ks")),
    ("webm", b""),
])  # fmt: skip
def test_what_is_no_sound_clip_has_a_reason(extension: str, data: bytes) -> None:
    assert reason(data, extension).startswith("broken clip: ")


@pytest.mark.parametrize(("data", "kind"), [
    (clip("mp4"), "mp4"), (clip("mov"), "mov"), (clip("matroska"), "mkv"), (clip("avi", "mpeg4"), "avi"),
    (saved(PICTURE, "AVIF"), "png"), (saved(PICTURE, "JPEG"), "png"), (saved(PICTURE, "WEBP"), "png"),
])  # fmt: skip
def test_bytes_without_a_name_are_told_apart(data: bytes, kind: str) -> None:
    assert kind_of(data) == kind
    assert prepare(data, kind_of(data), PLAIN)


@pytest.mark.parametrize(("option", "value"), [
    ("format", "gif"), ("animated", "all"), ("caption_from", "web"), ("labels_from", "name"), ("background", "no"),
    ("max_side", 0), ("min_side", 0), ("max_aspect", 0.5), ("min_frames", 0), ("samples_per_shard", 0),
    ("shard_mib", 0), ("max_caption", 0),
])  # fmt: skip
def test_options_out_of_range_are_named(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{option}: "):
        PackConfig(**{option: value})
    with pytest.raises(ValueError, match="max_side: 5 is below min_side, 6"):
        PackConfig(max_side=5, min_side=6)
