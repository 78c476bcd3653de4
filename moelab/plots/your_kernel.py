"""A kernel of the reader's own: where it is wrong, which tiles suit it, and its place under the roof beside ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go

from moelab import roofline
from moelab.plots import fast_layer, ratio_map, rivals
from moelab.plots.cells import fastest, over_floor, span
from moelab.plots.panel import Panel, Row, timing
from moelab.plots.style import BETTER, GREY, SERIES, WRONG, error_bars, grid, look, number
from moelab.recordings import Recording
from moelab.roofline import Ceilings, Cost
from moelab.shapes import MoEShape

WITHIN = ((0.0, SERIES[0].color), (0.5, "#e8e8e8"), (1.0, WRONG))
"""Blue: far within the bound. Grey: at it. Red: past it."""

DECADES = 3.0
"""Powers of ten of error over bound that the error map tells apart, each way."""

NEAR = 1.1
"""Traffic up to this much over a layer's least counts as the least."""


# --- is it right --------------------------------------------------------------------------------------------------


def error_map(impl: str, sizes: Mapping[str, int], dtype: str, found: Mapping[str, Any], source: str) -> Panel:
    """|out - exact| over the bound for every output: a token's row, a hidden column.

    found: of suites.your_kernel.error_map. An error that is no number is drawn as the largest.
    """
    bound, errors = found["bound"], found["errors"]
    worst = found["max_abs"] / bound
    verdict = "within its bound" if found["passes"] else "REFUSED"
    inner = f"hidden size {sizes['hidden_size']}, inner size {sizes['moe_intermediate_size']}"
    figure = grid(f"{impl} in {dtype}, {inner}: {verdict}", f"{source}; bound: twice torch’s own error and a rounding",
                  height=170 + 30 * max(4, len(errors)))  # fmt: skip
    heat = go.Heatmap(
        z=[[round(_decades(e, bound), 2) for e in row] for row in errors], zmin=-DECADES, zmax=DECADES,
        colorscale=[list(stop) for stop in WITHIN],
        hovertemplate="token %{y}, column %{x}: 10<sup>%{z}</sup> of the bound<extra></extra>",
        colorbar={"title": {"text": "error / bound", "side": "right"}, "tickvals": [-3, -2, -1, 0, 1, 2, 3],
                  "ticktext": ["≤ 0.001", "0.01", "0.1", "1", "10", "100", "≥ 1000"]},
    )  # fmt: skip
    figure.add_trace(heat)
    figure.update_xaxes(title="column of the hidden state", showgrid=False)
    figure.update_yaxes(title="token", autorange="reversed", dtick=1, showgrid=False)
    past = sum(not e <= bound for row in errors for e in row)
    table = [{
        "kernel": impl, "dtype": dtype, "hidden size": sizes["hidden_size"], "largest error": found["max_abs"], "bound": bound,
        "error / bound": worst, "outputs past it": past, "our policy passes": found["passes"],
        "a fixed tolerance of": found["upstream_tolerance"], "it passes": found["upstream_passes"],
    }]  # fmt: skip
    count = sum(len(row) for row in errors)
    verdict = "is right here" if found["passes"] else "is refused"
    through = not found["passes"] and found["upstream_passes"]
    fixed = f" A fixed tolerance of {number(found['upstream_tolerance'])}, the usual check, lets it through." * through
    return Panel(figure, table, f"**{impl} {verdict}: its largest error is {number(worst)} times the bound; {past} of {count} "
                 f"outputs are past it.**{fixed}")  # fmt: skip


def _decades(error: float, bound: float) -> float:
    """log10 of error over bound, cut to DECADES each way; NaN and infinity count as past everything."""
    if not math.isfinite(error):
        return DECADES
    return max(-DECADES, min(DECADES, math.log10(error / bound))) if error > 0 else -DECADES


# --- which tiles --------------------------------------------------------------------------------------------------


