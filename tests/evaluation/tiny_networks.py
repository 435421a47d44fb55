"""Small networks with random weights, in folders and files as users have the published ones."""

from __future__ import annotations

import string
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)
from transformers.models.mask2former import modeling_mask2former

from dydit_scale.evaluation.inception import InceptionFeatures

CLASSES = ("dog", "aeroplane", "tie")


def write_clip(folder: Path) -> Path:
    """A CLIP that reads letters and pictures of 16 pixels."""
    torch.manual_seed(0)
    letters = [*string.ascii_lowercase, "-"]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[], model_max_length=20)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config=small | ends | {"vocab_size": len(words), "max_position_embeddings": 20},
        vision_config=small | {"image_size": 16, "patch_size": 4},
        projection_dim=24,
    )
    model = CLIPModel(config)
    with torch.no_grad():
        model.visual_projection.weight.neg_()  # so that pictures and texts fit at all: other scores count as 0
    model.save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


class NoLoss(nn.Module):
    """Stands in for Mask2Former's loss where nothing is trained."""

    def __init__(self, config: Mask2FormerConfig, **_: object) -> None:
        super().__init__()
        self.num_labels, self.eos_coef = config.num_labels, 1.0
        self.empty_weight = nn.Buffer(torch.ones(config.num_labels + 1))


def do_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask2Former makes its loss, which needs SciPy, even where nothing is trained; where there is none, it goes
    without."""
    if find_spec("scipy") is None:
        monkeypatch.setattr(modeling_mask2former, "Mask2FormerLoss", NoLoss)


def write_detector(folder: Path, *, sees: str = "dog") -> Path:
    """A Mask2Former of three classes that takes whatever it sees for one of them."""
    torch.manual_seed(0)
    stages = {"depths": [1] * 4, "num_heads": [1] * 4, "out_features": [f"stage{n}" for n in (1, 2, 3, 4)]}
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(image_size=64, embed_dim=8, window_size=2, **stages),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, dim_feedforward=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=3, id2label=dict(enumerate(CLASSES)),
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.bias[CLASSES.index(sees)] = 9
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}, size_divisor=32).save_pretrained(folder)
    return folder


class TinyI3D(nn.Module):
    """Twelve features of clips, called as the I3D is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(3, 12, 3, stride=2)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert rescale and resize and return_features
        return torch.tanh(self.conv(x / 127.5 - 1)).mean([2, 3, 4])


def write_i3d(path: Path) -> Path:
    torch.jit.script(TinyI3D()).save(str(path))
    return path


class TinyInception(nn.Module):
    """Stands in for the network of FID: few features, of a few pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, stride=2).requires_grad_(False)

    def forward(self, pictures: Tensor) -> InceptionFeatures:
        x = torch.tanh(self.conv(pictures.float() / 127.5 - 1))
        return InceptionFeatures(x.mean((2, 3)), x[:, :2, :2, :2].flatten(1), 9 * x.amax((2, 3)))
