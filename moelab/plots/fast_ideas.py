"""What each idea of the fastest layer is worth: its time with the idea switched off alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moelab.plots import ratio_map
from moelab.plots.cells import IDEAS, cells_of, conclude, names_of, timed, verdict
from moelab.plots.fast_layer import NOTHING, runs_of
from moelab.plots.panel import Panel, Row, geometric_mean, timing
from moelab.plots.style import BETTER, WORSE, number
from moelab.recordings import Recording

WITHOUT = "fast without "
SMALL = 0.01
"""A mean so near to 1 is worth nothing, whatever its shapes agree on."""


def ablation(recording: Recording) -> Panel:
    """Map of idea by batch: the layer's time with the idea switched off over its time with it, geometric mean over shapes.

    Grey, worth nothing: within SMALL of 1, or not more than half of the shapes agree beyond their 95 % intervals.
    """
    single = _single(recording)
    if not single:
        return Panel(None, [], NOTHING)
    means = _means(single)
    ideas = sorted(names_of(single, "idea"), key=lambda idea: -max(c.ratio for (i, _), c in means.items() if i == idea))
    batches = sorted(names_of(single, "num_tokens"))
    figure = ratio_map.chart(
        f"What each idea is worth: {_short(means, ideas)}",
        f"{recording.source()}; time without the idea over time with it, geometric mean over shapes, uniform routing<br>"
        f"green: it helps; orange: it costs; grey: under {100 * SMALL:g} %, or most shapes do not agree beyond 95 % intervals<br>"
        "in brackets: how many shapes use it, where not all do",
        means, ideas, batches, tall=36, low=WORSE, high=BETTER, bar="without / with",
    )  # fmt: skip
    lines = cells_of(sorted(single, key=lambda row: ideas.index(row["idea"])), "idea", "shape", by="num_tokens")
    table = [{"without": idea, "shape": shape} | {str(b): line[b]["ratio"] if b in line else None for b in batches}
             for (idea, shape), line in lines.items()]  # fmt: skip
    return Panel(figure, table, _said(means, ideas, single))


def _single(recording: Recording) -> list[dict[str, Any]]:
    """One row per idea, shape and batch: the ratio, and whether the layer with it is faster, slower or ties (uniform routing)."""
    found = []
    rows = [row for row in timed(recording) if row["routing"] == "uniform" and row.get("within_bound")]
    for (shape, batch), cell in cells_of(rows).items():
        for impl, row in cell.items():
            if impl.startswith(WITHOUT) and "fast" in cell:
                off, on, idea = timing(row), timing(cell["fast"]), impl.removeprefix(WITHOUT)
                found.append({"idea": IDEAS.get(idea, idea), "shape": shape, "num_tokens": batch,
                              "ratio": off.median_us / on.median_us, "verdict": verdict(on, off)})  # fmt: skip
    return found


def _means(single: Sequence[Row]) -> dict[tuple[str, int], ratio_map.Cell]:
    means = {}
    shapes = len(names_of(single, "shape"))
    for at, cell in cells_of(single, "idea", "num_tokens", by="shape").items():
        mean = geometric_mean([row["ratio"] for row in cell.values()])
        agree = sum(row["verdict"] == ("faster" if mean > 1 else "slower") for row in cell.values())
        drawn = ratio_map.cell_of(mean, 2 * agree <= len(cell) or abs(mean - 1) < SMALL)
        means[at] = replace(drawn, text=drawn.text + f" ({len(cell)})" * (len(cell) < shapes))
    return means


Means = Mapping[tuple[str, int], ratio_map.Cell]


def _where(means: Means, idea: str, up: bool) -> list[int]:
    """The batch sizes at which an idea helps (up) or costs."""
    return sorted(b for (i, b), cell in means.items() if i == idea and not cell.tie and (cell.ratio > 1) is up)


def _short(means: Means, ideas: Sequence[str]) -> str:
    """The idea that is worth most, and how many never help."""
    helps = [idea for idea in ideas if _where(means, idea, True)]
    idle = len(ideas) - len(helps)
    return f"{helps[0]} most" + (f", {idle} of {len(ideas)} nothing" if idle else "") if helps else "nothing that shows"


def _said(means: Means, ideas: Sequence[str], single: Sequence[Row]) -> str:
    """Ideas by what they are worth at best, with where; those worth nothing; those that cost."""
    worth, nothing, costs = [], [], []
    for idea in ideas:
        up, down = (_where(means, idea, side) for side in (True, False))
        used = sorted(b for i, b in means if i == idea)
        if up:
            ends = dict.fromkeys(number(pick(means[idea, b].ratio for b in up)) for pick in (min, max))
            worth.append(f"{idea} {' to '.join(ends)} at batch {runs_of(up, used)}")
        elif not down:
            nothing.append(idea)
        if down:
            least = min(down, key=lambda b: means[idea, b].ratio)
            costs.append(f"{idea} at batch {runs_of(down, used)}, {means[idea, least].ratio:.2f} at {least}")
    most = max(single, key=lambda row: row["ratio"])
    head = (
        f"Without each the layer takes so many times as long: {'; '.join(worth)}." if worth else "No idea shows a gain."
    )
    return conclude(head, {
        "Worth nothing that most shapes agree on": nothing, "Switched off, the layer is faster": "; ".join(costs),
        "The most in one cell": f"{most['idea']}, {most['ratio']:.2f} ({most['shape']}, batch {most['num_tokens']})",
    })  # fmt: skip