def tuning(impl: str, rows: Sequence[Row], where: str, floor_us: float | None = None) -> Panel:
    """The tiles that were tried: by time where they were timed, else by error over bound.

    rows: of suites.your_kernel.tune. where: what they ran on. floor_us: drawn where there are times.
    """
    timed = [row for row in rows if row.get("samples_us")]
    right = [row for row in rows if row["within_bound"]]
    title = f"{impl}: {len(rows)} tiles, " + ("timed" if timed else "checked; nothing is timed here")
    named, shared = in_words(rows)
    figure = grid(title, f"{where}{f'; all tiles: {shared}' if shared else ''}", height=170 + 26 * max(4, len(rows)))
    drawn = timed or [row for row in rows if row.get("max_abs_error") is not None]
    labels = [named[row["config"]] for row in drawn]
    if timed:
        middle, low, high = zip(*(span(row) for row in timed), strict=True)
        figure.add_scatter(x=middle, y=labels, error_x=error_bars(middle, low, high), mode="markers", name=impl,
                           marker=look(impl).marker(10), showlegend=False)  # fmt: skip
        if floor_us:
            figure.add_vline(floor_us, line=look("floor").line(), annotation_text=f"floor {number(floor_us)}")
        figure.update_xaxes(title="µs per layer, 95 % interval", rangemode="tozero")
    else:
        figure.add_bar(x=[row["max_abs_error"] / row["bound"] for row in drawn], y=labels, orientation="h", name=impl,
                       marker={"color": [BETTER if row["within_bound"] else WRONG for row in drawn]},
                       showlegend=False)  # fmt: skip
        figure.add_vline(1.0, line={"color": GREY, "dash": "dash"})
        figure.update_xaxes(title="largest error / bound (over 1: refused)", rangemode="tozero")
    figure.update_yaxes(title="tile", type="category", autorange="reversed", automargin=True)
    table = [
        {
            "tile": named[row["config"]], "within its bound": bool(row["within_bound"]),
            "error / bound": row["max_abs_error"] / row["bound"] if row.get("max_abs_error") is not None else None,
            "median, µs": timing(row).median_us if row.get("samples_us") else None,
            "why not": row.get("failed") or row.get("refused") or row.get("problem"),
        }
        for row in rows
    ]  # fmt: skip
    return Panel(figure, table, _said_of_tiles(rows, right, timed, named, floor_us))


SETTINGS: Mapping[str, str] = {
    "BLOCK_SIZE_M": "{} rows", "BLOCK_SIZE_N": "{} columns", "BLOCK_SIZE_K": "{} of K", "GROUP_SIZE_M": "groups of {}",
    "num_warps": "{} warps", "num_stages": "{} stages",
}  # fmt: skip
"""What a tile's settings mean, in words."""


def in_words(rows: Sequence[Row]) -> tuple[dict[str, str], str]:
    """A label in words for each row's config, of what tells the tiles apart; and what they all share.

    rows: with `tile` where it is known, else their labels stay.
    """
    tiles = {row["config"]: row["tile"] for row in rows if row.get("tile")}
    values = {name: {getattr(tile, name) for tile in tiles.values()} for name in SETTINGS}
    apart = [name for name in SETTINGS if len(values[name]) > 1] or list(SETTINGS)[:3] * bool(tiles)
    labels = {row["config"]: row["config"] for row in rows}
    labels |= {
        code: ", ".join(SETTINGS[name].format(getattr(tile, name)) for name in apart) for code, tile in tiles.items()
    }
    shared = (SETTINGS[name].format(*values[name]) for name in SETTINGS if tiles and name not in apart)
    return labels, ", ".join(shared)


def _said_of_tiles(
    rows: Sequence[Row], right: Sequence[Row], timed: Sequence[Row], named: Mapping[str, str], floor_us: float | None
) -> str:
    head = f"{len(right)} of {len(rows)} tiles are right"
    if not timed:
        return f"**{head}; none was timed, because this machine has no GPU that runs them.** On one, the same call times them."
    times = {row["config"]: timing(row) for row in timed}
    first, *tied = fastest(times)
    us = times[first].median_us
    share = f", {number(us / floor_us)} times the floor" if floor_us else ""
    return (
        f"**{head}; the fastest is {named[first]}: {number(us)} µs{share}.** {len(tied)} more tie with it; the slowest takes "
        f"{number(max(t.median_us for t in times.values()) / us)} times as long."
    )


# --- under the roof -----------------------------------------------------------------------------------------------


def asked(shape: MoEShape, num_tokens: int) -> Cost:
    """What a layer without a sort asks of memory: an expert's weights again for every (token, slot) pair; same FLOP.

    A cache may answer the repeats, so this is no floor, but what has to be served.
    """
    one = roofline.layer_cost(shape, num_tokens, 1.0)
    return replace(one, bytes_weights=one.bytes_weights * num_tokens * shape.top_k)


