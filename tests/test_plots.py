"""plots: every panel has units, a source, a table and a sentence that its numbers give; edge cases draw too."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from made_recordings import whole

from moelab import recordings, roofline, runtime
from moelab.plots import (
    Panel,
    accuracy,
    config_health,
    explorer,
    layer,
    pipeline,
    ratio_map,
    split_k,
    strategy_race,
    style,
    sum_reduce,
)  # fmt: skip
from moelab.plots import roofline as floors
from moelab.plots.cells import fastest, over_floor
from moelab.plots.panel import LONG, geometric_mean, table_html, table_text, timing
from moelab.plots.style import LOOKS, look, number, powers
from moelab.recordings import Recording
from moelab.roofline import load_ceilings
from moelab.shapes import load_model

AT = load_ceilings("NVIDIA_H200", "floors")
DATASHEET = load_ceilings("NVIDIA_H200", "datasheet")
QWEN = load_model("qwen3-30b-a3b")
SHAPES = {"qwen3-30b-a3b/tp1": QWEN, "deepseek-v3/tp8": load_model("deepseek-v3", tp_size=8)}


def upstream(name: str) -> dict:
    return json.loads((runtime.data_dir() / "upstream" / f"{name}.json").read_text())


PEERS, SUMS, REPORTED = upstream("h200_sglang"), upstream("h200_sum_reduce"), upstream("sum_reduce_precision")
PROVENANCE = {"gpu": "NVIDIA Test", "triton": "3.6.0", "date": "2026-01-02"}


def recording(rows: list[dict], suite: str = "made_up") -> Recording:
    return Recording(suite, PROVENANCE, {}, tuple(rows))


def layer_rows(scale: float = 1.0) -> list[dict]:
    """Rows of layer_classic whose time is `scale` times sglang's, +-1 %."""
    rows = []
    for peer in PEERS["rows"]:
        if peer["name"] in SHAPES:
            cost = roofline.layer_cost(SHAPES[peer["name"]], peer["M"])
            for config in layer.CONFIGS:
                if peer.get(config):
                    samples = [peer[config] * scale * (1 + 0.01 * math.sin(i)) for i in range(9)]
                    rows.append({"shape": peer["name"], "num_tokens": peer["M"], "config_name": config, "flops": cost.flops,
                                 "bytes": cost.bytes, "samples_us": samples})  # fmt: skip
    return rows


def speed_rows(times: dict[str, Callable[[float], float]]) -> list[dict]:
    """Rows of sum_reduce with time = times[impl](bytes), three samples with no spread to speak of."""
    rows = []
    for tokens in (1, 64, 4096):
        moved = tokens * 9 * 2048 * 2
        rows += [{"dtype": "bfloat16", "impl": impl, "num_tokens": tokens, "top_k": 8, "hidden": 2048, "bytes": moved,
                  "rotations": 2, "samples_us": [time(moved)] * 3} for impl, time in times.items()]  # fmt: skip
    return rows


SPEED = speed_rows({"torch": lambda b: 3 + b / 2e6, "triton": lambda b: 1 + b / 4e6, "cuda": lambda b: 2 + b / 4.2e6})
ROUTED = [[0, 1], [1, 2], [3, 1]]
DRAWN = [
    {"shape": name, "routing": "uniform", "num_tokens": tokens, "touched": 5.0} for name in SHAPES for tokens in (1, 64)
]
CEILINGS = [
    {"what": "copy", "bytes": 4e9, "per_second": 4e12, "samples_us": [1000.0] * 7},
    {"what": "read", "bytes": 4e9, "per_second": 4e12, "samples_us": [1000.0] * 7},
    {"what": "product", "FLOP": 7e11, "per_second": 7e14, "samples_us": [1000.0] * 7},
]
JUDGED = [
    {"dtype": d, "impl": i, "max_abs": e, "mean_abs": e / 9, "bound": 1e-14, "passes": e < 1e-14, "max_abs_from_torch": e,
     "upstream_tolerance": 1e-12, "upstream_passes": e < 1e-12}
    for d in ("float64", "float32") for i, e in (("torch", 1e-15), ("triton_f32", 1e-7), ("cuda", 2e-15))
]  # fmt: skip
LAYERS = [{"dtype": "float32", "name": n, "max_abs": 1e-6, "bound": 2e-6, "rel_fro": 1e-6, "mean_ulp": 1.0, "passes": True}
          for n in ("torch", "triton", "mine")]  # fmt: skip

