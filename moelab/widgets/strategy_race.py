"""The strategy race with a clock to drag, or to let run."""

from __future__ import annotations

import ipywidgets as widgets

from moelab.plots import strategy_race as plots
from moelab.plots.panel import Panel
from moelab.plots.style import number
from moelab.widgets.fields import dropdown
from moelab.widgets.panels import interactive_panel

FRAME_MS = 400
"""Time between two frames while it plays: more than one takes to draw."""


def strategy_race(traces: plots.Traces) -> widgets.VBox:
    """`plots.strategy_race.standing` with Budget (a slider, and a Play button that moves it) and Regret to choose."""
    frames = traces.frames()
    start = len(frames) // 2
    budget = widgets.SelectionSlider(
        options=[(f"{number(s)} s", s) for s in frames], index=start, description="Budget", continuous_update=True,
        layout=widgets.Layout(width="420px"),
    )  # fmt: skip
    play = widgets.Play(min=0, max=len(frames) - 1, value=start, interval=FRAME_MS, description="Play")
    play.tooltip = "Let the clock run"
    widgets.link((play, "value"), (budget, "index"))

    def draw(budget_s: float, which: str) -> Panel:
        return plots.standing(traces, budget_s, which)

    def answer(budget_s: float, which: str) -> str:
        return f"After {number(budget_s)} s: {plots.leaders(traces, budget_s, which)}"

    controls = {"budget_s": budget, "which": dropdown("Regret", ("median", "worst"), "median")}
    box = interactive_panel(draw, controls, answer)
    row = box.children[0].children[0]
    row.children = (widgets.Label("Clock"), play, *row.children)
    return box
