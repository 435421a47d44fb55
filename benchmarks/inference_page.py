"""docs/speed.md and docs/speed.svg, made of the results of benchmarks/inference.py."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.inference_variants import VARIANTS

PAGE, PLOT = Path(__file__).parents[1] / "docs" / "speed.md", "speed.svg"
Result = dict[str, Any]
Row = dict[str, Any]
OURS, CACHED, PEERS, STATIC = "#0072b2", "#009e73", "#e69f00", "#777777"
HEADLINE = "both"
"""The variant that every comparison is summed up by."""
DETAILED = 10
"""Variants from which on a comparison has a panel of its own."""
COLUMNS = (
    "", "GMACs", "ideal", "realised", "share", "over open", "over open, packed", "seconds", "set-up", "first",
    "copies, GiB", "memory, GiB",
)  # fmt: skip
HEADER = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
WHERE = ("size", "layers", "image_tokens", "text_tokens", "batch", "samples", "schedule", "steps", "target")
"""What the rows of one comparison have in common."""


def write_page(results: list[Result], docs: Path) -> None:
    """docs/speed.md with these results below its heading for them, and their plot; ``docs`` is where both go."""
    prose, heading, _ = PAGE.read_text().partition("\n## Results\n")
    assert heading, f"{PAGE}: no heading '## Results' to write the tables below"
    docs.mkdir(parents=True, exist_ok=True)
    (docs / PAGE.name).write_text(f"{prose}{heading}\n{tables(results)}")
    if results:
        plot(results).savefig(docs / PLOT, metadata={"Date": None})


def tables(results: list[Result]) -> str:
    """Plot and tables as Markdown, and what is missing."""
    parts = [f"![ideal and realised speed-up]({PLOT})\n", *_summary(results)] if results else []
    for device, name in (("cpu", "a CPU"), ("cuda", "a GPU")):
        own = [result for result in results if result["device"] == device]
        parts += map(_section, own)
        if not own:
            parts.append(f"There is no result from {name} yet.\n")
    return "\n".join(parts)


def _summary(results: list[Result]) -> list[str]:
    """The packed model of every comparison, in a line each."""
    head = ["| | dtype | ideal | realised | share | over open, packed |", "|---" * 6 + "|"]
    lines = [
        f"| {_title(where)} | {result['device']} {result['dtype']} | {row['ideal']:.2f} | {row['realised']:.2f} "
        f"| {row['share']:.0%} | {_over_packed(row, rows)} |"
        for result, where, rows, row in _headlines(results)
    ]
    return [f"**{VARIANTS[HEADLINE]}: all comparisons**\n", "\n".join([*head, *lines]) + "\n"] if lines else []


def _headlines(results: list[Result]) -> list[tuple[Result, Row, list[Row], Row]]:
    """Each comparison with a packed model: the result, what its rows have in common, the rows, and the model's."""
    found = [(result, *comparison) for result in results for comparison in comparisons_of(result["rows"])]
    return [(result, where, rows, row) for result, where, rows in found for row in rows if row["variant"] == HEADLINE]


def _section(result: Result) -> str:
    checks = ", ".join(f"{size} {agreement:.4f}" for size, agreement in result["flops_checks"].items())
    parts = [
        f"### {result['machine']}, {result['dtype']}\n",
        f"torch {result['versions']['torch']}, diffusers {result['versions']['diffusers']}, {result['date']}; "
        f"{result['settings']['repetitions']} rounds. MACs counted by torch over those of the cost model: {checks}.\n",
    ]
    for where, rows in comparisons_of(result["rows"]):
        lines = [_line(row, _over_packed(row, rows)) for row in rows]
        masks = f"{_title(where)}" + (f" ({result['settings']['masks']})" if where["target"] is None else "")
        parts += [f"**{masks}**\n", "\n".join([*HEADER, *lines]) + "\n"]
        left_out = [
            f"{VARIANTS[skip['variant']]} ({skip['reason']})"
            for skip in result["skipped"]
            if all(skip[key] == where[key] for key in WHERE)
        ]
        if left_out:
            parts.append(f"Left out: {'; '.join(left_out)}.\n")
        launched = [
            f"{VARIANTS[row['variant']]}: {row['recompilations']} codes or graphs in {row['warmup_seconds']:.1f} s"
            for row in rows
            if row.get("recompilations")
        ]
        if launched:
            parts.append(f"{'; '.join(launched)}.\n")
    return "\n".join(parts)


def comparisons_of(rows: list[Row]) -> list[tuple[Row, list[Row]]]:
    """What rows have in common, and the rows."""
    groups = [list(group) for _, group in groupby(rows, key=lambda row: [row[key] for key in WHERE])]
    return [({key: group[0][key] for key in WHERE}, group) for group in groups]


def _title(where: Row) -> str:
    text = f" + {where['text_tokens']} of text" if where["text_tokens"] else ""
    tokens = f"{where['image_tokens']:,} tokens{text}"
    shape = f"{where['size']}, {where['layers']} blocks, {tokens}, batch {where['batch']}"
    return f"{shape}, {_steps(where)}, {_masks(where)}"


