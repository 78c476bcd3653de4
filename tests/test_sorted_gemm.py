"""GEMM2 over sorted rows: both ways to combine, and nothing read but the rows of pairs."""

from __future__ import annotations

import pytest
import torch
from test_gated_gemm import by_pair
from test_grouped_gemm import judge, problem
from test_split_k_atomic import judge_rounded

from moelab import precision
from moelab.config import KernelConfig
from moelab.errors import ConfigError, DtypeError, LayoutError, ShapeError
from moelab.kernels.align import align, align_pairs, moe_align_block_size
from moelab.kernels.sorted_gemm import sorted_gemm
from moelab.reference import grouped_gemm_ref
from moelab.routing import Alignment

CONFIG = KernelConfig(16, 32, 32, 2)
DTYPES = [torch.float16, torch.float32, torch.float64]


def in_place(a: torch.Tensor, alignment: Alignment) -> torch.Tensor:
    """a's rows, one per pair, where sorted_token_ids puts them; NaN wherever there is no pair of this rank."""
    rows = a.new_full((alignment.rows_in_use, a.shape[1]), float("nan"))
    used = int(alignment.num_tokens_post_padded)
    pairs = alignment.sorted_token_ids[:used].long()
    own = (pairs < len(a)) & (alignment.expert_ids[: used // alignment.block_size] >= 0).repeat_interleave(
        alignment.block_size
    )
    rows[:used][own] = a[pairs[own]]
    return rows


def judge_sums(out: torch.Tensor, a: torch.Tensor, w: torch.Tensor, ids: torch.Tensor, **options: object) -> None:
    """Sums over each token's pairs, against torch's; a rounding for every product where they are added in 16 bits."""
    token = (*ids.shape, w.shape[1])
    given = {name: value.to(a.dtype) for name, value in options.items()}
    own, exact = (x.view(token) for x in precision.gemm_references(a, w, ids, top_k=1, **given))
    tiny = (ids.shape[1] + 1) * float(precision.ulp(2 * exact.abs().max(), a.dtype))
    precision.check(out.to(a.dtype), own.sum(1), exact.sum(1), tiny=tiny)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("atomic", [False, True])
def test_with_bias_weights_and_poison(atomic: bool, dtype: torch.dtype, tma: bool, device: str) -> None:
    """Odd sides; rows of padding and of blocks that are not in use hold NaN; out holds NaN before."""
    a, w, r = problem(33, 5, 1, 72, 104, dtype, device)  # 11 tokens of 3 slots
    ids, weights = r.topk_ids.view(11, 3), r.topk_weights.view(11, 3)
    bias = torch.randn(5, 72, device=device).to(dtype)
    aligned = moe_align_block_size(ids, 16, 5)
    top_k = 3 if atomic else 1
    out = torch.full((33 // top_k, 72), float("nan"), dtype=dtype, device=device)
    sorted_gemm(
        in_place(a, aligned), w, aligned, CONFIG, num_pairs=33, bias=bias, topk_weights=weights, atomic=atomic,
        top_k=top_k, tma=tma, out=out,
    )  # fmt: skip
    if not atomic:
        judge(out, a, w, ids, top_k=1, bias=bias, topk_weights=weights)
    else:
        judge_sums(out, a, w, ids, bias=bias, topk_weights=weights)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("atomic", [False, True])
def test_foreign_pairs_add_nothing(atomic: bool, tma: bool, device: str) -> None:
    a, w, r = problem(16, 4, 1, 40, 64, torch.float32, device)
    ids = torch.where(r.topk_ids == r.topk_ids[0, 0], -1, r.topk_ids).view(8, 2)
    aligned, top_k = align(ids, 16, 4), 2 if atomic else 1
    bias = torch.ones(4, 40, device=device)
    out = torch.full((16 // top_k, 40), float("nan"), device=device)
    given = {"num_pairs": 16, "bias": bias, "atomic": atomic, "top_k": top_k, "tma": tma}
    sorted_gemm(in_place(a, aligned), w, aligned, CONFIG, out=out, **given)
    exact = grouped_gemm_ref(a.double(), w.double(), ids, top_k=1, bias=bias.double()).view(16 // top_k, top_k, 40)
    assert (ids < 0).any() and not out.isnan().any()
    torch.testing.assert_close(out.double(), exact.sum(1), rtol=1e-5, atol=1e-5)
    assert (out[(ids < 0).view(16 // top_k, top_k).all(1)] == 0).all()


@pytest.mark.parametrize("tma", [False, True])
def test_a_row_per_block(tma: bool, device: str) -> None:
    a, w, r = problem(6, 8, 1, 40, 64, torch.float32, device)
    aligned = align_pairs(r.topk_ids, 16, 8)
    out = sorted_gemm(in_place(a, aligned), w, aligned, CONFIG, num_pairs=6, tma=tma)
    judge(out, a, w, r.topk_ids, top_k=1)


def test_the_next_experts_weights_are_not_used(device: str) -> None:
    a, w, r = problem(3, 3, 1, 40, 32, torch.float32, device)
    ids = torch.full_like(r.topk_ids, 1)
    poisoned = torch.full_like(w, float("nan"))
    poisoned[1] = w[1]
    aligned = align(ids, 16, 3)
    for tma in (False, True):
        out = sorted_gemm(in_place(a, aligned), poisoned, aligned, CONFIG, num_pairs=3, tma=tma)
        judge(out, a, w, ids, top_k=1)


@pytest.mark.parametrize("atomic", [False, True])
def test_no_pairs_is_no_work(atomic: bool, device: str) -> None:
    a, w, r = problem(0, 4, 2, 40, 64, torch.float32, device)
    out = sorted_gemm(a, w, align(r.topk_ids, 16, 4), CONFIG, num_pairs=0, atomic=atomic)
    assert out.shape == (0, 40)


def test_rules_of_the_launcher(device: str) -> None:
    a, w, r = problem(8, 4, 1, 32, 64, torch.float32, device)
    aligned = align(r.topk_ids, 16, 4)
    rows, given = in_place(a, aligned), {"num_pairs": 8}
    with pytest.raises(ShapeError, match=r"a has shape \(8, 64\)"):
        sorted_gemm(a, w, aligned, CONFIG, **given)
    with pytest.raises(ShapeError, match="a row per pair"):
        sorted_gemm(rows, w, aligned, CONFIG, top_k=2, **given)
    with pytest.raises(ShapeError, match="no multiple of top_k = 3"):
        sorted_gemm(rows, w, aligned, CONFIG, atomic=True, top_k=3, **given)
    with pytest.raises(ConfigError, match="sorted_gemm got SPLIT_K = 2"):
        sorted_gemm(rows, w, aligned, KernelConfig(16, 32, 32, 1, SPLIT_K=2), **given)
    with pytest.raises(DtypeError, match="out is float16"):
        sorted_gemm(rows, w, aligned, CONFIG, out=a.new_empty(8, 32, dtype=torch.float16), **given)
    with pytest.raises(LayoutError, match="A row of a is 252 bytes"):
        narrow = (t[..., 1:].contiguous() for t in (rows, w))
        sorted_gemm(*narrow, aligned, CONFIG, tma=True, **given)


@pytest.mark.gpu
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES], ids=str)
@pytest.mark.parametrize(
    "config",
    [KernelConfig(16, 64, 64, 1, 4, 4), KernelConfig(64, 64, 32, 8), KernelConfig(128, 128, 32, 16, 8, 3)],
    ids=KernelConfig.short,
)
def test_on_the_gpu(dtype: torch.dtype, config: KernelConfig, atomic: bool, tma: bool) -> None:
    a, w, r = problem(600, 8, 1, 200, 328, dtype, "cuda")
    ids, weights = r.topk_ids.view(200, 3), r.topk_weights.view(200, 3)
    aligned = align(ids, config.BLOCK_SIZE_M, 8)
    rows, top_k = in_place(a, aligned), 3 if atomic else 1
    given = {"num_pairs": 600, "topk_weights": weights, "atomic": atomic, "top_k": top_k, "tma": tma}
    first, *others = (sorted_gemm(rows, w, aligned, config, **given) for _ in range(3))
    if not atomic:
        assert all(torch.equal(first, other) for other in others)
        judge(first, a, w, ids, top_k=1, topk_weights=weights)
    else:
        judge_sums(first, a, w, ids, topk_weights=weights)


@pytest.mark.gpu
@pytest.mark.parametrize("tma", [False, True])
def test_weights_and_rows_past_2_to_31_elements(tma: bool) -> None:
    """The last of 260 experts of 2048 x 4096; then 65,600 rows in of 32,768, and out."""
    config = KernelConfig(64, 128, 64, 1, 4, 3)
    w = torch.empty(260, 2048, 4096, dtype=torch.bfloat16, device="cuda")
    w[-1].normal_().mul_(4096**-0.5)
    a = torch.randn(16, 4096, device="cuda").bfloat16()
    ids = torch.full((16, 1), 259, dtype=torch.int32, device="cuda")
    aligned = align(ids, 64, 260)
    assert w.numel() > 2**31
    out = sorted_gemm(in_place(a, aligned), w, aligned, config, num_pairs=16, tma=tma)
    judge(out, a, w[-1:].clone(), ids - 259, top_k=1)
    del w, out
    ids = torch.zeros(65_600, 1, dtype=torch.int32, device="cuda")
    aligned = moe_align_block_size(ids, 64, 1)
    for N, K in ((64, 32_768), (32_768, 64)):
        w = (torch.randn(1, N, K, device="cuda") * K**-0.5).bfloat16()
        a = torch.randn(aligned.sorted_token_ids.shape[0], K, device="cuda", dtype=torch.bfloat16)
        out = sorted_gemm(a, w, aligned, config, num_pairs=65_600, tma=tma)
        assert max(a.numel(), out.numel()) > 2**31
        judge(out[-8:], a[65_592:65_600], w, ids[-8:], top_k=1)


@pytest.mark.gpu
def test_from_gated_rows_in_one_stream() -> None:
    """Rows as gated_gemm leaves them, its padding never written, go straight in."""
    from moelab.kernels.gated_gemm import gated_gemm

    x, w13, r = problem(300, 8, 2, 256, 128, torch.bfloat16, "cuda")
    w2 = (torch.randn(8, 72, 128, device="cuda") * 128**-0.5).bfloat16()
    aligned = align(r.topk_ids, 64, 8)
    h = gated_gemm(x, w13, aligned, KernelConfig(64, 128, 64, 1), num_pairs=600, top_k=2)
    for tma in (False, True):
        out = sorted_gemm(h, w2, aligned, KernelConfig(64, 64, 64, 1), num_pairs=600, tma=tma)
        judge(out, by_pair(h, aligned), w2, r.topk_ids, top_k=1)
        judge_rounded(1, out, by_pair(h, aligned), w2, r.topk_ids.view(600, 1))
