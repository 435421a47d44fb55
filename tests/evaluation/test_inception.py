"""The Inception network of FID: its resize, its features, the files that it reads, and torch-fidelity's where that is
installed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dydit_scale.evaluation.inception import Inception, load_inception, resize


@pytest.fixture(scope="module")
def network() -> Inception:
    """With weights through which differences between pictures come."""
    torch.manual_seed(0)
    made = Inception().eval().requires_grad_(False)
    for module in made.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.7, 1.4)
    return made


def pictures(*size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=generator)


def test_it_scales_as_tensorflow_1_did() -> None:
    x = torch.tensor([[0.0, 8.0], [4.0, 12.0]])[None, None]
    found = resize(x, 4)[0, 0]
    assert found[0].tolist() == [0, 4, 8, 8]  # the corner stays; the border is repeated
    assert found[:, 0].tolist() == [0, 2, 4, 4]
    assert found[1, 1] == 6
    same = torch.rand(1, 3, 5, 5)
    assert torch.equal(resize(same, 5), same)
    assert torch.equal(resize(torch.arange(6.0).expand(1, 1, 6, 6), 3)[0, 0, 0], torch.tensor([0.0, 2.0, 4.0]))


def test_features_have_the_widths_of_the_metrics(network: Inception) -> None:
    found = network(pictures(20, 24))
    assert [tuple(f.shape) for f in found] == [(2, 2048), (2, 7 * 17 * 17), (2, 1008)]
    assert (found.spatial >= 0).all(), "behind the ReLU, as in the graph"
    torch.testing.assert_close(found.logits, found.pool @ network.fc.weight.T)
    assert (found.pool[0] - found.pool[1]).abs().mean() > 0.01 * found.pool.abs().mean()


def test_spatial_features_are_the_sixth_mixed_blocks_in_rows(network: Inception) -> None:
    kept = {}
    hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda *args: kept.update(x=args[-1]))
    found = network(pictures(16, 16)).spatial
    hook.remove()
    assert kept["x"].shape == (2, 192, 17, 17)
    assert torch.equal(found.unflatten(1, (17, 17, 7))[:, 3, 5], kept["x"][:, :7, 3, 5])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_are_read_back(network: Inception, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"inception{suffix}"
    state = network.state_dict()
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    loaded = load_inception(path)
    assert not loaded.training
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())


class Harm:
    def __reduce__(self) -> tuple:
        return os.mkdir, (Harm.path,)

    path = ""


def test_other_files_are_refused_and_none_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "inception.pth"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"inception\.pth: cannot read weights"):
        load_inception(path)
    Harm.path = str(tmp_path / "harm")
    torch.save({"fc.weight": Harm()}, path)
    with pytest.raises(ValueError, match="cannot read weights"):
        load_inception(path)
    assert not (tmp_path / "harm").exists()
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(ValueError, match=r"Conv2d_1a_3x3\.conv\.weight should be \[32, 3, 3, 3\], is missing"):
        load_inception(path)
    torch.save(Inception().state_dict() | {"fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(ValueError, match=r"fc\.weight should be \[1008, 2048\], is \[1000, 2048\] \(1 tensors"):
        load_inception(path)


OF_TORCH_FIDELITY = {
    (32, 40): ([[2.556732, 0.112315, 0.621866], [2.555222, 0.119318, 0.674873]],
               [[0.074927, -0.528328, -0.059505], [0.079913, -0.543792, -0.069083]]),
    (320, 299): ([[3.636892, 0.103253, 0.860270], [3.663579, 0.100031, 0.856242]],
                 [[0.073905, -0.656129, 0.173516], [0.066861, -0.640650, 0.159833]]),
}  # fmt: skip
"""What torch-fidelity 0.4.0 gives for the weights of ``numbered``: pool 0, 1023, 2047, and logits 0, 500, 1007."""


def numbered() -> dict[str, torch.Tensor]:
    """Weights from a stream that numpy has frozen (NEP 19)."""
    draw = np.random.RandomState(0)

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) > 1:
            return draw.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
        if name.endswith("num_batches_tracked"):
            return np.zeros(shape)
        low, high = {"running_var": (0.7, 1.4), "weight": (0.8, 1.2)}.get(name.split(".")[-1], (-0.2, 0.2))
        return draw.uniform(low, high, shape)

    state = Inception().state_dict()
    return {name: torch.as_tensor(values(name, tuple(x.shape))).to(x.dtype) for name, x in state.items()}


def test_values_are_torch_fidelitys() -> None:
    network = Inception().eval()
    network.load_state_dict(numbered())
    for size, (pool, logits) in OF_TORCH_FIDELITY.items():
        pixels = np.random.RandomState(1).randint(0, 256, (2, 3, *size), dtype=np.uint8)
        with torch.no_grad():
            found = network(torch.as_tensor(pixels))
        torch.testing.assert_close(found.pool[:, [0, 1023, 2047]], torch.tensor(pool), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.logits[:, [0, 500, 1007]], torch.tensor(logits), rtol=1e-4, atol=1e-4)


def test_it_is_torch_fidelitys_network(network: Inception, tmp_path: Path) -> None:
    library = pytest.importorskip("torch_fidelity", reason="needs torch-fidelity, and torchvision of torch's build")
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    theirs = library.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=tmp_path / "inception.pth"
    )
    for size in ((32, 40), (320, 299)):
        ours = network(pictures(*size))
        pool, logits = theirs(pictures(*size))
        torch.testing.assert_close(ours.pool, pool, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.logits, logits, rtol=1e-4, atol=1e-4)
