"""widgets: they follow their controls, and a broken drawing function fails the cell, in a notebook too."""

from __future__ import annotations

import nbformat
import pytest
from broken_cells import BROKEN, assert_each_fails
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from moelab import widgets
from moelab.plots.panel import Panel
from moelab.plots.roofline import tp_choices
from moelab.roofline import load_ceilings
from moelab.shapes import preset_names

AT = load_ceilings("NVIDIA_H200", "floors")


def control(box: object, description: str) -> object:
    """The control with that description, as the browser test finds it."""
    return next(each for each in box.children[0].children if each.description == description)


def shown(box: object) -> tuple:
    return box.children[1].outputs


def title(box: object) -> str:
    return shown(box)[0]["data"]["application/vnd.plotly.v1+json"]["layout"]["title"]["text"]


def test_a_panels_tables_bring_no_style_sheet() -> None:
    """Each that comes or goes has the browser ask again how the whole page looks; the panel has it once."""
    box = widgets.explorer(AT)
    assert not any("<style" in output["data"].get("text/html", "") for output in shown(box)) and len(shown(box)) == 3
    (sheet,) = [each.value for each in box.children if "<style>" in getattr(each, "value", "")]
    assert all(part in sheet for part in ("table.moelab td", "js-plotly-plot text", "min-width"))


def test_explorer_follows_its_controls() -> None:
    box = widgets.explorer(AT)
    before = shown(box)
    control(box, "Model").value = "llama-4-scout"
    assert "llama-4-scout" in title(box) and shown(box) != before
    control(box, "TP").value = 4
    control(box, "Batch").value = 8192
    assert "TP 4" in title(box) and "batch 8192" in title(box)
    figure, sentence, table = (output["data"] for output in shown(box))
    assert "llama-4-scout at TP 4 and batch 8192" in sentence["text/markdown"]
    assert "<table" in table["text/html"] and "application/vnd.plotly.v1+json" in figure


@pytest.mark.parametrize("model", preset_names())
def test_every_preset_draws_at_every_degree_offered(model: str) -> None:
    """Switching from a degree that the next model does not have must neither raise nor show another model."""
    box = widgets.explorer(AT, "mixtral-8x7b", 16, 1)
    control(box, "Model").value = model
    assert list(control(box, "TP").options) == tp_choices(model)
    for degree in tp_choices(model):
        control(box, "TP").value = degree
        assert f"{model}, TP {degree}, batch 1:" in title(box)


def test_padding_picture_follows_its_slider() -> None:
    calls = []

    def aligned(block_size: int) -> tuple[list[int], list[int]]:
        calls.append(block_size)
        return [0] + [2] * (block_size - 1), [0]

    box = widgets.padding_picture(aligned, [2, 4], 1, 2)
    control(box, "Block rows").value = 2
    assert calls == [4, 2] and "BLOCK_SIZE_M = 2" in title(box)


# --- exceptions come out ------------------------------------------------------------------------------------------

SETUP = """
from moelab import widgets
from moelab.plots import explorer as plots_explorer, pipeline, quantised
from moelab.roofline import load_ceilings
at = load_ceilings("NVIDIA_H200", "floors")
plots_explorer.explore("dbrx", 1, 1, at)
box = widgets.explorer(at)
picture = widgets.padding_picture(lambda b: ([0] * b, [0]), [2, 4], 1, 1)
way = widgets.weights_way(["int4_w4a16_group_32", "mxfp4_w4a16"], "mxfp4_w4a16")
"""
BREAK = "plots_explorer.explore = pipeline.alignment = quantised.way = broken\n"
CASES = {
    "plain call": 'plots_explorer.explore("dbrx", 1, 1, at)',
    "plain call of the picture": "pipeline.alignment([0], [0], 1, 1, 1)",
    "explorer is made": "widgets.explorer(at)",
    "model changes": 'box.children[0].children[0].value = "dbrx"',
    "degree changes": "box.children[0].children[1].value = 2",
    "batch changes": "box.children[0].children[2].value = 1",
    "picture is made": "widgets.padding_picture(lambda b: ([0] * b, [0]), [2, 4], 1, 1)",
    "picture's slider moves": "picture.children[0].children[0].value = 2",
    "format changes": 'way.children[0].children[0].value = "int4_w4a16_group_32"',
}


def test_a_broken_drawing_function_fails_the_cell() -> None:
    """Whether the call is plain or comes from a control."""
    assert_each_fails(SETUP, BREAK, CASES)


def test_an_error_stops_a_notebook() -> None:
    """nbclient, which nbmake runs, raises where a cell fails."""
    v4 = nbformat.v4
    broken = v4.new_notebook(cells=[v4.new_code_cell(SETUP), v4.new_code_cell(BROKEN + BREAK + CASES["batch changes"])])
    with pytest.raises(CellExecutionError, match="drawing function is broken"):
        NotebookClient(broken, timeout=60, kernel_name="python3").execute()


def test_interactive_panel_redraws_only_on_values() -> None:
    import ipywidgets

    drawn = []

    def draw(x: int) -> Panel:
        drawn.append(x)
        return Panel(None, [{"x": x}], f"**{x}**")

    slider = ipywidgets.IntSlider(value=3, max=9, description="x")
    box = widgets.interactive_panel(draw, {"x": slider})
    slider.description = "y"
    slider.value = 4
    assert drawn == [3, 4] and shown(box)[0]["data"]["text/markdown"] == "**4**"
