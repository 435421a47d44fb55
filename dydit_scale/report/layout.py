"""Pieces every section is laid out with."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from dydit_scale.report.charts import HALF, LEVELS, WIDE, Series
from dydit_scale.report.inputs import Missing
from dydit_scale.report.markup import Html, el, join
from dydit_scale.report.style import style_sheet

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Figure(NamedTuple):
    """A titled chart that can be drawn half a page or a whole page wide."""

    title: str
    draw: Callable[[int], Html]
    legend: Html = Html("")
    note: str = ""


class Column(NamedTuple):
    """One column of a table."""

    head: str
    cells: Sequence[str]
    align: Literal["left", "right"] = "right"


def document(title: str, *parts: str) -> Html:
    """A whole page that loads nothing from elsewhere."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Html(style_sheet())),
    )
    return Html("<!doctype html>\n" + el("html", head, el("body", SYMBOLS, el("main", *parts)), lang="en") + "\n")


def masthead(kind: str, title: str, facts: Sequence[str], links: Sequence[str]) -> Html:
    """The page's head line, what it is about, and links to its sections."""
    return el(
        "header",
        el("p", f"dydit_scale · {kind}", class_="kind"),
        el("h1", title),
        el("p", " · ".join(facts), class_="facts"),
        el("nav", *(el("a", name, href=f"#{name}") for name in links)),
    )


def tile(name: str, value: str, below: str) -> Html:
    """One number of the row under the masthead."""
    parts = (("name", name), ("value", value), ("below", below))
    return el("div", *(el("p", words, class_=style) for style, words in parts), class_="tile")


def write_page(page: str, out: Path) -> Path:
    """Write a page aside and rename it into place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    aside.write_text(page, encoding="utf-8")
    aside.replace(out)
    return out


def section(name: str, title: str, lead: str, *content: str) -> Html:
    """A section with an anchor, a heading and a sentence that says how to read it."""
    return el("section", el("h2", title), el("p", lead, class_="lead") if lead else "", *content, id=name)


def figures(shown: Sequence[Figure]) -> Html:
    """Figures two in a row; the last of an odd number takes the whole row."""
    drawn = []
    for index, figure in enumerate(shown):
        wide = len(shown) % 2 == 1 and index == len(shown) - 1
        chart = wide_chart(figure.draw) if wide else figure.draw(HALF)
        head = el("figcaption", el("h3", figure.title), figure.legend)
        note = el("p", figure.note, class_="note") if figure.note else ""
        drawn.append(el("figure", head, chart, note, class_="wide" if wide else "half"))
    return el("div", *drawn, class_="figures")


def wide_chart(draw: Callable[[int], Html]) -> Html:
    """A chart as wide as the page; narrow screens show a half-width drawing instead, so that its text stays legible."""
    return join([el("div", draw(WIDE), class_="broad"), el("div", draw(HALF), class_="slim")])


def series_legend(series: Sequence[Series]) -> Html:
    """A swatch, the name and the latest value of each series that has points."""
    entries = [
        el(
            "span",
            el("i", class_=f"swatch {one.kind} {one.colour}"),
            one.name,
            el("b", one.latest) if one.latest else "",
        )
        for one in series
        if one.x.size
    ]
    return el("div", *entries, class_="legend")


def bar_legend(entries: Sequence[tuple[str, str]]) -> Html:
    """A square swatch and the name for each (name, colour class)."""
    return el(
        "div", *(el("span", el("i", class_=f"swatch bar {colour}"), name) for name, colour in entries), class_="legend"
    )


def ramp_legend(words: str, gradient: str | None = None) -> Html:
    """The colour scale from 0 to 100 %; that of the heat maps unless another CSS gradient is given."""
    scale = gradient or f"linear-gradient(90deg,{','.join(f'var(--q{level})' for level in range(0, LEVELS + 1, 2))})"
    ramp = el("i", class_="ramp", style=f"background:{scale}")
    return el("div", el("span", f"{words}\u2002", "0", ramp, "100\u00a0%"), class_="legend")


def table(columns: Sequence[Column]) -> Html:
    """A table; the first column names its rows."""
    head = el("tr", *(el("th", column.head, class_=column.align, scope="col") for column in columns))
    rows = []
    for cells in zip(*(column.cells for column in columns), strict=True):
        first = el("th", cells[0], class_=columns[0].align, scope="row")
        rows.append(
            el(
                "tr",
                first,
                *(el("td", cell, class_=column.align) for cell, column in zip(cells[1:], columns[1:], strict=True)),
            )
        )
    return el("div", el("table", el("thead", head), el("tbody", *rows)), class_="scroll")


def missing(what: Missing) -> Html:
    """A quiet card in the place of a section's content: why it is empty and the command that fills it."""
    if what.reason is None:
        return el(
            "p", "Not there yet: ", el("code", what.command), " writes ", el("code", what.file), ".", class_="missing"
        )
    again = join([el("code", what.command), " writes it anew."])
    return el("p", el("code", what.file), f" cannot be used ({what.reason}). ", again, class_="missing broken")


def verdict(right: bool, yes: str, no: str) -> Html:
    """A tick or a cross, told apart by shape as well as colour; ``yes`` and ``no`` are what a screen reader says."""
    name, words = ("tick", yes) if right else ("cross", no)
    return el(
        "svg", el("use", href=f"#{name}"), class_=f"mark {name}", viewBox="0 0 12 12", role="img", aria_label=words
    )


SYMBOLS = el(
    "svg",
    el("symbol", el("path", d="M2 6.5l3 3 5-7"), id="tick", viewBox="0 0 12 12"),
    el("symbol", el("path", d="M2.5 2.5l7 7m0-7l-7 7"), id="cross", viewBox="0 0 12 12"),
    class_="symbols",
    aria_hidden="true",
)
