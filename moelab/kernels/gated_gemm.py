"""GEMM1 with its activation in the epilogue: gate and up are summed side by side, and never go through memory.

That saves a launch, and writing and reading (pairs, 2N) and rounding it on the way. Rows are stored as they were
computed, sorted by expert, so that `sorted_gemm` finds each block's rows side by side.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

from functools import partial  # noqa: E402

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.config import MIN_DOT_BLOCK, KernelConfig  # noqa: E402
from moelab.errors import ConfigError, ShapeError  # noqa: E402
from moelab.kernels import checks  # noqa: E402
from moelab.kernels.descriptors import check_tma, check_tma_config, weight_descriptor  # noqa: E402
from moelab.kernels.gemm_call import GemmCall, check_gemm, gemm_constants  # noqa: E402
from moelab.kernels.launch import Launcher, checked  # noqa: E402
from moelab.kernels.tiles import (  # noqa: E402
    add_bias,
    dot_loop,
    gated_activation,
    gated_dot_loop,
    grouped_tile,
    operand_ptrs,
    plain_activation,
    row_block,
    start_next,
    store_rows,
    times_weight,
    tma_dot_loop,
    tma_gated_dot_loop,
)
from moelab.reference import check_activation  # noqa: E402
from moelab.routing import Alignment  # noqa: E402
from moelab.weights import GemmWeights  # noqa: E402


# num_pairs and num_rows follow the batch size: specialising them would mean another compile per batch size.
@triton.jit(do_not_specialize=["num_pairs", "num_rows"])
def _gated_gemm_kernel(
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
    ACTIVATION: tl.constexpr,
    TMA: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One (BLOCK_SIZE_M, BLOCK_SIZE_N / 2) tile of c (rows, N): activation(gate) * up of one expert's rows.

    An expert's weights are two of N rows, gate and up: 2 * expert and 2 * expert + 1. w_ptr is a descriptor with TMA.
    """
    start_next(PDL)
    WIDTH: tl.constexpr = BLOCK_SIZE_N // 2
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(num_rows, BLOCK_SIZE_M), tl.cdiv(N, WIDTH), GROUP_SIZE_M)
    if pid_m * BLOCK_SIZE_M >= tl.load(num_tokens_post_padded_ptr):
        return
    expert = tl.load(expert_ids_ptr + pid_m).to(tl.int64)
    if expert < 0:  # another rank's expert: sorted_gemm reads no such block
        return
    pair, row_mask = row_block(sorted_token_ids_ptr, pid_m, num_pairs, BLOCK_SIZE_M)
    offs_n = pid_n * WIDTH + tl.arange(0, WIDTH)
    offs_k = tl.arange(0, BLOCK_SIZE_K)
    wide = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    gate = tl.zeros((BLOCK_SIZE_M, WIDTH), dtype=wide)
    up = tl.zeros((BLOCK_SIZE_M, WIDTH), dtype=wide)
    if TMA:
        a_ptrs = a_ptr + (pair // TOP_K)[:, None] * K + offs_k[None, :]
        gate_row = (2 * expert * N).to(tl.int32) + pid_n * WIDTH
        gate, up = tma_gated_dot_loop(
            a_ptrs, w_ptr, gate_row, gate_row + N, gate, up, K, row_mask, BLOCK_SIZE_K, EVEN_K
        )
    else:
        a_ptrs, w_ptrs = operand_ptrs(a_ptr, w_ptr, pair // TOP_K, 2 * expert, offs_n, offs_k, N, K)
        up_offset = tl.cast(N, tl.int64) * K
        gate, up = gated_dot_loop(a_ptrs, w_ptrs, up_offset, gate, up, K, row_mask, BLOCK_SIZE_K, EVEN_K)
    gate = times_weight(add_bias(gate, bias_ptr, 2 * expert, offs_n, offs_n < N, N), topk_weights_ptr, pair, row_mask)
    up = times_weight(add_bias(up, bias_ptr, 2 * expert + 1, offs_n, offs_n < N, N), topk_weights_ptr, pair, row_mask)
    rows = pid_m.to(tl.int64) * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    store_rows(c_ptr, rows, row_mask, offs_n, N, gated_activation(gate, up, ACTIVATION))


@triton.jit(do_not_specialize=["num_pairs", "num_rows"])
def _activated_gemm_kernel(
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
    ACTIVATION: tl.constexpr,
    TMA: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One (BLOCK_SIZE_M, BLOCK_SIZE_N) tile of c (rows, N) for a layer without a gate. w_ptr is a descriptor with TMA."""
    start_next(PDL)
    pid_m, pid_n = grouped_tile(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_SIZE_M), tl.cdiv(N, BLOCK_SIZE_N), GROUP_SIZE_M
    )
    if pid_m * BLOCK_SIZE_M >= tl.load(num_tokens_post_padded_ptr):
        return
    expert = tl.load(expert_ids_ptr + pid_m).to(tl.int64)
    if expert < 0:  # another rank's expert: sorted_gemm reads no such block
        return
    pair, row_mask = row_block(sorted_token_ids_ptr, pid_m, num_pairs, BLOCK_SIZE_M)
    offs_n = pid_n * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    offs_k = tl.arange(0, BLOCK_SIZE_K)
    wide = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=wide)
    if TMA:
        a_ptrs = a_ptr + (pair // TOP_K)[:, None] * K + offs_k[None, :]
        w_row = (expert * N).to(tl.int32) + pid_n * BLOCK_SIZE_N
        acc = tma_dot_loop(a_ptrs, w_ptr, w_row, acc, K, row_mask, BLOCK_SIZE_K, EVEN_K)
    else:
        a_ptrs, w_ptrs = operand_ptrs(a_ptr, w_ptr, pair // TOP_K, expert, offs_n, offs_k, N, K)
        acc = dot_loop(a_ptrs, w_ptrs, acc, K, row_mask, 0, 1, BLOCK_SIZE_K, EVEN_K)
    acc = times_weight(add_bias(acc, bias_ptr, expert, offs_n, offs_n < N, N), topk_weights_ptr, pair, row_mask)
    rows = pid_m.to(tl.int64) * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    store_rows(c_ptr, rows, row_mask, offs_n, N, plain_activation(acc, ACTIVATION))


_launch_gated = Launcher(_gated_gemm_kernel)
_launch_activated = Launcher(_activated_gemm_kernel)


def gated_gemm(
    a: Tensor,
    w13: Tensor,
    alignment: Alignment,
    config: KernelConfig,
    *,
    num_pairs: int,
    top_k: int,
    activation: str = "silu",
    gated: bool = True,
    bias: Tensor | None = None,
    topk_weights: Tensor | None = None,
    tma: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """c[r] = activation(gate) * up of pair p = sorted_token_ids[r]: gate, up = (a[p // top_k] @ w13[expert].T) in halves.

    a: (num_pairs / top_k, K). w13: (E, 2N, K), gate rows and then up rows, or (E, N, K) with gated=False, which applies
    the activation alone; dtypes as in `grouped_gemm`. activation: as in `activation`.
    config: BLOCK_SIZE_N counts the weight rows that a program multiplies, half of them gate and half up, at least 32
    (16 with gated=False): accumulators and shared memory are then those of `grouped_gemm`, and c's tile half as wide.
    bias: (E, 2N) or (E, N). topk_weights: num_pairs float32 values, for a layer that weighs its input. Both come before
    the activation, in float32 (float64 for float64), and nothing is rounded before c is.
    tma: read w13 through its kept descriptor, with what `grouped_gemm_tma` asks for.
    Returns c (rows, N), rows = `GemmCall.num_rows`. Written are the rows of pairs of this rank's
    experts: neither padding, nor blocks of expert -1, nor blocks that are not in use. Deterministic.
    Raises what grouped_gemm does, and UnknownNameError.
    """
    call = GemmCall(a, GemmWeights(w13, bias), alignment, config, num_pairs, top_k, topk_weights, activation, gated)
    N = checked(("gated_gemm", tma, call.seen(out)), lambda: _check(call, tma, out))
    if out is None:
        out = a.new_empty((call.num_rows, N))
    if num_pairs:
        gated_gemm_unchecked(call, out, tma)
    return out


def gated_gemm_unchecked(call: GemmCall, out: Tensor, tma: bool = False) -> None:
    """`gated_gemm` of at least one pair, for callers that checked it as a whole."""
    w13, config, (rows, K) = call.weights, call.config, call.sizes
    (_launch_gated if call.gated else _launch_activated)(
        (call.key, call.activation, tma),
        (call.num_tiles, 1),
        (call.a, None if tma else w13.w, out, w13.bias, call.topk_weights, *call.row_tensors),
        (rows // 2 if call.gated else rows, K, call.num_pairs, call.num_rows),
        lambda: gemm_constants(config, K, ACTIVATION=call.activation, TMA=tma, TOP_K=call.top_k),
        ((1, weight_descriptor(w13.w, _box(call))),) if tma else (),
    )


gated_gemm_tma_unchecked = partial(gated_gemm_unchecked, tma=True)
"""`gated_gemm_unchecked` with w13 read through its kept descriptor."""


def _box(call: GemmCall) -> tuple[int, int]:
    columns = call.config.BLOCK_SIZE_N
    return columns // 2 if call.gated else columns, call.config.BLOCK_SIZE_K


def _check(call: GemmCall, tma: bool, out: Tensor | None) -> int:
    """N of operands that fit together; raises what gated_gemm names."""
    w13, config, gated = call.weights.w, call.config, call.gated
    check_activation(str(call.activation), gated)
    rows, _ = check_gemm(call)
    checks.check_one_split("gated_gemm", config)
    if gated and rows % 2:
        raise ShapeError(
            f"w13 has {rows} rows an expert. Expected an even number, gate rows and then up rows. Pass gated=False for none."
        )
    if gated and config.BLOCK_SIZE_N < 2 * MIN_DOT_BLOCK:
        raise ConfigError(
            f"gated_gemm got BLOCK_SIZE_N = {config.BLOCK_SIZE_N}. Expected at least {2 * MIN_DOT_BLOCK}: half of it is gate "
            f"rows and half up rows, and a tl.dot takes no side under {MIN_DOT_BLOCK}. Raise it."
        )
    if tma:
        check_tma("w13", w13, _box(call))
        check_tma_config(config, w13.dtype)
    N = rows // 2 if gated else rows
    checks.check_out(out, call.a, (call.num_rows, N))
    return N
