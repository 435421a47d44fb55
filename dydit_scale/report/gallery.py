"""The sections that show pictures: token maps and samples."""

from __future__ import annotations

import numpy as np

from dydit_scale.report.inputs import Missing, RunData, Samples, TokenMaps
from dydit_scale.report.layout import missing, ramp_legend, section, verdict
from dydit_scale.report.markup import Html, el
from dydit_scale.report.pictures import heat_uri, is_small, picture_uri, ramp_gradient
from dydit_scale.report.units import count

_MAP_ROWS, _MAP_STEPS, _SAMPLES = 6, 8, 24


def tokens(run: RunData) -> Html:
    """Which tokens were computed, laid over the pictures."""
    if isinstance(run.tokens, Missing):
        return section("tokens", "Token maps", "", missing(run.tokens))
    maps = run.tokens
    if not np.isfinite(maps.keep).any():
        return section(
            "tokens", "Token maps", "", el("p", "No layer of this model has a token router.", class_="missing")
        )
    rows = min(_MAP_ROWS, len(maps.pictures))
    chosen = np.unique(
        np.linspace(0, len(maps.timesteps) - 1, min(_MAP_STEPS, len(maps.timesteps))).round().astype(int)
    )
    heads = [el("span", "picture"), *(el("span", f"t = {maps.timesteps[step]:.0f}") for step in chosen)]
    cells = [cell for row in range(rows) for cell in _map_row(maps, row, chosen.tolist())]
    grid = el("div", *heads, *cells, class_="maps", style=f"--columns:{1 + len(chosen)}")
    lead = (
        "Share of the blocks that computed each token at that timestep, over the finished picture in grey. "
        "Sampling runs from left to right."
    )
    legend = el(
        "figcaption", el("h3", "Where the work goes"), ramp_legend("blocks that compute the token", ramp_gradient())
    )
    figure = el("figure", legend, el("div", grid, class_="scroll"))
    return section(
        "tokens", "Token maps", lead, _backgrounds(maps, rows), figure, _left_out(rows, len(maps.pictures), "pictures")
    )


def _backgrounds(maps: TokenMaps, rows: int) -> Html:
    """Each picture once, as a class, because every timestep of its row shows it."""
    rules = (f'.t{row}{{background-image:url("{picture_uri(maps.pictures[row])}")}}' for row in range(rows))
    return el("style", Html("".join(rules)))


def _map_row(maps: TokenMaps, row: int, chosen: list[int]) -> list[Html]:
    height, width = maps.pictures.shape[1:3]
    crisp = " crisp" if is_small(height, width) else ""
    shape = f"aspect-ratio:{width}/{height}"
    cells = [el("div", class_=f"under t{row}{crisp}", style=shape, role="img", aria_label=f"picture {row + 1}")]
    for step in chosen:
        label = f"token map of picture {row + 1} at timestep {maps.timesteps[step]:.0f}"
        grey = el("div", class_=f"under grey t{row}{crisp}")
        cells.append(
            el(
                "div",
                grey,
                el("img", src=heat_uri(maps.keep[row, step]), alt=label, class_="heat"),
                class_="over",
                style=shape,
            )
        )
    return cells


def samples(run: RunData) -> Html:
    """Pictures of the compared models side by side."""
    if isinstance(run.samples, Missing):
        return section("samples", "Samples", "", missing(run.samples))
    found = run.samples
    shown = min(_SAMPLES, len(found.captions))
    cards = [_card(found, index) for index in range(shown)]
    names = " and ".join(", ".join(found.pictures).rsplit(", ", 1))
    judged = "A tick or a cross is the judge's verdict. " if found.right else ""
    lead = f"The same caption and the same noise for {names}. {judged}Not hand-picked: the first {count(shown)}."
    grid = el("div", *cards, class_="cards")
    return section("samples", "Samples", lead, grid, _left_out(shown, len(found.captions), "captions"))


def _card(found: Samples, index: int) -> Html:
    pictures = []
    for name, array in found.pictures.items():
        height, width = array.shape[1:3]
        small = is_small(height, width)
        shown = width * max(1, round(96 / width)) if small else None
        image = el(
            "img",
            src=picture_uri(array[index]),
            alt=f"{name}: {found.captions[index]}",
            class_="crisp" if small else "smooth",
            width=shown,
            loading="lazy",
        )
        mark = verdict(bool(found.right[name][index]), "right", "wrong") if name in found.right else ""
        pictures.append(el("figure", image, el("figcaption", mark, name)))
    return el(
        "article",
        el("div", *pictures, class_="triple"),
        el("p", found.captions[index] or "(no caption)"),
        class_="card",
    )


def _left_out(shown: int, found: int, what: str) -> Html:
    return el("p", f"{count(shown)} of {count(found)} {what} shown.", class_="note") if shown < found else Html("")
