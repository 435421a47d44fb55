"""Pictures of classes with DiT and SiT, static or dynamic, as pipelines of diffusers.

What diffusers' DiTPipeline cannot: another number of classes than 1000, a learned variance in ancestral sampling,
guidance as the originals have it, given noise, other sizes, and knowing its timesteps before it runs.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    DDPMParallelScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Int64
from torch import Tensor

from dydit_scale.models.sit_scheduler import SiTScheduler

OUTPUTS = ("pil", "np", "pt", "latent")
ANCESTRAL = (DDPMScheduler, DDPMParallelScheduler)
"""Schedulers that can use a learned variance."""
LEARNED = ("learned", "learned_range")
"""Their ``variance_type`` when they do."""


def dit_scheduler(*, learned_variance: bool = True) -> DDPMScheduler:
    """Ancestral sampling as DiT does it; its timesteps are the original's for any number of steps."""
    return DDPMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        variance_type="learned_range" if learned_variance else "fixed_large",
        clip_sample=False,
        timestep_spacing="linspace",
    )


def guided(
    conditional: Float[Tensor, "batch channels *shape"],
    unconditional: Float[Tensor, "batch channels *shape"],
    scale: float,
    channels: int,
) -> Float[Tensor, "batch channels *shape"]:
    """Classifier-free guidance of the first ``channels``; the others are the conditional ones."""
    with_class, without = conditional[:, :channels], unconditional[:, :channels]
    return torch.cat([without + scale * (with_class - without), conditional[:, channels:]], dim=1)


