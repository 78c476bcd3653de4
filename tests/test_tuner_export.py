"""Exports, held against what the two schemas ask for (kernel_tuner/schema/cache/1.1.0 and T4/1.0.0, in Kernel Tuner)."""

from __future__ import annotations

import datetime
import itertools
import json
from pathlib import Path

import pytest
from synthetic import small_problem, synthetic_landscape

from moelab.errors import UnknownNameError
from moelab.tuner.export import export
from moelab.tuner.replay import Table

PROBLEM = small_problem((1, 64))
LANDSCAPE = synthetic_landscape(PROBLEM)
TABLE = Table(LANDSCAPE)
INVALID = ("InvalidConfig", "CompilationFailedConfig", "RuntimeFailedConfig")


def files(folder: Path, kind: str) -> dict[str, dict]:
    written = export(LANDSCAPE, folder, kind)
    assert len(written) == 4  # two GEMMs at two batch sizes
    return {path.name.split(".")[0]: json.loads(path.read_text()) for path in written}


def test_kernel_tuner_cache_files(tmp_path: Path) -> None:
    for content in files(tmp_path, "kernel_tuner").values():
        assert content["schema_version"] == "1.1.0" and content["objective"] == "time"
        assert content["device_name"] == "Synthetic H200" and content["kernel_name"].startswith("grouped_gemm_")
        assert all(isinstance(size, int) for size in content["problem_size"])
        keys = content["tune_params_keys"]
        assert list(content["tune_params"]) == keys and "waves_per_eu" not in keys
        product = itertools.product(*content["tune_params"].values())
        assert set(content["cache"]) == {",".join(map(str, values)) for values in product}, (
            "simulation asks for all of them"
        )
        for key, line in content["cache"].items():
            assert key == ",".join(str(line[name]) for name in keys)
            assert isinstance(line["time"], float) or line["time"] in INVALID
            costs = ("compile_time", "verification_time", "benchmark_time", "strategy_time", "framework_time")
            assert all(isinstance(line[name], int | float) for name in costs)
            datetime.datetime.fromisoformat(line["timestamp"])
            if isinstance(line["time"], float):
                assert len(line["times"]) == 10 and min(line["times"]) <= line["time"] <= max(line["times"])
        text = next(tmp_path.glob("*.json")).read_text().strip()
        assert text[-3:] == "}\n}"  # by which Kernel Tuner knows a cache that was closed


def test_times_are_the_recorded_ones_in_milliseconds(tmp_path: Path) -> None:
    content = files(tmp_path, "kernel_tuner")["synthetic-small-up-64"]
    config = next(r.contender[0] for r in LANDSCAPE.rows if r.num_tokens == 64 and r.outcome.samples_us)
    key = ",".join(str(getattr(config, name)) for name in content["tune_params_keys"])
    assert content["cache"][key]["time"] == pytest.approx(TABLE.median_us("up", 64, (config,)) / 1e3)
    failed = [line for line in content["cache"].values() if line["time"] == "CompilationFailedConfig"]
    assert failed and all("made to fail" in line["error"] for line in failed)
    assert any(line["time"] == "RuntimeFailedConfig" for line in content["cache"].values())


def test_t4_results(tmp_path: Path) -> None:
    for content in files(tmp_path, "t4").values():
        assert content["schema_version"] == "1.0.0"
        seen = set()
        for result in content["results"]:
            assert {"configuration", "times", "invalidity", "correctness"} <= set(result)
            assert all(isinstance(value, int) for value in result["configuration"].values())
            assert isinstance(result["times"]["compilation_time"], float) and isinstance(
                result["times"]["runtimes"], list
            )
            assert result["invalidity"] in ("timeout", "compile", "runtime", "correctness", "constraints", "correct")
            assert (result["invalidity"] == "correct") == (result["correctness"] == 1.0) == bool(result["measurements"])
            assert all(set(m) == {"name", "value", "unit"} for m in result["measurements"])
            seen.add(result["invalidity"])
        assert {"correct", "compile", "correctness", "constraints"} <= seen


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="kernel_tuner"):
        export(LANDSCAPE, tmp_path, "kerneltuner")
    assert not list(tmp_path.iterdir())
