"""plots.fast_layer, fast_beside, fast_ideas: what is ahead, tied, behind or kept apart follows the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from made_recordings import each_is_whole

from moelab import recordings
from moelab.config import KernelConfig, default_config
from moelab.plots import Panel, fast_beside, fast_ideas, fast_layer, ratio_map
from moelab.recordings import Recording
from moelab.roofline import Ceilings

PROVENANCE = {"gpu": "SYNTHETIC", "triton": "3.6.0", "date": "2026-11-21"}
AT = Ceilings(copy_bytes_per_s=1e12, flops_per_s=1e15, device="made up", source="made up")
BYTES = 10e6
"""Of every row: 10 µs at 1 TB/s, the floor."""

DEFAULT, TUNED = default_config(1, 8), KernelConfig(16, 64, 128, 1)
SMALL = "Instance(warpgroups=1, row_blocks=1, stages=12, tokens=8, grain=8, box=8, per_processor=2)"
WIDE = "Instance(warpgroups=2, row_blocks=1, stages=10, tokens=48, grain=16, box=16, per_processor=1)"


def row(shape: str, num_tokens: int, impl: str, us: float, routing: str = "uniform", **more: object) -> dict:
    """Samples within 1 % of `us`, so that two rows under 1 % apart tie; a field given as None is left out."""
    samples = [us * (1 + 0.005 * (i - 4) / 4) for i in range(9)]
    fields = {
        "shape": shape, "num_tokens": num_tokens, "routing": routing, "impl": impl, "bytes": BYTES, "flops": 1e6,
        "within_bound": True, "samples_us": samples, **more,
    }  # fmt: skip
    return {name: value for name, value in fields.items() if value is not None}


def classic(
    shape: str, num_tokens: int, us: float, routing: str = "uniform", config: KernelConfig = TUNED, tried: int = 2
) -> dict:
    both = {"config": config.to_json(), "down_config": config.to_json(), "tried": tried}
    return row(shape, num_tokens, "classic", us, routing, **both)


def made(*rows: dict, suite: str = "fast_layer") -> Recording:
    return Recording(suite, PROVENANCE, {}, rows)


WHOLE = made(
    classic("a", 1, 20.0), row("a", 1, "fast", 25.0), row("a", 1, "grouped_mm", 40.0),
    classic("a", 64, 30.0), row("a", 64, "fast", 20.0), row("a", 64, "grouped_mm", 60.0),
    classic("b", 1, 20.0, config=DEFAULT, tried=1), row("b", 1, "fast", 10.0), row("b", 1, "grouped_mm", 30.0),
    classic("a", 1, 20.0, "zipf"), row("a", 1, "fast", 20.02, "zipf"), row("a", 1, "grouped_mm", 50.0, "zipf"),
    row("a", 1, "fast without one launch", 50.0), row("a", 64, "fast without one launch", 20.0),
    row("b", 1, "fast without one launch", 12.5), row("b", 1, "fast without a trick", 8.0),
    row("a", 1, "classic, from logits", 33.0, within_bound=None), row("a", 1, "fast, from logits", 29.0, within_bound=None),
)  # fmt: skip


PANELS: dict[str, Callable[[Recording], Panel]] = {
    "beside_classic": fast_beside.beside_classic,
    "from_logits": fast_beside.from_logits,
    "ablation": fast_ideas.ablation,
}


test_every_panel_is_whole = each_is_whole(PANELS, made=WHOLE, shipped=recordings.load("fast_layer"))


@pytest.mark.parametrize("name", PANELS)
def test_nothing_timed_is_said(name: str) -> None:
    refused = {"shape": "a", "num_tokens": 1, "routing": "uniform", "refused": "ConfigError: no"}
    panel = PANELS[name](made(refused))
    assert panel.figure is None and panel.table == [] and panel.sentence == fast_layer.NOTHING


# --- shapes and batch sizes -----------------------------------------------------------------------------------------


def test_runs_of_batch_sizes() -> None:
    assert fast_layer.runs_of([1, 4, 64], [1, 4, 16, 64]) == "1–4, 64"
    assert fast_layer.runs_of([], [1]) == ""


def test_default_only_is_one_config_tried_and_the_default_in_both_gemms() -> None:
    assert fast_layer.default_only(WHOLE) == ["b"]
    several, tuned = classic("c", 1, 9.0, config=DEFAULT, tried=2), classic("c", 1, 9.0, tried=1)
    down = classic("c", 1, 9.0, config=DEFAULT, tried=1) | {"down_config": TUNED.to_json()}
    assert fast_layer.default_only(made(several, tuned, down)) == []
    many = classic("c", 64, 9.0, config=default_config(64, 8), tried=1)
    assert fast_layer.default_only(made(many)) == ["c"]


# --- cell by cell -------------------------------------------------------------------------------------------------


def test_verdicts_and_ratios_of_cells() -> None:
    table = fast_beside.outcomes(WHOLE)
    found = [(r["routing"], r["shape"], r["batch"], r["fast is"]) for r in table]
    assert found == [
        ("uniform", "a", 1, "slower"), ("uniform", "a", 64, "faster"), ("uniform", "b", 1, "faster"),
        ("zipf", "a", 1, "tie"),
    ]  # fmt: skip
    assert [r["classic / fast"] for r in table] == pytest.approx([0.8, 1.5, 2.0, 0.999], abs=1e-3)
    assert (table[0]["classic’s configs"], table[2]["tried"]) == ("16x64x128 g1 w4 s3 / 16x64x128 g1 w4 s3", 1)


def test_what_is_past_its_bound_is_no_contest() -> None:
    wrong = made(classic("a", 1, 20.0), row("a", 1, "fast", 5.0, within_bound=False), *WHOLE.rows[3:5])
    assert [(r["shape"], r["batch"]) for r in fast_beside.outcomes(wrong)] == [("a", 64)]


def test_a_map_for_each_routing_with_ties_grey_and_the_untuned_apart() -> None:
    panel = fast_beside.beside_classic(WHOLE)
    uniform, uniform_ties, zipf, zipf_ties = (t for t in panel.figure.data if t.type == "heatmap")
    assert list(uniform.y) == ["a", "b<br>classic: default only"] and list(uniform.x) == ["1", "64"]
    assert [[v == v for v in line] for line in uniform.z] == [[True, True], [True, False]]
    assert all(v != v for line in uniform_ties.z for v in line) and zipf.z[0][0] != zipf.z[0][0]
    assert zipf_ties.z[0][0] == zipf_ties.z[0][0] and zipf_ties.colorscale[0][1] == ratio_map.TIED
    texts = [list(t.text) for t in panel.figure.data if t.type == "scatter"]
    assert texts == [["0.80", "1.50", "2.00"], ["1.00"]]
    assert [shape.y0 for shape in panel.figure.layout.shapes] == [0.5, 0.5]  # above b, which comes last
    title = panel.figure.layout.title.text
    assert title.endswith("faster in 1, level in 1 and slower in 1 of 3 cells where classic is tuned")


def test_words_count_the_untuned_apart() -> None:
    said = fast_beside.beside_classic(WHOLE).sentence
    assert "faster in 1, level in 1 and slower in 1 of 3 cells where classic is tuned" in said
    assert "0.80 (a, batch 1, uniform) to 1.50 (a, batch 64, uniform)" in said
    assert "uniform 1.095, zipf 0.999" in said and "0/2 at 1, 1/1 at 64." in said
    assert "b, faster in 1, level in 0 and slower in 0 of 1 cell, 2.00 on average" in said and "tuned since" not in said
    assert "apart" not in fast_beside.beside_classic(made(*WHOLE.rows[:6])).sentence
    untuned = fast_beside.beside_classic(made(*WHOLE.rows[6:9]))
    assert untuned.figure.layout.title.text.endswith("of 1 cell, none tuned")


def test_a_form_that_is_faster_than_what_serves_is_said() -> None:
    """Beyond the intervals, and only where its result is right."""
    best = {
        "a": row("a", 64, "fast, best instance", 16.0, instance=WIDE),
        "b": row("b", 1, "fast, best instance", 9.99),
    }
    wrong = row("a", 1, "fast, best instance", 1.0, within_bound=False)
    said = fast_beside.beside_classic(made(*WHOLE.rows, *best.values(), wrong)).sentence
    assert "faster than what serves: 1 cell (25.0 % at a, batch 64, uniform)." in said
    assert "what serves" not in fast_beside.beside_classic(WHOLE).sentence


def test_what_a_tuned_config_would_leave_is_reckoned_from_the_other_recording() -> None:
    gain = {"kind": "layer", "target": "b", "num_tokens": 1, "config_name": "default", "ratio": 1.6}
    other = gain | {"num_tokens": 64, "ratio": 9.0}
    said = fast_beside.beside_classic(WHOLE, made(gain, other, suite="tuned_gain")).sentence
    assert "b, tuned since" in said and "takes 1.60 times the tuned pair’s" in said and "leave 1.25 of the 2.00" in said


def test_a_cell_says_more_digits_where_two_would_hide_a_difference() -> None:
    assert ratio_map.cell_of(1.003, False).text == "1.003" and ratio_map.cell_of(1.003, True).text == "1.00"
    assert ratio_map.cell_of(0.984, False).text == "0.98"


def test_text_is_dark_on_light_and_white_on_dark() -> None:
    cells = {("a", 1): ratio_map.Cell(0.5, "", False), ("a", 4): ratio_map.Cell(2.0, "", False),
             ("a", 16): ratio_map.Cell(0.5, "", True)}  # fmt: skip
    colors = [ratio_map.colors_of(cell, ratio_map.span_of(cells), "#0072B2", "#E69F00") for cell in cells.values()]
    assert [text for text, _ in colors] == ["#ffffff", "#222222", "#222222"]


def test_colours_span_a_quarter_at_least_and_the_largest_ratio() -> None:
    def span(*ratios: float, tie: bool = False) -> float:
        return ratio_map.span_of({("a", i): ratio_map.Cell(r, "", tie) for i, r in enumerate(ratios)})

    assert span(1.01) == span(9.0, tie=True) == ratio_map.LEAST_SPAN
    assert span(0.5, 1.5) == pytest.approx(0.6931, abs=1e-4)


# --- from logits --------------------------------------------------------------------------------------------------


def test_microseconds_from_logits_beside_the_mark() -> None:
    panel = fast_beside.from_logits(WHOLE, shape="a")
    (text,) = (t for t in panel.figure.data if t.type == "scatter")
    assert list(text.text) == ["<b>29.0</b><br>33.0"]
    assert (
        "29.0 µs (28.9 to 29.1), under 30." in panel.sentence and "33.0 µs (32.9 to 33.1), over 30." in panel.sentence
    )
    at = fast_beside.from_logits(WHOLE, shape="a", mark_us=29.0).sentence
    assert "29.0 µs (28.9 to 29.1), not to be told from 29" in at
    assert "at one token" not in fast_beside.from_logits(WHOLE, shape="nothing").sentence


# --- ideas --------------------------------------------------------------------------------------------------------


def test_an_idea_is_worth_the_mean_over_shapes_where_most_agree() -> None:
    panel = fast_ideas.ablation(WHOLE)
    clear, ties = (t for t in panel.figure.data if t.type == "heatmap")
    assert list(clear.y) == ["one launch", "a trick"]
    (text,) = (t for t in panel.figure.data if t.type == "scatter")
    # batch 1: sqrt(2 * 1.25); batch 64: a alone, no difference; the trick: b alone, and faster without
    assert dict(zip(zip(text.y, text.x, strict=True), text.text, strict=True)) == {
        ("one launch", "1"): "1.58", ("one launch", "64"): "1.00 (1)", ("a trick", "1"): "0.80 (1)",
    }  # fmt: skip
    assert clear.z[0][1] != clear.z[0][1] and ties.z[0][1] == ties.z[0][1]
    assert "one launch 1.58 at batch 1.**" in panel.sentence
    assert "a trick at batch 1, 0.80 at 1." in panel.sentence and "one launch, 2.00 (a, batch 1)." in panel.sentence
    assert panel.figure.layout.title.text.endswith("one launch most, 1 of 2 nothing")
    assert list(panel.table[0]) == ["without", "shape", "1", "64"]
    assert panel.table[0] == {"without": "one launch", "shape": "a", "1": pytest.approx(2.0), "64": pytest.approx(1.0)}


def test_an_idea_that_shapes_disagree_on_is_worth_nothing() -> None:
    rows = [row("a", 1, "fast", 10.0), row("b", 1, "fast", 10.0)]
    rows += [row("a", 1, "fast without it", 14.0), row("b", 1, "fast without it", 10.0)]
    panel = fast_ideas.ablation(made(*rows))
    assert panel.sentence.startswith("**No idea shows a gain.** Worth nothing that most shapes agree on: it.")
    assert panel.figure.layout.title.text.endswith("nothing that shows")
    small = [row(shape, 1, "fast", 10.0) for shape in "ab"]
    small += [row(shape, 1, "fast without it", 10.08, samples_us=[10.08] * 9) for shape in "ab"]
    assert "**No idea shows a gain.**" in fast_ideas.ablation(made(*small)).sentence


def test_an_ablation_past_its_bound_or_without_its_whole_is_left_out() -> None:
    wrong = row("a", 1, "fast without it", 14.0, within_bound=False)
    assert fast_ideas.ablation(made(row("a", 1, "fast", 10.0), wrong)).figure is None
    assert fast_ideas.ablation(made(row("a", 1, "fast without it", 14.0))).figure is None


# --- forms --------------------------------------------------------------------------------------------------------


def test_ties_are_judged_by_the_samples() -> None:
    """The same medians with wider samples are a tie."""
    wide = [20.0 + 2 * (i - 4) for i in range(9)]
    rows = (dict(WHOLE.rows[0]) | {"samples_us": wide}, dict(WHOLE.rows[1]) | {"samples_us": [w + 5 for w in wide]})
    (found,) = fast_beside.outcomes(dataclasses.replace(WHOLE, rows=rows))
    assert found["fast is"] == "tie" and found["classic / fast"] == pytest.approx(0.8)
