"""Data -> plotly figures, with a table and a computed sentence beside each (`panel.Panel`). Pure: nothing is measured here."""

from moelab.plots import accuracy, explorer, layer, pipeline, roofline, sum_reduce
from moelab.plots.panel import Panel

__all__ = ["Panel", "accuracy", "explorer", "layer", "pipeline", "roofline", "sum_reduce"]
