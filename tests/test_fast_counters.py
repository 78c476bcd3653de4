"""The suite fast_counters with ncu replaced: what it asks for, what it reads from the CSV, what it refuses, what it launches."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moelab import recordings, runtime, suites
from moelab.errors import RecordingError, RuntimeModeError
from moelab.kernels.fast_instances import INSTANCES
from moelab.kernels.fast_layer import GEMM1, GEMM2, SUM
from moelab.recordings import Recording
from moelab.shapes import MoEShape
from moelab.suites import fast_counters, fast_layer

METRICS = {"duration_ns": "gpu__time_duration.sum", "registers": "launch__registers_per_thread"}
HEAD = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'


def csv_of(launches: int, duration: str = "1,000") -> str:
    """ncu's output for so many launches, the last first, after lines of its own."""
    lines = ["==PROF== Connected to process 7", "==PROF== Disconnected", HEAD]
    for number in reversed(range(launches)):
        lines.append(f'"{number}","fast_layer<{number}>","gpu__time_duration.sum","ns","{duration}"')
        lines.append(f'"{number}","fast_layer<{number}>","launch__registers_per_thread","register/thread","168"')
        lines.append(f'"{number}","fast_layer<{number}>","not__asked_for.sum","","n/a"')
    return "\n".join([*lines, "==WARNING== what ncu says at its end, without columns"])


# --- what is asked for --------------------------------------------------------------------------------------------


def test_the_first_metric_that_the_chip_has_is_chosen() -> None:
    known = [
        "",
        "gpu__time_duration  Counter  ns",
        "sm__pipe_tensor_op_hmma_cycles_active  Counter",
        "dram__bytes  Counter",
    ]
    found = fast_counters.chosen_metrics(known)
    assert found == {
        "duration_ns": "gpu__time_duration.sum",
        "memory_bytes": "dram__bytes.sum",
        "tensor_percent": f"sm__pipe_tensor_op_hmma_cycles_active.{fast_counters.PERCENT}",
        "registers": "launch__registers_per_thread",  # of the launch, not of the chip: never listed, always there
    }
    known.append("sm__pipe_tensor_cycles_active  Counter")
    assert fast_counters.chosen_metrics(known)["tensor_percent"].startswith("sm__pipe_tensor_cycles_active.")


# --- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"), [("1,234,567", 1234567.0), ("1 234.5", 1234.5), ("83.05", 83.05), ("0", 0.0)]
)
def test_rows_in_the_order_of_the_launches(text: str, value: float) -> None:
    first, second = fast_counters.rows_of(csv_of(2, text), METRICS)
    assert first == {"kernel": "fast_layer<0>", "duration_ns": value, "registers": 168.0}
    assert second["kernel"] == "fast_layer<1>"


def test_parts_of_the_second_level_cache_are_read_beside_it() -> None:
    peak = fast_counters.PERCENT
    metrics = {**METRICS, "l2_percent": f"lts__throughput.{peak}"}
    lines = [csv_of(1), *(f'"0","fast_layer<0>","{name}","%","{value}"' for name, value in (
        (f"lts__throughput.{peak}", "81.5"), (f"lts__ltcfabric2ltc_cycles_active.{peak}", "81.5"),
        (f"lts__t_sectors.{peak}", "40"), (f"lts__d_sectors.{peak}", "n/a"), ("lts__t_sectors.sum", "7"),
    ))]  # fmt: skip
    (row,) = fast_counters.rows_of("\n".join(lines), metrics)
    assert row["l2_percent"] == 81.5
    assert row["l2_parts"] == {"lts__ltcfabric2ltc_cycles_active": 81.5, "lts__t_sectors": 40.0}
    assert "l2_parts" not in fast_counters.rows_of("\n".join(lines), METRICS)[0]


@pytest.mark.parametrize("text", ["n/a", "nan", "", "inf"])
def test_what_is_no_number_is_left_out(text: str) -> None:
    (row,) = fast_counters.rows_of(csv_of(1, text), METRICS)
    assert row == {"kernel": "fast_layer<0>", "registers": 168.0}


def test_no_table_is_refused_with_what_ncu_said() -> None:
    with pytest.raises(RecordingError, match=r"ERR_NVGPUCTRPERM.*Expected its CSV"):
        fast_counters.rows_of("==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM", METRICS)


