"""Emulated launches of sm90_fast_layer.cu against float64, and small forms of it, for the tests of the kernel and its
clusters."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import emulated_gpu
import pytest
import torch

from moelab import reference
from moelab.kernels.fast_instances import SOURCE, Instance
from moelab.kernels.token_tiles import TokenTiles, token_tiles_ref
from moelab.routing import expert_order_ref

SMALL = Instance(1, 1, 3, 16, 8, 8, ctas_per_sm=2)
MIDDLE = Instance(2, 1, 3, 64, 16, 16)
WIDE = Instance(2, 2, 2, 176, 48, 16)
STAGED_IN_ONE = Instance(1, 2, 4, 96, 48, 16, ctas_per_sm=2)
"""Of forms that stage outputs, one where two buffers a warp do not fit; they do in WIDE."""
SMALL_PAIR, MIDDLE_PAIR, WIDE_PAIR = (replace(each, cluster=2) for each in (SMALL, MIDDLE, WIDE))
MIDDLE_APART, SMALL_PAIR_APART = (replace(each, apart=1) for each in (MIDDLE, SMALL_PAIR))
MIDDLE_PERMUTED, PAIR_PERMUTED, WIDE_PERMUTED = (replace(each, permutes=1) for each in (MIDDLE, MIDDLE_PAIR, WIDE))

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++") and not os.environ.get("CI"), reason="needs g++, which emulates the chip"
)


def ordered(topk_ids: torch.Tensor, num_experts: int, instance: Instance) -> TokenTiles:
    order = expert_order_ref(topk_ids, num_experts)
    grain = 16 if instance.tokens % 16 == 0 else 8
    return token_tiles_ref(order.sorted_slots, order.expert_offsets, instance.tokens, grain, instance.cluster > 1)


def compare(
    instance: Instance, num_tokens: int, experts: int, top_k: int, hidden: int, size: int, *,
    dtype: torch.dtype = torch.float16, blocks: int = 2, ids: torch.Tensor | None = None, on_input: bool = False,
    source: Path = SOURCE, late: int = -1, lost_weights: float | None = None, narrow: bool = False,
) -> None:  # fmt: skip
    """One emulated layer against float64, within twice the error of torch's own layer in that dtype.

    lost_weights: the weight of ids that are no expert, in the kernel's input. narrow: weights of that dtype.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, hidden, generator=g).to(dtype)
    w13 = (torch.randn(experts, 2 * size, hidden, generator=g) * hidden**-0.5).to(dtype)
    w2 = (torch.randn(experts, hidden, size, generator=g) * size**-0.5).to(dtype)
    if ids is None:
        ids = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(num_tokens)]).int()
    weights = torch.rand(num_tokens, top_k, generator=g)
    weights = weights.to(dtype) if narrow else weights
    tiles = ordered(ids, experts, instance)
    lost = (ids < 0) | (ids >= experts)
    given = weights if lost_weights is None else torch.where(lost, lost_weights, weights)
    out, _, _, ready, _ = emulated_gpu.run_layer(
        x, w13, w2, given, ids, tiles, instance, scale=1.5, weights_on_input=on_input, blocks=blocks, source=source,
        late=late,
    )  # fmt: skip
    options = {"routed_scaling_factor": 1.5, "apply_router_weight_on_input": on_input}
    ids = torch.where(lost, -1, ids).int()
    truth = reference.fused_moe_ref(*(t.double() for t in (x, w13, w2, weights)), ids, **options)
    own = reference.fused_moe_ref(x, w13, w2, weights, ids, **options)
    error, allowed = (out.double() - truth).abs().max(), 2 * (own.double() - truth).abs().max()
    assert error <= allowed + 1e-6, (error, allowed)
    assert not ready.any()  # left as it was found
