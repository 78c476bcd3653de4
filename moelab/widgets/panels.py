"""A panel that follows its controls.

The drawing function is called when a control changes, and its result assigned to `Output.outputs`. Neither
`interact` nor `with output:` is used: both swallow exceptions, so that a test run of the notebook would pass over a
broken figure. Here an exception leaves through the assignment that caused it.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as widgets

from moelab.plots import explorer as plots_explorer
from moelab.plots import pipeline as plots_pipeline
from moelab.plots.panel import Panel
from moelab.plots.roofline import BATCHES, tp_choices
from moelab.roofline import Ceilings
from moelab.shapes import preset_names
from moelab.widgets import page
from moelab.widgets.fields import dropdown, slider
from moelab.widgets.resting import Resting

Draw = Callable[..., Panel | Sequence[Panel]]


def interactive_panel(
    draw: Draw, controls: Mapping[str, widgets.Widget], answer: Callable[..., str] | None = None
) -> widgets.VBox:
    """The controls in a row that stays in sight, and draw(**values) below, one panel or several, drawn now and whenever a value
    changes.

    controls: argument name of `draw` -> widget, each with a description. What `draw` raises passes through. answer: as below.
    """
    return interactive_panels([draw], controls, answer)


def interactive_panels(
    draws: Sequence[Draw], controls: Mapping[str, widgets.Widget], answer: Callable[..., str] | None = None
) -> widgets.VBox:
    """`interactive_panel` of several drawing functions, each with an Output of its own.

    The page shows the first while the next is still being computed, and leaves alone what a change did not touch.
    answer(**values): a line that is shown beside the controls at once, while a slider is still dragged; the panels follow once it
    rests. Without one they are drawn at each change.
    """
    outputs = [widgets.Output() for _ in draws]
    line, resting = widgets.HTML(), Resting()

    def redraw() -> None:
        values = {name: control.value for name, control in controls.items()}
        for output, draw in zip(outputs, draws, strict=True):
            show(output, draw(**values))

    def changed(_: object = None) -> None:
        if answer is None:
            redraw()
            return
        line.value = html.escape(answer(**{name: control.value for name, control in controls.items()}))
        resting.then(
            redraw, failed=lambda error: setattr(line, "value", html.escape(f"{type(error).__name__}: {error}"))
        )

    changed()
    for control in controls.values():
        control.observe(changed, "value")
    row = widgets.HBox(list(controls.values()), layout=widgets.Layout(flex_flow="row wrap", overflow="visible"))
    return page.panel([row] if answer is None else [row, line], list(outputs))


def show(output: widgets.Output, panels: Panel | Sequence[Panel]) -> None:
    """Put panels into an Output, in place of what it held."""
    each = [panels] if isinstance(panels, Panel) else panels
    output.outputs = tuple(_display_data(bundle) for panel in each for bundle in panel.bundles(styled=False))


def _display_data(bundle: Mapping[str, Any]) -> dict[str, Any]:
    return {"output_type": "display_data", "data": dict(bundle), "metadata": {}}


def model_controls(model: str, tp_size: int, *, quantised: bool = False) -> tuple[widgets.Dropdown, widgets.Dropdown]:
    """Model and TP; degrees that do not divide the model are not offered. quantised: presets of quantised checkpoints too."""
    models = dropdown("Model", preset_names(quantised=quantised), model)
    degrees = dropdown("TP", tp_choices(model), tp_size)

    def offer(change: Mapping[str, Any]) -> None:
        fitting = tp_choices(change["new"])
        kept = degrees.value if degrees.value in fitting else fitting[0]
        with degrees.hold_trait_notifications():
            degrees.options = fitting
            degrees.value = kept

    models.observe(
        offer, "value"
    )  # before the redraw of interactive_panel, which would see a degree that does not divide
    return models, degrees


def explorer(at: Ceilings, model: str = "qwen3-30b-a3b", tp_size: int = 1, num_tokens: int = 64) -> widgets.VBox:
    """`plots.explorer.explore` with Model, TP and Batch to choose; degrees that do not divide a model are not offered."""
    models, degrees = model_controls(model, tp_size)
    batch = slider("Batch", BATCHES, num_tokens)
    return interactive_panel(
        lambda model, tp_size, num_tokens: plots_explorer.explore(model, tp_size, num_tokens, at),
        {"model": models, "tp_size": degrees, "num_tokens": batch},
    )


def padding_picture(
    aligned: Callable[[int], tuple[Sequence[int], Sequence[int]]], blocks: Sequence[int], top_k: int, num_pairs: int
) -> widgets.VBox:
    """`plots.pipeline.alignment` with BLOCK_SIZE_M to choose.

    aligned(block_size): the used part of sorted_token_ids, and expert_ids, as plain lists.
    """

    def draw(block_size: int) -> Panel:
        sorted_token_ids, expert_ids = aligned(block_size)
        return plots_pipeline.alignment(sorted_token_ids, expert_ids, block_size, top_k, num_pairs)

    return interactive_panel(draw, {"block_size": slider("Block rows", blocks, blocks[-1])})
