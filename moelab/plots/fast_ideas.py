"""What each idea of the fastest layer is worth: its time with the idea switched off alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moelab.plots import ratio_map
from moelab.plots.cells import IDEAS, cells_of, names_of, timed
from moelab.plots.fast_layer import NOTHING, runs_of
from moelab.plots.panel import Panel, Row, geometric_mean, timing
from moelab.plots.style import GREEN, VERMILLION, grid, number
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
    batches = sorted(names_of(single, "batch"))
    figure = grid(
        f"What each idea is worth: {_short(means, ideas, batches)}",
        f"{recording.source()}; time without the idea over time with it, geometric mean over shapes, uniform routing<br>"
        f"green: it helps; orange: it costs; grey: under {100 * SMALL:g} %, or most shapes do not agree beyond 95 % intervals<br>"
        "in brackets: how many shapes use it, where not all do",
        height=180 + 36 * len(ideas),
    )  # fmt: skip
    ratio_map.draw(figure, means, ideas, batches, low=VERMILLION, high=GREEN, bar="without / with")
    figure.update_xaxes(title="batch, tokens")
    return Panel(figure, _by_shape(single, ideas), _said(means, ideas, batches, single))


def _single(recording: Recording) -> list[dict[str, Any]]:
    """One row per idea, shape and batch: the ratio, and whether the idea helps, costs or ties (uniform routing)."""
    from moelab.measure import tie

    found = []
    rows = [row for row in timed(recording) if row["routing"] == "uniform" and row.get("within_bound")]
    for (shape, batch), cell in cells_of(rows).items():
        for impl, row in cell.items():
            if not impl.startswith(WITHOUT) or "fast" not in cell:
                continue
            off, on = timing(row), timing(cell["fast"])
            verdict = "ties" if tie(off, on) else "helps" if on.median_us < off.median_us else "costs"
            idea = impl.removeprefix(WITHOUT)
            found.append({"idea": IDEAS.get(idea, idea), "shape": shape, "batch": batch,
                          "ratio": off.median_us / on.median_us, "verdict": verdict})  # fmt: skip
    return found


def _means(single: Sequence[Row]) -> dict[tuple[str, int], ratio_map.Cell]:
    means = {}
    shapes = len(names_of(single, "shape"))
    for idea, batch in dict.fromkeys((row["idea"], row["batch"]) for row in single):
        here = [row for row in single if (row["idea"], row["batch"]) == (idea, batch)]
        mean = geometric_mean([row["ratio"] for row in here])
        agree = sum(row["verdict"] == ("helps" if mean > 1 else "costs") for row in here)
        cell = ratio_map.cell_of(mean, 2 * agree <= len(here) or abs(mean - 1) < SMALL)
        few = f" ({len(here)})" if len(here) < shapes else ""
        means[idea, batch] = replace(cell, text=cell.text + few)
    return means


def _by_shape(single: Sequence[Row], ideas: Sequence[str]) -> list[Row]:
    """A line per idea and shape, a column per batch."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(single, key=lambda row: ideas.index(row["idea"])):
        line = lines.setdefault((row["idea"], row["shape"]), {"without": row["idea"], "shape": row["shape"]})
        line[str(row["batch"])] = row["ratio"]
    columns = ["without", "shape", *map(str, sorted(names_of(single, "batch")))]
    return [{column: line.get(column) for column in columns} for line in lines.values()]


Means = Mapping[tuple[str, int], ratio_map.Cell]


def _where(means: Means, idea: str, batches: Sequence[int], up: bool) -> list[int]:
    """The batch sizes at which an idea helps (up) or costs."""
    return [b for b in batches if (cell := means.get((idea, b))) and not cell.tie and (cell.ratio > 1) is up]


def _short(means: Means, ideas: Sequence[str], batches: Sequence[int]) -> str:
    """The idea that is worth most, and how many never help."""
    helps = [idea for idea in ideas if _where(means, idea, batches, True)]
    idle = len(ideas) - len(helps)
    return f"{helps[0]} most" + (f", {idle} of {len(ideas)} nothing" if idle else "") if helps else "nothing that shows"


def _said(means: Means, ideas: Sequence[str], batches: Sequence[int], single: Sequence[Row]) -> str:
    """Ideas by what they are worth at best, with where; those worth nothing; those that cost."""
    worth, nothing, costs = [], [], []
    for idea in ideas:
        up, down = (_where(means, idea, batches, side) for side in (True, False))
        used = [b for b in batches if (idea, b) in means]
        if up:
            low, high = (number(pick(means[idea, b].ratio for b in up)) for pick in (min, max))
            span = high if low == high else f"{low} to {high}"
            worth.append(f"{idea} {span} at batch {runs_of(up, used)}")
        elif not down:
            nothing.append(idea)
        if down:
            least = min(down, key=lambda b: means[idea, b].ratio)
            costs.append(f"{idea} at batch {runs_of(down, used)}, {means[idea, least].ratio:.2f} at {least}")
    said = (
        f"**Without each the layer takes so many times as long: {'; '.join(worth)}.**"
        if worth
        else "**No idea shows a gain.**"
    )
    said += f" Worth nothing that most shapes agree on: {', '.join(nothing)}." if nothing else ""
    said += f" Switched off, the layer is faster: {'; '.join(costs)}." if costs else ""
    most = max(single, key=lambda row: row["ratio"])
    return (
        said + f" The most in one cell: {most['idea']}, {most['ratio']:.2f} ({most['shape']}, batch {most['batch']})."
    )
