"""The cookbook quotes the file that it explains, and names what exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "cookbook.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "dydit_scale" / "models" / "families" / "pixart.py").read_text(encoding="utf-8").splitlines()


def place_of(piece: list[str], after: int) -> int:
    """The line behind the piece where it stands in the source, not before ``after``; 0 if it does not."""
    starts = range(after, len(SOURCE) - len(piece) + 1)
    return next((i + len(piece) for i in starts if SOURCE[i : i + len(piece)] == piece), 0)


def test_excerpts_are_lines_of_the_model_file_in_their_order() -> None:
    excerpts = re.findall(r"```python\n(.*?)\n```", PAGE, re.DOTALL)
    assert len(excerpts) >= 6 and PAGE.count("```") == 2 * len(excerpts)
    for excerpt in excerpts:
        place = 0
        for piece in excerpt.split("\n...\n"):
            place = place_of(piece.split("\n"), place)
            assert place, f"not in the file, or not in this order:\n{piece}"


def test_named_files_and_tests_exist() -> None:
    files = set(re.findall(r"`([\w/]+\.(?:py|yaml))`", PAGE))
    tests = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(files) >= 6 and len(tests) >= 8
    assert [name for name in sorted(files) if not (ROOT / name).is_file()] == []
    defined = (ROOT / "tests" / "models" / "test_pixart.py").read_text(encoding="utf-8")
    assert [name for name in sorted(tests) if f"def {name}(" not in defined] == []
