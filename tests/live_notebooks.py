"""Every notebook run where this is run, and what each cell showed: on a GPU `make live`, then compare with a CPU's run.

    python tests/live_notebooks.py run OUT [NOTEBOOK ...]     OUT/<name>.ipynb executed, OUT/outputs.json
    python tests/live_notebooks.py compare OUT_A OUT_B        the cells whose outputs differ in kind; exit 1 where they do
    python tests/live_notebooks.py tune OUT [BATCH]           one batch size through 05's own widget: live on a GPU, else replay

Needs nbclient, nbformat, ipykernel, plotly and ipywidgets, no JupyterLab. A notebook runs on after a cell that failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a GPU node's Python need not have moelab installed

PLOTLY = "application/vnd.plotly.v1+json"
CELL_TIMEOUT_S = 600
KINDS = ("error", "figures", "traces", "tables", "conclusions", "sources")
"""What is compared of a cell; `sources` is left out of the verdict, for live instead of recorded is what a GPU is for."""


# --- running ------------------------------------------------------------------------------------------------------


def run(paths: Sequence[Path], out: Path) -> dict[str, Any]:
    """Execute notebooks in their own folder, write them and outputs.json below `out`; the outputs."""
    import nbformat

    from moelab import runtime

    out.mkdir(parents=True, exist_ok=True)
    here = runtime.current()
    found: dict[str, Any] = {
        "device": here.device_name,
        "mode": here.mode,
        "versions": runtime.versions(),
        "notebooks": {},
    }
    for path in paths:
        began = time.perf_counter()
        notebook = executed(path)
        nbformat.write(notebook, out / path.name)
        cells = outputs_of(notebook)
        found["notebooks"][path.stem] = {"seconds": round(time.perf_counter() - began, 1), "cells": cells}
        failed = [f"cell {number}: {cell['error']}" for number, cell in cells.items() if cell["error"]]
        print(
            f"{path.stem}: {found['notebooks'][path.stem]['seconds']} s, {'; '.join(failed) or 'no error'}", flush=True
        )
    (out / "outputs.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def executed(path: Path) -> Any:
    """The notebook after a run from top to bottom, with its widgets' state; cells that failed hold their error."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=True, allow_errors=True, record_timing=True,
    )  # fmt: skip
    path_of = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    client.execute(env={**os.environ, "PYTHONPATH": path_of, "PLOTLY_RENDERER": "plotly_mimetype"})
    return notebook


# --- what a run showed --------------------------------------------------------------------------------------------


def outputs_of(notebook: Any) -> dict[str, dict[str, Any]]:
    """Code cell's number among all cells, from 1, -> what it showed, what its widgets show included."""
    from moelab.plots.gallery import STATE, flat_outputs

    widgets = notebook.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    return {
        str(number): cell_outputs(list(flat_outputs(cell.outputs, widgets)), seconds_of(cell))
        for number, cell in enumerate(notebook.cells, start=1)
        if cell.cell_type == "code"
    }


