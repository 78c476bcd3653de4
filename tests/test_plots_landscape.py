"""plots.landscape and its siblings: they draw what the survey holds, and say so in words."""

from __future__ import annotations

import json
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from synthetic import small_problem, synthetic_landscape

from moelab.plots import landscape as plots
from moelab.plots import landscape_linked as linked
from moelab.plots import loading, style
from moelab.tuner.survey import Survey, cover

BATCHES = (1, 16, 64, 256)


@pytest.fixture(scope="module")
def survey() -> Survey:
    return Survey(synthetic_landscape(small_problem(BATCHES)))


def titles(panel: object) -> str:
    return panel.figure.layout.title.text


def test_the_heat_map_holds_the_best_of_every_batch(survey: Survey) -> None:
    panel = plots.heat_map(survey, "up", rows=6)
    z = np.asarray(panel.figure.data[0].z)
    assert z.shape == (6, len(BATCHES))
    assert np.nanmax(z, axis=0) == pytest.approx(100 * np.ones(len(BATCHES)))
    assert "holds the best GEMM1 config of every batch size" in panel.sentence
    assert panel.table[0]["mean % of best"] >= panel.table[-1]["mean % of best"]


def test_the_heat_map_follows_the_brush(survey: Survey) -> None:
    panel = plots.heat_map(survey, "up", {"BLOCK_SIZE_M": [128], "num_warps": [4, 8]})
    assert "(BLOCK M 128)" in titles(panel)
    assert all(label.startswith("128x") for label in panel.figure.data[0].y)
    assert "loses" in panel.sentence
    nothing = plots.heat_map(survey, "up", {"BLOCK_SIZE_M": [7]})
    assert "No config has these values" in nothing.sentence and nothing.table == []


def test_linked_views_show_the_same_configs(survey: Survey) -> None:
    allowed = {"BLOCK_SIZE_M": [16, 64]}
    points = linked.scatter(survey, "down", 16, allowed, 0.3, "padding")  # waves are not known of the made-up device
    lines = linked.parallel(survey, "down", 16, allowed, 0.3)
    count = len(linked.brushed(survey, "down", 16, allowed, 0.3))
    others, brushed = points.figure.data[:2]
    drawn = [np.asarray(trace.y, dtype=float) for trace in lines.figure.data if trace.mode == "lines"]
    assert count > 0 and len(brushed.x) == count and sum(np.isnan(y).sum() for y in drawn) == count, (
        "a gap after each line"
    )
    best = max(y.reshape(-1, len(linked.PARAMETERS) + 2)[:, -2].max() for y in drawn if y.size)
    assert best == pytest.approx(1, abs=0.3) and drawn[-1].size, "the best ones in the last colour, on top"
    measured = np.isfinite(survey.times["down"][survey.row(16)])
    programs = survey.representative["down"][survey.row(16)] == np.arange(len(measured))
    rest = (measured & programs).sum() - count
    assert 0 < len(others.x) <= rest and f"the other {rest}," in points.figure.layout.title.subtitle.text
    assert brushed.customdata.shape == (count, 13)
    assert set(np.asarray(brushed.customdata)[:, 0]) <= {16.0, 64.0}
    assert f"{count} configs brushed (BLOCK M 16–64)" in titles(points) and f"same {count} configs" in titles(lines)


@hypothesis.given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0.1, 1e5)), max_size=300).map(lambda p: np.array(p).reshape(-1, 2))
)
def test_every_point_has_a_speck_near_it(points: np.ndarray) -> None:
    x, y = linked._apart(points[:, 0], points[:, 1])
    cells = np.array(linked.SPECKS) + 1
    assert len(x) <= min(len(points), cells.prod()) and {*zip(x, y, strict=True)} <= {*map(tuple, points)}
    if len(points):
        place = np.column_stack([points[:, 0], np.log(points[:, 1])])
        drawn = np.column_stack([x, np.log(y)])
        size = np.maximum(np.ptp(place, axis=0), 1e-9) / linked.SPECKS
        assert (np.abs(place[:, None] - drawn[None]) <= size * (1 + 1e-9)).all(axis=2).any(axis=1).all()


def test_a_long_selection_is_cut_and_says_so(survey: Survey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linked, "SHOWN", 7)
    count = len(linked.brushed(survey, "up", 64, {}, 10.0))
    points, lines = (draw(survey, "up", 64, {}, 10.0) for draw in (linked.scatter, linked.parallel))
    assert f"fastest 7 of {count} configs" in titles(points) and f"fastest 7 of {count} configs" in titles(lines)
    assert len(points.figure.data[1].x) == 7


