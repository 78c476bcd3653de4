"""Every Triton kernel compiles for every target that is claimed, within its shared memory, without a spill.

A sample by default: every kernel for every target, and every case for one target. `pytest -m whole` takes every case for every
target, and every shipped config.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moelab import config_files, runtime
from moelab.chips import TARGETS
from moelab.config import KernelConfig
from moelab.config_files import form_entries
from moelab.errors import RuntimeModeError
from moelab.formats import format_of_selector
from moelab.kernels import aot, aot_cases

ROOT = Path(__file__).resolve().parent.parent
TMA_SLACK = 3 * 32  # bytes by which the bound of tma_shared_memory_bytes is loose, in 16 bits and three stages
SINCE_HOPPER = {  # by TMA, and over fp8
    "moelab.kernels.grouped_gemm_tma:_grouped_gemm_tma_kernel", "moelab.kernels.quantise_tiles:_quantise_tiles_kernel"
}  # fmt: skip
BY_TMA = {"_grouped_gemm_tma_kernel", "_gated_gemm_kernel", "_activated_gemm_kernel", "_sorted_gemm_kernel"}

TOGETHER = (("sm_90",), ("sm_80", "sm_100"), ("gfx942", "gfx950"))
"""Targets that share a process, which takes seconds to begin; few enough that a slow machine compiles them all in a minute."""

# Bytes of stack that real launches take, on chips for which nothing is recorded: it reads every table by an address on 16 bytes.
# On sm_90 it does not spill.
SPILLS = {
    ("_gated_gemm_kernel", "bfloat16 64x64x32 g8 w4 s3 bias ragged K top_k 8", "sm_80"): 8,
    # Of Kimi-K2-Thinking's tuned file, fastest all the same:
    ("_packed_gemm_kernel", "int4_w4a16_group_32 16x256x128 g16 w8 s3", "sm_90"): 8,
    ("_packed_gemm_kernel", "int4_w4a16_group_32 16x256x128 g32 w8 s3", "sm_90"): 8,
}


def rows_of(expression: str) -> list[dict]:
    """What an expression over `aot` and `aot_cases` gives, a list of Resources, in a process whose Triton compiles."""
    code = "import json; from dataclasses import asdict; from moelab.config import KernelConfig\n"
    code += "from moelab.kernels import aot, aot_cases\n"
    code += f"print(json.dumps([asdict(row) for row in {expression}]))"
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def written_kernels() -> set[str]:
    """Every Triton kernel of the package, as "module:function"."""
    return {
        f"moelab.kernels.{path.stem}:{name}"
        for path in (ROOT / "moelab" / "kernels").glob("*.py")
        for name in re.findall(r"^@triton\.jit.*\ndef (_\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }


def judge(rows: list[dict]) -> None:
    """Nothing spills but what SPILLS names, all fits, and shared memory is what the formula says."""
    for row in rows:
        name = row["kernel"].partition(":")[2], row["note"], row["target"]
        assert row["spilled_bytes"] == SPILLS.get(name, 0), row
        assert row["shared_bytes"] <= row["shared_limit"], row
        predicted = row["predicted_shared_bytes"]
        if row["tma"]:
            assert 0 <= predicted - row["shared_bytes"] <= TMA_SLACK, row
        elif predicted is not None:
            assert row["shared_bytes"] == predicted, row
        # What makes it fast to route a single token: one warp that waits at no barrier.
        if row["kernel"].endswith(":_route_order_kernel") and " 1 tokens " in row["note"]:
            assert row["shared_bytes"] == 0, row


@pytest.mark.parametrize("targets", TOGETHER, ids="-".join)
def test_every_kernel_compiles(targets: tuple[str, ...]) -> None:
    rows = rows_of(f"aot.table({list(targets)!r}, sample=True)")
    for target in targets:
        here = [row for row in rows if row["target"] == target]
        later = set() if TARGETS[target].has_tma else SINCE_HOPPER
        assert {row["kernel"] for row in here} == written_kernels() - later
        by_tma = {row["kernel"].partition(":")[2] for row in here if row["tma"]}
        assert by_tma == (BY_TMA if TARGETS[target].has_tma else set())
    assert {row["target"] for row in rows} == set(targets)
    judge(rows)


def test_no_target_is_left_out() -> None:
    assert sorted(target for targets in TOGETHER for target in targets) == sorted(aot.CHECKED_TARGETS)


def test_the_sample_has_every_case_and_every_target() -> None:
    whole, sample = aot.plan(), aot.plan(sample=True)
    named = [(case.family, case.note, target) for case, target in whole]
    assert len(set(named)) == len(named), "two cases of one name"
    assert {(case.family, target) for case, target in sample} == {(case.family, target) for case, target in whole}
    assert {(case.family, case.note) for case, _ in sample} == {(case.family, case.note) for case, _ in whole}
    assert len(sample) < len(whole) / 3
    assert {target for case, target in whole if case.needs_tma} == {"sm_90", "sm_100"}
    singles = [case for case, _ in sample if case.family == "route by one program" and " 1 tokens " in case.note]
    assert len(singles) >= 3


def test_every_form_for_a_few_tokens_is_compiled() -> None:
    from moelab.kernels.few_tokens import FORMS, serves

    assert len(aot_cases.FEW_TOKENS) >= len(FORMS)
    for tokens, _, _, hidden, size, top_k in aot_cases.FEW_TOKENS:
        assert all(serves(form, tokens, top_k, hidden, size) for form in FORMS)


Shipped = tuple[str, KernelConfig]
"""A format of weights, by name, and a config of a file for it."""


def shipped_configs() -> list[Shipped]:
    """Every config of the shipped files, once for each format. Files of forms hold none."""
    found: dict[tuple[str, str], Shipped] = {}
    for path in sorted(runtime.config_dir().glob("triton_*/*.json")):
        name = config_files.parse_file_name(path.name)
        if name.kernel == form_entries.KERNEL:
            continue
        format = "plain"
        if name.dtype_selector == "int4_w4a16":  # the file says no group; what differs is in the steps of K
            format = "int4_w4a16_group_32"
        elif name.dtype_selector is not None:
            of = {"per_channel_quant": name.per_channel_quant, "block_shape": name.block_shape}
            format = format_of_selector(name.dtype_selector, **of).name
        for config in config_files.read_config_file(path).values():
            found[format, config.short()] = format, config
    return list(found.values())


def compile_shipped(configs: list[Shipped]) -> None:
    entries = [(format, config.to_json()) for format, config in configs]
    rows = rows_of(
        f"[row for format, entry in {entries!r} for row in aot.compile_case("
        "aot_cases.product(aot_cases.grouped_gemm, KernelConfig.from_json(entry), 'bfloat16') if format == 'plain' "
        "else aot_cases.quantised(format, KernelConfig.from_json(entry)), 'sm_90')]"
    )
    assert len(rows) == len(configs)
    judge(rows)


def test_shipped_configs_compile() -> None:
    """The one of each shared memory and number of warps that comes first: the rest differ from one in its order of tiles."""
    configs = shipped_configs()
    few = {(format, c.BLOCK_SIZE_M, c.BLOCK_SIZE_N, c.num_warps): (format, c) for format, c in configs}
    compile_shipped(list(few.values()))


@pytest.mark.whole
@pytest.mark.parametrize("target", aot.CHECKED_TARGETS)
def test_every_case_compiles(target: str) -> None:
    rows = rows_of(f"aot.table([{target!r}])")
    assert len({(row["family"], row["note"]) for row in rows}) == sum(t == target for _, t in aot.plan())
    judge(rows)


@pytest.mark.whole
def test_every_shipped_config_compiles() -> None:
    compile_shipped(shipped_configs())


@pytest.mark.skipif(runtime.current().mode != "interpreter", reason="about the interpreter")
def test_an_interpreting_process_says_why_it_cannot_compile() -> None:
    with pytest.raises(RuntimeModeError, match=r"python -m moelab\.kernels\.aot"):
        aot.compile_case(aot_cases.cases()[0], "sm_90")
