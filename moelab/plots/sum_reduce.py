"""The sum-reduce's speed: time by size against the floor, and who is fastest where."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from moelab.errors import counted
from moelab.plots.cells import Span, cells_of, fastest, line, span, trace
from moelab.plots.panel import Panel, Row, timing
from moelab.plots.style import grid, log_axis, look
from moelab.recordings import Recording

ORDER = ("torch", "compiled", "triton_f32", "triton", "cuda")


def speed(
    recording: Recording, copy_bytes_per_s: float, dtype: str, peers: Sequence[Row] = (), peer_source: str = ""
) -> Panel:
    """Share of the copy bandwidth by number of tokens: bytes over time, the floor being bytes over that bandwidth.

    One column per (top_k, hidden). peers: rows of data/upstream/h200_sum_reduce.json; sglang's Triton kernel is drawn
    from them.
    """
    ours = recording.select(dtype=dtype)
    cases = list(dict.fromkeys((row["top_k"], row["hidden"]) for row in ours))
    source = f"{recording.source()}, 95 % intervals; floor: bytes / {copy_bytes_per_s / 1e12:.3g} TB/s"
    source += f"<br>sglang: {peer_source}" if peers else ""
    figure = grid(f"Sum-reduce in {dtype}", source, titles=[f"top_k {k}, hidden {h}" for k, h in cases], shared_y=True)
    tokens = sorted({row["num_tokens"] for row in ours})
    floors = {(row["top_k"], row["hidden"], row["num_tokens"]): row["bytes"] / copy_bytes_per_s * 1e6 for row in ours}

    def share(row: Row) -> Span:
        us = 100 * floors[row["top_k"], row["hidden"], row["num_tokens"]]
        middle, low, high = span(row)
        return us / middle, us / high, us / low

    for col, (top_k, hidden) in enumerate(cases, start=1):
        for impl in ORDER:
            rows = sorted((r for r in ours if (r["impl"], r["top_k"], r["hidden"]) == (impl, top_k, hidden)),
                          key=lambda row: row["num_tokens"])  # fmt: skip
            line(figure, [row["num_tokens"] for row in rows], [share(row) for row in rows], impl, look(impl), row=1, col=col,
                 showlegend=col == 1 and bool(rows))  # fmt: skip
        theirs = {r["T"]: 100 * floors[top_k, hidden, r["T"]] / r["sg_triton"] for r in peers
                  if (r["dt"], r["k"], r["H"]) == (dtype, top_k, hidden) and (top_k, hidden, r["T"]) in floors}  # fmt: skip
        if theirs:
            trace(figure, theirs, "sglang’s Triton kernel", look("sglang"), hollow=True, mode="markers", legend=col == 1, row=1,
                  col=col)  # fmt: skip
    figure.add_hline(100.0, line=look("floor").line())
    figure.update_xaxes(title="tokens", **log_axis(tokens))
    best = max(share(row)[0] for row in ours)
    figure.update_yaxes(range=[0, max(110, 1.05 * best)])
    figure.update_yaxes(title="% of copy bandwidth", col=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
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
                     | {f"{impl}, µs": m.median_us for impl, m in times.items()}
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
