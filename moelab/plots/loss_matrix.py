"""A matrix of losses: what a choice costs at each batch size, in per cent, with empty cells where nothing was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import plotly.graph_objects as go

from moelab.plots.style import grid
from moelab.tuner.transfer import Cells, Loss

_COLORS = [[0.0, "#eef3f7"], [0.35, "#f6d9b8"], [0.7, "#e8935a"], [1.0, "#b34700"]]
_TICKS = (0, 1, 3, 10, 30, 100, 300)


def matrix(
    title: str,
    source: str,
    cells: Mapping[str, Cells],
    x_title: str,
    y_title: str,
    ties: Iterable[tuple[str, int]] = (),
) -> go.Figure:
    """Heat map of rows by batch size, its colours logarithmic, a number in each measured cell; `ties` get a "="."""
    names, batches = list(cells), sorted({b for row in cells.values() for b in row})
    figure = grid(title, source, height=190 + 26 * len(names))
    known = {(name, b): loss for name, row in cells.items() for b, loss in row.items() if loss}
    tied = set(ties)
    # packed as float32: a saved notebook would give each number of a list a line of its own
    height = np.array([[_height(known.get((name, b))) for b in batches] for name in names], dtype=np.float32)
    top = max(float(np.nanmax(height, initial=0.0)), math.log1p(10))
    figure.add_heatmap(
        x=[str(b) for b in batches], y=names, z=height, xgap=2, ygap=2, zmin=0, zmax=top, colorscale=_COLORS,
        text=[[_label(known.get((name, b))) + " =" * ((name, b) in tied) for b in batches] for name in names],
        texttemplate="%{text}", textfont={"size": 11}, hoverongaps=False,
        hovertemplate="%{y}, batch %{x}: %{text} %<extra></extra>",
        colorbar={"title": {"text": "% lost"}, "outlinewidth": 0, "thickness": 14, "tickvals": [math.log1p(t) for t in _TICKS],
                  "ticktext": [str(t) for t in _TICKS]},
    )  # fmt: skip
    figure.update_xaxes(title=x_title, type="category", showgrid=False, categoryorder="array",
                        categoryarray=[str(b) for b in batches])  # fmt: skip
    figure.update_yaxes(title=y_title, type="category", autorange="reversed", showgrid=False, automargin=True)
    return figure


def _height(loss: Loss | None) -> float:
    """A colour's height: logarithmic, since losses run from 0 to some hundred per cent. NaN draws nothing."""
    return math.nan if loss is None else math.log1p(max(0.0, loss.percent))


def _label(loss: Loss | None) -> str:
    if loss is None:
        return ""
    value = f"{loss.percent:.1f}" if loss.final and abs(loss.percent) < 10 else f"{loss.percent:.0f}"
    value = value.replace("-0.0", "0.0") if value != "-0" else "0"
    return value if loss.final else f"~{value}"


def table_of(head: str, cells: Mapping[str, Cells]) -> list[dict[str, str]]:
    """The same as a table: numbers as the figure shows them."""
    return [{head: name} | {str(b): _label(loss) or "–" for b, loss in row.items()} for name, row in cells.items()]
