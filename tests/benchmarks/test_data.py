"""benchmarks/data.py at a tiny size: every way of reading is measured on both kinds of data, and the memory taken."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import data

SAMPLES, SIMULATED = 64, 2000


@pytest.mark.slow  # starts the workers of twenty ways of reading three times, and an interpreter
def test_every_way_of_reading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = ["--samples", str(SAMPLES), "--simulated", str(SIMULATED), "--repeat", "2"]
    monkeypatch.setattr(sys, "argv", ["data", str(tmp_path), "--quick", *sizes])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # which would last beyond this test
    data.main()
    found = json.loads((tmp_path / "data.json").read_text())
    assert (found["samples"], found["repeat"]) == (SAMPLES, 2)
    ways = {"raw", "raw, checked"}
    ways |= {f"{way} {workers}" for workers in (0, 2, 4) for way in ("reader", "webdataset", "decoded reader")}
    decoded = {f"decoded webdataset {workers}" for workers in (0, 2, 4)}
    for kind, expected, least, most in (("pictures", ways | decoded, 30e3, 60e3), ("latents", ways, 196608, 210e3)):
        measured = found[kind]
        assert measured["rows"].keys() == measured["samples_per_second"].keys() == expected
        assert all(len(row) == 2 and min(row) > 0 for row in measured["rows"].values())
        assert least < measured["bytes_per_sample"] < most
        speed = measured["samples_per_second"]
        assert measured["reader_of_webdataset"]["2"] == speed["reader 2"] / speed["webdataset 2"]
        assert measured["raw_of_reader"]["4"] == speed["raw"] / speed["reader 4"]
        assert min(measured["index_seconds"], measured["load_index_seconds"]) > 0
    memory = found["memory"]
    assert memory["samples"] == SIMULATED
    assert memory["index_files_mib"] > 0 and memory["uss_mib"] > memory["private_mib"]


def test_sizes_are_those_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = []
    monkeypatch.setattr(data, "pictures", lambda folder, count: made.append((folder.name, count)))
    monkeypatch.setattr(data, "latents", lambda folder, count: made.append((folder.name, count)))
    monkeypatch.setattr(data, "compare", lambda folder, kind, repeat: {"repeat": repeat})
    monkeypatch.setattr(data, "memory_of_many", lambda out, samples: {"samples": samples})
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for words, expected in (([], (512, 2, 100_000)), (["--samples", "64"], (64, 2, 100_000))):
        made.clear()
        monkeypatch.setattr(sys, "argv", ["data", str(tmp_path), "--quick", *words])
        data.main()
        found = json.loads((tmp_path / "data.json").read_text())
        assert (found["samples"], found["pictures"]["repeat"], found["memory"]["samples"]) == expected
        assert made == [(f"{kind}-{expected[0]}", expected[0]) for kind in ("pictures", "latents")]
