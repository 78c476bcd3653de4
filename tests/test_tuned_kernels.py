"""Kernels beside the compatible kernel, tuned: their spaces, what cannot be tuned, their files, whole runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from error_rows import unhelpful
from synthetic import SMALL, small_problem, synthetic_landscape

from moelab import cli, config_files, runtime
from moelab.chips import TARGETS
from moelab.config import KernelConfig, default_config
from moelab.errors import (
    ConfigFileError,
    DeviceError,
    LandscapeError,
    LayoutError,
    UnknownNameError,
)
from moelab.implementations import IMPLEMENTATIONS
from moelab.kernels import checks
from moelab.plots import handover
from moelab.shapes import MoEShape
from moelab.tuner import landscape, starting
from moelab.tuner.gpu import GpuEvaluator
from moelab.tuner.landscape import default_name
from moelab.tuner.problem import COMPATIBLE, Problem, find_incumbents
from moelab.tuner.results import BatchResult, TuneResult
from moelab.tuner.session import TuneSession
from moelab.tuner.space import build_space
from moelab.tuner.tuned_kernels import TUNED, implementation_of, kernel_name, require_tunable, tuning_of

CONFIGS = {1: KernelConfig(16, 64, 64, 1, 4, 3), 64: KernelConfig(64, 64, 64, 16, 8, 2)}
OTHERS = tuple(name for name in TUNED if name != COMPATIBLE)

interpreted = pytest.mark.skipif(runtime.current().mode == "gpu", reason="the gpu tests hold this against a GPU")


def of_kernel(kernel: str, **changes) -> Problem:
    return small_problem((1, 64), kernel=kernel, split_k=implementation_of(kernel).split_k, **changes)


def test_names_are_those_of_the_layers_that_run_them() -> None:
    assert set(TUNED.values()) <= set(IMPLEMENTATIONS)
    assert all(kernel_name(implementation) == kernel_name(name) == name for name, implementation in TUNED.items())
    assert all(implementation == name for name, implementation in TUNED.items() if name != COMPATIBLE)
    for name in OTHERS:
        assert config_files.parse_file_name(config_files.file_name(8, 64, "X", kernel=name)).kernel == name


# --- spaces ------------------------------------------------------------------------------------------------------------


def test_tma_takes_shared_memory_of_its_own() -> None:
    plain, tma = (
        build_space(Problem(SMALL.with_dtype(dtype), "X", "sm_90", "3.6.0", kernel=kernel))
        for dtype, kernel in (("float32", COMPATIBLE), ("float32", "tma"))
    )
    assert tma.pruned["up"]["shared memory"] > plain.pruned["up"]["shared memory"]
    assert set(tma.configs["up"]) < set(plain.configs["up"])


def test_boxes_of_tma_have_sides_of_256() -> None:
    axes = {
        "BLOCK_SIZE_M": (16,),
        "BLOCK_SIZE_N": (32, 512),
        "BLOCK_SIZE_K": (64,),
        "GROUP_SIZE_M": (1,),
        "num_stages": (2,),
    }
    space = build_space(of_kernel("tma", axes=axes))
    assert space.pruned["down"] == {"TMA boxes": 1} and "512" in space.examples["TMA boxes"]


def test_half_a_block_of_columns_is_gate_and_half_up() -> None:
    """AMD's grid has blocks of 16 columns, of which a gated GEMM1 would multiply 8 and 8."""
    space = build_space(dataclasses.replace(of_kernel("gated", axes=None), target="gfx942"))
    assert space.pruned["up"]["gate and up"] > 0 and "gate and up" not in space.pruned["down"]
    assert [min(c.BLOCK_SIZE_N for c in space.configs[gemm]) for gemm in ("up", "down")] == [32, 16]
    plain = dataclasses.replace(
        of_kernel("gated", axes=None), target="gfx942", shape=dataclasses.replace(SMALL, gated=False)
    )
    assert "gate and up" not in build_space(plain).pruned["up"]


def test_split_k_is_not_tried_where_a_kernel_does_not_split() -> None:
    space = build_space(small_problem((1,), kernel="tma", split_k=(1, 2)))
    assert space.pruned["up"]["SPLIT_K"] > 0 and {c.SPLIT_K for c in space.configs["up"]} == {1}


def test_split_k_that_leaves_slices_empty_is_pruned_with_its_reason() -> None:
    """K = 512 of GEMM2 has four blocks of 128, and eight of 64."""
    space = build_space(of_kernel("split_k_workspace"))
    assert {(c.BLOCK_SIZE_K, c.SPLIT_K) for c in space.configs["down"]} == {
        *((64, split) for split in (1, 2, 4, 8)),
        *((128, split) for split in (1, 2, 4)),
    }
    assert set(space.pruned["down"]) >= {"empty SPLIT_K slices"} and "empty SPLIT_K slices" not in space.pruned["up"]
    assert "SPLIT_K = 8 leaves empty slices" in space.examples["empty SPLIT_K slices"]


# --- what cannot be tuned ----------------------------------------------------------------------------------------------


