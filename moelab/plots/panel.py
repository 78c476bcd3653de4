"""A panel: a figure, the table beside it, and a sentence of conclusion, all from the same numbers."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from moelab.plots.literal import plain
from moelab.plots.style import INK, WIDTH, number

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

    def bundles(self, *, styled: bool = True) -> list[dict[str, Any]]:
        """Mime bundles of the three, in order, for an Output widget or a test. styled: the table brings its style sheet."""
        bundles: list[dict[str, Any]] = []
        if self.figure is not None:
            drawn = json.loads(_packed(self.figure).to_json())
            text = self.figure.layout.title.text or "figure"
            bundles.append({"application/vnd.plotly.v1+json": drawn, "text/plain": text})
        bundles.append({"text/markdown": self.sentence, "text/plain": plain(self.sentence)})
        if self.table:
            sheet = f"<style>{TABLES}</style>" if styled else ""
            bundles.append({"text/html": sheet + table_html(self.table), "text/plain": table_text(self.table)})
        return bundles

    def _ipython_display_(self) -> None:
        try:
            self._show()
        except Exception as error:
            raise NotShown(f"{type(error).__name__}: {error}") from error

    def _show(self) -> None:
        from IPython.display import display

        bundles = self.bundles()
        if self.figure is not None:
            # through plotly's renderer, which `make html` chooses
            display(go.Figure(bundles[0]["application/vnd.plotly.v1+json"]))
            bundles = bundles[1:]
        for bundle in bundles:
            display(bundle, raw=True)


def _packed(figure: go.Figure) -> go.Figure:
    """A copy whose coordinates are arrays, which plotly writes in base64: an indented notebook would give each number of a
    list a line of its own."""
    copied = go.Figure(figure)
    for trace in copied.data:
        for name in {"x", "y", "z"} & set(trace.to_plotly_json()):
            values = np.asarray(trace[name])
            if values.size > 5 and values.dtype.kind in "if":
                trace[name] = values
    return copied


class NotShown(BaseException):
    """A panel that could not be shown. No Exception, since IPython prints one that is raised while it displays, and goes on: a
    notebook with a broken figure would pass its test."""


WIDE = 12
"""Columns from beyond which on a table is set smaller: one for each of 19 batch sizes fits a page."""

LONG_TEXT = 48
"""Characters of a table's cell from which on it is broken into lines."""
CELLS = (
    "table.moelab td {text-align: right; white-space: nowrap} "
    "table.moelab th {text-align: right; white-space: normal; vertical-align: bottom} table.moelab .t {text-align: left} "
    "table.moelab td.b {min-width: 18em; overflow-wrap: anywhere; white-space: normal} "
    "table.wide td, table.wide th {padding: 3px 4px; font-size: 11px}"
)
"""Styles by class: in every cell of a table they would be most of a saved notebook. t: text, b: broken into lines."""

TABLES = f"{CELLS} {INK} {WIDTH}"
"""What tables and figures need of a page, which a panel brings with its table."""


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns of rows that need not all have the same, in order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def table_html(rows: Sequence[Row]) -> str:
    """An HTML table, numbers to three digits and right-aligned; over LONG rows folded away; a wide one scrolls in its box."""
    columns = columns_of(rows)
    text = {c for c in columns if not all(isinstance(row.get(c), int | float | None) for row in rows)}

    def cell(tag: str, column: str, value: str) -> str:
        kinds = " ".join(["t"] * (column in text) + ["b"] * (tag == "td" and len(value) > LONG_TEXT))
        return f"<{tag}" + (f' class="{kinds}">' if kinds else ">") + html.escape(value)

    head = "".join(cell("th", c, c) for c in columns)
    body = "".join("<tr>" + "".join(cell("td", c, number(row.get(c))) for c in columns) for row in rows)
    table = (
        '<div style="max-height: 520px; overflow: auto; margin: 4px 0 12px 0">'
        f'<table class="moelab{" wide" * (len(columns) > WIDE)}" style="margin: 0"><thead><tr>{head}<tbody>{body}</table></div>'
    )
    if len(rows) <= LONG:
        return table
    return f'<details><summary style="cursor: pointer">The numbers, {len(rows)} rows</summary>{table}</details>'


def table_text(rows: Sequence[Row]) -> str:
    """The same table for a terminal, its first LONG rows: a notebook keeps this text beside the HTML."""
    columns = columns_of(rows)
    cells = [columns, *([number(row.get(c)) for c in columns] for row in rows[:LONG])]
    widths = [min(2 * LONG_TEXT, max(map(len, column))) for column in zip(*cells, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([*lines, *[f"... {len(rows) - LONG} more rows"] * (len(rows) > LONG)])


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean log; values positive and not empty."""
    import math

    return math.exp(math.fsum(math.log(v) for v in values) / len(values))


def timing(row: Row) -> Any:
    """A recorded row as a Measurement: median, 95 % interval (imports torch with moelab.measure, hence late)."""
    from moelab.measure import Measurement

    return Measurement(str(row.get("impl", row.get("config_name", ""))), tuple(row["samples_us"]))
