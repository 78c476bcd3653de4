"""`moelab bench`: what it prints, and with which exit status."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from moelab import config_files, roofline, runtime, shapes
from moelab.measure import Measurement

ROOT = Path(__file__).resolve().parent.parent
H200 = ("--device", "NVIDIA H200", "--triton-version", "3.6.0")


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="has a GPU, and would measure")
def test_bench_without_a_gpu_points_to_recordings(run) -> None:
    status, out, err = run("bench", "--model", "qwen3-30b-a3b", "--batch-size", "1")
    assert (status, out) == (2, "")
    assert "layer_classic" in err and "moelab record --list" in err and "Expected a GPU" in err


def measured(name: str, start: float) -> Measurement:
    return Measurement(name, tuple(start + i / 10 for i in range(25)))


def verdict(**changes: object) -> dict[str, object]:
    return {"max_abs_error": 0.5, "rel_error": 0.1, "bound": 0.6, "within_bound": True, **changes}


def test_bench_rows_say_who_ties_and_who_was_not_timed() -> None:
    from moelab.suites import bench

    judged = {name: verdict() for name in ("torch", "compiled", "triton", "mine")}
    found = {"compiled": measured("compiled", 20.0), "triton": measured("triton", 10.0), "mine": measured("mine", 10.3)}
    rows = bench.rows_of(judged, found, {}, floor=5.6)
    assert [row["impl"] for row in rows] == ["triton", "mine", "compiled", "torch"]
    assert [row.get("tie") for row in rows] == [False, True, False, None]
    assert [row.get("fastest") for row in rows] == [True, False, False, None]
    assert rows[0]["floor_fraction"] == pytest.approx(0.5) and rows[0]["median_us"] == pytest.approx(11.2)
    assert "not timed" in rows[3]["note"] and "CUDA graph" in rows[3]["note"] and "median_us" not in rows[3]
    assert bench.rows_of(judged, found, {}, floor=None)[0]["floor_fraction"] is None


def test_bench_rows_pass_over_the_fast_and_wrong() -> None:
    from moelab.suites import bench

    judged = {"torch": verdict(), "triton": verdict(), "quick": verdict(within_bound=False)}
    graph = {"triton": measured("triton", 10.0), "quick": measured("quick", 5.0)}
    eager = {name: measured(name, at) for name, at in (("torch", 900.0), ("triton", 90.0), ("quick", 90.1))}
    rows = bench.rows_of(judged, graph, eager, floor=None)
    assert [row["impl"] for row in rows] == ["triton", "torch", "quick"]
    assert [row["eager_fastest"] for row in rows] == [True, False, False]
    assert rows[2]["tie"] is rows[2]["eager_tie"] is rows[2]["fastest"] is False
    alone = bench.rows_of({"quick": verdict(within_bound=False)}, {"quick": graph["quick"]}, {}, floor=1.0)
    assert alone[0]["fastest"] is False and alone[0]["median_us"] > 0


def a_result(judged: dict, graph: dict, eager: dict, floor: float | None = 5.6):
    from moelab.suites import bench

    used = config_files.lookup(128, 768, "NVIDIA H200", num_tokens=20, triton_version="3.6.0")
    rows = tuple(bench.rows_of(judged, graph, eager, floor))
    protocols = {"graph": {"kind": "a test"}, "eager": {"kind": "a test"} if eager else None}
    padding = roofline.Padding(40.0, 96.0)
    return bench.Result(20, "zipf", 31.5, padding, floor, "somebody", used, used, rows, protocols, {"gpu": "a test"})


def test_bench_prints_figures_ties_and_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    from moelab.cli import printing

    nowhere = {"max_abs_error": None, "rel_error": None}
    judged = {
        **{name: verdict() for name in ("triton", "compiled", "torch")},
        "wrong": verdict(within_bound=False, problem="wrong: is off."),
        "tma": verdict(within_bound=None, refused="ConfigError: no. Expected yes. Take it.", **nowhere),
    }
    graph = {name: measured(name, 10.0) for name in ("triton", "compiled", "wrong")}
    eager = {
        "triton": measured("triton", 80.0),
        "compiled": measured("compiled", 90.0),
        "torch": measured("torch", 999.0),
    }
    shape = shapes.preset("qwen3-30b-a3b").shard(4, 2)
    printing.print_bench(shape, a_result(judged, graph, eager))
    out = capsys.readouterr().out
    head, *lines = out.splitlines()
    assert (
        "floor 5.60 us" in head
        and "31.5 of 64 experts touched, 96 rows computed for 40 (padding 2.40 times)" in lines[0]
    )
    ends = {line.split()[0]: line.split("  ")[-1] for line in lines[4:9]}
    assert ends["triton"] == "lowest median in a graph; fastest eagerly" and "not timed" in ends["torch"]
    assert ends["compiled"] == "tie with the fastest in a graph" and ends["wrong"] == "OVER ITS ERROR BOUND"
    assert ends["tma"] == "did not run" and "tma did not run: ConfigError: no." in out and "\n  wrong: is off.\n" in out
    printing.print_bench(shape, a_result({"triton": verdict()}, graph, {}, None))
    out = capsys.readouterr().out
    assert "eager" not in out and "fastest" not in out and "no floor" in out


@pytest.mark.parametrize(("within", "expected"), [(True, 0), (False, 1), (None, 1)])
def test_bench_status_json_and_csv(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, within: bool | None, expected: int
) -> None:
    from moelab.suites import bench

    asked = {}

    def fake(shape, batch_sizes, impls, **options):
        asked.update(shape=shape, batch_sizes=batch_sizes, impls=impls, **options)
        judged = {"triton": verdict(within_bound=within), "torch": verdict()}
        return [a_result(judged, {"triton": measured("triton", 10.0)}, {"torch": measured("torch", 80.0)})]

    monkeypatch.setattr(bench, "bench", fake)
    sizes = ("--tp", "8", "--ep", "4", "--batch-size", "20")
    status, out, _ = run("bench", "--model", "qwen3-30b-a3b", *sizes, "--routing", "zipf", "--no-eager", "--json")
    assert status == expected
    assert (asked["shape"].num_experts, asked["shape"].moe_intermediate_size) == (32, 384)
    assert (asked["routing"], asked["eager"], asked["batch_sizes"]) == ("zipf", False, [20])
    (answer,) = json.loads(out)
    rows = {row["impl"]: row for row in answer["rows"]}
    assert rows["triton"]["within_bound"] is within and len(rows["torch"]["eager_samples_us"]) == 25
    assert answer["padding"] == {"useful_rows": 40.0, "padded_rows": 96.0, "waste": 2.4}
    assert answer["experts_touched"] == 31.5 and answer["protocols"]["eager"] and answer["provenance"]["gpu"]
    assert answer["config"]["key"] == 16 and answer["down_config"]["path"]
    table = tmp_path / "bench.csv"
    assert run("bench", "--model", "qwen3-30b-a3b", "--csv", table)[0] == expected
    first, second = csv.DictReader(table.read_text().splitlines())
    assert {first["impl"], second["impl"]} == {"triton", "torch"} and first["num_tokens"] == "20"
    by_impl = {row["impl"]: row for row in (first, second)}
    assert float(by_impl["triton"]["median_us"]) == rows["triton"]["median_us"] and by_impl["torch"]["median_us"] == ""
    assert "not timed" in by_impl["torch"]["problem"] and by_impl["torch"]["gpu"] == "a test"
    status, _, err = run("bench", "--model", "qwen3-30b-a3b", "--csv", table)
    assert status == 2 and "exists already" in err  # nothing measured is lost
    assert run("bench", "--model", "qwen3-30b-a3b", "--csv", tmp_path / "no" / "bench.csv")[0] == 2

    import torch

    from moelab.fused_moe import available_implementations

    assert asked["impls"] == list(available_implementations(torch.bfloat16)) and asked["eager"] is True


def test_bench_names_the_memory_that_does_not_fit(run, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from moelab.suites import bench

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "bench", full)
    status, out, err = run("bench", "--model", "qwen3-30b-a3b", "--tp-size", "4")
    assert (status, out) == (2, "") and f"{128 * 3 * 192 * 2048 * 2:,} bytes" in err and "--tp-size" in err


def test_bench_floor_of_a_known_and_of_an_unknown_device() -> None:
    from moelab.suites import bench

    cost = roofline.layer_cost(shapes.preset("qwen3-30b-a3b"), 1)
    floor, source = bench.floor_of(cost, "bfloat16", "NVIDIA H200")
    assert floor == pytest.approx(17.559456744186047)  # sglang's row in data/upstream/h200_sglang.json
    assert "NVIDIA H200" in source
    assert bench.floor_of(cost, "bfloat16", "Abacus 9")[0] is None
    assert bench.floor_of(cost, "float64", "NVIDIA H200")[0] is None  # no such ceiling among `floors`


@pytest.mark.gpu
@pytest.mark.parametrize("degrees", [("--tp-size", "4"), ("--tp-size", "4", "--ep-size", "4")])
def test_bench_on_a_gpu(run, degrees: tuple[str, ...]) -> None:
    arguments = ("bench", "--model", "qwen3-30b-a3b", *degrees, "--batch-size", "1", "--batch-size", "16")
    status, out, err = run(*arguments, "--json")
    results = json.loads(out)
    assert status == int(not all(row["within_bound"] for result in results for row in result["rows"])), err
    assert [result["num_tokens"] for result in results] == [1, 16]
    for result in results:
        rows = {row["impl"]: row for row in result["rows"]}
        assert rows["triton"]["within_bound"] and rows["compiled"]["within_bound"]
        assert rows["triton"]["low_us"] <= rows["triton"]["median_us"] <= rows["triton"]["high_us"]
        assert rows["triton"]["eager_median_us"] > 0 and len(rows["triton"]["eager_samples_us"]) == 25
        assert "not timed" in rows["torch"]["note"] and rows["torch"]["max_abs_error"] > 0
        assert rows["torch"]["eager_median_us"] > 0 and "median_us" not in rows["torch"]
        assert result["experts_touched"] > 0 and result["padding"]["waste"] >= 1
    assert "tokens: floor" in run(*arguments, "--impl", "triton", "--no-eager")[1]
