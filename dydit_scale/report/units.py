"""Numbers as a reader wants them: few digits, units, and a dash where there is no number."""

from __future__ import annotations

import math

DASH = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def digits(value: float | None, significant: int = 3) -> str:
    """``value`` with that many significant digits: 0.0512, 1.64, 37, 12,300; very small or large ones as 3.1 × 10⁻⁷."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    mantissa, power = f"{value:.{significant - 1}e}".split("e")
    exponent = int(power)
    if not -4 <= exponent <= 8:
        return f"{mantissa} × 10{str(exponent).translate(_SUPERSCRIPT)}".replace("-", "−")
    return f"{round(value, significant - 1 - exponent):,.{max(0, significant - 1 - exponent)}f}".replace("-", "−")


def fixed(value: float | None, decimals: int) -> str:
    """``value`` with that many decimals."""
    return DASH if value is None or not math.isfinite(value) else f"{value:,.{decimals}f}".replace("-", "−")


def count(value: float) -> str:
    """A whole number with separators: 12,300."""
    return f"{value:,.0f}"


def percent(share: float | None, decimals: int = 0) -> str:
    """A share in 0..1 as ``48 %``; the space does not break."""
    return DASH if share is None or not math.isfinite(share) else f"{fixed(100 * share, decimals)}\u00a0%"


def with_prefix(value: float, unit: str) -> str:
    """``value`` with a decimal prefix: 6.37e9 and ``MACs`` give ``6.37 GMACs``; 1.2e6 and ``B`` give ``1.20 MB``."""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{digits(value / scale)}\u00a0{prefix}{unit}"
    return f"{digits(value)}\u00a0{unit}"


def duration(seconds: float) -> str:
    """Wall time: ``42 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f}\u00a0s"
    minutes = round(seconds / 60)
    return f"{minutes}\u00a0min" if minutes < 90 else f"{minutes // 60}\u00a0h {minutes % 60:02d}\u00a0min"
