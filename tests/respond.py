"""How long a control takes to answer, over a landscape of 50,000 rows: `python tests/respond.py`; figures, no verdict.

For every control of each panel the time from its change to the new outputs, in this process: the median of several changes.
With `--browser`, in a JupyterLab in chromium: from the change in the page to the frame in which the first new figure is seen,
and to that of the last. The landscape is made up; nothing here says anything of a GPU.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from synthetic import synthetic_landscape

from moelab import roofline, widgets
from moelab.plots.panel import table_text
from moelab.shapes import load_model
from moelab.tuner.landscape import Landscape
from moelab.tuner.problem import BATCH_SIZES, Problem
from moelab.tuner.survey import Survey

ROWS, CHANGES = 50_000, 6


def made() -> Landscape:
    """The peers' grid of Qwen3-30B-A3B at so many batch sizes that it has about ROWS rows."""
    sizes = (*BATCH_SIZES, 8192, 16384)
    for count in range(len(BATCH_SIZES), len(sizes) + 1):
        problem = Problem(load_model("qwen3-30b-a3b"), "NVIDIA H200", "sm_90", "3.6.0", sizes[:count])
        landscape = synthetic_landscape(problem)
        if len(landscape.rows) >= ROWS:
            break
    return landscape


def changes(control: Any) -> list[tuple[str, Any]]:
    """(trait, value) of several values of a control, each another than the one before."""
    count = len(control.options)
    if isinstance(control.index, tuple):
        return [("index", (0, count - 1 - i % 2)) for i in range(1, CHANGES + 1)] if count > 1 else []
    return [("index", (control.index + i) % count) for i in range(1, CHANGES + 1)] if count > 1 else []


def timed(panel: str, box: Any) -> list[dict[str, Any]]:
    """A row for each control of a panel: the median and the longest time of its changes, in ms."""
    rows = []
    above = box.children[0]
    for control in above.children[0].children if hasattr(above.children[0], "children") else above.children:
        if not getattr(control, "options", None):
            continue
        spent = []
        for trait, value in changes(control):
            began = time.perf_counter()
            setattr(control, trait, value)
            spent.append(1e3 * (time.perf_counter() - began))
        if spent:
            row = {"panel": panel, "control": control.description}
            rows.append(row | {"median, ms": statistics.median(spent), "longest, ms": max(spent)})
    return rows


# window.seen: of each new figure, ms from the change of a control to the frame in which it is drawn.
WATCH = """node => {
    const figures = () => [...node.querySelectorAll('.js-plotly-plot')]
        .filter(plot => plot.calcdata && plot.querySelector('.gtitle'));
    const old = figures();
    let began;
    for (const name of ['change', 'keydown'])
        node.addEventListener(name, () => { began = performance.now(); }, { capture: true, once: true });
    window.seen = [];
    const look = () => {
        const count = figures().filter(plot => !old.includes(plot)).length;
        while (window.seen.length < count) window.seen.push(performance.now() - began);
        window.watch = requestAnimationFrame(look);
    };
    cancelAnimationFrame(window.watch);
    look();
}"""
CELL = """
import sys
sys.path.insert(0, {tests!r})
from respond import made
from moelab import widgets
from moelab.tuner.survey import Survey
survey = Survey(made())
widgets.landscape_browser(survey, num_tokens=survey.batch_sizes[0])
"""
VIEWS = {"GEMM": 3, "Batch": 2, "Within": 2, "X axis": 1, "BLOCK M": 2, "BLOCK N": 2, "stages": 2}
"""Controls of the landscape browser, and how many of its figures each changes at the least."""


def in_the_browser() -> list[dict[str, Any]]:
    """A row for each control: the median time to the first and to the last new figure, ms."""
    import nbformat
    from browser import find_chromium, page, shared_lab, started

    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("no chromium on PATH; on Debian: apt-get install chromium fonts-dejavu-core")
    v4, rows = nbformat.v4, []
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [v4.new_code_cell(CELL.format(tests=str(Path(__file__).parent)))]
    with tempfile.TemporaryDirectory() as folder, shared_lab(Path(folder)) as server:
        root = Path(server.root) / "respond"
        root.mkdir()
        nbformat.write(v4.new_notebook(cells=cells, metadata=kernel), root / "x.ipynb")
        with started(chromium) as browser, page(browser, server) as tab:
            tab.folder = root
            tab.open("x.ipynb")
            tab.run_all()
            for name, views in VIEWS.items():
                spent = [_seen(tab, name, views, number) for number in range(CHANGES)]
                firsts, lasts = zip(*spent, strict=True)
                row = {"control": name, "first figure, ms": statistics.median(firsts)}
                rows.append(row | {"last figure, ms": statistics.median(lasts), "longest, ms": max(lasts)})
    return rows


def _seen(tab: Any, name: str, views: int, number: int) -> tuple[float, float]:
    """Change a control; when the first and the last of so many new figures were seen."""
    # what the last change left to do goes on: plotly keeps a picture of each figure
    tab.page.wait_for_timeout(1500)
    control = tab.control(name)
    tab.page.evaluate(WATCH, tab.page.locator(".jp-Cell").first.element_handle())
    if control.locator("select").count():
        select = control.locator("select")
        count = select.locator("option").count()
        select.select_option(index=(select.evaluate("select => select.selectedIndex") + 1) % count)
    else:
        control.locator(".noUi-handle").first.press("ArrowLeft" if number % 2 else "ArrowRight")
    tab.page.wait_for_function("views => window.seen.length >= views", arg=views)
    seen = tab.page.evaluate("() => window.seen")
    return seen[0], seen[views - 1]


def shown(rows: list[dict[str, Any]], *columns: str) -> None:
    """Print rows, and the median of each of those columns."""
    for start in range(0, len(rows), 12):  # table_text shows twelve rows at a time
        print(table_text(rows[start : start + 12]))
    for name in columns:
        print(f"median of all, {name}: {statistics.median(row[name] for row in rows):.0f}")


def main() -> None:
    """Print the table."""
    if "--browser" in sys.argv[1:]:
        shown(in_the_browser(), "first figure, ms", "last figure, ms")
        return
    landscape = made()
    survey = Survey(landscape)
    at = roofline.load_ceilings("NVIDIA_H200", "floors")
    boxes = {
        "landscape": widgets.landscape_browser(survey, num_tokens=landscape.problem.batch_sizes[0]),
        "layer picker": widgets.layer_picker(),
        "roofline": widgets.explorer(at),
    }
    rows = [row for name, box in boxes.items() for row in timed(name, box)]
    print(f"{len(landscape.rows):,} rows")
    shown(rows, "median, ms")


if __name__ == "__main__":
    main()
