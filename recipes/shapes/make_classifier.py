"""Trains the small classifiers whose features the Fréchet distance of the built-in data compares.

    python recipes/shapes/make_classifier.py dydit_scale/evaluation/weights

writes pictures.safetensors and clips.safetensors (fp16). Each is asked of a scene, drawn with or without a class,
whether there is an object of such a colour and shape (48 questions), and whether one of such a colour stands in such a
ninth of the picture (72), or moves in such a way (56). Hardware: one CPU core, 5 minutes for both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from dydit_scale.data.shapes.language import COLOURS, SHAPES
from dydit_scale.data.shapes.motion import MOTIONS, draw_motion, make_class_motion, make_motion
from dydit_scale.data.shapes.scene import draw, make_class_scene, make_scene
from dydit_scale.evaluation.classifier import FRAMES, SIDE, SceneClassifier, prepare

SEED = 20
"""Of the scenes; evaluations draw theirs with others."""
TESTED = 1024
"""Scenes that are kept back."""
LABELLED = 0.25
"""Share of scenes of classes."""
SMALL = 0.5
"""Share of clips that are drawn at half the side, as the recipes of classes have them."""
CELLS = 3
"""The picture's rows and columns of places."""

Sample = tuple[np.ndarray, set[tuple[str, ...]]]


def picture(number: int) -> Sample:
    """uint8 [SIDE, SIDE, 3], and what holds of it."""
    labelled = number % round(1 / LABELLED) == 0
    scene = make_class_scene(SEED, number)[0] if labelled else make_scene(SEED, number)
    facts = {(o.colour, o.shape) for o in scene.objects}
    return draw(scene, SIDE), facts | {(o.colour, f"{int(o.x * CELLS)} {int(o.y * CELLS)}") for o in scene.objects}


def clip(number: int) -> Sample:
    """uint8 [FRAMES, side, side, 3], and what holds of it."""
    labelled = number % round(1 / LABELLED) == 0
    scene = make_class_motion(SEED, number)[0] if labelled else make_motion(SEED, number)
    facts = {(m.start.colour, m.start.shape) for m in scene.movers} | {(m.start.colour, m.motion) for m in scene.movers}
    side = SIDE // 2 if number % 8 < 8 * SMALL else SIDE
    return draw_motion(scene, side, FRAMES), facts


PLACES = [f"{x} {y}" for x in range(CELLS) for y in range(CELLS)]
KINDS = {"pictures": (picture, 1, [*SHAPES, *PLACES]), "clips": (clip, FRAMES, [*SHAPES, *MOTIONS])}


def draw_samples(kind: str, samples: int) -> tuple[Tensor, Tensor]:
    """Frames uint8 [samples, frames, 3, SIDE, SIDE], and answers fp32 [samples, questions]."""
    make, _, words = KINDS[kind]
    questions = [(colour, word) for colour in COLOURS for word in words]
    pairs = [make(number) for number in tqdm(range(samples), desc=f"drawing {kind}", unit="scene")]
    frames = torch.cat([((prepare(pixels[None]) + 1) * 127.5).round().byte() for pixels, _ in pairs])
    answers = torch.tensor([[q in facts for q in questions] for _, facts in pairs], dtype=torch.float32)
    return frames, answers


def train(kind: str, *, samples: int, steps: int, batch: int = 64, lr: float = 3e-3) -> SceneClassifier:
    """A classifier of "pictures" or "clips"; prints how often all its answers to new scenes are right."""
    frames, answers = draw_samples(kind, samples + TESTED)
    torch.manual_seed(SEED)
    network = SceneClassifier(KINDS[kind][1], answers.shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in (bar := tqdm(range(steps), desc=f"training on {kind}", unit="step")):
        chosen = TESTED + torch.randint(samples, (batch,))
        logits = network(scaled(frames[chosen]))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, answers[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    network.eval()
    with torch.inference_mode():
        right = (network(scaled(frames[:TESTED])) > 0) == (answers[:TESTED] > 0.5)
    print(
        f"{kind}: {right.float().mean():.4f} of the answers right, {right.all(1).float().mean():.3f} all of a scene's"
    )
    return network


def scaled(frames: Tensor) -> Tensor:
    return frames.float() / 127.5 - 1


def save(network: SceneClassifier, path: Path) -> None:
    """In fp16, without the count of batches."""
    state = {name: v.half().contiguous() for name, v in network.state_dict().items() if v.is_floating_point()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the classifiers of the built-in data.")
    parser.add_argument("out", type=Path, help="folder for pictures.safetensors and clips.safetensors")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--samples", type=int, default=24_000, help="scenes to train on")
    parser.add_argument("--steps", type=int, default=4_000)
    options = parser.parse_args()
    for name in options.kinds:
        save(train(name, samples=options.samples, steps=options.steps), options.out / f"{name}.safetensors")
