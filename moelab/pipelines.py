"""The fused MoE layer made of this house's kernels, step after step: classic, by Split-K, and over sorted rows.

Kernels are imported when a pipeline first runs, so that the public op loads without triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moelab.config import KernelConfig, default_config
from moelab.errors import ConfigError


@dataclass(frozen=True)
class MoECall:
    """One checked call, as implementations get it. Shapes as in moelab.inputs.MoEInputs."""

    hidden_states: Tensor
    w13: Tensor
    w2: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    b13: Tensor | None
    b2: Tensor | None
    activation: str
    gated: bool
    routed_scaling_factor: float
    apply_router_weight_on_input: bool
    config: KernelConfig | None
    down_config: KernelConfig | None

    @property
    def num_tokens(self) -> int:
        return self.topk_ids.shape[0]

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]


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
    """align, GEMM1, activation, GEMM2, sum-reduce: the pipeline of sglang and vLLM, five launches."""
    from moelab.kernels.grouped_gemm import grouped_gemm

    return _classic(call, grouped_gemm)


def tma_pipeline(call: MoECall) -> Tensor:
    """The pipeline of sglang and vLLM with both weights read by TMA."""
    from moelab.kernels.grouped_gemm_tma import grouped_gemm_tma

    return _classic(call, grouped_gemm_tma)


def _classic(call: MoECall, gemm: Callable[..., Tensor]) -> Tensor:
    from moelab.kernels.activation import activation
    from moelab.kernels.align import align
    from moelab.kernels.sum_reduce import sum_reduce

    up, down = call_configs(call)
    num_pairs = call.topk_ids.numel()
    alignment = align(call.topk_ids, up.BLOCK_SIZE_M, call.num_experts)
    weights_up, weights_down = _weights_of_gemms(call)
    h = gemm(
        call.hidden_states, call.w13, alignment, up,
        num_pairs=num_pairs, top_k=call.top_k, bias=call.b13, topk_weights=weights_up,
    )  # fmt: skip
    h = activation(h, call.activation, gated=call.gated)
    y = gemm(h, call.w2, alignment, down, num_pairs=num_pairs, top_k=1, bias=call.b2, topk_weights=weights_down)
    return sum_reduce(y.view(call.num_tokens, call.top_k, -1), call.routed_scaling_factor, impl="triton")


def split_k_atomic_pipeline(call: MoECall) -> Tensor:
    """align, two GEMMs that add partial sums into float32, the activation between, one rounding at the end.

    GEMM2 adds straight into its token's row, so the sum over slots is part of the same additions: a buffer of (M, H)
    to zero and to read once, where a row per pair would be top_k times that and a launch more.
    """
    from moelab.kernels.activation import activation
    from moelab.kernels.align import align
    from moelab.kernels.split_k_atomic import split_k_atomic_f32

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
    from moelab.kernels.align import align
    from moelab.kernels.split_k_workspace import split_k_workspace
    from moelab.kernels.sum_reduce import sum_reduce

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
    from moelab.kernels.align import align
    from moelab.kernels.gated_gemm import gated_gemm
    from moelab.kernels.sorted_gemm import sorted_gemm
    from moelab.kernels.sum_reduce import sum_reduce

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


PIPELINES: dict[str, Callable[[MoECall], Tensor]] = {
    "triton": triton_pipeline,
    "split_k_atomic": split_k_atomic_pipeline,
    "split_k_workspace": split_k_workspace_pipeline,
    "tma": tma_pipeline,
    "gated": partial(sorted_pipeline, combine="scatter", tma=False),
    "gated_atomic": partial(sorted_pipeline, combine="atomic_f32", tma=False),
    "gated_atomic_out": partial(sorted_pipeline, combine="atomic_out", tma=False),
    "gated_tma": partial(sorted_pipeline, combine="scatter", tma=True),
    "gated_tma_atomic": partial(sorted_pipeline, combine="atomic_f32", tma=True),
}
"""Name of each -> the layer by it. Made of Triton kernels, which the interpreter does not run in bfloat16."""

NEED_TMA = frozenset(("tma", "gated_tma", "gated_tma_atomic"))
"""Those for sm_90 and later, and for inner sizes whose rows are a multiple of 16 bytes."""

ROUND_EVERY_SUM = frozenset(("gated_atomic_out",))
"""Those that round to the layer's dtype after every addition, where torch does once: past twice torch's error, so that
`moelab bench` shows them and lets them win nothing."""
