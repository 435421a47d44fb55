"""Files of pictures: the npz, and the blocks that it is made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dydit_scale.sampling.blocks import Blocks, DamagedBlockError, block_bytes
from dydit_scale.sampling.npz import write_npz
from tests.sampling.adm import read_member


def pictures(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape, 3), np.uint8)


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)])
def test_an_npz_is_as_described(tmp_path: Path, shape: tuple[int, ...]) -> None:
    expected, labels = pictures(7, *shape), np.arange(7, dtype=np.int64)
    blocks = (expected[i : i + 3] for i in range(0, 7, 3))
    assert write_npz(tmp_path / "a.npz", blocks, 7, labels) == (7, *shape, 3)
    assert (read_member(tmp_path / "a.npz", "arr_0") == expected).all()
    assert (read_member(tmp_path / "a.npz", "arr_1") == labels).all()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as loaded:
        assert loaded.files == ["arr_0", "arr_1"] and (loaded["arr_0"] == expected).all()
    write_npz(tmp_path / "b.npz", [expected], 7, labels)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    write_npz(tmp_path / "c.npz", [expected], 7)
    with np.load(tmp_path / "c.npz", allow_pickle=False) as loaded:
        assert loaded.files == ["arr_0"]


def test_too_few_pictures_are_no_npz(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="5 pictures came, 7 were announced"):
        write_npz(tmp_path / "a.npz", [pictures(5, 4, 6)], 7)


def test_blocks_share_the_pictures() -> None:
    blocks = Blocks(Path(), 4, 10)
    assert [list(blocks.numbers(n)) for n in range(len(blocks))] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_damaged_block_is_told(tmp_path: Path) -> None:
    blocks, expected = Blocks(tmp_path, 4, 10), pictures(2, 4, 6)
    data = block_bytes(expected)
    blocks.path(2).write_bytes(data)
    assert (blocks.read(2) == expected).all()
    changed = bytearray(data)
    changed[-1] ^= 1
    for wrong in (data[:-1], data[:20], b"", data + b"!", bytes(changed)):
        blocks.path(2).write_bytes(wrong)
        with pytest.raises(DamagedBlockError, match=r"block-000002\.safetensors: damaged"):
            blocks.read(2)
    blocks.path(1).write_bytes(data)
    with pytest.raises(DamagedBlockError, match="holds 2 pictures, expected 4"):
        blocks.read(1)
