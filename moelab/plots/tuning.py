"""A tuning run as it goes: the best so far with its band, what is left, what failed, and who leads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moelab.plots.landscape import GEMM_NAMES
from moelab.plots.panel import Panel, Row
from moelab.plots.style import BLUE, grid, number
from moelab.tuner.evaluate import FAILURES
from moelab.tuner.snapshot import Snapshot


def status(history: Sequence[Snapshot], num_tokens: int, source: str) -> list[Panel]:
    """Two panels: the best so far of one batch size over the clock with all batch sizes in the table, and its leaders.

    history: snapshots in order, one at least. source: what is measured or replayed. num_tokens: whose curve is drawn.
    """
    now = history[-1]
    standing = now.standings[num_tokens]
    known = [(s.progress.spent_s, s.standings[num_tokens]) for s in history]
    known = [(t, each) for t, each in known if math.isfinite(each.best_us)]
    best = f"best so far {number(standing.best_us, 4)} µs"
    figure = grid(f"Batch {num_tokens}: {best} ({now.progress.state})", source, height=360)
    if known:
        times = np.array([t for t, _ in known], dtype=np.float32)
        low, middle, high = (
            np.array([getattr(each, name) for _, each in known], dtype=np.float32)
            for name in ("low_us", "best_us", "high_us")
        )
        figure.add_scatter(
            x=np.concatenate([times, times[::-1]]), y=np.concatenate([high, low[::-1]]), fill="toself", fillcolor=BLUE,
            opacity=0.2, line={"width": 0}, mode="lines", hoverinfo="skip", name="band",
        )  # fmt: skip
        figure.add_scatter(
            x=times, y=middle, mode="lines+markers", name="best so far", line={"color": BLUE, "shape": "hv"},
            marker={"color": BLUE, "size": 5}, hovertemplate="%{y:.2f} µs after %{x:.1f} s<extra></extra>",
        )  # fmt: skip
        figure.update_layout(legend={"orientation": "h", "y": 1.14, "x": 1, "xanchor": "right"})
    figure.update_xaxes(title="seconds on the run's clock", rangemode="tozero")
    figure.update_yaxes(title="GEMM1 + GEMM2, µs")
    drawn = figure if known else None  # an empty one would only push the sentence off the screen
    batches = [
        {"batch": b, "best so far, µs": s.best_us if s.pair else None,
         "band": f"{number(s.low_us, 4)} … {number(s.high_us, 4)}" if s.pair else "–",
         "GEMM1": s.pair[0].short() if s.pair else "–", "GEMM2": s.pair[1].short() if s.pair else "–"}
        for b, s in now.standings.items()
    ]  # fmt: skip
    return [Panel(drawn, batches, _sentence(now, source)), _leaders(now, num_tokens)]


def in_a_line(now: Snapshot, num_tokens: int) -> str:
    """Where the run stands, short enough to stay in sight; empty before there is one."""
    p = now.progress
    if p.state == "new" and not p.phase:
        return ""
    best = now.standings[num_tokens].best_us
    known = f"; batch {num_tokens}: best so far {number(best, 4)} µs" if math.isfinite(best) else ""
    left = f", about {clock(p.eta_s)} to go" if p.eta_s is not None else ""
    return f"{p.state}: {p.phase or 'begins'}, {p.done} of {p.total} samples, {clock(p.spent_s)} spent{left}{known}"


def _sentence(now: Snapshot, source: str) -> str:
    p = now.progress
    if p.state == "new":
        return f"**Ready: {source}.** Press Start, or choose a run and take it up again."
    left = f", about {clock(p.eta_s)} to go" if p.eta_s is not None else ""
    phase = f"phase {p.phase}, {p.done} of {p.total} samples" if p.phase else "no phase yet"
    failed = ", ".join(f"{count} {name} ({FAILURES[name]})" for name, count in p.failures.items())
    return (
        f"**{p.state}: {phase}, {clock(p.spent_s)} spent{left}.** Failures: {failed or 'none'}. The band is the sum of the "
        f"two GEMMs' 95 % intervals. {source[:1].upper()}{source[1:]}.{' The winners are below.' * (p.state == 'finished')}"
    )


def clock(seconds: float) -> str:
    """Minutes and seconds, "1:05"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _leaders(now: Snapshot, num_tokens: int) -> Panel:
    leaders = now.standings[num_tokens].leaders
    rows: list[Row] = [
        {
            "GEMM": GEMM_NAMES[each.gemm],
            "config": each.config.short(),
            "µs": each.median_us,
            "95 % interval": f"{number(each.low_us, 4)} … {number(each.high_us, 4)}",
            "samples": each.samples,
        }
        for each in leaders
    ]
    what = "Finalists" if now.progress.phase in ("finalists", "layers") else "Leaders so far"
    return Panel(None, rows, f"**{what} at batch {num_tokens}**, the best of each GEMM:" if rows else "")
