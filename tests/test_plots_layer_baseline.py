"""plots.layer over every implementation: who wins, who ties, who is left out, follows the rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import made_recordings as made
import pytest

from moelab import recordings
from moelab.plots import Panel
from moelab.plots import layer as plots
from moelab.plots.style import LOOKS
from moelab.recordings import Recording
from moelab.roofline import load_ceilings

AT = load_ceilings("NVIDIA_H200", "floors")
SHAPE = "scout/tp4"
WHOLE = made.layer_baseline()


def made_of(*rows: dict) -> Recording:
    return Recording("layer_baseline", made.PROVENANCE, {}, rows)


def cell(batch: int = 1, **us: float) -> list[dict]:
    return [made.baseline_row(SHAPE, batch, impl, time) for impl, time in us.items()]


PANELS: dict[str, Callable[[Recording], Panel]] = {
    "implementations": lambda found: plots.implementations(found, AT),
    "fastest": plots.fastest,
    "eager": plots.eager_over_graph,
}


test_every_panel_is_whole = made.each_is_whole(
    PANELS, made=WHOLE, cell=made_of(*cell(triton=50.0, gated=40.0)), shipped=recordings.load("layer_baseline")
)


def test_every_implementation_has_a_look_of_its_own() -> None:
    from moelab.suites.layer_baseline import IMPLS

    drawn = [LOOKS[impl] for impl in IMPLS]
    assert len({look.color for look in drawn}) == len({look.symbol for look in drawn}) == len(IMPLS)


# --- who wins -----------------------------------------------------------------------------------------------------


def test_the_fastest_wins_and_a_tie_is_a_tie() -> None:
    (clear,) = plots.winners(made_of(*cell(triton=50.0, gated=40.0, tma=45.0)))
    assert (clear["fastest"], clear["tied with it"], clear["over classic"]) == ("gated", "", pytest.approx(0.8))
    (tied,) = plots.winners(made_of(*cell(triton=50.0, gated=40.0, tma=40.1)))
    assert (tied["fastest"], tied["tied with it"]) == ("gated", "tma")


def test_what_is_past_its_bound_never_wins() -> None:
    wrong = made.baseline_row(SHAPE, 1, "gated_atomic_out", 10.0, within_bound=False)
    panel = plots.fastest(made_of(*cell(triton=50.0, gated=40.0), wrong))
    assert panel.table[0]["fastest"] == "gated" and panel.table[0]["faster, past its bound"] == "gated_atomic_out"
    assert panel.sentence.endswith("In 1 cell something faster is left out, its error past the bound.")
    means = plots.implementations(made_of(*cell(triton=50.0), wrong), AT).sentence
    assert "gated_atomic_out" in means and "(past its bound in 1 cell)" in means
    assert plots.winners(made_of(wrong)) == []


def test_what_was_refused_is_said_and_wins_nothing() -> None:
    refused = {"shape": SHAPE, "num_tokens": 1, "impl": "tma", "within_bound": None, "refused": "ConfigError: no"}
    found = made_of(*cell(1, triton=50.0, tma=60.0)[:1], refused, *cell(4, triton=60.0, tma=50.0))
    assert [row["fastest"] for row in plots.winners(found)] == ["triton", "tma"]
    assert "tma" in (said := plots.implementations(found, AT).sentence) and "(refused in 1 cell)" in said


def test_nothing_gained_is_said() -> None:
    said = plots.fastest(made_of(*cell(triton=50.0, gated=60.0))).sentence
    assert made.numbers(said) == [1, 1, 1, 0] and "Nothing gains" in said


def test_gains_are_counted_over_the_classic_layer() -> None:
    said = plots.fastest(made_of(*cell(1, triton=50.0, gated=49.0), *cell(4, triton=80.0, gated=60.0))).sentence
    assert made.numbers(said)[4:] == [2, 5, 1, 0.75, 4] and "(gated, scout/tp4, batch 4)" in said
    tied = plots.fastest(made_of(*cell(1, triton=50.0, gated=49.99), *cell(4, triton=80.0, gated=60.0, tma=60.1)))
    assert "beaten in 1 cell," in tied.sentence, "a tie with the classic layer is no gain, one with another is"


def test_cells_are_coloured_once() -> None:
    """Each cell lies in one heat map: the winner's colour, or grey where it is a tie."""
    found = made_of(
        *cell(1, triton=50.0, gated=40.0), *cell(4, triton=50.0, gated=50.0), *cell(16, triton=30.0, gated=50.0)
    )
    decided, ties = (trace.z[0] for trace in plots.fastest(found).figure.data if trace.type == "heatmap")
    assert [math.isnan(a) + math.isnan(b) for a, b in zip(decided, ties, strict=True)] == [1, 1, 1]
    assert [math.isnan(z) for z in ties] == [True, False, True]


# --- over the floor and eagerly -----------------------------------------------------------------------------------


def test_a_layer_at_twice_the_floor_says_two() -> None:
    row = made.baseline_row(SHAPE, 1, "triton", 1.0)
    slow = made_of(*cell(triton=2 * row["bytes"] / AT.copy_bytes_per_s * 1e6))
    panel = plots.implementations(slow, AT)
    assert panel.table[0]["1"] == pytest.approx(2.0) and list(panel.figure.data[-1].text) == ["2.00"]


def test_eager_is_over_the_graph() -> None:
    rows = [made.baseline_row(SHAPE, 1, "triton", 20.0, 60.0), made.baseline_row(SHAPE, 1, "gated", 20.0, 40.0),
            made.baseline_row(SHAPE, 64, "triton", 200.0), made.baseline_row(SHAPE, 64, "gated", 200.0)]  # fmt: skip
    panel = plots.eager_over_graph(made_of(*rows))
    assert {row["implementation"]: row["1"] for row in panel.table} == pytest.approx({"triton": 3.0, "gated": 2.0})
    assert "from batch 64 on within 5 %" in panel.sentence and "scout/tp4 gated 40 µs" in panel.sentence
    assert "at batch 1 still 2.45 times" in plots.eager_over_graph(made_of(*rows[:2])).sentence


def test_the_map_marks_what_is_past_its_bound_or_lacks_a_shape() -> None:
    rows = [*cell(1, gated=40.0, triton=50.0), {**cell(1, triton=50.0)[0], "shape": "another"},
            made.baseline_row(SHAPE, 4, "gated", 50.0, within_bound=False)]  # fmt: skip
    panel = plots.implementations(made_of(*rows), AT)
    text = panel.figure.data[-1]
    said = dict(zip(zip(text.y, text.x, strict=True), text.text, strict=True))
    assert said["gated", "1"].endswith("*") and said["gated", "4"].endswith("†") and said["triton", "1"][-1].isdigit()
    assert "past its error bound" in panel.figure.layout.title.subtitle.text
