"""A tuning run as it goes: the best so far with its band, what is left, what failed, and who leads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moelab.plots.landscape import GEMM_NAMES
from moelab.plots.panel import Panel, Row
from moelab.plots.style import BLUE, ORANGE, Look, grid, number
from moelab.tuner.evaluate import FAILURES
from moelab.tuner.snapshot import Snapshot, Standing
from moelab.tuner.watching import Watched


def status(
    history: Sequence[Snapshot], num_tokens: int, source: str, curve: Sequence[tuple[float, Standing]] | None = None
) -> list[Panel]:
    """Two panels: the best so far of one batch size over the clock with all batch sizes in the table, and its leaders.

    history: snapshots in order, one at least. source: what is measured or replayed. num_tokens: whose curve is drawn.
    curve: that one by what is known now (`snapshot.best_until`); None: as it was believed at each moment.
    """
    now = history[-1]
    standing = now.standings[num_tokens]
    known = curve if curve is not None else [(s.progress.spent_s, s.standings[num_tokens]) for s in history]
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


LOOKS = (Look(BLUE, "circle", "solid"), Look(ORANGE, "diamond", "dash"))
"""Of a watched run, and of the one beside it."""


def watched(runs: Sequence[Watched]) -> Panel:
    """Runs that others write, one or two: the best so far of one batch size of each over the time since it began."""
    b = runs[0].num_tokens
    ends = [each.curve[-1][1].best_us if each.curve else math.inf for each in runs]
    told = " against ".join(f"{number(us, 4)} µs" if math.isfinite(us) else "nothing yet" for us in ends)
    figure = grid(
        f"Batch {b}: best so far {told}", "; ".join(dict.fromkeys(_whose(each) for each in runs)), height=360,
    )  # fmt: skip
    for each, look in zip(runs, LOOKS, strict=False):
        times = np.array([t for t, _ in each.curve], dtype=np.float32)
        values = np.array([s.best_us for _, s in each.curve], dtype=np.float32)
        figure.add_scatter(
            x=times, y=values, mode="lines+markers", name=each.name, line=look.line(2.5) | {"shape": "hv"},
            marker={"color": look.color, "size": 6, "symbol": look.symbol},
            hovertemplate="%{y:.2f} µs after %{x:.1f} s<extra>" + each.strategy + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(title="seconds since the run began, by its journal", rangemode="tozero")
    figure.update_yaxes(title="GEMM1 + GEMM2, µs")
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.25})
    rows: list[Row] = []
    for each in runs:
        pair = each.curve[-1][1].pair if each.curve else None
        rows.append({
            "run": each.name, "strategy": each.strategy, "state": each.state, "phase": each.phase or "–",
            "samples": each.samples, "after": clock(each.seconds), "failures": each.failures,
            "best so far, µs": each.curve[-1][1].best_us if each.curve else None,
            "GEMM1": pair[0].short() if pair else "–", "GEMM2": pair[1].short() if pair else "–",
        })  # fmt: skip
    states = " ".join(f"{each.name} is {each.state}{_at(each)}." for each in runs)
    drawn = figure if any(each.curve for each in runs) else None
    return Panel(
        drawn, rows, f"**{states}** {_compared(runs, ends)}A journal is only read here; who writes it decides."
    )


def _whose(each: Watched) -> str:
    shape = each.problem.shape
    return f"{shape.name}, {each.kind} on {each.problem.device}, triton {each.problem.triton_version}"


def _at(each: Watched) -> str:
    return f", in phase {each.phase}" if each.phase and each.state != "finished" else ""


def _compared(runs: Sequence[Watched], ends: Sequence[float]) -> str:
    if len(runs) < 2 or not all(map(math.isfinite, ends)):
        return ""
    first, second = (each.curve[-1][1] for each in runs)
    if first.low_us <= second.high_us and second.low_us <= first.high_us:
        apart = 100 * abs(ends[0] / ends[1] - 1)
        return f"At batch {runs[0].num_tokens} their best differ by {apart:.1f} %, within their bands: a tie. "
    ahead = runs[0] if ends[0] < ends[1] else runs[1]
    return f"At batch {runs[0].num_tokens} {ahead.name} is ahead by {100 * (max(ends) / min(ends) - 1):.1f} %. "


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
