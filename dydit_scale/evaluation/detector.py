"""What is to be seen in a photograph: an instance segmentation model from a local folder, and colours by CLIP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dydit_scale.evaluation.clip import Clip
from dydit_scale.evaluation.geneval import COLOUR_TEXTS, COLOURS, THRESHOLD, Detected

BLANK = (0x99, 0x99, 0x99)
"""Colour that CLIP sees in place of what is not the object."""
NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "mouse": "computer mouse",
    "pottedplant": "potted plant",
    "remote": "tv remote",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""GenEval's names of COCO's classes, where models call them otherwise."""


class Detector:
    """A Mask2Former (or other universal segmentation model of transformers) with its processor, loaded from ``folder``
    without going online.

    Raises ValueError if the folder holds no such model.
    """

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

        try:
            model = AutoModelForUniversalSegmentation.from_pretrained(folder, local_files_only=True)
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder}: no instance segmentation model with its processor ({error})") from error
        self.model, self.device = model.eval().to(device), device
        self.names = {label: NAMES.get(name, name) for label, name in self.model.config.id2label.items()}

    def check_names(self, wanted: Iterable[str]) -> None:
        """ValueError if it does not know all of the classes ``wanted``."""
        if missing := sorted(set(wanted) - set(self.names.values())):
            raise ValueError(
                f"detector: does not know {', '.join(missing[:5])} ({len(missing)} of the prompts' classes); "
                "take a model trained on COCO's instances"
            )

    @torch.inference_mode()
    def detect(self, picture: np.ndarray) -> list[Detected]:
        """The objects in ``picture`` (uint8 [height, width, 3]) that are certain enough to count anywhere."""
        inputs = self.processor(images=Image.fromarray(picture), return_tensors="pt").to(self.device)
        outputs = self.model(**inputs)
        (found,) = self.processor.post_process_instance_segmentation(
            outputs, threshold=THRESHOLD, target_sizes=[picture.shape[:2]], return_binary_maps=True
        )
        if not found["segments_info"]:
            return []
        pairs = zip(found["segmentation"].cpu().numpy() > 0.5, found["segments_info"], strict=True)
        return [Detected(self.names[info["label_id"]], info["score"], box_of(mask), mask) for mask, info in pairs]


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the pixels of ``mask`` [height, width], of which there is one at least."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def colours_of(clip: Clip, picture: np.ndarray, things: Sequence[Detected], name: str) -> list[str]:
    """The colour, of GenEval's ten, of each of ``things`` of class ``name``, cut out of ``picture``."""
    cut = [cut_out(picture, thing) for thing in things]
    texts = [[text.format(colour=colour, name=name) for text in COLOUR_TEXTS] for colour in COLOURS]
    return [COLOURS[place] for place in clip.best_of(cut, texts)]


def cut_out(picture: np.ndarray, thing: Detected) -> Image.Image:
    """The object alone on grey, cropped to its box."""
    pixels = np.where(thing.mask[..., None], picture, np.array(BLANK, np.uint8))
    return Image.fromarray(pixels).crop(thing.box)
