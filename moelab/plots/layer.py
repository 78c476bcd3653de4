"""The measured layer, by config or by implementation: on the roof, over its floor, beside sglang's, eagerly, who is fastest."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moelab.errors import counted
from moelab.plots import ratio_map
from moelab.plots.cells import (
    CLEARLY,
    Span,
    cells_of,
    conclude,
    extremes,
    floor_of,
    left_out,
    line,
    names_of,
    plots,
    rate,
    reach,
    sound,
    span,
    table_of,
    timed,
    trace,
)
from moelab.plots.cells import fastest as fastest_of
from moelab.plots.cells import over_floor as times_over_floor
from moelab.plots.panel import Panel, Row, geometric_mean, timing
from moelab.plots.style import GREY, SERIES, grid, log_axis, look, powers, series
from moelab.recordings import Recording
from moelab.roofline import Ceilings

CLASSIC = "triton"
ELSEWHERE = "shipped elsewhere"
CONFIGS = ("default", "shipped", "tuned", ELSEWHERE)
"""sglang's rule without a file; the file it ships for this device; `moelab tune`'s pair; a file it ships for another device."""

SEARCHED = {"tuned": "searched"}
"""What the recording layer_classic and sglang's rows call tuned: one config for both GEMMs, found by a short search of
another harness. `moelab tune`'s pairs are tuned."""

FAR = 1.5
"""Times the best implementation's mean over the floor, from which on a line waits in the legend."""


def classic_layers(classic: Recording, gain: Recording) -> Recording:
    """The classic layer under each of CONFIGS, one recording of each thing: times of tuned_gain, bytes and FLOP of
    layer_classic, which drew the same routings; from there also what sglang ships for another device."""
    from moelab.suites.layer_classic import SHAPES

    targets = {name: f"{model}/tp{tp_size}" for name, (model, tp_size) in SHAPES.items()}
    layers = cells_of(gain.select(kind="layer"), "target", "num_tokens", by="config_name")
    rows = []
    for (shape, batch), cell in cells_of(timed(classic), by="config_name").items():
        ours = layers.get((targets.get(shape), batch), {})
        about = {key: cell["default"][key] for key in ("shape", "num_tokens", "bytes", "flops")}
        for name in CONFIGS:
            row = ours.get(name, {})
            row = ours.get(row.get("same_as"), row)  # configs that are the same were timed once
            if name == ELSEWHERE and "shipped" in cell and "shipped" not in ours:
                row = cell["shipped"]
            if "samples_us" in row:
                rows.append({**about, "config_name": name, "samples_us": row["samples_us"]})
    return Recording(gain.suite, gain.provenance, gain.protocol, tuple(rows))


def _by(rows: Sequence[Row]) -> str:
    return "impl" if "impl" in rows[0] else "config_name"


def where_time_goes(recording: Recording, shape: str, at: Ceilings) -> Panel:
    """One shape's measured time against the memory side and the compute side of its floor, by batch."""
    rows = sorted(recording.select(shape=shape, config_name="tuned"), key=lambda r: r["num_tokens"])
    batches, spans = [row["num_tokens"] for row in rows], [span(row) for row in rows]
    figure = grid(f"What the time goes into: {shape}", f"time: {recording.source()}, config “tuned”; floor: arithmetic "
                  f"at {at.copy_bytes_per_s / 1e12:g} TB/s and {at.flops_per_s / 1e12:g} TFLOP/s")  # fmt: skip
    floors = [floor_of(row, at) for row in rows]
    sides = {
        "reading weights and activations": [f.memory_us for f in floors],
        "arithmetic": [f.compute_us for f in floors],
    }
    for (name, values), style in zip(sides.items(), (SERIES[1], SERIES[3]), strict=True):
        dotted = {"color": style.color, "dash": "dot", "width": 2}
        figure.add_scatter(x=batches, y=values, name=f"at least: {name}", mode="lines", line=dotted)
    line(figure, batches, spans, "measured layer", look(CLASSIC))
    figure.update_xaxes(title="batch, tokens", **log_axis(batches))
    figure.update_yaxes(title="µs per layer", type="log", dtick=1)
    table = [{"batch": b, "measured, µs": us, "95 % low": low, "95 % high": high, "floor, µs": f.us, "bound by": f.side,
              "measured / floor": us / f.us} for b, (us, low, high), f in zip(batches, spans, floors, strict=True)]  # fmt: skip
    memory = max((row["batch"] for row in table if row["bound by"] == "memory"), default=0)
    head = f"Up to batch {memory} memory is the limit: the experts’ weights."
    return Panel(
        figure, table, conclude(head, {"Time over floor": extremes(rows, lambda row: times_over_floor(row, at)[0])})
    )


