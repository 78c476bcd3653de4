"""plots.tuner_regret: lines, bands and words are those of the recording."""

from __future__ import annotations

import dataclasses

import pytest
from made_recordings import numbers

from moelab.plots import tuner_regret as plots
from moelab.recordings import Recording

PROVENANCE = {"gpu": "SYNTHETIC", "triton": "3.6.0", "date": "2026-11-21"}


def end(strategy: str, samples: int, worst: float, **more: float) -> dict:
    return {
        "kind": "end", "landscape": "a", "strategy": strategy, "seed": 0, "samples": samples, "seconds": samples / 100,
        "median": 0.0, "worst": worst, **more,
    }  # fmt: skip


def curve(strategy: str, at: float, worst: list) -> dict:
    return {
        "kind": "curve", "landscape": "a", "strategy": strategy, "axis": "samples", "at": at, "median": [0.0] * 3,
        "worst": worst,
    }  # fmt: skip


ROWS = (
    end("grid", 1000, 0.005), end("forest", 100, 0.01, other_median=0.001, other_worst=0.012), end("random", 150, 0.05),
    curve("forest", 50.0, [0.1, None, None]), curve("forest", 80.0, [0.02, 0.03, None]),
    curve("forest", 100.0, [0.0, 0.01, 0.04]),
)  # fmt: skip
RECORDED = Recording(
    "tuner_regret",
    PROVENANCE,
    {"seeds": 1, "compile_processes": 15, "batch_sizes": {"a": [1, 64]}, "quantiles": [0.1, 0.5, 0.9]},
    ROWS,
)


def test_a_line_where_half_have_a_choice_and_a_band_where_nearly_all_have() -> None:
    panel = plots.curves(RECORDED)
    band, line = (t for t in panel.figure.data if t.legendgroup == "forest" or t.fill == "toself")
    assert list(line.x) == [80.0, 100.0] and list(line.y) == pytest.approx([3.0, 1.0])
    assert list(band.x) == [100.0, 100.0] and list(band.y) == pytest.approx([4.0, 100 * plots.SMALLEST])


def test_words_and_table_say_what_each_takes_and_loses() -> None:
    panel = plots.curves(RECORDED)
    assert numbers(panel.sentence)[:4] == [
        1.0,
        1.2,
        100,
        10.0,
    ]  # forest: regret, by other runs, samples, share of the grid's
    assert "forest stays within 2 % on the fewest samples" in panel.figure.layout.title.text
    assert [row["strategy"] for row in panel.table] == ["forest", "random", "grid"]


def test_without_a_good_one_or_a_grid_the_words_claim_neither() -> None:
    bad = dataclasses.replace(RECORDED, rows=(end("random", 150, 0.05),))
    panel = plots.curves(bad)
    assert "none within 2 %" in panel.figure.layout.title.text and "grid’s" not in panel.sentence


def test_races_that_ran_are_judged_in_the_sentence() -> None:
    ran = tuple(
        {"kind": "run", "landscape": "a", "run": "b", "num_tokens": b, "regret": regret}
        for b, regret in ((1, 0.002), (8, 0.012), (64, 0.0), (256, None))
    )
    panel = plots.curves(dataclasses.replace(RECORDED, rows=(*ROWS, *ran)))
    assert numbers(panel.sentence)[-4:] == [3, 0.2, 1.2, 8]
    assert "over 2 batch sizes" in panel.figure.layout.title.text
    assert "ran on a GPU" not in plots.curves(RECORDED).sentence
