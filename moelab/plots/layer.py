"""The measured layer: on the roof, over its floor, and beside sglang."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moelab import roofline
from moelab.plots.panel import Panel, Row, geometric_mean, timing
from moelab.plots.style import GREY, SERIES, error_bars, grid, log_axis, look, powers, series
from moelab.recordings import Recording
from moelab.roofline import Ceilings, Cost

CONFIGS = ("default", "shipped", "tuned")
"""Config names of the recording that sglang was timed under as well."""


def _over_floor(row: Row, at: Ceilings) -> dict[str, Any]:
    """A recorded row's median and interval over its own floor."""
    floor = roofline.floor_us(Cost(row["flops"], row["bytes"], 0.0), at)
    measured = timing(row)
    low, high = measured.interval_us
    return {"us": measured.median_us, "low_us": low, "high_us": high, "floor_us": floor.us, "side": floor.side,
            "ratio": measured.median_us / floor.us, "low": low / floor.us, "high": high / floor.us}  # fmt: skip


def _shapes(recording: Recording) -> list[str]:
    return list(dict.fromkeys(row["shape"] for row in recording.rows))


def where_time_goes(recording: Recording, shape: str, at: Ceilings, config_name: str = "tuned") -> Panel:
    """One shape's measured time against the memory side and the compute side of its floor, by batch."""
    rows = sorted(recording.select(shape=shape, config_name=config_name), key=lambda r: r["num_tokens"])
    found = [_over_floor(row, at) for row in rows]
    batches = [row["num_tokens"] for row in rows]
    figure = grid(f"What the time goes into: {shape}", f"time: {recording.source()}, config “{config_name}”; floor: arithmetic "
                  f"at {at.copy_bytes_per_s / 1e12:g} TB/s and {at.flops_per_s / 1e12:g} TFLOP/s")  # fmt: skip
    sides = {"reading weights and activations": [row["bytes"] / at.copy_bytes_per_s * 1e6 for row in rows],
             "arithmetic": [row["flops"] / at.flops_per_s * 1e6 for row in rows]}  # fmt: skip
    for (name, values), style in zip(sides.items(), (SERIES[1], SERIES[3]), strict=True):
        line = {"color": style.color, "dash": "dot", "width": 2}
        figure.add_scatter(x=batches, y=values, name=f"at least: {name}", mode="lines", line=line)
    medians = [f["us"] for f in found]
    bars = error_bars(medians, [f["low_us"] for f in found], [f["high_us"] for f in found])
    style = look("triton")
    figure.add_scatter(x=batches, y=medians, error_y=bars, name="measured layer", mode="lines+markers",
                       line=style.line(), marker=style.marker())  # fmt: skip
    figure.update_xaxes(title="batch, tokens", **log_axis(batches))
    figure.update_yaxes(title="µs per layer", type="log", dtick=1)
    table = [{"batch": b, "measured, µs": f["us"], "95 % low": f["low_us"], "95 % high": f["high_us"], "floor, µs": f["floor_us"],
              "bound by": f["side"], "measured / floor": f["ratio"]} for b, f in zip(batches, found, strict=True)]  # fmt: skip
    best, worst = min(table, key=lambda r: r["measured / floor"]), max(table, key=lambda r: r["measured / floor"])
    memory = [row["batch"] for row in table if row["bound by"] == "memory"]
    sentence = (
        f"**Up to batch {max(memory)} the limit is memory: reading the experts’ weights.** The layer is closest to its floor "
        f"at batch {best['batch']} ({best['measured / floor']:.2f} times) and furthest at batch {worst['batch']} "
        f"({worst['measured / floor']:.2f} times): there is the room for better kernels."
    )
    return Panel(figure, table, sentence)


