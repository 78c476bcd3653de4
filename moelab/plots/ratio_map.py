"""A map of ratios: rows by batch size, ties grey, what each cell says written into it; green is faster, orange slower."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import plotly.graph_objects as go

from moelab.plots.style import BETTER, WORSE, bar_title, grid, text_on

TIED = "#bdbdbd"
MIDDLE = "#f7f7f7"
_TICKS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
TICK, BAR_TITLE = 15, 44
"""Pixels: between two labels of the colour bar, and of its title with the line below."""
LEAST_SPAN = math.log(1.25)
"""Half of the colours' range at least, so that a per cent is not drawn as a great gain."""


@dataclass(frozen=True)
class Cell:
    """A ratio (positive), what its cell says ("<br>" breaks it), and whether it is no difference: then it is grey."""

    ratio: float
    text: str
    tie: bool


def cell_of(ratio: float, tie: bool) -> Cell:
    """A cell that says its ratio: to two digits after the point, to three where two would say 1.00 of what is no tie."""
    text = f"{ratio:.2f}"
    return Cell(ratio, f"{ratio:.3f}" if text == "1.00" and not tie else text, tie)


def mean_cells(
    rows: Sequence[Mapping[str, Any]], value: Callable[[Any], float], by: str = "impl"
) -> dict[tuple[str, int], Cell]:
    """(what `by` names, batch) -> geometric mean of `value` over its rows; "*" marks what lacks shapes that others have."""
    found: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        found.setdefault((row[by], row["num_tokens"]), []).append(value(row))
    most = max(map(len, found.values()), default=0)
    means = {at: cell_of(math.exp(sum(map(math.log, each)) / len(each)), False) for at, each in found.items()}
    return {at: replace(cell, text=cell.text + "*" * (len(found[at]) < most)) for at, cell in means.items()}


def span_of(cells: Mapping[tuple[str, Any], Cell]) -> float:
    """Half of the range that colours have to cover: the largest |log ratio|."""
    return max([abs(math.log(each.ratio)) for each in cells.values() if not each.tie] + [LEAST_SPAN])


def chart(
    title: str,
    source: str,
    cells: Mapping[tuple[str, Any], Cell],
    names: Sequence[str],
    batches: Sequence[Any],
    *,
    tall: int = 27,
    y: str = "",
    **how: Any,
) -> go.Figure:
    """A figure of one map. tall: pixels of a row. y: the rows' title. how: as `draw` takes it."""
    figure = grid(title, source, height=190 + tall * len(names))
    draw(figure, cells, names, batches, **how)
    figure.update_xaxes(title="batch, tokens")
    figure.update_yaxes(title=y or None, automargin=True)
    return figure


def draw(
    figure: go.Figure,
    cells: Mapping[tuple[str, Any], Cell],
    names: Sequence[str],
    batches: Sequence[Any],
    *,
    row: int = 1,
    span: float | None = None,
    low: str | None = BETTER,
    high: str = WORSE,
    bar: str = "",
    size: int = 12,
) -> None:
    """Draw a map into a row of the figure: (name, batch) -> cell. Colours are logarithmic, `low` below 1 and `high` above.

    As they stand they are of times over another's: green is faster. low: None for ratios that are never below 1.
    span: of the colours, for maps that share them. bar: the colour bar's title;
    "" draws none. size: of the text.
    """
    span = span or span_of(cells)
    places = {"row": row, "col": 1}
    across = [str(b) for b in batches]
    shared = {"x": across, "y": list(names), "xgap": 2, "ygap": 2, "hoverinfo": "skip", **places}
    heights = [_heights(cells, names, batches, tie) for tie in (False, True)]
    ticks = _ticks(span, bool(low), figure.layout.height - figure.layout.margin.t - figure.layout.margin.b - BAR_TITLE)
    figure.add_heatmap(
        z=heights[0], zmin=-span if low else 0.0, zmax=span, colorscale=_scale(low, high), showscale=bool(bar),
        colorbar={"title": bar_title(bar), "outlinewidth": 0, "thickness": 14, "tickvals": [math.log(t) for t in ticks],
                  "ticktext": [f"{t:g}" for t in ticks]},
        **shared,
    )  # fmt: skip
    figure.add_heatmap(z=heights[1], colorscale=[[0, TIED], [1, TIED]], showscale=False, **shared)
    shown = [(at, cells[at]) for at in ((name, b) for name in names for b in batches) if at in cells]
    figure.add_scatter(
        x=[str(b) for (_, b), _ in shown], y=[name for (name, _), _ in shown], mode="text", text=[c.text for _, c in shown],
        textfont={"size": size, "color": [colors_of(c, span, low, high)[0] for _, c in shown]},
        hovertemplate="%{y}, batch %{x}: %{text}<extra></extra>", showlegend=False, **places,
    )  # fmt: skip
    if len(across) > 12:  # all labels level and short, or plotly turns them
        short = [f"{b / 1024:g}k" if isinstance(b, int) and b >= 1024 else str(b) for b in batches]
        figure.update_xaxes(tickfont={"size": 10}, tickangle=0, tickvals=across, ticktext=short, **places)
    category = {"type": "category", "showgrid": False, "categoryorder": "array", **places}
    figure.update_xaxes(categoryarray=across, range=[-0.5, len(across) - 0.5], **category)
    figure.update_yaxes(categoryarray=list(names)[::-1], range=[-0.5, len(names) - 0.5], **category)


def _ticks(span: float, both: bool, pixels: float) -> list[float]:
    """Values for the colour bar, from the middle outwards, that have room beside each other on so many pixels."""
    apart = max(span / 7, (1 + both) * span * TICK / max(pixels, TICK))
    ticks = [t for t in _TICKS if abs(math.log(t)) <= span + 1e-9 and (both or t >= 1)]
    shown = [1.0]
    for t in sorted(ticks, key=lambda t: abs(math.log(t))):
        if all(abs(math.log(t / o)) > apart for o in shown):
            shown.append(t)
    return sorted(shown)


def _heights(
    cells: Mapping[tuple[str, Any], Cell], names: Sequence[str], batches: Sequence[Any], tie: bool
) -> np.ndarray:
    """Log ratios of the cells that are ties, or of those that are not; NaN draws nothing."""
    found = [[cells.get((name, b)) for b in batches] for name in names]
    return np.array(
        [[math.log(c.ratio) if c and c.tie is tie else math.nan for c in line] for line in found], np.float32
    )


def _scale(low: str | None, high: str) -> list[list[object]]:
    """From `low` over nearly white to `high`, tinted from the first per cent on: which side of 1 is seen at sight."""
    if low is None:
        return [[0.0, MIDDLE], [0.002, _tint(high)], [1.0, high]]
    return [[0.0, low], [0.499, _tint(low)], [0.5, MIDDLE], [0.501, _tint(high)], [1.0, high]]


def _channels(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def _tint(color: str, share: float = 0.15) -> str:
    return "#" + "".join(f"{round(255 - (255 - part) * share):02x}" for part in _channels(color))


def colors_of(cell: Cell, span: float, low: str | None, high: str) -> tuple[str, str]:
    """The colours of a cell's text and of its ground: dark or white, whichever has more contrast to it."""
    share = 0.15 + 0.85 * min(1.0, abs(math.log(cell.ratio)) / span)
    ground = TIED if cell.tie else _tint(high if low is None or cell.ratio >= 1 else low, share)
    return text_on(ground), ground
