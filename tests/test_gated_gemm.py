"""GEMM1 with its activation: each activation, tails of every side, what is written and what is not."""

from __future__ import annotations

import pytest
import torch
from sampling import sampled
from test_grouped_gemm import problem

from moelab import precision
from moelab.config import KernelConfig
from moelab.errors import ConfigError, LayoutError, ShapeError, UnknownNameError
from moelab.kernels.align import align, align_pairs, moe_align_block_size
from moelab.kernels.gated_gemm import gated_gemm
from moelab.reference import GATED, UNGATED, activation_ref, grouped_gemm_ref
from moelab.routing import Alignment

CONFIG = KernelConfig(16, 32, 32, 2)
DTYPES = [torch.float16, torch.float32, torch.float64]


def by_pair(rows: torch.Tensor, alignment: Alignment) -> torch.Tensor:
    """Rows in the order of pairs; NaN for pairs of another rank."""
    used = alignment.sorted_token_ids[: int(alignment.num_tokens_post_padded)].long()
    own = (alignment.expert_ids.repeat_interleave(alignment.block_size)[: used.numel()] >= 0) & (
        used < alignment.num_pairs
    )
    out = rows.new_full((alignment.num_pairs, rows.shape[1]), float("nan"))
    out[used[own]] = rows[: used.numel()][own]
    return out


def expected(
    a: torch.Tensor, w: torch.Tensor, ids: torch.Tensor, activation: str, gated: bool, **options: object
) -> torch.Tensor:
    """The oracle: product, bias, weight, activation, rounded as torch rounds them in a's dtype."""
    given = {name: value.to(a.dtype) for name, value in options.items() if isinstance(value, torch.Tensor)}
    return activation_ref(grouped_gemm_ref(a, w, ids, top_k=ids.shape[1], **given), activation, gated=gated)


def judge(
    out: torch.Tensor,
    a: torch.Tensor,
    w: torch.Tensor,
    ids: torch.Tensor,
    activation: str,
    gated: bool = True,
    **options: object,
) -> None:
    given = {name: value.to(a.dtype) for name, value in options.items() if isinstance(value, torch.Tensor)}
    precision.check(
        out, *precision.gemm_references(a, w, ids, top_k=ids.shape[1], activated=(activation, gated), **given)
    )


KINDS = [*((name, True, False) for name in GATED), *((name, False, False) for name in UNGATED)]


@pytest.mark.parametrize(
    ("kind", "dtype"), sampled([*KINDS, ("silu", True, True), ("relu2", False, True)], DTYPES, together=1), ids=str
)
def test_every_activation_after_bias_and_weight(kind: tuple[str, bool, bool], dtype: torch.dtype, device: str) -> None:
    """72 rows: halves of 36, no multiple of a tile of 16; K = 104: a ragged block of 32, and rows of 16 bytes."""
    activation, gated, tma = kind
    a, w, r = problem(11, 5, 2, 72, 104, dtype, device)
    bias = torch.randn(5, 72, device=device).to(dtype)
    aligned = align(r.topk_ids, 16, 5)
    out = torch.full((aligned.rows_in_use, 36 if gated else 72), float("nan"), dtype=dtype, device=device)
    gated_gemm(
        a, w, aligned, CONFIG, num_pairs=22, top_k=2, activation=activation, gated=gated, bias=bias,
        topk_weights=r.topk_weights, tma=tma, out=out,
    )  # fmt: skip
    judge(by_pair(out, aligned), a, w, r.topk_ids, activation, gated, bias=bias, topk_weights=r.topk_weights)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("way", [align_pairs, moe_align_block_size])
def test_both_ways_of_aligning(way: object, tma: bool, device: str) -> None:
    a, w, r = problem(9, 4, 2, 64, 64, torch.float32, device)
    aligned = way(r.topk_ids, 16, 4)
    config = KernelConfig(16, 64, 64, 1)
    out = gated_gemm(a, w, aligned, config, num_pairs=18, top_k=2, tma=tma)
    assert out.shape == (aligned.sorted_token_ids.shape[0], 32)
    judge(by_pair(out, aligned), a, w, r.topk_ids, "silu")


@pytest.mark.parametrize("tma", [False, True])
def test_what_is_no_row_of_ours_is_not_written(tma: bool, device: str) -> None:
    a, w, r = problem(8, 4, 2, 64, 64, torch.float32, device)
    ids = torch.where(r.topk_ids == r.topk_ids[0, 0], -1, r.topk_ids)
    aligned = align(ids, 16, 4)
    out = torch.full((aligned.rows_in_use, 32), float("nan"), device=device)
    gated_gemm(a, w, aligned, CONFIG, num_pairs=16, top_k=2, tma=tma, out=out)
    rows = by_pair(out, aligned)
    own = ids.flatten() >= 0
    assert not own.all() and not rows[own].isnan().any()
    assert int((~out.isnan()).any(1).sum()) == int(own.sum())
    judge(rows[own], a.repeat_interleave(2, 0)[own], w, ids.flatten()[own, None], "silu")


