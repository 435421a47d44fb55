"""Bytes to tensors: exact values, upright and centred pictures, and no work for what is not allowed."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dydit_scale.data.decode import (
    MAX_LABEL,
    MAX_PIXELS,
    BadSampleError,
    decode_caption,
    decode_fields,
    decode_image,
    decode_label,
    image_tensor,
)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    """A PNG of RGB (or another colour type); without rows it claims a size and holds no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_pixels_of_the_right_size_are_exact() -> None:
    values = np.random.RandomState(0).randint(0, 256, (4, 4, 3), dtype=np.uint8)
    values[0, 0] = (0, 255, 51)
    tensor = image_tensor(decode_image(encoded(Image.fromarray(values), "PNG")), 4, 4)
    assert (tensor.shape, tensor.dtype) == ((3, 4, 4), torch.float32)
    assert torch.allclose(tensor[:, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
    assert torch.equal(
        ((tensor + 1) * 127.5).round().to(torch.uint8), torch.from_numpy(values.transpose(2, 0, 1).copy())
    )


@pytest.mark.parametrize("upright", [False, True])
def test_other_sizes_are_resized_and_cropped_at_the_centre(upright: bool) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 96)[None, :, None], (48, 96, 3)).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(ramp.transpose(1, 0, 2) if upright else ramp))
    tensor = image_tensor(image, 16, 16)
    expected = image.resize((16, 32) if upright else (32, 16), Image.Resampling.BICUBIC)
    expected = expected.crop((0, 8, 16, 24) if upright else (8, 0, 24, 16))
    want = torch.from_numpy(np.array(expected, dtype=np.float32).transpose(2, 0, 1).copy()) / 127.5 - 1
    assert tensor.shape == (3, 16, 16)
    assert torch.allclose(tensor, want, atol=1.01 / 127.5)


@pytest.mark.parametrize(
    ("size", "resized", "box"),
    [
        ((96, 48), (32, 16), (10, 0, 22, 16)),
        ((48, 96), (12, 24), (0, 4, 12, 20)),
        ((60, 80), (12, 16), (0, 0, 12, 16)),
        ((61, 80), (12, 16), (0, 0, 12, 16)),
    ],
)
def test_rectangles_are_covered(size: tuple[int, int], resized: tuple[int, int], box: tuple[int, ...]) -> None:
    """At 16 x 12, as resizing the whole and cropping its centre would do."""
    ramp = np.linspace(0, 255, size[0])[None, :, None] * 0.5 + np.linspace(0, 127, size[1])[:, None, None]
    image = Image.fromarray(np.broadcast_to(ramp, (size[1], size[0], 3)).astype(np.uint8))
    expected = np.asarray(image.resize(resized, Image.Resampling.BICUBIC).crop(box), dtype=np.float32)
    tensor = image_tensor(image, 16, 12)
    assert tensor.shape == (3, 16, 12)
    assert np.abs((tensor.numpy().transpose(1, 2, 0) + 1) * 127.5 - expected).max() < 2.5


def test_no_size_breaks_the_crop() -> None:
    for number in range(300):
        width, height, to_width, to_height = np.random.RandomState(number).randint(1, [400, 400, 40, 40])
        assert image_tensor(Image.new("RGB", (width, height)), to_height, to_width).shape == (3, to_height, to_width)


def test_small_pictures_and_strips_are_enlarged() -> None:
    assert image_tensor(Image.new("RGB", (3, 5), (255, 255, 255)), 8, 8).eq(1).all()
    assert image_tensor(Image.new("RGB", (1, 50_000)), 64, 64).shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("RGB", "WEBP")]
)
def test_modes_become_rgb(mode: str, kind: str) -> None:
    image = Image.new("RGB", (8, 8), (204, 204, 204)).convert(mode)
    tensor = image_tensor(decode_image(encoded(image, kind)), 8, 8)
    assert torch.allclose(tensor, torch.tensor(204 / 127.5 - 1).expand(3, 8, 8), atol=0.05)


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (16, 8), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(image, "JPEG", exif=exif)).size == (8, 16)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_with_a_broken_exif_block_lie_as_they_are(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = exif.tobytes()
    # Cut off, no TIFF, an offset beyond the end, and an orientation that is no number from 1 to 8.
    broken = [
        whole[:-6],
        b"Exif\0\0garbage!",
        whole[:10] + b"\xff" * 4 + whole[14:],
        whole.replace(b"\0\6\0", b"\0\x63\0"),
    ]
    for data in broken:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert decode_image(encoded(Image.new("RGB", (16, 8)), kind, exif=data)).size == (16, 8)


def test_every_orientation_is_that_of_pillow() -> None:
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 16, 3), dtype=np.uint8))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(image, "PNG", exif=exif)
        assert decode_image(data).tobytes() == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).tobytes()


