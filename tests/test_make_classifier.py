"""The script that trains the classifiers of the built-in data, and the weights that it left in the package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from dydit_scale.evaluation import classifier

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_classifier", ROOT / "recipes/shapes/make_classifier.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["pictures", "clips"])
def test_it_writes_what_the_package_loads(
    script: ModuleType, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "TESTED", 8)
    seer = classifier.load_classifier("pictures") if kind == "clips" else None
    network = script.train(kind, seer, samples=16, steps=2, batch=4)
    if seer is not None:
        assert all(torch.equal(a, b) for a, b in zip(network.see.parameters(), seer.see.parameters(), strict=True))
    script.save(network, tmp_path / f"{kind}.safetensors")
    monkeypatch.setattr(classifier, "WEIGHTS", tmp_path)
    loaded = classifier.load_classifier.__wrapped__(kind)  # past its cache
    x = torch.rand(3, network.frames, 3, classifier.SIDE, classifier.SIDE)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.features(x), network.features(x), rtol=0.02, atol=0.02)  # stored in fp16
        seen = script.look(network, (x * 255).byte())
        torch.testing.assert_close(
            script.answer(network, seen), script.answer(network, (x * 255).byte()), rtol=0.02, atol=0.02
        )


@pytest.mark.parametrize("kind", ["pictures", "clips"])
def test_the_packages_classifiers_answer_as_they_were_taught(script: ModuleType, kind: str) -> None:
    path = classifier.WEIGHTS / f"{kind}.safetensors"
    assert path.stat().st_size < 200_000
    frames, answers = script.draw_samples(kind, 64)  # kept back in training
    network = classifier.load_classifier(kind)
    with torch.inference_mode():
        right = (network(script.scaled(frames)) > 0) == (answers > 0.5)
    assert right.float().mean() > 0.98
    held = network.features(script.scaled(frames)).double().numpy()
    assert np.abs(held.mean(0)).max() < 0.6 and held.std(0).min() > 0.6 and held.std(0).max() < 1.5
