"""A serving run by contender, and the table of a run on the machine at hand."""

from __future__ import annotations

from moelab import recordings
from moelab.plots.panel import Panel
from moelab.plots.serving import looks
from moelab.plots.style import grid, number
from moelab.recordings import Recording
from moelab.serving.measured import Measured


def served(measured: Measured) -> Panel:
    """TTFT, TPOT, ITL and output tokens a second of the serving run, by contender."""
    from moelab.serving.table import serving

    lines = [line for line in serving(measured.rows) if "refused" not in line]
    if not lines:
        command = recordings.MADE_BY["serve_bench"]
        return Panel(None, [], f"**No serving run is recorded yet: `{command}` on a GPU records one.**")
    figure = grid("Requests as they arrive: time between two tokens", measured.source, height=380)
    points = ("p50", "p90", "p99")
    for name, style in looks([line["experts"] for line in lines]).items():
        line = next(line for line in lines if line["experts"] == name)
        figure.add_scatter(x=list(points), y=[line[f"ITL {p}, ms"] for p in points], name=name, mode="lines+markers",
                           line=style.line(), marker=style.marker())  # fmt: skip
    figure.update_xaxes(title="percentile of the times between tokens", type="category")
    figure.update_yaxes(title="ITL, ms", rangemode="tozero")
    best = max(lines, key=lambda line: line["output tok/s"])
    worst = min(lines, key=lambda line: line["output tok/s"])
    sentence = (
        f"**{best['experts']} puts out {number(best['output tok/s'])} tokens a second, {worst['experts']} "
        f"{number(worst['output tok/s'])}.** transformers' continuous batching without graphs: the host's time is in all of them."
    )
    return Panel(figure, [{k: v for k, v in line.items() if k != "model"} for line in lines], sentence)


def live(recording: Recording) -> Panel:
    """The table of a run, its errors said in the sentence: for a small model on the machine at hand."""
    from moelab.serving.table import times

    judged = [row for row in recording.rows if row["kind"] in ("error", "logits")]
    within = sum(row.get("within_bound", False) for row in judged)
    keys = ("cell", "experts", "ms", "low", "high", "", "share", "touched", "load", "refused")
    table = [{key: line.get(key) for key in keys if key in line} for line in times(recording.rows)]
    how = recording.protocol["decode"]
    sentence = (
        f"**{within} of {len(judged)} results are within twice eager's own error of float64; the decode ran {how}.** Times of a "
        "model this small are the host's: they show the way, not who is fast."
    )
    return Panel(None, table, sentence)
