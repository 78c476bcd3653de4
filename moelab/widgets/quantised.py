"""Controls for a weight's way into a format and back."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as widgets

from moelab.plots import quantised as plots
from moelab.plots.panel import Panel
from moelab.widgets.fields import dropdown, slider
from moelab.widgets.panels import interactive_panel

OUTLIERS = (1, 2, 4, 8, 16, 32)
"""How many times as large the fourth weight is made."""


def weights_way(formats: Sequence[str], format: str, outlier: int = 8) -> widgets.VBox:
    """`plots.quantised.way` with Format and Outlier to choose."""
    from moelab import quantised_error

    def draw(name: str, times: int) -> Panel:
        return plots.way(quantised_error.way(name, float(times)))

    controls = {"name": dropdown("Format", formats, format), "times": slider("Outlier", OUTLIERS, outlier)}
    return interactive_panel(draw, controls)