class ClassPipeline(DiffusionPipeline):
    """What the class-conditional pipelines share. Saved and loaded as any pipeline of diffusers.

    Args:
        transformer: anything with the forward and config of DiTTransformer2DModel, in evaluation mode.
        vae: its config gives ``scaling_factor`` and, where there is one, ``shift_factor``.
        id2label: names of the classes, synonyms separated by commas.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: ModelMixin | None,
        vae: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: Mapping[int | str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=None if id2label is None else dict(id2label))
        names = {name.strip(): int(i) for i, words in (id2label or {}).items() for name in words.split(",")}
        self.labels = dict(sorted(names.items()))
        self.vae_scale_factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def get_label_ids(self, names: str | Sequence[str]) -> list[int]:
        """Numbers of the classes of these names.

        Raises:
            ValueError: no class is called so; the message offers similar names.
        """
        names = [names] if isinstance(names, str) else names
        for name in names:
            if name not in self.labels:
                near = difflib.get_close_matches(name, self.labels, cutoff=0.4)
                hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"there are {len(self.labels)} names"
                raise ValueError(f"get_label_ids: no class is called {name!r}; {hint}")
        return [self.labels[name] for name in names]

    def transformer_timesteps(self, num_inference_steps: int) -> Float[Tensor, " calls"]:
        """The timesteps at which a call of the pipeline calls its transformer, as the transformer gets them: what
        ``pack`` takes."""
        return self._stepper(num_inference_steps).timesteps.float()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | Tensor,
        *,
        num_inference_steps: int = 250,
        guidance_scale: float = 4.0,
        guidance_channels: int | None = None,
        side: int | None = None,
        latents: Float[Tensor, "batch channels *shape"] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One picture for each label.

        Args:
            class_labels: [batch], from 0; the class for no class is the transformer's own.
            guidance_scale: classifier-free guidance; 1 is none and calls the transformer without the second half.
            guidance_channels: channels of the latents that are guided. None: all. DiT and SiT guide the first 3, and
                their published scores are with 3.
            side: pixels of the picture's side; None: the size that the transformer was trained for.
            latents: Gaussian noise [batch, channels, side, side] to start from; its size overrides ``side``.
            generator: of the noise; one, or one for each picture.
            output_type: "pil", "np" or "pt" (0..1), or "latent" (as the transformer sees it).

        Returns:
            ``images``, or a tuple of them without ``return_dict``.

        Raises:
            ValueError: an argument is out of its range, or the scheduler does not fit the transformer.
        """
        channels = self.transformer.config["in_channels"]
        self._check(guidance_scale, guidance_channels, output_type)
        scheduler = self._stepper(num_inference_steps)
        device = self._execution_device
        labels = self._labels(class_labels).to(device)
        latents = self._noise(len(labels), side, latents, generator, device) * scheduler.init_noise_sigma
        if guidance_scale > 1:  # once: packed blocks compute modulation ahead while these are the same tensors
            labels = torch.cat([labels, torch.full_like(labels, self._classes)])
        options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for t in self.progress_bar(scheduler.timesteps):
            x = scheduler.scale_model_input(latents, t)
            output = self._output(x, t, labels, guidance_scale, guidance_channels or channels)
            latents = scheduler.step(self._part(output, scheduler), t, latents, **options).prev_sample
        images = latents if output_type == "latent" else self._decoded(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # What a family defines
    def _check_scheduler(self) -> None:
        """Raise ValueError unless ``self.scheduler`` fits the transformer."""
        raise TypeError(f"{type(self).__name__} must define _check_scheduler")

    def _part(self, output: Float[Tensor, "batch out *shape"], scheduler: Any) -> Tensor:
        """What of the transformer's output the scheduler takes: without the variance."""
        return output[:, : self.transformer.config["in_channels"]]

    def _latent_shape(self, side: int) -> tuple[int, ...]:
        """Of one sample whose latent picture has this side."""
        return (self.transformer.config["in_channels"], side, side)

    def _condition(self, labels: Int64[Tensor, " batch"]) -> dict[str, Tensor]:
        """The labels as the transformer takes them."""
        return {"class_labels": labels}

    # What all do
    def _stepper(self, steps: int) -> Any:
        """A copy of the scheduler at its start."""
        self._check_scheduler()
        if steps < 1:
            raise ValueError(f"num_inference_steps: expected 1 or more; got {steps}")
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps)
        return scheduler

    def _output(
        self, x: Float[Tensor, "batch channels *shape"], t: Any, labels: Tensor, scale: float, channels: int
    ) -> Float[Tensor, "batch out *shape"]:
        """The transformer's output in fp32, guided: ``labels`` are then those of both branches."""
        if scale > 1:
            x = torch.cat([x, x])
        timestep = torch.as_tensor(t).to(x.device).expand(len(x))
        dtype = self.transformer.dtype
        (output,) = self.transformer(x.to(dtype), timestep=timestep, return_dict=False, **self._condition(labels))
        if scale == 1:
            return output.float()
        conditional, unconditional = output.float().chunk(2)
        return guided(conditional, unconditional, scale, channels)

    def _decoded(self, latents: Float[Tensor, "batch channels *shape"], output_type: str) -> Any:
        config = self.vae.config
        latents = latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0)
        pictures = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(pictures, output_type=output_type)

    def _noise(
        self,
        batch: int,
        side: int | None,
        latents: Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> Float[Tensor, "batch channels *shape"]:
        """The start in fp32."""
        config, scale = self.transformer.config, self.vae_scale_factor
        side = config["sample_size"] * scale if side is None else side
        token = scale * config["patch_size"]
        if side < token or side % token:
            raise ValueError(f"side {side}: expected a multiple of {token} pixels, the side of one token")
        if latents is None:
            shape = (batch, *self._latent_shape(side // scale))
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        shape = (batch, *self._latent_shape(latents.shape[-1]))
        if tuple(latents.shape) != shape or shape[-1] % config["patch_size"]:
            raise ValueError(
                f"latents: expected {list(shape)}, with a side that is a multiple of the patch, "
                f"{config['patch_size']}; got {list(latents.shape)}"
            )
        return latents.to(device, torch.float32)

    @property
    def _classes(self) -> int:
        """How many there are, which is the label of no class, too."""
        return self.transformer.config["num_embeds_ada_norm"]

    def _labels(self, class_labels: Sequence[int] | Tensor) -> Int64[Tensor, " batch"]:
        labels = torch.as_tensor(class_labels)
        if labels.ndim != 1 or not len(labels) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"class_labels: expected a list of one or more integers; got {labels.dtype} {list(labels.shape)}"
            )
        wrong = labels[(labels < 0) | (labels > self._classes)].tolist()
        if wrong:
            raise ValueError(
                f"class_labels: expected 0 to {self._classes - 1}, or {self._classes} for no class; got {wrong[0]}"
            )
        return labels.long()

    def _check(self, guidance_scale: float, guidance_channels: int | None, output_type: str) -> None:
        channels = self.transformer.config["in_channels"]
        if guidance_scale < 1:
            raise ValueError(f"guidance_scale: expected 1 (none) or more; got {guidance_scale}")
        if guidance_channels is not None and not 1 <= guidance_channels <= channels:
            raise ValueError(f"guidance_channels: expected 1 to {channels}, or None for all; got {guidance_channels}")
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type: expected one of {', '.join(OUTPUTS)}; got {output_type!r}")
        if self.transformer.training:
            raise ValueError("the transformer is in training mode, where it drops labels; call transformer.eval()")


class DyDiTPipeline(ClassPipeline):
    """DiT, which predicts noise, with any of diffusers' schedulers for noise prediction.

    With :func:`dit_scheduler` it samples ancestrally with the learned variance, as DiT does in 250 steps; every other
    scheduler (DDIM, DPM-Solver++, ...) gets the noise alone.
    """

    def _check_scheduler(self) -> None:
        config, model = self.scheduler.config, self.transformer.config
        name = type(self.scheduler).__name__
        if config.get("prediction_type") != "epsilon":
            raise ValueError(
                f"scheduler: DiT predicts noise, so expected a scheduler with prediction_type 'epsilon'; got {name} "
                f"with {config.get('prediction_type')!r}; dit_scheduler() makes the original's"
            )
        if isinstance(self.scheduler, ANCESTRAL):
            if config["variance_type"] == "learned":
                raise ValueError("scheduler: variance_type 'learned' is not DiT's; expected 'learned_range'")
            if config["variance_type"] == "learned_range" and model["out_channels"] != 2 * model["in_channels"]:
                raise ValueError(
                    f"scheduler: variance_type 'learned_range' needs {2 * model['in_channels']} channels out of the "
                    f"transformer; it has {model['out_channels']}; take dit_scheduler(learned_variance=False)"
                )

    def _stepper(self, steps: int) -> Any:
        scheduler = super()._stepper(steps)
        if not isinstance(scheduler, ANCESTRAL) and scheduler.config.get("variance_type") in LEARNED:
            scheduler.register_to_config(variance_type=None)  # from a DDPM's config; they would cut to 3 channels
        return scheduler

    def _part(self, output: Float[Tensor, "batch out *shape"], scheduler: Any) -> Tensor:
        learned = isinstance(scheduler, ANCESTRAL) and scheduler.config["variance_type"] == "learned_range"
        return output if learned else super()._part(output, scheduler)


class SiTPipeline(ClassPipeline):
    """SiT, which predicts the velocity on the linear path, with :class:`SiTScheduler`."""

    def _check_scheduler(self) -> None:
        if not isinstance(self.scheduler, SiTScheduler):
            raise ValueError(
                f"scheduler: SiT predicts a velocity and runs from t = 0, noise, to 1, so expected a SiTScheduler; got "
                f"{type(self.scheduler).__name__}"
            )


class ClassLattePipeline(DyDiTPipeline):
    """Class-conditional or unconditional Latte: videos by noise prediction. ``images`` are [batch, frames, ...]."""

    def _latent_shape(self, side: int) -> tuple[int, ...]:
        config = self.transformer.config
        return (config["in_channels"], config["video_length"], side, side)

    def _decoded(self, latents: Float[Tensor, "batch channels frames rows cols"], output_type: str) -> Any:
        frames = super()._decoded(latents.transpose(1, 2).flatten(0, 1), output_type)
        length = latents.shape[2]
        return [frames[i : i + length] for i in range(0, len(frames), length)]

    def _condition(self, labels: Int64[Tensor, " batch"]) -> dict[str, Tensor]:
        return {} if self.transformer.config["num_classes"] is None else super()._condition(labels)

    @property
    def _classes(self) -> int:
        return self.transformer.config["num_classes"] or 1  # without classes: one label, which the model does not get
