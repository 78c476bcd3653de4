"""One GEMM of a layer alone, from its input to what the next step reads, by any of the kernels that compute it.

`up` is GEMM1 and the activation, `down` is GEMM2 and the sum over slots: zeroing, second kernels and roundings are part
of each, so that kernels whose bare products differ in dtype or rows compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moelab import runtime
from moelab.config import KernelConfig
from moelab.dtypes import accumulator_dtype, torch_dtype
from moelab.inputs import random_tensor, routing_for
from moelab.kernels.activation import activation
from moelab.kernels.align import align
from moelab.kernels.grouped_gemm import grouped_gemm
from moelab.kernels.split_k_atomic import split_k_atomic_f32, split_k_atomic_out
from moelab.kernels.split_k_workspace import new_workspace, split_k_workspace
from moelab.kernels.sum_reduce import sum_reduce
from moelab.measure import rotations_for
from moelab.quantised_weights import quantise
from moelab.reference import activation_ref, grouped_gemm_ref
from moelab.routing import Alignment, expected_experts_touched
from moelab.shapes import MoEShape
from moelab.weights import GemmWeights

Contender = Callable[[int], Tensor]
VARIANTS = ("classic", "atomic_f32", "atomic_out", "workspace")
MAX_SPLIT_K = 16


class Stage:
    """One GEMM of a layer at one batch size, with inputs enough that weights come from memory.

    name: "up" or "down". weights: sets with w (E, N, K), rotated. a: (num_tokens, K), or (pairs, K) for "down".
    """

    def __init__(self, name: str, shape: MoEShape, num_tokens: int, weights: Sequence[GemmWeights]) -> None:
        self.name, self.shape, self.num_tokens, self.weights = name, shape, num_tokens, weights
        first = weights[0].w
        self.dtype, device = first.dtype, first.device.type
        E, self.N, self.K = first.shape
        self.pairs = num_tokens * shape.top_k
        self.touched = expected_experts_touched(E, shape.top_k, num_tokens)
        self.weight_bytes = self.touched * self.N * self.K * first.element_size()
        self.rotations = max(min(len(weights), 8), rotations_for(self.weight_bytes, at_most=48))
        self.routings = [routing_for(shape, num_tokens, seed=i, device=device) for i in range(self.rotations)]
        rows, std = (num_tokens, 1.0) if name == "up" else (self.pairs, 0.5)
        self.a = [
            random_tensor((rows, self.K), std, dtype=self.dtype, device=device, seed=100 + i)
            for i in range(self.rotations)
        ]
        self.workspace = new_workspace(MAX_SPLIT_K, self.pairs, self.N, self.dtype, device)
        self._aligned: dict[int, list[Alignment]] = {}

    def aligned(self, block_size: int) -> list[Alignment]:
        """One alignment per rotation, made once: every variant reads the same."""
        if block_size not in self._aligned:
            E = self.shape.num_experts
            self._aligned[block_size] = [align(r.topk_ids, block_size, E) for r in self.routings]
        return self._aligned[block_size]

    def contender(self, variant: str, config: KernelConfig) -> Contender:
        """The stage by one variant and config, as `measure` takes it."""
        aligned, run = self.aligned(config.BLOCK_SIZE_M), (_up if self.name == "up" else _down)
        return lambda i: run(self, variant, config, aligned[i], i)


def _up(stage: Stage, variant: str, config: KernelConfig, aligned: Alignment, i: int) -> Tensor:
    shape, w = stage.shape, stage.weights[i % len(stage.weights)].w
    given: dict[str, Any] = {"num_pairs": stage.pairs, "top_k": shape.top_k}
    if variant == "workspace":
        return split_k_workspace(
            stage.a[i], w, aligned, config, activation=shape.activation, gated=shape.gated, workspace=stage.workspace,
            **given,
        )  # fmt: skip
    ways = {"classic": grouped_gemm, "atomic_f32": split_k_atomic_f32, "atomic_out": split_k_atomic_out}
    h = ways[variant](stage.a[i], w, aligned, config, **given)
    return activation(h, shape.activation, gated=shape.gated, dtype=stage.dtype)


def _down(stage: Stage, variant: str, config: KernelConfig, aligned: Alignment, i: int) -> Tensor:
    k, w = stage.shape.top_k, stage.weights[i % len(stage.weights)].w
    given: dict[str, Any] = {"num_pairs": stage.pairs, "top_k": 1, "topk_weights": stage.routings[i].topk_weights}
    if variant == "atomic_f32":
        return split_k_atomic_f32(stage.a[i], w, aligned, config, pairs_per_row=k, **given).to(stage.dtype)
    if variant == "atomic_out":
        return split_k_atomic_out(stage.a[i], w, aligned, config, pairs_per_row=k, **given)
    if variant == "workspace":
        y = split_k_workspace(stage.a[i], w, aligned, config, workspace=stage.workspace, **given)
    else:
        y = grouped_gemm(stage.a[i], w, aligned, config, **given)
    return sum_reduce(y.view(stage.num_tokens, k, -1))


def rows_of(stage: Stage, out: Tensor, tokens: Tensor) -> Tensor:
    """What a contender returned for `tokens`: a row each of "down", top_k rows each of "up"."""
    return out.view(stage.num_tokens, -1, out.shape[-1])[tokens].flatten(0, 1)


def reference(stage: Stage, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """`tokens` of rotation 0 by the oracle, in `dtype`; rows as in `rows_of`."""
    k, routing = stage.shape.top_k, stage.routings[0]
    ids, a = routing.topk_ids[tokens], rows_of(stage, stage.a[0], tokens).to(dtype)
    own = ids.unique()  # float64 copies of the experts that are named, not of all
    local = torch.searchsorted(own, ids.contiguous())
    w = stage.weights[0].w[own.long()].to(dtype)
    if stage.name == "up":
        product = grouped_gemm_ref(a, w, local, top_k=k)
        return activation_ref(product, stage.shape.activation, gated=stage.shape.gated)
    product = grouped_gemm_ref(a, w, local, top_k=1, topk_weights=routing.topk_weights[tokens])
    wide = accumulator_dtype(dtype)
    return product.view(len(tokens), k, -1).to(wide).sum(1).to(dtype)


def weight_sets(name: str, shape: MoEShape) -> list[GemmWeights]:
    """Copies of one stage's weights, random and different: together three times the last cache before memory.

    A fine shard's weights fit in the cache whole, where in serving those of other layers push them out.
    """
    size, dtype = shape.w13_shape if name == "up" else shape.w2_shape, torch_dtype(shape.dtype)
    E, rows, K = size
    sets = rotations_for(E * shape.format.matrix_bytes(rows, K, shape.dtype), at_least=1, at_most=16)
    device = runtime.current().device
    drawn = (random_tensor(size, K**-0.5, dtype=dtype, device=device, seed=1 + i) for i in range(sets))
    return [quantise(w, shape.format) for w in drawn]
