"""The report page: complete runs, runs with holes, broken inputs."""

from __future__ import annotations

import datetime
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dydit_scale.report import write_report
from dydit_scale.report.charts import nice_ticks
from dydit_scale.report.inputs import Missing, read_run
from dydit_scale.report.markup import Html, el
from dydit_scale.report.metrics import Curve, extremes, read_metrics, smooth, thin
from dydit_scale.report.units import digits, duration, percent, with_prefix
from tests.report.synthetic_run import (
    MODELS,
    make_run,
    write_arrays,
    write_gates,
    write_metrics,
)

SECTIONS = ("training", "width", "tokens", "samples", "scores", "speed", "export", "settings")


class Page(HTMLParser):
    """Checks the nesting of every element while it collects the visible text, the addresses and the sections."""

    void = frozenset({"img", "meta", "br", "link", "input", "hr"})

    def __init__(self, written: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.sections: dict[str, list[str]] = {}
        self.tags: list[str] = []
        self.feed(written)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        self.open += [] if tag in self.void else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)
            if "section" in self.open:
                next(reversed(self.sections.values())).append(data)

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.addresses += [str(named[key]) for key in ("src", "href", "srcset", "data", "action") if key in named]
        if tag == "section":
            self.sections[str(named["id"])] = []

    def text(self, section: str | None = None) -> str:
        words = self.words if section is None else self.sections[section]
        return " ".join("".join(words).replace("\u00a0", " ").split())


