"""One reader of recorded cells: rows with times by shape and batch, their medians and intervals, lines through them, tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from moelab import roofline
from moelab.errors import counted
from moelab.plots.panel import Row, timing
from moelab.plots.style import GREY, Look, error_bars, grid, log_axis, look
from moelab.recordings import Recording
from moelab.roofline import Ceilings, Cost

Span = tuple[float, float, float]
"""A value at the median, and at the ends of its 95 % interval."""

CLEARLY = 0.05
"""A gain that another run, or another machine of the kind, will hardly turn."""


IDEAS: Mapping[str, str] = {
    "a ring of more than two stages": "a pipeline of more than two stages",
    "blocks in pairs": "clusters of two CTAs, weights by multicast",
    "largest tiles first": "longest tiles first (LPT)",
    "start during the launch before": "programmatic dependent launch (PDL)",
    "the same rows side by side": "grid order for L2 reuse",
    "tiles as narrow as their tokens": "tile N fitted to the tokens",
    "tokens written out by expert": "permuted activations",
    "two blocks a multiprocessor": "two CTAs an SM",
    "weights asked for ahead": "prefetch of weights before griddepcontrol.wait",
}
"""What recordings made until 2026-11 call an idea of the fastest layer -> the field's word for it."""


def timed(recording: Recording) -> list[Row]:
    """The rows that hold times, without what was refused."""
    return [row for row in recording.rows if "samples_us" in row]


def names_of(rows: Sequence[Row], field: str) -> list[Any]:
    """The different values of a field, in order of appearance."""
    return list(dict.fromkeys(row[field] for row in rows))


def cells_of(rows: Sequence[Row], *fields: str, by: str = "impl") -> dict[Any, dict[Any, Row]]:
    """(shape, batch), or the fields named -> implementation, or what `by` names -> row."""
    cells: dict[Any, dict[Any, Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row[f] for f in fields or ("shape", "num_tokens")), {})[row[by]] = row
    return cells


def sound(cell: Mapping[str, Row]) -> dict[str, Row]:
    """The rows of a cell whose results are within their error bound."""
    return {impl: row for impl, row in cell.items() if row["within_bound"]}


def fastest(times: Mapping[Any, Any]) -> list[Any]:
    """Of Measurements by name: the one with the smallest median, then those that tie with it (95 % intervals overlap)."""
    from moelab.measure import tie

    best = min(times, key=lambda name: times[name].median_us)
    return [best, *(name for name in times if name != best and tie(times[best], times[name]))]


def verdict(ours: Any, rival: Any) -> str:
    """One Measurement beside another: "faster", "slower", or "tie" where the 95 % intervals overlap."""
    first = fastest({"faster": ours, "slower": rival})
    return first[0] if len(first) == 1 else "tie"


def conclude(head: str, facts: Mapping[str, str | Sequence[str]]) -> str:
    """A conclusion in bold, then "name: value" for each fact that there is."""
    told = {name: fact if isinstance(fact, str) else ", ".join(fact) for name, fact in facts.items()}
    return " ".join([f"**{head}**", *(f"{name}: {fact}." for name, fact in told.items() if fact)])


def span(row: Row, by: float = 1.0, samples: str = "samples_us") -> Span:
    """A row's time over `by`."""
    time = timing({"samples_us": row[samples]})
    low, high = time.interval_us
    return time.median_us / by, low / by, high / by


def floor_of(row: Row, at: Ceilings) -> roofline.Floor:
    """The floor of the bytes and FLOP that a row names."""
    return roofline.floor_us(Cost(row["flops"], row["bytes"], 0.0), at)


def over_floor(row: Row, at: Ceilings) -> Span:
    return span(row, floor_of(row, at).us)


def rate(row: Row) -> Span:
    """TFLOP/s reached."""
    middle, low, high = span(row)
    return row["flops"] / middle / 1e6, row["flops"] / high / 1e6, row["flops"] / low / 1e6


def reach(intensity: float, at: Ceilings) -> float:
    """TFLOP/s that the roof allows at so many FLOP per byte."""
    return min(intensity * at.copy_bytes_per_s, at.flops_per_s) / 1e12


def table_of(rows: Sequence[Row], what: str, value: Callable[[Row], float], by: str = "impl") -> list[Row]:
    """A line per shape and implementation (or what `by` names), a column per batch."""
    head = {"impl": "implementation", "config_name": "config"}.get(by, by)
    lines: dict[tuple[Any, Any], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["num_tokens"]):
        line = lines.setdefault((row["shape"], row[by]), {what: row["shape"], head: row[by]})
        line[str(row["num_tokens"])] = value(row)
    order = {shape: i for i, shape in enumerate(names_of(rows, "shape"))}
    among = {name: i for i, name in enumerate(names_of(rows, by))}
    return [lines[key] for key in sorted(lines, key=lambda key: (order[key[0]], among[key[1]]))]


