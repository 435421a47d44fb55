"""Real captioned pictures: Google's Noto emoji (Apache-2.0), fetched from the npm registry, never committed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import FluxPipeline
from PIL import Image

from benchmarks.evidence.sizes import ROOT
from dydit_scale.models.encoders import small_text_encoders
from dydit_scale.workflows.launch import call

PACKAGE = "emoji-datasource-google@15.1.2"
HELD_OUT = 10
"""Every so-manieth picture, by its name, is kept from training."""
_BACKGROUND = (255, 255, 255)


def pack_emoji(out: Path, *, held_out: bool) -> None:
    """Webdataset shards of the pictures to train on, or of those kept back, in ``out``.

    Raises ValueError where npm is missing or cannot fetch the package.
    """
    pictures = _pictures(out.parent)
    part = out.parent / f"{out.name}-pictures"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    chosen = _part(out.parent, held_out)
    for row in chosen:
        shutil.copy(pictures / row["file_name"], part)
    (part / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    call("dydit", "data", "pack", part, out, "--shuffle", "--samples-per-shard", "512")
    shutil.rmtree(part)


def _pictures(folder: Path) -> Path:
    """The unpacked set, fetched once."""
    pictures = folder / "pictures"
    if pictures.exists():
        return pictures
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"the emoji come from the npm registry, and there is no npm here; fetch {PACKAGE} elsewhere, unpack it "
            f"with recipes/emoji/unpack.py and put the folder at {pictures}, or leave the claim out: --skip emoji"
        )
    done = subprocess.run([npm, "pack", PACKAGE], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"npm pack {PACKAGE} failed: {done.stderr.strip()[-500:]}")
    new = folder / "pictures.new"
    shutil.rmtree(new, ignore_errors=True)
    call(Path(sys.executable).name, ROOT / "recipes/emoji/unpack.py", folder / done.stdout.split()[-1], new)
    return new.rename(pictures)


def write_emoji_base(shards: Path, out: Path) -> None:
    """The small FLUX with text encoders for the words of the emoji's captions, to be trained from random weights."""
    captions = [row["caption"] for row in _rows(shards.parent)]
    words = sorted({word for caption in captions for word in re.findall(r"\w+|[^\w\s]", caption)})
    pipeline: Any = FluxPipeline.from_pretrained(ROOT / "recipes/shapes/base")
    clip, clip_tokens, t5, t5_tokens = small_text_encoders(words)
    pipeline.register_modules(text_encoder=clip, tokenizer=clip_tokens, text_encoder_2=t5, tokenizer_2=t5_tokens)
    pipeline.save_pretrained(out)


def read_captions(folder: Path, count: int) -> list[str]:
    """Of ``count`` of the pictures kept back, or of as many as there are, in no order of subjects."""
    return [row["caption"] for row in _part(folder, held_out=True)][:count]


def real_emoji(folder: Path, side: int, *, held_out: bool = True) -> np.ndarray:
    """The pictures kept back, or the others, on white, uint8 [n, side, side, 3]."""
    return np.stack([_on_white(folder / "pictures" / row["file_name"], side) for row in _part(folder, held_out)])


def _on_white(file: Path, side: int) -> np.ndarray:
    picture = Image.open(file).convert("RGBA")
    sheet = Image.new("RGBA", picture.size, _BACKGROUND)
    return np.asarray(
        Image.alpha_composite(sheet, picture).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    )


def _part(folder: Path, held_out: bool) -> list[dict[str, str]]:
    """The rows kept from training, or the others, in no order of subjects."""
    numbered = [(zlib.crc32(row["file_name"].encode()), row) for row in _rows(folder)]
    return [row for number, row in sorted(numbered, key=lambda n: n[0]) if (number % HELD_OUT == 0) == held_out]


def _rows(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "pictures" / "metadata.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
