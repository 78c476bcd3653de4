"""Every implementation of the layer, each under its own tiles: on the roof, over the floor, and eagerly."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from moelab import roofline
from moelab.errors import counted
from moelab.plots.panel import Panel, Row, geometric_mean, timing
from moelab.plots.style import GREY, error_bars, grid, log_axis, look, powers
from moelab.recordings import Recording
from moelab.roofline import Ceilings, Cost

CLEARLY = 0.05
"""A gain that another run, or another machine of the kind, will hardly turn."""

FAR = 1.5
"""Times the best implementation's mean over the floor."""

_PER_LINE = 2  # plots side by side: batch sizes stay legible at a notebook's width


def timed(recording: Recording) -> list[Row]:
    """The rows that hold times, without what was refused."""
    return [row for row in recording.rows if "samples_us" in row]


def names_of(rows: Sequence[Row], field: str) -> list[Any]:
    """The different values of a field, in order of appearance."""
    return list(dict.fromkeys(row[field] for row in rows))


def _over_floor(row: Row, at: Ceilings) -> float:
    floor: float = roofline.floor_us(Cost(row["flops"], row["bytes"], 0.0), at).us
    return floor


def cells_of(rows: Sequence[Row]) -> dict[tuple[str, int], dict[str, Row]]:
    """(shape, batch) -> implementation -> row."""
    cells: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row["shape"], row["num_tokens"]), {})[row["impl"]] = row
    return cells


def sound(cell: Mapping[str, Row]) -> dict[str, Row]:
    """The rows of a cell whose results are within their error bound."""
    return {impl: row for impl, row in cell.items() if row["within_bound"]}


def by_shape(title: str, source: str, shapes: Sequence[str], tall: int) -> go.Figure:
    """A grid of one plot per shape, the legend below it."""
    lines = math.ceil(len(shapes) / _PER_LINE)
    tall += 0 if lines > 1 else 60
    figure = grid(title, source, titles=shapes, rows=lines, shared_y=True, height=170 + tall * lines)
    figure.update_layout(legend={"orientation": "h", "y": -0.12 if lines > 1 else -0.2, "traceorder": "normal"})
    figure.update_yaxes(matches="y")
    return figure