def where(row: Row) -> str:
    """A cell in words: implementation or config, shape, batch."""
    return f"{row.get('impl') or row.get('config_name')}, {row['shape']}, batch {row['num_tokens']}"


def extremes(
    rows: Sequence[Row], value: Callable[[Row], float], form: str = ".2f", at: Callable[[Row], str] = where
) -> str:
    """From the smallest to the largest, each with its cell."""
    return " to ".join(f"{value(row):{form}} ({at(row)})" for row in (min(rows, key=value), max(rows, key=value)))


# --- lines ----------------------------------------------------------------------------------------------------------


def line(figure: go.Figure, xs: Sequence[Any], spans: Sequence[Span], name: str, style: Look, **how: Any) -> None:
    """A line through medians, with bars for the intervals."""
    middle, low, high = (list(each) for each in zip(*spans, strict=True)) if spans else ([], [], [])
    given = {"mode": "lines+markers", "line": style.line(), "marker": style.marker(7), "legendgroup": name} | how
    figure.add_scatter(x=list(xs), y=middle, error_y=error_bars(middle, low, high), name=name, **given)


def trace(
    figure: go.Figure, points: Mapping[Any, Any], name: str, style: Look, *, hollow: bool = False, mode: str = "lines+markers",
    legend: bool = True, **how: Any,
) -> None:  # fmt: skip
    """A line, markers, or both through points: x -> y. legend: False where another plot has named it."""
    given = {
        "line": style.line(),
        "marker": style.marker(12 if hollow else 8, hollow=hollow),
        "legendgroup": name,
    } | how
    figure.add_scatter(x=list(points), y=list(points.values()), name=name, mode=mode, showlegend=legend, **given)


def plots(
    title: str,
    source: str,
    rows: Sequence[Row],
    value: Callable[[Row], Span],
    y: str,
    ticks: Sequence[float] | None,
    *,
    by: str = "impl",
    per: str | None = "shape",
    looks: Callable[[str], Look] = look,
    across: Callable[[Row], float] | None = None,
    hidden: Sequence[str] = (),
    per_line: int = 2,
    tall: int = 300,
    base: float | None = 1.0,
) -> go.Figure:
    """A plot per shape (or what `per` names; None: one plot), a line per implementation (or what `by` names) by batch; hollow
    where a row is past its error bound.

    y, ticks: of the shared log axis. across: x of a row in place of its batch; then the axes are left to the caller. hidden:
    in the legend only, until its name there is clicked. base: where a dotted line lies.
    """
    shapes, shown = names_of(rows, per) if per else [""], set[str]()
    lines = math.ceil(len(shapes) / per_line)
    tall += 60 if lines == 1 else 0
    figure = grid(title, source, titles=shapes, rows=lines, shared_y=True, height=170 + tall * lines)
    for index, shape in enumerate(shapes):
        place = {"row": index // per_line + 1, "col": index % per_line + 1}
        for name in names_of(rows, by):
            mine = [r for r in rows if r[by] == name and (per is None or r[per] == shape)]
            mine = sorted(mine, key=lambda r: r["num_tokens"])
            if not mine:
                continue
            style = looks(name)
            symbols = [style.symbol + ("" if row.get("within_bound", True) else "-open") for row in mine]
            line(
                figure, [(across or _batch)(row) for row in mine], [value(row) for row in mine], name, style, **place,
                marker={**style.marker(8), "symbol": symbols}, showlegend=name not in shown,
                visible="legendonly" if name in hidden else True, customdata=[row["num_tokens"] for row in mine],
                hovertemplate=f"{name}, batch %{{customdata}}: %{{y:.3g}}<extra></extra>",
            )  # fmt: skip
            shown.add(name)
    if across is None:
        figure.update_xaxes(**log_axis(sorted(names_of(rows, "num_tokens"))))
        figure.update_xaxes(title="batch, tokens", row=lines)
    figure.update_yaxes(type="log", tickvals=ticks, matches="y")
    figure.update_yaxes(title=y, col=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.12 if lines > 1 else -0.2, "traceorder": "normal"})
    if base is not None:
        figure.add_hline(base, line={"color": GREY, "dash": "dot"})
    return figure


def _batch(row: Row) -> float:
    return row["num_tokens"]


def left_out(count: int) -> str:
    """What stands at the end of a sentence where a faster result is past its bound."""
    return f" In {counted(count, 'cell')} something faster is left out, its error past the bound." if count else ""
