"""What is dynamic in a model, and how its routers start."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

TokenRouterKind = Literal["dit", "flux"]
SingleBypass = Literal["mlp", "attn_out+mlp"]


@dataclass(frozen=True, kw_only=True)
class DynamicConfig:
    """Saved in a dynamic model's ``config.json`` under ``dynamic``; the defaults suit runs of hundreds of steps."""

    heads: bool = True
    """Attention heads are switched by the timestep (TDW, DyDiT section 3.2)."""
    mlp: bool = True
    """Groups of MLP channels are switched by the timestep (TDW)."""
    always_on: bool = True
    """Unit 0 of heads and of channels works at every timestep; not so in DyDiT's release of 2024-12."""
    tokens: bool = True
    """Image tokens may skip work in a block (SDT, DyDiT section 3.3)."""
    mlp_groups: int | None = None
    """Channel groups per MLP; None takes the number of heads, as in the paper."""
    token_router: TokenRouterKind | None = None
    """``dit``: two layers on the residual stream. ``flux``: modulated by time and text, as in DyFLUX. None takes the
    one of the model's family."""
    token_bottleneck: int = 64
    """Width between the time embedding and the ``flux`` router's modulation; 0 for DyFLUX's single wide layer."""
    single_bypass: SingleBypass = "mlp"
    """What a skipped image token misses in FLUX's single blocks: the MLP, or (as released) the whole output, so that
    packed blocks leave out its query and its attention, too."""
    width_bias: float = 3.0
    """Start of the width routers' bias; sigmoid(bias / temperature) is the first keep rate. The release uses 15."""
    token_bias: float = 3.0
    """Start of the token routers' last bias. The release uses 35, which takes 100,000s of steps to move."""
    temperature: float = 1.0
    """Temperature of the Gumbel-sigmoid; 1 keeps the ratio in training close to the one at evaluation. Release: 5."""

    def __post_init__(self) -> None:
        choices = {"token_router": (*get_args(TokenRouterKind), None), "single_bypass": get_args(SingleBypass)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                expected = ", ".join(map(str, allowed))
                raise ValueError(f"dynamic.{name}: expected one of {expected}; got {getattr(self, name)!r}")
        if self.temperature <= 0:
            raise ValueError(f"dynamic.temperature: expected a positive number; got {self.temperature}")
        if self.mlp_groups is not None and self.mlp_groups < 1:
            raise ValueError(
                f"dynamic.mlp_groups: expected 1 or more, or null for the number of heads; got {self.mlp_groups}"
            )
        if self.token_bottleneck < 0:
            raise ValueError(f"dynamic.token_bottleneck: expected 0 or more; got {self.token_bottleneck}")

    @property
    def skips_attention(self) -> bool:
        """Whether skipped image tokens of FLUX's single blocks get no attention either."""
        return self.single_bypass == "attn_out+mlp"

    def for_family(self, token_router: TokenRouterKind) -> DynamicConfig:
        """The config with the family's token router where none was chosen."""
        return self if self.token_router else replace(self, token_router=token_router)