PANELS: dict[str, Callable[[], Panel]] = {
    "ceilings": lambda: floors.ceilings(recording(CEILINGS), DATASHEET, AT),
    "floors": lambda: floors.floors(SHAPES, AT),
    "touched": lambda: floors.touched(SHAPES, DRAWN),
    "padding": lambda: floors.padding("qwen", QWEN, [16, 64], (1, 64, 1024)),
    "breakdown": lambda: floors.breakdown("qwen3-30b-a3b/tp1", QWEN, PEERS["rows"], AT, PEERS["source"]),
    "where_time_goes": lambda: layer.where_time_goes(recording(layer_rows()), "qwen3-30b-a3b/tp1", AT),
    "roof": lambda: layer.roof(recording(layer_rows()), AT, DATASHEET),
    "over_floor": lambda: layer.over_floor(recording(layer_rows()), AT, PEERS["rows"], PEERS["source"]),
    "versus_sglang": lambda: layer.versus_sglang(recording(layer_rows()), PEERS["rows"], PEERS["source"]),
    "explore": lambda: explorer.explore("qwen3-30b-a3b", 2, 64, AT),
    "speed": lambda: sum_reduce.speed(recording(SPEED), 4.2e12, "bfloat16", SUMS["rows"], SUMS["source"]),
    "ulp": accuracy.ulp,
    "checks": lambda: accuracy.checks(JUDGED, JUDGED[:1], REPORTED, "recorded", "live"),
    "distribution": lambda: accuracy.error_distribution({"torch": [0.0, 1e-16], "triton_f32": [1e-8, 2e-7]}, "live"),
    "magnitude": lambda: accuracy.error_by_magnitude([1.0, -1e-3], {"torch": [0.0, 1e-16]}, "float64", "live"),
    "whole_op": lambda: accuracy.whole_op(LAYERS, "live"),
}
PICTURES = {
    "routing": lambda: pipeline.routing(ROUTED, [[0.5, 0.5]] * 3, 4),
    "alignment": lambda: pipeline.alignment([0, 6, 1, 2], [0, 1], 2, 2, 6),
}


@pytest.mark.parametrize("draw", [*PANELS.values(), *PICTURES.values()], ids=[*PANELS, *PICTURES])
def test_every_panel_is_whole(draw: Callable[[], Panel]) -> None:
    panel = draw()
    whole(panel)
    assert panel.figure.layout.paper_bgcolor == "rgba(0, 0, 0, 0)" and len(panel.frame()) == len(panel.table)
    assert [next(iter(b)).split("/")[1] for b in panel.bundles()] == ["vnd.plotly.v1+json", "markdown", "html"]


@pytest.mark.parametrize("draw", PANELS.values(), ids=PANELS)
def test_every_axis_says_what_it_is(draw: Callable[[], Panel]) -> None:
    """Each visible axis has a title, or shares its scale with one that has; bars over names need none."""
    figure = draw().figure
    for kind in ("yaxis", "xaxis"):
        axes = [axis for name, axis in figure.to_dict()["layout"].items() if name.startswith(kind)]
        titled = [a for a in axes if a.get("title", {}).get("text")]
        bare = [a for a in axes if a not in titled and a.get("visible", True)]
        by_name = {a.get("type") for a in bare} <= {"category", None} or all(a.get("matches") for a in bare)
        assert titled or by_name, f"no {kind} with a title"


def test_looks_are_told_apart() -> None:
    drawn = [(each.color, each.symbol) for name, each in LOOKS.items() if name != "classic"]
    assert len({color for color, _ in drawn}) == len({symbol for _, symbol in drawn}) == len(LOOKS) - 1
    assert look("my_kernel") == look("my_kernel") and look("classic") == look("triton")


