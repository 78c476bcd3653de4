"""Split-K by workspace: right for every split, activation after the sum, bitwise repeatable, past 2^31, out of room."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sampling import sampled
from test_grouped_gemm import judge, problem

from moelab import precision
from moelab.config import KernelConfig
from moelab.errors import ConfigError, DtypeError, ShapeError, UnknownNameError, WorkspaceError
from moelab.kernels.align import align
from moelab.kernels.split_k_workspace import new_workspace, split_k_workspace

CONFIG = KernelConfig(16, 32, 32, 1)


def judge_activated(
    out: torch.Tensor, a: torch.Tensor, w: torch.Tensor, ids: torch.Tensor, kind: str, gated: bool, **options: object
) -> None:
    """The product and its activation against float64, where torch rounds once between them."""
    precision.check(out, *precision.gemm_references(a, w, ids, activated=(kind, gated), **options))


DTYPES = [torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize(("dtype", "split_k"), sampled(DTYPES, [4, 2, 1], together=1), ids=str)
def test_gemm2_with_bias_and_weights(dtype: torch.dtype, split_k: int, device: str) -> None:
    a, w, r = problem(11, 5, 2, 72, 100, dtype, device)  # 100: four blocks of 32, the last of them ragged
    bias = torch.randn(5, 72, device=device).to(dtype)
    out = torch.full((22, 72), float("nan"), dtype=dtype, device=device)
    config = replace(CONFIG, GROUP_SIZE_M=3, SPLIT_K=split_k)
    split_k_workspace(
        a, w, align(r.topk_ids, 16, 5), config, num_pairs=22, top_k=2, bias=bias, topk_weights=r.topk_weights, out=out
    )
    judge(out, a, w, r.topk_ids, top_k=2, bias=bias, topk_weights=r.topk_weights)


@pytest.mark.parametrize(
    ("kind", "dtype"), sampled(["silu", "swiglu_oai", "gelu", "relu2"], DTYPES, together=1), ids=str
)
def test_gemm1_with_its_activation(dtype: torch.dtype, kind: str, device: str) -> None:
    gated = kind != "relu2"
    a, w, r = problem(9, 3, 2, 66, 128, dtype, device)  # halves of 33: no multiple of a tile
    bias = torch.randn(3, 66, device=device).to(dtype) * 0.1
    given = {"bias": bias, "topk_weights": r.topk_weights}
    out = split_k_workspace(
        a, w, align(r.topk_ids, 16, 3), replace(CONFIG, SPLIT_K=4), num_pairs=18, top_k=2, activation=kind,
        gated=gated, **given,
    )  # fmt: skip
    assert out.shape == (18, 33 if gated else 66)
    judge_activated(out, a, w, r.topk_ids, kind, gated, top_k=2, **given)


def test_foreign_rows_are_zero_not_unwritten(device: str) -> None:
    a, w, r = problem(8, 4, 2, 40, 64, torch.float32, device)
    ids = torch.where(r.topk_ids == r.topk_ids[0, 0], -1, r.topk_ids)
    workspace = torch.full((2, 16, 40), float("nan"), device=device)
    bias = torch.ones(4, 40, device=device)
    config = replace(CONFIG, SPLIT_K=2)
    out = split_k_workspace(a, w, align(ids, 16, 4), config, num_pairs=16, top_k=2, bias=bias, workspace=workspace)
    foreign = ids.flatten() < 0
    assert foreign.any() and (out[foreign] == 0).all()
    judge(out, a, w, ids, top_k=2, bias=bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_repeated_runs_are_bitwise_equal(dtype: torch.dtype, device: str) -> None:
    a, w, r = problem(9, 4, 2, 40, 128, dtype, device)
    aligned, config = align(r.topk_ids, 16, 4), replace(CONFIG, SPLIT_K=4)
    first, *others = (split_k_workspace(a, w, aligned, config, num_pairs=18, top_k=2) for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


def test_a_workspace_may_be_larger_and_is_overwritten(device: str) -> None:
    a, w, r = problem(5, 4, 2, 40, 64, torch.float32, device)
    aligned, config = align(r.topk_ids, 16, 4), replace(CONFIG, SPLIT_K=2)
    own = new_workspace(4, 10, 40, torch.float32, device).fill_(float("inf"))
    out = split_k_workspace(a, w, aligned, config, num_pairs=10, top_k=2, workspace=own)
    assert torch.equal(out, split_k_workspace(a, w, aligned, config, num_pairs=10, top_k=2))


def test_no_pairs_is_no_work(device: str) -> None:
    a, w, r = problem(0, 4, 2, 40, 64, torch.float32, device)
    made = split_k_workspace(a, w, align(r.topk_ids, 16, 4), CONFIG, num_pairs=0, top_k=2, activation="silu")
    assert made.shape == (0, 20)


def test_rules_of_the_launcher(device: str) -> None:
    a, w, r = problem(4, 4, 2, 33, 64, torch.float32, device)
    aligned, given = align(r.topk_ids, 16, 4), {"num_pairs": 8, "top_k": 2}
    with pytest.raises(ConfigError, match="SPLIT_K = 16 leaves empty slices: K = 64 has 2 blocks"):
        split_k_workspace(a, w, aligned, replace(CONFIG, SPLIT_K=16), **given)
    with pytest.raises(ShapeError, match="33 rows an expert"):
        split_k_workspace(a, w, aligned, CONFIG, activation="silu", **given)
    with pytest.raises(UnknownNameError, match="relu2"):
        split_k_workspace(a, w, aligned, CONFIG, activation="relu2", **given)
    with pytest.raises(WorkspaceError, match=r"4 bytes. Expected at least 2112 bytes"):
        split_k_workspace(a, w, aligned, replace(CONFIG, SPLIT_K=2), workspace=a.new_empty(1), **given)
    with pytest.raises(DtypeError, match="workspace is float16"):
        split_k_workspace(a, w, aligned, CONFIG, workspace=a.new_empty(9999, dtype=torch.float16), **given)
    with pytest.raises(WorkspaceError, match=str(16 * 2**40 * 4096 * 4)):
        new_workspace(16, 2**40, 4096, torch.bfloat16, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("split_k", [1, 2, 8])
@pytest.mark.parametrize(
    "config", [KernelConfig(16, 64, 32, 1, 4, 4), KernelConfig(64, 64, 32, 8)], ids=KernelConfig.short
)
def test_on_the_gpu(dtype: torch.dtype, split_k: int, config: KernelConfig) -> None:
    a, w, r = problem(300, 8, 2, 200, 328, dtype, "cuda")
    aligned, config = align(r.topk_ids, config.BLOCK_SIZE_M, 8), replace(config, SPLIT_K=split_k)
    given = {"num_pairs": 600, "top_k": 2, "topk_weights": r.topk_weights}
    out, *others = (split_k_workspace(a, w, aligned, config, **given) for _ in range(20))
    assert all(torch.equal(out, other) for other in others)
    judge(out, a, w, r.topk_ids, top_k=2, topk_weights=r.topk_weights)
    activated = split_k_workspace(a, w, aligned, config, num_pairs=600, top_k=2, activation="silu")
    judge_activated(activated, a, w, r.topk_ids, "silu", True, top_k=2)


@pytest.mark.gpu
def test_a_workspace_past_2_to_31_elements() -> None:
    """4 slices of 65,600 pairs by 8192: 8.6 GB, the last slices past what an int32 offset reaches."""
    _, w, _ = problem(1, 2, 1, 8192, 128, torch.bfloat16, "cuda")
    a = torch.randn(65_600, 128, device="cuda").bfloat16()
    ids = torch.ones(65_600, 1, dtype=torch.int32, device="cuda")
    config = KernelConfig(64, 128, 32, 1, 4, 3, SPLIT_K=4)
    workspace = new_workspace(4, 65_600, 8192, torch.bfloat16, "cuda")
    assert workspace.numel() > 2**31
    out = split_k_workspace(a, w, align(ids, 64, 2), config, num_pairs=65_600, top_k=1, workspace=workspace)
    for rows in (slice(0, 8), slice(-8, None)):
        judge(out[rows].contiguous(), a[rows], w, ids[rows], top_k=1)