def cell_outputs(outputs: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """One cell's outputs in short: error, figure titles, traces of each, tables, conclusions, and where figures come from."""
    error = next((f"{o['ename']}: {o['evalue']}"[:300] for o in outputs if o["output_type"] == "error"), None)
    figures = [o["data"][PLOTLY] for o in outputs if PLOTLY in o.get("data", {})]
    layouts = [figure.get("layout", {}).get("title", {}) for figure in figures]
    said = [text_of(o["data"]["text/markdown"]) for o in outputs if "text/markdown" in o.get("data", {})]
    printed = " ".join(text_of(o["text"]).strip() for o in outputs if o["output_type"] == "stream")
    subtitles = " ".join(layout.get("subtitle", {}).get("text", "") for layout in layouts)
    sources = sorted(set(re.findall(r"\b(live|recorded|replay|replayed|computed|arithmetic)\b", subtitles)))
    return {
        "seconds": seconds, "error": error, "figures": [layout.get("text", "") for layout in layouts],
        "traces": [len(figure.get("data", [])) for figure in figures],
        "tables": sum("<table" in text_of(o["data"].get("text/html", "")) for o in outputs if "data" in o),
        "conclusions": [text for text in said if text.strip() and not text.startswith("*Set here")],
        "sources": sources, "printed": printed[:400],
    }  # fmt: skip


def text_of(value: str | Sequence[str]) -> str:
    """A notebook's text, which a file may keep as a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def seconds_of(cell: Any) -> float:
    """How long a cell ran, by the kernel's own messages; 0 where they are missing."""
    from datetime import datetime

    times = cell.metadata.get("execution", {})
    ends = [times.get("iopub.execute_input"), times.get("shell.execute_reply")]
    if not all(ends):
        return 0.0
    began, done = (datetime.fromisoformat(each.replace("Z", "+00:00")) for each in ends)
    return round((done - began).total_seconds(), 2)


# --- comparing ----------------------------------------------------------------------------------------------------


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows (notebook, cell, what, one, other, agrees): "NO" where a figure, table or conclusion of one run is missing in the
    other, or a cell failed; "in number" where only their number of traces differs; "source" where the source does."""
    rows = []
    for name in sorted({*one["notebooks"], *other["notebooks"]}):
        sides = [run["notebooks"].get(name, {}).get("cells", {}) for run in (one, other)]
        if not all(sides):
            rows.append(row(name, "all", "notebook", *("run" if side else "missing" for side in sides), "NO"))
        for cell in sorted({*sides[0], *sides[1]}, key=int) if all(sides) else []:
            rows += [row(name, cell, *found) for found in cell_differences(*(side.get(cell, {}) for side in sides))]
    return rows


def cell_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """What differs in one cell, each as (what, one, other, agrees)."""
    found = []
    if a.get("error") or b.get("error"):
        found.append(("error", str(a.get("error")), str(b.get("error")), "NO"))
    for kind in ("figures", "conclusions"):
        counts = [len(each.get(kind, [])) for each in (a, b)]
        if counts[0] != counts[1]:
            found.append((kind, *map(str, counts), "NO"))
    if a.get("tables") != b.get("tables"):
        found.append(("tables", str(a.get("tables")), str(b.get("tables")), "NO"))
    if len(a.get("traces", [])) == len(b.get("traces", [])) and a.get("traces") != b.get("traces"):
        found.append(("traces", str(a.get("traces")), str(b.get("traces")), "in number"))
    if a.get("sources") != b.get("sources"):
        found.append(("source", *(", ".join(each.get("sources", [])) or "none" for each in (a, b)), "source"))
    return found


def row(notebook: str, cell: str, what: str, one: str, other: str, agrees: str) -> dict[str, str]:
    """A line of the table."""
    return {"notebook": notebook, "cell": cell, "what": what, "one": one[:60], "other": other[:60], "agrees": agrees}


def summary(run: Mapping[str, Any]) -> str:
    """One run in a line: device, notebooks, cells, figures, errors, seconds."""
    cells = [cell for each in run["notebooks"].values() for cell in each["cells"].values()]
    live = sum("live" in cell["sources"] for cell in cells)
    counts = {
        "notebooks": len(run["notebooks"]), "cells": len(cells), "figures": sum(len(cell["figures"]) for cell in cells),
        "cells live": live, "conclusions": sum(len(cell["conclusions"]) for cell in cells),
        "errors": sum(bool(cell["error"]) for cell in cells),
        "s": round(sum(each["seconds"] for each in run["notebooks"].values())),
    }  # fmt: skip
    return f"{run['device']} ({run['mode']}): " + ", ".join(f"{count} {name}" for name, count in counts.items())


# --- a live tune through the widget ---------------------------------------------------------------------------------


def tune(out: Path, num_tokens: int) -> dict[str, Any]:
    """Press Start in 05's tuner for one batch size, wait, and export for every loader; what it found."""
    from moelab import widgets
    from moelab.config_files import RULES
    from moelab.tuner import landscape
    from moelab.tuner.finals import Finals

    recorded = landscape.load("qwen3-30b-a3b-tp1-NVIDIA_H200")
    choice = widgets.Choice(Finals.of_landscape(recorded))
    tuner = widgets.LiveTuner(recorded, out / "runs", choice, speed=float("inf"))
    card, panel = widgets.WinnerCard(choice), widgets.ExportPanel(choice, out / "export")
    tuner.sizes.value = (num_tokens,)
    began = time.perf_counter()
    tuner.start()
    tuner.wait()
    won = choice.finals.winner(num_tokens)
    for rules in RULES:
        panel.rules.value = rules
        panel.write()
    card.retime()
    shown = [text_of(each["data"].get("text/markdown", "")) for each in (*tuner.output.outputs, *card.output.outputs)]
    return {
        "source": choice.finals.source, "live": tuner.live, "seconds": round(time.perf_counter() - began, 1),
        "batch": num_tokens, "up": won.up and won.up.short(), "down": won.down and won.down.short(),
        "said": [text for text in shown if text], "written": sorted(str(p.relative_to(out)) for p in out.rglob("*.json")),
    }  # fmt: skip


# --- command line ---------------------------------------------------------------------------------------------------


def compare(first: Path, second: Path) -> int:
    """Print both runs and the table of differences; 1 where a cell's outputs differ in kind."""
    from moelab.plots.panel import table_text

    runs = [json.loads((folder / "outputs.json").read_text(encoding="utf-8")) for folder in (first, second)]
    print(*(f"{name}: {summary(run)}" for name, run in zip(("one", "other"), runs, strict=True)), sep="\n")
    rows = differences(*runs)
    for start in range(0, len(rows), 12):  # table_text shows twelve rows at a time
        print(table_text(rows[start : start + 12]))
    bad = sum(each["agrees"] == "NO" for each in rows)
    print(f"{bad} differences in kind" if bad else "Every cell shows the same kinds of outputs in both.")
    return 1 if bad else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status is 1 where a cell failed or the runs differ in kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "compare", "tune"))
    parser.add_argument("out", type=Path)
    parser.add_argument("more", nargs="*")
    given = parser.parse_args(arguments)
    if given.what == "compare":
        return compare(given.out, Path(given.more[0]))
    if given.what == "tune":
        found = tune(given.out, int(given.more[0]) if given.more else 64)
        (given.out / "tune.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return 0
    paths = [Path(each).resolve() for each in given.more] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    found = run(paths, given.out)
    print(summary(found))
    return 1 if any(c["error"] for each in found["notebooks"].values() for c in each["cells"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
