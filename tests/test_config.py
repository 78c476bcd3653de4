"""config: the JSON edge, every rule of validity, the shared-memory formula, and the default rule."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab.chips import TARGETS, Target
from moelab.config import (
    KernelConfig,
    accumulators_per_thread,
    check,
    default_config,
    prunings,
    shared_memory_bytes,
    violations,
)
from moelab.dtypes import dtype_bytes
from moelab.errors import ConfigError, SharedMemoryError, UnknownNameError

GOOD = KernelConfig(16, 64, 128, 1, 4, 3)
ENTRY = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 64,
    "BLOCK_SIZE_K": 128,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 3,
}

powers = st.sampled_from([16, 32, 64, 128, 256])
valid_configs = st.builds(
    KernelConfig,
    powers,
    powers,
    powers,
    st.sampled_from([1, 8, 16, 32, 64]),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.integers(1, 6),
    SPLIT_K=st.sampled_from([1, 2, 4, 8]),
    waves_per_eu=st.none() | st.integers(0, 8),
    matrix_instr_nonkdim=st.none() | st.sampled_from([16, 32]),
    kpack=st.none() | st.sampled_from([1, 2]),
)


# --- JSON ---------------------------------------------------------------------------------------------------


@given(valid_configs)
def test_json_round_trip(config: KernelConfig) -> None:
    assert KernelConfig.from_json(config.to_json()) == config


def test_json_is_what_sglang_writes() -> None:
    assert GOOD.to_json() == ENTRY
    assert list(GOOD.to_json()) == list(ENTRY)  # the order of keys is sglang's too


def test_a_file_may_leave_warps_and_stages_to_triton() -> None:
    entry = {k: v for k, v in ENTRY.items() if not k.startswith("num_")}
    assert KernelConfig.from_json(entry) == KernelConfig(16, 64, 128, 1, num_warps=4, num_stages=3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"BLOCK_SIZE_M": None}, "BLOCK_SIZE_M is None"),
        ({"BLOCK_SIZE_M": 16.0}, "BLOCK_SIZE_M is 16.0 (float)"),
        ({"GROUP_SIZE_M": True}, "GROUP_SIZE_M is True (bool)"),
        ({"num_warps": "4"}, "num_warps is '4' (str)"),
        ({"BLOCK_SIZE_m": 16}, "unknown key 'BLOCK_SIZE_m' Did you mean BLOCK_SIZE_M"),
        ({"num_ctas": 1}, "unknown key 'num_ctas'"),
    ],
)
def test_json_problems_are_named(change: dict, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KernelConfig.from_json(ENTRY | change)
    assert named in str(caught.value)


def test_every_missing_key_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"missing key 'BLOCK_SIZE_N'; missing key 'BLOCK_SIZE_K'"):
        KernelConfig.from_json({"BLOCK_SIZE_M": 16, "GROUP_SIZE_M": 1})
    with pytest.raises(ConfigError, match="must be a JSON object"):
        KernelConfig.from_json([16, 64])  # type: ignore[arg-type]


def test_frozen_and_hashable() -> None:
    assert len({GOOD, KernelConfig(**ENTRY), default_config(1, 8)}) == 2
    with pytest.raises(AttributeError):
        GOOD.num_warps = 8  # type: ignore[misc]


def test_short() -> None:
    assert GOOD.short() == "16x64x128 g1 w4 s3"
    assert KernelConfig(16, 64, 128, 1, 4, 3, SPLIT_K=2, waves_per_eu=1).short() == "16x64x128 g1 w4 s3 k2 e1"


# --- rules --------------------------------------------------------------------------------------------------


@given(valid_configs)
def test_valid_without_a_target(config: KernelConfig) -> None:
    assert violations(config) == ()
    check(config)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"BLOCK_SIZE_M": 48}, "BLOCK_SIZE_M = 48 is not a power of two"),
        ({"BLOCK_SIZE_N": 0}, "BLOCK_SIZE_N = 0 is not a power of two"),
        ({"BLOCK_SIZE_K": -64}, "BLOCK_SIZE_K = -64 is not a power of two"),
        ({"BLOCK_SIZE_M": 8}, "BLOCK_SIZE_M = 8 is under 16"),
        ({"GROUP_SIZE_M": 0}, "GROUP_SIZE_M = 0 is not in 1 ... 65536"),
        ({"GROUP_SIZE_M": 2**30}, "GROUP_SIZE_M = 1073741824 is not in 1 ... 65536"),
        ({"num_warps": 3}, "num_warps = 3 is not one of"),
        ({"num_warps": 32}, "num_warps = 32 is not one of"),
        ({"num_stages": 0}, "num_stages = 0 is under 1"),
        ({"SPLIT_K": 3}, "SPLIT_K = 3 is not a positive power of two"),
        ({"SPLIT_K": 0}, "SPLIT_K = 0 is not a positive power of two"),
        ({"waves_per_eu": 9}, "waves_per_eu = 9"),
        ({"matrix_instr_nonkdim": 8}, "matrix_instr_nonkdim = 8"),
        ({"kpack": 4}, "kpack = 4"),
    ],
)
def test_each_broken_rule_is_named(change: dict, named: str) -> None:
    config = KernelConfig(**(ENTRY | change))
    assert len(violations(config)) == 1
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"BLOCK_SIZE_M": 16.0}, "BLOCK_SIZE_M is 16.0 (float)"),
        ({"BLOCK_SIZE_N": "32"}, "BLOCK_SIZE_N is '32' (str)"),
        ({"GROUP_SIZE_M": True}, "GROUP_SIZE_M is True (bool)"),
        ({"num_warps": None}, "num_warps is None (NoneType)"),
        ({"num_stages": np.int64(3)}, "num_stages is np.int64(3) (int64)"),
        ({"kpack": 1.0}, "kpack is 1.0 (float)"),
    ],
)
def test_what_is_no_integer_makes_no_config(change: dict, named: str) -> None:
    """16.0 and True equal an integer as a key: a check that had passed for that one let them through, to the compiler."""
    for make in (
        lambda: KernelConfig(**(ENTRY | change)),
        lambda: dataclasses.replace(KernelConfig(**ENTRY), **change),
    ):
        with pytest.raises(ConfigError) as caught:
            make()
        assert named in str(caught.value)


def test_all_broken_rules_come_together() -> None:
    assert len(violations(KernelConfig(48, 8, 64, 0, 5, 0))) == 5


def test_kernels_without_a_dot_take_small_blocks() -> None:
    config = KernelConfig(1, 8, 512, 1)
    assert violations(config, uses_dot=False) == ()
    assert len(violations(config)) == 2


@pytest.mark.parametrize(("K", "split_k"), [(512, 8), (449, 8), (1, 1), (64, 1)])
def test_a_split_with_a_block_each_is_valid(K: int, split_k: int) -> None:
    assert violations(KernelConfig(16, 32, 64, 1, SPLIT_K=split_k), K=K) == ()


@pytest.mark.parametrize(("K", "split_k", "blocks"), [(448, 8, "7 blocks"), (64, 2, "1 block of"), (65, 4, "2 blocks")])
def test_empty_slices_are_counted(K: int, split_k: int, blocks: str) -> None:
    config = KernelConfig(16, 32, 64, 1, SPLIT_K=split_k)
    assert violations(config) == ()  # no inner size, no slices to count
    (broken,) = violations(config, K=K)
    assert f"SPLIT_K = {split_k}" in broken and f"K = {K} has {blocks}" in broken
    with pytest.raises(ConfigError, match="empty slices"):
        check(config, K=K)


def test_quantisation_blocks_must_divide() -> None:
    assert violations(GOOD, block_shape=(128, 128)) == ()
    assert "BLOCK_SIZE_K = 128 does not divide" in violations(GOOD, block_shape=(64, 64))[0]
    assert violations(GOOD, block_shape=(0, 0)) == ()  # the peers write a missing block_shape so


def test_warps_over_a_block_of_threads() -> None:
    config = KernelConfig(64, 64, 64, 1, num_warps=16)
    assert violations(config, target="gfx942") == ()  # 16 x 64 = 1024, just at the limit
    small = Target("small", 1 << 20, threads_per_warp=64, max_threads_per_block=512)
    assert "1024 threads, over small's 512" in violations(config, target=small)[0]


# --- shared memory ------------------------------------------------------------------------------------------

# `metadata.shared` of Triton 3.7.1 for a gathered GEMM, compiled ahead of time: target, dtype, (BM, BN, BK,
# warps, stages), bytes.
COMPILED = [
    ("sm_80", "bfloat16", (16, 64, 128, 4, 1), 20480),
    ("sm_80", "bfloat16", (16, 64, 128, 4, 4), 61440),
    ("sm_80", "bfloat16", (128, 128, 64, 8, 4), 98304),
    ("sm_80", "float16", (128, 256, 64, 8, 3), 98304),
    ("sm_90", "bfloat16", (16, 64, 128, 4, 2), 20480),
    ("sm_90", "bfloat16", (16, 64, 128, 4, 4), 61440),
    ("sm_90", "bfloat16", (64, 128, 64, 4, 1), 24576),
    ("sm_90", "bfloat16", (64, 128, 64, 4, 3), 73728),
    ("sm_90", "bfloat16", (64, 128, 64, 2, 3), 49152),  # two warps are half a warp group: no wgmma
    ("sm_90", "bfloat16", (64, 16, 64, 4, 3), 30720),
    ("sm_90", "bfloat16", (128, 64, 64, 16, 3), 73728),
    ("sm_90", "float32", (64, 64, 64, 4, 3), 65536),
    ("sm_90", "float16", (128, 256, 64, 8, 3), 147456),
    ("sm_100", "bfloat16", (16, 64, 128, 4, 4), 61440),
    ("sm_100", "bfloat16", (128, 128, 64, 8, 4), 131088),
    ("sm_100", "bfloat16", (128, 64, 64, 16, 3), 49152),
    ("sm_120", "bfloat16", (128, 128, 64, 8, 4), 98304),
    ("gfx942", "bfloat16", (16, 64, 128, 4, 1), 16384),
    ("gfx942", "bfloat16", (128, 128, 64, 8, 4), 98304),
    ("gfx950", "float16", (128, 256, 64, 8, 3), 98304),
]


@pytest.mark.parametrize(("target", "dtype", "sizes", "shared"), COMPILED)
def test_formula_matches_the_compiler(target: str, dtype: str, sizes: tuple, shared: int) -> None:
    bm, bn, bk, warps, stages = sizes
    assert shared_memory_bytes(KernelConfig(bm, bn, bk, 1, warps, stages), dtype, target) == shared


def test_over_shared_memory_is_its_own_error() -> None:
    config = KernelConfig(128, 256, 128, 1, 8, 4)  # 4 x 96 KiB
    with pytest.raises(SharedMemoryError, match="needs 393216 bytes of shared memory in bfloat16, sm_90 gives"):
        check(config, target="sm_90")
    with pytest.raises(ConfigError) as caught:
        check(KernelConfig(128, 256, 128, 0, 8, 4), target="sm_90")
    assert not isinstance(caught.value, SharedMemoryError)  # a malformed field comes first


@given(valid_configs, st.sampled_from(sorted(TARGETS)))
def test_one_more_stage_never_takes_less(config: KernelConfig, target: str) -> None:
    more = KernelConfig(**(config.to_json() | {"num_stages": config.num_stages + 1}))
    assert shared_memory_bytes(more, "bfloat16", target) >= shared_memory_bytes(config, "bfloat16", target)


def test_two_exact_rules_cut_the_peers_grid() -> None:
    """1256 of 1920 are left on sm_90; 1400 were its wgmma pipelined like mma.sync."""
    axes = ((16, 32, 64, 128, 256), (32, 64, 128, 256), (64, 128, 256), (1, 16, 32, 64), (4, 8), (2, 3, 4, 5))
    grid = [KernelConfig(*values) for values in itertools.product(*axes)]
    light = [c for c in grid if not prunings(c)]
    assert len(grid) == 1920
    assert sum(not violations(c, target="sm_90") for c in light) == 1256
    assert sum(not violations(c, target=Target("mma", 232448)) for c in light) == 1400


def test_a_pruned_config_is_still_legal() -> None:
    config = KernelConfig(256, 256, 64, 1, 4, 2)
    assert violations(config, target="sm_90") == ()
    assert accumulators_per_thread(config) == 512
    assert "512 accumulators a thread, over 128" in prunings(config)[0]
    assert accumulators_per_thread(config, "gfx942") == 256  # 64 threads a warp
    assert prunings(KernelConfig(128, 256, 64, 1, 8, 3)) == ()  # 128 exactly


# --- names and defaults -------------------------------------------------------------------------------------


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean .*bfloat16"):
        dtype_bytes("bfloat61")
    with pytest.raises(UnknownNameError, match=r"Did you mean .*sm_90"):
        violations(GOOD, target="sm_90a0")
    with pytest.raises(UnknownNameError):
        violations(GOOD, dtype="complex64")


def test_default_rule_is_sglangs() -> None:
    assert default_config(16, 16) == KernelConfig(16, 32, 64, 1)
    assert default_config(17, 16) == KernelConfig(64, 64, 32, 8)
    with pytest.raises(ConfigError, match="num_tokens >= 1"):
        default_config(0, 16)


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_defaults_run_everywhere(target: str, dtype: str) -> None:
    for num_tokens in (1, 100_000):
        assert violations(default_config(num_tokens, 128, dtype), dtype=dtype, target=target) == ()
