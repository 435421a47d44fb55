"""A folder with the classes of the published pipeline, at toy size, from loading to a picture."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import CLIPTextModel, T5EncoderModel

from dydit_scale.data.reader import Batch
from dydit_scale.diffusion.flow import sample_noise
from dydit_scale.models.encoders import pack_latents
from dydit_scale.models.families.flux import FluxFamily
from dydit_scale.models.loading import load_pipeline, load_transformer
from dydit_scale.models.small import small_flux_pipeline
from dydit_scale.sampling.generate import SampleConfig, generate, sampler_timesteps
from dydit_scale.train.build import build_parts
from dydit_scale.train.objective import Objective
from dydit_scale.train.recipe import load_recipe
from tests.train.small_run import small_recipe

SIDE, TOKENS = 32, 64
CAPTIONS = ("a red ball", "")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1 dev's classes and settings; the transformer in several files."""
    folder = tmp_path_factory.mktemp("flux") / "base"
    pipe = small_flux_pipeline(
        ("a", "red", "ball"), heads=4, head_dim=8, double_blocks=1, single_blocks=2, guidance=True
    )
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=12, shift_factor=0.1159, scaling_factor=0.3611,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe.register_modules(vae=vae, scheduler=scheduler)
    pipe.save_pretrained(folder, max_shard_size="60KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    return folder


def test_a_folder_of_real_classes_is_encoded_trained_on_and_sampled(base: Path, tmp_path: Path) -> None:
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(small_recipe(tmp_path)))
    recipe = load_recipe(recipe_file, [f"model.base={base}", "supervision.kind=complete"])
    parts = build_parts(recipe)
    pipe, network = parts.pipeline, parts.network
    assert [type(m) for m in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2)] == [
        AutoencoderKL,
        CLIPTextModel,
        T5EncoderModel,
    ]
    loaded = {name.replace(".base_layer", ""): tensor for name, tensor in network.state_dict().items()}
    saved = load_transformer(str(base), FluxFamily()).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items()) and len(saved) > 50

    objective = Objective(recipe, network, pipe, parts.teacher, torch.device("cpu"))
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    positions = torch.tensor([0, 1])
    inputs = objective.prepare(Batch(positions, pixels, CAPTIONS, ("a", "b")), torch.tensor([0.2, 0.9]), seed=0)
    assert inputs.noisy.shape == (2, TOKENS, 48) and set(inputs.arguments) == {
        "hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids", "guidance",
    }  # fmt: skip
    latents = pipe.vae.encode(pixels).latent_dist
    posterior = sample_noise(0, positions, (12, SIDE // 2, SIDE // 2), "posterior")
    expected = pack_latents((latents.mean + latents.std * posterior - 0.1159) * 0.3611)
    clean = inputs.noisy - inputs.level[:, None, None] * (inputs.noise - inputs.x0)
    torch.testing.assert_close(clean, expected, atol=1e-5, rtol=1e-5)

    trainable = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    network.train()
    before = [p.detach().clone() for p in trainable]
    terms = objective.terms(network, inputs, positions, step=0)
    (terms.flow + terms.supervision + terms.ratio).mean().backward()
    optimizer.step()
    assert all(bool(term.isfinite().all()) for term in terms[:3]) and float(terms.ratio.detach().max()) < 1
    assert sum(not torch.equal(a, b) for a, b in zip(before, trainable, strict=True)) > 20
    assert all(p.grad is None for m in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2) for p in m.parameters())

    network.eval()
    config = SampleConfig(steps=2, height=SIDE, width=SIDE, text_tokens=12)
    masked = generate(pipe, CAPTIONS, config)
    network.pack(sampler_timesteps(pipe, config))
    assert (
        masked.shape == (2, SIDE, SIDE, 3) and np.abs(generate(pipe, CAPTIONS, config).astype(int) - masked).max() <= 1
    )


def test_the_parts_arrive_as_the_pipeline_of_diffusers_loads_them(base: Path) -> None:
    ours, theirs = load_pipeline(str(base), FluxFamily()), FluxPipeline.from_pretrained(base)
    assert ours.transformer is None
    with torch.no_grad():
        prompts = [
            p.encode_prompt(prompt=["a red ball"], prompt_2=None, max_sequence_length=12) for p in (ours, theirs)
        ]
    assert all(torch.equal(a, b) for a, b in zip(*prompts, strict=True))
    assert not any(p.requires_grad for p in ours.vae.parameters())


def test_a_missing_shard_is_named(base: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(base, tmp_path / "base")
    sorted((broken / "transformer").glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match="the file holds no such weight"):
        load_transformer(str(broken), FluxFamily())