def _steps(where: Row) -> str:
    return f"{where['steps']} steps" + (" of a distilled sampler" if where["schedule"] == "few" else "")


def _masks(where: Row) -> str:
    return "masks of a run" if where["target"] is None else f"ratio {where['target']:g}"


def _over_packed(row: Row, rows: list[Row]) -> str:
    """How much faster a row is than our open model packed alike, round by round; nothing where that was not run."""
    open_packed = next((other for other in rows if other["variant"] == "open-packed"), None)
    if open_packed is None:
        return ""
    pairs = zip(open_packed["seconds"], row["seconds"], strict=True)
    return f"{median(other / own for other, own in pairs):.2f}"


def _copies(row: Row) -> str:
    """What packing copied, and how it is kept where that is not in one way."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in row["stored"].items())
    return f"{row['plan_bytes'] / 2**30:.2f}" + (f" ({kinds})" if len(row["stored"]) > 1 else "") if kinds else ""


def _line(row: Row, over_packed: str) -> str:
    low, high = row["realised_iqr"]
    cells = [
        VARIANTS[row["variant"]], f"{row['macs'] / 1e9:.1f}", f"{row['ideal']:.2f}",
        f"{row['realised']:.2f} ({low:.2f}–{high:.2f})", f"{row['share']:.0%}", f"{row['realised_over_open']:.2f}",
        over_packed,
        f"{row['seconds_median']:.3f}", f"{row['setup_seconds']:.1f}", f"{row['first_seconds']:.2f}",
        _copies(row), f"{row['peak_bytes'] / 2**30:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def plot(results: list[Result]) -> Any:
    """A ring for the ideal, a dot with its quartiles for what was realised: the packed model of every comparison, then
    all variants of the larger ones."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "speed", "font.size": 9}
    headlines = [
        (f"{where['size']}, {result['device']} {result['dtype']}, batch {where['batch']}, {_steps(where)}, "
         f"{_masks(where)}", row)
        for result, where, _, row in _headlines(results)
    ]  # fmt: skip
    panels = [(result, *comparison) for result in results for comparison in comparisons_of(result["rows"])]
    panels = [panel for panel in panels if len(panel[2]) >= DETAILED]
    most, lines = max([1, *(len(rows) for _, _, rows in panels)]), -(-len(panels) // 2)
    heights = [0.21 * len(headlines) + 1.0, (0.21 * most + 0.9) * lines]
    figure = Figure(figsize=(11.2, sum(heights) + 0.3), layout="constrained")
    above, details = figure.subfigures(2, 1, height_ratios=[heights[0], max(heights[1], 0.01)])
    top = above.add_subplot()
    _dots(top, [row for _, row in headlines], [OURS] * len(headlines), [label for label, _ in headlines])
    top.set_title(f"{VARIANTS[HEADLINE]}", loc="left", fontsize=9)
    for i, (result, where, rows) in enumerate(panels):
        axes = details.add_subplot(lines, 2, i + 1)
        _dots(axes, rows, [_colour(row["variant"]) for row in rows], [VARIANTS[row["variant"]] for row in rows], most)
        title = f"{where['size']}, {result['device']} {result['dtype']}\nbatch {where['batch']}, {_steps(where)}"
        axes.set_title(f"{title}, {_masks(where)}", loc="left", fontsize=9)
    colours = {"dynamic": OURS, "dynamic and cache": CACHED, "peers": PEERS, "static": STATIC}
    marks = [
        Line2D([], [], marker="o", mfc="none", mec="#333333", ls="", label="ideal (MACs)"),
        Line2D([], [], marker="o", color="#333333", ls="", label="realised (median and quartiles)"),
        *(Line2D([], [], color=colour, lw=4, label=label) for label, colour in colours.items()),
    ]
    above.legend(handles=marks, loc="outside upper center", ncols=6, frameon=False)
    return figure


def _dots(axes: Any, rows: list[Row], colours: list[str], labels: list[str], places: int | None = None) -> None:
    for place, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        low, high = row["realised_iqr"]
        axes.plot([row["ideal"], row["realised"]], [place, place], color=colour, alpha=0.35, lw=1)
        axes.plot([low, high], [place, place], color=colour, lw=3, solid_capstyle="butt", alpha=0.5)
        axes.plot(row["ideal"], place, "o", mfc="none", mec=colour, ms=7)
        axes.plot(row["realised"], place, "o", color=colour, ms=4)
    axes.axvline(1, color="#bbbbbb", lw=0.8, zorder=0)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim((places or len(rows)) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("speed-up over the static model")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _colour(variant: str) -> str:
    if variant.startswith("both-"):
        return CACHED
    if variant in ("static", "open", "open-packed", "static-compile", "static-cudagraphs"):
        return STATIC
    return PEERS if variant.startswith("static-") or variant in ("fixed-k", "tomesd") else OURS
