"""The layer, step after step: classic, by TMA, by Split-K, and over sorted rows.

moelab.pipelines names them; this module is imported when one of them first runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelab.config import KernelConfig, default_config
from moelab.errors import ConfigError
from moelab.kernels import checks
from moelab.kernels.activation import activation, activation_unchecked
from moelab.kernels.align import align, align_unchecked
from moelab.kernels.gated_gemm import gated_gemm
from moelab.kernels.grouped_gemm import grouped_gemm_unchecked
from moelab.kernels.grouped_gemm_tma import grouped_gemm_tma
from moelab.kernels.launch import checked
from moelab.kernels.sorted_gemm import sorted_gemm
from moelab.kernels.split_k_atomic import split_k_atomic_f32
from moelab.kernels.split_k_workspace import split_k_workspace
from moelab.kernels.sum_reduce import sum_reduce, sum_reduce_unchecked
from moelab.pipelines.call import MoECall


def call_configs(call: MoECall) -> tuple[KernelConfig, KernelConfig]:
    """The configs of GEMM1 and GEMM2: as given, else sglang's default rule. Raises ConfigError if their rows differ.

    Tuned files are looked up by name, with moelab.config_files.lookup, and passed in: the op itself reads no files.
    """
    up = call.config or default_config(call.num_tokens, call.num_experts)
    down = call.down_config or up
    if up.BLOCK_SIZE_M != down.BLOCK_SIZE_M:
        raise ConfigError(
            f"config has BLOCK_SIZE_M = {up.BLOCK_SIZE_M} and down_config {down.BLOCK_SIZE_M}. Expected the same: one "
            "sort by expert serves both GEMMs. Tune the two under one BLOCK_SIZE_M."
        )
    return up, down


def _weights_of_gemms(call: MoECall) -> tuple[Tensor | None, Tensor | None]:
    """The routed weights, for the one of GEMM1 and GEMM2 that applies them."""
    on_input = call.apply_router_weight_on_input
    return (call.topk_weights, None) if on_input else (None, call.topk_weights)


def triton_pipeline(call: MoECall) -> Tensor:
    """align, GEMM1, activation, GEMM2, sum-reduce: the pipeline of sglang and vLLM, five launches.

    Steps check nothing again of what fused_moe has: in eager decode the GPU waits for the host.
    """
    x, w13, w2, ids = call.hidden_states, call.w13, call.w2, call.topk_ids
    up, down = call_configs(call)
    checked(
        ("triton_pipeline", up, down, x.dtype, x.device, w13.shape, w2.shape), lambda: _check_configs(call, up, down)
    )
    num_tokens, top_k = ids.shape
    pairs, hidden_size, rows = num_tokens * top_k, x.shape[1], w13.shape[1]
    alignment = align_unchecked(ids, up.BLOCK_SIZE_M, w13.shape[0])
    weights_up, weights_down = _weights_of_gemms(call)
    h = x.new_empty((pairs, rows))
    grouped_gemm_unchecked(x, w13, h, alignment, up, pairs, top_k, call.b13, weights_up)
    g = x.new_empty((pairs, rows // 2 if call.gated else rows))
    activation_unchecked(h, g, call.activation, call.gated)
    y = x.new_empty((num_tokens, top_k, hidden_size))
    grouped_gemm_unchecked(g, w2, y, alignment, down, pairs, 1, call.b2, weights_down)
    return sum_reduce_unchecked(y, call.routed_scaling_factor, x.new_empty((num_tokens, hidden_size)))


def _check_configs(call: MoECall, up: KernelConfig, down: KernelConfig) -> None:
    for config, w in ((up, call.w13), (down, call.w2)):
        checks.check_one_split("grouped_gemm", config)
        checks.checked_config(config, w.dtype, w.shape[2])


def tma_pipeline(call: MoECall) -> Tensor:
    """The classic pipeline with both weights read by TMA."""
    up, down = call_configs(call)
    num_pairs = call.topk_ids.numel()
    alignment = align(call.topk_ids, up.BLOCK_SIZE_M, call.num_experts)
    weights_up, weights_down = _weights_of_gemms(call)
    h = grouped_gemm_tma(
        call.hidden_states, call.w13, alignment, up,
        num_pairs=num_pairs, top_k=call.top_k, bias=call.b13, topk_weights=weights_up,
    )  # fmt: skip
    h = activation(h, call.activation, gated=call.gated)
    y = grouped_gemm_tma(
        h, call.w2, alignment, down, num_pairs=num_pairs, top_k=1, bias=call.b2, topk_weights=weights_down
    )
    return sum_reduce(y.view(call.num_tokens, call.top_k, -1), call.routed_scaling_factor, impl="triton")


def split_k_atomic_pipeline(call: MoECall) -> Tensor:
    """align, two GEMMs that add partial sums into float32, the activation between, one rounding at the end.

    GEMM2 adds straight into its token's row, so the sum over slots is part of the same additions: a buffer of (M, H)
    to zero and to read once, where a row per pair would be top_k times that and a launch more.
    """
    up, down = call_configs(call)
    num_pairs, dtype = call.topk_ids.numel(), call.hidden_states.dtype
    alignment = align(call.topk_ids, up.BLOCK_SIZE_M, call.num_experts)
    weights_up, weights_down = _weights_of_gemms(call)
    h = split_k_atomic_f32(
        call.hidden_states, call.w13, alignment, up,
        num_pairs=num_pairs, top_k=call.top_k, bias=call.b13, topk_weights=weights_up,
    )  # fmt: skip
    h = activation(h, call.activation, gated=call.gated, dtype=dtype)
    y = split_k_atomic_f32(
        h, call.w2, alignment, down,
        num_pairs=num_pairs, top_k=1, bias=call.b2, topk_weights=weights_down, pairs_per_row=call.top_k,
    )  # fmt: skip
    return torch.mul(y, call.routed_scaling_factor, out=torch.empty_like(call.hidden_states))


def split_k_workspace_pipeline(call: MoECall) -> Tensor:
    """align, GEMM1 and GEMM2 by workspace, the activation in GEMM1's second kernel, sum-reduce."""
    up, down = call_configs(call)
    num_pairs = call.topk_ids.numel()
    alignment = align(call.topk_ids, up.BLOCK_SIZE_M, call.num_experts)
    weights_up, weights_down = _weights_of_gemms(call)
    h = split_k_workspace(
        call.hidden_states, call.w13, alignment, up, num_pairs=num_pairs, top_k=call.top_k, bias=call.b13,
        topk_weights=weights_up, activation=call.activation, gated=call.gated,
    )  # fmt: skip
    y = split_k_workspace(
        h, call.w2, alignment, down, num_pairs=num_pairs, top_k=1, bias=call.b2, topk_weights=weights_down
    )
    return sum_reduce(y.view(call.num_tokens, call.top_k, -1), call.routed_scaling_factor, impl="triton")


