"""A run as one frame of a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

WINDOW = 20
"""Steps that a shown mean is taken over."""
ROWS = 16
"""Of the heat map; a deeper network shares them."""
RANKS = 8
"""That are shown; of more, the slowest."""
_SPARKS = "▁▂▃▄▅▆▇█"
_TROUBLES = {
    "bad samples": "bad_samples",
    "left out": "nonfinite",
    "rollbacks": "rollbacks",
    "failed saves": "checkpoint_failures_total",
}
_DARK, _BRIGHT = (32, 36, 46), (64, 150, 220)
_QUIET = "bright_black"


@dataclass
class Rank:
    """What one process last said of itself."""

    number: int
    age: float
    """Seconds since its last sign of life."""
    record: Mapping[str, Any]


@dataclass
class Snapshot:
    """What a frame shows."""

    about: Mapping[str, Any]
    """``RUN/monitor.json``."""
    state: str
    """Training, or how it ended."""
    alive: bool
    ages: Mapping[str, float]
    """Seconds since the newest heartbeat, step and commit."""
    steps: Sequence[Mapping[str, Any]]
    """Records of steps, in order."""
    last: Mapping[str, Any]
    """The newest value of every key, of whatever record."""
    ranks: Sequence[Rank] = field(default_factory=list)


def frame(shot: Snapshot) -> RenderableType:
    """The whole frame."""
    parts: list[RenderableType] = [_head(shot)]
    if not shot.steps:
        return Group(*parts, Text("no step is trained yet", style=_QUIET))
    pairs = Table.grid(expand=True, padding=(0, 1))
    pairs.add_column(ratio=1)
    pairs.add_column(ratio=1)
    pairs.add_row(_panel("training", _training(shot)), _panel("machine", _machine(shot)))
    pairs.add_row(_panel("loss by timestep, 1000 is noise", _timesteps(shot)), _panel("processes", _ranks(shot)))
    parts.append(pairs)
    if shot.last.get("routers"):
        parts.append(_panel("routers: tenths that work, by block (down) and timestep (across, to noise)", _maps(shot)))
    return Group(*parts)


def _head(shot: Snapshot) -> Panel:
    about, last = shot.about, shot.last
    total = about.get("steps", 0)
    done = shot.last["step"] + 1 if shot.steps else about.get("first_step", 0)
    bar = Table.grid(expand=True, padding=(0, 1))
    bar.add_column(ratio=1)
    bar.add_column()
    text = f"{done} of {total} steps"
    if shot.steps:
        seconds = _mean(shot, "seconds") or 0.0
        left = f", {_span(seconds * (total - done))} left" if shot.alive else ""
        text += f", {seconds:.2f} s each{left}"
    bar.add_row(ProgressBar(total=max(1, total), completed=done, complete_style="green"), text)
    where = f"{about.get('engine', '')} x {about.get('ranks', 1)} on {about.get('device', '')}"
    said = Text.assemble(
        (shot.state, "green" if shot.alive else "yellow"),
        f", {where}, " + ", ".join(f"{what} {_span(age)} ago" for what, age in shot.ages.items()),
    )
    if restarts := last.get("restarts") or about.get("restarts"):
        said.append("; started again after " + ", ".join(f"{how} ({count})" for how, count in restarts.items()))
    return _panel(about.get("name", "run"), Group(said, bar))


def _training(shot: Snapshot) -> Table:
    table = _rows()
    for name, key in (("flow loss", "loss_flow"), ("supervision", "loss_supervision")):
        table.add_row(name, _number(_mean(shot, key)), _sparks(shot, key))
    target = shot.last["target"]
    ratio = _mean(shot, "ratio")
    off = ratio is not None and abs(ratio - target) > 0.05
    table.add_row("cost ratio", Text(_number(ratio), style="yellow" if off else "green"), _sparks(shot, "ratio"))
    table.add_row("  target", _number(target), _sparks(shot, "target"))
    if "ratio_eval" in shot.last:
        table.add_row("  evaluated", _number(shot.last["ratio_eval"]), f"error {_number(shot.last['mse_eval'])}")
    table.add_row("gradient", _number(_mean(shot, "grad_norm")), _sparks(shot, "grad_norm"))
    table.add_row("learning rate", f"{shot.last['lr']:.2e}", _sparks(shot, "lr"))
    if "dead_heads" in shot.last:
        table.add_row("dead heads", f"{shot.last['dead_heads']:.1%}", "")
    if "gate_entropy" in shot.last:
        experts = f"entropy {shot.last['gate_entropy']:.2f}, dead {shot.last['dead_experts']:.0%}"
        table.add_row("experts", "", experts)
    return table


def _machine(shot: Snapshot) -> Table:
    last, table = shot.last, _rows()
    table.add_row("samples/s", _number(_mean(shot, "samples_per_second")), _sparks(shot, "samples_per_second"))
    wait = _mean(shot, "data_wait")
    if wait is not None:
        style = "yellow" if wait > 0.2 else ""
        table.add_row("data wait", Text(f"{wait:.1%}", style=style), _sparks(shot, "data_wait"))
    if "mfu" in last:
        use, speed = _labelled(shot, "mfu"), _labelled(shot, "tflops")
        peak = f"{shot.about.get('peak_tflops', 0):.3g}, {shot.about.get('peak', '')}"
        table.add_row("MFU activated", f"{use['activated']:.1%}", f"{speed['activated']:.3g} TFLOP/s a device")
        table.add_row("  as if dense", f"{use['dense']:.1%}", f"{speed['dense']:.3g} of {peak}")
    if "goodput" in last:
        table.add_row("goodput", f"{last['goodput']:.1%}", "time in steps that count")
    if "checkpoint_bytes" in last:
        size, blocked = last["checkpoint_bytes"] / 2**20, last["checkpoint_blocked_seconds"]
        text = f"{size:.1f} MiB, {last['checkpoint_seconds']:.1f} s, blocked {blocked:.2f}"
        table.add_row("checkpoint", f"step {last.get('checkpoint_step', '-')}", text)
    found = [f"{name} {last[key]}" for name, key in _TROUBLES.items() if last.get(key)]
    table.add_row("trouble", "", Text(", ".join(found), style="red") if found else Text("none", style=_QUIET))
    return table


def _timesteps(shot: Snapshot) -> Table:
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(justify="right", style=_QUIET)
    table.add_column(ratio=1)
    table.add_column(justify="right")
    rows = [record["loss_timestep"] for record in shot.steps[-WINDOW:] if record.get("loss_timestep")]
    if not rows:
        return table
    means = [_average(found for found in column if found is not None) for column in zip(*rows, strict=True)]
    most = max((mean for mean in means if mean is not None), default=1.0) or 1.0
    for i, mean in enumerate(means):
        bar = ProgressBar(total=most, completed=mean or 0.0, complete_style="blue", finished_style="blue")
        table.add_row(f"from {round(1000 * i / len(means))}", bar, _number(mean))
    return table


def _ranks(shot: Snapshot) -> Table:
    table = Table(box=None, padding=(0, 1), expand=True, header_style=_QUIET)
    for name in ("rank", "alive", "step", "seconds", "data", "memory"):
        table.add_column(name, justify="right")
    slowest = sorted(shot.ranks, key=lambda rank: (rank.record.get("step", 0), -rank.age))[:RANKS]
    for rank in sorted(slowest, key=lambda rank: rank.number):
        record = rank.record
        memory = f"{record['gpu_memory'] / 2**30:.1f} GiB" if "gpu_memory" in record else "-"
        seconds, data = record.get("rank_step_seconds"), record.get("rank_data_seconds")
        table.add_row(
            str(rank.number), Text(f"{_span(rank.age)} ago", style="red" if shot.alive and rank.age > 60 else ""),
            str(record.get("step", "-")), _number(seconds), _number(data), memory,
        )  # fmt: skip
    if len(shot.ranks) > RANKS:
        table.add_row("...", f"{len(shot.ranks) - RANKS} more")
    work = shot.last.get("rank_seconds")
    if work and len(shot.ranks) > 1:
        spread = f"first forward after {work['min']:.2f} to {work['max']:.2f} s"
        table.caption, table.caption_style = f"{spread}, last is rank {shot.last['slowest_rank']}", _QUIET
    return table


def _maps(shot: Snapshot) -> Columns:
    return Columns([_map(kind, layers) for kind, layers in shot.last["routers"].items()], padding=(0, 3))


def _map(kind: str, layers: Sequence[Sequence[float | None]]) -> Group:
    each = -(-len(layers) // ROWS)
    lines = [Text(f"      {kind}", style=_QUIET)]
    for first in range(0, len(layers), each):
        part = layers[first : first + each]
        name = str(first) if len(part) == 1 else f"{first}-{first + len(part) - 1}"
        line = Text(f"{name:>5} ", style=_QUIET)
        for column in zip(*part, strict=True):
            line.append(*_cell(_average(found for found in column if found is not None)))
        lines.append(line)
    return Group(*lines)


def _cell(share: float | None) -> tuple[str, str]:
    if share is None:
        return " · ", _QUIET
    low = [round(dark + share * (bright - dark)) for dark, bright in zip(_DARK, _BRIGHT, strict=True)]
    return f"{round(10 * share):>2} ", f"white on rgb({low[0]},{low[1]},{low[2]})"


def _sparks(shot: Snapshot, key: str, width: int = 20) -> Text:
    """The course since the first step in view, as means of equal parts."""
    values = [record[key] for record in shot.steps if isinstance(record.get(key), (int, float))]
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite:
        return Text("")
    parts = [finite[len(finite) * i // width : len(finite) * (i + 1) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts if part]
    low, high = min(means), max(means)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return Text("".join(_SPARKS[round(scale * (mean - low))] for mean in means), style="blue", no_wrap=True)


def _labelled(shot: Snapshot, key: str) -> dict[str, float]:
    rows = [record[key] for record in shot.steps[-WINDOW:] if key in record]
    return {label: sum(row[label] for row in rows) / len(rows) for label in rows[-1]}


def _mean(shot: Snapshot, key: str) -> float | None:
    return _average(record[key] for record in shot.steps[-WINDOW:] if key in record)


def _average(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else str(timedelta(seconds=round(seconds)))


def _rows() -> Table:
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(style=_QUIET, no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(ratio=1)
    return table


def _panel(title: str, inside: RenderableType) -> Panel:
    return Panel(inside, title=title, title_align="left", border_style=_QUIET)
