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
    parts = [f"![ideal and realised speed-up of every variant]({PLOT})\n"] if results else []
    for device, name in (("cpu", "a CPU"), ("cuda", "a GPU")):
        own = [result for result in results if result["device"] == device]
        parts += map(_section, own)
        if not own:
            parts.append(f"There is no result from {name} yet.\n")
    return "\n".join(parts)


def _section(result: Result) -> str:
    checks = ", ".join(f"{size} {agreement:.4f}" for size, agreement in result["flops_checks"].items())
    parts = [
        f"### {result['machine']}, {result['dtype']}\n",
        f"torch {result['versions']['torch']}, diffusers {result['versions']['diffusers']}, {result['date']}; "
        f"{result['settings']['repetitions']} rounds. MACs counted by torch over those of the cost model: {checks}.\n",
    ]
    gpu = result["device"] == "cuda"
    for where, rows in _comparisons(result["rows"]):
        lines = [_line(row, gpu, _over_packed(row, rows)) for row in rows]
        parts += [f"**{_title(where)}**\n", "\n".join([*_header(gpu), *lines]) + "\n"]
        left_out = [
            f"{VARIANTS[skip['variant']]} ({skip['reason']})"
            for skip in result["skipped"]
            if all(skip[key] == where[key] for key in WHERE)
        ]
        if left_out:
            parts.append(f"Left out: {'; '.join(left_out)}.\n")
    return "\n".join(parts)


def _comparisons(rows: list[Row]) -> list[tuple[Row, list[Row]]]:
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


def _header(gpu: bool) -> list[str]:
    memory = "memory, GiB" if gpu else "packed, GiB"
    columns = (
        "GMACs",
        "ideal",
        "realised",
        "share",
        "over open",
        "over open, packed",
        "seconds",
        "set-up",
        "first",
        memory,
    )
    return [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]


def _over_packed(row: Row, rows: list[Row]) -> str:
    """How much faster a row is than our open model packed alike, round by round; nothing where that was not run."""
    open_packed = next((other for other in rows if other["variant"] == "open-packed"), None)
    if open_packed is None:
        return ""
    pairs = zip(open_packed["seconds"], row["seconds"], strict=True)
    return f"{median(other / own for other, own in pairs):.2f}"


def _line(row: Row, gpu: bool, over_packed: str) -> str:
    low, high = row["realised_iqr"]
    held = row["peak_bytes"] if gpu else row["plan_bytes"]
    cells = [
        VARIANTS[row["variant"]], f"{row['macs'] / 1e9:.1f}", f"{row['ideal']:.2f}",
        f"{row['realised']:.2f} ({low:.2f}–{high:.2f})", f"{row['share']:.0%}", f"{row['realised_over_open']:.2f}",
        over_packed,
        f"{row['seconds_median']:.3f}", f"{row['setup_seconds']:.1f}", f"{row['first_seconds']:.2f}",
        f"{held / 2**30:.2f}" if held else "",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def plot(results: list[Result]) -> Any:
    """A panel for each comparison: a ring for the ideal, a dot with its quartiles for what was realised."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "speed", "font.size": 9}
    panels = [(result, *comparison) for result in results for comparison in _comparisons(result["rows"])]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    most = max(len(rows) for _, _, rows in panels)
    figure = Figure(figsize=(5.6 * columns, (0.21 * most + 0.9) * lines + 0.5), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (result, where, rows) in zip(grid, panels, strict=False):
        _panel(axes, result, where, rows, most)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    colours = {"dynamic": OURS, "dynamic and cache": CACHED, "peers": PEERS, "static": STATIC}
    marks = [
        Line2D([], [], marker="o", mfc="none", mec="#333333", ls="", label="ideal (MACs)"),
        Line2D([], [], marker="o", color="#333333", ls="", label="realised (median and quartiles)"),
        *(Line2D([], [], color=colour, lw=4, label=label) for label, colour in colours.items()),
    ]
    figure.legend(handles=marks, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _panel(axes: Any, result: Result, where: Row, rows: list[Row], places: int) -> None:
    for place, row in enumerate(rows):
        colour, (low, high) = _colour(row["variant"]), row["realised_iqr"]
        axes.plot([row["ideal"], row["realised"]], [place, place], color=colour, alpha=0.35, lw=1)
        axes.plot([low, high], [place, place], color=colour, lw=3, solid_capstyle="butt", alpha=0.5)
        axes.plot(row["ideal"], place, "o", mfc="none", mec=colour, ms=7)
        axes.plot(row["realised"], place, "o", color=colour, ms=4)
    axes.axvline(1, color="#bbbbbb", lw=0.8, zorder=0)
    axes.set_yticks(range(len(rows)), [VARIANTS[row["variant"]] for row in rows])
    axes.set_ylim(places - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("speed-up over the static model")
    title = f"{where['size']}, {result['device']} {result['dtype']}\nbatch {where['batch']}, {_steps(where)}"
    axes.set_title(f"{title}, {_masks(where)}", loc="left", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _colour(variant: str) -> str:
    if variant.startswith("both-"):
        return CACHED
    if variant in ("static", "open", "open-packed", "static-compile", "static-cudagraphs"):
        return STATIC
    return PEERS if variant.startswith("static-") or variant in ("fixed-k", "tomesd") else OURS
