"""The small classifiers of the built-in data, whose features its Fréchet distance compares.

One was trained on pictures, one, with the same convolutions, on clips, to say which objects are there, in which
colours, and where they stand or how they move (recipes/shapes/make_classifier.py).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 32
"""Pixels to which everything is scaled."""
FRAMES = 8
"""Of a clip; longer ones are thinned out evenly."""
DIM = 64
"""Width of the features."""
WEIGHTS = Path(__file__).parent / "weights"
_BATCH = 256


class SceneClassifier(nn.Module):
    """Convolutions over each frame, one linear layer over all of them, and one for the answers.

    Args:
        frames: 1 for pictures.
        answers: how many yes-or-no questions it was trained on.
    """

    def __init__(self, frames: int, answers: int) -> None:
        super().__init__()
        self.frames = frames
        self.see = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.SiLU(),
            nn.Flatten(),
        )  # fmt: skip
        self.frame = nn.Sequential(nn.Linear(32 * (SIDE // 8) ** 2, DIM), nn.SiLU())
        self.join = nn.Linear(frames * DIM, DIM)
        self.spread = nn.BatchNorm1d(DIM, affine=False)  # each feature has mean 0 and variance 1 over the real data
        self.answer = nn.Sequential(nn.SiLU(), nn.Linear(DIM, answers))

    def features(self, x: Tensor) -> Tensor:
        """Of frames from -1 to 1 [batch, frames, 3, SIDE, SIDE]: [batch, DIM]."""
        return self.features_of_seen(self.see(x.flatten(0, 1)))

    def features_of_seen(self, seen: Tensor) -> Tensor:
        """The same from what the convolutions give, [batch * frames, 32 * (SIDE / 8)²]."""
        return self.spread(self.join(rearrange(self.frame(seen), "(b f) d -> b (f d)", f=self.frames)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, answers] of frames as for ``features``."""
        return self.answer(self.features(x))


def features(pictures: np.ndarray) -> np.ndarray:
    """Features float64 [n, DIM] of pictures uint8 [n, height, width, 3], or clips uint8 [n, frames, height, width, 3].

    Each feature has about mean 0 and variance 1 over the built-in data; pictures and clips have different ones. Raises
    ValueError for another dtype or shape, and clips of fewer than 8 frames.
    """
    clips = pictures.ndim == 5
    if pictures.dtype != np.uint8 or pictures.ndim not in (4, 5) or pictures.shape[-1] != 3 or not pictures.size:
        raise ValueError(
            "features: expected pictures uint8 [n, height, width, 3] or clips uint8 [n, frames, height, width, 3], "
            f"got {pictures.dtype} {list(pictures.shape)}"
        )
    if clips and pictures.shape[1] < FRAMES:
        raise ValueError(f"features: expected clips of {FRAMES} frames or more, got {pictures.shape[1]}")
    network = load_classifier("clips" if clips else "pictures")
    with torch.inference_mode():
        parts = [network.features(prepare(pictures[i : i + _BATCH])) for i in range(0, len(pictures), _BATCH)]
    return torch.cat(parts).double().numpy()


def prepare(pictures: np.ndarray) -> Tensor:
    """Pictures or clips, uint8 as ``features`` takes them, as fp32 [n, 1 or FRAMES, 3, SIDE, SIDE] from -1 to 1."""
    clips = pictures[:, None] if pictures.ndim == 4 else pictures[:, _evenly(pictures.shape[1])]
    n, frames, *size, _ = clips.shape
    x = rearrange(torch.from_numpy(np.ascontiguousarray(clips)).float() / 127.5 - 1, "n f h w c -> (n f) c h w")
    if size != [SIDE, SIDE]:
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
    return rearrange(x, "(n f) c h w -> n f c h w", n=n, f=frames)


def _evenly(frames: int) -> np.ndarray:
    return np.linspace(0, frames - 1, FRAMES).round().astype(int)


@cache
def load_classifier(kind: str) -> SceneClassifier:
    """The classifier of "pictures" or "clips" that ships with the package, in fp32 on the CPU."""
    state = {name: value.float() for name, value in load_file(WEIGHTS / f"{kind}.safetensors").items()}
    answers = len(state["answer.1.bias"])
    network = SceneClassifier(1 if kind == "pictures" else FRAMES, answers)
    state["spread.num_batches_tracked"] = torch.tensor(0)  # of training alone
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)
