"""The fastest layer beside the rivals that were measured: one plot of time over floor, the mean of the shapes that all have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moelab import runtime
from moelab.errors import counted
from moelab.plots.cells import names_of, timed
from moelab.plots.cells import over_floor as times_over_floor
from moelab.plots.panel import Panel, Row, geometric_mean
from moelab.plots.style import GREY, grid, log_axis, look
from moelab.recordings import Recording
from moelab.roofline import Ceilings

TORCH, SGLANG, FLASHINFER, FAST, ORDERING = (
    "torch grouped_mm", "sglang", "FlashInfer, order inside", "moelab fast", "moelab fast, order inside",
)  # fmt: skip
LOOKS = {TORCH: "grouped_mm", SGLANG: "sglang", FLASHINFER: "FlashInfer", FAST: "fast", ORDERING: "fast"}
"""What is drawn -> whose look it has, from the farthest over the floor to the nearest."""

OF_SGLANG = ("default", "shipped", "tuned", "tuned_sep", "fuse_sep")
"""Columns of sglang's rows: its rule without a file, the file it ships, a search's config for both GEMMs, one for each, and that
with SwiGLU fused into GEMM1."""


def peer(name: str) -> dict[str, Any]:
    """A file of data/upstream."""
    return json.loads((runtime.data_dir() / "upstream" / f"{name}.json").read_text(encoding="utf-8"))


def beside(recording: Recording, at: Ceilings) -> Panel:
    """`over_floor` beside the rivals of data/upstream."""
    return over_floor(recording, at, peer("h200_sglang"), peer("h200_flashinfer_cutedsl"))


def shared(rows: Sequence[Row]) -> tuple[list[str], list[Row]]:
    """The shapes that every contender has, and their rows."""
    shapes = [s for s in names_of(rows, "shape") if {r["who"] for r in rows if r["shape"] == s} == {*LOOKS}]
    return shapes, [row for row in rows if row["shape"] in shapes]


def rows_of(recording: Recording, at: Ceilings, sglang: Mapping[str, Any], flashinfer: Mapping[str, Any]) -> list[Row]:
    """who, shape, num_tokens and "over", the time over the floor; uniform routing, within the error bound."""
    rows: list[Row] = []
    for impl, who in (("grouped_mm", TORCH), ("fast", FAST)):
        rows += [
            {"who": who, "shape": row["shape"], "num_tokens": row["num_tokens"], "over": times_over_floor(row, at)[0]}
            for row in timed(recording)
            if row["impl"] == impl and row["routing"] == "uniform" and row["within_bound"]
        ]
    for who, theirs, keys in (
        (SGLANG, sglang, OF_SGLANG),
        (FLASHINFER, flashinfer, ("rival",)),
        (ORDERING, flashinfer, ("moelab",)),
    ):
        for row in theirs["rows"]:
            times = [row[key] for key in keys if row.get(key)]
            if times:
                over = min(times) / row["floor"]
                rows.append({"who": who, "shape": row["name"], "num_tokens": row["M"], "over": over})
    return rows


def over_floor(recording: Recording, at: Ceilings, sglang: Mapping[str, Any], flashinfer: Mapping[str, Any]) -> Panel:
    """A line for each contender: at each batch size the geometric mean of its time over the floor, over the shapes that all have.

    sglang, flashinfer: `peer("h200_sglang")`, `peer("h200_flashinfer_cutedsl")`, whose rows bring the floor of their routing.
    """
    rows = rows_of(recording, at, sglang, flashinfer)
    shapes, compared = shared(rows)
    batches = sorted({row["num_tokens"] for row in rows})
    means = {who: means_of(compared, who) for who in LOOKS}
    figure = grid(
        f"A layer over its floor: mean of {', '.join(shapes)}",
        f"moelab and torch: {recording.source()}; sglang, the best of its configs: {_when(sglang)}<br>order inside: "
        f"{_when(flashinfer)}, moelab in the same run; elsewhere the tokens’ order by expert was made beforehand",
        height=400,
    )
    for who, mean in means.items():
        style, inside = look(LOOKS[who]), who == ORDERING
        figure.add_scatter(
            x=list(mean), y=list(mean.values()), name=who, mode="lines+markers", marker=style.marker(8, hollow=inside),
            line={**style.line(), "dash": "dot" if inside else "solid"}, hovertemplate="batch %{x}: %{y:.3f}",
        )  # fmt: skip
    figure.add_hline(y=1, line={"color": GREY, "width": 1})
    figure.update_xaxes(title="batch, tokens", **log_axis(batches))
    figure.update_yaxes(title="time / floor", type="log", tickvals=[1, 1.2, 1.5, 2, 3, 5])
    return Panel(figure, _table(rows, batches), _said(rows, compared, shapes, flashinfer))


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


def _said(rows: Sequence[Row], compared: Sequence[Row], shapes: Sequence[str], flashinfer: Mapping[str, Any]) -> str:
    over = {who: geometric_mean([row["over"] for row in compared if row["who"] == who]) for who in LOOKS}
    each = ", ".join(f"{who} {over[who]:.2f}" for who in sorted(over, key=over.__getitem__))
    run = [row for row in flashinfer["rows"] if row.get("moelab") and row.get("rival")]
    ours, theirs = (geometric_mean([row[key] / row["floor"] for row in run]) for key in ("moelab", "rival"))
    behind = [row["moelab"] / row["rival"] - 1 for row in run if row["rival"] < row["moelab"]]
    by = f" by at most {max(behind):.0%}" if behind else ""
    models, batches = counted(len(shapes), "model"), counted(len(names_of(rows, "num_tokens")), "batch size")
    return (
        f"**Times the floor on an {flashinfer['device']} in bf16, mean of {models} at {batches}: {each}.** In the run with "
        f"FlashInfer, over all its {counted(len(run), 'cell')}: moelab fast {ours:.2f}, FlashInfer {theirs:.2f}, ahead "
        f"in {len(behind)} of them{by}."
    )
