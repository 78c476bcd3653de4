"""How long a control takes to answer, over a landscape of 50,000 rows: `python tests/respond.py`; figures, no verdict.

For every control of each panel the time from its change to the new outputs, in this process: the median of several changes.
The landscape is made up; nothing here says anything of a GPU.
"""

from __future__ import annotations

import statistics
import time
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
    for control in box.children[0].children:
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


def main() -> None:
    """Print the table."""
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
    for start in range(0, len(rows), 12):  # table_text shows twelve rows at a time
        print(table_text(rows[start : start + 12]))
    print(f"median of all: {statistics.median(row['median, ms'] for row in rows):.0f} ms")


if __name__ == "__main__":
    main()
