"""The recording tuned_gain drawn: how many times as long each rival takes as the tuned pair, batch size by batch size."""

from __future__ import annotations

import itertools

from moelab.errors import counted
from moelab.plots import ratio_map
from moelab.plots.panel import Panel, Row, geometric_mean
from moelab.plots.style import BETTER, GREY, WORSE, grid
from moelab.recordings import Recording

TITLES = {
    "default": "sglang’s default",
    "shipped": "the file that sglang ships",
    "second": "an independent run’s choice",
}
"""Rivals in order, and what each is called."""

SHORT = {"default": "default", "shipped": "shipped file", "second": "second run"}
"""Each rival's name beside its rows of the map."""


def gains(recording: Recording) -> Panel:
    """Map of rival and target by batch: the rival's time over the tuned pair's; over 1 the tuned pair is faster, grey is a tie.

    What was not within its error bound was not timed, and its cell is empty.
    """
    rivals = [name for name in TITLES if recording.select(kind="summary", over=name)]
    targets = list(dict.fromkeys(row["target"] for row in recording.rows))
    found = {
        (f"{SHORT[rival]}, {target}", row["num_tokens"]): ratio_map.Cell(row["ratio"], f"{row['ratio']:.2f}", row["tie"])
        for rival in rivals for target in targets for row in _timed(recording, target, rival)
    }  # fmt: skip
    if not found:
        return Panel(None, _table(recording), _sentence(recording, rivals))
    names = list(dict.fromkeys(name for name, _ in found))
    figure = grid(
        _title(recording, rivals),
        f"{recording.source()}; whole layers, interleaved<br>green, over 1: tuned is faster; orange: it is slower; grey: a tie, "
        "the ratio’s interval holds 1; empty: not timed",
        height=190 + 30 * len(names),
    )  # fmt: skip
    sizes = sorted({num_tokens for _, num_tokens in found})
    ratio_map.draw(figure, found, names, sizes, low=WORSE, high=BETTER, bar="time / tuned", size=11)
    for above, below in itertools.pairwise(names):
        if above.partition(",")[0] != below.partition(",")[0]:  # another rival begins
            figure.add_hline(len(names) - names.index(below) - 0.5, line={"color": GREY, "width": 2})
    figure.update_xaxes(title="batch size, tokens")
    return Panel(figure, _table(recording), _sentence(recording, rivals))


def _timed(recording: Recording, target: str, rival: str) -> list[Row]:
    return [row for row in recording.select(kind="layer", target=target, config_name=rival) if "ratio" in row]


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


def _title(recording: Recording, rivals: list[str]) -> str:
    """How much longer a layer takes under the first rival that was timed, in the mean."""
    times = (
        (r, [row["ratio"] for row in recording.select(kind="layer", config_name=r) if "ratio" in row]) for r in rivals
    )
    rival, ratios = next((rival, ratios) for rival, ratios in times if ratios)
    return f"What tuning gains: under {TITLES[rival]} a layer takes {geometric_mean(ratios):.2f} times as long"


def _sentence(recording: Recording, rivals: list[str]) -> str:
    """For each rival, over plain layers and over quantised ones: the geometric mean of its ratios, ties, and in how many cells
    tuned is slower beyond the interval."""
    parts = []
    for rival in rivals:
        mine = recording.select(kind="summary", over=rival)
        plain = [row for row in mine if row.get("format", "plain") == "plain"]
        of = [("", plain), (" over quantised layers", [row for row in mine if row not in plain])]
        for layers, summaries in ((layers, summaries) for layers, summaries in of if summaries):
            rows = [row for each in summaries for row in _timed(recording, each["target"], rival)]
            ties, slower = sum(row["tie"] for row in rows), sum(row["ratio_high"] < 1 for row in rows)
            mean = f"{geometric_mean([row['ratio'] for row in rows]):.3f}" if rows else "not timed"
            cells = f"{counted(len(rows), 'cell')}, {ties} ties, tuned slower in {slower}"
            parts.append(f"{TITLES[rival]}{layers} {mean} ({cells})")
    return (
        f"**Times as long as the tuned pair of configs (geometric mean): {'; '.join(parts)}.** A cell is a target at a batch "
        "size; a tie is an interval of the ratio that holds 1, slower is beyond it."
    )