def test_a_colour_has_one_meaning() -> None:
    """Implementations and rivals, verdicts, muted series: no colour in two of them, and none spelt outside the table."""
    named = [each.color for name, each in LOOKS.items() if name != "classic"]
    colors = [*named, style.BETTER, style.WORSE, style.WRONG, *(each.color for each in style.SERIES)]
    assert len({color.lower() for color in colors}) == len(colors)
    for path in Path(style.__file__).parent.glob("*.py"):
        spelt = set(re.findall(r'"(#[0-9a-fA-F]{6})"', path.read_text()))
        neutral = {c for c in spelt if max(p := [int(c[i : i + 2], 16) for i in (1, 3, 5)]) - min(p) <= 12}
        assert path.name in ("style.py", "gallery.py", "pictures.py") or spelt <= neutral | {"#6b8fb5"}, path.name


@pytest.mark.parametrize(("text", "paper"), [(style.TEXT_ON_LIGHT, "#ffffff"), (style.TEXT_ON_DARK, "#111111")])
def test_text_has_the_contrast_of_wcag_aa(text: str, paper: str) -> None:
    assert style.contrast(text, paper) >= 4.5
    assert style.contrast("#000000", "#ffffff") == pytest.approx(21) and style.contrast(paper, paper) == 1
    assert f"rgb{tuple(int(style.GREY[i : i + 2], 16) for i in (1, 3, 5))}" in style.INK and text in style.INK


def test_text_in_bars_can_be_read() -> None:
    """Plotly's own choice was white on the product's bar, 3.4."""
    for ground in {*config_health.COLORS.values(), *(side.color for side in style.SIDES.values())}:
        assert style.contrast(style.text_on(ground), ground) >= 4.5, ground
    bars = floors.ceilings(
        recordings.load("ceilings"), *(load_ceilings("NVIDIA_H200", kind) for kind in ("datasheet", "floors"))
    ).figure.data[:3]
    assert all(style.contrast(bar.insidetextfont.color, bar.marker.color) >= 4.5 for bar in bars)


def test_lines_and_marks_show_on_both_papers() -> None:
    """WCAG asks 3 of what is no text; a pale line is helped by its marks, so 2.2 of all, on white and on #111."""
    for name, each in LOOKS.items():
        assert min(style.contrast(each.color, paper) for paper in ("#ffffff", "#111111")) >= 2.2, name


@pytest.mark.parametrize("ratio", [0.3, 0.8, 0.99, 1.0, 1.01, 1.3, 5.0])
@pytest.mark.parametrize(("low", "high"), [(style.BETTER, style.WORSE), (style.BETTER, style.WRONG), (None, style.WORSE),
                                           (style.SIDES["memory"].color, style.SIDES["compute"].color)])  # fmt: skip
def test_a_cell_can_be_read(low: str | None, high: str, ratio: float) -> None:
    cell = ratio_map.Cell(ratio, "x", False)
    assert style.contrast(*ratio_map.colors_of(cell, 1.0, low, high)) >= 4.5


@pytest.mark.parametrize(("line", "lines"), [
    ("a; b", ["a; b"]), ("aaaa; bbbb; cccc", ["aaaa; bbbb", "cccc"]), ("", [""]),
    ("aa bb cc dd ee", ["aa bb cc", "dd ee"]), ("a; one two three four; b", ["a", "one two", "three four; b"]),
])  # fmt: skip
def test_a_subtitle_breaks_between_its_statements(line: str, lines: list[str]) -> None:
    """It broke anywhere, and left "GPU", "routing" or "dtype; ×: SPLIT_K" alone in a line."""
    assert style.broken(line, 13) == lines


def test_a_colour_bars_title_keeps_off_its_highest_tick() -> None:
    """A tick at the very end, as 1.25 of a map without large ratios, was drawn into the title's line."""
    bar = ratio_map.chart("t", "s", {("a", 1): ratio_map.Cell(1.1, "1.10", False)}, ["a"], [1], bar="time / best").data[
        0
    ]
    assert (
        bar.zmax == pytest.approx(bar.colorbar.tickvals[-1])
        and bar.colorbar.title.text.split("<br>")[1].count(".") == 1
    ), "plotly makes no room for blanks"
    drawn = "".join(path.read_text(encoding="utf-8") for path in Path(style.__file__).parent.glob("*.py"))
    assert re.findall(r'colorbar=\{"title": (?!bar_title)(?!\{[^}]*"side": "right")', drawn) == []


