"""GEMM1 over 8-bit codes scaled by blocks, with its activation in the epilogue: gate and up are summed side by side.

Both operands are codes, as in `block_scaled_gemm`, whose sums and scales these are. Activations that come as they are become
codes on the way, a step of K being a group of theirs; and where a tile holds a group of its own result, that leaves as codes and
scales, which GEMM2 multiplies. So a layer launches neither an activation nor a quantisation.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.config import MIN_DOT_BLOCK  # noqa: E402
from moelab.errors import ConfigError, DtypeError, ShapeError  # noqa: E402
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
    gated_activation,
    grouped_tile,
    load_rows,
    load_weights,
    operand_ptrs,
    row_block,
    start_next,
    store_rows,
    times_weight,
)
from moelab.quantised_weights import empty_activations  # noqa: E402
from moelab.reference import check_activation  # noqa: E402

FAMILIES = ("fp8_w8a8_block", "int8_w8a8_block")


@triton.jit
def _scaled(a, a_scale, w, w_scale, SWAP: tl.constexpr):
    """The product of one step of K, scaled: (BM, W), or swapped (W, BM)."""
    if SWAP:
        return tl.dot(tl.trans(w), tl.trans(a)).to(tl.float32) * (a_scale * w_scale)[None, :]
    else:
        return tl.dot(a, w).to(tl.float32) * (a_scale * w_scale)[:, None]


# num_pairs and num_rows follow the batch size: specialising them would mean another compile per batch size.
@triton.jit(do_not_specialize=["num_pairs", "num_rows"])
def _gated_block_gemm_kernel(
    a_ptr,
    w_ptr,
    c_ptr,
    a_scale_ptr,
    w_scale_ptr,
    c_scale_ptr,
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
    TOP_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
    LIMIT: tl.constexpr,
    POWER: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One (BLOCK_SIZE_M, BLOCK_SIZE_N / 2) tile of activation(gate) * up, in its pairs' rows of c (pairs, N).

    Without a_scale_ptr a is no codes yet; with c_scale_ptr c is codes, and a tile's columns are one group.
    """
    start_next(PDL)
    WIDTH: tl.constexpr = BLOCK_SIZE_N // 2
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(num_rows, BLOCK_SIZE_M), tl.cdiv(N, WIDTH), GROUP_SIZE_M)
    if pid_m * BLOCK_SIZE_M >= tl.load(num_tokens_post_padded_ptr):
        return
    expert = tl.load(expert_ids_ptr + pid_m).to(tl.int64)
    if expert < 0:  # another rank's expert: GEMM2 multiplies no such row
        return
    pair, row_mask = row_block(sorted_token_ids_ptr, pid_m, num_pairs, BLOCK_SIZE_M)
    offs_n = pid_n * WIDTH + tl.arange(0, WIDTH)
    groups_n, groups_k = N // GROUP_N, tl.cdiv(K, GROUP_K)
    a_ptrs, gate_ptrs = operand_ptrs(a_ptr, w_ptr, pair // TOP_K, 2 * expert, offs_n, tl.arange(0, BLOCK_SIZE_K), N, K)
    up_ptrs = gate_ptrs + tl.cast(N, tl.int64) * K
    gate_scales = w_scale_ptr + (2 * expert * groups_n + pid_n * WIDTH // GROUP_N) * groups_k
    up_scales = gate_scales + groups_n * groups_k
    gate = tl.zeros((WIDTH, BLOCK_SIZE_M) if SWAP else (BLOCK_SIZE_M, WIDTH), dtype=tl.float32)
    up = tl.zeros_like(gate)
    for k in range(tl.cdiv(K, BLOCK_SIZE_K)):
        left, group = K - k * BLOCK_SIZE_K, k * BLOCK_SIZE_K // GROUP_K
        a = load_rows(a_ptrs, row_mask, left, BLOCK_SIZE_K, EVEN_K)
        if a_scale_ptr is not None:
            a_scale = tl.load(a_scale_ptr + (pair // TOP_K) * groups_k + group, mask=row_mask, other=0.0)
        else:
            a, a_scale = quantise_rows(a.to(tl.float32), w_ptr.dtype.element_ty, LIMIT, POWER)
        gate += _scaled(
            a, a_scale, load_weights(gate_ptrs, left, BLOCK_SIZE_K, EVEN_K), tl.load(gate_scales + group), SWAP
        )
        up += _scaled(a, a_scale, load_weights(up_ptrs, left, BLOCK_SIZE_K, EVEN_K), tl.load(up_scales + group), SWAP)
        a_ptrs += BLOCK_SIZE_K
        gate_ptrs += BLOCK_SIZE_K
        up_ptrs += BLOCK_SIZE_K
    if SWAP:
        gate, up = tl.trans(gate), tl.trans(up)
    gate = times_weight(add_bias(gate, bias_ptr, 2 * expert, offs_n, offs_n < N, N), topk_weights_ptr, pair, row_mask)
    up = times_weight(add_bias(up, bias_ptr, 2 * expert + 1, offs_n, offs_n < N, N), topk_weights_ptr, pair, row_mask)
    c = gated_activation(gate, up, ACTIVATION)
    if c_scale_ptr is not None:
        c, scale = quantise_rows(c, c_ptr.dtype.element_ty, LIMIT, POWER)
        tl.store(c_scale_ptr + pair * (N // WIDTH) + pid_n, scale, mask=row_mask)
    store_rows(c_ptr, pair, row_mask, offs_n, N, c)


_launcher = Launcher(_gated_block_gemm_kernel)


def writes_codes(call: GemmCall) -> bool:
    """Whether a tile of that GEMM1 holds one group of its result, which then leaves as codes."""
    return 2 * call.weights.format.sizes[1] == call.config.BLOCK_SIZE_N


def _swaps(call: GemmCall) -> bool:
    """Half of BLOCK_SIZE_N is the tensor core's M."""
    return swaps_operands(call) and call.config.BLOCK_SIZE_N >= 128


def gated_block_gemm(call: GemmCall, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """c[pair] = activation(gate) * up: gate, up = (a[pair // top_k] @ w13[expert].T) in halves, codes with scales by blocks.

    call: a (num_pairs / top_k, K), codes with a_scale, or as it is without, as in `block_scaled_gemm`; weights in a format by
    blocks of (n, k), n of which divide N; activation and gated as in `gated_gemm`; config: BLOCK_SIZE_N counts gate and up rows
    together, and half of it divides n. dtype: of c where it is no codes.
    Returns (c, scales): c (num_pairs, N) of dtype, and None; or where BLOCK_SIZE_N is 2 k, codes and their scales
    (num_pairs, N / k) float32, as `quantise_activations` makes them of the sums, which nothing rounds before. Rows of pairs of
    expert -1 are not written. Deterministic.
    Raises what `block_scaled_gemm` does, ShapeError where blocks lie across gate and up, ConfigError for a tile across blocks.
    """
    checked(("gated_block_gemm", dtype, call.seen(call.a_scale)), lambda: _check(call, dtype))
    return gated_block_gemm_unchecked(call, dtype)


def gated_block_gemm_unchecked(call: GemmCall, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`gated_block_gemm`, for pipelines whose call was checked as a whole."""
    w, config, (rows, K) = call.weights, call.config, call.sizes
    group_n, group_k = w.format.sizes
    if writes_codes(call):
        out, scale = empty_activations(w.format, call.num_pairs, rows // 2, dtype, call.a.device)
    else:
        out, scale = torch.empty((call.num_pairs, rows // 2), dtype=dtype, device=call.a.device), None
    swap = _swaps(call)
    if call.num_pairs:
        _launcher(
            (call.key, call.activation, out.dtype, dtype, call.a_scale is None, w.format, swap),
            (call.num_tiles, 1),
            (call.a, w.w, out, call.a_scale, w.scale, scale, w.bias, call.topk_weights, *call.row_tensors),
            (rows // 2, K, call.num_pairs, call.num_rows),
            lambda: gemm_constants(
                config, K, ACTIVATION=call.activation, TOP_K=call.top_k, GROUP_N=group_n, GROUP_K=group_k,
                LIMIT=CODE_LIMIT[str(w.format.weight_dtype)], POWER=w.format.power_of_two_scales, SWAP=swap,
            ),
        )  # fmt: skip
    return out, scale


def _check(call: GemmCall, dtype: torch.dtype) -> None:
    w, config, (rows, _) = call.weights, call.config, call.sizes
    if not call.gated:
        raise ConfigError(
            "gated_block_gemm was asked for gated=False. Expected a gate. Use block_scaled_gemm and activation."
        )
    check_activation(str(call.activation), True)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) or (call.a_scale is None and dtype != call.a.dtype):
        raise DtypeError(
            f"gated_block_gemm was asked for {dtype}. Expected bfloat16, float16 or float32, and that of a where a is no codes. "
            "Pass the layer's dtype."
        )
    check_quantised_gemm(call, dtype, FAMILIES, makes_codes=True)
    group_n = w.format.sizes[0]
    checks.check_one_split("gated_block_gemm", config)
    if rows % (2 * group_n):
        raise ShapeError(
            f"w13 has {rows} rows an expert, blocks of {group_n}. Expected whole blocks of gate rows and of up rows. Shard the "
            "layer otherwise, or use impl='triton'."
        )
    width = config.BLOCK_SIZE_N // 2
    if width < MIN_DOT_BLOCK or group_n % width:
        raise ConfigError(
            f"gated_block_gemm got BLOCK_SIZE_N = {config.BLOCK_SIZE_N}. Expected at least {2 * MIN_DOT_BLOCK}, and half of it, "
            f"the gate rows of a tile, to divide the block's {group_n} rows. Change it."
        )
    if why := w.format.step_refused(config.BLOCK_SIZE_K):
        raise ConfigError(f"{why}. Expected a step that divides the group. Lower BLOCK_SIZE_K.")
    check_makes_codes(call, _swaps(call))
