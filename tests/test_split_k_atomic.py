"""Split-K by atomic additions: right for every split, bias once, zeroed by the launcher, empty slices refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sampling import sampled
from test_grouped_gemm import judge, problem

from moelab import precision
from moelab.config import KernelConfig
from moelab.errors import ConfigError, DtypeError, ShapeError
from moelab.kernels.align import align
from moelab.kernels.split_k_atomic import split_k_atomic_f32, split_k_atomic_out
from moelab.reference import grouped_gemm_ref

CONFIG = KernelConfig(16, 32, 32, 1)


def judge_wide(out: torch.Tensor, a: torch.Tensor, w: torch.Tensor, ids: torch.Tensor, **options: object) -> None:
    """`judge`, for a result that a float32 sum is rounded to once."""
    judge(out.to(a.dtype), a, w, ids, **options)


def judge_rounded(split_k: int, out: torch.Tensor, a: torch.Tensor, w: torch.Tensor, ids: torch.Tensor) -> None:
    """Twice torch's error, and a rounding for every partial sum: each is at most as large as the largest by far."""
    plain, exact = precision.gemm_references(a, w, ids, top_k=ids.shape[1])
    partial = 2 * exact.abs().max()  # a running sum may pass its final value; twice the largest one bounds it here
    tiny = (split_k + 1) * float(precision.ulp(partial, out.dtype))
    precision.check(out, plain, exact, tiny=tiny)


SPLIT = pytest.mark.parametrize(
    ("dtype", "split_k"), sampled([torch.float16, torch.float32, torch.float64], [4, 2, 1], together=1), ids=str
)


@SPLIT
def test_gemm1_with_bias_and_weights(dtype: torch.dtype, split_k: int, device: str) -> None:
    a, w, r = problem(11, 5, 2, 72, 100, dtype, device)  # 100: four blocks of 32, the last of them ragged
    bias = torch.randn(5, 72, device=device).to(dtype)
    config = replace(CONFIG, GROUP_SIZE_M=3, SPLIT_K=split_k)
    wide = torch.promote_types(dtype, torch.float32)
    out = torch.full((22, 72), float("nan"), dtype=wide, device=device)  # the launcher zeroes it
    split_k_atomic_f32(
        a, w, align(r.topk_ids, 16, 5), config, num_pairs=22, top_k=2, bias=bias, topk_weights=r.topk_weights, out=out
    )
    judge_wide(out, a, w, r.topk_ids, top_k=2, bias=bias, topk_weights=r.topk_weights)


@SPLIT
def test_in_the_inputs_dtype(dtype: torch.dtype, split_k: int, device: str) -> None:
    a, w, r = problem(7, 3, 2, 40, 128, dtype, device)
    config = replace(CONFIG, SPLIT_K=split_k)
    out = split_k_atomic_out(a, w, align(r.topk_ids, 16, 3), config, num_pairs=14, top_k=2)
    assert out.dtype == dtype
    judge_rounded(split_k, out, a, w, r.topk_ids)


@pytest.mark.parametrize("split_k", [1, 4])
def test_the_sum_over_slots_is_part_of_it(split_k: int, device: str) -> None:
    a, w, r = problem(18, 4, 1, 40, 128, torch.float32, device)  # 6 tokens of 3 slots
    ids, weights = r.topk_ids.view(6, 3), r.topk_weights.view(6, 3)
    out = split_k_atomic_f32(
        a, w, align(ids, 16, 4), replace(CONFIG, SPLIT_K=split_k),
        num_pairs=18, top_k=1, topk_weights=weights, pairs_per_row=3,
    )  # fmt: skip
    pairs, exact = (
        grouped_gemm_ref(a.to(d), w.to(d), ids, top_k=1, topk_weights=weights.to(d)).view(6, 3, 40)
        for d in (torch.float32, torch.float64)
    )
    precision.check(out, pairs.sum(1), exact.sum(1))


def test_foreign_rows_are_zero_not_unwritten(device: str) -> None:
    a, w, r = problem(8, 4, 2, 40, 64, torch.float32, device)
    ids = torch.where(r.topk_ids == r.topk_ids[0, 0], -1, r.topk_ids)
    out = torch.full((16, 40), float("nan"), device=device)
    bias = torch.ones(4, 40, device=device)
    config = replace(CONFIG, SPLIT_K=2)
    split_k_atomic_f32(a, w, align(ids, 16, 4), config, num_pairs=16, top_k=2, bias=bias, out=out)
    foreign = ids.flatten() < 0
    assert foreign.any() and (out[foreign] == 0).all()
    judge(out, a, w, ids, top_k=2, bias=bias)


