"""Every Triton kernel compiles for every target that is claimed, within its shared memory, without a spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moelab import config_files, runtime
from moelab.errors import RuntimeModeError
from moelab.kernels import aot, aot_cases

ROOT = Path(__file__).resolve().parent.parent
TMA_SLACK = 3 * 32  # bytes by which the bound of tma_shared_memory_bytes is loose, in 16 bits and three stages


def in_a_compiler(code: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def table() -> list[dict]:
    code = "import json; from dataclasses import asdict; from moelab.kernels import aot; "
    return json.loads(in_a_compiler(code + "print(json.dumps([asdict(row) for row in aot.table()]))"))


def test_every_kernel_on_every_target(table: list[dict]) -> None:
    assert {row["target"] for row in table} == set(aot.CHECKED_TARGETS)
    assert len(table) == sum(case.runs_on(target) for case in aot_cases.cases() for target in aot.CHECKED_TARGETS)
    assert {row["target"] for row in table if row["tma"]} == {"sm_90", "sm_100"}
    kernels = {case.kernel for case in aot_cases.cases()}
    sources = [path for path in (ROOT / "moelab" / "kernels").glob("*.py") if path.name != "tiles.py"]
    written = {
        f"moelab.kernels.{path.stem}:{line.split('(')[0].removeprefix('def ')}"
        for path in sources
        for line in path.read_text().splitlines()
        if line.startswith("def _") and "_kernel(" in line
    }
    assert written - {"moelab.kernels.sum_reduce_cuda:_kernel", "moelab.kernels.aot:_kernel"} == kernels


def test_shared_memory_fits_and_is_what_the_formula_says(table: list[dict]) -> None:
    for row in table:
        assert row["shared_bytes"] <= row["shared_limit"], row
        if row["tma"]:
            assert 0 <= row["predicted_shared_bytes"] - row["shared_bytes"] <= TMA_SLACK, row
        elif row["predicted_shared_bytes"] is not None:
            assert row["shared_bytes"] == row["predicted_shared_bytes"], row


def test_nothing_spills(table: list[dict]) -> None:
    assert [row for row in table if row["spilled_bytes"]] == []


def test_a_single_token_is_routed_without_shared_memory(table: list[dict]) -> None:
    """What makes it fast: one warp that waits at no barrier."""
    labels = [
        f"route_order {name}" for name in ("qwen3 1 bfloat16", "qwen3 1 bfloat16 tiles", "deepseek-v3 1 bfloat16 tiles")
    ]
    ours = [row for row in table if row["label"] in labels]
    assert sorted(row["label"] for row in ours) == sorted(labels * len(aot.CHECKED_TARGETS))
    assert {row["shared_bytes"] for row in ours} == {0}


def test_shipped_configs_compile_without_a_spill() -> None:
    configs = {
        config.short(): config
        for path in sorted(runtime.config_dir().glob("triton_*/*.json"))
        for config in config_files.read_config_file(path).values()
    }
    assert configs
    code = (
        "import json, sys; from moelab.config import KernelConfig; from moelab.kernels import aot, aot_cases\n"
        f"for entry in json.loads({json.dumps([c.to_json() for c in configs.values()])!r}):\n"
        "    case = aot_cases.gemm_case(KernelConfig.from_json(entry), 'bfloat16')\n"
        "    row = aot.compile_case(case, 'sm_90')\n"
        "    print(json.dumps([row.label, row.spilled_bytes, row.shared_bytes, row.predicted_shared_bytes]))"
    )
    rows = [json.loads(line) for line in in_a_compiler(code).splitlines()]
    assert len(rows) == len(configs)
    for label, spilled, shared, predicted in rows:
        assert spilled == 0 and shared == predicted, label


@pytest.mark.skipif(runtime.current().mode != "interpreter", reason="about the interpreter")
def test_an_interpreting_process_says_why_it_cannot_compile() -> None:
    with pytest.raises(RuntimeModeError, match=r"python -m moelab\.kernels\.aot"):
        aot.compile_case(aot_cases.cases()[0], "sm_90")
