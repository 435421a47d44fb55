"""Files of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dydit_scale.workflows.prompt_files import read_prompts


def test_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("a café\n\n  a dog \r\n".encode())
    assert read_prompts(tmp_path / "prompts.txt") == ["a café", "a dog"]


def test_genevals_lines(tmp_path: Path) -> None:
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text('{"tag": "colors", "prompt": "a red dog"}\n{"prompt": "a cat"}\n')
    assert read_prompts(file) == ["a red dog", "a cat"]


@pytest.mark.parametrize(
    ("name", "held", "said"),
    [
        ("a.txt", b"caf\xe9\n", "a.txt: expected a text file in UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\nb', "a.jsonl: line 2: not JSON"),
        ("a.jsonl", b'{"caption": "a"}', 'a.jsonl: line 1: expected an object with "prompt"'),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, held: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(held)
    with pytest.raises(ValueError, match=said):
        read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match=r"none.txt: no such file of prompts"):
        read_prompts(tmp_path / "none.txt")