def roof(recording: Recording, measured: Ceilings, datasheet: Ceilings, config_name: str = "tuned") -> Panel:
    """Measured layers on the roof: FLOP per byte against FLOP/s, log-log; batch sizes run along each line."""
    figure = grid("Measured layers on the roof", f"{recording.source()}, config “{config_name}”; intensity from the bytes "
                  f"and FLOP that the layer needs at least;<br>each line runs from batch {_batches(recording)[0]} "
                  f"(lower left) to batch {_batches(recording)[-1]}", height=540)  # fmt: skip
    rows = recording.select(config_name=config_name)
    points = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(points) / 2, max(points) * 3
    for ceiling, dash, name in ((datasheet, "dash", "datasheet"), (measured, "solid", "recorded ceilings")):
        xs = [low, ceiling.ridge_flop_per_byte, high]
        ys = [min(x * ceiling.copy_bytes_per_s, ceiling.flops_per_s) / 1e12 for x in xs]
        figure.add_scatter(x=xs, y=ys, name=name, mode="lines", line={"color": GREY, "dash": dash, "width": 2})
    table: list[dict[str, Any]] = []
    for shape, style in series(_shapes(recording)).items():
        mine = sorted((r for r in rows if r["shape"] == shape), key=lambda r: r["num_tokens"])
        xs = [r["flops"] / r["bytes"] for r in mine]
        rates = [r["flops"] / timing(r).median_us / 1e6 for r in mine]
        tops = [min(x * measured.copy_bytes_per_s, measured.flops_per_s) / 1e12 for x in xs]
        figure.add_scatter(x=xs, y=rates, name=shape, mode="lines+markers",
                           line=style.line(1.2), marker=style.marker(9), customdata=[r["num_tokens"] for r in mine],
                           hovertemplate="batch %{customdata}: %{x:.3g} FLOP/byte, %{y:.3g} TFLOP/s")  # fmt: skip
        table.append({"share of the roof": shape}
                     | {str(r["num_tokens"]): v / t for r, v, t in zip(mine, rates, tops, strict=True)})  # fmt: skip
    figure.update_xaxes(title="arithmetic intensity, FLOP / byte", **powers(low, high))
    top = datasheet.flops_per_s / 1e12
    figure.update_yaxes(title="reached, TFLOP/s", **powers(min(points) * measured.copy_bytes_per_s / 4e12, top * 1.6))
    shares = [(v, row["share of the roof"], b) for row in table for b, v in row.items() if isinstance(v, float)]
    (best, best_shape, best_batch), (worst, worst_shape, worst_batch) = max(shares), min(shares)
    sentence = (
        f"**Of the recorded roof the layers reach {worst:.0%} ({worst_shape}, batch {worst_batch}) to {best:.0%} ({best_shape}, "
        f"batch {best_batch}).** A share over 100 % says that a copy is no perfect ceiling for reads, or that the L2 helped."
        if best > 1
        else f"**Of the recorded roof the layers reach {worst:.0%} ({worst_shape}, batch {worst_batch}) to {best:.0%} "
        f"({best_shape}, batch {best_batch}).** Worst at batch {_batches(recording)[0]}: "
        f"{min(v for v, _, b in shares if b == str(_batches(recording)[0])):.0%}."
    )
    return Panel(figure, table, sentence)


def time_over_floor(recording: Recording, peers: Sequence[Row], at: Ceilings, peer_source: str) -> Panel:
    """Time over floor by batch, one plot per shape: ours as lines with intervals, sglang's as hollow markers."""
    shapes = _shapes(recording)
    rows_of_plots = 1 if len(shapes) <= 2 else 2
    cols = math.ceil(len(shapes) / rows_of_plots)
    figure = grid("Time over floor", f"lines: {recording.source()}, 95 % intervals<br>hollow: {peer_source}", titles=shapes,
                  rows=rows_of_plots, shared_y=True, height=96 + 280 * rows_of_plots)  # fmt: skip
    table: list[Row] = []
    for index, shape in enumerate(shapes):
        place = {"row": index // cols + 1, "col": index % cols + 1}
        for name, style in series(CONFIGS).items():
            rows = sorted(recording.select(shape=shape, config_name=name), key=lambda r: r["num_tokens"])
            if not rows:
                continue
            found = [_over_floor(row, at) for row in rows]
            xs, ys = [row["num_tokens"] for row in rows], [f["ratio"] for f in found]
            bars = error_bars(ys, [f["low"] for f in found], [f["high"] for f in found])
            figure.add_scatter(x=xs, y=ys, error_y=bars, name=f"moelab, {name}", mode="lines+markers", line=style.line(),
                               marker=style.marker(7), legendgroup=name, showlegend=index == 0, **place)  # fmt: skip
            theirs = {r["M"]: r[name] / f["floor_us"] for r in peers for row, f in zip(rows, found, strict=True)
                      if r["name"] == shape and r["M"] == row["num_tokens"] and r.get(name)}  # fmt: skip
            figure.add_scatter(x=list(theirs), y=list(theirs.values()), name=f"sglang, {name}", mode="markers",
                               marker=style.marker(13, hollow=True), legendgroup=f"sglang {name}", showlegend=index == 0,
                               **place)  # fmt: skip
            table.append({"time / floor": shape, "config": name} | {str(x): y for x, y in zip(xs, ys, strict=True)})
        batches = sorted({row["num_tokens"] for row in recording.select(shape=shape)})
        figure.update_xaxes(**log_axis(batches), **place)
    figure.add_hline(1.0, line={"color": GREY, "dash": "dot"})
    figure.update_xaxes(title="batch, tokens", row=rows_of_plots)
    figure.update_yaxes(type="log", tickvals=[1, 1.5, 2, 3, 5, 10], matches="y")
    figure.update_yaxes(title="time / floor", col=1)
    return Panel(figure, table, _said_of_floor(table, shapes))


def _said_of_floor(table: Sequence[Row], shapes: Sequence[str]) -> str:
    """Geometric means by config; one that not every shape has is compared within the shapes that have it."""
    has = {name: {row["time / floor"] for row in table if row["config"] == name} for name in CONFIGS}
    everywhere = [name for name in CONFIGS if len(has[name]) == len(shapes)]
    means = _means(table, everywhere, set(shapes))
    said = [f"all shapes and batches: {_listed(means)}"]
    for name in (name for name in CONFIGS if has[name] and name not in everywhere):
        among = _means(table, [*everywhere, name], has[name])
        said.append(f"{len(has[name])} of {len(shapes)} shapes, those with a config “{name}”: {_listed(among)}")
    worth = (
        f"Tuning is worth a factor of {means['default'] / means['tuned']:.2f} over the default rule; what"
        if {"default", "tuned"} <= set(means)
        else "What"
    )
    return f"**Geometric mean of time over floor, {'; '.join(said)}.** {worth} is left above 1 is for better kernels."


def _means(table: Sequence[Row], names: Sequence[str], shapes: set[str]) -> dict[str, float]:
    return {
        name: geometric_mean([v for row in table if row["config"] == name and row["time / floor"] in shapes
                              for v in row.values() if isinstance(v, float)])
        for name in names
    }  # fmt: skip


def _listed(means: dict[str, float]) -> str:
    return ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())


