"""Controls in a real JupyterLab: each has a name and speaks its value, and the keyboard reaches it and turns it."""

from __future__ import annotations

import nbformat
import pytest
from browser import Tab

SETUP = """
import ipywidgets as w
from moelab import widgets
from moelab.plots import Panel
from moelab.plots.style import grid
def draw(**values):
    return Panel(grid(f"now {values}", "made up"), [values], "**Drawn.**")
options = [("four", 4), ("eight", 8), ("sixteen", 16)]
controls = {"batch": w.SelectionSlider(options=options, description="Batch"),
            "rows": w.SelectionRangeSlider(options=options, index=(0, 2), description="Rows"),
            "model": w.Dropdown(options=["a", "b"], description="Model"),
            "folder": w.Text(description="Folder", continuous_update=False)}
box = widgets.interactive_panel(draw, controls)
box.children[0].children = (w.Play(description="Play"), *box.children[0].children)
"""
NAMES = ["Play", "Stop", "Repeat", "Batch", "Rows, lowest", "Rows, highest", "Model", "Folder"]
FOCUS = """() => { const node = document.activeElement;
    return [node.getAttribute('aria-label') || node.labels?.[0]?.textContent || '', node.getAttribute('aria-valuetext')]; }"""


def walked(tab: Tab, count: int) -> list[str]:
    """The names of what has the focus as Tab is pressed, from the first control on."""
    tab.page.locator(".widget-play button").first.focus()
    names = []
    for _ in range(count):
        names.append(tab.page.evaluate(FOCUS)[0])
        tab.page.keyboard.press("Tab")
    return names


@pytest.mark.browser
def test_controls_have_names_and_follow_the_keyboard(tab: Tab) -> None:
    v4 = nbformat.v4
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = v4.new_notebook(cells=[v4.new_code_cell(SETUP + "box")], metadata=kernel)
    nbformat.write(notebook, tab.folder / "x.ipynb")
    tab.open("x.ipynb")
    tab.run_all()
    figure = tab.figure("Batch")
    assert tab.names() == [*NAMES, figure.title()]
    assert walked(tab, len(NAMES)) == NAMES

    highest = tab.page.locator(".noUi-handle").nth(2)
    highest.press("ArrowLeft")
    figure.wait_for_title("'rows': (4, 8)")
    tab.names()
    assert highest.get_attribute("aria-valuetext") == tab.control("Rows").locator(".widget-readout").inner_text()
    tab.page.locator(".noUi-handle").first.press("ArrowRight")
    figure.wait_for_title("'batch': 8")
    assert tab.names()[-1] == figure.title(), "a figure that was drawn anew has its name, too"
    assert tab.page.locator(".noUi-handle").first.get_attribute("aria-valuetext") == "eight"
    assert (tab.outside, tab.console_errors) == ([], [])

    other = "https://192.0.2.1/x.js"  # reserved for documentation, RFC 5737
    tab.page.evaluate("url => fetch(url).catch(() => null)", other)
    assert tab.outside == [other], "a request that would leave the machine is seen"
    assert "ERR_NAME_NOT_RESOLVED" in tab.console_errors[0], "and goes nowhere"
