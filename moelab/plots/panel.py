"""A panel: a figure, the table beside it, and a sentence of conclusion, all from the same numbers."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from moelab.plots.style import number

Row = Mapping[str, Any]

LONG = 12
"""Rows of a table that is shown at once: a longer one would push the next figure off the screen."""


@dataclass(frozen=True)
class Panel:
    """What a notebook cell shows: `figure`, then `sentence` (Markdown), then `table` (rows of plain values).

    The last expression of a cell shows all three. figure is None where a table says it better.
    """

    figure: go.Figure | None
    table: Sequence[Row]
    sentence: str

    def frame(self) -> Any:
        """The table as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame([dict(row) for row in self.table])

    def bundles(self) -> list[dict[str, Any]]:
        """Mime bundles of the three, in order, for an Output widget or a test."""
        bundles: list[dict[str, Any]] = []
        if self.figure is not None:
            drawn = json.loads(self.figure.to_json())
            text = self.figure.layout.title.text or "figure"
            bundles.append({"application/vnd.plotly.v1+json": drawn, "text/plain": text})
        bundles.append({"text/markdown": self.sentence, "text/plain": self.sentence})
        if self.table:
            bundles.append({"text/html": table_html(self.table), "text/plain": table_text(self.table)})
        return bundles

    def _ipython_display_(self) -> None:
        from IPython.display import display

        bundles = self.bundles()
        if self.figure is not None:
            display(self.figure)  # through plotly's renderer, which `make html` chooses
            bundles = bundles[1:]
        for bundle in bundles:
            display(bundle, raw=True)


LONG_TEXT = 48
"""Characters of a table's cell from which on it is broken into lines."""
BROKEN = "; min-width: 18em; overflow-wrap: anywhere"


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns of rows that need not all have the same, in order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def table_html(rows: Sequence[Row]) -> str:
    """An HTML table, numbers to three digits and right-aligned; over LONG rows folded away; a wide one scrolls in its box."""
    columns = columns_of(rows)
    numeric = {c: all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns}
    align = {c: "right" if numeric[c] else "left" for c in columns}

    def cell(tag: str, column: str, value: str) -> str:
        wrap = "" if tag == "th" else BROKEN if len(value) > LONG_TEXT else "; white-space: nowrap"
        return f'<{tag} style="text-align: {align[column]}{wrap}">{html.escape(value)}</{tag}>'

    head = "".join(cell("th", c, c) for c in columns)
    body = "".join("<tr>" + "".join(cell("td", c, number(row.get(c))) for c in columns) + "</tr>" for row in rows)
    box = "max-height: 520px; overflow: auto; margin: 4px 0 12px 0"
    table = (
        f'<div style="{box}"><table style="margin: 0"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
    if len(rows) <= LONG:
        return table
    return f'<details><summary style="cursor: pointer">The numbers, {len(rows)} rows</summary>{table}</details>'


def table_text(rows: Sequence[Row]) -> str:
    """The same table for a terminal."""
    columns = columns_of(rows)
    cells = [columns, *([number(row.get(c)) for c in columns] for row in rows)]
    widths = [min(2 * LONG_TEXT, max(len(line[i]) for line in cells)) for i in range(len(columns))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells)


def counted(count: int, noun: str) -> str:
    """A number and its noun, the plural by an s: "1 cell", "2 cells"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean log; values positive and not empty."""
    import math

    return math.exp(math.fsum(math.log(v) for v in values) / len(values))


def timing(row: Row) -> Any:
    """A recorded row as a Measurement: median, 95 % interval (imports torch with moelab.measure, hence late)."""
    from moelab.measure import Measurement

    return Measurement(str(row.get("impl", row.get("config_name", ""))), tuple(row["samples_us"]))
