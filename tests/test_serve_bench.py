"""A whole model under each implementation of its experts: every path of the benchmark, on a tiny model on the CPU."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_serving import DEVICE, LAYERS, PAIR, QUICK, E, a_file, alone, plan

from moelab import hf, recordings, runtime
from moelab.config import KernelConfig
from moelab.errors import (
    FolderError,
    RecordingError,
    RoutingError,
    RuntimeModeError,
    UnknownNameError,
)
from moelab.formats import get_format
from moelab.recordings import Recording
from moelab.serving import clock, contenders, model, prediction, requests, routes, steps, suite, table
from moelab.serving.clock import Limit
from moelab.weights import ExpertWeights

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    yield from alone()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_file(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(config: Path) -> Any:
    contenders.known()
    return model.build(model.read_config(config), DEVICE, torch.float32)


@pytest.fixture(scope="module")
def found(config: Path) -> tuple[Recording, list[int]]:
    """A run of all kinds of cells, and how many rows there were after each."""
    counts: list[int] = []
    return suite.serve_bench(plan(config), lambda rows: counts.append(len(rows))), counts


def test_a_run_has_every_kind_of_cell_for_every_contender(found: tuple[Recording, list[int]], tmp_path: Path) -> None:
    recording, counts = found
    kinds = {row["kind"] for row in recording.rows}
    graphs = {"decode, eager", "prefill, graph"} if DEVICE == "cuda" else set()
    without = {"decode, no experts", "prefill, graph, no experts" if graphs else "prefill, no experts"}
    steps = {"decode", "experts of decode", "prefill", "experts of prefill", "serving"} | graphs
    assert kinds == {"error", "logits"} | steps | without
    assert {row["impl"] for row in recording.rows if row["kind"] in without} == {contenders.WITHOUT}
    for kind in kinds - without:
        assert {row["impl"] for row in recording.rows if row["kind"] == kind} == set(PAIR)
    assert not any("refused" in row for row in recording.rows) and all(
        row.get("within_bound", True) for row in recording.rows
    )
    assert counts == sorted(counts) and counts[-1] == len(recording.rows) and len(counts) == 4, (
        "judged, then three cells"
    )
    assert recording.provenance["transformers"] == transformers.__version__
    assert ("without a graph" in recording.protocol["decode"]) == (DEVICE == "cpu")
    again = recordings.load(recordings.write(recording, tmp_path / "serve_bench.json"))
    assert len(again.rows) == len(recording.rows) and again.protocol["not begun for want of time"] == []


def test_a_cell_says_what_its_experts_were_asked(found: tuple[Recording, list[int]]) -> None:
    rows = {row["kind"]: row for row in found[0].rows}
    assert (rows["decode"]["num_tokens"], rows["prefill"]["num_tokens"]) == (3, 16)
    assert (rows["decode"]["experts_touched"], rows["decode"]["load"]) == (6, pytest.approx(1 / (6 / 8)))
    assert (rows["prefill"]["experts_touched"], rows["experts of prefill"]["load"]) == (8, 1)


def test_the_tables_of_a_run(found: tuple[Recording, list[int]]) -> None:
    times, served = table.times(found[0].rows), table.serving(found[0].rows)
    cells = list(dict.fromkeys(line["cell"] for line in times))
    assert cells[:3] == ["decode 3x6", "decode, no experts 3x6", "experts of decode 3x6"]
    assert sum(line[""] == "fastest" for line in times) == len({line["cell"] for line in times})
    assert all(line["low"] <= line["ms"] <= line["high"] for line in times)
    assert {line["experts"] for line in served} == set(PAIR)
    assert all(line["TTFT p50, ms"] <= line["TTFT p99, ms"] and line["output tok/s"] > 0 for line in served)
    assert {row["kind"] for row in table.errors(found[0].rows)} == {"error", "logits"}


# --- contenders ---------------------------------------------------------------------------------------------------------


def test_one_that_fails_is_an_outcome_and_the_others_run_on(tiny: Any) -> None:
    def greedy(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24.00 GiB.\nmore")

    hf.register_function("greedy", greedy)
    said = clock.in_turns(tiny, steps.prefill(tiny, 1, 4), ("greedy", "eager"), QUICK)
    assert said["greedy"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 24.00 GiB."
    assert len(said["eager"]) == 2 and all(sample > 0 for sample in said["eager"])
    rows = clock.rows_of(said, {"kind": "prefill"})
    assert [sorted(row) for row in rows] == [["impl", "kind", "refused"], ["impl", "kind", "samples_us"]]


def test_a_wrong_one_is_past_its_bound(config: Path) -> None:
    def doubled(block: Any, *given: Any) -> Any:
        return 1.01 * contenders._exact(block, *given)

    hf.register_function("doubled", doubled)
    rows = suite.serve_bench(plan(config, contenders=("doubled",), prefills=(), decodes=(), load=None)).rows
    assert [(row["kind"], row["within_bound"]) for row in rows] == [("error", False), ("logits", False)]


@pytest.mark.skipif(DEVICE != "cpu", reason="has a GPU, where kernels are timed")
def test_interpreted_kernels_are_never_timed(tiny: Any) -> None:
    said = clock.in_turns(tiny, steps.prefill(tiny, 1, 4), ("moelab_triton", contenders.DEFAULT_RULE), QUICK)
    assert all("RuntimeModeError" in one and "interpreted" in one for one in said.values())


def test_names_that_nobody_registered(tiny: Any) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean moelab_fast"):
        contenders.chosen(("moelab_fst",))
    assert contenders.chosen(("eager", "eager")) == ("eager",) and contenders.chosen(())
    contenders.use(tiny, "eager")
    with pytest.raises(RuntimeModeError, match="did not switch"):
        contenders.use(Stubborn(), "eager")


class Stubborn:
    """A model that transformers cannot switch, which it says nothing of."""

    def set_experts_implementation(self, name: str) -> None:
        pass

    def get_experts_implementation(self) -> dict[str, str]:
        return {"": "grouped_mm"}


def test_two_trees_of_configs_beside_each_other(tmp_path: Path) -> None:
    tile = KernelConfig(16, 32, 32, 1, 4, 2)
    stem = f"E={E},N=24,device_name={runtime.device_key()},dtype="
    name = f"{stem}float32.json"
    for tree, nested in (("a", "configs/triton_3_6_0"), ("b", "triton_3_6_0")):
        (tmp_path / tree / nested).mkdir(parents=True)
    (tmp_path / "a/configs/triton_3_6_0" / name).write_text(json.dumps({"4": tile.to_json()}))
    with pytest.raises(FolderError, match="holds no config file of"):
        contenders.of_trees([tmp_path / "b"])
    (tmp_path / "b/triton_3_6_0" / name).write_text(json.dumps({"4": replace(tile, BLOCK_SIZE_N=16).to_json()}))
    names = contenders.of_trees([tmp_path / "a", tmp_path / "b"])
    assert names == (f"moelab_triton of {tmp_path / 'a'}", f"moelab_triton of {tmp_path / 'b'}")
    assert set(names) <= set(contenders.known())
    x, experts = torch.empty(4, 32), ExpertWeights(torch.empty(E, 48, 32), torch.empty(E, 32, 24))
    taken = [contenders._of_tree(tmp_path / tree, experts, x)[0] for tree in ("a/configs", "b")]
    assert [one.BLOCK_SIZE_N for one in taken] == [32, 16]
    more = ExpertWeights(torch.empty(E + 1, 48, 32), torch.empty(E + 1, 32, 24))
    assert contenders._of_tree(tmp_path / "b", more, x) == ("default", "default")
    coded = experts._replace(format=get_format("fp8_w8a8_block_8x16"))
    assert contenders._of_tree(tmp_path / "b", coded, x) == ("default", "default")
    (tmp_path / "b/triton_3_6_0" / f"{stem}fp8_w8a8,block_shape=[8, 16].json").write_text(
        json.dumps({"4": tile.to_json()})
    )
    contenders._found.cache_clear()
    assert contenders._of_tree(tmp_path / "b", coded, x)[0] == tile


def test_the_default_rule_and_a_tree_reach_the_kernel(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(hf, "fused_moe", lambda x, *_, **named: seen.append((named["impl"], named["config"])) or x)
    for name in ("moelab_triton", contenders.DEFAULT_RULE):
        contenders.use(tiny, name)
        steps.prefill(tiny, 1, 4).run()
    assert seen == [("triton", None)] * LAYERS + [("triton", "default")] * LAYERS


# --- routing ------------------------------------------------------------------------------------------------------------


def test_balanced_ids_reach_every_block_and_leave_with_the_hook(tiny: Any) -> None:
    work = steps.prefill(tiny, 2, 8)
    contenders.use(tiny, "eager")
    with routes.asked(tiny) as own:
        work.run()
    with routes.routed(tiny, "balanced", 16), routes.asked(tiny) as found:
        work.run()
    assert len(found) == LAYERS and routes.load_of(tiny, found) == {"experts_touched": E, "load": 1.0}
    ids = [one.ids for one in found.values()]
    assert not torch.equal(ids[0], ids[1]), "each block's experts are shuffled anew"
    with routes.asked(tiny) as after:
        work.run()
    assert all(torch.equal(after[name].ids, one.ids) for name, one in own.items())


def test_a_longer_forward_takes_the_table_again(tiny: Any) -> None:
    contenders.use(tiny, "eager")
    with routes.routed(tiny, "zipf", 3), routes.asked(tiny) as found:
        steps.prefill(tiny, 1, 8).run()
    ids = next(iter(found.values())).ids
    assert torch.equal(ids[:3], ids[3:6]) and torch.equal(ids[:2], ids[6:])
    with routes.routed(tiny, "real", 3):
        pass
    with pytest.raises(UnknownNameError, match="balanced"), routes.routed(tiny, "balancd", 3):
        pass


def test_the_routing_of_a_live_model_is_asked_again(tiny: Any, config: Path, tmp_path: Path) -> None:
    contenders.use(tiny, "eager")
    work = steps.prefill(tiny, 1, 8)
    with hf.captured_routing(tiny) as live:
        work.run()
    saved = hf.save_routing(live, tmp_path)
    with routes.routed(tiny, str(tmp_path), 8), routes.asked(tiny) as found:
        steps.prefill(tiny, 2, 8).run()
    for name, one in found.items():
        assert torch.equal(one.ids.cpu().int(), torch.cat([live[name][0]] * 2))
    saved[-1].unlink()
    with pytest.raises(RoutingError, match="Record the routing of this model"):
        suite.serve_bench(plan(config, routing=str(tmp_path)))
    with (
        pytest.raises(RoutingError, match=r"layers\.2\.mlp\.experts\.npy, nor 0 others of 3"),
        routes.routed(tiny, str(tmp_path), 8),
    ):
        pass
    np.save(saved[-1], np.array([[0, 1, 2]]))
    with pytest.raises(RoutingError, match=r"of 3 experts each.*of 2 experts"), routes.routed(tiny, str(tmp_path), 8):
        pass
    np.save(saved[-1], np.array([[0, 8]]))
    with pytest.raises(RoutingError, match="8 experts"), routes.routed(tiny, str(tmp_path), 8):
        pass


# --- steps --------------------------------------------------------------------------------------------------------------


def test_a_decode_begins_again_where_it_is_rewound(tiny: Any) -> None:
    contenders.use(tiny, "eager")
    work = steps.decode(tiny, 2, 6)
    runs = []
    for _ in range(2):
        work.rewind()
        runs.append([work.run().clone() for _ in range(steps.AHEAD)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert len({tuple(step.flatten().tolist()) for step in runs[0]}) > 1, "no step depends on the one before"


@pytest.mark.gpu
def test_a_captured_step_gives_the_eager_step(config: Path) -> None:
    """And the whole plan, in bfloat16, with moelab's contenders in graphs."""
    found = suite.serve_bench(plan(config, dtype="bfloat16", contenders=("grouped_mm", "moelab_triton", "moelab_fast")))
    rows = [row for row in found.rows if row["kind"] in ("decode", "experts of decode")]
    assert all(row["graph"] for row in rows) and any("samples_us" in row for row in rows)
    made = model.build(model.read_config(config), DEVICE, torch.bfloat16)
    work = steps.decode(made, 2, 6)
    ready = clock._prepared(made, work, "moelab_triton", graph=True)
    work.rewind()
    expected = [(held := work.run()).clone() for _ in range(3)]
    work.rewind()
    for token in expected:
        ready.graph.replay()
        assert torch.equal(held, token)


