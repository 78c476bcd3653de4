"""live_notebooks: what a cell showed is told in short, runs are compared by kind, and a tune goes through 05's panels."""

from __future__ import annotations

import json
from pathlib import Path

import live_notebooks
import nbformat
import pytest

from moelab import runtime

CELLS = """from moelab.plots import Panel
from moelab.plots.style import grid
from moelab import widgets
def draw(**values):
    figure = grid("One figure", "live on cpu")
    figure.add_scatter(x=[1], y=[2])
    return Panel(figure, [values], "**Said.**")
---
draw(x=1)
---
import ipywidgets as w
widgets.interactive_panel(draw, {"x": w.IntSlider(description="X")})
---
print("printed"); 1 / 0
---
2"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, v4 = tmp_path_factory.mktemp("live"), nbformat.v4
    cells = [v4.new_markdown_cell("# T"), *(v4.new_code_cell(source) for source in CELLS.split("\n---\n"))]
    nbformat.write(v4.new_notebook(cells=cells), folder / "made_up.ipynb")
    assert live_notebooks.main(["run", str(folder / "out"), str(folder / "made_up.ipynb")]) == 1, "a cell failed"
    return folder / "out"


def test_a_run_says_what_each_cell_showed(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads((ran / "outputs.json").read_text())
    cells = found["notebooks"]["made_up"]["cells"]
    assert list(cells) == ["2", "3", "4", "5", "6"]
    for number in ("3", "4"):  # the panel itself, and inside a widget
        shown = {name: cells[number][name] for name in ("figures", "traces", "tables", "conclusions", "sources")}
        assert shown == {
            "figures": ["One figure"], "traces": [1], "tables": 1, "conclusions": ["**Said.**"], "sources": ["live"]
        }  # fmt: skip
    assert cells["5"]["error"] == "ZeroDivisionError: division by zero" and cells["5"]["printed"] == "printed"
    assert cells["6"]["error"] is None and cells["6"]["figures"] == [], "a run goes on after a cell that failed"
    assert found["mode"] in ("gpu", "interpreter") and (ran / "made_up.ipynb").is_file()
    assert live_notebooks.main(["compare", str(ran), str(ran)]) == 1, "a cell that failed in both is no agreement"
    assert "5 cells, 2 figures, 2 cells live, 2 conclusions, 1 errors" in live_notebooks.summary(found)


def run_of(**changes: object) -> dict:
    cell = {"error": None, "figures": ["a"], "traces": [2], "tables": 1, "conclusions": ["c"], "sources": ["recorded"]}
    return {"notebooks": {"n": {"cells": {"2": cell | changes}}}}


@pytest.mark.parametrize(
    ("changes", "found"),
    [({}, []), ({"figures": [], "traces": []}, [("figures", "NO")]), ({"error": "E: x"}, [("error", "NO")]),
     ({"conclusions": []}, [("conclusions", "NO")]), ({"tables": 0}, [("tables", "NO")]),
     ({"traces": [3]}, [("traces", "in number")]), ({"sources": ["live"]}, [("source", "source")]),
     ({"conclusions": ["other words"], "figures": ["other title"]}, [])],
)  # fmt: skip
def test_runs_are_compared_by_kind(changes: dict, found: list) -> None:
    rows = live_notebooks.differences(run_of(), run_of(**changes))
    assert [(row["what"], row["agrees"]) for row in rows] == found


def test_a_missing_notebook_or_cell_is_a_difference() -> None:
    (row,) = live_notebooks.differences(run_of(), {"notebooks": {}})
    assert (row["what"], row["other"], row["agrees"]) == ("notebook", "missing", "NO")
    other = run_of()
    other["notebooks"]["n"]["cells"]["7"] = other["notebooks"]["n"]["cells"]["2"]
    assert {row["cell"] for row in live_notebooks.differences(run_of(), other)} == {"7"}


def test_compare_ends_with_its_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = {"device": "cpu", "mode": "interpreter"}
    for name, changes in (("a", {}), ("b", {"figures": [], "traces": []})):
        run = whole | run_of(**changes)
        run["notebooks"]["n"]["seconds"] = 1.0
        (tmp_path / name).mkdir()
        (tmp_path / name / "outputs.json").write_text(json.dumps(run))
    assert live_notebooks.main(["compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert "the same kinds" in capsys.readouterr().out
    assert live_notebooks.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "1 differences in kind" in capsys.readouterr().out


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="with a GPU it tunes for minutes: `make live` does that")
def test_a_tune_goes_through_the_panels_of_05(tmp_path: Path) -> None:
    found = live_notebooks.tune(tmp_path, 64)
    assert found["source"].startswith("measured on" if found["live"] else "replay of what was")
    assert found["up"] and found["down"] and "finished: phase layers" in found["said"][0]
    assert [sum(each.startswith(f"export/{rules}/") for each in found["written"]) for rules in ("moelab", "sglang", "vllm")] == [
        2, 2, 1,
    ]  # fmt: skip
