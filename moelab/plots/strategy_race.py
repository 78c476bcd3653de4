"""Strategies raced on one landscape: regret against simulated time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from moelab.plots.panel import Panel, Row
from moelab.plots.style import BLUE, GREEN, ORANGE, PURPLE, Look, grid, hold_margins, number, powers
from moelab.tuner.regret import Point, Truth, trace
from moelab.tuner.strategies import STRATEGIES
from moelab.tuner.survey import Survey

LOOKS: Mapping[str, Look] = {
    "race": Look(BLUE, "diamond", "solid"),
    "forest": Look(GREEN, "triangle-up", "dash"),
    "random": Look(ORANGE, "circle", "dot"),
    "grid": Look(PURPLE, "square", "dashdot"),
}
SMALLEST = 1e-4
"""Regret that a log axis still shows; less is drawn there."""

FAINT = 0.75
"""Opacity of what is still to come; with thinner lines, that it can be seen on a dark page too."""

CLEAR = 0.01
"""A regret that two recorded runs do not agree to, so that it says something."""

FRAMES = 40
"""Moments on the clock that a slider can stop at."""

EVERY = 20
"""Requests between two looks at what a search would choose."""


@dataclass(frozen=True)
class Traces:
    """What each strategy would choose at each moment: strategy -> one list of points a seed."""

    batch_sizes: tuple[int, ...]
    source: str
    runs: Mapping[str, Sequence[Sequence[Point]]]

    @cached_property
    def values(self) -> Mapping[str, Mapping[str, np.ndarray]]:
        """ "median" and "worst" -> strategy -> regret by seed and frame, at least SMALLEST; infinite before there is a choice."""
        times = self.frames()
        return {
            which: {
                name: np.array([[max(at(run, t, which), SMALLEST) for t in times] for run in runs])
                for name, runs in self.runs.items()
            }
            for which in ("median", "worst")
        }

    def range(self, which: str) -> tuple[float, float]:
        """The whole powers of ten that hold every finite regret, whatever the moment."""
        every = np.concatenate([each.ravel() for each in self.values[which].values()])
        known = np.log10(every[np.isfinite(every)]) if np.isfinite(every).any() else np.array([0.0])
        return 10 ** float(np.floor(known.min())), 10 ** max(
            float(np.ceil(known.max())), float(np.floor(known.min())) + 1
        )

    def frames(self) -> list[float]:
        """Simulated seconds to stop at, evenly spaced on a log axis, from the first choice to the last end."""
        points = [p for runs in self.runs.values() for run in runs for p in run]
        first = min((p.seconds for p in points if math.isfinite(p.worst)), default=1.0)
        last = max(p.seconds for p in points)
        return [float(s) for s in np.geomspace(first * 0.9, last, FRAMES)]


def run_all(survey: Survey, seeds: Sequence[int], strategies: Sequence[str] = tuple(STRATEGIES)) -> Traces:
    """Replay each strategy with each seed, at batch sizes where nearly the whole grid was measured.

    What the landscape lacks counts as a failed measurement: a search sees it as "unrecorded" and goes on without it.
    """
    truth = Truth(survey.table, replace(survey.problem, batch_sizes=survey.well_covered))
    runs = {name: [trace(truth, name, seed, every=EVERY) for seed in seeds] for name in strategies}
    return Traces(survey.well_covered, survey.landscape.source(), runs)


def at(run: Sequence[Point], seconds: float, which: str) -> float:
    """The regret of what a run would choose at that moment; infinite before it has a choice."""
    known = [getattr(p, which) for p in run if p.seconds <= seconds]
    return float(known[-1]) if known else math.inf


def standing(traces: Traces, budget_s: float, which: str = "median") -> Panel:
    """Regret by strategy up to budget_s: the median of the seeds, their range shaded, and the rest of the clock faint.

    which: "median" or "worst" over the batch sizes.
    """
    times = np.array(traces.frames())
    seeds = len(next(iter(traces.runs.values())))
    figure = grid(
        f"Stopped after {number(budget_s)} simulated seconds: {leaders(traces, budget_s, which)}",
        f"replayed; {traces.source}; line: median of {seeds} seeds, shaded: their range; faint: the rest of the clock",
        height=460,
    )
    for name, values in traces.values[which].items():
        middle, style = np.median(values, axis=0), LOOKS[name]
        _band(figure, times, values, times <= budget_s, style)
        drawn = np.isfinite(middle[times <= budget_s]).any()
        for part, opacity in ((times <= budget_s, 1.0), (times >= budget_s, FAINT)):
            known = part & np.isfinite(middle)
            figure.add_scatter(
                x=times[known].astype(np.float32), y=100 * middle[known].astype(np.float32), mode="lines", name=name,
                line=style.line(3 if opacity == 1 else 1.5) | {"shape": "hv"}, opacity=opacity, legendgroup=name,
                showlegend=bool((opacity == 1) == drawn), hovertemplate=f"{name}: %{{y:.2f}} % after %{{x:.1f}} s<extra></extra>",
            )  # fmt: skip
    figure.add_vline(x=budget_s, line={"color": "#7b7b7b", "width": 1})
    low, high = float(times[0]) * 0.95, float(times[-1]) * 1.05
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if low <= t <= high]
    seconds_axis = {"type": "log", "range": [math.log10(low), math.log10(high)], "tickvals": ticks}
    figure.update_xaxes(title="simulated seconds (compiling on 15 processes, measuring on one GPU)", **seconds_axis)
    low, high = (100 * end for end in traces.range(which))
    figure.update_yaxes(title=f"{which} regret over {len(traces.batch_sizes)} batches, %", **powers(low, high))
    hold_margins(figure)
    table = _table(traces, budget_s)
    finished = ", ".join(row["strategy"] for row in table if row["finished after, s"] <= budget_s) or "none"
    said = (
        f"**After {number(budget_s)} s: {leaders(traces, budget_s, 'median')} in the median batch size; finished: {finished}.** "
        "Regret is of the sum of both GEMMs, against the best recorded pair of configs; the finals decide by whole layers, so a "
        f"curve can rise at its end. {_weaker(traces)}Differences well under 1 %, to which two recorded runs agree, are no "
        "ranking."
    )
    return Panel(figure, table, said)


def _weaker(traces: Traces) -> str:
    """By how much the sum of GEMMs and whole layers disagree, where one who measured everything ends off; or nothing."""
    ends = [run[-1].worst for run in traces.runs.get("grid", ())]
    off = float(np.median(ends)) if ends else 0.0
    if not CLEAR < off < math.inf:
        return ""
    return (
        f"In its worst batch size even grid, which measured every config, ends at {_percent(off)}: the layers that were timed "
        "side by side there chose another pair than the sum of short looks at each GEMM, and of the two that sum is the weaker. "
    )


def _band(figure, times: np.ndarray, values: np.ndarray, part: np.ndarray, style: Look) -> None:  # type: ignore[no-untyped-def]
    known = part & np.isfinite(values).all(axis=0)
    if not known.any():
        return
    low, high = 100 * values.min(axis=0)[known], 100 * values.max(axis=0)[known]
    x = times[known]
    figure.add_scatter(
        x=np.concatenate([x, x[::-1]]).astype(np.float32), y=np.concatenate([high, low[::-1]]).astype(np.float32),
        fill="toself", fillcolor=style.color, opacity=0.15, line={"width": 0}, mode="lines", showlegend=False,
        hoverinfo="skip",
    )  # fmt: skip


def leaders(traces: Traces, budget_s: float, which: str) -> str:
    """Whose choice is best at that moment, in the median of the seeds."""
    now = {name: float(np.median([at(run, budget_s, which) for run in runs])) for name, runs in traces.runs.items()}
    best = min(now.values())
    if not math.isfinite(best):
        return "nobody has a choice yet"
    return f"{' and '.join(name for name, value in now.items() if value == best)} ahead at {100 * best:.2f} %"


def _table(traces: Traces, budget_s: float) -> list[Row]:
    rows: list[Row] = []
    for name, runs in traces.runs.items():

        def middle(value: Callable[[Sequence[Point]], float], runs: Sequence[Sequence[Point]] = runs) -> float:
            return float(np.median([value(run) for run in runs]))

        rows.append({
            "strategy": name, "regret now, median batch": _percent(middle(lambda run: at(run, budget_s, "median"))),
            "worst batch": _percent(middle(lambda run: at(run, budget_s, "worst"))),
            "finished after, s": middle(lambda run: run[-1].seconds), "samples in all": int(middle(lambda run: run[-1].samples)),
            "final regret, median batch": _percent(middle(lambda run: run[-1].median)),
            "final, worst batch": _percent(middle(lambda run: run[-1].worst)),
        })  # fmt: skip
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %" if math.isfinite(share) else "no choice yet"
