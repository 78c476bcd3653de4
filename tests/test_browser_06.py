"""06_config_health in a real JupyterLab: each control changes its figure, typed folders too, and the saved file stays small."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from browser import Figure, Tab

NOTEBOOK = "notebooks/06_config_health.ipynb"
MOST_BYTES = 200_000


def redrawn(tab: Tab, figure: Figure, change: Callable[[], object]) -> str:
    """The title after `change`, which must be another one."""
    before = figure.title()
    change()
    tab.page.wait_for_function(
        "([cell, before]) => [...cell.querySelectorAll('.js-plotly-plot .gtitle')].some(t => t.textContent !== before)",
        arg=[figure.cell.element_handle(), before],
    )
    return figure.title()


def fill(tab: Tab, near: str, control: str, text: str) -> None:
    """Type into the text or number control of the cell that holds the control `near`."""
    cell = tab.page.locator(".jp-Cell", has=tab.control(near))
    label = cell.locator(".widget-label", has_text=control).first
    field = label.locator("xpath=..").locator("input")
    field.fill(text)
    field.press("Enter")


def choose(tab: Tab, near: str, control: str, option: str) -> None:
    """Choose in the cell that holds the control `near`: Tree, Rules and GEMM are there in more than one."""
    cell = tab.page.locator(".jp-Cell", has=tab.control(near))
    label = cell.locator(".widget-label", has_text=control).first
    label.locator("xpath=..").locator("select").select_option(label=option)


def kinds(figure: Figure) -> set[str]:
    """The names of the drawn traces."""
    plot = figure.cell.locator(".js-plotly-plot").last
    return set(plot.evaluate("plot => plot.data.map(trace => trace.name)"))


def doctor_follows(tab: Tab) -> None:
    figure = tab.figure("Folder")
    assert "nothing to repair" in figure.title()
    assert redrawn(tab, figure, lambda: choose(tab, "Folder", "Tree", "specimen")).startswith("sglang: 37")
    assert redrawn(tab, figure, lambda: choose(tab, "Folder", "Rules", "vllm")).startswith("vllm:")
    choose(tab, "Folder", "Rules", "auto")
    figure.wait_for_title("sglang")
    assert kinds(figure) == {"nothing to repair", "error", "warning", "note"}
    choose(tab, "Folder", "Show", "errors")
    tab.page.wait_for_function(
        "cell => [...cell.querySelectorAll('.js-plotly-plot')].some(plot => plot.data && plot.data.length === 2)",
        arg=figure.cell.element_handle(),
    )
    assert kinds(figure) == {"nothing to repair", "error"}
    fill(tab, "Folder", "Folder", "../configs")
    figure.wait_for_title("moelab")
    assert tab.control("Folder").locator("xpath=../..").locator("select").first.input_value() == "another folder"
    fill(tab, "Folder", "Folder", "../nowhere")
    figure.cell.get_by_text("There is no folder").wait_for()


def path_follows(tab: Tab) -> None:
    figure = tab.figure("Device")
    steps = {
        "Model": lambda: choose(tab, "Device", "Model", "mixtral-8x7b"),
        "TP": lambda: choose(tab, "Device", "TP", "2"),
        "Device": lambda: choose(tab, "Device", "Device", "AMD Instinct MI325X"),
        "GEMM": lambda: choose(tab, "Device", "GEMM", "GEMM2"),
        "Batch": lambda: fill(tab, "Device", "Batch", "777"),
        "Rules": lambda: choose(tab, "Device", "Rules", "vllm"),
    }
    titles = {name: redrawn(tab, figure, change) for name, change in steps.items()}
    assert titles["Rules"].startswith("mixtral-8x7b, TP 2, batch 777, GEMM2 on AMD Instinct MI325X: ")
    choose(tab, "Device", "Triton", "3.2.0")
    figure.cell.locator(".gtitle-subtitle", has_text="Triton 3.2.0").wait_for()
    choose(tab, "Device", "Rules", "sglang")
    choose(tab, "Device", "Tree", "specimen")
    figure.wait_for_title("an error")


def matrices_follow(tab: Tab) -> None:
    figure = tab.figure("Matrix")
    assert "run at another: GEMM1 + GEMM2" in figure.title()
    assert redrawn(tab, figure, lambda: choose(tab, "Matrix", "GEMM", "GEMM2")).endswith("GEMM2")
    assert "shortcut" in redrawn(tab, figure, lambda: choose(tab, "Matrix", "Matrix", "shortcuts"))
    choose(tab, "Matrix", "Run", "seed 1")
    figure.cell.locator(".gtitle-subtitle", has_text="seed1, 128 experts").wait_for()
    assert "device" in redrawn(tab, figure, lambda: choose(tab, "Matrix", "Matrix", "other devices’ files"))


@pytest.mark.whole
@pytest.mark.browser
def test_config_health_follows_its_controls(tab: Tab) -> None:
    tab.open(NOTEBOOK)
    tab.run_all()
    assert "" not in tab.names()
    doctor_follows(tab)
    path_follows(tab)
    matrices_follow(tab)
    tab.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    size = (tab.folder / NOTEBOOK).stat().st_size
    assert len((tab.folder / NOTEBOOK).read_text().split('"output_type"')) > 8, "saved with its outputs"
    assert size < MOST_BYTES, f"{size} bytes"
    assert tab.outside == [], "requests that would leave the machine"
    assert tab.console_errors == []
