"""TD-LoRA as a plain LoRA that diffusers, ComfyUI and others load: the mean over timesteps, with its error."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from dydit_scale.adapters.delivery import only_embedder
from dydit_scale.adapters.state import PEFT_PREFIX
from dydit_scale.adapters.td_lora import TDLoraLayer, td_layers
from dydit_scale.adapters.tensor_file import check_tensors, write_tensors

PREFIX = "transformer."
_FLUX = "https://github.com/black-forest-labs/flux"
_KOHYA_LAYERS = re.compile(r"(double|single)_blocks\.\d+\..+")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What the file's header says about it (the ModelSpec 1.0.1 fields that apply to a LoRA)."""

    title: str
    """Name shown by user interfaces."""
    architecture: str = "flux-1-dev/lora"
    """Model family and kind of file."""
    description: str | None = None
    """Free text."""
    license: str | None = None
    """Licence of the weights."""
    date: str | None = None
    """When it was made, ISO 8601."""
    timestep_range: tuple[int, int] | None = None
    """Timesteps in [0, 1000] the file is meant for; None means all."""

    def __post_init__(self) -> None:
        if not self.title:
            raise ValueError("ModelSpec: title: expected a name, got nothing")
        if self.timestep_range is not None and not 0 <= self.timestep_range[0] < self.timestep_range[1] <= 1000:
            raise ValueError(f"ModelSpec: timestep_range: expected 0 <= low < high <= 1000, got {self.timestep_range}")

    def header(self, implementation: str = "diffusers") -> dict[str, str]:
        """The fields as they stand in a safetensors header; ``implementation`` is whose layers the file names."""
        fields = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        if self.timestep_range is not None:
            fields["timestep_range"] = f"{self.timestep_range[0]},{self.timestep_range[1]}"
        return {"modelspec.sai_model_spec": "1.0.1", "modelspec.implementation": implementation} | {
            f"modelspec.{key}": value for key, value in fields.items()
        }


@dataclass(frozen=True, kw_only=True)
class MeanError:
    """How far the mean weight update is from the true one: ||dW(t) - mean|| / ||dW(t)||, Frobenius norms.

    Every figure is the root of a ratio of sums of squares over what it covers; 0 where both sums are zero.
    """

    total: float
    """Over all layers and timesteps."""
    layers: dict[str, float]
    """Over the timesteps, for each layer."""
    timesteps: tuple[float, ...]
    """Over the layers, for each timestep in the order given."""


@torch.no_grad()
def timestep_embeddings(model: Any, timesteps: Float[Tensor, " steps"]) -> Float[Tensor, "steps dim"]:
    """The pure timestep embeddings of a model in fp32, as its adapter sees them; ``timesteps`` as its forward takes
    them.

    Dynamic models say so themselves. A static model's embedder is called as in its forward: sinusoids are rounded to
    the embedder's dtype, and FLUX embeds 1000 t, rounded too. Raises ValueError for a model without one such embedder.
    """
    if hasattr(model, "routing_embedding"):
        return model.routing_embedding(timesteps)
    name, embed = only_embedder(model)
    project = getattr(model.get_submodule(name.rpartition(".")[0]), "time_proj", None)
    if project is None:
        raise ValueError(f"{type(model).__name__}: expected time_proj beside {name}, found none")
    dtype = next(embed.parameters()).dtype
    if isinstance(model, FluxTransformer2DModel):
        timesteps = timesteps.to(dtype) * 1000
    return embed(project(timesteps).to(dtype)).float()


def _check_embeddings(t_embs: Tensor) -> None:
    if t_embs.ndim != 2 or t_embs.shape[0] == 0:
        raise ValueError(f"mean over timesteps: expected embeddings [steps, dim], got {list(t_embs.shape)}")


