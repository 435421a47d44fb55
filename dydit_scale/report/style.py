"""The page's style sheet: system fonts, the Okabe-Ito palette, one light and one dark theme."""

from __future__ import annotations

from importlib.resources import files

from dydit_scale.report.charts import LEVELS

_LIGHT_RAMP = ("#f1f4f6", "#bcd9ea", "#4a9bc9", "#0072b2", "#06365a")
_DARK_RAMP = ("#20262c", "#173f59", "#0a689e", "#3f9fd6", "#b4e2ff")

_COLOURS = {
    # name: (light, dark). Okabe and Ito's colours; in the dark theme lifted a little where contrast asks for it.
    "page": ("#faf9f6", "#131618"),
    "card": ("#ffffff", "#1a1e21"),
    "ink": ("#1c2126", "#e7e9ea"),
    "soft": ("#5f6870", "#9ba4ab"),
    "line": ("#e5e3dd", "#2b3136"),
    "code": ("#f1efea", "#22272b"),
    "base": ("#9aa1a8", "#8a939b"),
    "control": ("#e69f00", "#e69f00"),
    "dynamic": ("#0072b2", "#56b4e9"),
    "supervision": ("#009e73", "#27bd93"),
    "evaluation": ("#d55e00", "#f0803a"),
    "low": ("#33414c", "#c9d3da"),
    "mid": ("#ffffff", "#ffffff"),
    "high": ("#ffffff", "#0b1c28"),
}


def style_sheet() -> str:
    """The style sheet with both themes."""
    light, dark = (_theme(index, ramp) for index, ramp in enumerate((_LIGHT_RAMP, _DARK_RAMP)))
    levels = "".join(f".q{level}{{fill:var(--q{level})}}" for level in range(LEVELS + 1))
    rules = files("dydit_scale.report").joinpath("page.css").read_text(encoding="utf-8")
    themes = f":root{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return f"{themes}\n{levels}\n{rules}"


def _theme(index: int, ramp: tuple[str, ...]) -> str:
    names = [f"--{name}:{both[index]}" for name, both in _COLOURS.items()]
    return ";".join([*names, *(f"--q{level}:{_mix(ramp, level / LEVELS)}" for level in range(LEVELS + 1))])


def _mix(ramp: tuple[str, ...], share: float) -> str:
    """The colour at ``share`` of a ramp of evenly spaced hex colours."""
    place = share * (len(ramp) - 1)
    index = min(int(place), len(ramp) - 2)
    pairs = [(int(ramp[index][at : at + 2], 16), int(ramp[index + 1][at : at + 2], 16)) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(low + (place - index) * (high - low)):02x}" for low, high in pairs)
