"""app/jupyter_server_config.py, which `make lab` hands to Jupyter's server: what a saved notebook goes without."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PLOTLY = "application/vnd.plotly.v1+json"


@pytest.fixture(scope="module")
def loaded() -> dict:
    config = SimpleNamespace(FileContentsManager=SimpleNamespace())
    module = runpy.run_path(str(ROOT / "app" / "jupyter_server_config.py"), {"c": config})
    assert config.FileContentsManager.pre_save_hook is module["saved_small"]
    return module


def notebook(*sizes: int) -> dict:
    """A notebook as the server hands it over: a cell for each figure of so many numbers, and a table's text."""
    v4, cells = nbformat.v4, []
    for count in sizes:
        figure = {"data": [{"x": [1.5] * count}], "layout": {"title": {"text": f"figure of {count}"}}}
        shown = v4.new_output("display_data", {PLOTLY: figure, "image/png": "A" * 100_000})
        cells.append(v4.new_code_cell("x", outputs=[shown, v4.new_output("display_data", {"image/png": "kept"})]))
    return {"type": "notebook", "content": v4.new_notebook(cells=[v4.new_markdown_cell("# T"), *cells])}


def test_pictures_of_figures_go_and_figures_stay(loaded: dict) -> None:
    model = notebook(10, 20)
    loaded["saved_small"](model=model, path="x.ipynb")
    outputs = [output for cell in model["content"].cells[1:] for output in cell.outputs]
    assert [sorted(output["data"]) for output in outputs] == [[PLOTLY], ["image/png"]] * 2


def test_over_the_limit_the_heaviest_figures_go_first_and_say_so(loaded: dict) -> None:
    model = notebook(10, 30_000, 1000)
    loaded["saved_small"](model=model, path="x.ipynb")
    first, heavy, last = (cell.outputs[0]["data"] for cell in model["content"].cells[1:])
    assert PLOTLY in first and PLOTLY in last
    assert list(heavy) == ["text/plain"] and heavy["text/plain"].startswith("figure of 30000: not saved")
    nbformat.validate(model["content"])
    assert len(nbformat.writes(model["content"]).encode()) < 200_000


def test_other_files_are_left_alone(loaded: dict) -> None:
    loaded["saved_small"](model={"type": "file", "content": "text"}, path="x.py")


def test_make_lab_loads_it() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\nlab:")[2].partition("\n\n")[0]
    assert "JUPYTER_CONFIG_PATH=$(CURDIR)/app" in recipe
