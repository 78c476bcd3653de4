"""The compatible kernel for 8-bit weights in scaled blocks: both operands are codes, and each step of K has its scales.

Meta-parameters, tile order and rounding points are those of sglang 0.5.23's fused_moe_kernel with block_shape: float32 sums of
one step of K, times the row's scale and the block's, added in float32. Where a tile's columns lie in one block its scale
multiplies the rows' first, as there. Below 64 rows on Hopper the operands change places (weights as the tensor core's M), which
makes an 8-bit product of what would be one of 16 bits; the sums are the same.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.errors import ConfigError  # noqa: E402
from moelab.kernels import checks  # noqa: E402
from moelab.kernels.gemm_call import (  # noqa: E402
    GemmCall,
    check_makes_codes,
    check_quantised_gemm,
    gemm_constants,
    swaps_operands,
)
from moelab.kernels.launch import Launcher, checked  # noqa: E402
from moelab.kernels.quantise_activations import CODE_LIMIT, quantise_rows  # noqa: E402
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


@triton.jit
def _scaled_step(
    a_ptrs, w_ptrs, a_scale_ptrs, w_scale_ptrs, acc, row_mask, left,
    SWAP: tl.constexpr, ONE_SCALE: tl.constexpr, LIMIT: tl.constexpr, POWER: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """acc + scaled product of one step of K; a (BM, BK), w (BK, BN) or, swapped, acc (BN, BM)."""
    a = load_rows(a_ptrs, row_mask, left, BLOCK_SIZE_K, EVEN_K)
    w = load_weights(w_ptrs, left, BLOCK_SIZE_K, EVEN_K)
    if a_scale_ptrs is not None:
        a_scale = tl.load(a_scale_ptrs, mask=row_mask, other=0.0)
    else:
        a, a_scale = quantise_rows(a.to(tl.float32), w.dtype, LIMIT, POWER)
    w_scale = tl.load(w_scale_ptrs)
    if SWAP:
        product = tl.dot(tl.trans(w), tl.trans(a)).to(tl.float32)
        if ONE_SCALE:
            acc += product * (a_scale * w_scale)[None, :]
        else:
            acc += product * a_scale[None, :] * w_scale[:, None]
    else:
        product = tl.dot(a, w).to(tl.float32)
        if ONE_SCALE:
            acc += product * (a_scale * w_scale)[:, None]
        else:
            acc += product * a_scale[:, None] * w_scale[None, :]
    return acc


# num_pairs and num_rows follow the batch size: specialising them would mean another compile per batch size.
@triton.jit(do_not_specialize=["num_pairs", "num_rows"])
def _block_scaled_gemm_kernel(
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
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
    SWAP: tl.constexpr,
    LIMIT: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One (BLOCK_SIZE_M, BLOCK_SIZE_N) tile of c: one expert's rows times its weight; a step of K lies in one group."""
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
    ONE_SCALE: tl.constexpr = GROUP_N % BLOCK_SIZE_N == 0
    groups_n, groups_k = tl.cdiv(N, GROUP_N), tl.cdiv(K, GROUP_K)
    a_ptrs, w_ptrs = operand_ptrs(a_ptr, w_ptr, pair // TOP_K, expert, offs_n, offs_k, N, K)
    if a_scale_ptr is not None:
        a_scale_ptrs = a_scale_ptr + (pair // TOP_K) * groups_k
    if ONE_SCALE:
        w_scale_ptrs = w_scale_ptr + (expert * groups_n + pid_n * BLOCK_SIZE_N // GROUP_N) * groups_k
    else:
        w_scale_ptrs = w_scale_ptr + (expert * groups_n + offs_n % N // GROUP_N) * groups_k
    if SWAP:
        acc = tl.zeros((BLOCK_SIZE_N, BLOCK_SIZE_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=tl.float32)
    for k in range(tl.cdiv(K, BLOCK_SIZE_K)):
        group = k * BLOCK_SIZE_K // GROUP_K
        a_scales = None if a_scale_ptr is None else a_scale_ptrs + group
        acc = _scaled_step(
            a_ptrs, w_ptrs, a_scales, w_scale_ptrs + group, acc, row_mask, K - k * BLOCK_SIZE_K,
            SWAP, ONE_SCALE, LIMIT, POWER, BLOCK_SIZE_K, EVEN_K,
        )  # fmt: skip
        a_ptrs += BLOCK_SIZE_K
        w_ptrs += BLOCK_SIZE_K
    if SWAP:
        acc = tl.trans(acc)
    acc = add_bias(acc, bias_ptr, expert, offs_n, offs_n < N, N)
    acc = times_weight(acc, topk_weights_ptr, pair, row_mask)
    store_rows(c_ptr, pair, row_mask, offs_n, N, acc)


_launcher = Launcher(_block_scaled_gemm_kernel)


def block_scaled_gemm(call: GemmCall, out: Tensor) -> Tensor:
    """c[pair] = a[pair // top_k] @ w[expert of pair].T (+ bias) (* weight), of operands stored as codes with scales by blocks.

    call: a (num_pairs / top_k, K), float8_e4m3fn or int8 as the weights are; a_scale (rows of a, K / k rounded up) float32. Or a
    as it is, without a_scale: it becomes codes on the way, as `quantise_activations` makes them, each step of K a group;
    weights in a format by blocks of (n, k): w (E, N, K), scale (E, N / n, K / k) float32, both rounded up.
    out: (num_pairs, N), bfloat16, float16 or float32, every row written; pairs of expert -1 get zeros. Deterministic.
    Raises what grouped_gemm does, FormatError for other formats, and ConfigError for a BLOCK_SIZE_K that does not divide the
    group: a step of K has one scale, and sglang computes wrong sums there without a word (0.5.23; its issue #39626).
    """
    checked(("block_scaled_gemm", call.seen(call.a_scale, out)), lambda: check_block_scaled_gemm(call, out))
    if call.num_pairs:
        block_scaled_gemm_unchecked(call, out)
    return out


def block_scaled_gemm_unchecked(call: GemmCall, out: Tensor) -> None:
    """`block_scaled_gemm` of at least one pair, for pipelines whose call was checked as a whole."""
    w, config, (N, K) = call.weights, call.config, call.sizes
    group_n, group_k = w.format.sizes
    swap = swaps_operands(call)
    _launcher(
        (call.key, out.dtype, w.format, call.a_scale is None, swap),
        (call.num_tiles, 1),
        (call.a, w.w, out, call.a_scale, w.scale, w.bias, call.topk_weights, *call.row_tensors),
        (N, K, call.num_pairs, call.num_rows),
        lambda: gemm_constants(
            config, K, TOP_K=call.top_k, GROUP_N=group_n, GROUP_K=group_k, SWAP=swap,
            LIMIT=CODE_LIMIT[str(w.format.weight_dtype)], POWER=w.format.power_of_two_scales,
        ),
    )  # fmt: skip


def check_block_scaled_gemm(call: GemmCall, out: Tensor) -> None:
    """Raise what `block_scaled_gemm` names."""
    check_quantised_gemm(call, out, ("fp8_w8a8_block", "int8_w8a8_block"), makes_codes=True)
    checks.check_one_split("block_scaled_gemm", call.config)
    if why := call.weights.format.step_refused(call.config.BLOCK_SIZE_K):
        raise ConfigError(f"{why}. Expected a step that divides the group. Lower BLOCK_SIZE_K.")
    check_makes_codes(call, swaps_operands(call))
