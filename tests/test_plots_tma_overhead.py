"""plots.tma_overhead and plots.host_time: what is said of the host's time follows the samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise

import made_recordings as made
import pytest

from moelab import recordings, runtime
from moelab.plots import Panel, host_time
from moelab.plots import tma_overhead as plots
from moelab.plots.panel import timing
from moelab.recordings import Recording

SHAPE = "qwen3-30b-a3b/tp1"


def upstream(name: str) -> dict:
    return json.loads((runtime.data_dir() / "upstream" / f"{name}.json").read_text())


PEERS, REPORTED = upstream("h200_sglang_host"), upstream("tma_host_overhead")


def steady(recorded: Recording, **us: float) -> Recording:
    """The recording with samples all but equal, so that every difference can be told; `us` changes some by name."""
    rows = []
    for row in recorded.rows:
        middle = us.get(row["name"], timing(row).median_us)
        rows.append(row | {"samples_us": [middle + 1e-3 * i for i in range(-8, 9)]})
    return Recording(recorded.suite, recorded.provenance, recorded.protocol, tuple(rows))


EVEN = steady(made.tma_overhead(), **made.LAUNCHES, **made.STEPS, **made.LAYERS)
BASELINE = made.layer_baseline()
PANELS: dict[str, Callable[[Recording, Recording], Panel]] = {
    "launches": lambda host, _: plots.launches(host, PEERS),
    "spread": lambda host, _: plots.spread(host),
    "goals": lambda host, _: plots.goals(host),
    "gains": lambda *_: plots.gains(REPORTED, PEERS),
    "timeline": lambda host, gpu: host_time.timeline(host, gpu, SHAPE, PEERS),
    "layers": lambda host, gpu: host_time.layers(host, gpu, SHAPE),
    "by_batch": host_time.by_batch,
}


def test_the_two_savings_are_told_apart() -> None:
    """0.5 us of the allocator and 9 of the descriptor, by name; intervals are those of the difference."""
    found = made.numbers(plots.launches(EVEN, PEERS).sentence)
    assert found[:4] == [14.0, 2.0, 1.99, 2.01] and found[4] == 9.0 and found[7] == 0.5 and found[10] == 44.0


def test_what_cannot_be_told_from_nothing_is_not_called_a_cost() -> None:
    said = plots.launches(steady(EVEN, **{plots.ALLOCATED: 25.0, plots.REBUILT: 25.0}), PEERS).sentence
    assert "allocator set a tie with 0" in said


def test_segments_add_up_to_the_bar() -> None:
    figure = plots.launches(EVEN, PEERS).figure
    for axis in ("x", "x2"):
        bars = [t for t in figure.data if t.type == "bar" and t.xaxis == axis and t.base is not None]
        ends = {y: base + x for t in bars for y, x, base in zip(t.y, t.x, t.base, strict=True)}
        expected = made.LAUNCHES if axis == "x" else {r["name"]: r["us"] for r in PEERS["rows"]}
        assert ends == pytest.approx({way: expected[way] for way in plots.WAYS})


def test_a_missed_goal_is_said() -> None:
    assert plots.goals(EVEN).sentence.startswith("**All goals are kept: ")
    slow = plots.goals(steady(EVEN, **{plots.KEPT: 19.0}))
    assert slow.sentence.startswith("**1 of 3 goals missed: a kept descriptor, over no TMA 5.0 µs of at most 4")
    assert [row["kept"] for row in slow.table] == [False, True, True]


def test_spread_is_of_the_samples() -> None:
    row = plots.spread(made.tma_overhead()).table[0]
    samples = timing(made.tma_overhead().select(name=plots.PLAIN)[0])
    assert row["one launch"] == plots.PLAIN and row["99th percentile"] == samples.quantile_us(0.99)


def test_gains_have_a_direction() -> None:
    panel = plots.gains(REPORTED, PEERS)
    assert made.numbers(panel.sentence)[:2] == [6.7, 11.3]
    worse = {**REPORTED, "rows": [REPORTED["rows"][0], REPORTED["rows"][3] | {"after": 1000.0}]}
    assert [row["better by, %"] > 0 for row in plots.gains(worse, PEERS).table] == [True, False]


# --- a layer ------------------------------------------------------------------------------------------------------


def test_lanes_are_to_scale() -> None:
    """The classic layer's parts add up to it, the least host time comes second, sglang's last; who is slower waits not."""
    classic, least, peer = host_time.lanes(EVEN, BASELINE, SHAPE, PEERS)
    assert classic.host_us == pytest.approx(61.0) and [name for name, *_ in classic.parts] == [
        *host_time.STEPS,
        host_time.REST,
    ]
    assert least.name == "gated_atomic_out" and least.host_us == pytest.approx(44.0)
    assert (peer.host_us, peer.gpu_us, peer.waits_us) == (247.8, 27.0, pytest.approx(220.8))
    assert classic.waits_us == pytest.approx(61.0 - classic.gpu_us)
    assert host_time.Lane("slow", (("a", 10.0, ""),), 30.0).waits_us == 0.0


def test_what_is_past_its_bound_is_no_lane() -> None:
    host = made.tma_overhead(past=("gated_atomic_out",))
    assert host_time.lanes(host, BASELINE, SHAPE, PEERS)[1].name == "gated_atomic"
    said = host_time.layers(host, BASELINE, SHAPE).sentence
    assert "(gated_atomic) to" in said and said.endswith("bound: gated_atomic_out.")


def test_parts_that_add_up_to_more_leave_no_rest() -> None:
    """Steps are timed apart from the layer, so noise may make their sum the larger."""
    quick = steady(EVEN, triton=50.0)
    classic = host_time.lanes(quick, BASELINE, SHAPE, PEERS)[0]
    assert host_time.REST not in [name for name, *_ in classic.parts]
    assert "host’s time: 0.0 µs" in host_time.timeline(quick, BASELINE, SHAPE, PEERS).sentence


def test_blocks_do_not_overlap() -> None:
    figure = host_time.timeline(EVEN, BASELINE, SHAPE, PEERS).figure
    lanes: dict[str, list[tuple[float, float]]] = {}
    for trace in (t for t in figure.data if t.type == "bar"):
        for lane, start, length in zip(trace.y, trace.base, trace.x, strict=True):
            lanes.setdefault(lane, []).append((start, start + length))
    assert len(lanes) == 6
    for blocks in lanes.values():
        ordered = sorted(blocks)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(ordered))


def test_a_layer_without_a_gpu_time_is_drawn() -> None:
    short = Recording(BASELINE.suite, BASELINE.provenance, {}, tuple(r for r in BASELINE.rows if r["impl"] != "gated"))
    row = next(r for r in host_time.layers(EVEN, short, SHAPE).table if r["implementation"] == "gated")
    assert row[host_time.GRAPH] is None and row[host_time.WALL] is None


def test_by_batch_finds_the_turn() -> None:
    """At one token the GPU of every shape is done before the host; from 4 on it is not."""
    said = host_time.by_batch(EVEN, BASELINE).sentence
    assert said.count("from batch 4 on") == 4
    never = made.layer_baseline(batches=(1,))
    assert f"{SHAPE} at none" in host_time.by_batch(EVEN, never).sentence
    deep = Recording(BASELINE.suite, BASELINE.provenance, {}, tuple(
        row | {"samples_us": [us * 5 for us in row["samples_us"]]} if row["shape"] == "deepseek-v3/tp8" else row
        for row in BASELINE.rows if "samples_us" in row))  # fmt: skip
    said = host_time.by_batch(EVEN, deep).sentence
    assert f"{SHAPE} from batch 4 on" in said and "deepseek-v3/tp8 from batch 1 on" in said


def test_by_batch_greys_where_the_host_does_not_matter() -> None:
    """A cell a shape and batch; grey from the batch on at which eager mode takes at most 5 % more."""
    panel = host_time.by_batch(EVEN, BASELINE)
    differs, same, _ = panel.figure.data
    for row in panel.table:
        at = [*same.y].index(row["shape"]), [*same.x].index(str(row["batch"]))
        grey = same.z[at[0]][at[1]] == same.z[at[0]][at[1]]  # not NaN
        assert grey == (row["eager / GPU"] <= 1.05) != (differs.z[at[0]][at[1]] == differs.z[at[0]][at[1]])
    assert len(panel.table) == same.z.size


# --- what is shipped ----------------------------------------------------------------------------------------------


def test_upstream_rows_are_the_ways() -> None:
    assert {row["name"] for row in PEERS["rows"] if row["kind"] == "launch"} == {*plots.WAYS, *plots.ALONE}
    assert PEERS["source"] and PEERS["reported"] is True


SHIPPED = recordings.load("tma_overhead"), recordings.load("layer_baseline")


@pytest.mark.parametrize("given", [(made.tma_overhead(), BASELINE), SHIPPED], ids=["made", "shipped"])
@pytest.mark.parametrize("name", PANELS)
def test_every_panel_is_whole(name: str, given: tuple[Recording, Recording]) -> None:
    made.whole(PANELS[name](*given), *[found.source() for found in given if name not in ("gains", "goals")])
