"""The compatible kernel for weights of 4 or 8 bits in scaled groups, which 16-bit activations meet: dequantised in the loop.

Rounding points are those of sglang 0.5.23's fused_moe_kernel_gptq_awq and vLLM 0.33.0's: (code - zero point) * scale in float32,
rounded to the activations' dtype, then multiplied. mxfp4 (e2m1 codes, scales that are powers of two) takes the same way and
rounds nothing. Steps of K may be longer or shorter than a group. Loads are masked in K, where theirs read past a row's end.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.kernels import checks  # noqa: E402
from moelab.kernels.gemm_call import GemmCall, check_quantised_gemm, gemm_constants  # noqa: E402
from moelab.kernels.launch import Launcher, checked  # noqa: E402
from moelab.kernels.tiles import add_bias, grouped_tile, load_rows, row_block, store_rows, times_weight  # noqa: E402

FAMILIES = ("int4_w4a16_group", "int8_w8a16_group", "mxfp4_w4a16")


@triton.jit
def fp4_value(code):
    """The e2m1 number of 4 bits, float32: its fields moved to float32's places; 1 is 0.5, which e2m1 has as a denormal."""
    magnitude = code & 7
    bits = ((magnitude >> 1) + 126) << 23 | (magnitude & 1) << 22
    bits = tl.where(magnitude == 1, 126 << 23, bits)
    bits = tl.where(magnitude == 0, 0, bits) | (code & 8) << 28
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _weights_of_step(
    w_ptr, scale_ptr, zero_ptr, offs_n, k, K, groups, GROUP: tl.constexpr, BITS: tl.constexpr, FP4: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
):  # fmt: skip
    """(BK, BN) float32 weights of one expert from column k on; zeros past K. offs_n is within N."""
    offs_k = k + tl.arange(0, BLOCK_SIZE_K)
    inside = (offs_k < K)[:, None]
    PER_BYTE: tl.constexpr = 8 // BITS
    code = tl.load(w_ptr + offs_n[None, :] * (K // PER_BYTE) + (offs_k // PER_BYTE)[:, None], mask=inside, other=0)
    code = code.to(tl.int32)
    if BITS == 4:
        code = (code >> ((offs_k % 2) * 4)[:, None]) & 15
    group = (offs_k // GROUP)[:, None]
    scale = tl.load(scale_ptr + offs_n[None, :] * groups + group, mask=inside, other=0)
    if FP4:
        wide = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        return tl.where(inside, fp4_value(code) * wide, 0.0)
    if zero_ptr is not None:
        if BITS == 4:
            zero = tl.load(zero_ptr + (offs_n // 2)[None, :] * groups + group, mask=inside, other=0).to(tl.int32)
            zero = (zero >> ((offs_n % 2) * 4).to(tl.int32)[None, :]) & 15
        else:
            zero = tl.load(zero_ptr + offs_n[None, :] * groups + group, mask=inside, other=0).to(tl.int32)
    else:
        zero = 1 << (BITS - 1)
    return tl.where(inside, (code - zero).to(tl.float32) * scale.to(tl.float32), 0.0)


# num_pairs and num_rows follow the batch size: specialising them would mean another compile per batch size.
@triton.jit(do_not_specialize=["num_pairs", "num_rows"])
def _packed_gemm_kernel(
    a_ptr,
    w_ptr,
    c_ptr,
    w_scale_ptr,
    zero_ptr,
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
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    FP4: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One (BLOCK_SIZE_M, BLOCK_SIZE_N) tile of c: one expert's rows times its weight, dequantised on the way."""
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
    groups = tl.cdiv(K, GROUP)
    columns = (offs_n % N).to(tl.int64)
    w_ptr += expert * N * (K * BITS // 8)
    w_scale_ptr += expert * N * groups
    if zero_ptr is not None:
        zero_ptr += expert * (N * BITS // 8) * groups
    a_ptrs = a_ptr + (pair // TOP_K)[:, None] * K + tl.arange(0, BLOCK_SIZE_K)[None, :]
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_SIZE_K):
        a = load_rows(a_ptrs, row_mask, K - k, BLOCK_SIZE_K, EVEN_K)
        w = _weights_of_step(w_ptr, w_scale_ptr, zero_ptr, columns, k, K, groups, GROUP, BITS, FP4, BLOCK_SIZE_K)
        acc = tl.dot(a, w.to(a.dtype), acc, input_precision="ieee")
        a_ptrs += BLOCK_SIZE_K
    acc = add_bias(acc, bias_ptr, expert, offs_n, offs_n < N, N)
    acc = times_weight(acc, topk_weights_ptr, pair, row_mask)
    store_rows(c_ptr, pair, row_mask, offs_n, N, acc)


_launcher = Launcher(_packed_gemm_kernel)


def packed_gemm(call: GemmCall, out: Tensor) -> Tensor:
    """c[pair] = a[pair // top_k] @ w[expert of pair].T (+ bias) (* weight), of weights stored in scaled groups along K.

    call: a (num_pairs / top_k, K) bfloat16 or float16; weights: w (E, N, K / 2) uint8 of two 4-bit codes, the even column low,
    or (E, N, K) uint8 of 8 bits; scale (E, N, K / g), 16-bit, or float8_e8m0fnu for mxfp4; zero_point of 4 bits (E, N / 2, K / g)
    uint8 along N, or None.
    out: (num_pairs, N) in a's dtype, every row written; pairs of expert -1 get zeros. Deterministic.
    Raises what grouped_gemm does, and FormatError for other formats.
    """
    checked(("packed_gemm", call.seen(out)), lambda: check_packed_gemm(call, out))
    if call.num_pairs:
        packed_gemm_unchecked(call, out)
    return out


def packed_gemm_unchecked(call: GemmCall, out: Tensor) -> None:
    """`packed_gemm` of at least one pair, for pipelines whose call was checked as a whole."""
    w, config, (N, K) = call.weights, call.config, call.sizes
    format, fp4 = w.format, w.format.family == "mxfp4_w4a16"
    scale = w.scale.view(torch.uint8) if fp4 and w.scale is not None else w.scale  # Triton has no e8m0
    _launcher(
        (call.key, format),
        (call.num_tiles, 1),
        (call.a, w.w, out, scale, w.zero_point, w.bias, call.topk_weights, *call.row_tensors),
        (N, K, call.num_pairs, call.num_rows),
        lambda: gemm_constants(config, K, TOP_K=call.top_k, GROUP=format.sizes[0], BITS=format.bits, FP4=fp4),
    )


def check_packed_gemm(call: GemmCall, out: Tensor) -> None:
    """Raise what `packed_gemm` names."""
    check_quantised_gemm(call, out, FAMILIES)
    checks.check_one_split("packed_gemm", call.config)
