"""The strategy race with a clock to drag, or to let run."""

from __future__ import annotations

import ipywidgets as widgets

from moelab.plots import strategy_race as plots
from moelab.plots.panel import Panel
from moelab.plots.style import number
from moelab.widgets.config_search import choice
from moelab.widgets.panels import interactive_panel

FRAME_MS = 400
"""Time between two frames while it plays: more than one takes to draw."""


def strategy_race(traces: plots.Traces) -> widgets.VBox:
    """`plots.strategy_race.standing` with Budget (a slider, and a Play button that moves it) and Regret to choose."""
    frames = traces.frames()
    start = len(frames) // 2
    budget = widgets.SelectionSlider(
        options=[(f"{number(s)} s", s) for s in frames], index=start, description="Budget", continuous_update=False,
        layout=widgets.Layout(width="420px"),
    )  # fmt: skip
    play = widgets.Play(min=0, max=len(frames) - 1, value=start, interval=FRAME_MS, description="Play")
    play.tooltip = "Let the clock run"
    widgets.link((play, "value"), (budget, "index"))

    def draw(budget_s: float, which: str) -> Panel:
        return plots.standing(traces, budget_s, which)

    box = interactive_panel(draw, {"budget_s": budget, "which": choice("Regret", ("median", "worst"), "median")})
    box.children[0].children = (widgets.Label("Clock"), play, *box.children[0].children)
    return box
