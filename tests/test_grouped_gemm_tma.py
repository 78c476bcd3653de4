"""The compatible kernel with weights by TMA: the compatible kernel's results, its rules and TMA's own."""

from __future__ import annotations

import pytest
import torch
from test_grouped_gemm import judge, problem

from moelab import runtime
from moelab.config import KernelConfig
from moelab.errors import ConfigError, LayoutError, ShapeError
from moelab.kernels import descriptors
from moelab.kernels.align import align, align_pairs
from moelab.kernels.grouped_gemm_tma import grouped_gemm_tma
from moelab.reference import grouped_gemm_ref


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("group", [1, 3])
def test_gemm1_with_bias_and_weights(dtype: torch.dtype, group: int, device: str) -> None:
    """N = 72 and K = 104 are no multiples of a tile; a box over the last expert's end reads zeros."""
    a, w, r = problem(11, 5, 2, 72, 104, dtype, device)
    bias = torch.randn(5, 72, device=device).to(dtype)
    given = {"num_pairs": 22, "top_k": 2, "bias": bias, "topk_weights": r.topk_weights}
    aligned, config = align(r.topk_ids, 16, 5), KernelConfig(16, 32, 32, group)
    out = torch.full((22, 72), float("nan"), dtype=dtype, device=device)
    grouped_gemm_tma(a, w, aligned, config, **given, out=out)
    judge(out, a, w, r.topk_ids, top_k=2, bias=bias, topk_weights=r.topk_weights)


def test_foreign_rows_are_zero_and_the_next_expert_is_not_read(device: str) -> None:
    a, w, r = problem(8, 4, 2, 40, 64, torch.float32, device)
    ids = torch.where(r.topk_ids % 2 == 0, -1, r.topk_ids)
    poisoned = w.clone()
    poisoned[::2] = float("nan")  # each box over the end of 40 rows reads of these
    out = torch.full((16, 40), float("nan"), device=device)
    grouped_gemm_tma(a, poisoned, align(ids, 16, 4), KernelConfig(16, 32, 64, 1), num_pairs=16, top_k=2, out=out)
    foreign = ids.flatten() < 0
    assert foreign.any() and (out[foreign] == 0).all() and not out.isnan().any()
    judge(out, a, w, ids, top_k=2)


def test_a_weight_that_moves_or_changes_is_seen(device: str) -> None:
    """One tensor, three contents: in place, and twice elsewhere."""
    a, w, r = problem(4, 4, 2, 32, 64, torch.float32, device)
    aligned, config = align(r.topk_ids, 16, 4), KernelConfig(16, 32, 64, 1)
    for change in (lambda: w.mul_(2), lambda: setattr(w, "data", w.data.clone() * 3), lambda: w.set_(w.clone().neg_())):
        change()
        out = grouped_gemm_tma(a, w, aligned, config, num_pairs=8, top_k=2)
        judge(out, a, w, r.topk_ids, top_k=2)


def test_the_descriptor_is_made_once(device: str) -> None:
    a, w, r = problem(4, 4, 2, 32, 64, torch.float32, device)
    aligned, config = align(r.topk_ids, 16, 4), KernelConfig(16, 32, 64, 1)
    descriptors.clear()
    for _ in range(5):
        grouped_gemm_tma(a, w, aligned, config, num_pairs=8, top_k=2)
    assert descriptors.cache_info()[:3] == (4, 1, 1)


def test_no_pairs_is_no_work(device: str) -> None:
    a, w, r = problem(0, 4, 2, 40, 64, torch.float32, device)
    out = grouped_gemm_tma(a, w, align(r.topk_ids, 16, 4), KernelConfig(16, 32, 64, 1), num_pairs=0, top_k=2)
    assert out.shape == (0, 40)


def test_rules_of_the_launcher(device: str) -> None:
    a, w, r = problem(4, 4, 2, 32, 64, torch.float32, device)
    aligned, given = align(r.topk_ids, 16, 4), {"num_pairs": 8, "top_k": 2}
    config = KernelConfig(16, 32, 64, 1)
    with pytest.raises(ConfigError, match="grouped_gemm_tma got SPLIT_K = 2"):
        grouped_gemm_tma(a, w, aligned, KernelConfig(16, 32, 32, 1, SPLIT_K=2), **given)
    with pytest.raises(ConfigError, match="boxes of 512 x 16"):
        grouped_gemm_tma(a, w, aligned, KernelConfig(16, 512, 16, 1), **given)
    with pytest.raises(ShapeError, match="out has shape"):
        grouped_gemm_tma(a, w, aligned, config, out=a.new_empty(7, 32), **given)
    with pytest.raises(LayoutError, match="A row of w is 252 bytes"):
        grouped_gemm_tma(a[:, 1:].contiguous(), w[..., 1:].contiguous(), aligned, config, **given)
    shifted = torch.empty(w.numel() + 1, device=device)[1:].view_as(w).copy_(w)
    with pytest.raises(LayoutError, match="w starts 4 bytes past"):
        grouped_gemm_tma(a, shifted, aligned, config, **given)


def test_weights_past_2_to_31_elements_without_a_gpu() -> None:
    """The last of 524,290 experts of 64 x 64 lies past 2^31 elements; memory that nobody writes is never taken."""
    if runtime.current().mode != "interpreter":
        pytest.skip("on a GPU there is a test of its own")
    experts = 2**31 // 64**2 + 2
    w = torch.empty(experts, 64, 64, dtype=torch.float16)
    w[-1] = torch.eye(64)
    a = torch.randn(1, 64).half()
    ids = torch.full((1, 1), experts - 1, dtype=torch.int32)
    aligned = align_pairs(ids, 16, experts)
    assert torch.equal(grouped_gemm_tma(a, w, aligned, KernelConfig(16, 64, 64, 1), num_pairs=1, top_k=1), a)


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
    given = {"num_pairs": 600, "top_k": 2, "topk_weights": r.topk_weights}
    first, *others = (grouped_gemm_tma(a, w, aligned, config, **given) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)
    judge(first, a, w, r.topk_ids, top_k=2, topk_weights=r.topk_weights)


@pytest.mark.gpu
def test_weights_past_2_to_31_elements() -> None:
    w = torch.empty(260, 2048, 4096, dtype=torch.bfloat16, device="cuda")
    w[-2:].normal_().mul_(4096**-0.5)
    a = torch.randn(16, 4096, device="cuda").bfloat16()
    ids = torch.tensor([[258], [259]] * 8, dtype=torch.int32, device="cuda")
    assert w.numel() > 2**31
    out = grouped_gemm_tma(a, w, align(ids, 64, 260), KernelConfig(64, 128, 64, 1), num_pairs=16, top_k=1)
    judge(out, a, w[-2:].clone(), ids - 258, top_k=1)
    assert not torch.equal(out, grouped_gemm_ref(a, w[-2:].clone(), 259 - ids, top_k=1))