def versus_sglang(recording: Recording, peers: Sequence[Row], peer_source: str) -> Panel:
    """Our classic layer's time over sglang's, row by row under the same config, and the geometric mean."""
    theirs = {(r["name"], r["M"], name): r[name] for r in peers for name in CONFIGS if r.get(name)}
    shapes = _shapes(recording)
    figure = grid("The classic layer beside sglang’s, same configs", f"moelab: {recording.source()}<br>sglang: {peer_source}"
                  "<br>another machine of the same kind, so a few per cent either way are the machines’", titles=shapes,
                  shared_y=True, height=460)  # fmt: skip
    table: list[dict[str, Any]] = []
    ratios: list[float] = []
    for col, shape in enumerate(shapes, start=1):
        for name, style in series(CONFIGS).items():
            pairs = [(row, theirs[shape, row["num_tokens"], name]) for row in recording.select(shape=shape, config_name=name)
                     if (shape, row["num_tokens"], name) in theirs]  # fmt: skip
            if not pairs:
                continue
            middle = [timing(row).median_us / us for row, us in pairs]
            low, high = ([timing(row).interval_us[end] / us for row, us in pairs] for end in (0, 1))
            xs = [row["num_tokens"] for row, _ in pairs]
            figure.add_scatter(x=xs, y=middle, error_y=error_bars(middle, low, high), name=name, mode="lines+markers",
                               line=style.line(1.2), marker=style.marker(8), legendgroup=name, showlegend=col == 1, row=1,
                               col=col)  # fmt: skip
            table.append({"moelab / sglang": shape, "config": name, "geometric mean": geometric_mean(middle)}
                         | {str(x): y for x, y in zip(xs, middle, strict=True)})  # fmt: skip
            ratios += middle
        figure.update_xaxes(title="batch, tokens", row=1, col=col, **log_axis(_batches(recording)), tickangle=-45)
    figure.add_hline(1.0, line={"color": GREY, "dash": "dot"})
    span = max(0.1, *(abs(math.log(r)) for r in ratios)) * 1.15
    figure.update_yaxes(type="log", range=[-span / math.log(10), span / math.log(10)],
                        tickvals=[0.7, 0.8, 0.85, 0.9, 0.95, 1, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 1.7])  # fmt: skip
    figure.update_yaxes(title="moelab time / sglang time", col=1)
    mean = geometric_mean(ratios)
    close = sum(abs(r - 1) <= 0.05 for r in ratios)
    sentence = (
        f"**Geometric mean over {len(ratios)} rows: {mean:.3f} times sglang’s time.** {close} of {len(ratios)} rows are within "
        f"5 % either way; the best row is {min(ratios):.2f}, the worst {max(ratios):.2f}. Source of sglang’s figures: "
        f"{peer_source} (data/upstream/h200_sglang.json), another machine of the same kind."
    )
    return Panel(figure, table, sentence)


def _batches(recording: Recording) -> list[int]:
    return sorted({row["num_tokens"] for row in recording.rows})