def test_weights_past_the_end_of_an_expert_are_not_used(device: str) -> None:
    """A tile that runs past gate's last row meets up's first, and past up's last the next expert's: NaN here."""
    a, w, r = problem(3, 3, 1, 40, 32, torch.float32, device)
    ids = torch.full_like(r.topk_ids, 1)
    poisoned = torch.full_like(w, float("nan"))
    poisoned[1] = w[1]
    aligned = align(ids, 16, 3)
    for tma in (False, True):
        out = gated_gemm(a, poisoned, aligned, CONFIG, num_pairs=3, top_k=1, tma=tma)
        judge(by_pair(out, aligned), a, w, ids, "silu")


def test_no_pairs_is_no_work(device: str) -> None:
    a, w, r = problem(0, 4, 2, 64, 64, torch.float32, device)
    assert gated_gemm(a, w, align(r.topk_ids, 16, 4), CONFIG, num_pairs=0, top_k=2).shape == (0, 32)


def test_blocks_of_k_are_added_with_compensation(device: str) -> None:
    """2^24 + 1 + 1 + ...: a plain float32 sum of the blocks stays at 2^24; silu of that much is the identity."""
    K, block = 16 * 64, 16
    a = torch.zeros(1, K, device=device)
    a[0, ::block] = 1.0
    a[0, 0] = 2.0**24
    ids = torch.zeros(1, 1, dtype=torch.int32, device=device)
    config = KernelConfig(16, 32, block, 1)
    for tma in (False, True):
        out = gated_gemm(
            a, torch.ones(1, 32, K, device=device), align(ids, 16, 1), config,
            num_pairs=1, top_k=1, activation="silu", tma=tma,
        )  # fmt: skip
        assert out[0].unique().tolist() == [2.0**48 + 2.0**31]  # (2^24 + 64)^2 in float32


def test_rules_of_the_launcher(device: str) -> None:
    a, w, r = problem(4, 4, 2, 32, 64, torch.float32, device)
    aligned, given = align(r.topk_ids, 16, 4), {"num_pairs": 8, "top_k": 2}
    with pytest.raises(ConfigError, match=r"BLOCK_SIZE_N = 16\. Expected at least 32"):
        gated_gemm(a, w, aligned, KernelConfig(16, 16, 32, 1), **given)
    gated_gemm(a, w, aligned, KernelConfig(16, 16, 32, 1), gated=False, **given)
    with pytest.raises(ConfigError, match="gated_gemm got SPLIT_K = 2"):
        gated_gemm(a, w, aligned, KernelConfig(16, 32, 32, 1, SPLIT_K=2), **given)
    with pytest.raises(ShapeError, match="w13 has 31 rows"):
        gated_gemm(a, w[:, 1:].contiguous(), aligned, CONFIG, **given)
    with pytest.raises(UnknownNameError, match="relu2"):
        gated_gemm(a, w, aligned, CONFIG, activation="relu2", **given)
    with pytest.raises(ShapeError, match="out has shape"):
        gated_gemm(a, w, aligned, CONFIG, out=a.new_empty(8, 16), **given)
    with pytest.raises(LayoutError, match="A row of w13 is 252 bytes"):
        gated_gemm(a[:, 1:].contiguous(), w[..., 1:].contiguous(), aligned, CONFIG, tma=True, **given)


@pytest.mark.gpu
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES], ids=str)
@pytest.mark.parametrize(
    "config",
    [KernelConfig(16, 64, 64, 1, 4, 4), KernelConfig(64, 64, 32, 8), KernelConfig(128, 128, 32, 16, 8, 3)],
    ids=KernelConfig.short,
)
def test_on_the_gpu(dtype: torch.dtype, config: KernelConfig, gated: bool, tma: bool) -> None:
    a, w, r = problem(300, 8, 2, 200, 328, dtype, "cuda")
    aligned = align(r.topk_ids, config.BLOCK_SIZE_M, 8)
    given = {"num_pairs": 600, "top_k": 2, "gated": gated, "topk_weights": r.topk_weights, "tma": tma}
    first, *others = (by_pair(gated_gemm(a, w, aligned, config, **given), aligned) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)
    judge(first, a, w, r.topk_ids, "silu", gated, topk_weights=r.topk_weights)


@pytest.mark.gpu
@pytest.mark.parametrize("tma", [False, True])
def test_weights_and_rows_past_2_to_31_elements(tma: bool) -> None:
    """260 experts of 2048 x 4096, the last of them; then 65,600 rows of 32,768."""
    config = KernelConfig(64, 128, 64, 1, 4, 3)
    w = torch.empty(260, 2048, 4096, dtype=torch.bfloat16, device="cuda")
    w[-1].normal_().mul_(4096**-0.5)
    a = torch.randn(16, 4096, device="cuda").bfloat16()
    ids = torch.full((16, 1), 259, dtype=torch.int32, device="cuda")
    aligned = align(ids, 64, 260)
    assert w.numel() > 2**31
    out = by_pair(gated_gemm(a, w, aligned, config, num_pairs=16, top_k=1, tma=tma), aligned)
    judge(out, a, w[-1:].clone(), ids - 259, "silu")
    del w, out
    w = (torch.randn(1, 65_536, 64, device="cuda") / 8).bfloat16()
    a = torch.randn(65_600, 64, device="cuda").bfloat16()
    ids = torch.zeros(65_600, 1, dtype=torch.int32, device="cuda")
    out = gated_gemm(a, w, moe_align_block_size(ids, 64, 1), config, num_pairs=65_600, top_k=1, tma=tma)
    assert out.numel() > 2**31
    judge(out[65_592:65_600], a[-8:], w, ids[-8:], "silu")