# --- the model ----------------------------------------------------------------------------------------------------------


def test_runs_of_one_place_lie_in_one_recording(found: tuple[Recording, list[int]], tmp_path: Path) -> None:
    first = found[0]
    other = replace(
        first, protocol={**first.protocol, "model": "b"}, rows=tuple({**row, "model": "b"} for row in first.rows[:2])
    )
    both = suite.joined(first, other)
    assert len(both.rows) == len(first.rows) + 2 and set(both.protocol["models"]) == {first.protocol["model"], "b"}
    again = suite.joined(both, replace(other, rows=other.rows[:1]))
    assert len(again.rows) == len(first.rows) + 1, "the model's rows are replaced"
    assert suite.joined(None, first) is first
    suite.require_same(recordings.load(recordings.write(both, tmp_path / "both.json")))
    with pytest.raises(RecordingError, match=r"another git_commit \(abc\)"):
        suite.require_same(replace(first, provenance={**first.provenance, "git_commit": "abc"}))


# --- time ---------------------------------------------------------------------------------------------------------------


def test_what_there_is_no_time_for_is_named(config: Path) -> None:
    found = suite.serve_bench(plan(config, contenders=("eager",), limit_s=1e-6))
    assert found.protocol["not begun for want of time"] == ["decode 3x6", "prefill 2x8", "serving 2x5"]
    assert {row["kind"] for row in found.rows} == {"error", "logits"}
    assert Limit(60.0).allows("a") and not Limit(60.0).allows("a", needs_s=61.0)


