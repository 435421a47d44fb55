"""What is known of a base without its weights: from the config.json files of its folder, or from a table of published
models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from transformers import AutoConfig, CLIPTextModel, T5EncoderModel

from dydit_scale.models.encoders import PixelAutoencoder
from dydit_scale.models.family import Family
from dydit_scale.models.loading import family_of_base, transformer_class, transformer_config
from dydit_scale.models.registry import all_families

_FLUX_VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 16,
    "layers_per_block": 2, "use_quant_conv": False, "use_post_quant_conv": False,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
_SD_VAE = _FLUX_VAE | {"latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True}
_T5_XXL = 4_762_310_656
"""Parameters of the encoder of T5 v1.1 XXL."""
_CLIP_L = 123_060_480
"""Parameters of the text model of CLIP ViT-L/14."""
_FLUX = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
_XL = {
    "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "patch_size": 2, "in_channels": 4,
    "out_channels": 8, "sample_size": 32, "num_embeds_ada_norm": 1000,
}  # fmt: skip
_LATTE_TEXT = {
    "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
    "cross_attention_dim": 1152, "attention_bias": True, "sample_size": 64, "patch_size": 2,
    "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False, "norm_eps": 1e-6, "caption_channels": 4096, "video_length": 16,
}  # fmt: skip
_PIXART = {
    "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
    "cross_attention_dim": 1152, "sample_size": 128, "patch_size": 2, "use_additional_conditions": False,
    "caption_channels": 4096,
}  # fmt: skip
_LATTE_CLASSES = {
    "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
    "sample_size": 32, "patch_size": 2, "video_length": 16, "num_classes": 101,
}  # fmt: skip
_TEXT = {"text_encoder": _CLIP_L, "text_encoder_2": _T5_XXL}

PUBLISHED: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any], Mapping[str, int]]] = {
    "black-forest-labs/FLUX.1-dev": ("flux", _FLUX, _FLUX_VAE, _TEXT),
    "black-forest-labs/FLUX.1-schnell": ("flux", _FLUX | {"guidance_embeds": False}, _FLUX_VAE, _TEXT),
    "Freepik/flux.1-lite-8B": ("flux", _FLUX | {"num_layers": 8}, _FLUX_VAE, _TEXT),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": ("pixart", _PIXART, _SD_VAE, {"text_encoder": _T5_XXL}),
    "maxin-cn/Latte-1": ("latte", _LATTE_TEXT, _SD_VAE, {"text_encoder": _T5_XXL}),
    "dit_xl_256": ("dit", _XL, _SD_VAE, {}),
    "dit_xl_512": ("dit", _XL | {"sample_size": 64}, _SD_VAE, {}),
    "sit_xl_256": ("sit", _XL, _SD_VAE, {}),
    "latte_ucf101": ("latte-classes", _LATTE_CLASSES, _SD_VAE, {}),
}
"""Family, config.json of the transformer and of the autoencoder, and parameters of the text encoders. Names without a
slash are those of the folders that the recipes convert original weights into."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """What is known of a base without its weights."""

    name: str
    family: Family
    network_class: Any
    """Of the transformer, static or dynamic."""
    config: Mapping[str, Any]
    """The transformer's config.json."""
    vae: Mapping[str, Any]
    """The autoencoder's."""
    text_encoders: Mapping[str, int]
    """Their parameters."""

    @property
    def vae_scale_factor(self) -> int:
        """Pixels along a side of one latent."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    def make_vae(self) -> Any:
        """The autoencoder without contents."""
        with init_empty_weights():
            return _vae_class(self.vae).from_config(dict(self.vae))

    @property
    def vae_parameters(self) -> int:
        """Of the autoencoder."""
        return sum(p.numel() for p in self.make_vae().parameters())


def find_base(name: str) -> Base:
    """The base that a recipe names: a folder with model_index.json and the config.json of each part (no weights are
    asked for), a published model, or any other on the hub, of which the config.json files are fetched.

    Raises ValueError if there is none.
    """
    known = name if "/" in name and name in PUBLISHED else Path(name).name
    if not (Path(name) / "model_index.json").is_file() and known in PUBLISHED:
        family_name, config, vae, encoders = PUBLISHED[known]
        family = next(f for f in all_families() if f.name == family_name)
        return Base(
            name=name, family=family, network_class=family.static_class, config=config, vae=vae, text_encoders=encoders
        )
    try:
        family = family_of_base(name)
    except ValueError as error:
        raise ValueError(
            f"{error}. To plan, its config.json files are enough, or one of {', '.join(PUBLISHED)}"
        ) from error
    vae = _vae_config(name)
    return Base(
        name=name,
        family=family,
        network_class=transformer_class(name, family),
        config={k: v for k, v in transformer_config(name, family).items() if not k.startswith("_")},
        vae=vae,
        text_encoders=_text_encoders(name),
    )


def _vae_class(config: Mapping[str, Any]) -> Any:
    known = {cls.__name__: cls for cls in (AutoencoderKL, PixelAutoencoder)}
    if config.get("_class_name") not in known:
        raise ValueError(f"autoencoder {config.get('_class_name')}: expected {' or '.join(known)}")
    return known[config["_class_name"]]


def _vae_config(name: str) -> Mapping[str, Any]:
    try:
        return AutoencoderKL.load_config(name, subfolder="vae")
    except (OSError, ValueError) as error:
        raise ValueError(f"model.base {name}: the config of its autoencoder cannot be read: {error}") from error


def _text_encoders(name: str) -> dict[str, int]:
    """Parameters of each, from its config.json."""
    folder = Path(name)
    found: dict[str, int] = {}
    if not folder.is_dir():
        return found
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    classes = {cls.__name__: cls for cls in (CLIPTextModel, T5EncoderModel)}
    for part in sorted(index):
        if not part.startswith("text_encoder"):
            continue
        class_name = index[part][1]
        if class_name not in classes:
            raise ValueError(f"model.base {name}: {part} is a {class_name}; expected {' or '.join(classes)}")
        config = AutoConfig.from_pretrained(folder / part)
        with init_empty_weights():
            encoder = classes[class_name](config)
        encoder.tie_weights()  # empty weights are made one by one
        found[part] = sum(p.numel() for p in encoder.parameters())
    return found