def roof(recording: Recording, measured: Ceilings, datasheet: Ceilings) -> Panel:
    """FLOP per byte against the FLOP/s reached, log-log: tuned layers in one plot, or implementations in a plot per shape."""
    rows, every = timed(recording), "impl" in timed(recording)[0]
    rows = rows if every else [row for row in rows if row["config_name"] == "tuned"]
    points, batches = [row["flops"] / row["bytes"] for row in rows], sorted(names_of(rows, "num_tokens"))
    what = "each with its own tiles; hollow: past its error bound" if every else "config “tuned”"
    layout: dict[str, Any] = (
        {} if every else {"by": "shape", "per": None, "looks": series(names_of(rows, "shape")).__getitem__}
    )
    figure = plots(
        "Every implementation on the roof" if every else "Measured layers on the roof",
        f"{recording.source()}, {what}; each line runs from batch {batches[0]} (left) to {batches[-1]}<br>solid grey: the "
        "recorded copy bandwidth and product; dotted: the datasheet’s; FLOP and bytes: what a layer needs at least",
        rows, rate, "reached, TFLOP/s", None, across=lambda row: row["flops"] / row["bytes"], base=None, tall=310, **layout,
    )  # fmt: skip
    low, high = min(points) / 2, max(points) * 3
    for ceiling, dash in ((datasheet, "dot"), (measured, "solid")):
        corner = [low, ceiling.ridge_flop_per_byte, high]
        figure.add_scatter(x=corner, y=[reach(x, ceiling) for x in corner], mode="lines", showlegend=False, hoverinfo="skip",
                           line={"color": GREY, "dash": dash, "width": 1.5}, row="all", col="all")  # fmt: skip
    figure.update_xaxes(title="FLOP / byte", **powers(low, high))
    figure.update_yaxes(**powers(min(rate(row)[0] for row in rows) / 2, datasheet.flops_per_s / 1e12 * 1.6))

    def share(row: Row) -> float:
        return rate(row)[0] / reach(row["flops"] / row["bytes"], measured)

    best = [max(sound(c).values(), key=share) for c in cells_of(rows).values() if sound(c)] if every else rows
    near = sum(share(row) >= 0.9 for row in best)
    over = " A share over 100 % says that a copy is no perfect ceiling for reads." if max(map(share, best)) > 1 else ""
    whose = "The fastest implementation of each cell reaches" if every else "Tuned layers reach"
    return Panel(figure, table_of(rows, "share of the roof", share, _by(rows)), f"**{whose} {extremes(best, share, '.0%')} of "
                 f"the recorded roof.** {near} of {counted(len(best), 'cell')} are within a tenth of it.{over}")  # fmt: skip


