from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

import dydit_scale as dy
from dydit_scale.diffusion.flow import sample_noise
from dydit_scale.models.dit import DyDiTTransformer2DModel
from dydit_scale.models.family import SampleConfig
from dydit_scale.models.loading import family_of_base, load_pipeline, load_transformer
from dydit_scale.models.pipelines import ClassPipeline, DyDiTPipeline, SiTPipeline, dit_scheduler, guided
from dydit_scale.models.sit_scheduler import SAMPLERS, SDE_LAST_STEP, SiTScheduler
from dydit_scale.sampling.generate import generate
from tests.models.tiny import scramble
from tests.models.tiny_dit import CLASSES, SIDE, tiny_dit, tiny_dynamic

NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 4: "great white shark"}
DIT = {"in_channels": 4, "out_channels": 8, "num_layers": 2}
DDIM = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}


def tiny_vae() -> AutoencoderKL:
    """Two pixels a latent, with a scaling factor that is not 1."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.6,
    ).eval()


def tiny(kind: str = "dit", scheduler: Any = None, **static: Any) -> ClassPipeline:
    """A pipeline around a static model of two blocks."""
    pipeline, default = {"dit": (DyDiTPipeline, DDIMScheduler(**DDIM)), "sit": (SiTPipeline, SiTScheduler())}[kind]
    pipe = pipeline(tiny_dit(**{**DIT, **static}), tiny_vae(), scheduler or default)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(batch: int = 2, side: int = SIDE) -> Tensor:
    return sample_noise(0, torch.arange(batch), (4, side, side))


def run(pipe: ClassPipeline, labels: Any = (1, 3), **options: Any) -> Any:
    settings = {"num_inference_steps": 4, "output_type": "latent", "latents": drawn(len(labels)), **options}
    return pipe(labels, generator=torch.Generator().manual_seed(7), **settings).images


def calls(pipe: ClassPipeline) -> list[dict[str, Tensor]]:
    """A list that will hold what the transformer is called with."""
    seen: list[dict[str, Tensor]] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append({"x": args[0], **kwargs}), with_kwargs=True
    )
    return seen


# DiT


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pictures_are_those_of_diffusers_where_it_is_right(guidance: float) -> None:
    pipe = tiny(num_embeds_ada_norm=1000)
    theirs = DiTPipeline(pipe.transformer, pipe.vae, DDIMScheduler(**DDIM))
    theirs.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": guidance, "output_type": "np"}
    one = pipe([1, 999], generator=torch.Generator().manual_seed(3), **options).images
    two = theirs([1, 999], generator=torch.Generator().manual_seed(3), **options).images
    assert one.shape == (2, 2 * SIDE, 2 * SIDE, 3) and one.std() > 0.01
    assert abs(one - two).max() < 1e-5


@pytest.mark.parametrize("channels", [3, 4])
@torch.no_grad()
def test_a_step_of_guidance_is_the_originals(channels: int) -> None:
    pipe, x, t = tiny(), drawn(), torch.tensor([999])
    labels, null = torch.tensor([1, 3]), torch.tensor([CLASSES, CLASSES])
    outs = [pipe.transformer(x, timestep=t.expand(2), class_labels=y).sample[:, :4] for y in (labels, null)]
    noise = outs[1] + 2.5 * (outs[0] - outs[1])
    noise[:, channels:] = outs[0][:, channels:]
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    expected = (x - math.sqrt(1 - abar[999]) * noise) / math.sqrt(abar[999])
    scheduler = DDIMScheduler(**DDIM, timestep_spacing="trailing", set_alpha_to_one=True)  # one step, to the picture
    options = {"num_inference_steps": 1, "guidance_scale": 2.5}
    pipe.scheduler = scheduler
    seen = calls(pipe)
    found = run(pipe, guidance_channels=channels if channels < 4 else None, **options)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert seen[0]["class_labels"].tolist() == [1, 3, CLASSES, CLASSES]


def test_guidance_of_1_calls_the_transformer_with_one_branch() -> None:
    pipe = tiny()
    seen = calls(pipe)
    run(pipe, guidance_scale=1.0)
    assert [len(c["timestep"]) for c in seen] == [2] * 4
    assert all(c["class_labels"].tolist() == [1, 3] for c in seen)


def test_guided_leaves_the_other_channels_as_they_are_in_videos_too() -> None:
    for shape in ((2, 8, 3, 3), (2, 8, 5, 3, 3)):
        a, b = torch.randn(shape), torch.randn(shape)
        out = guided(a, b, 4.0, 3)
        torch.testing.assert_close(out[:, :3], b[:, :3] + 4 * (a[:, :3] - b[:, :3]))
        assert torch.equal(out[:, 3:], a[:, 3:])


@pytest.mark.parametrize("kind", [DDPMScheduler, DDPMParallelScheduler])
@torch.no_grad()
def test_ancestral_sampling_has_the_learned_variance(kind: type) -> None:
    pipe = tiny(scheduler=kind.from_config(dit_scheduler().config))
    generator = torch.Generator().manual_seed(7)
    x, labels = drawn().double(), torch.tensor([1, 3])
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    schedule = [999, 666, 333, 0]
    for t, before in zip(schedule, [*schedule[1:], None], strict=True):
        out = pipe.transformer(x.float(), timestep=torch.tensor([t, t]), class_labels=labels).sample.double()
        here, there = abar[t], abar[before] if before is not None else torch.tensor(1.0, dtype=torch.float64)
        beta = 1 - here / there
        x = (x - beta / (1 - here).sqrt() * out[:, :4]) / (1 - beta).sqrt()  # the posterior's mean
        if before is not None:
            share = (out[:, 4:] + 1) / 2
            log_variance = share * beta.log() + (1 - share) * (beta * (1 - there) / (1 - here)).log()
            x = x + (log_variance / 2).exp() * torch.randn(x.shape, generator=generator)
    found = run(pipe, guidance_scale=1.0)
    torch.testing.assert_close(found.double(), x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))


OTHERS = {
    "DDPM": DDPMScheduler(clip_sample=False, timestep_spacing="linspace", variance_type="fixed_large"),
    "DDIM": DDIMScheduler(**DDIM),
    "DPM-Solver++": DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02),
    "DPM-Solver++ from a DDPM": DPMSolverMultistepScheduler.from_config(dit_scheduler().config),
    "Euler": EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02),
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_other_schedulers_get_the_noise_alone(name: str) -> None:
    pipe = tiny(scheduler=OTHERS[name])
    before = run(pipe)
    patch = pipe.transformer.proj_out_2.bias.view(4, 8)  # of each pixel of a patch: noise, then variance
    patch[:, 4:] += 1.0
    assert before.shape == (2, 4, SIDE, SIDE) and torch.equal(run(pipe), before)
    patch[:, :4] += 1.0
    assert not torch.allclose(run(pipe), before, atol=0.1)


@torch.no_grad()
def test_a_step_of_euler_starts_at_its_own_noise_level() -> None:
    pipe = tiny(scheduler=EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="linspace"))
    pipe.transformer.proj_out_2.weight.zero_()
    pipe.transformer.proj_out_2.bias.zero_()  # no noise predicted: the start stays
    torch.testing.assert_close(run(pipe), drawn() * float(pipe.scheduler.init_noise_sigma))


# SiT


def integrated(sampler: str, steps: int, x: Tensor, velocity: Any, stop: float = 1.0) -> tuple[Tensor, float]:
    """(sample, time) at the first grid point from ``stop`` on."""
    scheduler = SiTScheduler(sampler)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(5)
    for i, t in enumerate(scheduler.timesteps):
        if sampler == "sde" and float(t) >= stop:
            return x, float(t)
        assert x.isfinite().all(), i
        x = scheduler.step(velocity(x, float(t)), t, x, generator=generator).prev_sample
    return x, 1.0


MEAN, SPREAD = 0.7, 0.4


def gaussian_velocity(x: Tensor, t: float) -> Tensor:
    """E[picture - noise | x_t] for pictures that are N(MEAN, SPREAD^2)."""
    variance = (t * SPREAD) ** 2 + (1 - t) ** 2
    return MEAN + (t * SPREAD**2 - (1 - t)) / variance * (x - t * MEAN)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_the_ode_of_a_gaussian_converges_with_its_order(sampler: str, order: int) -> None:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = MEAN + SPREAD * noise
    errors = [float((integrated(sampler, n, noise, gaussian_velocity)[0] - exact).abs().max()) for n in (16, 32, 64)]
    assert errors[-1] < {1: 0.05, 2: 0.002}[order]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("stop", [0.25, 0.5, 0.9, 1.0])
def test_the_sde_keeps_a_gaussians_mean_and_variance(stop: float) -> None:
    noise = torch.randn(40_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, t = integrated("sde", 120, noise, gaussian_velocity, stop)
    assert float(x.mean()) == pytest.approx(t * MEAN, abs=0.015)
    assert float(x.std()) == pytest.approx(math.hypot(t * SPREAD, 1 - t), abs=0.015)
    assert abs(np.corrcoef(x[:, 0], noise[:, 0])[0, 1]) < {0.25: 0.9, 0.5: 0.7, 0.9: 0.35, 1.0: 0.35}[stop]


def test_the_sdes_last_step_adds_no_noise() -> None:
    scheduler = SiTScheduler("sde")
    scheduler.set_timesteps(5)
    torch.testing.assert_close(scheduler.timesteps, torch.linspace(0, 1 - SDE_LAST_STEP, 5))
    x = torch.zeros(1, 2000)
    for i, t in enumerate(scheduler.timesteps):
        x, before = scheduler.step(torch.zeros_like(x), t, x, return_dict=False)[0], x
        assert (float((x - before * (1 - (float(t) < 1) * 0.04)).std()) > 1e-3) == (i < 4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@torch.no_grad()
def test_sit_starts_at_noise_and_ends_at_the_picture(sampler: str) -> None:
    pipe = tiny("sit", SiTScheduler(sampler))
    seen = calls(pipe)
    found = run(pipe, guidance_scale=1.0)
    x, scheduler = drawn(), SiTScheduler(sampler)
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        velocity = pipe.transformer(x, timestep=t.expand(2), class_labels=torch.tensor([1, 3])).sample[:, :4]
        x = scheduler.step(velocity, t, x, generator=generator).prev_sample
    assert torch.equal(found, x)
    assert float(seen[0]["timestep"][0]) == 0 and seen[0]["timestep"].dtype == torch.float32
    assert seen[-1 - len(scheduler.timesteps)]["timestep"][0] == {"euler": 0.75, "heun": 1.0, "sde": 0.96}[sampler]


# Both


@pytest.mark.parametrize("kind", ["dit", "sit", "sit heun"])
@torch.no_grad()
def test_packed_runs_are_the_masked_ones_at_the_foretold_timesteps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = scramble(tiny_dynamic(DIT))
    pipe = tiny(kind.split()[0], SiTScheduler("heun") if kind == "sit heun" else None)
    pipe.transformer = model
    seen = calls(pipe)
    masked = run(pipe)
    foretold = pipe.transformer_timesteps(4)
    assert torch.equal(torch.stack([c["timestep"][0].float() for c in seen]), foretold)
    assert len(foretold) == (8 if kind == "sit heun" else 4)
    dy.pack(model, foretold)
    monkeypatch.setattr(model, "width_masks", None)  # which the masked model calls, and the packed one does not
    torch.testing.assert_close(run(pipe), masked, rtol=1e-4, atol=1e-4)
    model.unpack()
    with pytest.raises(TypeError, match="NoneType"):
        run(pipe)


@torch.no_grad()
def test_a_guided_packed_run_has_its_modulation_computed_ahead() -> None:
    pipe = tiny()
    pipe.transformer = scramble(tiny_dynamic(DIT))
    dy.pack(pipe.transformer, pipe.transformer_timesteps(4))
    run(pipe, guidance_scale=3.0)
    (branch,) = pipe.transformer._plan.ahead._branches
    assert branch.steps == {0, 1, 2, 3} and branch.ready, "all steps had the same conditions"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@torch.no_grad()
def test_pipelines_are_saved_and_loaded(sampler: str, dynamic: bool, tmp_path: Path) -> None:
    model = scramble(tiny_dynamic(DIT)) if dynamic else tiny_dit(**DIT)
    pipe = SiTPipeline(model, tiny_vae(), SiTScheduler(sampler), id2label=NAMES)
    pipe.save_pretrained(tmp_path)
    back = SiTPipeline.from_pretrained(tmp_path)
    assert type(back.transformer) is type(model) and back.scheduler.config["sampler"] == sampler
    assert back.labels == pipe.labels and back.get_label_ids(["Tinca tinca", "goldfish"]) == [0, 1]
    for p in (pipe, back):
        p.set_progress_bar_config(disable=True)
    torch.testing.assert_close(run(back), run(pipe))
    again = DyDiTPipeline(model, tiny_vae(), dit_scheduler())
    again.save_pretrained(tmp_path / "dit")
    assert DyDiTPipeline.from_pretrained(tmp_path / "dit").scheduler.config["variance_type"] == "learned_range"


@pytest.mark.parametrize("kind", ["dit", "sit"])
@torch.no_grad()
def test_a_picture_depends_on_its_own_noise_alone(kind: str) -> None:
    pipe = tiny(kind, dit_scheduler() if kind == "dit" else None)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    whole = pipe([0, 1, 2], latents=drawn(3), generator=generators, **options).images
    alone = pipe([2], latents=drawn(3)[2:], generator=[torch.Generator().manual_seed(2)], **options).images
    torch.testing.assert_close(whole[2:], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_outputs_come_in_each_form_and_size() -> None:
    pipe = tiny("sit")
    arrays = run(pipe, output_type="np")
    latents = run(pipe)
    expected = pipe.vae.decode(latents / 0.6).sample.clamp(-1, 1) / 2 + 0.5
    assert np.abs(arrays - expected.movedim(1, -1).numpy()).max() < 1e-5
    assert np.abs(np.asarray(run(pipe, output_type="pil")[1]) / 255 - arrays[1]).max() < 0.01
    assert run(pipe, output_type="pt").shape == (2, 3, 2 * SIDE, 2 * SIDE)
    assert run(pipe, latents=None, side=4 * SIDE, output_type="np").shape == (2, 4 * SIDE, 4 * SIDE, 3)
    assert run(pipe, latents=drawn(2, 4)).shape == (2, 4, 4, 4)
    assert pipe([1], num_inference_steps=2, output_type="np", return_dict=False)[0].shape == (1, 16, 16, 3)


@torch.no_grad()
def test_a_bf16_transformer_is_guided_and_stepped_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny("sit", SiTScheduler("euler"))
    exact = run(pipe)
    pipe.transformer.to(torch.bfloat16)
    seen, outputs, step = calls(pipe), [], SiTScheduler.step

    def recorded(self: SiTScheduler, output: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs.append(output)
        return step(self, output, *args, **kwargs)

    monkeypatch.setattr(SiTScheduler, "step", recorded)
    found = run(pipe)
    for x in (found, *outputs):
        assert x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float())
    assert all(c["timestep"].dtype == torch.float32 for c in seen)
    torch.testing.assert_close(found, exact, atol=0.1, rtol=0.1)


def test_the_callers_scheduler_stays_as_it_is() -> None:
    pipe = tiny(scheduler=DPMSolverMultistepScheduler.from_config(dit_scheduler().config))
    before = pipe.scheduler.timesteps.clone()
    run(pipe)
    pipe.transformer_timesteps(3)
    assert torch.equal(pipe.scheduler.timesteps, before)
    assert pipe.scheduler.config["variance_type"] == "learned_range"


# Bad input

BAD = [
    ({"labels": [CLASSES + 1]}, f"expected 0 to {CLASSES - 1}, or {CLASSES} for no class; got {CLASSES + 1}"),
    ({"labels": [1, -1]}, "got -1"),
    ({"labels": torch.tensor([0.5, 1.0])}, "list of one or more integers"),
    ({"labels": torch.tensor([[1], [2]])}, "list of one or more integers"),
    ({"guidance_scale": 0.5}, "guidance_scale: expected 1"),
    ({"guidance_channels": 5}, "guidance_channels: expected 1 to 4"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"output_type": "jpg"}, "output_type: expected one of pil"),
    ({"side": 2 * SIDE + 2}, "multiple of 4 pixels"),
    ({"latents": torch.zeros(3, 4, SIDE, SIDE)}, r"latents: expected \[2, 4, 8, 8\]"),
    ({"latents": torch.zeros(2, 4, 7, 7)}, "multiple of the patch"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_bad_input_is_refused_before_any_work(kind: str, options: dict, message: str) -> None:
    pipe = tiny(kind)
    seen = calls(pipe)
    with pytest.raises(ValueError, match=message):
        run(pipe, **options)
    assert not seen


def test_a_scheduler_that_does_not_fit_is_refused() -> None:
    for scheduler in (FlowMatchEulerDiscreteScheduler(), SiTScheduler(), DDIMScheduler(prediction_type="sample")):
        with pytest.raises(ValueError, match=f"prediction_type 'epsilon'; got {type(scheduler).__name__}"):
            tiny(scheduler=scheduler).transformer_timesteps(4)
    for scheduler in (FlowMatchEulerDiscreteScheduler(), DDIMScheduler()):
        with pytest.raises(ValueError, match=f"expected a SiTScheduler; got {type(scheduler).__name__}"):
            run(tiny("sit", scheduler))
    with pytest.raises(ValueError, match=r"needs 8 channels .* it has 4"):
        run(tiny(scheduler=dit_scheduler(), out_channels=4))
    run(tiny(scheduler=dit_scheduler(learned_variance=False), out_channels=4))
    with pytest.raises(ValueError, match="'learned_range'"):
        run(tiny(scheduler=DDPMScheduler(variance_type="learned")))


def test_sits_scheduler_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="one of euler, heun, sde; got 'dopri5'"):
        SiTScheduler("dopri5")
    with pytest.raises(ValueError, match="sde takes 2 steps or more"):
        SiTScheduler().set_timesteps(1)
    scheduler, x = SiTScheduler("euler"), torch.zeros(1, 1)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"next timestep is 0.0; got 0.5"):
        scheduler.step(x, scheduler.timesteps[1], x)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="no further one"):
        scheduler.step(x, 1.0, x)


def test_training_mode_and_unknown_names_are_refused() -> None:
    pipe = tiny()
    pipe.transformer.train()
    with pytest.raises(ValueError, match="training mode"):
        run(pipe)
    pipe = DyDiTPipeline(DyDiTTransformer2DModel.from_static(tiny_dit(**DIT)), tiny_vae(), dit_scheduler(), NAMES)
    assert pipe.get_label_ids("goldfish") == [1]
    with pytest.raises(ValueError, match="no class is called 'goldfsh'; did you mean 'goldfish'"):
        pipe.get_label_ids(["goldfsh"])


def test_a_published_dit_pipeline_is_a_base(tmp_path: Path) -> None:
    DiTPipeline(tiny_dit(**DIT), tiny_vae(), DDIMScheduler(**DDIM)).save_pretrained(tmp_path / "base")
    index = tmp_path / "base" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": NAMES}))  # as on the hub
    base = str(tmp_path / "base")
    family = family_of_base(base)
    assert family.name == "dit"
    pipe = load_pipeline(base, family)
    pipe.register_modules(transformer=load_transformer(base, family).eval())
    assert type(pipe) is DyDiTPipeline and pipe.labels["goldfish"] == 1
    ours = generate(pipe, ["goldfish"], SampleConfig(steps=2, height=2 * SIDE, width=2 * SIDE, cfg=2.0))
    assert ours.shape == (1, 2 * SIDE, 2 * SIDE, 3) and ours.std() > 0
