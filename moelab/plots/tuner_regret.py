"""The recording tuner_regret drawn: what each strategy would choose, by the samples or the seconds it has spent."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from moelab.plots.panel import Panel, Row
from moelab.plots.strategy_race import LOOKS, SMALLEST
from moelab.plots.style import grid, number, powers, round_ticks
from moelab.recordings import Recording

AXES = {
    "samples": "samples taken, finals included",
    "seconds": "simulated seconds (compiling on {} processes, measuring on one GPU)",
}
Which = Literal["median", "worst"]


def curves(recording: Recording, axis: str = "samples", which: Which = "worst") -> Panel:
    """Regret by strategy, a plot for each landscape: line at the median of the seeds, 80 % of them shaded.

    axis: "samples" or "seconds"; which: over the batch sizes, "median" or "worst".
    """
    names = list(dict.fromkeys(row["landscape"] for row in recording.rows))
    protocol = recording.protocol
    figure = grid(
        f"{which.capitalize()} regret over {_sizes(protocol)} batch sizes, by {axis}: {_short(recording)}",
        f"replayed; {recording.source()}; line: median of {protocol['seeds']} seeds, shaded: 80 % of them",
        titles=names, shared_y=True, height=460,
    )  # fmt: skip
    for column, name in enumerate(names, 1):
        for strategy in _strategies(recording):
            rows = recording.select(kind="curve", landscape=name, strategy=strategy, axis=axis)
            _draw(figure, rows, which, strategy, column)
    reached = [row["at"] for row in recording.select(kind="curve", axis=axis) if row[which][1] is not None]
    if reached:
        figure.update_xaxes(**round_ticks(min(reached) / 1.1, max(reached) * 1.1))
    figure.update_xaxes(title=AXES[axis].format(protocol["compile_processes"]))
    figure.update_yaxes(**powers(100 * SMALLEST, 100))
    figure.update_yaxes(title=f"{which} regret, %", col=1)
    table = _table(recording)
    everything = next((row["samples"] for row in table if row["strategy"] == "grid"), None)
    each = []
    for row in table:
        share = f", {100 * row['samples'] / everything:.1f} % of the grid’s" if everything else ""
        other = f"; by other runs {row['worst by other runs, %']:.2f} %" if "worst by other runs, %" in row else ""
        each.append(f"{row['strategy']} {row['worst batch, %']:.2f} %{other} ({row['samples']:,.0f} samples{share})")
    said = (
        f"**Regret at the worst batch size: {'; '.join(each)}.** Medians over {number(recording.protocol['seeds'])} seeds and "
        "the landscapes; of the sum of both GEMMs, where the finals decide by whole layers, so that the whole grid reaches no 0."
        + _ran(recording)
    )
    return Panel(figure, table, said)


def _draw(figure: Any, rows: list[Row], which: Which, strategy: str, column: int) -> None:
    """A line where the median seed has a choice, markers at its ends, and a band where 90 % of the seeds have one."""
    style, place = LOOKS[strategy], {"row": 1, "col": column}
    known = [row for row in rows if row[which][1] is not None]
    whole = [row for row in known if row[which][2] is not None]
    if whole:
        x = [row["at"] for row in whole]
        low, high = ([max(100 * row[which][i], 100 * SMALLEST) for row in whole] for i in (0, 2))
        figure.add_scatter(
            x=x + x[::-1], y=high + low[::-1], fill="toself", fillcolor=style.color, opacity=0.15, line={"width": 0},
            mode="lines", showlegend=False, hoverinfo="skip", **place,
        )  # fmt: skip
    sizes = [8 * (i in (0, len(known) - 1)) for i in range(len(known))]
    figure.add_scatter(
        x=[row["at"] for row in known], y=[max(100 * row[which][1], 100 * SMALLEST) for row in known], mode="lines+markers",
        marker={"symbol": style.symbol, "color": style.color, "size": sizes},
        name=strategy, legendgroup=strategy, showlegend=column == 1, line=style.line(2.5) | {"shape": "hv"},
        hovertemplate=f"{strategy}: %{{y:.2f}} % after %{{x:.3s}}<extra></extra>", **place,
    )  # fmt: skip


BUDGETS_S = (10, 20, 30, 60, 120, 300)
EVEN = 0.001
"""Regrets that are closer are no ranking: two recorded runs of a layer agree to some tenths of a per cent."""


def budgets(recording: Recording) -> Panel:
    """Which strategy for which budget: the regret at the worst batch size of what each would choose after so many seconds, the
    median of the seeds on the landscape where it is larger."""
    names, strategies = list(dict.fromkeys(row["landscape"] for row in recording.rows)), _strategies(recording)
    rows: list[Row] = []
    for seconds in BUDGETS_S:
        now = {s: max(_regret_at(recording, name, s, seconds) for name in names) for s in strategies}
        least = min(now.values())
        take = [s for s, regret in now.items() if regret <= least + EVEN] if math.isfinite(least) else []
        shown = {s: f"{100 * regret:.2f} %" if math.isfinite(regret) else "no choice yet" for s, regret in now.items()}
        rows.append({"budget, s": seconds, "take": " or ".join(take) or "none", **shown})
    ends = {s: max(_middle(recording, name, s, "seconds") for name in names) for s in strategies}
    sure = {s: max(_surest(recording, name, s) for name in names) for s in strategies}
    done = ", ".join(f"{s} {seconds:.0f} s" for s, seconds in sorted(ends.items(), key=lambda item: item[1]))
    said = (
        f"**Forest while there is no time for a race, race from then on.** For {_sizes(recording.protocol)} batch sizes a "
        f"search takes: {done} (simulated; more batch sizes take more). Race is the default because it is surer than what is "
        f"quicker: in nine of ten searches it loses at most {sure['race']:.2f} % at the worst batch size of either layer, forest "
        f"{sure['forest']:.2f} %, random {sure['random']:.2f} %; and it needs no scikit-learn. Grid measures everything "
        f"({sure['grid']:.2f} %): it is for recording a landscape. The table is the regret at the worst batch size."
    )
    return Panel(None, rows, said)


def advice(recording: Recording) -> str:
    """Which strategy for which budget, in a line."""
    names = list(dict.fromkeys(row["landscape"] for row in recording.rows))
    race, forest = (max(_middle(recording, name, s, "seconds") for name in names) for s in ("race", "forest"))
    sure, quick = (max(_surest(recording, name, s) for name in names) for s in ("race", "forest"))
    return (
        f"By the strategy race where its {race:.0f} s are there ({_sizes(recording.protocol)} batch sizes, replayed), by forest "
        f"under that ({forest:.0f} s): nine of ten searches stay within {sure:.1f} % and {quick:.1f} % at the worst batch size."
    )


def _regret_at(recording: Recording, landscape: str, strategy: str, seconds: float) -> float:
    """The median seed's regret at the worst batch size after so many seconds; infinite before it has a choice."""
    rows = recording.select(kind="curve", landscape=landscape, strategy=strategy, axis="seconds")
    known = [row["worst"][1] for row in rows if row["at"] <= seconds]
    return float(known[-1]) if known and known[-1] is not None else math.inf


