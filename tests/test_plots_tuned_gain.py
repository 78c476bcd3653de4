"""plots.tuned_gain: every cell that was timed is drawn with its interval, and the words count ties and losses."""

from __future__ import annotations

import pytest

from moelab.plots import tuned_gain as plots
from moelab.recordings import Recording

PROVENANCE = {"gpu": "SYNTHETIC", "triton": "3.6.0", "date": "2026-11-21"}


def layer(target: str, num_tokens: int, over: str, *ratio: float) -> dict:
    row = {"kind": "layer", "target": target, "num_tokens": num_tokens, "config_name": over}
    if ratio:
        middle, low, high = ratio
        row |= {"ratio": middle, "ratio_low": low, "ratio_high": high, "tie": low <= 1 <= high}
    return row


def summary(target: str, over: str, slower_at: list[int]) -> dict:
    return {
        "kind": "summary",
        "target": target,
        "over": over,
        "batch_sizes": 2,
        "geometric_mean": 1.5,
        "slower_at": slower_at,
    }


def made(*more: dict, slower_at: list[int] | None = None) -> Recording:
    rows = (
        layer("a", 1, "default", 2.0, 1.9, 2.1), layer("a", 64, "default", 1.125, 1.1, 1.2),
        layer("a", 1, "shipped", 1.01, 0.99, 1.02), layer("a", 64, "shipped"),
        summary("a", "default", slower_at or []), summary("a", "shipped", []), *more,
    )  # fmt: skip
    return Recording("tuned_gain", PROVENANCE, {}, rows)


def test_a_plot_for_each_rival_with_what_was_timed() -> None:
    figure = plots.gains(made()).figure
    default, shipped = figure.data
    assert (list(default.x), list(default.y)) == ([1, 64], [2.0, 1.125]) and list(shipped.x) == [1]
    assert default.error_y.array == pytest.approx([0.1, 0.075]) and default.error_y.arrayminus == pytest.approx(
        [0.1, 0.025]
    )
    assert (
        "never slower than the default" in figure.layout.title.text and "SYNTHETIC" in figure.layout.title.subtitle.text
    )


def test_words_count_means_ties_and_losses() -> None:
    panel = plots.gains(made())
    assert "sglang’s default takes **1.500 times** as long (geometric mean of 2 cells; 0 ties" in panel.sentence
    assert "ships takes **1.010 times** as long (geometric mean of 1 cell; 1 ties" in panel.sentence
    assert [row["over"] for row in panel.table] == ["sglang’s default", "the file that sglang ships"]
    loses = plots.gains(made(layer("b", 1, "default", 0.9, 0.8, 0.95), summary("b", "default", [1])))
    assert "slower than the default in 1 cell" in loses.figure.layout.title.text
    assert "slower beyond its interval in 1" in loses.sentence


def test_more_targets_than_looks_are_told_apart() -> None:
    more = [
        row for i in range(8) for row in (layer(f"t{i}", 1, "default", 1.5, 1.4, 1.6), summary(f"t{i}", "default", []))
    ]
    lines = [t for t in plots.gains(made(*more)).figure.data if t.xaxis == "x"]
    assert len({(t.marker.symbol, t.line.color) for t in lines}) == len(lines) == 9


def test_a_rival_that_was_never_timed_is_said() -> None:
    rows = (layer("a", 1, "shipped"), summary("a", "shipped", []))
    assert "could not be timed" in plots.gains(Recording("tuned_gain", PROVENANCE, {}, rows)).sentence
