"""Controls for the picture that follows tokens through the layer."""

from __future__ import annotations

import ipywidgets as widgets

from moelab.plots import follow as plots_follow
from moelab.plots.panel import Panel
from moelab.widgets.fields import dropdown, slider
from moelab.widgets.panels import interactive_panel

EVERYONE = "all"


def follow_tokens(trace: plots_follow.Trace) -> widgets.VBox:
    """`plots.follow.follow` with Step (how far) and Token (whom) to choose."""

    def draw(step: str, token: str) -> Panel:
        return plots_follow.follow(trace, step, None if token == EVERYONE else int(token))

    tokens = [EVERYONE, *(str(t) for t in range(trace.num_tokens))]
    return interactive_panel(
        draw,
        {
            "step": slider("Step", plots_follow.STEPS, plots_follow.STEPS[0]),
            "token": dropdown("Token", tokens, EVERYONE),
        },
    )