def test_nothing_brushed_is_said(survey: Survey) -> None:
    allowed = {"BLOCK_SIZE_M": [7]}
    assert "No config of the selection" in linked.scatter(survey, "up", 1, allowed, 0.1).sentence
    assert "No config is brushed" in linked.parallel(survey, "up", 1, allowed, 0.1).sentence


@pytest.mark.parametrize("x", linked.AXES)
def test_every_axis_draws(survey: Survey, x: str) -> None:
    assert linked.AXES[x][0] == linked.scatter(survey, "up", 64, {}, 10.0, x).figure.layout.xaxis.title.text


def test_plateaus_and_covers_agree(survey: Survey) -> None:
    panel = plots.plateaus(survey)
    for gemm, name in plots.GEMM_NAMES.items():
        for within in plots.WITHIN:
            rows = [r for r in panel.table if r["GEMM"] == name and r["within"] == f"{within:.0%}"]
            assert len(rows) == rows[0]["configs needed"] == len(cover(survey, gemm, within).chosen)
            assert f"{len(rows)} within {within:.0%}" in panel.sentence


def test_importance_only_where_the_grid_is_whole(survey: Survey) -> None:
    panel = plots.importances(survey)
    assert [row["batch"] for row in panel.table] == [*BATCHES, *BATCHES]
    few = synthetic_landscape(small_problem(BATCHES))
    rows = tuple(r for i, r in enumerate(few.rows) if not r.outcome.samples_us or i % 3 == 0)
    nothing = plots.importances(Survey(replace(few, rows=rows)))
    assert nothing.figure is None and "nothing is said" in nothing.sentence


def test_the_floors_name_is_where_the_floor_is(survey: Survey, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a log axis an annotation counts in powers of ten: the name stood at 10**floor, in no picture."""
    monkeypatch.setattr(Survey, "floor_us", lambda *_: 12.5)
    figure = linked.scatter(survey, "up", 64, {}, 10.0, "padding").figure
    (name,), (low, high) = figure.layout.annotations, figure.layout.yaxis.range
    assert name.text == "floor" and name.y == pytest.approx(np.log10(12.5)) and low < name.y < high


def test_shares_can_be_read_on_their_ground() -> None:
    """Plotly's own choice was white on grey, 3.3."""
    colors = [style.on_scale(share / 100) for share in range(101)]
    assert [colors[0], colors[50], colors[100]] == [color for _, color in style.SCALE]
    assert min(style.contrast(style.text_on(color), color) for color in colors) >= 4.5


def test_importance_writes_each_share_in_its_cell(survey: Survey) -> None:
    heat, text = plots.importances(survey).figure.data[:2]
    places = {at: float(share) for at, share in zip(zip(text.x, text.y, strict=True), text.text, strict=True)}
    for row, name in enumerate(heat.y):
        for column, batch in enumerate(heat.x):
            assert places[batch, name] == pytest.approx(float(heat.z[row][column]), abs=0.51)
    assert "per cent" in plots.importances(survey).figure.layout.title.subtitle.text


def test_batch_labels_have_room(survey: Survey) -> None:
    """Nineteen labels in half a figure were turned by 60 degrees."""
    axis = plots.plateaus(survey).figure.layout.xaxis
    assert list(axis.tickvals) == ["256", "16"] and axis.tickangle == 0


def test_figures_are_small(survey: Survey) -> None:
    """A saved notebook holds them: without plotly's template, and with packed arrays."""
    panels = [
        linked.scatter(survey, "up", 64, {}, 10.0),
        linked.parallel(survey, "up", 64, {}, 10.0),
        plots.heat_map(survey, "up"),
    ]
    assert sum(len(json.dumps(panel.bundles())) for panel in panels) < 60_000


def test_sizes_and_lookup() -> None:
    panel = loading.sizes("qwen3-30b-a3b", 4, 2, "bfloat16")
    values = {row["size"]: row["value"] for row in panel.table}
    assert values["experts on this rank (E)"] == 64 and values["intermediate size on this rank (N)"] == 384
    shown = {
        rules: loading.lookup("qwen3-30b-a3b", 1, 1, "bfloat16", "NVIDIA H200", 64, "3.6.0", rules)
        for rules in ("moelab", "sglang", "vllm")
    }
    for rules, panel in shown.items():
        assert f"Under {rules}'s rules" in panel.sentence and "key 64" in panel.sentence
        assert any(row["result"] == "used" for row in panel.table)
    other = loading.lookup("mixtral-8x7b", 1, 1, "bfloat16", "NVIDIA H100 80GB HBM3", 64, "3.6.0", "moelab")
    assert "from the default rule" in other.sentence
