"""The compatible kernel for 8-bit weights with a scale for each channel, or each matrix: sums of codes, scaled once at the end.

Rounding points are those of sglang 0.5.23's fused_moe_kernel and vLLM 0.33.0's: fp8 products are summed over all of K by the
tensor core (on Hopper with some 14 bits of fraction between its own additions; `PROMOTE` adds steps of K in float32 instead, as
block scales do), int8 ones in int32 a step of K and in float32 over steps, and int8 weights under 16-bit activations are widened
before the product. Then the row's scale and the channel's, the bias, the routed weight, and one rounding.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.kernels import checks  # noqa: E402
from moelab.kernels.gemm_call import GemmCall, check_quantised_gemm, gemm_constants, swaps_operands  # noqa: E402
from moelab.kernels.launch import Launcher, checked  # noqa: E402
from moelab.kernels.tiles import (  # noqa: E402
    add_bias,
    grouped_tile,
    load_rows,
    load_weights,
    operand_ptrs,
    row_block,
    start_next,
    store_rows,
    times_weight,
)

FAMILIES = (
    "fp8_w8a8_tensor", "fp8_w8a8_tensor_static", "fp8_w8a8_channel", "int8_w8a8_channel", "int8_w8a16_channel"
)  # fmt: skip


@triton.jit
def _code_step(
    a_ptrs, w_ptrs, acc, row_mask, left,
    SWAP: tl.constexpr, PROMOTE: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """acc + product of one step of K; a (BM, BK), w (BK, BN) or, swapped, acc (BN, BM)."""
    a = load_rows(a_ptrs, row_mask, left, BLOCK_SIZE_K, EVEN_K)
    w = load_weights(w_ptrs, left, BLOCK_SIZE_K, EVEN_K)
    if a.dtype != w.dtype:
        w = w.to(a.dtype)
    if SWAP:
        a, w = tl.trans(w), tl.trans(a)
    if a.dtype == tl.int8 or PROMOTE:
        acc += tl.dot(a, w).to(tl.float32)
    else:
        acc = tl.dot(a, w, acc, input_precision="ieee")
    return acc


# num_pairs and num_rows follow the batch size: specialising them would mean another compile per batch size.
@triton.jit(do_not_specialize=["num_pairs", "num_rows"])
def _channel_scaled_gemm_kernel(
    a_ptr,
    w_ptr,
    c_ptr,
    a_scale_ptr,
    w_scale_ptr,
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
    BY_TOKEN: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    SWAP: tl.constexpr,
    PROMOTE: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One (BLOCK_SIZE_M, BLOCK_SIZE_N) tile of c: one expert's rows times its weight, scaled at the end."""
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
    if SWAP:
        acc = tl.zeros((BLOCK_SIZE_N, BLOCK_SIZE_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=tl.float32)
    for k in range(tl.cdiv(K, BLOCK_SIZE_K)):
        acc = _code_step(a_ptrs, w_ptrs, acc, row_mask, K - k * BLOCK_SIZE_K, SWAP, PROMOTE, BLOCK_SIZE_K, EVEN_K)
        a_ptrs += BLOCK_SIZE_K
        w_ptrs += BLOCK_SIZE_K
    if SWAP:
        acc = tl.trans(acc)
    if a_scale_ptr is not None:
        if BY_TOKEN:
            acc *= tl.load(a_scale_ptr + pair // TOP_K, mask=row_mask, other=0.0)[:, None]
        else:
            acc *= tl.load(a_scale_ptr)
    if BY_CHANNEL:
        acc *= tl.load(w_scale_ptr + expert * N + offs_n, mask=offs_n < N, other=0.0)[None, :]
    else:
        acc *= tl.load(w_scale_ptr + expert)
    acc = add_bias(acc, bias_ptr, expert, offs_n, offs_n < N, N)
    acc = times_weight(acc, topk_weights_ptr, pair, row_mask)
    store_rows(c_ptr, pair, row_mask, offs_n, N, acc)


_launcher = Launcher(_channel_scaled_gemm_kernel)


def channel_scaled_gemm(call: GemmCall, out: Tensor, *, promote: bool = False) -> Tensor:
    """c[pair] = a[pair // top_k] @ w[expert of pair].T (+ bias) (* weight), of 8-bit weights scaled by channel or by matrix.

    call: a (num_pairs / top_k, K), codes as the weights are with a_scale (rows of a, 1) or () float32, or, for int8_w8a16, plain
    bfloat16 or float16 without; weights: w (E, N, K) float8_e4m3fn or int8, scale (E, N) or (E,) float32.
    out: (num_pairs, N), bfloat16, float16 or float32, every row written; pairs of expert -1 get zeros. Deterministic.
    promote: add each step of K in float32, where Hopper's tensor cores would keep some 14 bits of an fp8 sum over all of K.
    Raises what grouped_gemm does, and FormatError for other formats.
    """
    checked(("channel_scaled_gemm", call.seen(call.a_scale, out)), lambda: check_channel_scaled_gemm(call, out))
    if call.num_pairs:
        channel_scaled_gemm_unchecked(call, out, promote)
    return out


def channel_scaled_gemm_unchecked(call: GemmCall, out: Tensor, promote: bool = False) -> None:
    """`channel_scaled_gemm` of at least one pair, for pipelines whose call was checked as a whole."""
    w, config, (N, K) = call.weights, call.config, call.sizes
    by_token, by_channel = w.format.activations == "token", w.format.granularity == "channel"
    swap = swaps_operands(call)
    _launcher(
        (call.key, out.dtype, w.format.family, swap, promote),
        (call.num_tiles, 1),
        (call.a, w.w, out, call.a_scale, w.scale, w.bias, call.topk_weights, *call.row_tensors),
        (N, K, call.num_pairs, call.num_rows),
        lambda: gemm_constants(
            config, K, TOP_K=call.top_k, BY_TOKEN=by_token, BY_CHANNEL=by_channel, SWAP=swap, PROMOTE=promote
        ),
    )


def check_channel_scaled_gemm(call: GemmCall, out: Tensor) -> None:
    """Raise what `channel_scaled_gemm` names."""
    check_quantised_gemm(call, out, FAMILIES)
    checks.check_one_split("channel_scaled_gemm", call.config)
