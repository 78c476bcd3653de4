"""The layer, step after step: classic, by TMA, by Split-K, and over sorted rows.

moelab.implementations names them; this module is imported when one of them first runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelab.call import MoECall
from moelab.config import KernelConfig
from moelab.kernels import checks
from moelab.kernels.activation import activation, activation_unchecked
from moelab.kernels.align import align, align_unchecked
from moelab.kernels.gated_gemm import gated_gemm
from moelab.kernels.gemm_call import GemmCall
from moelab.kernels.grouped_gemm import grouped_gemm_unchecked
from moelab.kernels.grouped_gemm_tma import grouped_gemm_tma
from moelab.kernels.launch import checked
from moelab.kernels.sorted_gemm import sorted_gemm
from moelab.kernels.split_k_atomic import split_k_atomic_f32
from moelab.kernels.split_k_workspace import split_k_workspace
from moelab.kernels.sum_reduce import sum_reduce, sum_reduce_unchecked
from moelab.pipelines.call_configs import call_configs
from moelab.pipelines.quantised import gated_quantised_pipeline, quantised_pipeline


def _weights_of_gemms(call: MoECall) -> tuple[Tensor | None, Tensor | None]:
    """The routed weights, for the one of GEMM1 and GEMM2 that applies them."""
    on_input = call.apply_router_weight_on_input
    return (call.topk_weights, None) if on_input else (None, call.topk_weights)


def triton_pipeline(call: MoECall) -> Tensor:
    """align, GEMM1, activation, GEMM2, sum-reduce: the pipeline of sglang and vLLM, five launches.

    Steps check nothing again of what fused_moe has: in eager decode the GPU waits for the host.
    """
    x, weights, ids = call.hidden_states, call.weights, call.topk_ids
    if not weights.format.is_plain:
        return quantised_pipeline(call)
    up, down = call_configs(call)
    checked(
        ("triton_pipeline", up, down, x.dtype, x.device, weights.w13.shape, weights.w2.shape),
        lambda: _check_configs(call, up, down),
    )
    num_tokens, top_k = ids.shape
    pairs, hidden_size, rows = num_tokens * top_k, x.shape[1], weights.w13.shape[1]
    alignment = align_unchecked(ids, up.BLOCK_SIZE_M, weights.num_experts)
    weights_up, weights_down = _weights_of_gemms(call)
    h = x.new_empty((pairs, rows))
    grouped_gemm_unchecked(GemmCall(x, weights.up, alignment, up, pairs, top_k, weights_up), h)
    g = x.new_empty((pairs, rows // 2 if call.gated else rows))
    activation_unchecked(h, g, call.activation, call.gated)
    y = x.new_empty((num_tokens, top_k, hidden_size))
    grouped_gemm_unchecked(GemmCall(g, weights.down, alignment, down, pairs, 1, weights_down), y)
    return sum_reduce_unchecked(y, call.routed_scaling_factor, call.result())


def _check_configs(call: MoECall, up: KernelConfig, down: KernelConfig) -> None:
    for config, w in ((up, call.weights.w13), (down, call.weights.w2)):
        checks.check_one_split("grouped_gemm", config)
        checks.checked_config(config, w.dtype, w.shape[2])


def tma_pipeline(call: MoECall) -> Tensor:
    """The classic pipeline with both weights read by TMA."""
    w, (up, down) = call.weights, call_configs(call, "tma")
    alignment = align(call.topk_ids, up.BLOCK_SIZE_M, call.num_experts)
    weights_up, weights_down = _weights_of_gemms(call)
    h = grouped_gemm_tma(
        call.hidden_states, w.w13, alignment, up,
        num_pairs=call.num_pairs, top_k=call.top_k, bias=w.b13, topk_weights=weights_up,
    )  # fmt: skip
    h = activation(h, call.activation, gated=call.gated)
    y = grouped_gemm_tma(
        h, w.w2, alignment, down, num_pairs=call.num_pairs, top_k=1, bias=w.b2, topk_weights=weights_down
    )
    return _sum_of_slots(call, y)


def split_k_atomic_pipeline(call: MoECall) -> Tensor:
    """align, two GEMMs that add partial sums into float32, the activation between, one rounding at the end.

    GEMM2 adds straight into its token's row, so the sum over slots is part of the same additions: a buffer of (M, H)
    to zero and to read once, where a row per pair would be top_k times that and a launch more.
    """
    w, (up, down) = call.weights, call_configs(call)
    dtype = call.hidden_states.dtype
    alignment = align(call.topk_ids, up.BLOCK_SIZE_M, call.num_experts)
    weights_up, weights_down = _weights_of_gemms(call)
    h = split_k_atomic_f32(
        call.hidden_states, w.w13, alignment, up,
        num_pairs=call.num_pairs, top_k=call.top_k, bias=w.b13, topk_weights=weights_up,
    )  # fmt: skip
    h = activation(h, call.activation, gated=call.gated, dtype=dtype)
    y = split_k_atomic_f32(
        h, w.w2, alignment, down,
        num_pairs=call.num_pairs, top_k=1, bias=w.b2, topk_weights=weights_down, pairs_per_row=call.top_k,
    )  # fmt: skip
    return torch.mul(y, call.routed_scaling_factor, out=call.result())


def split_k_workspace_pipeline(call: MoECall) -> Tensor:
    """align, GEMM1 and GEMM2 by workspace, the activation in GEMM1's second kernel, sum-reduce."""
    w, (up, down) = call.weights, call_configs(call, "split_k_workspace")
    alignment = align(call.topk_ids, up.BLOCK_SIZE_M, call.num_experts)
    weights_up, weights_down = _weights_of_gemms(call)
    h = split_k_workspace(
        call.hidden_states, w.w13, alignment, up, num_pairs=call.num_pairs, top_k=call.top_k, bias=w.b13,
        topk_weights=weights_up, activation=call.activation, gated=call.gated,
    )  # fmt: skip
    y = split_k_workspace(
        h, w.w2, alignment, down, num_pairs=call.num_pairs, top_k=1, bias=w.b2, topk_weights=weights_down
    )
    return _sum_of_slots(call, y)


