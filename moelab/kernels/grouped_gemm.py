"""The vLLM/sglang-compatible kernel: each expert's rows times its weight, over rows sorted by expert and padded to tiles.

It keeps the meta-parameters, tile order and rounding points of the fused MoE kernel that sglang and vLLM run
(sglang 0.5.23, fused_moe_kernel), so that a config tuned here serves there, and theirs serve here; in float32 and
float64, which those do not serve, it rounds less. It asks for contiguous tensors where theirs takes strides: fewer
arguments, less host time.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.config import KernelConfig  # noqa: E402
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
    store_rows,
    times_weight,
)
from moelab.routing import Alignment  # noqa: E402
from moelab.weights import GemmWeights  # noqa: E402


# num_pairs and num_rows follow the batch size: specialising them would mean another compile per batch size.
@triton.jit(do_not_specialize=["num_pairs", "num_rows"])
def _grouped_gemm_kernel(
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
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One (BLOCK_SIZE_M, BLOCK_SIZE_N) tile of c: one expert's rows times its weight."""
    start_next(PDL)
    pid_m, pid_n = grouped_tile(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_SIZE_M), tl.cdiv(N, BLOCK_SIZE_N), GROUP_SIZE_M
    )
    if pid_m * BLOCK_SIZE_M >= tl.load(num_tokens_post_padded_ptr):
        return
    pair, row_mask = row_block(sorted_token_ids_ptr, pid_m, num_pairs, BLOCK_SIZE_M)
    offs_n = pid_n * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    expert = tl.load(expert_ids_ptr + pid_m).to(tl.int64)
    if expert < 0:  # another rank's expert: its share of the sum is zero here
        zeros = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=c_ptr.dtype.element_ty)
        store_rows(c_ptr, pair, row_mask, offs_n, N, zeros)
        return
    offs_k = tl.arange(0, BLOCK_SIZE_K)
    a_ptrs, w_ptrs = operand_ptrs(a_ptr, w_ptr, pair // TOP_K, expert, offs_n, offs_k, N, K)
    wide = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=wide)
    acc = dot_loop(a_ptrs, w_ptrs, acc, K, row_mask, 0, 1, BLOCK_SIZE_K, EVEN_K)
    acc = add_bias(acc, bias_ptr, expert, offs_n, offs_n < N, N)
    acc = times_weight(acc, topk_weights_ptr, pair, row_mask)
    store_rows(c_ptr, pair, row_mask, offs_n, N, acc)


_launcher = Launcher(_grouped_gemm_kernel)


def grouped_gemm(
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
    """c[pair] = a[pair // top_k] @ w[expert of pair].T (+ bias) (* weight), accumulated in float32 (float64 for float64).

    a: (num_pairs / top_k, K); GEMM1 passes the layer's top_k, GEMM2 passes 1 with one row per pair.
    w: (E, N, K), a's dtype: bfloat16, float16, float32 (IEEE products, not TF32) or float64.
    alignment: pairs sorted by expert under config.BLOCK_SIZE_M; pairs of expert -1 get zeros.
    bias: (E, N), a's dtype. topk_weights: num_pairs float32 values, multiplied in the epilogue, after the bias.
    Returns c (num_pairs, N) in a's dtype, every row written. Deterministic.
    Raises ShapeError, DtypeError, DeviceError, LayoutError, ConfigError, SharedMemoryError, RuntimeModeError.
    """
    call = GemmCall(a, GemmWeights(w, bias), alignment, config, num_pairs, top_k, topk_weights)
    N = checked(("grouped_gemm", call.seen(out)), lambda: _check(call, out))
    if out is None:
        out = a.new_empty((num_pairs, N))
    if num_pairs:
        grouped_gemm_unchecked(call, out)
    return out


def grouped_gemm_unchecked(call: GemmCall, out: Tensor) -> None:
    """`grouped_gemm` of at least one pair, for pipelines whose call was checked as a whole."""
    w, (N, K) = call.weights, call.sizes
    _launcher(
        call.key,
        (call.num_tiles, 1),
        (call.a, w.w, out, w.bias, call.topk_weights, *call.row_tensors),
        (N, K, call.num_pairs, call.num_rows),
        lambda: gemm_constants(call.config, K, TOP_K=call.top_k),
    )


def _check(call: GemmCall, out: Tensor | None) -> int:
    """N of operands that fit together; raises what grouped_gemm names."""
    N, _ = check_gemm(call)
    checks.check_one_split("grouped_gemm", call.config)
    checks.check_out(out, call.a, (call.num_pairs, N))
    return N