def test_of_sixteen_bits_the_high_eight_are_kept() -> None:
    values = np.random.RandomState(0).randint(0, 1 << 16, (4, 6, 3)).astype(np.uint16)
    grey = decode_image(encoded(Image.fromarray(values[..., 0]), "PNG"))
    assert (np.asarray(grey) == (values[..., :1] >> 8)).all()
    colours = decode_image(png(6, 4, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)))
    assert (np.asarray(colours) == (values >> 8)).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_picture_is_taken(kind: str) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 255, 0))
    data = encoded(first, kind, save_all=True, append_images=[second], duration=100)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    red, green, blue = decode_image(data).getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(BadSampleError, match="no PNG, JPEG or WebP picture"):
        decode_image(encoded(Image.new("RGB", (4, 4)), kind))


@pytest.mark.parametrize("width", [MAX_PIXELS // 8192 + 1, 12_000, 40_000])
def test_large_pictures_are_refused_before_they_are_loaded(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(image: Image.Image) -> None:
        raise AssertionError("pixels were loaded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", loaded)
    with warnings.catch_warnings(record=True) as leaked, pytest.raises(BadSampleError, match=r"limit of \d+"):
        warnings.simplefilter("always")
        decode_image(png(width, 8192))
    assert leaked == [], "Pillow only warned about a picture that should have been refused"


@pytest.mark.parametrize("cut", [0, 10, 60, 200])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_cut_pictures_are_bad_samples(kind: str, cut: int) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8)
    with pytest.raises(BadSampleError, match="broken image"):
        decode_image(encoded(Image.fromarray(noise), kind)[:cut])


def test_captions() -> None:
    assert decode_caption("  grün\n".encode()) == "grün"
    with pytest.raises(BadSampleError, match="broken caption"):
        decode_caption(b"\xff")
    for decode, data in ((decode_caption, bytes(20)), (decode_fields, b'{"caption": "a\\u0000"}')):
        with pytest.raises(BadSampleError, match=r"broken caption .zero bytes."):
            decode(data)


def test_labels() -> None:
    assert [decode_label(text) for text in (b"0", b" 17\n", b"007", str(MAX_LABEL).encode())] == [0, 17, 7, MAX_LABEL]
    for text in (b"", b"cat", b"1.0", b"1 2", b"+1", "٣".encode(), b"0x1", b"1" * 40):
        with pytest.raises(BadSampleError, match=r"broken label: the \.cls holds"):
            decode_label(text)
    for text in (b"-1", str(MAX_LABEL + 1).encode()):
        with pytest.raises(BadSampleError, match=f"label {text.decode()}, expected a class number from 0"):
            decode_label(text)


def test_fields() -> None:
    assert decode_fields(b'{"caption": " a cat ", "label": 3, "url": 1}') == (("a cat",), 3)
    assert decode_fields(b'{"caption": null}') == decode_fields(b'["caption"]') == ((), None)
    for label in ("true", "1.5", '"3"', "[1]"):
        with pytest.raises(BadSampleError, match='no integer under "label"'):
            decode_fields(b'{"label": %s}' % label.encode())
    with pytest.raises(BadSampleError, match="label -2, expected"):
        decode_fields(b'{"label": -2}')
    with pytest.raises(BadSampleError, match='no string under "caption"'):
        decode_fields(b'{"caption": 1, "label": 2}')
