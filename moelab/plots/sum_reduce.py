"""The sum-reduce's speed: time by size against the floor, and who is fastest where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moelab.plots.panel import Panel, Row, timing
from moelab.plots.style import error_bars, grid, log_axis, look, powers
from moelab.recordings import Recording

ORDER = ("torch", "compiled", "triton_f32", "triton", "cuda")


def _cases(recording: Recording, dtype: str) -> list[tuple[int, int]]:
    return list(dict.fromkeys((row["top_k"], row["hidden"]) for row in recording.select(dtype=dtype)))


def speed(
    recording: Recording, copy_bytes_per_s: float, dtype: str, peers: Sequence[Row] = (), peer_source: str = ""
) -> Panel:
    """Time by number of tokens, one plot per (top_k, hidden), with the floor: bytes over the copy bandwidth.

    peers: rows of data/upstream/h200_sum_reduce.json; sglang's Triton kernel is drawn from them.
    """
    cases = _cases(recording, dtype)
    source = f"{recording.source()}, 95 % intervals; floor: bytes / {copy_bytes_per_s / 1e12:.3g} TB/s"
    source += f"<br>sglang: {peer_source}" if peers else ""
    titles = [f"top_k {k}, hidden {h}" for k, h in cases]
    figure = grid(f"Sum-reduce in {dtype}", source, titles=titles, shared_y=True, height=500)
    tokens = sorted({row["num_tokens"] for row in recording.select(dtype=dtype)})
    for col, (top_k, hidden) in enumerate(cases, start=1):
        place = {"row": 1, "col": col}
        mine = recording.select(dtype=dtype, top_k=top_k, hidden=hidden)
        for impl in ORDER:
            rows = sorted((r for r in mine if r["impl"] == impl), key=lambda r: r["num_tokens"])
            middle = [timing(r).median_us for r in rows]
            bars = error_bars(
                middle, [timing(r).interval_us[0] for r in rows], [timing(r).interval_us[1] for r in rows]
            )
            figure.add_scatter(x=[r["num_tokens"] for r in rows], y=middle, error_y=bars, name=impl, mode="lines+markers",
                               line=look(impl).line(1.5), marker=look(impl).marker(7), legendgroup=impl,
                               showlegend=col == 1, **place)  # fmt: skip
        theirs = [r for r in peers if (r["dt"], r["k"], r["H"]) == (dtype, top_k, hidden) and r["T"] in tokens]
        if theirs:
            figure.add_scatter(x=[r["T"] for r in theirs], y=[r["sg_triton"] for r in theirs], name="sglang’s Triton kernel",
                               mode="markers", marker=look("sglang").marker(11, hollow=True), legendgroup="sglang",
                               showlegend=col == 1, **place)  # fmt: skip
        floor = {r["num_tokens"]: r["bytes"] / copy_bytes_per_s * 1e6 for r in mine}
        figure.add_scatter(x=sorted(floor), y=[floor[t] for t in sorted(floor)], name="floor", mode="lines",
                           line=look("floor").line(), legendgroup="floor", showlegend=col == 1, **place)  # fmt: skip
    figure.update_xaxes(title="tokens", **log_axis(tokens), tickangle=-45)
    medians = [timing(row).median_us for row in recording.select(dtype=dtype)]
    least = min(row["bytes"] for row in recording.select(dtype=dtype)) / copy_bytes_per_s * 1e6
    figure.update_yaxes(**powers(least / 1.5, max(medians) * 1.5))
    figure.update_yaxes(title="µs per call", col=1)
    return Panel(figure, _shares(recording, copy_bytes_per_s, dtype), _verdict(recording, copy_bytes_per_s, dtype))


def _sizes(recording: Recording, dtype: str) -> list[tuple[tuple[int, int, int], dict[str, Any]]]:
    """((tokens, top_k, hidden), impl -> row), smallest first."""
    found: dict[tuple[int, int, int], dict[str, Any]] = {}
    for row in recording.select(dtype=dtype):
        found.setdefault((row["num_tokens"], row["top_k"], row["hidden"]), {})[row["impl"]] = row
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


def fastest(times: dict[str, Any]) -> list[str]:
    """The implementation with the smallest median, then those that tie with it (95 % intervals overlap)."""
    from moelab.measure import tie

    best = min(times, key=lambda impl: times[impl].median_us)
    return [best, *(impl for impl in times if impl != best and tie(times[best], times[impl]))]


def _verdict(recording: Recording, copy_bytes_per_s: float, dtype: str) -> str:
    table = _shares(recording, copy_bytes_per_s, dtype)
    wins = {impl: sum(impl in row["fastest"].split(" = ") for row in table) for impl in ORDER}
    said = ", ".join(f"{impl} {count}" for impl, count in wins.items() if count)
    last = table[-1]
    shares = {impl: last[f"{impl}, % of copy"] / 100 for impl in ORDER if f"{impl}, % of copy" in last}
    best = max(shares, key=lambda impl: shares[impl])
    return (
        f"**Fastest, ties included, of {len(table)} sizes: {said}.** {_crossover(recording, dtype)} At the largest size "
        f"({last['MB']:.0f} MB) {best} reaches {shares[best]:.0%} of the copy bandwidth, "
        + ", ".join(f"{impl} {share:.0%}" for impl, share in shares.items() if impl != best)
        + "."
    )


def _crossover(recording: Recording, dtype: str) -> str:
    """Where cuda and triton change places, by bytes moved; a tie changes nothing."""
    from moelab.measure import tie

    turns, leader = [], None
    for (tokens, top_k, hidden), rows in _sizes(recording, dtype):
        if not {"cuda", "triton"} <= rows.keys():
            return "The recording does not hold both cuda and triton."
        times = {impl: timing(rows[impl]) for impl in ("cuda", "triton")}
        if tie(times["cuda"], times["triton"]):
            continue
        ahead = min(times, key=lambda impl: times[impl].median_us)
        if leader and ahead != leader:
            turns.append(f"{ahead} from {tokens} × {top_k} × {hidden}")
        leader = leader or ahead
        leader = ahead
    if leader is None:
        return "cuda and triton tie at every size."
    if not turns:
        return f"Between cuda and triton there is no crossover: where they do not tie, {leader} is ahead."
    first = turns[0] if len(turns) == 1 else f"{len(turns)} times, first to {turns[0]}, last to {turns[-1]}"
    return f"Between cuda and triton the lead changes, going up in bytes: {first}."