def refusal(**changes) -> str:
    with pytest.raises((DeviceError, LayoutError, UnknownNameError)) as caught:
        require_tunable(dataclasses.replace(of_kernel("tma"), **changes))
    assert unhelpful(str(caught.value)) is None
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_target_without_tma() -> None:
    for target in ("sm_80", "gfx942"):
        assert refusal(target=target).startswith("DeviceError") and target in refusal(target=target)
    for target in ("sm_90", "sm_100"):
        assert require_tunable(dataclasses.replace(of_kernel("tma"), target=target)) is tuning_of("tma")


def test_a_layer_whose_rows_tma_does_not_take() -> None:
    narrow = dataclasses.replace(SMALL, moe_intermediate_size=300)
    assert "300" in refusal(shape=narrow) and refusal(shape=narrow).startswith("LayoutError")
    require_tunable(small_problem((1,), kernel=COMPATIBLE))


def test_a_kernel_nobody_knows() -> None:
    assert "Did you mean" in refusal(kernel="tmaa") and "'triton'" in refusal(kernel="tmaa")


# --- files -------------------------------------------------------------------------------------------------------------


def tuned(kernel: str) -> TuneResult:
    batches = {b: BatchResult(b, config, config) for b, config in CONFIGS.items()}
    return TuneResult(of_kernel(kernel), batches, "made up", 0.0, (), {})


def found(folder: Path, b: int, kernel: str | None, down: bool = False) -> KernelConfig | None:
    return config_files.lookup(
        SMALL.num_experts, SMALL.moe_intermediate_size, "Synthetic H200", num_tokens=b, triton_version="3.6.0",
        kernel=kernel, down=down, config_dir=folder,
    ).config  # fmt: skip


@pytest.mark.parametrize("kernel", OTHERS)
def test_files_are_the_kernels_own(tmp_path: Path, kernel: str) -> None:
    written = tuned(kernel).write(tmp_path)
    base = "triton_3_6_0/E=8,N=512,device_name=Synthetic_H200"
    names = {f"{base},kernel={kernel}.json", f"{base},kernel={kernel}_down.json"}
    assert {str(path.relative_to(tmp_path)) for path in written} == names
    for b, config in CONFIGS.items():
        assert found(tmp_path, b, kernel) == found(tmp_path, b, kernel, down=True) == config
        assert found(tmp_path, b, None) == default_config(b, SMALL.num_experts)
    assert not config_files.doctor(tmp_path, "moelab").of("error")
    assert {source.name.kernel for source in config_files.sources(tmp_path)} == {kernel}


def test_winners_are_handed_to_moelabs_loader_alone(tmp_path: Path) -> None:
    """Under a peer's rules they would be taken for the compatible kernel's."""
    written = handover.write(tuned("tma"), "moelab", tmp_path)
    assert all(",kernel=tma" in each.path.name for each in written) and len(written) == 2
    for rules in ("sglang", "vllm"):
        with pytest.raises(ConfigFileError, match=f"{rules} has no file of its own for kernel"):
            handover.write(tuned("tma"), rules, tmp_path / rules)
        assert not list(tmp_path.glob(f"{rules}/**/*.json"))


def test_incumbents_are_the_kernels_own_then_the_exchange_kernels_then_the_default(tmp_path: Path) -> None:
    def current(kernel: str) -> KernelConfig | None:
        pairs = find_incumbents(SMALL, "Synthetic H200", "3.6.0", (64,), config_dir=tmp_path, kernel=kernel)
        assert pairs["default"][64] == (default_config(64, SMALL.num_experts),) * 2
        return pairs["current"][64][0] if "current" in pairs else None

    assert current("tma") is current(COMPATIBLE) is None
    exchange = dataclasses.replace(tuned(COMPATIBLE), batches={64: BatchResult(64, CONFIGS[1], CONFIGS[1])})
    exchange.write(tmp_path)
    assert current("tma") == current(COMPATIBLE) == CONFIGS[1]
    tuned("tma").write(tmp_path)
    assert current("tma") == CONFIGS[64] and current(COMPATIBLE) == CONFIGS[1]


def on_a(monkeypatch, target: str) -> None:
    """As if this process had that GPU."""
    monkeypatch.setattr(starting.runtime, "current", lambda: runtime.Runtime("gpu", "cuda", "NVIDIA X", "pretended"))
    monkeypatch.setattr(checks, "current_target", lambda: TARGETS[target])


def test_the_problem_of_a_gpu_is_of_the_kernel_asked_for(monkeypatch, capsys) -> None:
    on_a(monkeypatch, "sm_80")
    split = starting.gpu_problem(SMALL, [1], kernel="split_k_workspace")
    assert (split.kernel, split.split_k) == ("split_k_workspace", (1, 2, 4, 8))
    assert starting.gpu_problem(SMALL, [1], kernel="triton") == starting.gpu_problem(SMALL, [1])
    assert cli.main(["tune", "--model", "qwen3-30b-a3b", "--kernel", "gated_tma"]) == 2
    assert "'gated_tma' cannot be tuned on NVIDIA X: sm_80 has no TMA" in capsys.readouterr().err
    on_a(monkeypatch, "sm_100")
    assert starting.gpu_problem(SMALL, [1], kernel="gated_tma").kernel == "gated_tma"


