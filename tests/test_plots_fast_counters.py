"""plots.fast_counters: bars, table and sentence follow the counters; a counter that is missing is left out, not made up."""

from __future__ import annotations

import json

import pytest

from moelab import recordings, roofline
from moelab.plots import fast_counters
from moelab.plots.style import LEAST_WIDTH
from moelab.recordings import Recording
from moelab.roofline import Ceilings
from moelab.suites import fast_layer as suite

AT = Ceilings(copy_bytes_per_s=4e12, flops_per_s=1e15, device="made up", source="made up")
DEVICE = {
    "SMs": 100,
    "SM_flops_per_clock": {"bfloat16": 4000},
    "ceilings": {"datasheet": {"flops_per_s": {"bfloat16": 800e12}}},
}


def row(shape: str, launch: str, tensor: float, memory: float, ghz: float = 2.0, **changes: object) -> dict:
    """A millisecond at so many GHz, 3 TB/s; a field given as None is left out."""
    fields = {
        "shape": shape, "num_tokens": 64, "launch": launch, "duration_ns": 1e6, "clocks": ghz * 1e6, "memory_bytes": 3e9,
        "tensor_percent": tensor, "l2_percent": 50.0, "memory_percent": memory, "issue_percent": 20.0, "warps_percent": 12.5,
        "registers": 168.0, "l2_parts": {"lts__t_sectors": 50.0}, **changes,
    }  # fmt: skip
    return {name: value for name, value in fields.items() if value is not None}


def made(*rows: dict) -> Recording:
    return Recording(
        "fast_counters", {"gpu": "SYNTHETIC", "triton": "3.6.0", "date": "2026-11-22"}, {"tool": "ncu"}, rows
    )


WHOLE = made(
    row("a", "whole", 75.0, 30.0, 1.5), row("a", "GEMM1", 80.0, 30.0, 1.4), row("a", "the sum", 0.0, 60.0, 1.9),
    row("b", "whole", 4.0, 90.0, l2_percent=95.0), row("b", "GEMM1", 4.0, 85.0),
)  # fmt: skip


def drawn(recording: Recording = WHOLE) -> fast_counters.Panel:
    return fast_counters.units(recording, AT, DEVICE)


def test_cells_counted_of_another_form_are_said() -> None:
    """Those alone that the rule has another form for, by the name that the kernel carries."""
    counted = made(*({**each, "kernel": f"fast_layer<Shape<{each['shape']}>>"} for each in WHOLE.rows))
    said = {
        name: fast_counters.units(counted, AT, DEVICE, lambda shape, batch, name=name: f"<{name}>").sentence
        for name in "ab"
    }
    assert said["a"].endswith("the rule no longer chooses: b, 64 tokens.")
    assert said["b"].endswith("the rule no longer chooses: a, 64 tokens.")
    assert "no longer" not in fast_counters.units(counted, AT, DEVICE, lambda shape, batch: f"<{shape}>").sentence
    assert "no longer" not in drawn(counted).sentence


def test_a_bar_for_each_unit_of_each_launch() -> None:
    figure = drawn().figure
    assert [(bar.name, tuple(bar.x), tuple(bar.y)) for bar in figure.data if bar.xaxis == "x"] == [
        ("tensor units", (75.0, 80.0, 0.0), ("whole", "GEMM1", "the sum")),
        ("L2", (50.0, 50.0, 50.0), ("whole", "GEMM1", "the sum")),
        ("memory", (30.0, 30.0, 60.0), ("whole", "GEMM1", "the sum")),
        ("issue slots", (20.0, 20.0, 20.0), ("whole", "GEMM1", "the sum")),
    ]
    assert [bar.x[0] for bar in figure.data if bar.xaxis == "x2"] == [4.0, 95.0, 90.0, 20.0]
    assert len({bar.marker.color for bar in figure.data}) == 4 and sum(bar.showlegend for bar in figure.data) == 4
    assert [each.text for each in figure.layout.annotations] == ["a,<br>64 tokens", "b,<br>64 tokens"]
    assert "tensor units most in 1, L2 most in 1 of 2 layers" in figure.layout.title.text
    assert "SYNTHETIC" in figure.layout.title.subtitle.text and "ncu" in figure.layout.title.subtitle.text


def test_the_table_has_what_follows_from_the_counters() -> None:
    first = drawn().table[0]
    assert (first["time, µs"], first["memory, TB/s"], first["clock, GHz"]) == (1000.0, 3.0, 1.5)
    assert (first["tensor units, %"], first["registers a thread"], first["warps, %"]) == (75.0, 168, 12.5)
    assert len(drawn().table) == len(WHOLE.rows)


