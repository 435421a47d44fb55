"""Bytes to tensors: exact values, upright and centred pictures, and no work for what is not allowed."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

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


def empty_png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


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
        decode_image(empty_png(width, 8192))
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


def test_labels() -> None:
    assert [decode_label(text) for text in (b"0", b" 17\n", b"007", str(MAX_LABEL).encode())] == [0, 17, 7, MAX_LABEL]
    for text in (b"", b"cat", b"1.0", b"1 2", b"+1", "٣".encode(), b"0x1", b"1" * 40):
        with pytest.raises(BadSampleError, match=r"broken label: the \.cls holds"):
            decode_label(text)
    for text in (b"-1", str(MAX_LABEL + 1).encode()):
        with pytest.raises(BadSampleError, match=f"label {text.decode()}, expected a class number from 0"):
            decode_label(text)


def test_fields() -> None:
    assert decode_fields(b'{"caption": " a cat ", "label": 3, "url": 1}') == ("a cat", 3)
    assert decode_fields(b'{"caption": null}') == decode_fields(b'["caption"]') == (None, None)
    for label in ("true", "1.5", '"3"', "[1]"):
        with pytest.raises(BadSampleError, match='no integer under "label"'):
            decode_fields(b'{"label": %s}' % label.encode())
    with pytest.raises(BadSampleError, match="label -2, expected"):
        decode_fields(b'{"label": -2}')
    with pytest.raises(BadSampleError, match='no string under "caption"'):
        decode_fields(b'{"caption": 1, "label": 2}')
