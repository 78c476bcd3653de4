"""The compatible kernel for weights of 4 or 8 bits in scaled groups, which 16-bit activations meet: dequantised in the loop.

Rounding points are those of sglang 0.5.23's fused_moe_kernel_gptq_awq and vLLM 0.33.0's: (code - zero point) * scale in float32,
rounded to the activations' dtype, then multiplied. mxfp4 (e2m1 codes, scales that are powers of two) takes the same way and
rounds nothing. A step of K and a group divide one another. Loads are masked in K, where theirs read past a row's end.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.errors import ConfigError  # noqa: E402
from moelab.kernels import checks  # noqa: E402
from moelab.kernels.checks import launch_target  # noqa: E402
from moelab.kernels.gemm_call import GemmCall, check_quantised_gemm, gemm_constants  # noqa: E402
from moelab.kernels.launch import Launcher, checked  # noqa: E402
from moelab.kernels.nibbles import weights_of_pairs  # noqa: E402
from moelab.kernels.tiles import add_bias, grouped_tile, load_rows, row_block, start_next, store_rows, times_weight  # noqa: E402

FAMILIES = ("int4_w4a16_group", "int8_w8a16_group", "mxfp4_w4a16")


_INTEGER: tl.constexpr = tl.constexpr(0x4B000000)
"""2^23 in float32's bits: with an integer below 2^23 in its fraction it is 2^23 more than that, exactly. An or and an addition,
where a conversion runs at a quarter of their rate."""


@triton.jit
def fp4_value(code):
    """The e2m1 number of 4 bits, float32: its fields moved to float32's places and scaled; its denormal, 0.5, is one there."""
    bits = (code & 7) << 22 | (code & 8) << 28
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126: e2m1's bias is 1, float32's 127