@torch.no_grad()
def mean_lora(
    model: nn.Module, t_embs: Float[Tensor, "steps dim"], *, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """The plain LoRA closest to the adapter on average over ``t_embs``, in diffusers' names, alpha baked into B.

    A is shared, so the mean update (sum_i mean_t g_i(t) B_i) A has rank r already and is the constant update with the
    least squared error. Names: ``transformer.<module>.lora_A.weight`` [rank, in] and ``.lora_B.weight`` [out, rank].
    """
    _check_embeddings(t_embs)
    tensors: dict[str, Tensor] = {}
    for name, layer in td_layers(model, adapter_name).items():
        gates = layer.gate(adapter_name)(t_embs).mean(dim=0, keepdim=True)  # [1, experts]
        mixed = layer.up(adapter_name)(gates * layer.scaling[adapter_name])[0]  # [out, rank]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.down(adapter_name).weight.float().clone()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = mixed
    check_tensors(tensors, "mean_lora")
    return tensors


def _layer_squares(layer: TDLoraLayer, t_embs: Tensor, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Squared error and squared norm of a layer's update at each timestep, each [steps], in fp64.

    ||sum_i c_i B_i A||^2 = c^T M c with M_ij = tr(B_i (A A^T) B_j^T), so no [out, in] matrix is formed.
    """
    gates = layer.gate(adapter_name)(t_embs).double()  # [steps, experts]
    up = layer.up(adapter_name).weight.double()
    down = layer.down(adapter_name).weight.double()
    inner = torch.einsum("eor,rs,fos->ef", up, down @ down.T, up) * layer.scaling[adapter_name] ** 2
    centred = gates - gates.mean(dim=0)
    return (
        torch.einsum("se,ef,sf->s", centred, inner, centred).clamp_min(0),
        torch.einsum("se,ef,sf->s", gates, inner, gates).clamp_min(0),
    )


def _root_ratio(error: Tensor, norm: Tensor) -> float:
    top, bottom = float(error.sum()), float(norm.sum())
    if bottom == 0:
        return 0.0 if top == 0 else math.inf
    return math.sqrt(top / bottom)


@torch.no_grad()
def mean_error(model: nn.Module, t_embs: Float[Tensor, "steps dim"], *, adapter_name: str = "default") -> MeanError:
    """What ``mean_lora`` loses in the weights, per layer, per timestep and in total."""
    _check_embeddings(t_embs)
    layers = td_layers(model, adapter_name)
    squares = {name: _layer_squares(layer, t_embs, adapter_name) for name, layer in layers.items()}
    errors = torch.stack([error for error, _ in squares.values()])  # [layers, steps]
    norms = torch.stack([norm for _, norm in squares.values()])  # [layers, steps]
    return MeanError(
        total=_root_ratio(errors, norms),
        layers={name: _root_ratio(error, norm) for name, (error, norm) in squares.items()},
        timesteps=tuple(_root_ratio(e, n) for e, n in zip(errors.T, norms.T, strict=True)),
    )


@torch.no_grad()
def plain_lora(model: nn.Module, *, adapter_name: str = "default") -> dict[str, Tensor]:
    """A peft LoRA on linear layers in diffusers' names, with its scale baked into B; shapes as in ``mean_lora``.

    Raises ValueError if the model has no such adapter or uses a variant that two matrices cannot express.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.r:
            continue
        if not isinstance(layer.get_base_layer(), nn.Linear) or adapter_name not in layer.lora_A:
            raise ValueError(f"plain_lora: {name}: expected LoRA on nn.Linear, got {type(layer.get_base_layer())}")
        if layer.lora_variant.get(adapter_name) is not None or layer.lora_bias.get(adapter_name):
            raise ValueError(f"plain_lora: {name}: a LoRA variant (such as DoRA) or a LoRA bias is no plain LoRA")
        down, up = (
            layer.lora_A[adapter_name].get_parameter("weight"),
            layer.lora_B[adapter_name].get_parameter("weight"),
        )
        tensors[f"{PREFIX}{name}.lora_A.weight"] = down.float().clone()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = up.float() * layer.scaling[adapter_name]
    check_tensors(tensors, f"plain_lora: adapter {adapter_name!r} of {type(model).__name__}")
    return tensors


def lora_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of peft's LoraConfig for a plain LoRA: alpha equal to the rank, so the scale is 1."""
    ending = ".lora_A.weight"
    ranks = {n.removeprefix(PREFIX).removesuffix(ending): t.shape[0] for n, t in tensors.items() if n.endswith(ending)}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # The caret keeps a module at the root (proj_out) from matching one of the same name inside a block.
    others = {f"^{name}": other for name, other in ranks.items() if other != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
    }


def lora_metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The header entry from which diffusers builds its LoraConfig."""
    config = {f"{PREFIX}{key}": value for key, value in lora_config(tensors).items()}
    return {"lora_adapter_metadata": json.dumps(config, sort_keys=True)}


def write_lora(path: str | Path, tensors: Mapping[str, Tensor], spec: ModelSpec, notes: Mapping[str, str]) -> Path:
    """Write a plain LoRA with the header fields of ``spec`` and the further ones in ``notes``."""
    path = Path(path)
    write_tensors(path, tensors, {**lora_metadata(tensors), **spec.header(), **notes})
    return path


def write_mean(
    path: Path, tensors: Mapping[str, Tensor], spec: ModelSpec, error: MeanError, notes: Mapping[str, str] | None = None
) -> None:
    """Write a mean with its error in the header and, in full, in a .json file beside it."""
    write_lora(path, tensors, spec, {**error_notes(error), **(notes or {})})
    write_error(path.with_suffix(".json"), error)


def error_notes(error: MeanError) -> dict[str, str]:
    """What a file's header says of the mean in it."""
    return {
        "dydit.mean_error": f"{error.total:.6g}",
        "dydit.mean_error_worst_layer": f"{max(error.layers.values()):.6g}",
        "dydit.mean_timesteps": str(len(error.timesteps)),
    }


def write_error(path: Path, error: MeanError) -> None:
    """Write all figures as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(error), indent=2) + "\n", encoding="utf-8")


def write_peft_lora(folder: str | Path, tensors: Mapping[str, Tensor], base: str) -> Path:
    """Write a plain LoRA as the folder that ``PeftModel.from_pretrained(transformer, folder)`` reads.

    Args:
        tensors: In diffusers' names, as ``mean_lora`` and ``plain_lora`` give them.
        base: What it adapts, for ``adapter_config.json``.
    """
    folder = Path(folder)
    settings = lora_config(tensors)
    if not all("." in name for name in settings["target_modules"]):  # peft takes a list's names for ends of names
        settings["target_modules"] = f"({'|'.join(map(re.escape, settings['target_modules']))})"
    config = LoraConfig(**settings, base_model_name_or_path=base, inference_mode=True)
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"{PEFT_PREFIX}{name.removeprefix(PREFIX)}": tensor for name, tensor in tensors.items()}
    write_tensors(folder / SAFETENSORS_WEIGHTS_NAME, named, {})
    config.save_pretrained(str(folder))
    return folder


def write_fused_lora(
    path: str | Path,
    loras: Mapping[str, tuple[Tensor, Tensor]],
    style: str,
    spec: ModelSpec,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write a plain LoRA of FLUX whose layers are those of the original checkpoint.

    Args:
        loras: (down [rank, in], up [out, rank]) by the original's layer, such as ``double_blocks.0.img_attn.qkv``.
        style: ``kohya`` for sd-scripts' names (``lora_unet_double_blocks_0_img_attn_qkv``; kohya-ss/sd-scripts,
            networks/lora_flux.py), ``comfyui`` for the model's own behind ``diffusion_model.`` (comfy/lora.py).
        notes: Further header fields.

    Raises ValueError for a layer that readers of this style would ignore.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for layer, (down, up) in loras.items():
        name = fused_name(layer, style)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
        tensors[f"{name}.alpha"] = torch.tensor(float(len(down)))
    check_tensors(tensors, str(path))
    rank = Counter(len(down) for down, _ in loras.values()).most_common(1)[0][0]
    trainer = {
        "ss_v2": "False",
        "ss_base_model_version": "flux1",
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_network_args": "{}",
    }
    write_tensors(path, tensors, {**spec.header(_FLUX), **(trainer if style == "kohya" else {}), **(notes or {})})
    return path


def fused_name(layer: str, style: str) -> str:
    """What a file of this style calls a layer of the original checkpoint."""
    if style == "comfyui":
        return f"diffusion_model.{layer}"
    if style != "kohya":
        raise ValueError(f"style {style!r}: expected kohya or comfyui")
    if not _KOHYA_LAYERS.fullmatch(layer):
        raise ValueError(f"{layer}: not every reader of kohya files knows LoRA outside the blocks; use comfyui")
    return f"lora_unet_{layer.replace('.', '_')}"
