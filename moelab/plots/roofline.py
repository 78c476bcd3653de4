"""Ceilings, floors, experts touched, padding and the work of each launch: arithmetic, drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moelab import roofline
from moelab.errors import ShardError
from moelab.plots import ratio_map
from moelab.plots.cells import trace
from moelab.plots.panel import Panel, Row, timing
from moelab.plots.style import GREY, SIDES, STEPS, error_bars, grid, log_axis, look, number, series, text_on
from moelab.recordings import Recording
from moelab.roofline import Ceilings
from moelab.shapes import MoEShape, load_model

BATCHES = tuple(2**i for i in range(14))
"""1 ... 8192 tokens."""

LAUNCHES = {"gemm1": "GEMM1", "activation": "activation", "gemm2": "GEMM2", "sum_reduce": "sum-reduce"}


def recorded_ceilings(recording: Recording) -> Ceilings:
    """The recorded copy bandwidth and bfloat16 product as Ceilings."""
    rate = {row["what"]: row["per_second"] for row in recording.rows}
    return Ceilings(rate["copy"], rate["product"], recording.provenance["gpu"], recording.source())


def ceilings(recording: Recording, datasheet: Ceilings, floors: Ceilings) -> Panel:
    """What the GPU reached (copy, read, product) beside its datasheet and the round figures that floors use."""
    figure = grid("What the GPU can do at most", recording.source(), titles=["memory", "bfloat16 product"], height=380)
    table = []
    for row in recording.rows:
        product = row["what"] == "product"
        unit, fact = ("TFLOP/s", "flops_per_s") if product else ("TB/s", "copy_bytes_per_s")
        low, high = timing(row).interval_us
        work, rate = row["FLOP" if product else "bytes"] / 1e6, row["per_second"] / 1e12
        sheet, used = getattr(datasheet, fact) / 1e12, getattr(floors, fact) / 1e12
        figure.add_bar(
            x=[row["what"]], y=[rate], error_y=error_bars([rate], [work / high], [work / low]), width=0.3 if product else 0.5,
            marker={"color": SIDES["compute" if product else "memory"].color}, showlegend=False, name=row["what"],
            text=[f"{number(rate)} {unit}"], textposition="inside", insidetextanchor="middle",
            insidetextfont={"color": text_on(SIDES["compute" if product else "memory"].color)}, row=1, col=2 if product else 1,
        )  # fmt: skip
        table.append({"what": row["what"], "unit": unit, "recorded": rate, "95 % low": work / high, "95 % high": work / low,
                      "used for floors": used, "datasheet": sheet, "recorded / datasheet": rate / sheet})  # fmt: skip
    for col, (fact, unit) in enumerate((("copy_bytes_per_s", "TB/s"), ("flops_per_s", "TFLOP/s")), start=1):
        for ceiling, dash, what in ((datasheet, "dash", "datasheet"), (floors, "dot", "used for floors")):
            value = getattr(ceiling, fact) / 1e12
            label = {"annotation_text": f"{what} {number(value)}", "annotation_position": "top left"}
            figure.add_hline(value, line={"color": GREY, "dash": dash}, row=1, col=col, **label)
        top = getattr(datasheet, fact) / 1e12 * 1.15
        figure.update_yaxes(title=unit, range=[0, top], row=1, col=col)
    share = {row["what"]: row["recorded / datasheet"] for row in table}
    ridge = recorded_ceilings(recording).ridge_flop_per_byte
    sentence = (
        f"**A copy reaches {share['copy']:.0%} of the datasheet’s bandwidth, a large product {share['product']:.0%} of its "
        f"FLOP rate.** Work with less than {ridge:.0f} FLOP per byte is limited by memory, work with more by arithmetic."
    )
    return Panel(figure, table, sentence)


def floors(
    shapes: Mapping[str, MoEShape],
    at: Ceilings,
    batches: Sequence[int] = BATCHES,
    rates: Mapping[str, Ceilings] | None = None,
    what: str = "a layer",
) -> Panel:
    """Map of shape by batch: the layer's floor in microseconds, coloured by the side that sets it; pale where both do.

    rates: ceilings of those shapes that multiply other than `at` says, as fp8 does. what: is bound, for the title.
    """
    table: list[Row] = []
    rates = rates or {}
    flops = {f"{each.flops_per_s / 1e12:g}" for each in (at, *rates.values())}
    cells: dict[tuple[str, int], ratio_map.Cell] = {}
    turns = {}
    for name, shape in shapes.items():
        found = {b: roofline.floor_us(roofline.layer_cost(shape, b), rates.get(name, at)) for b in batches}
        for b, f in found.items():
            cells[name, b] = ratio_map.Cell(f.compute_us / f.memory_us, f"{f.us:.0f}", False)
        table.append({"floor, µs": name} | {f"{b}": f.us for b, f in found.items()})
        turns[name] = next((b for b, f in found.items() if f.side == "compute"), None)
    first = min((turn for turn in turns.values() if turn), default=None)
    until = f"memory until batch {batches[batches.index(first) - 1]}, then arithmetic" if first else "memory"
    figure = ratio_map.chart(
        f"What bounds {what}: {until}", f"the number: the floor in µs, computed: bytes / {at.copy_bytes_per_s / 1e12:g} TB/s or "
        f"FLOP / {' or '.join(sorted(flops, key=float))} TFLOP/s, whichever takes longer<br>{'' if rates else 'bfloat16, '}"
        "uniform routing; blue: memory is the limit; brown: arithmetic; pale: both nearly", cells, list(shapes), batches, tall=44,
        low=SIDES["memory"].color,
        high=SIDES["compute"].color, span=math.log(8), bar="arithmetic / memory",
    )  # fmt: skip
    said = "; ".join(
        f"{name} {f'from {turn} tokens' if turn else f'never, up to {batches[-1]}'}" for name, turn in turns.items()
    )
    return Panel(
        figure, table, f"**Every shape starts memory-bound.** Arithmetic takes over (of the batches drawn): {said}."
    )


def touched(shapes: Mapping[str, MoEShape], drawn: Sequence[Row]) -> Panel:
    """Experts touched by batch: expected under uniform routing (lines), and routings really drawn (markers).

    drawn: rows of shape, routing ("uniform", "zipf", ...), num_tokens, touched (mean over seeds).
    """
    names = list(dict.fromkeys(row["shape"] for row in drawn))
    figure = grid("How many experts a batch wakes", "lines: expected under uniform routing, E (1 − (1 − k/E)<sup>M</sup>); "
                  "markers: routings drawn here, mean over seeds", titles=names, shared_y=True)  # fmt: skip
    routings = list(dict.fromkeys(row["routing"] for row in drawn))
    table: list[Row] = []
    batches = sorted({row["num_tokens"] for row in drawn})
    for col, name in enumerate(names, start=1):
        shape = shapes[name]
        expected = {b: roofline.experts_touched(shape.num_experts, shape.top_k, b) / shape.num_experts for b in batches}
        trace(figure, expected, "expected", look("floor"), mode="lines", legend=col == 1, row=1, col=col)
        table.append({"share of experts": name, "routing": "expected"} | {str(b): expected[b] for b in batches})
        for routing, style in series(routings).items():
            found = {r["num_tokens"]: r["touched"] / shape.num_experts for r in drawn
                     if r["shape"] == name and r["routing"] == routing}  # fmt: skip
            trace(figure, found, routing, style, hollow=True, mode="markers", legend=col == 1, row=1, col=col)
            table.append({"share of experts": name, "routing": routing} | {str(b): v for b, v in found.items()})
        figure.update_xaxes(title="batch, tokens", row=1, col=col, **log_axis(batches))
        figure.update_xaxes(ticktext=[str(b) if at % 2 == 0 else "" for at, b in enumerate(batches)], row=1, col=col)
    figure.update_yaxes(title="share of experts touched", range=[0, 1.04], tickformat=".0%", col=1)
    uniform = [row for row in drawn if row["routing"] == "uniform"]
    gap = max(abs(r["touched"] / roofline.experts_touched(shapes[r["shape"]].num_experts, shapes[r["shape"]].top_k,
              r["num_tokens"]) - 1) for r in uniform)  # fmt: skip
    middle = str(batches[len(batches) // 2])
    fewest = min((r for r in table if r["routing"] != "expected"), key=lambda r: r[middle])
    return Panel(figure, table, f"**The formula is right to {gap:.0%} for uniform routings; skew wakes fewer experts.** At "
                 f"{middle} tokens {fewest['routing']} touches {fewest[middle]:.0%} of {fewest['share of experts']}’s experts: "
                 "fewer weights are read, and the floor is lower.")  # fmt: skip


def padding(name: str, shape: MoEShape, blocks: Sequence[int], batches: Sequence[int] = BATCHES) -> Panel:
    """Map of BLOCK_SIZE_M by batch: rows computed per row that exists (expected, uniform routing)."""
    waste = {(str(m), b): roofline.padding_waste(shape, b, m).waste for m in blocks for b in batches}
    cells = {at: ratio_map.Cell(value, number(value, 2 if value < 100 else 3), False) for at, value in waste.items()}
    figure = ratio_map.chart(
        f"Rows computed for each row that exists: {name}", "computed: expected under uniform routing; each expert’s rows are "
        "rounded up to BLOCK_SIZE_M", cells, [str(m) for m in blocks], batches, y="BLOCK_SIZE_M", low=None, bar="computed / real",
    )  # fmt: skip
    table: list[Row] = [{"BLOCK_SIZE_M": m} | {str(b): waste[str(m), b] for b in batches} for m in blocks]
    half = {row["BLOCK_SIZE_M"]: next((b for b in batches if row[str(b)] < 1.5), None) for row in table}
    one = ", ".join(f"{row[str(batches[0])]:.0f} by {row['BLOCK_SIZE_M']}" for row in (table[0], table[-1]))
    said = ", ".join(f"{block} {f'from batch {b} on' if b else f'not by {batches[-1]}'}" for block, b in half.items())
    return Panel(figure, table, f"**Rows computed for each real one at batch {batches[0]}, by rows of a tile: {one}.** In "
                 f"decode that is free, since memory is the limit; in prefill it is time. Under 1.5 rows: {said}.")  # fmt: skip


def breakdown(title: str, shape: MoEShape, peers: Sequence[Row], at: Ceilings, source: str) -> Panel:
    """Each launch's floor beside what sglang's launch took (g1, act, g2, red), as shares of the fused layer's floor."""
    figure = grid(f"Where the time of four launches goes: {title}", f"floors: computed, each launch with its own traffic; "
                  f"measured: {source}", titles=["floor of each launch", "sglang, each launch timed alone"],
                  shared_y=True)  # fmt: skip
    keys = {"gemm1": "g1", "activation": "act", "gemm2": "g2", "sum_reduce": "red"}
    rows = [row for row in peers if row["name"] == title]
    batches = [str(row["M"]) for row in rows]
    table: list[dict[str, Any]] = [{"batch": row["M"]} for row in rows]
    for launch, name in LAUNCHES.items():
        ideal, measured = [], []
        for row, out in zip(rows, table, strict=True):
            whole = roofline.floor_us(roofline.layer_cost(shape, row["M"], row["uniq"]), at).us
            floor = roofline.floor_us(roofline.layer_breakdown(shape, row["M"], row["uniq"])[launch], at).us
            ideal.append(floor / whole)
            measured.append(row[keys[launch]] / whole)
            out |= {"layer floor, µs": whole, f"{name} floor, µs": floor, f"{name}, µs": row[keys[launch]]}
        for col, heights in ((1, ideal), (2, measured)):
            figure.add_bar(x=batches, y=heights, name=name, marker={"color": STEPS[name]}, showlegend=col == 1,
                           row=1, col=col)  # fmt: skip
    figure.add_hline(1.0, line={"color": GREY, "dash": "dot"})
    figure.update_layout(barmode="stack", legend={"traceorder": "reversed"})
    figure.update_xaxes(title="batch, tokens", type="category")
    figure.update_yaxes(title="time / floor of the fused layer", col=1)
    small = [sum(r[f"{LAUNCHES[k]}, µs"] for k in ("activation", "sum_reduce")) /
             sum(r[f"{LAUNCHES[k]}, µs"] for k in LAUNCHES) for r in table]  # fmt: skip
    last = sum(table[-1][f"{label} floor, µs"] for label in LAUNCHES.values()) / table[-1]["layer floor, µs"]
    return Panel(figure, table, f"**Activation and sum-reduce are {min(small):.0%} to {max(small):.0%} of the launches’ time.** "
                 f"At batch {batches[-1]} the four floors add up to {last:.2f} times the fused layer’s: traffic of "
                 "intermediates. (A launch whose input lies in the L2 can beat its floor from memory.)")  # fmt: skip


def tp_choices(model: str, degrees: Sequence[int] = (1, 2, 4, 8, 16)) -> list[int]:
    """The tensor-parallel degrees that divide a model's experts; the others are left out."""
    fitting = []
    for degree in degrees:
        try:
            load_model(model, tp_size=degree)
        except ShardError:
            continue
        fitting.append(degree)
    return fitting