def sorted_pipeline(call: MoECall, tma: bool) -> Tensor:
    """align, GEMM1 with its activation, GEMM2 over the rows as they lie sorted, sum-reduce: four launches."""
    if not call.weights.format.is_plain:
        return gated_quantised_pipeline(call)
    return _sum_of_slots(call, _sorted_gemms(call, "gated_tma" if tma else "gated", tma=tma))


def sorted_atomic_pipeline(call: MoECall) -> Tensor:
    """As `sorted_pipeline`, GEMM2 adding to its token's row by atomics in the layer's dtype, zeroed first."""
    y = _sorted_gemms(call, None, atomic=True)
    return y if call.routed_scaling_factor == 1.0 else y.mul_(call.routed_scaling_factor)


def _sorted_gemms(call: MoECall, kernel: str | None, *, tma: bool = False, atomic: bool = False) -> Tensor:
    w, (up, down) = call.weights, call_configs(call, kernel)
    alignment = align(call.topk_ids, up.BLOCK_SIZE_M, call.num_experts)
    weights_up, weights_down = _weights_of_gemms(call)
    h = gated_gemm(
        call.hidden_states, w.w13, alignment, up, num_pairs=call.num_pairs, top_k=call.top_k,
        activation=call.activation, gated=call.gated, bias=w.b13, topk_weights=weights_up, tma=tma,
    )  # fmt: skip
    return sorted_gemm(
        h, w.w2, alignment, down, num_pairs=call.num_pairs, bias=w.b2, topk_weights=weights_down,
        atomic=atomic, top_k=call.top_k if atomic else 1, tma=tma, out=call.out if atomic else None,
    )  # fmt: skip


def _sum_of_slots(call: MoECall, y: Tensor) -> Tensor:
    y = y.view(call.num_tokens, call.top_k, -1)
    return sum_reduce(y, call.routed_scaling_factor, impl="triton", out=call.out)
