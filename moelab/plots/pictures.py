"""The pictures and figures outside notebooks, made from recordings: `make pictures`, or `python -m moelab.plots.pictures`.

Pictures go to docs/*.png (plotly through kaleido and the system's chromium), their sentences and numbers to docs/figures.md,
the first one into README.md too, between the markers `figures` and `end of figures`. The texts need no browser, so a test
holds them against the recordings.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from moelab import recordings, roofline, runtime, writing
from moelab.errors import MoelabError, RecordingError, RuntimeModeError
from moelab.plots import accuracy, fast_ideas, host_time, layer, quantised_times, rivals, sum_reduce, tuned_gain
from moelab.plots.panel import Panel, Row, columns_of
from moelab.plots.roofline import recorded_ceilings
from moelab.plots.style import broken, number

WIDTH = 900
"""Pixels: GitHub's column; files have twice as many for sharp text."""

CHARACTERS, LINE_PIXELS = 144, 16
"""Of a subtitle in 12 px type: what fits into WIDTH, and the height of a line."""

START, END = "<!-- figures: made by `make pictures`, do not edit -->", "<!-- end of figures -->"

FIRST = "fast"
"""The picture that the README shows."""

HEAD = """# Figures

Made from `data/recordings` and `data/upstream` by `make pictures`: do not edit. Each figure has its sentence, computed from its
numbers, and the numbers. *fast* is the fastest layer here, *classic* the vLLM/sglang-compatible kernel in a layer of several
launches. A floor is the time that bytes over bandwidth and FLOP over rate leave to no kernel to beat. The notebooks draw these
figures with controls, and more of them."""


def panels() -> dict[str, Panel]:
    """Picture name -> its panel, for every picture whose recording is there; nothing is measured."""
    found = {item.suite: item.recording for item in recordings.list_recordings() if item.recording}
    made: dict[str, Panel] = {}
    ceilings = found.get("ceilings")
    if "fast_layer" in found and ceilings:
        at = roofline.load_ceilings(_device(ceilings), "floors")
        made["fast"] = rivals.beside(found["fast_layer"], at)
    if "layer_classic" in found and "tuned_gain" in found and ceilings:
        layers = layer.classic_layers(found["layer_classic"], found["tuned_gain"])
        peers = _upstream("h200_sglang")
        at = roofline.load_ceilings(_device(ceilings), "floors")
        datasheet = roofline.load_ceilings(_device(ceilings), "datasheet")
        made["roofline"] = layer.roof(layers, recorded_ceilings(ceilings), datasheet)
        made["layer"] = layer.over_floor(layers, at, peers["rows"], peers["source"])
        made["tuned"] = tuned_gain.gains(found["tuned_gain"])
    if "fast_layer" in found:
        made["ideas"] = fast_ideas.ablation(found["fast_layer"])
    if "quantised" in found:
        made["quantised"] = quantised_times.over_the_floor(found["quantised"])
    if "tma_overhead" in found and "layer_baseline" in found:
        own, shape = _upstream("h200_sglang_host"), "qwen3-30b-a3b/tp1"
        made["host_time"] = host_time.timeline(found["tma_overhead"], found["layer_baseline"], shape, own)
    if "sum_reduce" in found and ceilings:
        peers = _upstream("h200_sum_reduce")
        copy = recorded_ceilings(ceilings).copy_bytes_per_s
        made["sum_reduce"] = sum_reduce.speed(found["sum_reduce"], copy, "bfloat16", peers["rows"], peers["source"])
    if "sum_reduce_precision" in found:
        recorded = found["sum_reduce_precision"]
        reported = _upstream("sum_reduce_precision")
        made["accuracy"] = accuracy.checks(recorded.rows, [], reported, recorded.source(), "")
    return made


HEADINGS = {
    "fast": "The fastest layer and the rivals that were measured",
    "roofline": "The classic layer on the roof",
    "layer": "The classic layer over its floor, compared with sglang’s",
    "tuned": "What tuning gains",
    "ideas": "Ablation: the fastest layer without each of its ideas",
    "quantised": "Quantised experts over their floor",
    "host_time": "Who waits for whom without a CUDA graph",
    "sum_reduce": "Sum-reduce, five ways",
    "accuracy": "Which of them is right",
}
ALT = {
    "fast": "time over floor by batch size, mean of three models: torch, sglang and FlashInfer above moelab's fast layer",
    "roofline": "FLOP per byte against TFLOP/s reached, four MoE layers under the roof of an H200",
    "layer": "time over floor by batch size, four MoE layers, three configs, beside sglang",
    "tuned": "times as long as the tuned configs take, by batch size: default, shipped file, an independent run",
    "ideas": "time without each idea over time with it, by batch size",
    "quantised": "time over floor by batch size, a line for each format of the weights",
    "host_time": "host and GPU over time, drawn to scale, for layers of one token launched eagerly",
    "sum_reduce": "microseconds by number of tokens, five implementations and the floor",
    "accuracy": "error over tolerance for five implementations in four dtypes, by two rules",
}