def over_floor(recording: Recording, at: Ceilings, peers: Sequence[Row] = (), peer_source: str = "") -> Panel:
    """Time over floor by batch, a plot per shape, a line per config or implementation; sglang's own rows as hollow markers."""
    rows = timed(recording)
    by = _by(rows)

    def value(row: Row) -> Span:
        return times_over_floor(row, at)

    means = {name: _mean(rows, name, by, value) for name in names_of(rows, by)}
    far = [name for name, mean in means.items() if by == "impl" and mean > FAR * min(means.values())]
    note = "each with its own tiles, alignment included; hollow: past its error bound" if by == "impl" else (
        "alignment made beforehand<br>shipped elsewhere: a file for another device, recording layer_classic")  # fmt: skip
    note += f"<br>not drawn until its name is clicked, being far above: {', '.join(far)}" if far else ""
    note += f"<br>hollow: sglang’s, {peer_source}" if peers else ""
    source = f"{recording.source()}, 95 % intervals; {note}"
    looks = look if by == "impl" else series(CONFIGS).__getitem__
    figure = plots("Time over floor", source, rows, value, "time / floor", [1, 1.5, 2, 3, 5, 10, 20], by=by,
                   looks=looks, hidden=far)  # fmt: skip
    for index, shape in enumerate(names_of(rows, "shape")):
        floors = {row["num_tokens"]: floor_of(row, at).us for row in rows if row["shape"] == shape}
        for name in ("default", "shipped", "tuned"):
            theirs = {r["M"]: r[name] / floors[r["M"]] for r in peers
                      if r["name"] == shape and r["M"] in floors and r.get(name)}  # fmt: skip
            if theirs:
                trace(figure, theirs, f"sglang, {SEARCHED.get(name, name)}", series(CONFIGS)[name], hollow=True, mode="markers",
                      legend=index == 0, row=index // 2 + 1, col=index % 2 + 1)  # fmt: skip
    cells = [sound(cell) if by == "impl" else cell for cell in cells_of(rows, by=by).values()]
    best = [min(value(row)[0] for row in cell.values()) for cell in cells if cell]
    each = ", ".join(_noted(recording, name, by, means, value) for name in sorted(means, key=means.__getitem__))
    table = table_of(rows, "time / floor", lambda row: value(row)[0], by)
    return Panel(figure, table, f"**The fastest of each cell takes {geometric_mean(best):.2f} times the floor (geometric "
                 f"mean).** One for all cells: {each}.")  # fmt: skip


def _mean(rows: Sequence[Row], name: str, by: str, value: Callable[[Row], Span]) -> float:
    return geometric_mean([value(row)[0] for row in rows if row[by] == name])


def _noted(recording: Recording, name: str, by: str, means: Mapping[str, float], value: Callable[[Row], Span]) -> str:
    """A mean, with what stands in its way: cells that lack it (and what the first of all takes there), bounds, refusals."""
    rows = timed(recording)
    mine = [row for row in rows if row[by] == name]
    cells, first = {(row["shape"], row["num_tokens"]) for row in mine}, next(iter(means))
    there = [value(row)[0] for row in rows if row[by] == first and (row["shape"], row["num_tokens"]) in cells]
    refused = sum(row.get("impl") == name and "refused" in row for row in recording.rows)
    past = sum(not row.get("within_bound", True) for row in mine)
    notes = [f"in {len(mine)} cells, {first} there {geometric_mean(there):.2f}"] * (
        len(cells) + refused < len(cells_of(rows, by=by)))  # fmt: skip
    notes += [f"{what} in {counted(n, 'cell')}" for what, n in (("past its bound", past), ("refused", refused)) if n]
    return f"{name} {means[name]:.2f}" + (f" ({', '.join(notes)})" if notes else "")


def versus_sglang(recording: Recording, peers: Sequence[Row], peer_source: str) -> Panel:
    """Our classic layer's time over sglang's, row by row under the same config, and the geometric mean."""
    theirs = {(r["name"], r["M"], name): r[name] for r in peers for name in CONFIGS if r.get(name)}
    key = ("shape", "num_tokens", "config_name")
    rows = [{**row, "theirs": theirs[found], "config_name": SEARCHED.get(row["config_name"], row["config_name"])}
            for row in recording.rows if (found := tuple(row[k] for k in key)) in theirs]  # fmt: skip

    def value(row: Row) -> Span:
        return span(row, row["theirs"])

    names = series(("default", "shipped", "searched"))
    figure = plots(
        "The classic layer beside sglang’s, same configs",
        f"moelab: {recording.source()}<br>sglang: {peer_source}<br>another machine of the same kind, so a few per cent either "
        "way are the machines’; searched: a short search’s one config for both GEMMs",
        rows, value, "moelab time / sglang time", [0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.2, 1.3, 1.5], by="config_name",
        looks=names.__getitem__, per_line=4,
    )  # fmt: skip
    ratios = [value(row)[0] for row in rows]
    reach = max(0.1, *(abs(math.log10(r)) for r in ratios)) * 1.15
    figure.update_yaxes(range=[-reach, reach])
    close = sum(abs(r - 1) <= CLEARLY for r in ratios)
    table = table_of(rows, "moelab / sglang", lambda row: value(row)[0], "config_name")
    return Panel(figure, table, f"**Geometric mean over {len(rows)} rows: {geometric_mean(ratios):.3f} times sglang’s time.** "
                 f"{close} are within 5 % either way; {extremes(rows, lambda row: value(row)[0])}.")  # fmt: skip


def eager_over_graph(recording: Recording) -> Panel:
    """Wall time in eager mode over GPU time in a CUDA graph, by batch: what the host costs each implementation."""
    rows = [row for row in timed(recording) if "eager_samples_us" in row]

    def eager(row: Row) -> Span:
        return span(row, samples="eager_samples_us")

    def value(row: Row) -> Span:
        (graph, below, above), (wall, low, high) = span(row), eager(row)
        return wall / graph, low / above, high / below

    figure = plots("What a CUDA graph saves", f"{recording.source()}; medians, calls back to back; 1: the host is hidden behind "
                   "the GPU", rows, value, "eager time / graph time", [0.8, 1, 1.5, 2, 3, 5, 10, 20], tall=240)  # fmt: skip
    batches = sorted(names_of(rows, "num_tokens"))
    small = [row for row in rows if row["num_tokens"] == batches[0]]
    means = {b: geometric_mean([value(row)[0] for row in rows if row["num_tokens"] == b]) for b in batches}
    hidden = [b for b in batches if all(mean <= 1 + CLEARLY for batch, mean in means.items() if batch >= b)]
    until = f"from batch {hidden[0]} on within 5 % on average" if hidden else (
        f"at batch {batches[-1]} still {means[batches[-1]]:.2f} times")  # fmt: skip
    quickest = [min(sound(c).values(), key=lambda row: eager(row)[0]) for c in cells_of(small).values() if sound(c)]
    head = f"At batch {batches[0]} eager mode takes {means[batches[0]]:.1f} times a graph’s time (geometric mean), {until}."
    return Panel(figure, table_of(rows, "eager / graph", lambda row: value(row)[0]), conclude(head, {
        "There": extremes(small, lambda row: value(row)[0]),
        "Shortest eager medians": [f"{row['shape']} {row['impl']} {eager(row)[0]:.0f} µs" for row in quickest],
    }))  # fmt: skip


# --- who is fastest -------------------------------------------------------------------------------------------------


def winners(recording: Recording) -> list[dict[str, Any]]:
    """One row per cell: the fastest implementation within its error bound, and who ties with it (overlapping intervals)."""
    found = []
    for (shape, batch), cell in cells_of(timed(recording)).items():
        times = {impl: timing(row) for impl, row in sound(cell).items()}
        if not times:
            continue
        first, *tied = fastest_of(times)
        best, classic = times[first], times.get(CLASSIC)
        past = [impl for impl in cell if impl not in times and timing(cell[impl]).median_us < best.median_us]
        found.append({
            "shape": shape, "batch": batch, "fastest": first, "tied with it": ", ".join(tied), "µs": best.median_us,
            "95 % low": best.interval_us[0], "95 % high": best.interval_us[1],
            "classic, µs": classic.median_us if classic else None,
            "over classic": best.median_us / classic.median_us if classic else None,
            "faster, past its bound": ", ".join(past),
        })  # fmt: skip
    return found


def fastest(recording: Recording) -> Panel:
    """Map of shape by batch: the fastest implementation's name and its time over the classic layer's; ties in grey."""
    table = winners(recording)
    cells = {(row["shape"], row["batch"]): ratio_map.Cell(row["over classic"] or 1.0, _label(row), bool(row["tied with it"]))
             for row in table}  # fmt: skip
    figure = ratio_map.chart(
        "Which implementation is fastest where", f"{recording.source()}; the number: its time over that of {CLASSIC}, the "
        "classic layer<br>grey: a tie, the 95 % intervals overlap, the shorter median first; within the error bound only",
        cells, names_of(table, "shape"), sorted(names_of(table, "batch")), tall=84, y="shape", bar="time / classic", size=11,
    )  # fmt: skip
    clear = Counter(row["fastest"] for row in table if not row["tied with it"])
    wins = ", ".join(f"{impl} {count}" for impl, count in clear.most_common())
    gains = [row for row in table
             if row["over classic"] and CLASSIC not in (row["fastest"], *row["tied with it"].split(", "))]  # fmt: skip
    beaten = "Nothing gains over the classic layer."
    if gains:
        best = min(gains, key=lambda row: row["over classic"])
        large = sum(row["over classic"] <= 1 - CLEARLY for row in gains)
        beaten = (f"The classic layer is beaten in {counted(len(gains), 'cell')}, by {CLEARLY:.0%} or more in {large}, at best "
                  f"in {best['over classic']:.2f} of its time ({best['fastest']}, {best['shape']}, batch {best['batch']}). The "
                  "winner of many candidates is flattered where the gain is small.")  # fmt: skip
    past = sum(bool(row["faster, past its bound"]) for row in table)
    one = f"{clear.total()} have one fastest implementation{f' ({wins})' if wins else ''}"
    return Panel(figure, table, f"**Of {counted(len(table), 'cell')} {one}; {len(table) - clear.total()} are ties.** {beaten}"
                 f"{left_out(past)}")  # fmt: skip


def _label(row: Row) -> str:
    """The winner and its ratio; in a tie a second name, or how many more. Long names are broken after an underscore."""
    tied = row["tied with it"].split(", ") if row["tied with it"] else []
    lines = [
        f"<b>{row['fastest']}</b>",
        *([f"= {tied[0] if len(tied) == 1 else f'{len(tied)} others'}"] if tied else []),
    ]
    lines += [f"{row['over classic']:.2f}"] if row["over classic"] is not None else []
    return re.sub("_(atomic|workspace)", r"_<br>\1", "<br>".join(lines))