def _surest(recording: Recording, landscape: str, strategy: str) -> float:
    """What nine of ten searches stay within at the worst batch size, per cent."""
    rows = recording.select(kind="end", landscape=landscape, strategy=strategy)
    return 100 * float(np.quantile([row["worst"] for row in rows], 0.9))


def _middle(recording: Recording, landscape: str, strategy: str, field: str) -> float:
    rows = recording.select(kind="end", landscape=landscape, strategy=strategy)
    return statistics.median(row[field] for row in rows)


def _sizes(protocol: Mapping[str, Any]) -> str:
    """How many batch sizes the landscapes have: one number, or from the fewest to the most."""
    counts = sorted({len(sizes) for sizes in protocol["batch_sizes"].values()})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _strategies(recording: Recording) -> list[str]:
    return [name for name in LOOKS if recording.select(kind="end", strategy=name)]


def _ends(recording: Recording, strategy: str, field: str) -> list[float]:
    return [row[field] for row in recording.select(kind="end", strategy=strategy) if row.get(field) is not None]


def _table(recording: Recording) -> list[Row]:
    """A row per strategy, medians over seeds and landscapes, regret in per cent."""
    rows: list[Row] = []
    for strategy in _strategies(recording):

        def middle(field: str, scale: float = 1.0, strategy: str = strategy) -> float | None:
            found = _ends(recording, strategy, field)
            return scale * statistics.median(found) if found else None

        row = {"strategy": strategy, "searches": len(_ends(recording, strategy, "samples")), "samples": middle("samples"),
               "simulated s": middle("seconds"), "median batch, %": middle("median", 100), "worst batch, %": middle("worst", 100),
               "in 9 of 10": 100 * float(np.quantile(_ends(recording, strategy, "worst"), 0.9))}  # fmt: skip
        if _ends(recording, strategy, "other_worst"):
            row |= {"median batch by other runs, %": middle("other_median", 100),
                    "worst by other runs, %": middle("other_worst", 100)}  # fmt: skip
        rows.append(row)
    return rows


def _short(recording: Recording) -> str:
    """The cheapest strategy that stays within 2 % at the worst batch size in nine of ten searches."""
    good = [name for name in _strategies(recording) if np.quantile(_ends(recording, name, "worst"), 0.9) <= 0.02]
    if not good:
        return "none within 2 % at the worst batch size"
    first = min(good, key=lambda name: statistics.median(_ends(recording, name, "samples")))
    return f"{first} stays within 2 % on the fewest samples"


def _ran(recording: Recording) -> str:
    """What the searches that really ran lose, by the whole grid measured apart from them; empty where none is judged."""
    rows = [row for row in recording.select(kind="run") if row["regret"] is not None]
    if not rows:
        return ""
    worst = max(rows, key=lambda row: row["regret"])
    return (
        f" Races that ran on a GPU, judged by the whole grid measured apart: {len(rows)} winners lose "
        f"{100 * statistics.median(row['regret'] for row in rows):.2f} % in the median and {100 * worst['regret']:.2f} % at "
        f"worst ({worst['run']}, {worst['num_tokens']} tokens)."
    )