def text(made: Mapping[str, Panel]) -> str:
    """docs/figures.md: for each picture a heading, the picture, its sentence, and a folded table of its numbers."""
    parts = [HEAD]
    for name, panel in made.items():
        parts += [
            f"## {HEADINGS[name]}",
            _image(name, f"{name}.png"),
            panel.sentence,
            f"<details><summary>The numbers</summary>\n\n{markdown(panel.table)}\n\n</details>",
        ]
    return "\n\n".join([*parts, "## What was measured where", markdown(origins())]) + "\n"


def short(made: Mapping[str, Panel]) -> str:
    """The README's block: the first picture and its sentence."""
    return "\n\n".join([START, _image(FIRST, f"docs/{FIRST}.png"), made[FIRST].sentence, END])


def _image(name: str, path: str) -> str:
    return f'<img src="{path}" width="{WIDTH}" alt="{ALT[name]}">'


def origins() -> list[Row]:
    """One row per recording: what, how much, and where it comes from."""
    listed = [item.recording for item in recordings.list_recordings() if item.recording]
    return [
        {
            "recording": f"[{each.suite}](../data/recordings/{each.suite}.json)",
            "rows": len(each.rows),
            **{key: each.provenance[key] for key in ("gpu", "torch", "triton", "cuda", "driver", "date")},
        }
        for each in listed
    ]


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, numbers to three digits, without columns that are empty."""
    columns = [c for c in columns_of(rows) if any(row.get(c) is not None for row in rows)]
    lines = [columns, ["---"] * len(columns), *([number(row.get(c)) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def replaced(readme: str, block: str) -> str:
    """The README with its block replaced. Raises MoelabError where the markers are missing."""
    head, found, rest = readme.partition(START)
    _, ended, tail = rest.partition(END)
    if not found or not ended:
        raise MoelabError(f"README.md has no {START} ... {END}. Expected both markers, once. Restore them from git.")
    return head + block + tail


def on_white(figure: go.Figure) -> go.Figure:
    """A copy for paper: white, dark text, the subtitle broken at the column's width."""
    drawn = go.Figure(figure)
    dark = {"color": "#24292f"}
    said = str(drawn.layout.title.subtitle.text or "").split("<br>")
    lines = [line for part in said for line in broken(part, CHARACTERS)]
    more = LINE_PIXELS * (len(lines) - len(said))
    height, top = drawn.layout.height + more, drawn.layout.margin.t + more
    drawn.update_layout(
        paper_bgcolor="white", plot_bgcolor="white", font=dark, height=height, margin={"t": top},
        title={"y": 1 - 24 / height, "subtitle": {"font": dark, "text": "<br>".join(lines)}},
    )  # fmt: skip
    drawn.update_annotations(font=dark)
    return drawn


def draw(made: Mapping[str, Panel], folder: Path) -> list[Path]:
    """Write <folder>/<name>.png. Raises RuntimeModeError where kaleido or a chromium is missing."""
    if not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")):
        raise RuntimeModeError(
            "No chromium on PATH, which draws the pictures. Expected chromium or google-chrome. Install it (Debian: "
            "`apt-get install chromium fonts-dejavu-core`)."
        )
    import plotly.io

    drawn = {name: on_white(panel.figure) for name, panel in made.items() if panel.figure is not None}
    paths = [folder / f"{name}.png" for name in drawn]
    figures = list(drawn.values())
    heights = [figure.layout.height for figure in figures]
    with writing.replacing_all(paths) as files:  # one browser for all
        plotly.io.write_images(figures, files, format="png", width=WIDTH, height=heights, scale=2)
    return paths


def main() -> int:
    """Write docs/figures.md and the README's block, then the pictures."""
    root = runtime.repo_root()
    if root is None:
        raise RuntimeModeError("This is no checkout. Expected one, with its README.md. Clone the repository: use git.")
    made = panels()
    if not made:
        raise RecordingError("No recording to draw. Expected some in data/recordings. Record them: `make record`.")
    readme = root / "README.md"
    writing.write(readme, replaced(readme.read_text(encoding="utf-8"), short(made)))
    writing.write(root / "docs" / "figures.md", text(made))
    for path in draw(made, root / "docs"):
        print(f"wrote {path.relative_to(root)}")
    return 0


def _device(ceilings: recordings.Recording) -> str:
    return runtime.device_key(str(ceilings.provenance["gpu"]))


def _upstream(name: str) -> dict[str, Any]:
    return json.loads((runtime.data_dir() / "upstream" / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoelabError as error:
        sys.exit(f"moelab: {error}")
