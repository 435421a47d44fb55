"""Trains the small classifiers whose features the Fréchet distance of the built-in data compares.

    python recipes/shapes/make_classifier.py dydit_scale/evaluation/weights

writes pictures.safetensors and clips.safetensors (fp16). Each is asked of a scene, drawn with or without a class,
whether there is an object of such a colour and shape (48 questions), and whether one of such a colour stands in such a
ninth of the picture (72), or moves in such a way (56). That of clips takes over the convolutions of the pictures', so
they run once over each frame. Hardware: one CPU core, under 5 minutes for both.
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


def train(
    kind: str, seer: SceneClassifier | None = None, *, samples: int, steps: int, batch: int = 64, lr: float = 3e-3
) -> SceneClassifier:
    """A classifier of "pictures" or "clips"; prints how often its answers to new scenes are right.

    With the convolutions of ``seer`` the rest is trained alone.
    """
    frames, answers = draw_samples(kind, samples + TESTED)
    torch.manual_seed(SEED)
    network = SceneClassifier(KINDS[kind][1], answers.shape[1])
    if seer is not None:
        network.see.load_state_dict(seer.see.state_dict())
        network.see.requires_grad_(False)
        frames = look(network, frames)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in (bar := tqdm(range(steps), desc=f"training on {kind}", unit="step")):
        chosen = TESTED + torch.randint(samples, (batch,))
        loss = nn.functional.binary_cross_entropy_with_logits(answer(network, frames[chosen]), answers[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    network.eval()
    with torch.inference_mode():
        right = (answer(network, frames[:TESTED]) > 0) == (answers[:TESTED] > 0.5)
    shares = right.float().mean().item(), right.all(1).float().mean().item()
    print(f"{kind}: {shares[0]:.4f} of the answers are right, {shares[1]:.3f} of the scenes have all of theirs right")
    return network


@torch.no_grad()
def look(network: SceneClassifier, frames: Tensor) -> Tensor:
    """What the convolutions give, fp16 [samples, frames, ...]."""
    parts = tqdm(frames.split(128), desc="looking at the frames", unit="batch")
    seen = torch.cat([network.see(scaled(part).flatten(0, 1)).half() for part in parts])
    return seen.unflatten(0, (len(frames), -1))


def answer(network: SceneClassifier, frames: Tensor) -> Tensor:
    """Logits of frames, uint8, or of what the convolutions gave of them."""
    if frames.dtype == torch.uint8:
        return network(scaled(frames))
    return network.answer(network.features_of_seen(frames.float().flatten(0, 1)))


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
    parser.add_argument("--samples", type=int, default=24_000, help="scenes to train on")
    options = parser.parse_args()
    of_pictures = train("pictures", samples=options.samples, steps=4_000)
    save(of_pictures, options.out / "pictures.safetensors")
    of_clips = train("clips", of_pictures, samples=options.samples, steps=6_000)
    save(of_clips, options.out / "clips.safetensors")