def page_of(run: Path) -> tuple[str, Page]:
    written = write_report(run).read_text(encoding="utf-8")
    return written, Page(written)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return page_of(make_run(tmp_path_factory.mktemp("runs") / "shapes-250"))


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A run that has only trained."""
    run = tmp_path / "bare"
    run.mkdir()
    (run / "recipe.yaml").write_text("train:\n  steps: 100\n")
    write_metrics(run / "metrics.jsonl", np.random.default_rng(0), steps=100)
    return run


def test_complete_run_shows_its_numbers(complete: tuple[str, Page]) -> None:
    _, page = complete
    assert tuple(page.sections) == SECTIONS
    head = page.text()
    today = datetime.date.today().isoformat()
    for expected in ("shapes-flux-td-lora", "run shapes-250", "2,501 steps", today, "0.516", "target 0.500"):
        assert expected in head
    for expected in ("48 %", "1.05 G instead of 2.01 G", "1.64×", "ideal 1.92×", "62.9 %", "control 64.8 %", "356 kB"):
        assert expected in head
    assert "60.9 ± 3.0" in page.text("scores") and "attribute binding" in page.text("scores")
    assert "Fréchet distance" in page.text("scores") and "7.71" in page.text("scores")
    assert "as many real scenes have 2.31" in page.text("scores")
    assert "2 cores of an Intel Xeon" in page.text("speed") and "85 %" in page.text("speed")
    assert "4.8 × 10⁻⁷" in page.text("export") and page.text("export").count("verified") == 3
    assert "ramp: 900" in page.text("settings")
    assert "two small yellow rings to the left" in page.text("samples")
    assert "dydit evaluate" not in head and "dydit export" not in head


def test_complete_run_draws_every_picture(complete: tuple[str, Page]) -> None:
    written, page = complete
    assert page.tags.count("img") == 16 * 3 + 4 * 6
    assert len(re.findall(r'class="mark (?:tick|cross)"', written)) == 16 * 3 + 3
    assert written.count("background-image") == 4
    titles = ("Flow loss", "Supervision loss", "Cost ratio", "Attention heads", "Image tokens", "Mean over layers")
    assert all(title in page.text() for title in titles)


def test_page_loads_nothing_from_elsewhere(complete: tuple[str, Page]) -> None:
    written, page = complete
    assert page.addresses and all(address.startswith(("data:image/", "#")) for address in page.addresses)
    loaded = re.findall(r"url\(([^)]*)\)", written)
    assert loaded and all(address.startswith('"data:image/') for address in loaded)
    assert "@import" not in written and "http://" not in written and "https://" not in written
    assert "script" not in page.tags and "default-src &#x27;none&#x27;" in written


def test_forwards_that_ran_masked_are_said_beside_the_speed(complete: tuple[str, Page], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    file = run / "evaluation" / "speed.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fallback": "timestep <7> is not among them"}))
    _, page = page_of(run)
    assert "ran masked, at the static one's cost: timestep <7> is not among them." in page.text("speed")
    assert "ran masked" not in complete[1].text("speed")


def test_page_says_nan_nowhere(complete: tuple[str, Page]) -> None:
    written, _ = complete
    outside_pictures = re.sub(r"data:image/[^\"')]*", "", written)
    assert not re.search(r"\b(nan|NaN|inf|None|undefined)\b", outside_pictures)


def test_bare_run_names_the_commands(bare: Path) -> None:
    written, page = page_of(bare)
    assert "bare" in page.text() and "101 steps" in page.text()
    for section in ("width", "tokens", "samples", "scores", "speed"):
        assert "dydit evaluate RUN" in page.text(section), section
    assert "dydit export RUN" in page.text("export")
    assert "dydit evaluate RUN" in page.text("training"), "no evaluation line was logged"
    assert not re.search(r"\bnan\b", written, re.IGNORECASE)


@pytest.mark.parametrize(
    ("file", "section", "written"),
    [
        ("scores.json", "scores", '{"prompts": 256'),
        ("scores.json", "scores", '{"prompts": 256, "steps": 12, "models": {"base": {"overall": NaN}}}'),
        ("speed.json", "speed", '{"batch": 16, "steps": 12}'),
        ("widths.npz", "width", "PK no archive"),
        ("tokens.npz", "tokens", ""),
        ("pictures.npz", "samples", "PK\x03\x04 torn"),
    ],
)
def test_broken_evaluation_is_said_in_its_section(bare: Path, file: str, section: str, written: str) -> None:
    (bare / "evaluation").mkdir()
    (bare / "evaluation" / file).write_text(written)
    _, page = page_of(bare)
    assert f"evaluation/{file} cannot be used" in page.text(section)
    assert "dydit evaluate RUN writes it anew" in page.text(section)


def test_arrays_of_the_wrong_shape_are_refused(bare: Path) -> None:
    folder = bare / "evaluation"
    folder.mkdir()
    write_arrays(folder, np.random.default_rng(0))
    with np.load(folder / "widths.npz") as file:
        widths = dict(file)
    np.savez(folder / "widths.npz", **(widths | {"timesteps": widths["timesteps"][:-1]}))
    found = read_run(bare)
    assert isinstance(found.widths, Missing) and "timesteps: expected" in str(found.widths.reason)
    assert not isinstance(found.samples, Missing) and not isinstance(found.tokens, Missing)


def test_pickled_arrays_are_refused(bare: Path) -> None:
    (bare / "evaluation").mkdir()
    np.savez(bare / "evaluation" / "pictures.npz", captions=np.array(["a", None], dtype=object))
    found = read_run(bare).samples
    assert isinstance(found, Missing) and "pickle" in str(found.reason)


def test_damaged_metrics_are_skipped_and_counted(bare: Path) -> None:
    lines = (bare / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][: len(lines[3]) // 2]
    lines[5] = json.dumps(json.loads(lines[5]) | {"loss_flow": math.nan})
    lines += ['["no", "object"]', '{"loss": 1.0}', '{"step": 105, "loss_flo']
    (bare / "metrics.jsonl").write_text("\n".join(lines))
    _, page = page_of(bare)
    assert "Left out 4 lines of metrics.jsonl: not readable (line 4, 21, 22, 23)." in page.text()
    assert "Left out 1 value in metrics.jsonl: not finite." in page.text()
    assert len(read_metrics(bare / "metrics.jsonl").curve("loss_flow").steps) == 20 - 2


def test_a_resumed_run_forgets_what_it_repeats(tmp_path: Path) -> None:
    records = [{"step": step, "loss": 1.0, "ratio": 0.9} for step in (10, 20, 30, 40)]
    records.insert(3, {"step": 30, "ratio_eval": 0.8})
    records += [{"step": 25, "loss": 2.0, "ratio": 0.7}, {"step": 50, "loss": 2.0, "ratio": 0.6}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics.curve("ratio").steps.tolist() == [10, 20, 25, 50]
    assert metrics.curve("ratio").values.tolist() == [0.9, 0.9, 0.7, 0.6]
    assert metrics.curve("ratio_eval").last is None
    assert metrics.curve("never logged").last is None


def test_run_without_any_step_yet(bare: Path) -> None:
    (bare / "metrics.jsonl").write_text("")
    _, page = page_of(bare)
    assert "no step yet" in page.text() and "no step that can be drawn yet" in page.text("training")


@pytest.mark.parametrize("missing", ["recipe.yaml", "metrics.jsonl"])
def test_missing_required_file_is_an_error(bare: Path, missing: str) -> None:
    (bare / missing).unlink()
    with pytest.raises(ValueError, match=re.escape(missing)):
        write_report(bare)
    assert not (bare / "report.html").exists()


@pytest.mark.parametrize("text", ["- a list\n", "a: [torn\n", ""])
def test_recipe_must_be_a_mapping(bare: Path, text: str) -> None:
    (bare / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"recipe\.yaml: expected"):
        write_report(bare)


def test_all_text_is_escaped(bare: Path) -> None:
    evil = "<script>alert('x')</script>\"&amp;"
    (bare / "recipe.yaml").write_text(json.dumps({"name": evil, "note": evil}))
    (bare / "evaluation").mkdir()
    (bare / "export").mkdir()
    picture = np.zeros((1, 32, 32, 3), np.uint8)
    np.savez(bare / "evaluation" / "pictures.npz", captions=np.array([evil]), dynamic=picture)
    share = np.ones((2, 1, 4))
    widths = {"timesteps": np.array([1000.0, 500.0]), "heads": share, "groups": share, "tokens": share[..., 0]}
    np.savez(bare / "evaluation" / "widths.npz", names=np.array([evil[:20]]), **widths)
    scores = {"prompts": 4, "steps": 2, "models": {evil: {"overall": 0.5, "categories": {evil: None}}}}
    (bare / "evaluation" / "scores.json").write_text(json.dumps(scores))
    (bare / "export" / "export.json").write_text(json.dumps([{"format": evil, "path": evil, "bytes": 1}]))
    written, page = page_of(bare)
    assert "script" not in page.tags
    assert page.text("samples").endswith(evil) and page.text("export").count(evil) == 2
    assert "not verified" in page.text("export") and "<script" not in written
    assert "Fréchet" not in page.text("scores")  # an older evaluation's


def test_experts_are_shown_where_a_run_has_them(bare: Path) -> None:
    _, page = page_of(bare)
    assert "experts" not in page.sections and "#experts" not in page.addresses
    write_gates(bare, 50)
    gates = write_gates(bare, 100)
    with (bare / "metrics.jsonl").open("a") as file:
        for step, mixed in ((49, 0.93), (99, 0.71)):
            file.write(
                json.dumps({"step": step, "ratio_eval": 0.5, "gate_entropy": mixed, "dead_experts": 0.25}) + "\n"
            )
    written, page = page_of(bare)
    assert "#experts" in page.addresses
    words = page.text("experts")
    assert all(f"expert {i}" in words for i in range(4)) and "0.71" in words and "25 %" in words
    assert "blocks.3" in words and "to_q" not in words
    away = np.abs(gates - gates.mean(axis=1, keepdims=True)).sum(axis=2) / 2
    away = away.reshape(4, 2, -1).mean(axis=1)
    assert f"{round(100 * float(away.max()))}\u00a0%" in written, "the strongest cell of the map"


def test_damaged_gates_are_said_in_their_section(bare: Path) -> None:
    (bare / "gates").mkdir()
    (bare / "gates" / "step-0000010.npz").write_text("PK torn")
    _, page = page_of(bare)
    assert "gates/step-0000010.npz cannot be used" in page.text("experts")


def test_long_runs_with_large_pictures_stay_small(bare: Path) -> None:
    rng = np.random.default_rng(0)
    folder = bare / "evaluation"
    folder.mkdir()
    lines = (json.dumps({"step": step, "loss": 1.0, "loss_flow": rng.random()}) for step in range(20_000))
    (bare / "metrics.jsonl").write_text("\n".join(lines))
    noise = rng.integers(0, 256, (30, 256, 320, 3), dtype=np.uint8)
    np.savez(folder / "pictures.npz", captions=np.array(["noise"] * 30), **dict.fromkeys(MODELS, noise))
    np.savez(folder / "tokens.npz", pictures=noise[:8], keep=rng.random((8, 28, 32, 40)), timesteps=np.arange(28))
    share = rng.random((100, 57, 4))
    widths = {"timesteps": np.linspace(1000, 10, 100), "heads": share, "groups": share > 0.5, "tokens": share[..., 0]}
    np.savez(folder / "widths.npz", names=np.array([f"single_transformer_blocks.{i}" for i in range(57)]), **widths)
    written, page = page_of(bare)
    assert len(written) < 5_000_000
    assert "24 of 30 captions shown" in page.text("samples") and "6 of 8 pictures shown" in page.text("tokens")


def test_model_without_token_routers(bare: Path) -> None:
    folder = bare / "evaluation"
    folder.mkdir()
    write_arrays(folder, np.random.default_rng(0))
    with np.load(folder / "widths.npz") as file:
        widths = dict(file)
    np.savez(folder / "widths.npz", **(widths | {"tokens": np.full((12, 6), np.nan)}))
    _, page = page_of(bare)
    assert "Image tokens" not in page.text("width")
    assert "every token is computed" in page.text("width")


def test_out_is_written_there_and_replaced(bare: Path, tmp_path: Path) -> None:
    out = tmp_path / "pages" / "one.html"
    assert write_report(bare, out) == out
    first = out.read_text()
    assert write_report(bare, out).read_text() == first
    assert [path.name for path in out.parent.iterdir()] == ["one.html"]
    assert not (bare / "report.html").exists()


def test_numbers_have_sensible_digits() -> None:
    assert [digits(value) for value in (0.05124, 1.6407, 12345.6, 0.0, 4.84e-7)] == [
        "0.0512",
        "1.64",
        "12,300",
        "0",
        "4.84 × 10⁻⁷",
    ]
    assert digits(-0.5, 1) == "−0.5" and digits(math.nan) == "–" and percent(None) == "–"
    assert digits(0.9996) == "1.00"
    assert with_prefix(1.047e9, "MACs") == "1.05\u00a0GMACs" and with_prefix(999, "B") == "999\u00a0B"
    assert [duration(value) for value in (42, 1050, 11_100)] == ["42\u00a0s", "18\u00a0min", "3\u00a0h 05\u00a0min"]


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 2500, 6) == [0, 500, 1000, 1500, 2000, 2500]
    assert nice_ticks(0.41, 1.02) == pytest.approx([0.6, 0.8, 1.0])
    assert nice_ticks(3, 3) == [3]


def test_smoothing_keeps_level_and_length() -> None:
    steps = np.arange(5000.0)
    noisy = Curve(steps, 2 + np.random.default_rng(0).normal(0, 1, 5000))
    calm = smooth(noisy)
    assert len(calm.steps) == len(calm.values) == 1200
    assert calm.values == pytest.approx(np.full(1200, 2.0), abs=0.6) and calm.values.std() < 0.2
    assert thin(noisy, 10).values.mean() == pytest.approx(noisy.values.mean())
    spiky = noisy._replace(values=np.where(steps == 3210, 99.0, noisy.values))
    assert extremes(spiky).values.max() == 99 and len(extremes(spiky).steps) <= 1200
    assert np.all(np.diff(extremes(spiky).steps) > 0)


def test_markup_escapes_all_but_markup() -> None:
    assert (
        el("p", "<&>", Html("<b>x</b>"), title='"', class_="a")
        == '<p title="&quot;" class="a">&lt;&amp;&gt;<b>x</b></p>'
    )
    assert el("line", x1=1.23456789, y1=None) == '<line x1="1.23457"/>'