def test_a_cell_without_room_is_an_outcome_of_each(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room for the cache")

    monkeypatch.setattr(suite, "decode", no_room)
    rows = suite.serve_bench(plan(config, prefills=(), load=None)).rows
    refused = [row for row in rows if row["kind"] == "decode"]
    assert [row["impl"] for row in refused] == [*PAIR]
    assert all(row["refused"] == "OutOfMemoryError: no room for the cache" for row in refused)


# --- a serving run ------------------------------------------------------------------------------------------------------


def test_arrivals_are_a_poisson_process_of_the_seed() -> None:
    load = requests.Load(requests=2000, rate=8.0)
    times = load.arrivals(0)
    assert times == sorted(times) == load.arrivals(0) != load.arrivals(1)
    assert times[-1] / 2000 == pytest.approx(1 / 8, rel=0.1)
    assert replace(load, rate=math.inf).arrivals(0) == [0.0] * 2000


def test_requests_that_are_not_done_in_time(tiny: Any) -> None:
    contenders.use(tiny, "eager")
    with pytest.raises(RuntimeModeError, match="2 of 2 requests were not done within 0 s"):
        requests.serve(tiny, requests.Load(2, 4, 3, rate=math.inf, limit_s=1e-9))


class Output:
    def __init__(self, timestamps: list[float]) -> None:
        self.timestamps = timestamps


def test_the_times_of_requests_count_from_their_arrival() -> None:
    found = requests._times({"a": 10.0, "b": 11.0}, {"a": Output([10.5, 10.6, 10.8]), "b": Output([12.0, 12.1, 12.2])})
    assert found["ttft_ms"] == [500.0, 1000.0] and found["itl_ms"] == [100.0, 200.0, 100.0, 100.0]
    assert found["tpot_ms"] == [150.0, 100.0] and found["duration_s"] == pytest.approx(2.2)
    assert found["output_tok_s"] == pytest.approx(6 / 2.2)


# --- prediction ---------------------------------------------------------------------------------------------------------


def rows_of(kind: str, **times: float) -> Iterator[dict[str, Any]]:
    common = {"model": "m", "layers": 2, "batch": 16, "length": 256, "num_tokens": 16, "kind": kind,
              "moe_layers": 2}  # fmt: skip
    for name, us in times.items():
        yield {**common, "impl": name, "samples_us": [us * (1 + i / 1000) for i in range(-3, 4)]}


def test_a_gain_is_predicted_from_the_share_of_the_experts() -> None:
    assert prediction.amdahl(0.5, 2.0) == pytest.approx(1 / 0.75) and prediction.amdahl(0.0, 9.0) == 1.0
    rows = [
        *rows_of("decode", grouped_mm=100.0, moelab_fast=71.0),
        *rows_of("experts of decode", grouped_mm=60.0, moelab_fast=30.0),
    ]
    (line,) = prediction.gains(rows, layer={("grouped_mm", 16): 30.0, ("fast", 16): 10.0})
    assert line["share"] == pytest.approx(0.6) and line["gain"] == pytest.approx(100 / 71) and not line["tie"]
    assert line["predicted"] == pytest.approx(1 / 0.7) and line["off"] == pytest.approx(71 / 70 - 1)
    assert line["predicted_by_layer"] == pytest.approx(100 / (100 - 2 * 30 + 2 * 10))
    assert line["off_by_layer"] == pytest.approx(71 / 60 - 1)
    assert line["within"] is None, "nobody has timed the step without experts"
    without = {
        **rows[0],
        "kind": prediction.without_of(rows[0]["kind"]),
        "impl": contenders.WITHOUT,
        "samples_us": [30.0] * 9,
    }
    (told,) = prediction.gains([*rows, without])
    assert told["within"] == (told["first_us"] - 30.0, told["us"] - 30.0) and told["gain"] == line["gain"]
    (bare,) = prediction.gains(rows[:2])
    assert bare["predicted"] is bare["share"] is bare["predicted_by_layer"] is None
    slow = [*rows[:2], *rows_of("experts of decode", grouped_mm=101.0, moelab_fast=30.0)]
    assert prediction.gains(slow)[0]["share"] is None, "alone both wait for the host"
    assert prediction.gains(rows, first="batched_mm") == []


def test_the_layer_of_the_recording_has_both_sides() -> None:
    layer = prediction.recorded_layer("qwen3-30b-a3b/tp1")
    assert layer["grouped_mm", 64] > layer["classic", 64] > layer["fast", 64] > 0
    assert prediction.recorded_layer("no such model/tp1") == {}


def test_a_verdict_in_one_line() -> None:
    rows = [*rows_of("decode", a=100.0, b=90.0), *(row | {"batch": 1} for row in rows_of("decode", a=100.0, b=100.1))]
    said = prediction.verdict(rows, "b", "a")
    assert "faster than a in 1 of 2 cells, slower in 0, a tie in 1" in said and "0.999 to 1.111" in said
    assert "no cell in common" in prediction.verdict(rows, "b", "c")


# --- the command --------------------------------------------------------------------------------------------------------