@triton.jit
def small_integer(code):
    """A code below 2^23 as float32."""
    return (code | _INTEGER).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _stored_of_step(w_ptrs, left, BITS: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, EVEN_K: tl.constexpr):
    """(BN, BK * BITS / 8) bytes of one step of K; a byte that two codes share is loaded once."""
    PER_BYTE: tl.constexpr = 8 // BITS
    if EVEN_K:
        stored = tl.load(w_ptrs)
    else:
        offs = tl.arange(0, BLOCK_SIZE_K // PER_BYTE)
        stored = tl.load(w_ptrs, mask=(offs * PER_BYTE < left)[None, :], other=0)
    return stored


@triton.jit
def _per_weight(
    ptrs, k, left, GROUP: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, EVEN_K: tl.constexpr
):
    """What lies at ptrs (BN, 1) for each group, for the columns of a step: (BN, 1) where it lies in one group, else (BN, BK)."""
    if GROUP % BLOCK_SIZE_K == 0:
        found = tl.load(ptrs + k // GROUP)
    else:
        tl.static_assert(BLOCK_SIZE_K % GROUP == 0, "a step of K and a group divide one another")
        GROUPS: tl.constexpr = BLOCK_SIZE_K // GROUP
        offs = tl.arange(0, GROUPS)
        if EVEN_K:
            few = tl.load(ptrs + k // GROUP + offs[None, :])
        else:
            few = tl.load(ptrs + k // GROUP + offs[None, :], mask=(offs * GROUP < left)[None, :], other=0)
        found = tl.reshape(
            tl.broadcast_to(few[:, :, None], (BLOCK_SIZE_N, GROUPS, GROUP)), (BLOCK_SIZE_N, BLOCK_SIZE_K)
        )
    return found


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
    PAIRS: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One (BLOCK_SIZE_M, BLOCK_SIZE_N) tile of c: one expert's rows times its weight, dequantised on the way."""
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
    groups = K // GROUP
    row = expert * N + offs_n % N  # int64: E * N * K passes 2^31 at 256 experts of 4096 x 7168, of 4 bits too
    BYTES_OF_STEP: tl.constexpr = BLOCK_SIZE_K * BITS // 8
    w_ptrs = w_ptr + row[:, None] * (K * BITS // 8) + tl.arange(0, BYTES_OF_STEP)[None, :]
    scale_ptrs = w_scale_ptr + row[:, None] * groups
    if zero_ptr is not None:
        zero_ptrs = zero_ptr + (row * BITS // 8)[:, None] * groups
        shift = ((row % 2) * 4).to(tl.int32)[:, None] if BITS == 4 else 0
    a_ptrs = a_ptr + (pair // TOP_K)[:, None] * K + tl.arange(0, BLOCK_SIZE_K)[None, :]
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_SIZE_K):
        a = load_rows(a_ptrs, row_mask, K - k, BLOCK_SIZE_K, EVEN_K)
        # Two codes a byte have scales, and columns, by bytes: PER of each.
        PER: tl.constexpr = 2 if PAIRS else 1
        scale = _per_weight(
            scale_ptrs, k // PER, (K - k) // PER, GROUP // PER, BLOCK_SIZE_N, BLOCK_SIZE_K // PER, EVEN_K
        )
        zero = 1 << (BITS - 1)
        if zero_ptr is not None:
            zero = _per_weight(
                zero_ptrs, k // PER, (K - k) // PER, GROUP // PER, BLOCK_SIZE_N, BLOCK_SIZE_K // PER, EVEN_K
            )
            zero = (zero.to(tl.int32) >> shift) & (2**BITS - 1)
        stored = _stored_of_step(w_ptrs, K - k, BITS, BLOCK_SIZE_K, EVEN_K)
        if PAIRS:
            w = weights_of_pairs(stored, scale, zero, a.dtype, FP4)
        else:
            code = stored.to(tl.int32)
            if BITS == 4:
                code = tl.interleave(code & 15, code >> 4)
            if FP4:
                w = fp4_value(code) * (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
            else:
                w = (small_integer(code) - small_integer(zero)) * scale.to(tl.float32)
        # Past K the rows of a are zeros, and codes and scales are zeros, so that nothing is added.
        acc = tl.dot(a, tl.trans(w.to(a.dtype)), acc, input_precision="ieee")
        a_ptrs += BLOCK_SIZE_K
        w_ptrs += BYTES_OF_STEP
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
    Raises what grouped_gemm does, FormatError for other formats, and ConfigError for a BLOCK_SIZE_K that no group divides.
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
    pairs = widens_pairs(call)
    _launcher(
        (call.key, format, pairs),
        (call.num_tiles, 1),
        (call.a, w.w, out, scale, w.zero_point, w.bias, call.topk_weights, *call.row_tensors),
        (N, K, call.num_pairs, call.num_rows),
        lambda: gemm_constants(
            config, K, TOP_K=call.top_k, GROUP=format.sizes[0], BITS=format.bits, FP4=fp4, PAIRS=pairs
        ),
    )  # fmt: skip


def widens_pairs(call: GemmCall) -> bool:
    """Whether codes are widened two at a time (`moelab.kernels.nibbles`), in a few instructions: 4 bits on an NVIDIA chip, where
    the activations' dtype holds scales too: of e2m1 codes bfloat16, of integers their own."""
    w, dtype = call.weights, call.a.dtype
    if w.format.bits != 4 or w.scale is None or (target := launch_target()) is None:
        return False
    fits = dtype == torch.bfloat16 if w.format.family == "mxfp4_w4a16" else w.scale.dtype == dtype
    return fits and not target.is_amd


def check_packed_gemm(call: GemmCall, out: Tensor) -> None:
    """Raise what `packed_gemm` names."""
    check_quantised_gemm(call, out, FAMILIES)
    checks.check_one_split("packed_gemm", call.config)
    if why := call.weights.format.step_refused(call.config.BLOCK_SIZE_K):
        raise ConfigError(f"{why}. Expected one to divide the other. Choose another BLOCK_SIZE_K.")
