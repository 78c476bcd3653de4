"""No two figures show the same quantity of the same cell with different values: of each thing there is one recording."""

from __future__ import annotations

import json
import math

import pytest

from moelab import recordings, runtime
from moelab.plots import Panel, layer, tuned_gain
from moelab.plots.cells import floor_of
from moelab.plots.roofline import recorded_ceilings
from moelab.roofline import load_ceilings
from moelab.suites.layer_classic import SHAPES

AT, SHEET = load_ceilings("NVIDIA_H200", "floors"), load_ceilings("NVIDIA_H200", "datasheet")
CLASSIC, GAIN = recordings.load("layer_classic"), recordings.load("tuned_gain")
LAYERS = layer.classic_layers(CLASSIC, GAIN)
PEERS = json.loads((runtime.data_dir() / "upstream" / "h200_sglang.json").read_text())
BATCHES = sorted({row["num_tokens"] for row in LAYERS.rows})
TARGETS = {f"{model}/tp{tp_size}": name for name, (model, tp_size) in SHAPES.items()}

Times = dict[tuple[str, int, str], float]


def over_floor() -> Times:
    """(shape, batch, config) -> microseconds, as the figure of times over the floor says."""
    table = layer.over_floor(LAYERS, AT, PEERS["rows"], PEERS["source"]).table
    return {
        (r["time / floor"], b, r["config"]): r[str(b)] * floor(r["time / floor"], b)
        for r in table
        for b in BATCHES
        if str(b) in r
    }


def on_the_roof() -> Times:
    ceilings = recorded_ceilings(recordings.load("ceilings"))
    table = layer.roof(LAYERS, ceilings, SHEET).table
    found = {}
    for line in table:
        for b in BATCHES:
            row = LAYERS.select(shape=line["share of the roof"], num_tokens=b, config_name="tuned")[0]
            reached = line[str(b)] * min(row["flops"] / row["bytes"] * ceilings.copy_bytes_per_s, ceilings.flops_per_s)
            found[row["shape"], b, "tuned"] = row["flops"] / reached * 1e6
    return found


def into_what() -> Times:
    """00's figure of what the time goes into."""
    return {
        (shape, row["batch"], "tuned"): row["classic, µs"]
        for shape in SHAPES for row in layer.where_time_goes(LAYERS, shape, AT).table
    }  # fmt: skip


def floor(shape: str, batch: int) -> float:
    return floor_of(LAYERS.select(shape=shape, num_tokens=batch)[0], AT).us


FIGURES = {"over_floor": over_floor, "roof": on_the_roof, "where_time_goes": into_what}


@pytest.mark.parametrize("one", FIGURES)
@pytest.mark.parametrize("other", FIGURES)
def test_two_figures_of_a_cell_agree(one: str, other: str) -> None:
    first, second = FIGURES[one](), FIGURES[other]()
    shared = first.keys() & second.keys()
    assert len(shared) >= len(SHAPES) * len(BATCHES)
    assert {key: first[key] for key in shared} == pytest.approx({key: second[key] for key in shared}, rel=1e-6)


def gains(panel: Panel) -> dict[tuple[str, int], float]:
    """(rival and shape, batch) -> the rival's time over the tuned pair's, from the cells' text."""
    text = panel.figure.data[-1]
    found = zip(text.y, text.x, text.text, strict=True)
    return {(y, int(x)): float(said) for y, x, said in found}


def test_tuned_is_the_same_search_in_both_figures() -> None:
    """Qwen3 tp1 at batch 1024 was 428.6 us, slower than shipped, in one, and 380.2, faster, in the other. The gains are medians
    of ratios of samples taken side by side, the times medians of their own: 1 % apart at most."""
    times, ratios = over_floor(), gains(tuned_gain.gains(GAIN))
    compared = 0
    for (label, batch), ratio in ratios.items():
        rival, target = label.split(", ")
        config = {short: name for name, short in tuned_gain.SHORT.items()}[rival]
        shape = TARGETS.get(target, "")
        if (shape, batch, config) in times:
            compared += 1
            assert math.log(times[shape, batch, config] / times[shape, batch, "tuned"]) == pytest.approx(
                math.log(ratio), abs=0.02
            )
    assert compared > 35
    assert times["qwen3-30b-a3b/tp1", 1024, "tuned"] == pytest.approx(380.2, abs=0.1)


def test_tuned_of_two_recordings_does_not_agree() -> None:
    """The comparison can fail: drawn from layer_classic, tuned is another search's."""
    rows = tuple(row for row in CLASSIC.rows if "alignment" not in row["config_name"])
    other = layer.over_floor(recordings.Recording(CLASSIC.suite, CLASSIC.provenance, {}, rows), AT).table
    line = next(r for r in other if (r["time / floor"], r["config"]) == ("qwen3-30b-a3b/tp1", "tuned"))
    ours = over_floor()["qwen3-30b-a3b/tp1", 1024, "tuned"]
    assert line["1024"] * floor("qwen3-30b-a3b/tp1", 1024) > 1.1 * ours