def counting(launches: int, asked: list[list[str]]):
    def run(command: list[str], **given: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(stdout=csv_of(launches), stderr="")

    return run


def test_a_row_for_each_launch_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", counting(4, asked))
    rows = fast_counters.profiled("mixtral-8x7b/tp2", 64, METRICS)
    assert [(row["launch"], row["kernel"]) for row in rows] == [
        ("whole", "fast_layer<0>"), ("GEMM1", "fast_layer<1>"), ("GEMM2", "fast_layer<2>"), ("the sum", "fast_layer<3>"),
    ]  # fmt: skip
    assert all((row["shape"], row["num_tokens"], row["routing"]) == ("mixtral-8x7b/tp2", 64, "uniform") for row in rows)
    (command,) = asked
    assert command[0] == "ncu" and command[-4:] == ["-m", "moelab.suites.fast_counters", "mixtral-8x7b/tp2", "64"]
    assert command[command.index("--metrics") + 1] == "gpu__time_duration.sum,launch__registers_per_thread"
    fast_counters.profiled("mixtral-8x7b/tp2", 64, {**METRICS, "l2_percent": "lts__throughput.pct"})
    assert asked[1][asked[1].index("--metrics") + 1].endswith(",lts__throughput.pct,breakdown:lts__throughput.pct")


@pytest.mark.parametrize("launches", [3, 5])
def test_another_number_of_launches_is_refused(launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", counting(launches, []))
    with pytest.raises(
        RecordingError, match=rf"counted {launches} launches of a with 64 tokens. Expected 4: whole, GEMM1"
    ):
        fast_counters.profiled("a", 64, METRICS)


# --- the recording ------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "require_cuda", lambda what: None)


def test_without_ncu_the_suite_refuses(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeModeError, match=r"fast_counters.*ncu.*not on PATH.*Install it"):
        fast_counters.record()


def test_what_is_recorded_loads_again(on_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **given: object) -> SimpleNamespace:
        listed = "gpu__time_duration  Counter  ns" if "--query-metrics" in command else csv_of(4)
        return SimpleNamespace(stdout=listed, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(fast_counters.shutil, "which", lambda name: f"/bin/{name}")
    kept: list[int] = []
    made = fast_counters.record([("a", 1), ("b", 2)], on_rows=lambda rows: kept.append(len(rows)))
    assert kept == [4, 8]
    loaded = recordings.load(recordings.write(made, tmp_path / "fast_counters.json"))
    assert [(row["shape"], row["num_tokens"]) for row in loaded.rows] == [("a", 1)] * 4 + [("b", 2)] * 4
    assert loaded.protocol["metrics"] == METRICS and loaded.rows[0]["duration_ns"] == 1000.0


def test_the_shipped_recording_is_of_its_cells() -> None:
    rows = recordings.load("fast_counters").rows
    found = list(dict.fromkeys((row["shape"], row["num_tokens"]) for row in rows))
    assert found == list(fast_counters.CELLS[: len(found)])
    assert [row["launch"] for row in rows] == list(fast_counters.LAUNCHES) * len(found)
    assert all(set(fast_counters.METRICS) <= set(row) for row in rows)
    for row in rows:
        apart = (
            row["launch"] == "the sum"
            and fast_layer.instance_of(fast_layer.shape_of(row["shape"]), row["num_tokens"]).apart
        )
        assert row["kernel"].startswith("void fast_sum<" if apart else "void fast_layer<")


def test_all_runs_it_after_the_others_so_that_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Recording:
        raise RuntimeModeError("no ncu")

    def tiny(suite: str) -> Recording:
        return Recording(suite, runtime.provenance(seed=0), {}, ({"n": 1},))

    known = {"before": lambda: tiny("before"), "fast_counters": refuse, "after": lambda: tiny("after")}
    assert suites.suite_names(["all"], known) == ["before", "after", "fast_counters"]
    assert suites.suite_names(["fast_counters", "before"], known) == ["fast_counters", "before"]
    with pytest.raises(RuntimeModeError, match="no ncu"):
        suites.record(["all"], tmp_path, known)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["after", "before"]


# --- what is launched ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "launched"), [(16, GEMM1 | GEMM2 | SUM), (176, GEMM1 | GEMM2)])
def test_each_launch_once_warm_then_once_marked_in_order(
    monkeypatch: pytest.MonkeyPatch, tokens: int, launched: int
) -> None:
    """By an instance that adds up in the same launch, and one that does not."""
    seen: list[str] = []
    small = MoEShape.from_sizes(num_experts=8, top_k=2, hidden_size=64, moe_intermediate_size=32, dtype="float32")

    def launches(label: str, given: object):
        assert given == INSTANCES[tokens]
        return lambda i: seen.append(label)

    marks = SimpleNamespace(cudaProfilerStart=lambda: seen.append("<"), cudaProfilerStop=lambda: seen.append(">"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: marks)
    monkeypatch.setattr(fast_counters.suite, "shape_of", lambda name: small)
    monkeypatch.setattr(fast_counters.suite, "instance_of", lambda *_: INSTANCES[tokens])
    monkeypatch.setattr(
        fast_counters.suite, "fast", lambda layer, instance, parts, overlap: launches(f"whole {parts}", instance)
    )
    alone = ("the sum", "GEMM2", "GEMM1")
    monkeypatch.setattr(
        fast_counters.suite, "alone", lambda layer, instance: {name: launches(name, instance) for name in alone}
    )
    fast_counters.launch("small", 3)
    each = [(name, "<", name, ">") for name in (f"whole ({launched},)", "GEMM1", "GEMM2", "the sum")]
    assert seen == [event for events in each for event in events]
