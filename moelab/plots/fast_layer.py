"""The recording fast_layer over its floor: the fastest layer beside the classic one and torch's grouped product."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moelab import roofline
from moelab.config import KernelConfig, default_config
from moelab.errors import counted
from moelab.plots.cells import cells_of, names_of, table_of, timed
from moelab.plots.panel import Panel, Row, geometric_mean, timing
from moelab.plots.style import GREY, Look, error_bars, grid, log_axis, look
from moelab.recordings import Recording
from moelab.roofline import Ceilings, Cost

LOOKS: Mapping[str, Look] = {"classic": look("triton"), "fast": look("cuda"), "grouped_mm": look("torch")}
"""Contenders of the recording, in the colours of their families: Triton, CUDA C++, torch."""

LEVEL = 0.02
"""Means of time that differ by less are called level."""

_PER_LINE = 4  # small plots side by side: one line then holds three shapes and the mean
NOTHING = "**Nothing of it was timed.** Record it again: `moelab record fast_layer`."


def default_only(recording: Recording) -> list[str]:
    """Shapes where the classic layer had no config but the one that loaders fall back to without a file, in some cell.

    Told by the rows: one config tried, and both GEMMs' configs are `moelab.config.default_config`'s for few tokens or many.
    """
    fallbacks = (default_config(1, 1), default_config(2, 1))
    found = [
        row
        for row in recording.select(impl="classic", tried=1)
        if all(KernelConfig.from_json(row[key]) in fallbacks for key in ("config", "down_config"))
    ]
    return names_of(found, "shape")


def runs_of(chosen: Sequence[int], among: Sequence[int]) -> str:
    """Some of the batch sizes, neighbours drawn together: "1–16, 256"."""
    runs: list[list[int]] = []
    for place, batch in enumerate(among):
        if batch in chosen:
            if place and among[place - 1] in chosen:
                runs[-1].append(batch)
            else:
                runs.append([batch])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


# --- over the floor -----------------------------------------------------------------------------------------------


def over_floor(recording: Recording, at: Ceilings, routing: str = "uniform") -> Panel:
    """Time over the floor by batch: a small plot for each shape, and first the geometric mean over them.

    The mean is over shapes whose classic layer had tuned configs to choose from, where there are any.
    """
    rows = [row for row in timed(recording) if row["routing"] == routing and row["impl"] in LOOKS]
    rows = [row for row in rows if row["within_bound"]]
    if not rows:
        return Panel(None, [], NOTHING)
    shapes, batches = names_of(rows, "shape"), sorted(names_of(rows, "num_tokens"))
    fallen = [shape for shape in default_only(recording) if shape in shapes]
    compared = [shape for shape in shapes if shape not in fallen] or shapes
    means = _means(rows, compared, at)
    titles = [f"mean of {counted(len(compared), 'shape')}", *(_titled(shape, fallen) for shape in shapes)]
    lines = math.ceil(len(titles) / _PER_LINE)
    note = (
        "<br>classic*: no tuned file, so sglang’s default config alone; not in the mean"
        if fallen and compared != shapes
        else ""
    )
    figure = grid(
        f"Time over floor, {routing} routing: {_short(means, batches)}",
        f"{recording.source()}, 95 % intervals, within the error bound only{note}",
        titles=titles, rows=lines, height=130 + 230 * lines, shared_y=True,
    )  # fmt: skip
    for name, style in LOOKS.items():
        mean = [(b, means[name, b]) for b in batches if (name, b) in means]
        _line(figure, name, style, mean, 0, width=3.0)
        for number, shape in enumerate(shapes, 1):
            mine = [row for row in rows if (row["shape"], row["impl"]) == (shape, name)]
            _line(figure, name, style, [(row["num_tokens"], _over(row, at)) for row in mine], number)
    _dress(figure, batches, len(titles), lines)
    table = table_of(rows, "time / floor", lambda row: _over(row, at)[0])
    return Panel(figure, table, _said_of_floor(means, batches, routing, compared, fallen))


def _over(row: Row, at: Ceilings) -> tuple[float, float, float]:
    """Time over the floor: the median, and the ends of its 95 % interval."""
    floor = roofline.floor_us(Cost(row["flops"], row["bytes"], 0.0), at).us
    time = timing(row)
    low, high = time.interval_us
    return time.median_us / floor, low / floor, high / floor


def _means(
    rows: Sequence[Row], shapes: Sequence[str], at: Ceilings
) -> dict[tuple[str, int], tuple[float, float, float]]:
    """(contender, batch) -> geometric mean over the shapes that have all contenders at that batch; no interval of its own."""
    means = {}
    for batch in names_of(rows, "num_tokens"):
        here = [cell for (shape, b), cell in cells_of(rows).items() if b == batch and shape in shapes]
        whole = [cell for cell in here if set(cell) >= set(names_of(rows, "impl"))]
        for name in names_of(rows, "impl") if whole else ():
            mean = geometric_mean([_over(cell[name], at)[0] for cell in whole])
            means[name, batch] = (mean, mean, mean)
    return means


def _line(figure: Any, name: str, style: Look, points: Sequence[tuple[int, tuple[float, float, float]]], number: int,
          width: float = 1.6) -> None:  # fmt: skip
    if not points:
        return
    points = sorted(points)
    middle, low, high = zip(*(value for _, value in points), strict=True)
    figure.add_scatter(
        x=[batch for batch, _ in points], y=middle, error_y=error_bars(middle, low, high), name=name, legendgroup=name,
        mode="lines+markers", line=style.line(width), marker=style.marker(6), showlegend=number == 0,
        hovertemplate=f"{name}, batch %{{x}}: %{{y:.3f}}<extra></extra>", row=number // _PER_LINE + 1,
        col=number % _PER_LINE + 1,
    )  # fmt: skip


def _titled(shape: str, fallen: Sequence[str]) -> str:
    return f"{shape}, classic*" if shape in fallen else shape


def _dress(figure: Any, batches: Sequence[int], plots: int, lines: int) -> None:
    """Axes; every second batch size labelled; the legend in the place after the last plot, or below where there is none."""
    figure.update_xaxes(**log_axis(batches))
    figure.update_xaxes(ticktext=[str(b) if i % 2 == 0 else "" for i, b in enumerate(batches)])
    figure.update_xaxes(title="batch, tokens", row=lines)
    figure.update_yaxes(type="log", tickvals=[1, 1.5, 2, 3, 5, 10, 20], matches="y")
    figure.update_yaxes(title="time / floor", col=1)
    figure.add_hline(1.0, line={"color": GREY, "dash": "dot"})
    figure.update_annotations(font={"size": 12, "color": GREY})
    cols = min(_PER_LINE, math.ceil(plots / lines))
    for place in range(plots, cols * lines):
        figure.update_xaxes(visible=False, row=lines, col=place % cols + 1)
        figure.update_yaxes(visible=False, row=lines, col=place % cols + 1)
    figure.update_layout(legend={"orientation": "h", "y": -0.3})
    if plots < cols * lines:
        start = 1 - 0.9 / cols
        figure.update_layout(legend={"orientation": "v", "x": start, "xanchor": "left", "y": 0.3, "yanchor": "middle",
                                     "font": {"size": 14}})  # fmt: skip


def _ratios(means: Mapping[tuple[str, int], Any], batches: Sequence[int], rival: str) -> dict[int, float]:
    """Batch -> the rival's mean over fast's, where both are known."""
    return {b: means[rival, b][0] / means["fast", b][0] for b in batches if {(rival, b), ("fast", b)} <= set(means)}


def _short(means: Mapping[tuple[str, int], Any], batches: Sequence[int]) -> str:
    """Where fast is ahead of classic, level with it or behind it, on average."""
    ratios = _ratios(means, batches, "classic")
    if not ratios:
        return "nothing to compare"
    groups = {
        "ahead": [b for b, ratio in ratios.items() if ratio >= 1 + LEVEL],
        "level": [b for b, ratio in ratios.items() if 1 - LEVEL < ratio < 1 + LEVEL],
        "behind": [b for b, ratio in ratios.items() if ratio <= 1 - LEVEL],
    }
    parts = [f"{word} at {runs_of(group, batches)}" for word, group in groups.items() if group]
    return f"fast is {', '.join(parts)}".replace(" at ", " at batch ", 1)


def _said_of_floor(means: Mapping[tuple[str, int], Any], batches: Sequence[int], routing: str, compared: Sequence[str],
                   fallen: Sequence[str]) -> str:  # fmt: skip
    ratios = _ratios(means, batches, "classic")
    if not ratios:
        return f"**No shape has fast and classic at the same batch size under {routing} routing.**"
    best, worst = max(ratios, key=lambda b: ratios[b]), min(ratios, key=lambda b: ratios[b])
    over = {name: [means[name, b][0] for b in ratios if (name, b) in means] for name in LOOKS}
    each = ", ".join(f"{name} {geometric_mean(values):.2f}" for name, values in over.items() if values)
    apart = f" {' and '.join(fallen)} {'is' if len(fallen) == 1 else 'are'} drawn and not counted: without a tuned file " \
            "classic ran sglang’s default config there." if fallen and list(compared) != list(fallen) else ""  # fmt: skip
    return (
        f"**Under {routing} routing the mean of {counted(len(compared), 'shape')} has classic at {ratios[best]:.2f} times fast’s "
        f"time at batch {best}, and at {ratios[worst]:.2f} times at batch {worst}.** Times the floor, over all batch sizes: "
        f"{each}.{apart}"
    )
