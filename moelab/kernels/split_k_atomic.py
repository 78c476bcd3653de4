"""Split-K with atomics: SPLIT_K programs share a tile's inner dimension and add their partial sums where they meet.

Not deterministic on a GPU for SPLIT_K > 1 or pairs_per_row > 1: the order of the additions is the order in which
programs finish. `split_k_workspace` is the deterministic one. Idea: sglang #9486, which added in the output's dtype
only, with int32 strides.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.config import KernelConfig  # noqa: E402
from moelab.dtypes import accumulator_dtype  # noqa: E402
from moelab.errors import ShapeError  # noqa: E402
from moelab.kernels import checks  # noqa: E402
from moelab.kernels.gemm_call import GemmCall, check_gemm, gemm_constants  # noqa: E402
from moelab.kernels.launch import Launcher, checked  # noqa: E402
from moelab.kernels.tiles import (  # noqa: E402
    add_bias,
    dot_loop,
    grouped_tile,
    operand_ptrs,
    row_block,
    start_next,
    times_weight,
)
from moelab.routing import Alignment  # noqa: E402
from moelab.weights import GemmWeights  # noqa: E402


# num_pairs and num_rows follow the batch size: specialising them would mean another compile per batch size.
@triton.jit(do_not_specialize=["num_pairs", "num_rows"])
def _split_k_atomic_kernel(
    a_ptr,
    w_ptr,
    c_ptr,
    bias_ptr,
    topk_weights_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    N,
    K,
    num_pairs,
    num_rows,
    TOP_K: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Add every SPLIT_K-th block of K of one (BLOCK_SIZE_M, BLOCK_SIZE_N) tile to c, which holds zeros at the start."""
    start_next(PDL)
    # Neighbours share a tile: its rows are read from L2, and its sums meet there.
    split = tl.program_id(0) % SPLIT_K
    pid_m, pid_n = grouped_tile(
        tl.program_id(0) // SPLIT_K, tl.cdiv(num_rows, BLOCK_SIZE_M), tl.cdiv(N, BLOCK_SIZE_N), GROUP_SIZE_M
    )
    if pid_m * BLOCK_SIZE_M >= tl.load(num_tokens_post_padded_ptr):
        return
    expert = tl.load(expert_ids_ptr + pid_m).to(tl.int64)
    if expert < 0:  # another rank's expert: its share of the sum is the zero that is there
        return
    pair, row_mask = row_block(sorted_token_ids_ptr, pid_m, num_pairs, BLOCK_SIZE_M)
    offs_n = pid_n * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    offs_k = split * BLOCK_SIZE_K + tl.arange(0, BLOCK_SIZE_K)
    a_ptrs, w_ptrs = operand_ptrs(a_ptr, w_ptr, pair // TOP_K, expert, offs_n, offs_k, N, K)
    wide = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=wide)
    acc = dot_loop(a_ptrs, w_ptrs, acc, K, row_mask, split, SPLIT_K, BLOCK_SIZE_K, EVEN_K)
    acc = add_bias(acc, bias_ptr, expert, offs_n, (offs_n < N) & (split == 0), N)  # once, not once a split
    acc = times_weight(acc, topk_weights_ptr, pair, row_mask)
    # Relaxed: nothing is read back before the kernel ends. The default, acq_rel, puts a fence behind every vector.
    c_ptrs = c_ptr + (pair // PAIRS_PER_ROW)[:, None] * N + offs_n[None, :]
    mask = row_mask[:, None] & (offs_n < N)[None, :]
    tl.atomic_add(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask, sem="relaxed")


_launcher = Launcher(_split_k_atomic_kernel)


def split_k_atomic_f32(
    a: Tensor,
    w: Tensor,
    alignment: Alignment,
    config: KernelConfig,
    *,
    num_pairs: int,
    top_k: int,
    bias: Tensor | None = None,
    topk_weights: Tensor | None = None,
    pairs_per_row: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """`grouped_gemm` with config.SPLIT_K programs a tile, their partial sums added into float32 (float64 for float64).

    Arguments, dtypes and errors as in grouped_gemm; every partial sum carries the routed weight. config.SPLIT_K may be
    1, and not over the number of K's blocks (ConfigError). pairs_per_row: pairs that share a row of the result: 1, or
    the layer's top_k, which makes GEMM2's sum over slots part of the same additions.
    Returns (num_pairs / pairs_per_row, N), zeroed here and then added to. Not deterministic on a GPU.
    """
    call = GemmCall(a, GemmWeights(w, bias), alignment, config, num_pairs, top_k, topk_weights)
    return _launch(call, pairs_per_row, out, accumulator_dtype(a.dtype))


def split_k_atomic_out(
    a: Tensor,
    w: Tensor,
    alignment: Alignment,
    config: KernelConfig,
    *,
    num_pairs: int,
    top_k: int,
    bias: Tensor | None = None,
    topk_weights: Tensor | None = None,
    pairs_per_row: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """`split_k_atomic_f32` adding in a's dtype: half the traffic in 16 bits, and a rounding for every partial sum."""
    call = GemmCall(a, GemmWeights(w, bias), alignment, config, num_pairs, top_k, topk_weights)
    return _launch(call, pairs_per_row, out, a.dtype)


def _launch(call: GemmCall, pairs_per_row: int, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    N, K = checked(
        ("split_k_atomic", dtype, pairs_per_row, call.seen(out)), lambda: _check(call, pairs_per_row, out, dtype)
    )
    if out is None:
        out = call.a.new_empty((call.num_pairs // pairs_per_row, N), dtype=dtype)
    out.zero_()
    if call.num_pairs == 0:
        return out
    w, config, top_k = call.weights, call.config, call.top_k
    _launcher(
        (call.key, pairs_per_row, dtype),
        (call.num_tiles, 1),
        (call.a, w.w, out, w.bias, call.topk_weights, *call.row_tensors),
        (N, K, call.num_pairs, call.num_rows),
        lambda: gemm_constants(config, K, TOP_K=top_k, PAIRS_PER_ROW=pairs_per_row, SPLIT_K=config.SPLIT_K),
    )
    return out


def _check(call: GemmCall, pairs_per_row: int, out: Tensor | None, dtype: torch.dtype) -> tuple[int, int]:
    """(N, K) of operands that fit together; raises what the two launchers name."""
    N, K = check_gemm(call)
    if pairs_per_row < 1 or call.num_pairs % pairs_per_row:
        raise ShapeError(
            f"{call.num_pairs} pairs do not divide into rows of {pairs_per_row}. Expected 1, or the layer's top_k. "
            "Pass pairs_per_row=1 for a row per pair."
        )
    checks.check_out(out, call.a, (call.num_pairs // pairs_per_row, N), dtype)
    return N, K
