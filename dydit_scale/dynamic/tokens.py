"""Routers for tokens: which image tokens a block works on (DyDiT section 3.3, SDT; DyFLUX)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.gates import gumbel_gate, threshold_gate
from dydit_scale.dynamic.precise import UpcastLayerNorm, UpcastLinear
from dydit_scale.dynamic.width import Router


class TokenRouter(Router):
    """DiT's kind: ``Linear(C -> C/16), ReLU, Linear(C/16 -> 1)`` on the residual stream, without time or text."""

    def __init__(self, dim: int, bias: float) -> None:
        super().__init__()
        self.start = bias
        self.down = UpcastLinear(dim, max(1, dim // 16))
        self.up = UpcastLinear(max(1, dim // 16), 1)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Small weights under a positive bias: every token starts on."""
        _start((self.down, self.up), self.up, self.start, generator)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        temb: Float[Tensor, "batch dim_t"],
        text: Float[Tensor, "batch text dim"] | None,
    ) -> Float[Tensor, "batch tokens"]:
        """Logits in fp32 (``temb`` and ``text`` are not used)."""
        return self.up(F.relu(self.down(x.float()))).squeeze(-1)


class ModulatedTokenRouter(Router):
    """DyFLUX's kind: the normalised token, modulated by time, plus the mean of the equally modulated text tokens.

    The modulation is ``Linear(SiLU(temb) -> 4C)``; with a bottleneck of r it costs r (C_t + 4C) instead of 4C C_t.
    Without one it is DyFLUX's own router, whose norm has a weight and a bias, the same for image and text.
    """

    def __init__(self, dim: int, bottleneck: int, bias: float) -> None:
        super().__init__()
        self.start = bias
        self.reduce = UpcastLinear(dim, bottleneck, bias=False) if bottleneck else None
        self.norm = None if bottleneck else UpcastLayerNorm(dim)
        self.modulate = UpcastLinear(bottleneck or dim, 4 * dim)
        self.up = UpcastLinear(dim, 1)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Small weights under a positive bias: every token starts on."""
        linears = (self.modulate, self.up) if self.reduce is None else (self.reduce, self.modulate, self.up)
        _start(linears, self.up, self.start, generator)
        if self.norm is not None and not self.norm.weight.is_meta:
            self.norm.reset_parameters()

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        temb: Float[Tensor, "batch dim_t"],
        text: Float[Tensor, "batch text dim"],
    ) -> Float[Tensor, "batch tokens"]:
        """Logits in fp32."""
        t = F.silu(temb.float())
        t = t if self.reduce is None else self.reduce(t)
        shift_x, scale_x, shift_text, scale_text = self.modulate(t)[:, None].chunk(4, dim=-1)
        x = self._normalised(x) * (1 + scale_x) + shift_x
        text = self._normalised(text) * (1 + scale_text) + shift_text
        return self.up(x + text.mean(1, keepdim=True)).squeeze(-1)

    def _normalised(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return F.layer_norm(x.float(), x.shape[-1:]) if self.norm is None else self.norm(x.float())


def make_token_router(config: DynamicConfig, dim: int) -> TokenRouter | ModulatedTokenRouter:
    """The router that ``config`` names, for tokens of ``dim`` channels."""
    if config.token_router == "dit":
        return TokenRouter(dim, config.token_bias)
    if config.token_router == "flux":
        return ModulatedTokenRouter(dim, config.token_bottleneck, config.token_bias)
    raise ValueError(f"dynamic.token_router: {config.token_router!r}")


def router_macs(config: DynamicConfig, dim: int, tokens: int) -> int:
    """MACs of that router for one sample of ``tokens`` tokens; 0 where tokens are not dynamic."""
    if not config.tokens:
        return 0
    if config.token_router == "dit":
        return tokens * (dim + 1) * max(1, dim // 16)
    if config.token_router == "flux":
        r = config.token_bottleneck
        return (dim * r + r * 4 * dim if r else 4 * dim * dim) + tokens * dim
    raise ValueError(f"dynamic.token_router: {config.token_router!r}")


def route_tokens(
    router: TokenRouter | ModulatedTokenRouter,
    x: Float[Tensor, "batch tokens dim"],
    temb: Float[Tensor, "batch dim_t"],
    text: Float[Tensor, "batch text dim"] | None,
    noise: Float[Tensor, "batch tokens"] | None,
    temperature: float,
) -> Float[Tensor, "batch tokens"]:
    """Token gates in fp32: random with a straight-through gradient where ``noise`` is given, else by threshold."""
    learns = torch.is_grad_enabled() and noise is not None  # a threshold has no gradient
    with torch.set_grad_enabled(learns), torch.autocast(x.device.type, enabled=False):
        logits = router(x, temb, text)
    return threshold_gate(logits) if noise is None else gumbel_gate(logits, noise, temperature)


def _start(linears: tuple[nn.Linear, ...], last: nn.Linear, bias: float, generator: torch.Generator | None) -> None:
    for linear in linears:
        if not linear.weight.is_meta:
            nn.init.normal_(linear.weight, std=0.02, generator=generator)
            if linear.bias is not None:
                nn.init.constant_(linear.bias, bias if linear is last else 0.0)
