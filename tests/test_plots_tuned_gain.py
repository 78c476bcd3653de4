"""plots.tuned_gain: every cell that was timed is drawn, ties grey, and the words count ties and losses."""

from __future__ import annotations

from made_recordings import numbers
from synthetic import small_problem, synthetic_landscape

from moelab import recordings
from moelab.plots import in_short
from moelab.plots import tuned_gain as plots
from moelab.recordings import Recording
from moelab.tuner.survey import Survey

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
    assert "under sglang’s default a layer takes 1.50 times as long" in figure.layout.title.text
    assert "SYNTHETIC" in figure.layout.title.subtitle.text


def test_words_count_means_ties_and_losses() -> None:
    panel = plots.gains(made())
    assert numbers(panel.sentence)[:8] == [
        1.5,
        2,
        0,
        0,
        1.01,
        1,
        1,
        0,
    ]  # mean, cells, ties, tuned slower; of each rival
    assert [row["over"] for row in panel.table] == ["sglang’s default", "the file that sglang ships"]
    loses = plots.gains(made(layer("b", 1, "default", 0.9, 0.8, 0.95), summary("b", "default", [1])))
    assert numbers(loses.sentence)[3] == 1


def test_quantised_layers_are_summed_up_apart() -> None:
    """A row without a format is plain, as those recorded before formats are."""
    coded = summary("b", "default", []) | {"format": "fp8_w8a8_block_128x128"}
    panel = plots.gains(made(layer("b", 1, "default", 1.25, 1.2, 1.3), coded))
    assert numbers(panel.sentence)[:8] == [1.5, 2, 0, 0, 1.25, 1, 0, 0]
    assert "default over quantised layers 1.250 (1 cell" in panel.sentence
    assert "quantised" not in plots.gains(made()).sentence


def test_quantised_layers_stand_behind_plain_ones_in_05s_answer() -> None:
    survey = Survey(synthetic_landscape(small_problem((1, 64))))
    coded = summary("b", "default", []) | {"format": "fp8_w8a8_channel", "geometric_mean": 1.25}
    said = in_short.search(survey, recordings.load("tuner_regret"), made(coded)).sentence
    assert "so many times as long: 1.50 (a); of quantised layers 1.25 (b)." in said
    assert "quantised" not in in_short.search(survey, recordings.load("tuner_regret"), made()).sentence


def test_seven_targets_have_a_row_each() -> None:
    more = [
        row for i in range(6) for row in (layer(f"t{i}", 1, "default", 1.5, 1.4, 1.6), summary(f"t{i}", "default", []))
    ]
    rows = list(plots.gains(made(*more)).figure.data[0].y)
    assert rows == ["default, a", *(f"default, t{i}" for i in range(6)), "shipped file, a"]


def test_a_rival_that_was_never_timed_is_said() -> None:
    rows = (layer("a", 1, "shipped"), summary("a", "shipped", []))
    panel = plots.gains(Recording("tuned_gain", PROVENANCE, {}, rows))
    assert "not timed" in panel.sentence and panel.figure is None


def test_the_shipped_recording_draws_every_target() -> None:
    found = recordings.load("tuned_gain")
    rows = list(plots.gains(found).figure.data[0].y)
    summaries = found.select(kind="summary")
    assert sorted(rows) == sorted(f"{plots.SHORT[row['over']]}, {row['target']}" for row in summaries)
