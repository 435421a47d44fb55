"""Files of prompts: a prompt a line, or GenEval's jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file; see :func:`prompt_lines`."""
    return [line["prompt"] for line, _ in prompt_lines(path)]


def prompt_lines(path: Path) -> list[tuple[dict[str, Any], str]]:
    """What each line says, at least "prompt", and where it is; empty lines are none.

    A line is a prompt in itself or, in a ``.jsonl`` as GenEval's ``evaluation_metadata.jsonl``, an object. Raises
    ValueError if there is no such file, it is no UTF-8, or a line is no object with a prompt.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file of prompts; expected a text file with one prompt a line, or a .jsonl")
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text file in UTF-8 ({error})") from error
    texts = [(text.strip(), f"{path}: line {n}") for n, text in enumerate(lines, 1)]
    return [(_line(text, where, path.suffix), where) for text, where in texts if text]


def _line(text: str, where: str, suffix: str) -> dict[str, Any]:
    if suffix != ".jsonl":
        return {"prompt": text}
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(line, dict) or not isinstance(line.get("prompt"), str):
        raise ValueError(f'{where}: expected an object with "prompt", got {text[:80]}')
    return line
