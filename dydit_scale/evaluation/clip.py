"""CLIP from a local folder: how well pictures fit texts, and which of several texts fits a picture best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


class Clip:
    """A CLIPModel with its processor, loaded from ``folder`` without going online.

    Raises ValueError if the folder holds no such model.
    """

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor

        try:
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True).eval().to(device)
            self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder}: no CLIP model with its processor ({error})") from error
        self.device = device

    @torch.inference_mode()
    def embed_pictures(self, pictures: np.ndarray | Sequence[Image.Image]) -> Tensor:
        """Unit vectors [n, dim] of uint8 [n, height, width, 3], or of RGB pictures of any sizes."""
        images = [Image.fromarray(p) if isinstance(p, np.ndarray) else p for p in pictures]
        inputs = self.processor(images=images, return_tensors="pt").to(self.device)
        return F.normalize(self.model.get_image_features(**inputs).pooler_output.float(), dim=1).cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [n, dim]; a text is cut after as many tokens as the model reads (77 in OpenAI's)."""
        inputs = self.processor(text=list(texts), return_tensors="pt", padding=True, truncation=True).to(self.device)
        return F.normalize(self.model.get_text_features(**inputs).pooler_output.float(), dim=1).cpu()

    def scores(self, pictures: np.ndarray, texts: Sequence[str]) -> Tensor:
        """max(100 cos, 0) of each picture and its text (Hessel et al., 2021, arXiv:2104.08718; the factor is 100, as
        in torchmetrics), [n]."""
        return (100 * (self.embed_pictures(pictures) * self.embed_texts(texts)).sum(1)).clamp(min=0)

    def best_of(self, pictures: Sequence[Image.Image], choices: Sequence[Sequence[str]]) -> list[int]:
        """For each picture the place of the choice that fits best; a choice is several texts, whose vectors are
        averaged."""
        means = torch.stack([self.embed_texts(texts).mean(0) for texts in choices])
        return (self.embed_pictures(pictures) @ F.normalize(means, dim=1).T).argmax(1).tolist()
