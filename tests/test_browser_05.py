"""05_config_search in a real JupyterLab: controls move their figures; a tune is begun, held, taken up again, exported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from browser import Tab
from playwright.sync_api import Locator
from sampling import whole

NOTEBOOK = "notebooks/05_config_search.ipynb"
RESTARTED = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'"
SAVED_BYTES = 200_000


def cell(tab: Tab, control: str) -> Locator:
    """The cell that holds a control."""
    return tab.page.locator(".jp-Cell", has=tab.control(control)).first


def press(tab: Tab, name: str) -> None:
    tab.page.locator("button.jupyter-button", has_text=re.compile(rf"^{name}$")).first.click()


# How often the renderer's "redraw", which follows each new figure, draws one in a panel, and one that is in none.
REDRAWS = """async () => {
    const renderer = (await window._JUPYTERLAB['jupyterlab-plotly'].get('./mimeExtension'))().RenderedPlotly;
    const drawn = async where => {
        const plot = document.querySelector(where);
        let count = 0;
        plot.on('plotly_afterplot', () => { count += 1; });
        await renderer.Plotly.redraw(plot);
        return count;
    };
    return [await drawn('.moelab-panel .js-plotly-plot'), await drawn('.js-plotly-plot:not(.moelab-panel *)')];
}"""


def shows(tab: Tab, near: str, text: str) -> None:
    """Wait until the cell of a control shows a text."""
    cell(tab, near).get_by_text(re.compile(text)).first.wait_for()


def choose_another(tab: Tab, near: str, name: str) -> None:
    """Choose another option of a dropdown in the cell of `near`, and wait until what the cell shows has changed."""
    holder = cell(tab, near)
    select = holder.locator(".widget-dropdown", has_text=re.compile(name)).locator("select").first
    before, value = holder.inner_text(), select.input_value()
    labels = [label.replace("\xa0", " ") for label in select.locator("option").all_inner_texts()]
    select.select_option(index=next(i for i, label in enumerate(labels) if label != value))
    wait_for_change(tab, holder, before)


def wait_for_change(tab: Tab, holder: Locator, before: str) -> None:
    tab.page.wait_for_function("([node, before]) => node.innerText !== before", arg=[holder.element_handle(), before])


def press_arrow(tab: Tab, near: str, name: str) -> None:
    """Move a slider by the keyboard, and wait until what its cell shows has changed."""
    holder = cell(tab, near)
    before = holder.inner_text()
    tab.control(name).locator(".noUi-handle").first.press("ArrowRight")
    wait_for_change(tab, holder, before)


def explore(tab: Tab, sliders: tuple[str, ...], race: bool) -> None:
    """A control of each kind in each panel; test_widgets_search turns every one of them, without a browser."""
    for name in ("Loader", "Model"):
        choose_another(tab, "Loader", f"^{name}")
    for name in ("GEMM", "X axis"):
        choose_another(tab, "X axis", f"^{name}")
    figure = tab.figure("X axis")
    for name in sliders:
        press_arrow(tab, "X axis", name)  # the line beside the controls, at once
        assert "config" in figure.wait_for_title(name), "and the last view, once the slider rests"
    in_sight(tab, "X axis")
    assert tab.page.evaluate(REDRAWS) == [0, 1]
    if not race:
        return
    press_arrow(tab, "Budget", "Budget")
    choose_another(tab, "Budget", "^Regret")
    panel = cell(tab, "Budget")
    before = panel.inner_text()
    panel.locator(".jupyter-widgets.widget-play button, .widget-play button").first.click()
    wait_for_change(tab, panel, before)
    panel.locator(".widget-play button").first.click()


def in_sight(tab: Tab, near: str) -> None:
    """At the end of a panel, screens below its beginning, its controls are still on the page."""
    cell(tab, near).locator(".js-plotly-plot").last.evaluate("plot => plot.scrollIntoView({ block: 'center' })")
    place = tab.control(near).bounding_box()
    assert place is not None and 0 <= place["y"] <= 300, place


def begin_again(tab: Tab) -> None:
    """Restart the kernel, as after a crash, and run the cells that a run is taken up with."""
    tab.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    tab.page.wait_for_function(RESTARTED)
    tab.run_cells("LANDSCAPE =", "landscape.load(", "import widgets", "LiveTuner(", "WinnerCard(", "ExportPanel(")


def watched(tab: Tab) -> None:
    """The run that goes on above, seen through its journal."""
    watcher = cell(tab, "Journals in")
    watcher.locator("button", has_text="Look again").click()
    watcher.get_by_text(re.compile("is under way, in phase")).first.wait_for()


def tune_hold_and_take_up(tab: Tab) -> None:
    shows(tab, "Strategy", "no GPU here, so this replays")
    tab.select("Replay speed", "1 ×")
    press(tab, "Start")
    shows(tab, "Strategy", "phase compile")
    for name in ("Start", "Take up"):
        assert tab.page.get_by_role("button", name=re.compile(rf"^{name}$")).first.is_disabled()
    watched(tab)
    press(tab, "Pause")
    shows(tab, "Strategy", "Held after the measurement")
    begin_again(tab)
    assert "not finished" in tab.options("Runs")[0].replace("\xa0", " ")
    tab.select("Replay speed", "no waiting")
    press(tab, "Take up")
    shows(tab, "Strategy", "finished: phase layers")


def judge_and_export(tab: Tab, out: Path) -> None:
    shows(tab, "Pair", "This is a replay")
    choose_another(tab, "Pair", "^Pair")
    press(tab, "Exclude")
    shows(tab, "Pair", "excluded")
    press(tab, "Restore all")
    press(tab, "Re-time now")
    shows(tab, "Pair", "Not timed again: that needs a GPU")
    choose_another(tab, "Pair", "^Batch")
    for loader in ("vllm", "moelab"):
        cell(tab, "Folder").locator("select").select_option(label=loader)
        shows(tab, "Folder", f"each found again through {loader}")
    press(tab, "Write files")
    shows(tab, "Folder", "Wrote ")
    assert len(list(out.rglob("*.json"))) == 2
    press(tab, "Write files")
    shows(tab, "Folder", "exists already")
    field = cell(tab, "Folder").locator("input[type=text]")
    field.fill(" ")
    field.press("Enter")
    shows(tab, "Folder", "No folder is named")


SLIDERS = ("BLOCK M", "BLOCK N", "BLOCK K", "GROUP M", "warps", "stages")
WITHOUT_CONTROLS = (
    "in_short.",
    "plots.plateaus(",
    "plots.importances(",
    "tuner_regret.curves(",
    "tuner_regret.budgets(",
)
WITHOUT_CONTROLS += ("tuned_gain.gains(", "run_all(survey")
"""What stands in the cells that the shorter test leaves out: figures alone, and the race, whose replays take seconds."""


def prepare(path: Path, every: bool) -> None:
    """The notebook with one seed a strategy; of its cells those with panels alone, unless asked for all."""
    notebook = json.loads(path.read_text().replace("SEEDS = (0, 1, 2)", "SEEDS = (0,)"))
    if not every:
        cells = notebook["cells"]
        notebook["cells"] = [c for c in cells if not any(text in "".join(c["source"]) for text in WITHOUT_CONTROLS)]
        assert len(cells) - len(notebook["cells"]) == len(WITHOUT_CONTROLS), "each in one cell"
    path.write_text(json.dumps(notebook))


@pytest.mark.browser
@pytest.mark.parametrize("every", [False, whole(True)], ids=["panels", "all"])
def test_config_search_in_the_browser(tab: Tab, every: bool) -> None:
    path = tab.folder / NOTEBOOK
    prepare(path, every)
    tab.open(NOTEBOOK)
    tab.run_all()
    assert "" not in tab.names()
    explore(tab, SLIDERS if every else SLIDERS[:1], every)
    tune_hold_and_take_up(tab)
    judge_and_export(tab, tab.folder / "tuned" / "export")
    tab.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    tab.page.wait_for_function("!window.jupyterapp.shell.currentWidget.context.model.dirty")
    saved = path.stat().st_size
    assert saved < SAVED_BYTES, f"{saved} bytes saved with widgets"
    assert tab.outside == [], "requests that would leave the machine"
    assert tab.console_errors == []