@pytest.mark.parametrize("rows", [1, 2, 5, 30])
@pytest.mark.parametrize("ratio", [1.1, 1.4, 3.0, 90.0])
@pytest.mark.parametrize("low", [style.BETTER, None])
def test_a_colour_bars_ticks_have_room(rows: int, ratio: float, low: str | None) -> None:
    """On the bar of two rows 1 and 1.1 lay on each other."""
    names = [str(i) for i in range(rows)]
    cells = {(name, 1): ratio_map.Cell(ratio, "x", False) for name in names}
    figure = ratio_map.chart("t", "s", cells, names, [1], bar="ratio", low=low, tall=44)
    heat, layout = figure.data[0], figure.layout
    pixels = layout.height - layout.margin.t - layout.margin.b - 2 * 20
    at = [pixels * value / (heat.zmax - heat.zmin) for value in heat.colorbar.tickvals]
    assert heat.colorbar.ticktext[at.index(0)] == "1" and all(b - a >= 14 for a, b in itertools.pairwise(at))


def test_labels_are_level() -> None:
    slanted = [path.name for path in Path(style.__file__).parent.glob("*.py")
               if re.search(r"tickangle\W+(?!0\b)[-\d]", path.read_text(encoding="utf-8"))]  # fmt: skip
    assert slanted == []


def test_a_figure_has_a_width_at_which_it_can_be_read() -> None:
    (table,) = [bundle["text/html"] for bundle in PANELS["floors"]().bundles() if "text/html" in bundle]
    assert f"min-width: {style.LEAST_WIDTH}px" in table and "overflow-x: auto" in table


def test_figures_from_one_mould_are_apart() -> None:
    """The empty figure is made once for all that have as many plots."""
    first = style.grid("one", "a; b", titles=["x", "y"])
    first.add_scatter(x=[1], y=[2], row=1, col=2)
    first.update_layout(title={"text": "changed"}, height=70)
    first.layout.annotations[0].text = "changed"
    second = style.grid("two", "c<br>d", titles=["x", "y"])
    assert not second.data and [each.text for each in second.layout.annotations] == ["x", "y"]
    assert (second.layout.title.text, second.layout.title.subtitle.text) == ("two", "c<br>d")
    assert second.layout.height == style.HEIGHT and second.layout.margin.t == 64 + 2 * 16 + 24


@pytest.mark.parametrize("labels", [[], ["1000"], ["128x256x128 g64 w8 s5"]])
def test_held_margins_have_room_for_labels(labels: list[str]) -> None:
    figure = style.grid("t", "s")
    style.hold_margins(figure, labels, 10)
    needed = 0.636 * 10 * max(map(len, labels), default=0) + 7 + 15 + 14  # the tick, the title's distance, the title
    assert (
        figure.layout.margin.l >= needed and figure.layout.yaxis.automargin is figure.layout.xaxis.automargin is False
    )


def test_lines_of_one_figure_have_colours_apart() -> None:
    """Split-K's three kinds were three browns, two of them 21 apart."""
    for looks in (split_k.LOOKS, dict(enumerate(style.SERIES)), style.CONFIGS, strategy_race.LOOKS):
        for one, other in itertools.combinations([each.color for each in looks.values()], 2):
            parts = zip(*([int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in (one, other)), strict=True)
            assert math.dist(*zip(*parts, strict=True)) >= 30, (one, other)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.99996, "1.00"), (1234.5, "1234"), (12.34, "12.3"), (0.0001, "1.00e-04"), (0.0, "0"), (None, "–"), (False, "NO"),
     (7, "7"), (3e7, "3.00e+07"), (-2.5, "-2.50"), ("a<b", "a<b"), (0.97, "0.970"), (0.0312, "0.0312")],
)  # fmt: skip
def test_number(value: object, text: str) -> None:
    assert number(value) == text


def test_powers_label_whole_decades() -> None:
    axis = powers(1e-4, 2e4)
    assert dict(zip(axis["tickvals"], axis["ticktext"], strict=True))[1e-4] == "10<sup>−4</sup>"
    assert all(math.log10(t) == pytest.approx(round(math.log10(t))) for t in axis["tickvals"])


