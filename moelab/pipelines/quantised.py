"""The classic layer over quantised weights: align, codes of the activations where the format has them, GEMM1, activation, codes
again, GEMM2, sum-reduce. Rounding points are those of sglang 0.5.23 and vLLM 0.33.0: GEMM1 and the activation round to the
layer's dtype.
"""

from __future__ import annotations

from torch import Tensor

from moelab.call import MoECall
from moelab.config import KernelConfig
from moelab.errors import ConfigError
from moelab.kernels.activation import activation_unchecked
from moelab.kernels.align import align_unchecked
from moelab.kernels.block_scaled_gemm import block_scaled_gemm
from moelab.kernels.gated_block_gemm import gated_block_gemm
from moelab.kernels.gemm_call import GemmCall
from moelab.kernels.launch import checked
from moelab.kernels.quantise_activations import quantise_activations_unchecked
from moelab.kernels.quantised import GEMMS
from moelab.kernels.sum_reduce import sum_reduce_unchecked
from moelab.pipelines.call_configs import call_configs
from moelab.routing import Alignment
from moelab.weights import GemmWeights


def coded_gemm(
    a: Tensor,
    part: GemmWeights,
    alignment: Alignment,
    config: KernelConfig,
    *,
    num_pairs: int,
    top_k: int,
    topk_weights: Tensor | None = None,
) -> Tensor:
    """`grouped_gemm` by the compatible kernel of the weights' format, codes of the activations made first where it has them.

    a (num_pairs / top_k, K), as it is; returns (num_pairs, N) in its dtype. Checked once for each signature.
    """
    codes, a_scale = (a, None) if part.format.activations == "none" else quantise_activations_unchecked(
        a, part.format, part.a_scale
    )  # fmt: skip
    product = GemmCall(codes, part, alignment, config, num_pairs, top_k, topk_weights, a_scale=a_scale)
    check, launch = GEMMS[part.format.family]
    out = a.new_empty((num_pairs, product.sizes[0]))
    checked(("coded_gemm", product.seen(a_scale, out)), lambda: check(product, out))
    launch(product, out)
    return out


def quantised_pipeline(call: MoECall) -> Tensor:
    """The layer by the compatible kernel of the weights' format; five launches, and two or four that make codes."""
    x, w, (num_tokens, top_k) = call.hidden_states, call.weights, call.topk_ids.shape
    up, down = call_configs(call)
    pairs, rows = num_tokens * top_k, w.w13.shape[1]
    alignment = align_unchecked(call.topk_ids, up.BLOCK_SIZE_M, w.num_experts)
    on_input = call.apply_router_weight_on_input
    weights_up, weights_down = (call.topk_weights, None) if on_input else (None, call.topk_weights)
    h = coded_gemm(x, w.up, alignment, up, num_pairs=pairs, top_k=top_k, topk_weights=weights_up)
    g = x.new_empty((pairs, rows // 2 if call.gated else rows))
    activation_unchecked(h, g, call.activation, call.gated)
    y = coded_gemm(g, w.down, alignment, down, num_pairs=pairs, top_k=1, topk_weights=weights_down)
    return sum_reduce_unchecked(y.view(num_tokens, top_k, -1), call.routed_scaling_factor, call.result())


MOST_ROWS_ON_THE_WAY = 32
"""BLOCK_SIZE_M up to which activations become codes in each program that reads them, in place of a launch of their own: as many
times as there are tiles across."""


def gated_quantised_pipeline(call: MoECall) -> Tensor:
    """The layer over weights in blocks with the activation in GEMM1's epilogue: align, GEMM1, GEMM2, sum-reduce, and launches
    that make codes where rows are many (x), or where no tile of GEMM1 holds a group of its result.

    It wins where experts have many rows and a rank few experts (DeepSeek-V3 ep8 from 256 tokens on), is level or a little behind
    elsewhere, and loses at one token, where codes made in every program cost more than a launch (an H200, 2026-12-01; `moelab
    record quantised` has it among its contenders).
    """
    if not call.gated:
        raise ConfigError(
            f"impl='gated' was asked for gated=False over weights in the format {call.weights.format.name}. Expected a gate. Use "
            "impl='triton'."
        )
    x, w, (num_tokens, top_k) = call.hidden_states, call.weights, call.topk_ids.shape
    up, down = call_configs(call, "gated")
    alignment = align_unchecked(call.topk_ids, up.BLOCK_SIZE_M, w.num_experts)
    on_input = call.apply_router_weight_on_input
    weights_up, weights_down = (call.topk_weights, None) if on_input else (None, call.topk_weights)
    few, group, pairs = up.BLOCK_SIZE_M <= MOST_ROWS_ON_THE_WAY, w.format.sizes[-1], num_tokens * top_k

    def codes(a: Tensor, config: KernelConfig) -> tuple[Tensor, Tensor | None]:
        return (a, None) if few and group == config.BLOCK_SIZE_K else quantise_activations_unchecked(a, w.format)

    a, a_scale = codes(x, up)
    g, g_scale = gated_block_gemm(
        GemmCall(a, w.up, alignment, up, pairs, top_k, weights_up, call.activation, True, a_scale=a_scale), x.dtype
    )
    if g_scale is None:
        g, g_scale = codes(g, down)
    y = x.new_empty((num_tokens, top_k, x.shape[1]))
    block_scaled_gemm(GemmCall(g, w.down, alignment, down, pairs, 1, weights_down, a_scale=g_scale), y.view(pairs, -1))
    return sum_reduce_unchecked(y, call.routed_scaling_factor, call.result())
