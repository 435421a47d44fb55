"""Realised share of the ideal speed-up: the packed dynamic model beside the static one, in one run.

    python benchmarks/realised_speedup.py                                   # CPU or GPU, whatever is there
    python benchmarks/realised_speedup.py --widths flux --tokens 1024 --pairs 5

A few FLUX blocks at the widths of DiT-XL (1152) and FLUX.1 (3072), random weights, bf16, batch of one timestep. Routers
are set so that a share of heads, groups and image tokens works; the ideal comes from the cost model and the masks that
were really used. Writes benchmarks/results/realised_speedup-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.models.encoders import image_ids
from dydit_scale.models.flux import DyFluxTransformer2DModel
from dydit_scale.sampling.speed import compare_speed, machine

WIDTHS: dict[str, dict[str, Any]] = {
    "dit-xl": {"num_attention_heads": 16, "attention_head_dim": 72, "axes_dims_rope": (24, 24, 24)},
    "flux": {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)},
}
KEEP = {"width": (0.5, 1.0), "tokens": (1.0, 0.5), "both": (0.625, 0.6)}
"""Shares of heads and groups, and of image tokens, that work."""
TIMESTEP = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--tokens", type=int, default=256, help="image tokens, a square number")
    parser.add_argument("--text", type=int, default=32, help="text tokens")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(__file__).parent / "results" / f"realised_speedup-{device.type}-{args.dtype}.json"
    out.parent.mkdir(exist_ok=True)
    rows = []
    for width in args.widths:
        static = make_static(WIDTHS[width]).to(device, getattr(torch, args.dtype))
        for kind, (share, tokens) in KEEP.items():
            row = {"width": width, "dynamic": kind, **measure(static, share, tokens, args)}
            rows.append(row)
            print(
                f"{width:8}{kind:8} ratio {row['cost_ratio']:.3f}  "
                f"static {row['seconds_static']:.3f} s  dynamic {row['seconds_dynamic']:.3f} s  "
                f"ideal {row['ideal']:.2f}x  realised {row['realised']:.2f}x  share {row['share']:.0%}",
                flush=True,
            )
    settings = {k: v for k, v in vars(args).items() if k != "widths"}
    summary = {w: statistics.mean(r["share"] for r in rows if r["width"] == w) for w in args.widths}
    out.write_text(json.dumps({**machine(), **settings, "mean_share": summary, "rows": rows}, indent=1) + "\n")
    print(f"results: {out}")


def make_static(width: dict[str, Any]) -> FluxTransformer2DModel:
    """One double and two single blocks."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=2, joint_attention_dim=512, pooled_projection_dim=256, **width
    ).eval()


def measure(static: FluxTransformer2DModel, share: float, tokens: float, args: argparse.Namespace) -> dict[str, Any]:
    """One row: the packed model at the given shares beside the static one."""
    model = DyFluxTransformer2DModel.from_static(static, DynamicConfig(token_router="dit"))
    x = inputs(static, args)
    with torch.no_grad():
        set_width(model, share)
        set_tokens(model, tokens, x)
        masks = model(**x, collect=True).masks
        model.pack(torch.tensor([TIMESTEP]))
        cost = model.cost(args.tokens, args.text)
        ratio = float(cost.ratio(masks).mean())
        report = compare_speed(
            lambda: static(**x), lambda: model(**x), macs_static=cost.static, macs_dynamic=cost.static * ratio,
            batch=args.batch, steps=1, pairs=args.pairs, progress=False,
        )  # fmt: skip
    keys = ("macs_static", "macs_dynamic", "seconds_static", "seconds_dynamic", "ideal", "realised", "share")
    return {"cost_ratio": ratio, **{k: getattr(report, k) for k in keys}}


def inputs(static: FluxTransformer2DModel, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Random inputs at one timestep."""
    like = static.x_embedder.weight
    side = round(args.tokens**0.5)
    tensors = {
        "hidden_states": torch.randn(args.batch, args.tokens, 64),
        "encoder_hidden_states": torch.randn(args.batch, args.text, 512),
        "pooled_projections": torch.randn(args.batch, 256),
        "img_ids": image_ids(side, side),
        "txt_ids": torch.zeros(args.text, 3),
    }
    moved = {k: v.to(like) if not k.endswith("_ids") else v.to(like.device) for k, v in tensors.items()}
    return {**moved, "timestep": torch.full((args.batch,), TIMESTEP, device=like.device)}


def set_width(model: DyFluxTransformer2DModel, share: float) -> None:
    """The first units of every layer work, at every timestep."""
    for router in (model.dy_width.heads, model.dy_width.groups):
        nn.init.zeros_(router.weight)
        on = round(share * (router.bias.shape[1] + 1)) - 1
        router.bias.copy_(torch.where(torch.arange(router.bias.shape[1]) < on, 1.0, -1.0).expand_as(router.bias))


def set_tokens(model: DyFluxTransformer2DModel, share: float, x: dict[str, torch.Tensor]) -> None:
    """About a share of the tokens works in each block: the threshold moves to that quantile of random logits."""
    if share == 1:
        return
    for block in model.dynamic_blocks():
        router = block.dy_token
        nn.init.normal_(router.down.weight, std=0.1)
        nn.init.normal_(router.up.weight, std=1.0)
        nn.init.zeros_(router.up.bias)
        logits: list[torch.Tensor] = []
        hook = router.register_forward_hook(lambda module, args, out, kept=logits: kept.append(out))
        model(**x)
        hook.remove()
        router.up.bias.sub_(logits[0].quantile(1 - share))


if __name__ == "__main__":
    main()