@pytest.mark.parametrize(("low", "high"), [(60, 1500), (430, 3100), (3.1, 9.5), (100, 101), (1, 1e5), (0.02, 7)])
def test_a_log_axis_names_every_tick_by_its_whole_value(low: float, high: float) -> None:
    """Plotly's own ticks would be 5 6 7 8 9 1000 2 3."""
    axis = style.round_ticks(low, high)
    assert [float(text) for text in axis["ticktext"]] == pytest.approx(axis["tickvals"])
    assert 3 <= len(axis["tickvals"]) <= 8 and all(low <= t <= high * (1 + 1e-9) for t in axis["tickvals"])


def test_no_log_axis_leaves_its_ticks_to_plotly() -> None:
    """Whose labels within a power of ten are single digits. One tick a power, dtick=1, is whole."""
    bare = [
        f"{path.name}: {call}"
        for path in Path(style.__file__).parent.glob("*.py")
        for call in re.findall(r"update_[xy]axes\([^)]*type=\"log\"[^)]*\)", path.read_text(encoding="utf-8"))
        if "tickvals" not in call and "dtick=1" not in call
    ]
    assert bare == []


def test_tables_escape_and_line_up() -> None:
    rows = [{"name": "<b>", "x": 1.0}, {"name": "c", "y": None}]
    assert "&lt;b&gt;" in table_html(rows) and "<b>" not in table_html(rows)
    assert table_text(rows).splitlines()[0].split() == ["name", "x", "y"]


def test_long_tables_are_folded() -> None:
    assert table_html([{"x": 1}] * LONG).startswith("<div")
    folded = table_html([{"x": 1}] * (LONG + 1))
    assert folded.startswith("<details>") and f"The numbers, {LONG + 1} rows" in folded


def test_a_config_that_some_shapes_lack_is_compared_where_it_is() -> None:
    rows = [row for row in layer_rows() if row["config_name"] != "shipped" or row["shape"] == "qwen3-30b-a3b/tp1"]
    said = layer.over_floor(recording(rows), AT).sentence
    there = [row for row in rows if row["shape"] == "qwen3-30b-a3b/tp1" and row["config_name"] == "default"]
    mean = geometric_mean([over_floor(row, AT)[0] for row in there])
    assert f"(in {len(there)} cells, default there {mean:.2f})" in said


# --- sentences follow the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.8, 1.0, 1.3])
def test_versus_sglang_says_the_geometric_mean(scale: float) -> None:
    panel = layer.versus_sglang(recording(layer_rows(scale)), PEERS["rows"], "source")
    expected = geometric_mean([timing(row).median_us / _peer(row) for row in layer_rows(scale)])
    assert f"{expected:.3f} times" in panel.sentence


def _peer(row: dict) -> float:
    return next(
        p[row["config_name"]] for p in PEERS["rows"] if (p["name"], p["M"]) == (row["shape"], row["num_tokens"])
    )


def test_error_bars_are_the_interval() -> None:
    panel = layer.where_time_goes(recording(layer_rows()), "qwen3-30b-a3b/tp1", AT)
    measured = next(trace for trace in panel.figure.data if trace.name == "classic layer, measured")
    row = next(r for r in layer_rows() if r["config_name"] == "tuned")
    low, high = timing(row).interval_us
    assert measured.y[0] - measured.error_y.arrayminus[0] == pytest.approx(low)
    assert measured.y[0] + measured.error_y.array[0] == pytest.approx(high)


def test_overlapping_intervals_are_a_tie() -> None:
    def row(impl: str, samples: list[float]) -> dict:
        return {"impl": impl, "samples_us": samples}

    times = {"triton": timing(row("triton", [1.0, 1.1, 1.2])), "cuda": timing(row("cuda", [1.15, 1.25, 1.3]))}
    assert fastest(times) == ["triton", "cuda"]
    times["cuda"] = timing(row("cuda", [1.25, 1.3, 1.35]))
    assert fastest(times) == ["triton"]


