"""plots.tuned_gain: every cell that was timed is drawn, ties grey, and the words count ties and losses."""

from __future__ import annotations

from moelab import recordings
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


def test_a_row_for_each_rival_and_target_with_what_was_timed() -> None:
    figure = plots.gains(made()).figure
    clear, ties, text = figure.data
    assert (list(clear.y), list(clear.x)) == (["default, a", "shipped file, a"], ["1", "64"])
    assert [[v == v for v in line] for line in clear.z] == [[True, True], [False, False]]
    assert [[v == v for v in line] for line in ties.z] == [[False, False], [True, False]]
    assert dict(zip(zip(text.y, text.x, strict=True), text.text, strict=True)) == {
        ("default, a", "1"): "2.00", ("default, a", "64"): "1.12", ("shipped file, a", "1"): "1.01",
    }  # fmt: skip
    assert [line.y0 for line in figure.layout.shapes] == [0.5], "a line where another rival begins"
    title = figure.layout.title
    assert title.text.endswith("never slower than the default, which takes 1.50 times as long")
    assert "SYNTHETIC" in title.subtitle.text


def test_words_count_means_ties_and_losses() -> None:
    panel = plots.gains(made())
    assert "sglang’s default takes **1.500 times** as long (geometric mean of 2 cells; 0 ties" in panel.sentence
    assert "ships takes **1.010 times** as long (geometric mean of 1 cell; 1 ties" in panel.sentence
    assert [row["over"] for row in panel.table] == ["sglang’s default", "the file that sglang ships"]
    loses = plots.gains(made(layer("b", 1, "default", 0.9, 0.8, 0.95), summary("b", "default", [1])))
    assert "slower than the default in 1 cell" in loses.figure.layout.title.text
    assert "slower beyond its interval in 1" in loses.sentence


def test_seven_targets_have_a_row_each() -> None:
    more = [
        row for i in range(6) for row in (layer(f"t{i}", 1, "default", 1.5, 1.4, 1.6), summary(f"t{i}", "default", []))
    ]
    rows = list(plots.gains(made(*more)).figure.data[0].y)
    assert rows == ["default, a", *(f"default, t{i}" for i in range(6)), "shipped file, a"]


def test_a_rival_that_was_never_timed_is_said() -> None:
    rows = (layer("a", 1, "shipped"), summary("a", "shipped", []))
    panel = plots.gains(Recording("tuned_gain", PROVENANCE, {}, rows))
    assert "could not be timed" in panel.sentence and panel.figure is None
    timed = (*rows, layer("b", 1, "shipped", 1.1, 1.05, 1.2), summary("b", "shipped", []))
    title = plots.gains(Recording("tuned_gain", PROVENANCE, {}, timed)).figure.layout.title.text
    assert title.endswith("the default was not timed")


def test_the_shipped_recording_draws_every_target() -> None:
    found = recordings.load("tuned_gain")
    rows = list(plots.gains(found).figure.data[0].y)
    summaries = found.select(kind="summary")
    assert sorted(rows) == sorted(f"{plots.SHORT[row['over']]}, {row['target']}" for row in summaries)