def draw_lines(figure: go.Figure, rows: Sequence[Row], value: Callable[[Row], tuple[float, float, float]],
               across: Callable[[Row], float] = lambda row: row["num_tokens"], hidden: Sequence[str] = ()) -> None:  # fmt: skip
    """A line per implementation in each shape's plot; hollow where the result is past its error bound.

    value: row -> (middle, low, high). across: row -> x. hidden: in the legend only, until its name there is clicked.
    """
    shown: set[str] = set()
    for index, shape in enumerate(names_of(rows, "shape")):
        place = {"row": index // _PER_LINE + 1, "col": index % _PER_LINE + 1}
        for impl in names_of(rows, "impl"):
            mine = sorted((r for r in rows if (r["shape"], r["impl"]) == (shape, impl)), key=lambda r: r["num_tokens"])
            if not mine:
                continue
            style = look(impl)
            middle, low, high = zip(*(value(row) for row in mine), strict=True)
            symbols = [style.symbol + ("" if row["within_bound"] else "-open") for row in mine]
            figure.add_scatter(
                x=[across(row) for row in mine], y=middle, error_y=error_bars(middle, low, high), name=impl,
                mode="lines+markers", line=style.line(1.8), marker={**style.marker(8), "symbol": symbols}, legendgroup=impl,
                showlegend=impl not in shown, visible="legendonly" if impl in hidden else True,
                customdata=[row["num_tokens"] for row in mine],
                hovertemplate=f"{impl}, batch %{{customdata}}: %{{y:.3g}}<extra></extra>", **place,
            )  # fmt: skip
            shown.add(impl)


# --- on the roof and over the floor -------------------------------------------------------------------------------


def roof(recording: Recording, measured: Ceilings, datasheet: Ceilings) -> Panel:
    """Every implementation on the roof, a plot per shape: FLOP per byte against the FLOP/s reached, log-log."""
    rows = timed(recording)
    shapes = names_of(rows, "shape")
    figure = by_shape("Every implementation on the roof", f"{recording.source()}; each line runs from batch "
                      f"{min(r['num_tokens'] for r in rows)} (left) to {max(r['num_tokens'] for r in rows)}; hollow: past its "
                      "error bound<br>solid grey: the recorded copy bandwidth and product; dotted: the datasheet’s",
                      shapes, 310)  # fmt: skip
    points = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(points) / 2, max(points) * 3
    for index in range(len(shapes)):
        place = {"row": index // _PER_LINE + 1, "col": index % _PER_LINE + 1}
        for ceiling, dash in ((datasheet, "dot"), (measured, "solid")):
            corner = [low, ceiling.ridge_flop_per_byte, high]
            tops = [min(x * ceiling.copy_bytes_per_s, ceiling.flops_per_s) / 1e12 for x in corner]
            figure.add_scatter(x=corner, y=tops, mode="lines", line={"color": GREY, "dash": dash, "width": 1.5},
                               showlegend=False, hoverinfo="skip", **place)  # fmt: skip
    draw_lines(figure, rows, lambda row: _rates(row), lambda row: row["flops"] / row["bytes"])
    figure.update_xaxes(**powers(low, high))
    figure.update_xaxes(title="FLOP / byte", row=math.ceil(len(shapes) / _PER_LINE))
    figure.update_yaxes(**powers(min(_rates(row)[0] for row in rows) / 2, datasheet.flops_per_s / 1e12 * 1.6))
    figure.update_yaxes(title="reached, TFLOP/s", col=1)
    table = table_of(rows, "share of the roof", lambda row: _rates(row)[0] / _top(row, measured))
    return Panel(figure, table, _said_of_roof(rows, measured))


def _rates(row: Row) -> tuple[float, float, float]:
    """TFLOP/s at the median, and at the ends of its interval."""
    time = timing(row)
    low, high = time.interval_us
    return row["flops"] / time.median_us / 1e6, row["flops"] / high / 1e6, row["flops"] / low / 1e6


def _top(row: Row, at: Ceilings) -> float:
    return min(row["flops"] / row["bytes"] * at.copy_bytes_per_s, at.flops_per_s) / 1e12


def table_of(rows: Sequence[Row], what: str, value: Callable[[Row], float]) -> list[Row]:
    """A line per shape and implementation, a column per batch."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["shape"], row["impl"])
        lines.setdefault(key, {what: row["shape"], "implementation": row["impl"]})[str(row["num_tokens"])] = value(row)
    return list(lines.values())


def _said_of_roof(rows: Sequence[Row], measured: Ceilings) -> str:
    best: dict[tuple[str, int], tuple[float, str]] = {}
    for row in (row for row in rows if row["within_bound"]):
        cell = (row["shape"], row["num_tokens"])
        best[cell] = max(best.get(cell, (0.0, "")), (_rates(row)[0] / _top(row, measured), row["impl"]))
    cells = sorted((share, impl, *cell) for cell, (share, impl) in best.items())
    (least, by, shape, batch), (most, most_by, most_shape, most_batch) = cells[0], cells[-1]
    return (
        f"**The fastest implementation of each cell reaches {least:.0%} ({by}, {shape}, batch {batch}) to {most:.0%} of the "
        f"recorded roof ({most_by}, {most_shape}, batch {most_batch}).** {sum(share >= 0.9 for share, *_ in cells)} of "
        f"{counted(len(cells), 'cell')} are within a tenth of it."
        + (" A share over 100 % says that a copy is no perfect ceiling for reads." if most > 1 else "")
    )


def over_floor(recording: Recording, at: Ceilings) -> Panel:
    """Time over the floor by batch, a plot per shape, a line per implementation."""
    rows = timed(recording)
    shapes = names_of(rows, "shape")

    def ratio(row: Row) -> tuple[float, float, float]:
        time, floor = timing(row), _over_floor(row, at)
        return time.median_us / floor, time.interval_us[0] / floor, time.interval_us[1] / floor

    ratios = [(row, ratio(row)[0]) for row in rows]
    far = _far(ratios)
    figure = by_shape("Time over floor, every implementation", f"{recording.source()}, 95 % intervals, each with its own tiles, "
                      "alignment included; hollow: past its error bound"
                      + (f"<br>not drawn until its name is clicked, being far above: {', '.join(far)}" if far else ""),
                      shapes, 300)  # fmt: skip
    draw_lines(figure, rows, ratio, hidden=far)
    figure.update_xaxes(**log_axis(sorted(names_of(rows, "num_tokens"))))
    figure.update_xaxes(title="batch, tokens", row=math.ceil(len(shapes) / _PER_LINE))
    figure.update_yaxes(type="log", tickvals=[1, 1.5, 2, 3, 5, 10, 20])
    figure.update_yaxes(title="time / floor", col=1)
    figure.add_hline(1.0, line={"color": GREY, "dash": "dot"})
    return Panel(figure, table_of(rows, "time / floor", lambda row: ratio(row)[0]), _said_of_floor(recording, ratios))


def _far(ratios: Sequence[tuple[Row, float]]) -> list[str]:
    """Implementations whose mean is over FAR times the best one's: drawn, they would press all others together."""
    means = {impl: mean_of([value for row, value in ratios if row["impl"] == impl])
             for impl in names_of([row for row, _ in ratios], "impl")}  # fmt: skip
    return [impl for impl, mean in means.items() if mean > FAR * min(means.values())]


def _said_of_floor(recording: Recording, ratios: Sequence[tuple[Row, float]]) -> str:
    """Geometric means of time over floor: of each cell's fastest, and of each implementation, with what stands in its way."""
    best: dict[tuple[str, int], float] = {}
    means: dict[str, list[float]] = {}
    past: Counter[str] = Counter()
    for row, value in ratios:
        means.setdefault(row["impl"], []).append(value)
        past[row["impl"]] += not row["within_bound"]
        if row["within_bound"]:
            cell = (row["shape"], row["num_tokens"])
            best[cell] = min(best.get(cell, math.inf), value)
    refused = Counter(row["impl"] for row in recording.rows if "refused" in row)
    said = []
    for impl in sorted(means, key=lambda impl: geometric_mean(means[impl])):
        noted = (("past its bound", past[impl]), ("refused", refused[impl]))
        notes = [f"{what} in {counted(count, 'cell')}" for what, count in noted if count]
        said.append(f"{impl} {geometric_mean(means[impl]):.2f}" + (f" ({', '.join(notes)})" if notes else ""))
    return (
        f"**With the fastest implementation of each cell the layers take {mean_of(list(best.values())):.2f} times the floor "
        f"(geometric mean).** One implementation for all cells: {', '.join(said)}."
    )


def mean_of(values: Sequence[float]) -> float:
    """Geometric mean; nan of nothing."""
    return float(geometric_mean(values)) if values else math.nan


# --- without a CUDA graph -----------------------------------------------------------------------------------------


def eager_over_graph(recording: Recording) -> Panel:
    """Wall time in eager mode over GPU time in a CUDA graph, by batch: what the host costs each implementation."""
    rows = [row for row in timed(recording) if "eager_samples_us" in row]
    shapes = names_of(rows, "shape")
    figure = by_shape("What a CUDA graph saves", f"{recording.source()}; medians, calls back to back; 1: the host is hidden "
                      "behind the GPU", shapes, 240)  # fmt: skip

    def ratio(row: Row) -> tuple[float, float, float]:
        graph, eager = timing(row), timing({"samples_us": row["eager_samples_us"]})
        (low, high), (below, above) = eager.interval_us, graph.interval_us
        return eager.median_us / graph.median_us, low / above, high / below

    draw_lines(figure, rows, ratio)
    figure.update_xaxes(**log_axis(sorted(names_of(rows, "num_tokens"))))
    figure.update_xaxes(title="batch, tokens", row=math.ceil(len(shapes) / _PER_LINE))
    figure.update_yaxes(type="log", tickvals=[0.8, 1, 1.5, 2, 3, 5, 10, 20])
    figure.update_yaxes(title="eager time / graph time", col=1)
    figure.add_hline(1.0, line={"color": GREY, "dash": "dot"})
    table = table_of(rows, "eager / graph", lambda row: ratio(row)[0])
    return Panel(figure, table, _said_of_eager(rows, ratio))


def _said_of_eager(rows: Sequence[Row], ratio: Callable[[Row], tuple[float, float, float]]) -> str:
    """What eager mode costs at the smallest batch, until which one, and who is fastest there, shape by shape."""
    batches = sorted(names_of(rows, "num_tokens"))
    small = [row for row in rows if row["num_tokens"] == batches[0]]
    means = {impl: mean_of([ratio(row)[0] for row in small if row["impl"] == impl]) for impl in names_of(small, "impl")}
    low, high = min(means, key=lambda impl: means[impl]), max(means, key=lambda impl: means[impl])
    by_batch = {b: mean_of([ratio(row)[0] for row in rows if row["num_tokens"] == b]) for b in batches}
    hidden = [b for b in batches if all(mean <= 1 + CLEARLY for batch, mean in by_batch.items() if batch >= b)]
    until = f"at batch {batches[-1]} it still takes {by_batch[batches[-1]]:.2f} times"
    if hidden:
        worst = max((row for row in rows if row["num_tokens"] >= hidden[0]), key=lambda row: ratio(row)[0])
        until = (
            f"from batch {hidden[0]} on at most {1 + CLEARLY:g} times on average, at worst {ratio(worst)[0]:.2f} "
            f"({worst['impl']}, {worst['shape']}, batch {worst['num_tokens']})"
        )
    said = []
    for shape in names_of(small, "shape"):
        times = {row["impl"]: timing({"samples_us": row["eager_samples_us"]}).median_us
                 for row in small if row["shape"] == shape and row["within_bound"]}  # fmt: skip
        if times:
            first = min(times, key=lambda impl: times[impl])
            said.append(f"{shape} {first}, {times[first]:.0f} µs")
    return (
        f"**At batch {batches[0]} eager mode takes {means[low]:.1f} ({low}) to {means[high]:.1f} ({high}) times a graph’s time "
        f"(geometric means over shapes); {until}.** The shortest eager medians at batch {batches[0]}: {'; '.join(said)}."
    )
