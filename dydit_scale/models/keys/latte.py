"""Class-conditional and unconditional Latte: known, so that it can be told apart, but without a class to take it."""

from __future__ import annotations

LATTE_TITLE = "class-conditional Latte"
LATTE_ONLY = ("temp_embed",)
"""What its files have beyond DiT's names."""
LATTE_REFUSAL = (
    "this is a class-conditional Latte: diffusers' LatteTransformer3DModel is the text-to-video one (Latte-1), whose "
    "blocks share one modulation, attend to T5 embeddings and have no class embedder, so it cannot hold these weights; "
    "Latte-1 itself is published in diffusers' layout and needs no conversion"
)