def sorted_pipeline(call: MoECall, combine: str, tma: bool) -> Tensor:
    """align, GEMM1 with its activation, GEMM2 over the rows as they lie sorted, their sum: four launches, or five.

    combine: GEMM2's, see `moelab.kernels.sorted_gemm`; after "scatter" comes the sum-reduce, in place of which the atomic
    ways zero their sums first, and scale and round them after.
    """
    up, down = call_configs(call)
    num_pairs, atomic = call.topk_ids.numel(), combine != "scatter"
    alignment = align(call.topk_ids, up.BLOCK_SIZE_M, call.num_experts)
    weights_up, weights_down = _weights_of_gemms(call)
    h = gated_gemm(
        call.hidden_states, call.w13, alignment, up, num_pairs=num_pairs, top_k=call.top_k,
        activation=call.activation, gated=call.gated, bias=call.b13, topk_weights=weights_up, tma=tma,
    )  # fmt: skip
    y = sorted_gemm(
        h, call.w2, alignment, down, num_pairs=num_pairs, bias=call.b2, topk_weights=weights_down,
        combine=combine, top_k=call.top_k if atomic else 1, tma=tma,
    )  # fmt: skip
    if not atomic:
        return sum_reduce(y.view(call.num_tokens, call.top_k, -1), call.routed_scaling_factor, impl="triton")
    if y.dtype == call.hidden_states.dtype and call.routed_scaling_factor == 1.0:
        return y
    return torch.mul(y, call.routed_scaling_factor, out=torch.empty_like(call.hidden_states))
