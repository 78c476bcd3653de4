"""One grouped product as its public launcher, its check, its unchecked launch and the tuner pass it on."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moelab.config import KernelConfig
from moelab.errors import ConfigError, ShapeError
from moelab.kernels.checks import (
    FLOATS,
    check_dtype,
    check_kernel_device,
    check_shape,
    check_together,
    checked_config,
    launch_options,
)
from moelab.kernels.launch import signature
from moelab.routing import Alignment
from moelab.weights import GemmWeights


class GemmCall(NamedTuple):
    """c[pair] = a[pair // top_k] @ w[expert of pair].T: operands, who goes where, and under which config.

    a: (num_pairs / top_k, K); GEMM1 has the layer's top_k, GEMM2 has 1 and one row per pair, or, of a kernel that reads sorted
    rows, (rows, K). weights: w (E, N, K) and what belongs to it. topk_weights: num_pairs float32 values, for the GEMM that
    applies them. activation: of a GEMM1 that applies it, and gated whether that has a gate. workspace: of a kernel that
    needs one.
    """

    a: Tensor
    weights: GemmWeights
    alignment: Alignment
    config: KernelConfig
    num_pairs: int
    top_k: int
    topk_weights: Tensor | None = None
    activation: str | None = None
    gated: bool = False
    workspace: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """(N, K) of w."""
        shape = self.weights.w.shape
        return shape[1], shape[2]

    @property
    def num_rows(self) -> int:
        """Rows that a grid must cover."""
        return self.alignment.rows_in_use

    @property
    def num_tiles(self) -> int:
        """Programs that compute the product's tiles, SPLIT_K for each."""
        config, (N, _) = self.config, self.sizes
        return -(-self.num_rows // config.BLOCK_SIZE_M) * -(-N // config.BLOCK_SIZE_N) * config.SPLIT_K

    @property
    def key(self) -> tuple[Hashable, ...]:
        """What decides the compiled instance, of what every kernel takes."""
        w = self.weights
        return self.config, self.top_k, *self.sizes, self.a.dtype, w.bias is None, self.topk_weights is None

    @property
    def row_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Which pair lies in which row, and whose expert each block of rows is."""
        alignment = self.alignment
        return alignment.sorted_token_ids, alignment.expert_ids, alignment.num_tokens_post_padded

    def seen(self, *more: Tensor | None) -> tuple[Any, ...]:
        """All that a check of this call looks at, for `launch.checked`."""
        alignment, w = self.alignment, self.weights
        return (
            self.config, self.num_pairs, self.top_k, self.activation, self.gated, w.format,
            alignment.block_size, alignment.num_pairs, alignment.num_experts,
            signature(
                self.a, w.w, w.bias, w.scale, w.zero_point, *self.row_tensors, self.topk_weights, self.workspace, *more
            ),
        )  # fmt: skip


class Launch(Protocol):
    """Launches one GEMM of at least one pair into `out`, unchecked; allocates nothing that is as large as an operand."""

    def __call__(self, call: GemmCall, out: Tensor, /) -> None:
        """out: one row a pair, or for GEMM1 of a kernel that sorts rows, one row a place."""


def check_gemm(call: GemmCall, a_rows: int | None = None) -> tuple[int, int]:
    """(N, K) of a grouped product whose operands, alignment and config fit together; raises what its launcher names.

    a_rows: rows of a where they are not one per top_k pairs.
    """
    a, (w, bias, *_), alignment, config, num_pairs, top_k, topk_weights, *_ = call
    check_kernel_device("a", a)
    check_dtype("a", a, FLOATS)
    check_shape("w", w, ("E", "N", "K"))
    experts, N, K = w.shape
    if top_k < 1 or num_pairs % top_k:
        raise ShapeError(
            f"{num_pairs} pairs are no multiple of top_k = {top_k}. Expected num_tokens * top_k. Pass top_k=1 for GEMM2."
        )
    check_shape("a", a, (num_pairs // top_k if a_rows is None else a_rows, K))
    check_dtype("w", w, (a.dtype,))
    parts = {name: getattr(alignment, name) for name in ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")}
    for name, part in parts.items():
        check_dtype(name, part, (torch.int32,))
    check_together(a=a, w=w, bias=bias, topk_weights=topk_weights, **parts)
    if bias is not None:
        check_shape("bias", bias, (experts, N))
        check_dtype("bias", bias, (a.dtype,))
    if topk_weights is not None:
        check_dtype("topk_weights", topk_weights, (torch.float32,))
        if topk_weights.numel() != num_pairs:
            raise ShapeError(
                f"topk_weights holds {topk_weights.numel()} values for {num_pairs} pairs. Expected one per pair. "
                "Pass the (num_tokens, top_k) weights of this batch."
            )
    checked_config(config, a.dtype, K)
    if (alignment.num_pairs, alignment.num_experts) != (num_pairs, experts):
        raise ShapeError(
            f"The alignment is of {alignment.num_pairs} pairs to {alignment.num_experts} experts, the call of {num_pairs} "
            f"pairs to {experts}. Expected the same. Align this batch's topk_ids to w's experts."
        )
    if alignment.block_size != config.BLOCK_SIZE_M:
        raise ConfigError(
            f"Rows are aligned to {alignment.block_size} but the config's BLOCK_SIZE_M is {config.BLOCK_SIZE_M}. "
            "Expected the same: one sort serves both GEMMs. Align again, or give both GEMMs one BLOCK_SIZE_M."
        )
    return N, K


def gemm_constants(config: KernelConfig, K: int, **constants: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants and launch options of a grouped product's kernel, as a Launcher takes them."""
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M")
    tile = {name: getattr(config, name) for name in names}
    return {**tile, "EVEN_K": K % config.BLOCK_SIZE_K == 0, **constants}, launch_options(config)
