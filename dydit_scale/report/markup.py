"""Markup that escapes by construction: `el` escapes every child and attribute that is not `Html` already."""

from __future__ import annotations

import html
from collections.abc import Iterable

_EMPTY = frozenset({"img", "meta", "br", "rect", "line", "path", "circle", "use"})


class Html(str):
    """Text that is markup already and goes into the page as it is."""

    __slots__ = ()


def escape(text: str) -> Html:
    """Markup that shows ``text`` literally, inside an element or a quoted attribute; `Html` passes unchanged."""
    return text if isinstance(text, Html) else Html(html.escape(text, quote=True))


def join(parts: Iterable[str], between: str = "") -> Html:
    """The escaped parts, one after the other."""
    return Html(escape(between).join(escape(part) for part in parts))


def el(tag: str, *children: str, **attributes: str | float | None) -> Html:
    """One element, e.g. ``el("a", "text", href="#top", class_="quiet")``.

    In attribute names a trailing underscore is dropped and the others become hyphens; an attribute of None is left out.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _EMPTY:
        assert not children, f"<{tag}> takes no children"
        return Html(f"<{tag}{written}/>")
    return Html(f"<{tag}{written}>{join(children)}</{tag}>")


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