def test_crossover_is_found_and_denied() -> None:
    assert "turns 1 time: cuda from 4096 × 8 × 2048" in sum_reduce.speed(recording(SPEED), 4e12, "bfloat16").sentence
    for cuda in (2.0, 1.0):  # always behind; a tie everywhere
        rows = speed_rows({"triton": lambda b: 1.0, "cuda": lambda b, us=cuda: us})
        assert "turns 0 times" in sum_reduce.speed(recording(rows), 4e12, "bfloat16").sentence


def test_losing_to_upstreams_launch_is_said() -> None:
    both = {"triton": lambda b: 2.0, "cuda": lambda b: 3.0}
    slow = speed_rows({**both, "triton_f32": lambda b: 1.0 if b > 1e6 else 5.0})
    said = sum_reduce.speed(recording(slow), 4e12, "bfloat16").sentence
    assert "at 2 of 3 sizes (64 × 8 × 2048, 4096 × 8 × 2048)" in said
    tied = speed_rows({**both, "triton_f32": lambda b: 2.0})
    assert "at 0 of 3 sizes" in sum_reduce.speed(recording(tied), 4e12, "bfloat16").sentence


def test_checks_name_the_failing_one() -> None:
    sentence = accuracy.checks(JUDGED, [], REPORTED, "r", "l").sentence
    assert "triton_f32 in float64, triton_f32 in float32, as reported" in sentence
    clean = [row | {"passes": True, "upstream_passes": True} for row in JUDGED]
    assert "fails nothing, unlike what was" in accuracy.checks(clean, [], REPORTED, "r", "l").sentence
    assert "torch, cuda." in accuracy.verdicts(JUDGED).sentence


def test_whole_op_names_a_failure() -> None:
    failing = [LAYERS[0], LAYERS[1] | {"passes": False, "max_abs": 1.0}]
    assert "Failing: triton in float32" in accuracy.whole_op(failing, "live").sentence


@pytest.mark.parametrize("dtype", accuracy.FRACTION_BITS)
def test_spacing_is_that_of_precision(dtype: str) -> None:
    """plots computes a ULP without torch; it must be the same ULP, subnormals included."""
    import torch

    from moelab import precision

    for value in (1.0, 0.75, 3.0, 1e-3, 1000.0, 1e-7, 2.0**-24):
        ref = precision.ulp(torch.tensor([value], dtype=torch.float64), dtype).item()
        assert accuracy.spacing(value, dtype) == ref


def test_floors_are_rooflines() -> None:
    panel = floors.floors({"q": QWEN}, AT, (1, 64))
    assert panel.table[0]["64"] == roofline.floor_us(roofline.layer_cost(QWEN, 64), AT).us
    assert "q never, up to 64" in panel.sentence


def test_tp_choices_divide() -> None:
    """dbrx's 10752 divides by all; a size with an odd factor does not, and is left out, not raised."""
    for model in ("dbrx", "qwen1.5-moe-a2.7b", "gpt-oss-20b"):
        fitting = floors.tp_choices(model)
        size = load_model(model).moe_intermediate_size
        assert fitting == [d for d in (1, 2, 4, 8, 16) if size % d == 0]
    assert len(floors.tp_choices("qwen1.5-moe-a2.7b", (1, 2, 3, 5))) < 4


SHIPPED = {
    "layer_classic": lambda found: layer.roof(found, AT, DATASHEET),
    "ceilings": lambda found: floors.ceilings(found, DATASHEET, AT),
    "sum_reduce": lambda found: sum_reduce.speed(found, 4.2e12, "bfloat16", SUMS["rows"], SUMS["source"]),
    "sum_reduce_precision": lambda found: accuracy.checks(found.rows, [], REPORTED, found.source(), ""),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recordings_draw(name: str) -> None:
    found = recordings.load(name)
    whole(SHIPPED[name](found), found.source())


def test_where_speaks_of_a_broken_recording() -> None:
    listed = recordings.ListedRecording("x", runtime.data_dir(), None, "cut short")
    panel = pipeline.where(dataclasses.replace(runtime.current(), mode="none"), {"torch": None}, [listed])
    assert "with 0 recordings" in panel.sentence and any("cut short" in str(row) for row in panel.table)
