"""The Inception network of FID and its kin: that of 2015, whose TensorFlow graph their published values come from.

It differs from torchvision's in its 1,008 outputs, in the pooling of its last blocks and in how it scales pictures. The
names are those of the weights' conversion that torch-fidelity distributes. That library is not used itself: it needs a
torchvision built for the very build of torch, unpickles the weights, and fetches them by itself where none are named.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

INPUT_SIDE = 299
OUTPUTS = 1008
SPATIAL_CHANNELS = 7
"""How many channels of mixed_6's first convolution the spatial features are (Nash et al., 2021, arXiv:2103.03841, as in
ADM's evaluation suite)."""


class InceptionFeatures(NamedTuple):
    """What the metrics compare, fp32."""

    pool: Tensor
    """[n, 2048], for FID, precision and recall."""
    spatial: Tensor
    """[n, 2023], for sFID."""
    logits: Tensor
    """[n, 1008], without the last layer's bias, for the Inception Score."""


class BasicConv2d(nn.Module):
    """Convolution, normalisation, ReLU."""

    def __init__(self, channels: int, out: int, kernel: int | tuple[int, int], *, stride: int = 1, same: bool = True):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same else (0, 0)
        self.conv = nn.Conv2d(channels, out, (height, width), stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _mean_of_neighbours(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_of_neighbours(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class InceptionA(nn.Module):
    """35 x 35."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(channels, 64, 1)
        self.branch5x5_1 = BasicConv2d(channels, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5)
        self.branch3x3dbl_1 = BasicConv2d(channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3)
        self.branch_pool = BasicConv2d(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        fives = self.branch5x5_2(self.branch5x5_1(x))
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), fives, threes, self.branch_pool(_mean_of_neighbours(x))], 1)


class InceptionB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = BasicConv2d(channels, 384, 3, stride=2, same=False)
        self.branch3x3dbl_1 = BasicConv2d(channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), threes, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionC(nn.Module):
    """17 x 17."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(768, 192, 1)
        self.branch7x7_1 = BasicConv2d(768, inner, 1)
        self.branch7x7_2 = BasicConv2d(inner, inner, (1, 7))
        self.branch7x7_3 = BasicConv2d(inner, 192, (7, 1))
        self.branch7x7dbl_1 = BasicConv2d(768, inner, 1)
        self.branch7x7dbl_2 = BasicConv2d(inner, inner, (7, 1))
        self.branch7x7dbl_3 = BasicConv2d(inner, inner, (1, 7))
        self.branch7x7dbl_4 = BasicConv2d(inner, inner, (7, 1))
        self.branch7x7dbl_5 = BasicConv2d(inner, 192, (1, 7))
        self.branch_pool = BasicConv2d(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        sevens = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        doubled = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        doubled = self.branch7x7dbl_5(self.branch7x7dbl_4(doubled))
        return torch.cat([self.branch1x1(x), sevens, doubled, self.branch_pool(_mean_of_neighbours(x))], 1)


class InceptionD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = BasicConv2d(768, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2, same=False)
        self.branch7x7x3_1 = BasicConv2d(768, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        sevens = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), sevens, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionE(nn.Module):
    """8 x 8; the last of its kind takes maxima where the others take means."""

    def __init__(self, channels: int, *, last: bool) -> None:
        super().__init__()
        self.pool = _max_of_neighbours if last else _mean_of_neighbours
        self.branch1x1 = BasicConv2d(channels, 320, 1)
        self.branch3x3_1 = BasicConv2d(channels, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3))
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1))
        self.branch3x3dbl_1 = BasicConv2d(channels, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3))
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1))
        self.branch_pool = BasicConv2d(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        threes = self.branch3x3_1(x)
        doubled = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        threes = torch.cat([self.branch3x3_2a(threes), self.branch3x3_2b(threes)], 1)
        doubled = torch.cat([self.branch3x3dbl_3a(doubled), self.branch3x3dbl_3b(doubled)], 1)
        return torch.cat([self.branch1x1(x), threes, doubled, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """Pictures in, features out (Szegedy et al., 2015, arXiv:1512.00567)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, same=False)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(128)
        self.Mixed_6c = InceptionC(160)
        self.Mixed_6d = InceptionC(160)
        self.Mixed_6e = InceptionC(192)
        self.Mixed_7a = InceptionD()
        self.Mixed_7b = InceptionE(1280, last=False)
        self.Mixed_7c = InceptionE(2048, last=True)
        self.fc = nn.Linear(2048, OUTPUTS)

    def forward(self, pictures: UInt8[Tensor, "batch 3 height width"]) -> InceptionFeatures:
        x = (resize(pictures.float(), INPUT_SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [batch, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # [batch, 192, 71, 71]
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # [batch, 288, 35, 35]
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # [batch, 768, 17, 17]
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS]  # the graph's mixed_6/conv
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [batch, 2048, 8, 8]
        pool = x.mean((2, 3))
        return InceptionFeatures(pool, rearrange(spatial, "b c h w -> b (h w c)"), pool @ self.fc.weight.T)


def resize(x: Float[Tensor, "batch channels height width"], side: int) -> Float[Tensor, "batch channels side side"]:
    """Bilinear as TensorFlow 1 had it: without smoothing, pixels stand at the corners of their cells, not in the
    middle."""
    for dim in (-2, -1):
        size = x.shape[dim]
        at = torch.arange(side, device=x.device) * (size / side)
        low = at.long()
        high = (low + 1).clamp(max=size - 1)
        weight = (at - low).to(x.dtype)
        weight = weight[:, None] if dim == -2 else weight
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x


def load_inception(path: Path) -> Inception:
    """The network with the weights of ``path``: torch-fidelity's .pth (read without unpickling), or .safetensors.

    Raises ValueError if the file is not that.
    """
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    # The readers raise a dozen types on other files.
    except Exception as error:
        raise ValueError(f"{path}: cannot read weights ({type(error).__name__}: {error})") from error
    network = Inception()
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()} if isinstance(state, dict) else {}
    if wrong := [name for name in wanted if found.get(name) != wanted[name] and not name.endswith("batches_tracked")]:
        name = wrong[0]
        raise ValueError(
            f"{path}: not the weights of the Inception network of 2015: {name} should be {list(wanted[name])}, "
            f"is {list(found[name]) if name in found else 'missing'} ({len(wrong)} tensors differ)"
        )
    network.load_state_dict({name: value for name, value in state.items() if name in wanted}, strict=False)
    return network.eval().requires_grad_(False)
