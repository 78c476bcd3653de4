"""The space: the peers' grids, what exact rules exclude, and which configs are one program."""

from __future__ import annotations

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
from synthetic import large_problem, small_problem

from moelab.config import KernelConfig, violations
from moelab.shapes import MoEShape, load_model
from moelab.tuner.problem import GEMMS, Problem, find_incumbents
from moelab.tuner.space import build_space, effective_group, grid, representatives, row_blocks

QWEN3 = load_model("qwen3-30b-a3b")


def test_the_peers_grids() -> None:
    assert len(set(grid("sm_90"))) == 1920
    rocm = grid("gfx942")
    assert len(set(rocm)) == 1600 and {(c.num_stages, c.waves_per_eu) for c in rocm} == {(2, 0)}
    assert len(grid("sm_90", (1, 2, 4))) == 3 * 1920


def test_every_exclusion_is_counted_with_its_reason() -> None:
    space = build_space(large_problem())
    for gemm in GEMMS:
        assert space.pruned[gemm] == {"shared memory": 616, "accumulators": 48}
        assert len(space.configs[gemm]) + sum(space.pruned[gemm].values()) == space.size == 1920
    assert "needs" in space.examples["shared memory"] and "spills" in space.examples["accumulators"]


def test_what_is_excluded_cannot_run_and_what_is_kept_can() -> None:
    problem = large_problem()
    kept = set(build_space(problem).configs["up"])
    for config in grid("sm_90"):
        runs = not violations(config, dtype="bfloat16", target="sm_90")
        held = config.BLOCK_SIZE_M * config.BLOCK_SIZE_N / (32 * config.num_warps)
        assert (config in kept) == (runs and held <= 128)


def test_nothing_goes_on_a_guess() -> None:
    """Each BLOCK_SIZE_M is tried at each batch size: at batch 1, where 16 rows would do, others win often enough."""
    problem = large_problem()
    configs = build_space(problem).configs["up"]
    for b in problem.batch_sizes:
        measured = set(representatives(configs, problem, "up", b).values())
        assert {c.BLOCK_SIZE_M for c in measured} == {16, 32, 64, 128, 256}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_shared_memory_follows_the_dtype(dtype: str) -> None:
    space = build_space(Problem(QWEN3.with_dtype(dtype), "NVIDIA H200", "sm_90", "3.6.0"))
    assert (len(space.configs["up"]) < 1256) == (dtype == "float32")


def test_empty_slices_of_k_go_by_gemm() -> None:
    """K = 192 of the tiny GEMM2 holds one block of 256, three of 64; GEMM1's 4096 holds all of them."""
    shape = MoEShape("narrow", num_experts=4, top_k=1, hidden_size=4096, moe_intermediate_size=192)
    space = build_space(Problem(shape, "NVIDIA H200", "sm_90", "3.6.0", kernel="split_k_atomic", split_k=(1, 2, 4)))
    assert "empty SPLIT_K slices" not in space.pruned["up"]
    assert space.pruned["down"]["empty SPLIT_K slices"] > 0
    assert {(c.BLOCK_SIZE_K, c.SPLIT_K) for c in space.configs["down"]} == {
        (64, 1),
        (64, 2),
        (128, 1),
        (128, 2),
        (256, 1),
    }


# --- equal programs ------------------------------------------------------------------------------------------------


def order(group: int, rows: int, columns: int) -> list[tuple[int, int]]:
    """The tile of each program, as kernels/tiles.py has it (grouped_tile), in plain Python."""
    tiles = []
    for pid in range(rows * columns):
        first = pid // (group * columns) * group
        tall = min(rows - first, group)
        tiles.append((first + pid % (group * columns) % tall, pid % (group * columns) // tall))
    return tiles


@hypothesis.given(st.integers(1, 40), st.integers(1, 6))
@hypothesis.settings(max_examples=60)
def test_effective_group_is_exact(rows: int, columns: int) -> None:
    """Two values of GROUP_SIZE_M give the same order of tiles if and only if their effective groups agree."""
    configs = [KernelConfig(16, 32, 64, group) for group in (1, 2, 4, 16, 32, 64)]
    for a, b in itertools.combinations(configs, 2):
        same = effective_group(a, rows, columns) == effective_group(b, rows, columns)
        assert same == (order(a.GROUP_SIZE_M, rows, columns) == order(b.GROUP_SIZE_M, rows, columns))


def test_with_at_most_16_row_blocks_three_groups_are_one_program() -> None:
    problem = large_problem()  # top_k 8: batch 2 has 16 pairs, each in a block of its own at most
    assert [row_blocks(problem, b, 64) for b in (1, 2, 4)] == [8, 16, 32]
    configs = build_space(problem).configs["up"]
    equal = [sum(c != r for c, r in representatives(configs, problem, "up", b).items()) for b in (1, 2, 4, 8)]
    assert equal == [628, 628, 314, 0]  # 2 of 4 groups, 2 of 4, 1 of 4, none


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 300])
def test_row_blocks_are_what_the_launcher_covers(num_tokens: int) -> None:
    from moelab.inputs import routing_for
    from moelab.kernels.align import align

    problem = small_problem()
    ids = routing_for(problem.shape, num_tokens).topk_ids
    for block in (16, 128):
        aligned = align(ids, block, problem.shape.num_experts)
        assert row_blocks(problem, num_tokens, block) == -(-aligned.rows_in_use // block)


def test_a_representative_stands_for_itself() -> None:
    problem = small_problem()
    configs = build_space(problem).configs["down"]
    for b in problem.batch_sizes:
        same = representatives(configs, problem, "down", b)
        assert all(same[r] == r for r in same.values())


# --- problems --------------------------------------------------------------------------------------------------------


def test_a_problem_survives_json() -> None:
    import json

    incumbents = find_incumbents(QWEN3, "NVIDIA H200", "3.6.0", (1, 64))
    assert set(incumbents) == {"default", "current"}  # configs/triton_3_6_0 has a file for it
    for problem in (
        Problem(QWEN3, "NVIDIA H200", "sm_90", "3.6.0", (64, 1), incumbents=incumbents),
        small_problem(separate_down=False),
    ):
        assert Problem.from_json(json.loads(json.dumps(problem.to_json()))) == problem
    assert problem.batch_sizes == (1, 16, 64, 256, 1024)


def test_incumbents_without_a_file_are_the_defaults() -> None:
    assert set(find_incumbents(QWEN3, "NVIDIA Nothing", "3.6.0", (1,))) == {"default"}
