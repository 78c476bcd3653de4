"""The compatible kernel with its weights read by the TMA unit of sm_90 and later; the rounding points are the same.

One thread asks for a whole box of weights where every thread would compute addresses, and no register waits for it. The
activations stay with pointers: their rows are gathered, which TMA can do from sm_100 on only.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.config import KernelConfig  # noqa: E402
from moelab.kernels import checks  # noqa: E402
from moelab.kernels.descriptors import check_tma, check_tma_config, weight_descriptor  # noqa: E402
from moelab.kernels.gemm_call import GemmCall, check_gemm, gemm_constants  # noqa: E402
from moelab.kernels.launch import Launcher, checked  # noqa: E402
from moelab.kernels.tiles import (  # noqa: E402
    add_bias,
    grouped_tile,
    row_block,
    start_next,
    store_rows,
    times_weight,
    tma_dot_loop,
)
from moelab.routing import Alignment  # noqa: E402
from moelab.weights import GemmWeights  # noqa: E402


# num_pairs and num_rows follow the batch size: specialising them would mean another compile per batch size.
@triton.jit(do_not_specialize=["num_pairs", "num_rows"])
def _grouped_gemm_tma_kernel(
    a_ptr,
    w_desc,
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
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One (BLOCK_SIZE_M, BLOCK_SIZE_N) tile of c: one expert's rows times its weight, whose boxes come by w_desc."""
    start_next(PDL)
    pid_m, pid_n = grouped_tile(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_SIZE_M), tl.cdiv(N, BLOCK_SIZE_N), GROUP_SIZE_M
    )
    if pid_m * BLOCK_SIZE_M >= tl.load(num_tokens_post_padded_ptr):
        return
    pair, row_mask = row_block(sorted_token_ids_ptr, pid_m, num_pairs, BLOCK_SIZE_M)
    offs_n = pid_n * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    expert = tl.load(expert_ids_ptr + pid_m)
    if expert < 0:  # another rank's expert: its share of the sum is zero here
        zeros = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=c_ptr.dtype.element_ty)
        store_rows(c_ptr, pair, row_mask, offs_n, N, zeros)
        return
    a_ptrs = a_ptr + (pair // TOP_K)[:, None] * K + tl.arange(0, BLOCK_SIZE_K)[None, :]
    wide = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=wide)
    # A box over the end of an expert reads the next one's rows, for columns that are not stored.
    w_row = expert * N + pid_n * BLOCK_SIZE_N
    acc = tma_dot_loop(a_ptrs, w_desc, w_row, acc, K, row_mask, BLOCK_SIZE_K, EVEN_K)
    acc = add_bias(acc, bias_ptr, expert.to(tl.int64), offs_n, offs_n < N, N)
    acc = times_weight(acc, topk_weights_ptr, pair, row_mask)
    store_rows(c_ptr, pair, row_mask, offs_n, N, acc)


_launcher = Launcher(_grouped_gemm_tma_kernel)


def grouped_gemm_tma(
    a: Tensor,
    w: Tensor,
    alignment: Alignment,
    config: KernelConfig,
    *,
    num_pairs: int,
    top_k: int,
    bias: Tensor | None = None,
    topk_weights: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`grouped_gemm` with w read through its kept descriptor (`descriptors.weight_descriptor`).

    Arguments, result, rounding points and errors as in grouped_gemm. Besides: an NVIDIA chip from sm_90 on (DeviceError),
    w on 16 bytes and its rows a multiple of 16 bytes (LayoutError), BLOCK_SIZE_N and BLOCK_SIZE_K at most 256
    (ConfigError). Deterministic.
    """
    call = GemmCall(a, GemmWeights(w, bias), alignment, config, num_pairs, top_k, topk_weights)
    N = checked(("grouped_gemm_tma", call.seen(out)), lambda: _check(call, out))
    if out is None:
        out = a.new_empty((num_pairs, N))
    if num_pairs:
        grouped_gemm_tma_unchecked(call, out)
    return out


def grouped_gemm_tma_unchecked(call: GemmCall, out: Tensor) -> None:
    """`grouped_gemm_tma` of at least one pair, for callers that checked it as a whole."""
    w, config, (N, K) = call.weights, call.config, call.sizes
    _launcher(
        call.key,
        (call.num_tiles, 1),
        (call.a, None, out, w.bias, call.topk_weights, *call.row_tensors),
        (N, K, call.num_pairs, call.num_rows),
        lambda: gemm_constants(config, K, TOP_K=call.top_k),
        ((1, weight_descriptor(w.w, (config.BLOCK_SIZE_N, config.BLOCK_SIZE_K))),),
    )


def _check(call: GemmCall, out: Tensor | None) -> int:
    """N of operands that fit together; raises what grouped_gemm_tma names."""
    N, _ = check_gemm(call)
    checks.check_one_split("grouped_gemm_tma", call.config)
    check_tma("w", call.weights.w, (call.config.BLOCK_SIZE_N, call.config.BLOCK_SIZE_K))
    check_tma_config(call.config, call.weights.w.dtype)
    checks.check_out(out, call.a, (call.num_pairs, N))
    return N