def on_the_roof(
    name: str, shape: MoEShape, recording: Recording, at: Ceilings, mine: str, ours: Sequence[str],
    live: Sequence[Row] = (), here: str = "", one: Recording | None = None,
) -> Panel:  # fmt: skip
    """Time over the floor by batch: what `mine` asks of memory, if no cache helped, beside ours, *fast* and sglang's.

    name: a shape of the recording layer_baseline. ours: implementations drawn from it. live: rows of
    suites.your_kernel.live_rows, `mine` among them; without any, only mine's arithmetic is drawn. one: the recording fast_layer.
    """
    rows = [row for row in recording.select(shape=name) if "samples_us" in row and row["impl"] in ours]
    batches = sorted({row["num_tokens"] for row in rows})
    fast = [row for row in fast_layer.fast_rows(one) if row["shape"] == name] if one else []
    floors, wants = (
        {b: of(b) for b in batches} for of in (lambda b: roofline.layer_cost(shape, b), lambda b: asked(shape, b))
    )
    least = {b: roofline.floor_us(cost, at).us for b, cost in floors.items()}
    over = {(f"{mine}, if no cache helped", b): roofline.floor_us(cost, at).us / least[b] for b, cost in wants.items()}
    over |= {(f"{row['impl']}, live", row["num_tokens"]): span(row, least[row["num_tokens"]])[0]
             for row in live if "samples_us" in row and row["shape"] == name}  # fmt: skip
    over |= {(row["impl"], row["num_tokens"]): over_floor(row, at)[0] for row in (*fast, *rows)}
    left = {row["num_tokens"]: over["fast", row["num_tokens"]] for row in fast}
    if one:
        peers = rivals.rows_of(one, at, fast_layer.load_rivals())
        over |= {(row["who"], row["num_tokens"]): row["over"] for row in peers
                 if row["shape"] == name and row["who"] not in (rivals.FAST, rivals.ORDERING)}  # fmt: skip
    figure = ratio_map.chart(
        f"{mine} over the floor: {name}",
        f"ours: {recording.source()}, alignment included{f'; fast: {one.source()}, order beforehand' if one else ''}<br>"
        f"floor, and {mine} if no cache helped: computed at {at.copy_bytes_per_s / 1e12:g} TB/s, {at.flops_per_s / 1e12:g} "
        f"TFLOP/s; {f'live: on {here}' if live else f'{mine}: not timed here'}",
        {key: ratio_map.cell_of(value, False) for key, value in over.items()}, list(dict.fromkeys(who for who, _ in over)),
        batches, low=None, span=math.log(10), bar="time / floor",
    )  # fmt: skip
    ours = [*ours, *["fast"] * bool(fast)]
    table = [
        {
            **_row(b, [*rows, *fast], live, ours, mine, name, least[b], floors[b], wants[b]),
            **({"fast / floor": left[b]} if b in left else {}),
        }
        for b in batches
    ]
    near = max((row["batch"] for row in table if row["times the least"] <= NEAR), default=0)
    last, small = table[-1], table[0]
    times = {
        key: us for key, us in small.items() if key.endswith(("µs", "(live)")) and us and not key.startswith("floor")
    }
    each = ", ".join(
        f"{key.removesuffix(', µs')} {number(us)}" for key, us in sorted(times.items(), key=lambda item: item[1])
    )
    sentence = (
        f"**{mine} reads an expert’s weights once for every pair: up to batch {near} at most {NEAR - 1:.0%} over the least, at "
        f"batch {last['batch']} {number(last['times the least'])} times the least.** µs at batch {small['batch']}: {each}."
    ) + left_to_win(left)
    return Panel(figure, table, sentence)


def left_to_win(over: Mapping[int, float]) -> str:
    """How far a layer is from the floor, at its best and at its worst batch. over: batch -> times the floor."""
    if not over:
        return ""
    near, far = (of(over, key=lambda b: over[b]) for of in (min, max))
    return (
        f" Left to win over *fast*: it takes {over[near]:.2f} times the floor at batch {near}, its nearest, and "
        f"{over[far]:.2f} at batch {far}, its farthest."
    )


def _row(batch: int, rows: Sequence[Row], live: Sequence[Row], ours: Sequence[str], mine: str, name: str, floor: float,
         least: Cost, wants: Cost) -> Row:  # fmt: skip
    def median(found: Sequence[Row], impl: str) -> float | None:
        here = [
            r for r in found if (r["num_tokens"], r["impl"], r["shape"]) == (batch, impl, name) and "samples_us" in r
        ]
        return span(here[0])[0] if here else None

    return {
        "batch": batch, "floor, µs": floor, "least MB": least.bytes / 1e6, f"MB {mine} asks for": wants.bytes / 1e6,
        "times the least": wants.bytes / least.bytes, **{f"{impl}, µs": median(rows, impl) for impl in ours},
        **{f"{impl}, µs (live)": median(live, impl) for impl in dict.fromkeys([mine, *(row["impl"] for row in live)])},
    }  # fmt: skip
