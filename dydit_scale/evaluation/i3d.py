"""The features of FVD (Unterthiner et al., 2019, arXiv:1812.01717): an I3D network as a TorchScript file.

It is called as StyleGAN-V's conversion of TensorFlow's network wants it, which scales the pixels and the pictures
itself.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

MIN_FRAMES = 10
"""Fewer do not last through the network's strides in time."""


def load_i3d(path: Path, device: str | torch.device = "cpu") -> torch.jit.ScriptModule:
    """The network of ``path``. Loading TorchScript runs code from the file: ask before. ValueError if it is none."""
    try:
        return torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{path}: cannot be loaded as TorchScript ({str(error).splitlines()[0]})") from error


@torch.inference_mode()
def video_features(network: torch.jit.ScriptModule, clips: np.ndarray, device: str | torch.device = "cpu") -> Tensor:
    """fp32 [n, 400] of clips uint8 [n, frames, height, width, 3].

    Raises ValueError if the network does not take them.
    """
    x = rearrange(torch.from_numpy(clips.copy()).to(device).float(), "n f h w c -> n c f h w")
    try:
        return network(x, rescale=True, resize=True, return_features=True).flatten(1).float().cpu()
    except RuntimeError as error:
        raise ValueError(
            f"i3d: the network does not take clips of {list(clips.shape[1:])} as (clips from 0 to 255 [n, 3, frames, "
            f"height, width], rescale=True, resize=True, return_features=True): {str(error).splitlines()[-1]}"
        ) from error
