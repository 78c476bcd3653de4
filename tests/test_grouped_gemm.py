"""The compatible kernel alone: every row written, its order independent of GROUP_SIZE_M, its rules stated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moelab import precision, runtime
from moelab.config import KernelConfig
from moelab.errors import ConfigError, DtypeError, LayoutError, ShapeError
from moelab.kernels.align import align, align_pairs, moe_align_block_size
from moelab.kernels.grouped_gemm import grouped_gemm
from moelab.kernels.split_k_atomic import split_k_atomic_f32, split_k_atomic_out
from moelab.kernels.split_k_workspace import split_k_workspace
from moelab.kernels.tiles import grouped_tile, tl, triton
from moelab.routing import make_routing


def problem(num_tokens: int, E: int, k: int, N: int, K: int, dtype: torch.dtype, device: str) -> tuple:
    generator = torch.Generator(device=device).manual_seed(0)
    a = torch.randn(num_tokens, K, generator=generator, device=device).to(dtype)
    w = (torch.randn(E, N, K, generator=generator, device=device) * K**-0.5).to(dtype)
    routing = make_routing("zipf", num_tokens, E, k, seed=2, device=device)
    return a, w, routing


def judge(out: torch.Tensor, a: torch.Tensor, w: torch.Tensor, ids: torch.Tensor, **options: object) -> None:
    precision.check(out, *precision.gemm_references(a, w, ids, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("group", [1, 3, 64])
def test_gemm1_with_bias_and_weights(dtype: torch.dtype, group: int, device: str) -> None:
    a, w, r = problem(11, 5, 2, 72, 100, dtype, device)
    bias = torch.randn(5, 72, device=device).to(dtype)
    config = KernelConfig(16, 32, 32, group)
    out = torch.full((22, 72), float("nan"), dtype=dtype, device=device)
    grouped_gemm(
        a, w, align(r.topk_ids, 16, 5), config, num_pairs=22, top_k=2, bias=bias, topk_weights=r.topk_weights, out=out
    )
    judge(out, a, w, r.topk_ids, top_k=2, bias=bias, topk_weights=r.topk_weights)


def test_ways_of_aligning_give_one_result(device: str) -> None:
    a, w, r = problem(9, 4, 2, 40, 64, torch.float32, device)
    config = KernelConfig(16, 32, 64, 1)
    outs = [
        grouped_gemm(a, w, way(r.topk_ids, 16, 4), config, num_pairs=18, top_k=2)
        for way in (align_pairs, moe_align_block_size)
    ]
    for out in outs:
        judge(out, a, w, r.topk_ids, top_k=2)
    if device == "cuda":  # the interpreter's products come from BLAS, whose rounding depends on a row's place
        assert torch.equal(*outs)


def test_foreign_rows_are_zero_not_unwritten(device: str) -> None:
    a, w, r = problem(8, 4, 2, 40, 64, torch.float32, device)
    ids = torch.where(r.topk_ids == r.topk_ids[0, 0], -1, r.topk_ids)
    out = torch.full((16, 40), float("nan"), device=device)
    bias = torch.ones(4, 40, device=device)
    grouped_gemm(a, w, align(ids, 16, 4), KernelConfig(16, 32, 64, 1), num_pairs=16, top_k=2, bias=bias, out=out)
    foreign = ids.flatten() < 0
    assert foreign.any() and (out[foreign] == 0).all() and not out.isnan().any()


def test_rules_of_the_launcher(device: str) -> None:
    a, w, r = problem(4, 4, 2, 32, 64, torch.float32, device)
    aligned = align(r.topk_ids, 16, 4)
    with pytest.raises(ConfigError, match="aligned to 16 but the config's BLOCK_SIZE_M is 32"):
        grouped_gemm(a, w, aligned, KernelConfig(32, 32, 64, 1), num_pairs=8, top_k=2)
    with pytest.raises(ConfigError, match="SPLIT_K = 2"):
        grouped_gemm(a, w, aligned, KernelConfig(16, 32, 64, 1, SPLIT_K=2), num_pairs=8, top_k=2)
    with pytest.raises(ShapeError, match="no multiple of top_k"):
        grouped_gemm(a, w, aligned, KernelConfig(16, 32, 64, 1), num_pairs=8, top_k=3)
    with pytest.raises(ShapeError, match="topk_weights holds"):
        grouped_gemm(
            a, w, aligned, KernelConfig(16, 32, 64, 1), num_pairs=8, top_k=2, topk_weights=torch.ones(3, device=device)
        )


def test_out_and_alignment_must_fit(device: str) -> None:
    a, w, r = problem(4, 4, 2, 32, 64, torch.float32, device)
    config, aligned = KernelConfig(16, 32, 64, 1), align(r.topk_ids, 16, 4)

    def call(alignment: object = aligned, top_k: int = 2, num_pairs: int = 8, out: torch.Tensor | None = None) -> None:
        grouped_gemm(a, w, alignment, config, num_pairs=num_pairs, top_k=top_k, out=out)

    with pytest.raises(ShapeError, match="out has shape"):
        call(out=torch.empty(7, 32, device=device))
    with pytest.raises(DtypeError, match="out is float16"):
        call(out=torch.empty(8, 32, device=device, dtype=torch.float16))
    with pytest.raises(LayoutError, match="contiguous"):
        call(out=torch.empty(32, 8, device=device).T)
    with pytest.raises(ShapeError, match="8 pairs to 5 experts"):
        call(align(r.topk_ids, 16, 5))
    with pytest.raises(ShapeError, match="4 pairs to 4 experts"):
        call(align(r.topk_ids[:2], 16, 4))
    with pytest.raises(ShapeError, match="top_k = 0"):
        call(top_k=0)


@pytest.mark.parametrize("way", [split_k_atomic_f32, split_k_atomic_out, split_k_workspace])
def test_out_and_alignment_must_fit_the_split_k_launchers_too(way: Callable[..., torch.Tensor], device: str) -> None:
    a, w, r = problem(4, 4, 2, 32, 64, torch.float32, device)
    config, aligned = KernelConfig(16, 32, 32, 1, SPLIT_K=2), align(r.topk_ids, 16, 4)
    for error, message, alignment, given in (
        (ShapeError, "out has shape", aligned, {"out": torch.empty(7, 32, device=device)}),
        (DtypeError, "out is float16", aligned, {"out": torch.empty(8, 32, device=device, dtype=torch.float16)}),
        (LayoutError, "contiguous", aligned, {"out": torch.empty(32, 8, device=device).T}),
        (ShapeError, "8 pairs to 5 experts", align(r.topk_ids, 16, 5), {}),
        (ShapeError, "4 pairs to 4 experts", align(r.topk_ids[:2], 16, 4), {}),
        (ShapeError, "top_k = 0", aligned, {"top_k": 0}),
        (ConfigError, "aligned to 32", align(r.topk_ids, 32, 4), {}),
    ):
        with pytest.raises(error, match=message):
            way(a, w, alignment, config, **{"num_pairs": 8, "top_k": 2, **given})


def test_blocks_of_k_are_added_with_compensation(device: str) -> None:
    """2^24 + 1 + 1 + ...: a plain float32 sum of the blocks stays at 2^24."""
    K, block = 16 * 64, 16
    a = torch.zeros(1, K, device=device)
    a[0, ::block] = 1.0
    a[0, 0] = 2.0**24
    w = torch.ones(1, 16, K, device=device)
    ids = torch.zeros(1, 1, dtype=torch.int32, device=device)
    out = grouped_gemm(a, w, align(ids, 16, 1), KernelConfig(16, 16, block, 1), num_pairs=1, top_k=1)
    assert out.unique().tolist() == [2.0**24 + 64]  # 2^24 + 63 exactly, rounded to even


@pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's, in the interpreter: a GPU gives none
def test_overflow_is_infinite_as_in_torch(device: str) -> None:
    a = torch.full((1, 64), 1e38, device=device)
    w = torch.ones(1, 16, 64, device=device)
    ids = torch.zeros(1, 1, dtype=torch.int32, device=device)
    out = grouped_gemm(a, w, align(ids, 16, 1), KernelConfig(16, 16, 16, 1), num_pairs=1, top_k=1)
    assert torch.isposinf(out).all()


def test_weights_past_2_to_31_elements_without_a_gpu() -> None:
    """The last of 524,290 experts of 64 x 64 lies past 2^31 elements; memory that nobody writes is never taken."""
    if runtime.current().mode != "interpreter":
        pytest.skip("on a GPU test_fused_moe has its own")
    experts = 2**31 // 64**2 + 2
    w = torch.empty(experts, 64, 64, dtype=torch.float16)
    w[-1] = torch.eye(64)
    a = torch.randn(1, 64).half()
    ids = torch.full((1, 1), experts - 1, dtype=torch.int32)
    out = grouped_gemm(a, w, align_pairs(ids, 16, experts), KernelConfig(16, 64, 64, 1), num_pairs=1, top_k=1)
    assert torch.equal(out, a)


@triton.jit
def _tile_order_kernel(out_ptr, num_pid_m, num_pid_n, GROUP_SIZE_M: tl.constexpr):
    pid = tl.program_id(0)
    pid_m, pid_n = grouped_tile(pid, num_pid_m, num_pid_n, GROUP_SIZE_M)
    tl.store(out_ptr + 2 * pid, pid_m)
    tl.store(out_ptr + 2 * pid + 1, pid_n)


@pytest.mark.parametrize(("rows", "cols", "group"), [(5, 3, 1), (5, 3, 2), (4, 2, 16), (7, 1, 3)])
def test_tiles_run_down_groups_of_rows(rows: int, cols: int, group: int, device: str) -> None:
    """The order of the peers' kernel: GROUP_SIZE_M row blocks, column by column, then the next group."""
    found = torch.empty(rows * cols, 2, dtype=torch.int32, device=device)
    _tile_order_kernel[(rows * cols,)](found, rows, cols, group)
    expected = [
        [m, n] for start in range(0, rows, group) for n in range(cols) for m in range(start, min(rows, start + group))
    ]
    assert found.tolist() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "config",
    [KernelConfig(16, 64, 64, 1, 4, 4), KernelConfig(64, 64, 32, 8), KernelConfig(128, 128, 32, 16, 8, 3)],
    ids=KernelConfig.short,
)
def test_on_the_gpu(dtype: torch.dtype, config: KernelConfig) -> None:
    a, w, r = problem(300, 8, 2, 200, 328, dtype, "cuda")
    aligned = align(r.topk_ids, config.BLOCK_SIZE_M, 8)
    out = grouped_gemm(a, w, aligned, config, num_pairs=600, top_k=2, topk_weights=r.topk_weights)
    judge(out, a, w, r.topk_ids, top_k=2, topk_weights=r.topk_weights)
