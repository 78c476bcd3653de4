"""The recording tuned_gain drawn: how many times as long each rival takes as the tuned pair, batch size by batch size."""

from __future__ import annotations

from typing import Any

from moelab.plots.panel import Panel, Row, counted, geometric_mean
from moelab.plots.style import SERIES, error_bars, grid, log_axis
from moelab.recordings import Recording

TITLES = {
    "default": "sglang’s default",
    "shipped": "the file that sglang ships",
    "second": "an independent run’s winners",
}
"""Rivals in order, and what a plot of each is called."""

SHOWN = (1, 4, 16, 64, 256, 1024, 4096)
"""Batch sizes whose ticks have room for a label."""


def gains(recording: Recording) -> Panel:
    """A plot for each rival, a line for each target: its time over the tuned pair's, with 95 % intervals; over 1 the tuned
    pair is faster. What was not within its error bound was not timed, and is in no line."""
    rivals = [name for name in TITLES if recording.select(kind="summary", over=name)]
    targets = list(dict.fromkeys(row["target"] for row in recording.rows))
    figure = grid(
        f"Times over the tuned configs’: {_short(recording)}", f"whole layers, interleaved; {recording.source()}",
        titles=[TITLES[name] for name in rivals], height=500, gap=0.06,
    )  # fmt: skip
    sizes = sorted({row["num_tokens"] for row in recording.select(kind="layer")})
    for column, rival in enumerate(rivals, 1):
        for number, target in enumerate(targets):
            _draw(figure, _timed(recording, target, rival), target, number, column)
        figure.add_hline(y=1.0, line={"color": "#7b7b7b", "width": 1}, row=1, col=column)
    figure.update_xaxes(title="batch size, tokens", **log_axis([b for b in sizes if b in SHOWN] or sizes))
    figure.update_layout(legend={"orientation": "h", "y": -0.2})
    figure.update_yaxes(title="times as long as tuned", col=1)
    return Panel(figure, _table(recording), _sentence(recording, rivals))


def _timed(recording: Recording, target: str, rival: str) -> list[Row]:
    return [row for row in recording.select(kind="layer", target=target, config_name=rival) if "ratio" in row]


def _draw(figure: Any, rows: list[Row], target: str, number: int, column: int) -> None:
    """The line of the target of that number: hollow markers where the looks begin anew."""
    look, ratios = SERIES[number % len(SERIES)], [row["ratio"] for row in rows]
    bars = error_bars(ratios, *([row[end] for row in rows] for end in ("ratio_low", "ratio_high")))
    figure.add_scatter(
        x=[row["num_tokens"] for row in rows], y=ratios, mode="lines+markers", name=target, legendgroup=target,
        showlegend=column == 1, line=look.line(1.5), marker=look.marker(7, hollow=number >= len(SERIES)), error_y=bars,
        hovertemplate=f"{target}, %{{x}} tokens: %{{y:.3f}}<extra></extra>", row=1, col=column,
    )  # fmt: skip


def _table(recording: Recording) -> list[Row]:
    """The summaries, one row per target and rival."""
    return [
        {
            "target": row["target"], "over": TITLES[row["over"]], "batch sizes": row["batch_sizes"],
            "geometric mean": row.get("geometric_mean"), "smallest": row.get("smallest"), "at": row.get("smallest_at"),
            "largest": row.get("largest"), "faster": row.get("faster"), "ties": row.get("ties"),
            "slower at": ", ".join(map(str, row["slower_at"])),
        }
        for row in recording.select(kind="summary")
    ]  # fmt: skip


def _short(recording: Recording) -> str:
    slower = sum(len(row["slower_at"]) for row in recording.select(kind="summary", over="default"))
    return "never slower than the default" if not slower else f"slower than the default in {counted(slower, 'cell')}"


def _sentence(recording: Recording, rivals: list[str]) -> str:
    parts = []
    for rival in rivals:
        rows = [r for t in recording.select(kind="summary", over=rival) for r in _timed(recording, t["target"], rival)]
        if not rows:
            parts.append(f"{TITLES[rival]} could not be timed")
            continue
        mean, ties = geometric_mean([row["ratio"] for row in rows]), sum(row["tie"] for row in rows)
        slower = sum(row["ratio_high"] < 1 for row in rows)
        parts.append(
            f"{TITLES[rival]} takes **{mean:.3f} times** as long (geometric mean of {counted(len(rows), 'cell')}; "
            f"{ties} ties; tuned is slower beyond its interval in {slower})"
        )
    return "; ".join(parts) + ". A cell is a target at a batch size; a tie is an interval of the ratio that holds 1."
