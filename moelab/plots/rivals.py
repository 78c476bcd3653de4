"""The fastest layer beside the rivals that were measured: one plot of time over floor, the mean of the shapes that all have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moelab.errors import counted
from moelab.plots.cells import names_of, timed
from moelab.plots.cells import over_floor as times_over_floor
from moelab.plots.fast_layer import Rivals, load_rivals
from moelab.plots.panel import Panel, Row, geometric_mean
from moelab.plots.style import GREY, grid, log_axis, look
from moelab.recordings import Recording
from moelab.roofline import Ceilings

TORCH, SGLANG, FLASHINFER, FAST, ORDERING = (
    "torch grouped_mm", "sglang", "FlashInfer, order inside", "moelab fast", "moelab fast, order inside",
)  # fmt: skip
LOOKS = {TORCH: "grouped_mm", SGLANG: "sglang", FLASHINFER: "FlashInfer", FAST: "fast", ORDERING: "fast"}
"""What is drawn -> whose look it has, from the farthest over the floor to the nearest."""

_NAMES = {"grouped_mm": TORCH, "fast": FAST, "sglang": SGLANG, "FlashInfer": FLASHINFER}


def shared(rows: Sequence[Row]) -> tuple[list[str], list[Row]]:
    """The shapes that every contender has, and their rows."""
    shapes = [s for s in names_of(rows, "shape") if {r["who"] for r in rows if r["shape"] == s} == {*LOOKS}]
    return shapes, [row for row in rows if row["shape"] in shapes]


def rows_of(recording: Recording, at: Ceilings, rivals: Rivals) -> list[Row]:
    """who, shape, num_tokens and "over", the time over the floor; uniform routing, within the error bound."""
    rows: list[dict[str, Any]] = [
        {**row, "over": times_over_floor(row, at)}
        for row in timed(recording)
        if row["impl"] in ("grouped_mm", "fast") and row["routing"] == "uniform" and row["within_bound"]
    ]
    found: list[Row] = [
        {"who": _NAMES[row["impl"]], "shape": row["shape"], "num_tokens": row["num_tokens"], "over": row["over"][0]}
        for row in [*rows, *rivals.rows()]
    ]
    run = [row for row in rivals.flashinfer["rows"] if row.get("moelab")]
    return found + [
        {"who": ORDERING, "shape": row["name"], "num_tokens": row["M"], "over": row["moelab"] / row["floor"]}
        for row in run
    ]


def beside(recording: Recording, at: Ceilings, rivals: Rivals | None = None) -> Panel:
    """A line for each contender: at each batch size the geometric mean of its time over the floor, over the shapes that all have.

    rivals: those of data/upstream unless given; their rows bring the floor of their routing.
    """
    rivals = rivals or load_rivals()
    rows = rows_of(recording, at, rivals)
    shapes, compared = shared(rows)
    batches = sorted({row["num_tokens"] for row in rows})
    figure = grid(
        f"A layer over its floor: mean of {', '.join(shapes)}",
        f"moelab and torch: {recording.source()}; sglang, the best of its configs: {_when(rivals.sglang)}<br>order inside: "
        f"{_when(rivals.flashinfer)}, moelab in the same run; elsewhere the tokens’ order by expert was made beforehand",
        height=400,
    )
    for who in LOOKS:
        style, inside, mean = look(LOOKS[who]), who == ORDERING, means_of(compared, who)
        figure.add_scatter(
            x=list(mean), y=list(mean.values()), name=who, mode="lines+markers", marker=style.marker(8, hollow=inside),
            line={**style.line(), "dash": "dot" if inside else "solid"}, hovertemplate="batch %{x}: %{y:.3f}",
        )  # fmt: skip
    figure.add_hline(y=1, line={"color": GREY, "width": 1})
    figure.update_xaxes(title="batch, tokens", **log_axis(batches))
    figure.update_yaxes(title="time / floor", type="log", tickvals=[1, 1.2, 1.5, 2, 3, 5])
    over = {who: geometric_mean([row["over"] for row in compared if row["who"] == who]) for who in LOOKS}
    each = ", ".join(f"{who} {over[who]:.2f}" for who in sorted(over, key=over.__getitem__))
    return Panel(
        figure,
        _table(rows, batches),
        f"**Times the floor on an {rivals.flashinfer['device']} in bf16, mean of {counted(len(shapes), 'model')} at "
        f"{counted(len(batches), 'batch size')}: {each}.** In one run, each ordering the tokens itself: {rivals.said()}.",
    )


def _when(theirs: Mapping[str, Any]) -> str:
    """Whose version, and the date: device and toolchain are the recording's."""
    return f"{theirs['source'].partition(' measured')[0]}, {theirs['date']}"


def means_of(rows: Sequence[Row], who: str) -> dict[int, float]:
    """Batch size -> the geometric mean of a contender's time over the floor."""
    mine = [row for row in rows if row["who"] == who]
    by_batch = {
        b: [row["over"] for row in mine if row["num_tokens"] == b] for b in sorted(names_of(mine, "num_tokens"))
    }
    return {b: geometric_mean(values) for b, values in by_batch.items()}


def _table(rows: Sequence[Row], batches: Sequence[int]) -> list[Row]:
    """A row for each shape and contender, its shapes together."""
    found = {(row["shape"], row["who"], row["num_tokens"]): row["over"] for row in rows}
    return [
        {"time / floor": shape, "who": who, **{str(b): found.get((shape, who, b)) for b in batches}}
        for shape in names_of(rows, "shape")
        for who in LOOKS
        if any((shape, who, b) in found for b in batches)
    ]
