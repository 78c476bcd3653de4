"""The sum-reduce's speed: time by size against the floor, and who is fastest where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from moelab.errors import counted
from moelab.plots.cells import cells_of, fastest, line, span, trace
from moelab.plots.panel import Panel, Row, timing
from moelab.plots.style import grid, log_axis, look, powers
from moelab.recordings import Recording

ORDER = ("torch", "compiled", "triton_f32", "triton", "cuda")


def speed(
    recording: Recording, copy_bytes_per_s: float, dtype: str, peers: Sequence[Row] = (), peer_source: str = ""
) -> Panel:
    """Above, time by number of tokens with the floor (bytes over the copy bandwidth); below, share of that bandwidth.

    One column per (top_k, hidden). peers: rows of data/upstream/h200_sum_reduce.json; sglang's Triton kernel is drawn
    from them.
    """
    ours = recording.select(dtype=dtype)
    cases = list(dict.fromkeys((row["top_k"], row["hidden"]) for row in ours))
    source = f"{recording.source()}, 95 % intervals; floor: bytes / {copy_bytes_per_s / 1e12:.3g} TB/s"
    source += f"<br>sglang: {peer_source}" if peers else ""
    titles = [f"top_k {k}, hidden {h}" for k, h in cases]
    figure = grid(
        f"Sum-reduce in {dtype}", source, titles=[*titles, *[""] * len(titles)], rows=2, shared_y=True, height=740
    )
    tokens = sorted({row["num_tokens"] for row in ours})
    for col, (top_k, hidden) in enumerate(cases, start=1):
        mine = [row for row in ours if (row["top_k"], row["hidden"]) == (top_k, hidden)]
        floor = {row["num_tokens"]: row["bytes"] / copy_bytes_per_s * 1e6 for row in mine}
        for impl in ORDER:
            _implementation(figure, col, impl, [row for row in mine if row["impl"] == impl], floor)
        theirs = {
            row["T"]: row["sg_triton"] for row in peers if (row["dt"], row["k"], row["H"]) == (dtype, top_k, hidden)
        }
        _peer(figure, col, {t: us for t, us in theirs.items() if t in floor}, floor)
        points = {t: floor[t] for t in sorted(floor)}
        trace(figure, points, "floor", look("floor"), mode="lines", legend=col == 1, row=1, col=col)
    figure.add_hline(100.0, line=look("floor").line(), row=2)
    figure.update_xaxes(**log_axis(tokens), tickangle=-45)
    figure.update_xaxes(title="tokens", row=2)
    least, longest = min(row["bytes"] for row in ours) / copy_bytes_per_s * 1e6, max(max(r["samples_us"]) for r in ours)
    figure.update_yaxes(**powers(least / 1.5, longest * 1.5), row=1)
    best = max(row["bytes"] / copy_bytes_per_s * 1e8 / timing(row).median_us for row in ours)
    figure.update_yaxes(range=[0, max(110, 1.05 * best)], row=2)
    figure.update_yaxes(title="µs per call", row=1, col=1)
    figure.update_yaxes(title="% of copy bandwidth", row=2, col=1)
    table = _shares(recording, copy_bytes_per_s, dtype)
    wins = {impl: sum(impl in row["fastest"].split(" = ") for row in table) for impl in ORDER}
    said = ", ".join(f"{impl} {count}" for impl, count in wins.items() if count)
    last = table[-1]
    shares = ", ".join(f"{impl} {last[key]:.0f}%" for impl in ORDER if (key := f"{impl}, % of copy") in last)
    leads = _leads(recording, dtype, ("triton", "cuda", "triton_f32"))
    lost = [size for size, first in leads.items() if first == ["triton_f32"]]
    where = f"{len(lost)} of {len(leads)} sizes" + (f" ({', '.join(lost)})" if lost else "")
    return Panel(figure, table, (
        f"**Fastest, ties included, of {len(table)} sizes: {said}.** {_turns(recording, dtype)} Both triton and cuda are slower "
        f"than triton_f32, upstream’s launch in the same run, at {where}. Of the copy bandwidth at {last['MB']:.0f} MB: {shares} "
        "(over 100 %: a sum mostly reads, a copy writes as much)."
    ))  # fmt: skip


def _implementation(figure: go.Figure, col: int, impl: str, rows: Sequence[Row], floor: Mapping[int, float]) -> None:
    """One implementation's line in both plots of a column, with its 95 % intervals."""
    rows = sorted(rows, key=lambda row: row["num_tokens"])
    spans = [span(row) for row in rows]
    us = [100 * floor[row["num_tokens"]] for row in rows]
    shares = [(u / middle, u / high, u / low) for u, (middle, low, high) in zip(us, spans, strict=True)]
    for at, values in ((1, spans), (2, shares)):
        line(figure, [row["num_tokens"] for row in rows], values, impl, look(impl), row=at, col=col,
             showlegend=(at, col) == (1, 1) and bool(rows))  # fmt: skip


def _peer(figure: go.Figure, col: int, theirs: Mapping[int, float], floor: Mapping[int, float]) -> None:
    share = {tokens: 100 * floor[tokens] / us for tokens, us in theirs.items()}
    for at, values in ((1, theirs), (2, share)):
        if values:
            trace(figure, values, "sglang’s Triton kernel", look("sglang"), hollow=True, mode="markers",
                  legend=(at, col) == (1, 1), row=at, col=col)  # fmt: skip


def _sizes(recording: Recording, dtype: str) -> list[tuple[tuple[int, int, int], dict[str, Any]]]:
    """((tokens, top_k, hidden), impl -> row), smallest first."""
    found = cells_of(recording.select(dtype=dtype), "num_tokens", "top_k", "hidden")
    return sorted(found.items(), key=lambda item: next(iter(item[1].values()))["bytes"])


def _shares(recording: Recording, copy_bytes_per_s: float, dtype: str) -> list[dict[str, Any]]:
    """Per size: MB moved, each implementation's share of the copy bandwidth, the fastest, and what ties with it."""
    table = []
    for (tokens, top_k, hidden), rows in _sizes(recording, dtype):
        times = {impl: timing(rows[impl]) for impl in ORDER if impl in rows}
        moved = next(iter(rows.values()))["bytes"]
        shares = {impl: moved / copy_bytes_per_s * 1e6 / m.median_us for impl, m in times.items()}
        table.append({"tokens × top_k × hidden": f"{tokens} × {top_k} × {hidden}", "MB": moved / 1e6}
                     | {f"{impl}, % of copy": 100 * share for impl, share in shares.items()}
                     | {"fastest": " = ".join(fastest(times))})  # fmt: skip
    return table


def _leads(recording: Recording, dtype: str, impls: Sequence[str]) -> dict[str, list[str]]:
    """Size -> the fastest among impls and who ties with it, where all of them are recorded, going up in bytes."""
    return {
        f"{tokens} × {top_k} × {hidden}": fastest({impl: timing(rows[impl]) for impl in impls})
        for (tokens, top_k, hidden), rows in _sizes(recording, dtype) if {*impls} <= rows.keys()
    }  # fmt: skip


def _turns(recording: Recording, dtype: str) -> str:
    """Where cuda and triton change places, by bytes moved; a tie changes nothing."""
    leads = [
        (size, first[0]) for size, first in _leads(recording, dtype, ("cuda", "triton")).items() if len(first) == 1
    ]
    turns = [f"{name} from {size}" for (_, before), (size, name) in pairwise(leads) if name != before]
    return (
        f"The lead between cuda and triton turns {counted(len(turns), 'time')}{': ' * bool(turns)}{', '.join(turns)}."
    )
