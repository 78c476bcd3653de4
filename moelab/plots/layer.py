"""The measured layer, by config or by implementation: on the roof, over its floor, beside sglang's, eagerly, who is fastest."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from moelab.plots.fast_layer import fast_rows
from moelab.plots.panel import Panel, Row, geometric_mean, timing
from moelab.plots.style import CONFIGS as CONFIG_LOOKS
from moelab.plots.style import GREY, SIDES, grid, log_axis, look, powers
from moelab.recordings import Recording
from moelab.roofline import Ceilings

CLASSIC = "triton"
ELSEWHERE = "shipped elsewhere"
CONFIGS = ("default", "shipped", "tuned", ELSEWHERE)
"""sglang's rule without a file; the file it ships for this device; `moelab tune`'s pair; a file it ships for another device."""

SEARCHED = {"tuned": "searched"}
"""What the recording layer_classic and sglang's rows call tuned: one config for both GEMMs, found by a short search of
another harness. `moelab tune`'s pairs are tuned."""


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


def where_time_goes(recording: Recording, shape: str, at: Ceilings, one: Recording | None = None) -> Panel:
    """One shape's measured time against the memory side and the compute side of its floor, by batch.

    one: the recording fast_layer, whose *fast* is drawn beside the classic layer.
    """
    rows = sorted(recording.select(shape=shape, config_name="tuned"), key=lambda r: r["num_tokens"])
    batches, floors = [row["num_tokens"] for row in rows], [floor_of(row, at) for row in rows]
    fast = {row["num_tokens"]: row for row in fast_rows(one) if row["shape"] == shape} if one else {}
    figure = grid(f"What the time goes into: {shape}", f"classic: {recording.source()}, config “tuned”"
                  f"{f'; fast: {one.source()}' if one and fast else ''}<br>sides of the floor: computed at "
                  f"{at.copy_bytes_per_s / 1e12:g} TB/s and {at.flops_per_s / 1e12:g} TFLOP/s")  # fmt: skip
    sides = {"memory": "reading weights and activations", "compute": "arithmetic"}
    for side, name in sides.items():
        values = [getattr(floor, f"{side}_us") for floor in floors]
        figure.add_scatter(
            x=batches, y=values, name=f"at least: {name}", mode="lines", line={**SIDES[side].line(), "dash": "dot"}
        )
    line(figure, batches, [span(row) for row in rows], "classic layer, measured", look(CLASSIC))
    if fast:
        line(figure, list(fast), [span(row) for row in fast.values()], "fast, measured", look("fast"))
    figure.update_xaxes(title="batch, tokens", **log_axis(batches))
    figure.update_yaxes(title="µs per layer", type="log", dtick=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    table = [{"batch": b, "classic, µs": span(row)[0], "fast, µs": span(fast[b])[0] if b in fast else None, "floor, µs": f.us,
              "bound by": f.side, "classic / floor": times_over_floor(row, at)[0],
              "fast / floor": times_over_floor(fast[b], at)[0] if b in fast else None}
             for b, row, f in zip(batches, rows, floors, strict=True)]  # fmt: skip
    memory = max((row["batch"] for row in table if row["bound by"] == "memory"), default=0)
    head = f"Up to batch {memory} memory is the limit: the experts’ weights."
    return Panel(figure, table, conclude(head, {
        "The classic layer over its floor": extremes(rows, lambda row: times_over_floor(row, at)[0]),
        "fast": extremes([*fast.values()], lambda row: times_over_floor(row, at)[0]) if fast else "",
    }))  # fmt: skip


def roof(recording: Recording, measured: Ceilings, datasheet: Ceilings, one: Recording | None = None) -> Panel:
    """FLOP per byte against the FLOP/s reached, log-log, a plot per shape: the classic layer under its tuned configs, and *fast*
    of the recording fast_layer."""
    rows: list[Row] = [{**row, "impl": "classic"} for row in timed(recording) if row["config_name"] == "tuned"]
    shapes, batches = names_of(rows, "shape"), sorted(names_of(rows, "num_tokens"))
    rows += [row for row in fast_rows(one) if row["shape"] in shapes] if one else []
    points = [row["flops"] / row["bytes"] for row in rows]
    figure = plots(
        "Measured layers on the roof",
        f"{recording.source()}; each line runs from batch {batches[0]} (left) to {batches[-1]}<br>solid grey: the "
        "recorded copy bandwidth and product; dotted: the datasheet’s; FLOP and bytes: what a layer needs at least",
        rows, rate, "reached, TFLOP/s", None, across=lambda row: row["flops"] / row["bytes"], base=None, tall=230, per_line=4,
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

    every = {name: [row for row in rows if row["impl"] == name] for name in names_of(rows, "impl")}
    head = "; ".join(f"{name} reaches {extremes(of, share, '.0%')}" for name, of in every.items())
    near = [
        f"{name} {sum(share(row) >= 0.9 for row in of)} of {counted(len(of), 'cell')}" for name, of in every.items()
    ]
    over = " A share over 100 % says that a copy is no perfect ceiling for reads." if max(map(share, rows)) > 1 else ""
    said = conclude(f"Of the recorded roof {head}.", {"Within a tenth of it": near}) + over
    return Panel(figure, table_of(rows, "share of the roof", share), said)


def over_floor(recording: Recording, at: Ceilings, peers: Sequence[Row] = (), peer_source: str = "") -> Panel:
    """The classic layer's time over its floor by batch, a plot per shape, a line per config; sglang's own rows hollow."""
    rows = timed(recording)
    note = "alignment made beforehand<br>shipped elsewhere: a file for another device, recording layer_classic"
    note += f"<br>hollow: sglang’s, {peer_source}" if peers else ""
    source = f"{recording.source()}, 95 % intervals; {note}"
    figure = plots("Time over floor", source, rows, lambda row: times_over_floor(row, at),
                   "time / floor", [1, 1.5, 2, 3, 5, 10, 20], by="config_name", looks=CONFIG_LOOKS.__getitem__)  # fmt: skip
    for index, shape in enumerate(names_of(rows, "shape")):
        floors = {row["num_tokens"]: floor_of(row, at).us for row in rows if row["shape"] == shape}
        for name in ("default", "shipped", "tuned"):
            theirs = {r["M"]: r[name] / floors[r["M"]] for r in peers
                      if r["name"] == shape and r["M"] in floors and r.get(name)}  # fmt: skip
            if theirs:
                called = SEARCHED.get(name, name)
                trace(figure, theirs, f"sglang, {called}", CONFIG_LOOKS[called], hollow=True, mode="markers",
                      legend=index == 0, row=index // 2 + 1, col=index % 2 + 1)  # fmt: skip
    return Panel(figure, *_floor_numbers(recording, at, "config_name"))


def implementations(recording: Recording, at: Ceilings) -> Panel:
    """Map of implementation by batch: its time over the floor, geometric mean over shapes; the table has every shape."""
    rows = timed(recording)
    cells = ratio_map.mean_cells(rows, lambda row: times_over_floor(row, at)[0])
    table, said = _floor_numbers(recording, at, "impl")
    return Panel(_by_implementation(
        "Every implementation over the floor", f"{recording.source()}; each with its own tiles, alignment included",
        rows, cells, bar="time / floor"), table, said)  # fmt: skip


def _by_implementation(
    title: str, source: str, rows: Sequence[Row], cells: Mapping[Any, ratio_map.Cell], bar: str
) -> Any:
    """A map of geometric means, the implementations with the least at the largest batch first."""
    batches = sorted(names_of(rows, "num_tokens"))
    last = {name: [cells[name, b].ratio for b in batches if (name, b) in cells] for name in names_of(rows, "impl")}
    names = sorted(last, key=lambda name: last[name][-1])
    past = {(row["impl"], row["num_tokens"]) for row in rows if not row.get("within_bound", True)}
    cells = {at: replace(cell, text=cell.text + "†" * (at in past)) for at, cell in cells.items()}
    lacks = "; *: not every shape" * any(
        "*" in cell.text for cell in cells.values()
    ) + "; †: past its error bound" * bool(past)
    return ratio_map.chart(title, f"{source}<br>geometric mean over shapes{lacks}", cells, names, batches, low=None,
                           span=math.log(3), bar=bar)  # fmt: skip


def _floor_numbers(recording: Recording, at: Ceilings, by: str) -> tuple[list[Row], str]:
    """The table of times over the floor, and what the fastest of each cell and each one alone take."""
    rows = timed(recording)

    def value(row: Row) -> Span:
        return times_over_floor(row, at)

    means = {name: _mean(rows, name, by, value) for name in names_of(rows, by)}
    cells = [sound(cell) if by == "impl" else cell for cell in cells_of(rows, by=by).values()]
    best = [min(value(row)[0] for row in cell.values()) for cell in cells if cell]
    each = ", ".join(_noted(recording, name, by, means, value) for name in sorted(means, key=means.__getitem__))
    return table_of(rows, "time / floor", lambda row: value(row)[0], by), (
        f"**The fastest of each cell takes {geometric_mean(best):.2f} times the floor (geometric mean).** One for all cells: "
        f"{each}."
    )


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
    """Map of shape and config by batch: our classic layer's time over sglang's under the same config."""
    theirs = {(r["name"], r["M"], name): r[name] for r in peers for name in CONFIGS if r.get(name)}
    key = ("shape", "num_tokens", "config_name")
    rows = [{**row, "theirs": theirs[found], "config_name": SEARCHED.get(row["config_name"], row["config_name"])}
            for row in recording.rows if (found := tuple(row[k] for k in key)) in theirs]  # fmt: skip

    def value(row: Row) -> float:
        return span(row, row["theirs"])[0]

    cells = {
        (f"{row['shape']}, {row['config_name']}", row["num_tokens"]): ratio_map.cell_of(value(row), False)
        for row in rows
    }
    figure = ratio_map.chart(
        "The classic layer beside sglang’s, same configs",
        f"moelab: {recording.source()}<br>sglang: {peer_source}; green: moelab is faster, orange: sglang is<br>another "
        "machine of the same kind, so a few per cent either way are the machines’; searched: a short search’s one config "
        "for both GEMMs",
        cells, list(dict.fromkeys(name for name, _ in cells)), sorted(names_of(rows, "num_tokens")), bar="moelab / sglang",
    )  # fmt: skip
    ratios = [value(row) for row in rows]
    close = sum(abs(r - 1) <= CLEARLY for r in ratios)
    return Panel(figure, table_of(rows, "moelab / sglang", value, "config_name"), f"**Geometric mean over {len(rows)} rows: "
                 f"{geometric_mean(ratios):.3f} times sglang’s time.** {close} are within 5 % either way; "
                 f"{extremes(rows, value)}.")  # fmt: skip


def eager_over_graph(recording: Recording) -> Panel:
    """Map of implementation by batch: wall time in eager mode over GPU time in a CUDA graph, which is what the host costs."""
    rows = [row for row in timed(recording) if "eager_samples_us" in row]

    def eager(row: Row) -> float:
        return span(row, samples="eager_samples_us")[0]

    def value(row: Row) -> float:
        return eager(row) / span(row)[0]

    batches = sorted(names_of(rows, "num_tokens"))
    figure = _by_implementation(
        "What a CUDA graph saves", f"{recording.source()}; eager over graph time, medians, calls back to back; 1: the host is "
        "hidden behind the GPU", rows, ratio_map.mean_cells(rows, value), bar="eager / graph")  # fmt: skip
    small = [row for row in rows if row["num_tokens"] == batches[0]]
    means = {b: geometric_mean([value(row) for row in rows if row["num_tokens"] == b]) for b in batches}
    hidden = [b for b in batches if all(mean <= 1 + CLEARLY for batch, mean in means.items() if batch >= b)]
    until = f"from batch {hidden[0]} on within 5 % on average" if hidden else (
        f"at batch {batches[-1]} still {means[batches[-1]]:.2f} times")  # fmt: skip
    quickest = [min(sound(c).values(), key=eager) for c in cells_of(small).values() if sound(c)]
    head = f"At batch {batches[0]} eager mode takes {means[batches[0]]:.1f} times a graph’s time (geometric mean), {until}."
    return Panel(figure, table_of(rows, "eager / graph", value), conclude(head, {
        "There": extremes(small, value),
        "Shortest eager medians": [f"{row['shape']} {row['impl']} {eager(row):.0f} µs" for row in quickest],
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