def test_the_sentence_names_the_busiest_and_what_is_left() -> None:
    said = drawn().sentence
    assert "tensor units at 75 % (a, 64 tokens); L2 at 95 % (b, 64 tokens)" in said
    # 100 SMs * 4000 FLOP * 1.5 GHz = 600 TFLOP/s, of which 75 %
    assert (
        "a, 64 tokens: the tensor units do 450 TFLOP/s, padding included, of the 600 that a clock of 1.50 GHz allows"
        in said
    )
    assert "the datasheet’s: 800; the sum alone runs at 1.90 GHz), which leaves 25 %" in said
    assert "b, 64 tokens: memory is at 90 % of its peak, 3.00 TB/s, which is 75 % of the 4.00 TB/s" in said


def test_the_busiest_part_of_the_second_level_cache_is_named() -> None:
    link, sectors = "lts__ltcfabric2ltc_cycles_active", "lts__t_sectors"
    found = drawn(made(
        row("a", "whole", 75.0, 30.0, l2_parts={sectors: 40.0, link: 90.2}), row("b", "whole", 4.0, 90.0, l2_parts={link: 70.0}),
        row("c", "whole", 4.0, 90.0, l2_parts={"lts__new": 55.0}), row("d", "whole", 4.0, 90.0, l2_parts=None),
    ))  # fmt: skip
    assert "Of L2 it is the link between its two halves (a, 64 tokens; b, 64 tokens)." in found.sentence
    assert "Of L2 it is lts__new (c, 64 tokens)." in found.sentence and found.sentence.count("Of L2") == 2
    assert "Of L2 it is its lookups of sectors, in each." in drawn().sentence
    assert [each["busiest of L2"] for each in found.table] == [
        "the link between its two halves", "the link between its two halves", "lts__new", None,
    ]  # fmt: skip


def test_no_launch_runs_faster_than_the_whole_layer() -> None:
    said = drawn(made(row("a", "whole", 75.0, 30.0, 1.5), row("a", "GEMM1", 80.0, 30.0, 1.4))).sentence
    assert "(the datasheet’s: 800), which leaves" in said and "alone" not in said


def test_all_layers_with_the_same_busiest_unit() -> None:
    panel = drawn(made(row("a", "whole", 75.0, 30.0), row("b", "whole", 60.0, 30.0)))
    assert panel.figure.layout.title.text.endswith("tensor units most, in each of 2 layers")


@pytest.mark.parametrize("missing", ["tensor_percent", "clocks", "memory_bytes", "duration_ns", "registers"])
def test_a_counter_that_the_chip_lacks_is_left_out(missing: str) -> None:
    panel = drawn(made(row("a", "whole", 75.0, 30.0, **{missing: None}), row("a", "the sum", 0.0, 60.0)))
    json.dumps(panel.bundles(), allow_nan=False)
    assert ("TFLOP/s" in panel.sentence) == (missing == "registers")
    assert None in panel.table[0].values() and None not in panel.table[1].values()


def test_nothing_whole_is_said() -> None:
    panel = drawn(made(row("a", "GEMM1", 75.0, 30.0)))
    assert panel.figure is None and "moelab record fast_counters" in panel.sentence


def test_titles_of_neighbours_do_not_meet() -> None:
    """In JupyterLab beside its file browser they lay on each other by 8 pixels."""
    figure = drawn(recordings.load("fast_counters")).figure
    titles = [each.text for each in figure.layout.annotations]
    room = (LEAST_WIDTH - figure.layout.margin.l - figure.layout.margin.r) / len(titles)
    assert len(titles) == 4 and all(0.6 * 13 * len(part) < room for each in titles for part in each.split("<br>"))
    assert figure.layout.margin.t == 64 + 16 * (1 + figure.layout.title.subtitle.text.count("<br>")) + 24 + 16


def test_the_shipped_recording_draws_and_its_products_are_those_of_the_layer() -> None:
    """Busy tensor units at the ceiling of their clock do the layer's FLOPs, and those of padding."""
    found = recordings.load("fast_counters")
    device = roofline.device_data(found.provenance["gpu"])
    panel = fast_counters.units(found, roofline.load_ceilings(found.provenance["gpu"]), device)
    assert found.source() in panel.figure.layout.title.subtitle.text and len(panel.table) == len(found.rows)
    json.dumps(panel.bundles(), allow_nan=False)
    large = [row for row in found.select(launch="whole") if row["num_tokens"] == 8192]
    assert large
    for each in large:
        work = roofline.layer_cost(suite.shape_of(each["shape"]), each["num_tokens"]).flops
        done = fast_counters.product_ceiling(each, device) * each["tensor_percent"] / 100 * each["duration_ns"] * 1e-9
        assert 1.0 <= done / work < 1.1