@pytest.mark.parametrize("kernel", OTHERS)
def test_a_landscape_is_replayed_into_the_kernels_files(tmp_path: Path, capsys, kernel: str) -> None:
    problem = of_kernel(kernel)
    assert default_name(problem) == f"synthetic-small-tp1-{kernel}-Synthetic_H200"
    recorded = landscape.write(synthetic_landscape(problem), tmp_path / "small.parquet")
    asked = ["tune", "--replay", str(recorded), "--json"]
    assert cli.main([*asked, "--out", str(tmp_path), "--kernel", kernel]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["kernel"] == kernel
    assert len(answer["files"]) == 2 and all(f",kernel={kernel}" in path for path in answer["files"])
    assert cli.main(asked) == 0
    assert json.loads(capsys.readouterr().out)["configs"] == answer["configs"]
    assert cli.main(["tune", "--resume", answer["run"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == answer["files"]


def test_a_replay_of_another_kernel_is_refused(tmp_path: Path, capsys) -> None:
    recorded = landscape.write(synthetic_landscape(of_kernel("tma")), tmp_path / "small.parquet")
    assert cli.main(["tune", "--replay", str(recorded), "--kernel", "triton"]) == 2
    err = capsys.readouterr().err
    assert LandscapeError.__name__ not in err and "has the kernel tma, not grouped_gemm" in err
    assert cli.main(["tune", "--replay", str(recorded), "--kernel", "tmaa"]) == 2
    assert "Did you mean" in capsys.readouterr().err


def test_the_command_line_names_every_kernel(capsys) -> None:
    cli.main(["tune", "--help"])
    told = capsys.readouterr().out
    assert all(implementation in told for implementation in TUNED.values())


def test_explain_finds_the_kernels_own_file(tmp_path: Path, capsys) -> None:
    name = config_files.file_name(128, 768, "NVIDIA H200", kernel="tma")
    config_files.write_config_file(tmp_path / "triton_3_6_0" / name, CONFIGS)
    asked = ["explain", "--model", "qwen3-30b-a3b", "--batch-size", "60", "--device", "NVIDIA H200"]
    asked += ["--triton-version", "3.6.0", "--config-dir", str(tmp_path), "--json"]

    def told(*more: str) -> dict:
        assert cli.main([*asked, *more]) == 0
        return json.loads(capsys.readouterr().out)

    for more in ((), ("--down",)):
        answer = told("--kernel", "tma", *more)
        assert Path(answer["path"]).name == name and answer["config"] == CONFIGS[64].to_json()
    assert told("--kernel", "triton") == told() and told()["is_default"]
    assert told("--kernel", "gated")["config"] is None
    assert cli.main([*asked, "--kernel", "tma", "--rules", "vllm"]) == 2


# --- whole runs --------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("kernel", [pytest.param("split_k_workspace", marks=pytest.mark.whole), "gated_tma"])
def test_a_whole_run_in_float16(tmp_path: Path, kernel: str) -> None:
    """Compiled by real processes, checked by Triton's interpreter, timed by nobody: every config runs, the best is written."""
    shape = MoEShape("tiny", num_experts=4, top_k=2, hidden_size=128, moe_intermediate_size=64, dtype="float16")
    axes = {
        "num_stages": (2,), "BLOCK_SIZE_M": (16,), "BLOCK_SIZE_K": (32,), "BLOCK_SIZE_N": (32, 64), "num_warps": (4,),
        "GROUP_SIZE_M": (1,),
    }  # fmt: skip
    name, sizes = "NVIDIA H200", (1, 6)
    incumbents = find_incumbents(shape, name, "3.7.1", sizes, config_dir=tmp_path, kernel=kernel)
    split = implementation_of(kernel).split_k
    problem = Problem(
        shape, name, "sm_90", "3.7.1", sizes, kernel=kernel, split_k=split, axes=axes, incumbents=incumbents
    )
    evaluator = GpuEvaluator(
        problem, device="interpreted_device:InterpretedDevice", processes=1, cache_dir=tmp_path / "cache"
    )
    session = TuneSession(problem, evaluator, strategy="grid", run=tmp_path / "run.jsonl")
    result = session.run()
    assert result.complete and not result.errors and not result.failures and not evaluator.incidents
    result.write(tmp_path)
    fitting = {"up": 4, "down": 2}  # blocks that K of 128 and 64 has
    for gemm, most in fitting.items():
        for b in sizes:
            found = config_files.lookup(
                4, 64, name, num_tokens=b, triton_version="3.7.1", kernel=kernel, down=gemm == "down", config_dir=tmp_path
            )  # fmt: skip
            assert found.config == KernelConfig(16, 32, 32, 1, 4, 2, SPLIT_K=min(most, max(split)))