def test_no_pairs_is_no_work(device: str) -> None:
    a, w, r = problem(0, 4, 2, 40, 64, torch.float32, device)
    assert split_k_atomic_f32(a, w, align(r.topk_ids, 16, 4), CONFIG, num_pairs=0, top_k=2).shape == (0, 40)


def test_rules_of_the_launcher(device: str) -> None:
    a, w, r = problem(4, 4, 2, 32, 64, torch.float32, device)
    aligned = align(r.topk_ids, 16, 4)
    with pytest.raises(ConfigError, match="SPLIT_K = 4 leaves empty slices: K = 64 has 2 blocks of BLOCK_SIZE_K = 32"):
        split_k_atomic_f32(a, w, aligned, replace(CONFIG, SPLIT_K=4), num_pairs=8, top_k=2)
    with pytest.raises(ShapeError, match="rows of 3"):
        split_k_atomic_f32(a, w, aligned, CONFIG, num_pairs=8, top_k=2, pairs_per_row=3)
    with pytest.raises(ShapeError, match="out has shape"):
        split_k_atomic_f32(a, w, aligned, CONFIG, num_pairs=8, top_k=2, out=torch.empty(8, 31, device=device))
    with pytest.raises(DtypeError, match="out is float32"):
        half = torch.empty(8, 32, device=device)
        split_k_atomic_out(a.half(), w.half(), aligned, CONFIG, num_pairs=8, top_k=2, out=half)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("split_k", [1, 2, 8])
@pytest.mark.parametrize(
    "config", [KernelConfig(16, 64, 32, 1, 4, 4), KernelConfig(64, 64, 32, 8)], ids=KernelConfig.short
)
def test_on_the_gpu(dtype: torch.dtype, split_k: int, config: KernelConfig) -> None:
    a, w, r = problem(300, 8, 2, 200, 328, dtype, "cuda")
    aligned, config = align(r.topk_ids, config.BLOCK_SIZE_M, 8), replace(config, SPLIT_K=split_k)
    out = split_k_atomic_f32(a, w, aligned, config, num_pairs=600, top_k=2, topk_weights=r.topk_weights)
    judge_wide(out, a, w, r.topk_ids, top_k=2, topk_weights=r.topk_weights)
    judge_rounded(split_k, split_k_atomic_out(a, w, aligned, config, num_pairs=600, top_k=2), a, w, r.topk_ids)


@pytest.mark.gpu
@pytest.mark.parametrize("way", [split_k_atomic_f32, split_k_atomic_out])
def test_run_to_run_spread_on_the_gpu(way: object, record_property: object) -> None:
    """Counted, not asserted: that runs differ is a matter of luck, that each is right is not."""
    a, w, r = problem(64, 8, 2, 512, 2048, torch.bfloat16, "cuda")
    aligned, config = align(r.topk_ids, 16, 8), KernelConfig(16, 64, 64, 1, 4, 4, SPLIT_K=16)
    outs = [way(a, w, aligned, config, num_pairs=128, top_k=2) for _ in range(20)]
    distinct = sum(not any(torch.equal(out, other) for other in outs[:i]) for i, out in enumerate(outs))
    record_property(f"{way.__name__}_distinct_of_20", distinct)
    for out in outs[:3]:
        judge_rounded(1 if way is split_k_atomic_f32 else 16, out.bfloat16(), a, w, r.topk_ids)


@pytest.mark.gpu
def test_rows_past_2_to_31_elements() -> None:
    a, w, _ = problem(1, 2, 1, 32_768, 64, torch.bfloat16, "cuda")
    ids = torch.ones(65_600, 1, dtype=torch.int32, device="cuda")
    a = torch.randn(65_600, 64, device="cuda").bfloat16()
    config = KernelConfig(64, 128, 32, 1, 4, 3, SPLIT_K=2)
    out = split_k_atomic_f32(a, w, align(ids, 64, 2), config, num_pairs=65_600, top_k=1)
    assert out.numel() > 2**31
    judge_wide(out[-8:].contiguous(), a[-8:], w, ids[-8:], top_k=1)
