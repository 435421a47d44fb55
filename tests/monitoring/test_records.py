from __future__ import annotations

import json
from pathlib import Path

from dydit_scale.monitoring.records import Follow, last_record, read_about, read_metrics


def test_a_growing_file_is_followed_through_cut_lines_and_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follow = Follow(path)
    assert follow.new() == [] and last_record(path) is None
    path.write_text('{"step": 0}\n{"st')
    assert follow.new() == [{"step": 0}] and follow.restarted
    with path.open("a") as file:
        file.write('ep": 1}\nno json\n[1]\n{"step": 2}\n{"ste')
    assert follow.new() == [{"step": 1}, {"step": 2}] and not follow.restarted
    assert last_record(path) == {"step": 2} and len(read_metrics(path)) == 3
    draft = tmp_path / "draft"
    draft.write_text('{"step": 0}\n')
    draft.replace(path)
    assert follow.new() == [{"step": 0}] and follow.restarted


def test_the_last_record_of_a_long_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"step": step, "x": "y" * 1000}) + "\n" for step in range(3000)))
    found = last_record(path)
    assert found is not None and found["step"] == 2999


def test_what_a_run_says_of_itself_may_be_absent_or_broken(tmp_path: Path) -> None:
    assert read_about(tmp_path) == {}
    for text in ("{", "[1]"):
        (tmp_path / "monitor.json").write_text(text)
        assert read_about(tmp_path) == {}
