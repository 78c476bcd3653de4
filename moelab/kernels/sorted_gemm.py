"""GEMM2 over rows that lie sorted by expert, as `gated_gemm` stores them, and two ways to combine its products.

Each pair's row is put in its place, for a sum-reduce to follow, or added to its token's row by atomics.

TMA reductions (`descriptor.atomic_add`) were compiled for sm_90 and sm_100 under Triton 3.7.1 and left out: a box is a
rectangle and the rows of a tile go to scattered tokens, so each row takes a box of its own (1, BLOCK_SIZE_N), with a fence
and a wait to itself, after a masked sum over the tile that brings it out of the accumulator. A descriptor's scatter, of
sm_100 alone, stores and does not add; the relaxed atomics here are vectors of 16 bytes already, and the interpreter runs no
TMA reduction, so nothing could check one on a CPU.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

from functools import partial  # noqa: E402
from typing import Any  # noqa: E402

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.config import KernelConfig  # noqa: E402
from moelab.errors import ShapeError  # noqa: E402
from moelab.kernels import checks  # noqa: E402
from moelab.kernels.descriptors import activation_descriptor, check_tma, check_tma_config, weight_descriptor  # noqa: E402
from moelab.kernels.gemm_call import GemmCall, check_gemm, gemm_constants  # noqa: E402
from moelab.kernels.launch import Launcher, checked  # noqa: E402
from moelab.kernels.tiles import (  # noqa: E402
    add_bias,
    atomic_add_rows,
    dot_loop,
    grouped_tile,
    operand_ptrs,
    row_block,
    start_next,
    store_rows,
    times_weight,
    tma_tma_dot_loop,
)
from moelab.routing import Alignment  # noqa: E402
from moelab.weights import GemmWeights  # noqa: E402


# num_pairs and num_rows follow the batch size: specialising them would mean another compile per batch size.
@triton.jit(do_not_specialize=["num_pairs", "num_rows"])
def _sorted_gemm_kernel(
    c_ptr,
    a_ptr,
    w_ptr,
    bias_ptr,
    topk_weights_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    N,
    K,
    num_pairs,
    num_rows,
    ATOMIC: tl.constexpr,
    TMA: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One (BLOCK_SIZE_M, BLOCK_SIZE_N) tile: stored in its pairs' rows of c, or added to their tokens'.

    a_ptr and w_ptr are descriptors with TMA.
    """
    start_next(PDL)
    pid_m, pid_n = grouped_tile(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_SIZE_M), tl.cdiv(N, BLOCK_SIZE_N), GROUP_SIZE_M
    )
    if pid_m * BLOCK_SIZE_M >= tl.load(num_tokens_post_padded_ptr):
        return
    pair, row_mask = row_block(sorted_token_ids_ptr, pid_m, num_pairs, BLOCK_SIZE_M)
    offs_n = pid_n * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    expert = tl.load(expert_ids_ptr + pid_m).to(tl.int64)
    if expert < 0:  # another rank's expert: its share of the sum is zero here, and its rows of a hold nothing
        if not ATOMIC:
            zeros = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=c_ptr.dtype.element_ty)
            store_rows(c_ptr, pair, row_mask, offs_n, N, zeros)
        return
    wide = tl.float64 if c_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=wide)
    if TMA:  # rows of padding hold anything, and reach no other row
        w_row = (expert * N).to(tl.int32) + pid_n * BLOCK_SIZE_N
        acc = tma_tma_dot_loop(a_ptr, pid_m * BLOCK_SIZE_M, w_ptr, w_row, acc, K, BLOCK_SIZE_K)
    else:
        rows = pid_m.to(tl.int64) * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
        offs_k = tl.arange(0, BLOCK_SIZE_K)
        a_ptrs, w_ptrs = operand_ptrs(a_ptr, w_ptr, rows, expert, offs_n, offs_k, N, K)
        acc = dot_loop(a_ptrs, w_ptrs, acc, K, row_mask, 0, 1, BLOCK_SIZE_K, EVEN_K)
    acc = add_bias(acc, bias_ptr, expert, offs_n, offs_n < N, N)
    acc = times_weight(acc, topk_weights_ptr, pair, row_mask)
    if ATOMIC:
        atomic_add_rows(c_ptr, pair // TOP_K, row_mask, offs_n, N, acc)
    else:
        store_rows(c_ptr, pair, row_mask, offs_n, N, acc)


_launcher = Launcher(_sorted_gemm_kernel)


def sorted_gemm(
    a: Tensor,
    w: Tensor,
    alignment: Alignment,
    config: KernelConfig,
    *,
    num_pairs: int,
    bias: Tensor | None = None,
    topk_weights: Tensor | None = None,
    atomic: bool = False,
    top_k: int = 1,
    tma: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """y[p] = a[r] @ w[expert].T (+ bias) (* weight) for pair p = sorted_token_ids[r].

    a: (rows, K), rows = `GemmCall.num_rows`, as `gated_gemm` returns it; what is not a pair's row may hold anything, NaN
    too. w, alignment, bias, topk_weights: as in `grouped_gemm`.
    Returns y, (num_pairs, N) in a's dtype, zeros for pairs of expert -1; deterministic. atomic: returns the sum of y over each
    top_k pairs in a row, (num_pairs / top_k, N), added in a's dtype, a rounding for every product; zeroed here and added to in
    the order in which programs finish: not deterministic on a GPU. top_k: the layer's with it, 1 without.
    tma: read a and w through descriptors, w's a kept one, with what `grouped_gemm_tma` asks for, of a too.
    Raises what grouped_gemm does.
    """
    call = GemmCall(a, GemmWeights(w, bias), alignment, config, num_pairs, top_k, topk_weights)
    N = checked(("sorted_gemm", atomic, tma, call.seen(out)), lambda: _check(call, atomic, tma, out))
    if out is None:
        out = a.new_empty((num_pairs // top_k, N))
    if atomic:
        out.zero_()
    if num_pairs:
        sorted_gemm_unchecked(call, out, atomic, tma)
    return out


def sorted_gemm_unchecked(call: GemmCall, out: Tensor, atomic: bool = False, tma: bool = False) -> None:
    """`sorted_gemm` of at least one pair, for callers that checked it as a whole, and zeroed what is added to."""
    w, (N, K) = call.weights, call.sizes
    _launcher(
        (call.key, atomic, tma),
        (call.num_tiles, 1),
        (out, None if tma else call.a, None if tma else w.w, w.bias, call.topk_weights, *call.row_tensors),
        (N, K, call.num_pairs, call.num_rows),
        lambda: gemm_constants(call.config, K, ATOMIC=atomic, TMA=tma, TOP_K=call.top_k),
        _descriptors(call) if tma else (),
    )


sorted_gemm_tma_unchecked = partial(sorted_gemm_unchecked, tma=True)
"""`sorted_gemm_unchecked` with both operands by TMA."""


def _descriptors(call: GemmCall) -> tuple[tuple[int, Any], ...]:
    config = call.config
    rows = activation_descriptor(call.a, (config.BLOCK_SIZE_M, config.BLOCK_SIZE_K))
    return (1, rows), (2, weight_descriptor(call.weights.w, (config.BLOCK_SIZE_N, config.BLOCK_SIZE_K)))


def _check(call: GemmCall, atomic: bool, tma: bool, out: Tensor | None) -> int:
    """N of operands that fit together; raises what sorted_gemm names."""
    config, top_k, w = call.config, call.top_k, call.weights.w
    if not atomic and top_k != 1:
        raise ShapeError(
            f"sorted_gemm came with top_k = {top_k}. Expected 1: it keeps a row per pair. Pass top_k=1 and follow with "
            "sum_reduce, or atomic=True."
        )
    N, _ = check_gemm(call, a_rows=call.num_rows)
    checks.check_one_split("sorted_gemm", config)
    if tma:
        check_tma("a", call.a, (config.BLOCK_SIZE_M, config.BLOCK_SIZE_K))
        check_tma("w", w, (config.BLOCK_SIZE_N, config.BLOCK_SIZE_K))
        check_tma_config(config, w.dtype)
    checks.check_out(out, call.a, (call.num_pairs // top_k, N))
    return N
