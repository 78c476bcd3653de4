"""One grouped product as its public launcher, its check, its unchecked launch and the tuner pass it on."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moelab.config import KernelConfig
from moelab.errors import ConfigError, FormatError, ShapeError, SharedMemoryError
from moelab.kernels.checks import (
    FLOATS,
    check_dtype,
    check_given,
    check_kernel_device,
    check_routed,
    check_shape,
    check_stored,
    check_together,
    checked_config,
    launch_options,
    launch_target,
)
from moelab.kernels.launch import signature
from moelab.routing import Alignment
from moelab.weights import GemmWeights


class GemmCall(NamedTuple):
    """c[pair] = a[pair // top_k] @ w[expert of pair].T: operands, who goes where, and under which config.

    a: (num_pairs / top_k, K); GEMM1 has the layer's top_k, GEMM2 has 1 and one row per pair, or, of a kernel that reads sorted
    rows, (rows, K). weights: w (E, N, K) and what belongs to it. topk_weights: num_pairs values, float32 or of the
    layer's dtype, for the GEMM that applies them. activation: of a GEMM1 that applies it, and gated whether that has a gate.
    workspace: of a kernel that needs one. a_scale: of a's codes, where a format quantises activations; see
    `moelab.kernels.quantise_activations`.
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
    a_scale: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """(N, K) of w, in weights, of which a byte may hold two."""
        shape = self.weights.w.shape
        return shape[1], shape[2] * self.weights.format.values_per_byte

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
        w, weighted = self.weights, None if self.topk_weights is None else self.topk_weights.dtype
        return self.config, self.top_k, *self.sizes, self.a.dtype, w.bias is None, weighted

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
        check_routed(topk_weights, a.dtype)
        if topk_weights.numel() != num_pairs:
            raise ShapeError(
                f"topk_weights holds {topk_weights.numel()} values for {num_pairs} pairs. Expected one per pair. "
                "Pass the (num_tokens, top_k) weights of this batch."
            )
    checked_config(config, a.dtype, K)
    _check_alignment(call, experts)
    return N, K


def _check_alignment(call: GemmCall, experts: int) -> None:
    alignment, num_pairs = call.alignment, call.num_pairs
    if (alignment.num_pairs, alignment.num_experts) != (num_pairs, experts):
        raise ShapeError(
            f"The alignment is of {alignment.num_pairs} pairs to {alignment.num_experts} experts, the call of {num_pairs} "
            f"pairs to {experts}. Expected the same. Align this batch's topk_ids to w's experts."
        )
    if alignment.block_size != call.config.BLOCK_SIZE_M:
        raise ConfigError(
            f"Rows are aligned to {alignment.block_size} but the config's BLOCK_SIZE_M is {call.config.BLOCK_SIZE_M}. "
            "Expected the same: one sort serves both GEMMs. Align again, or give both GEMMs one BLOCK_SIZE_M."
        )


def check_quantised_gemm(
    call: GemmCall, out: Tensor | torch.dtype, families: tuple[str, ...], *, makes_codes: bool = False
) -> None:
    """Raise unless operands, scales, alignment, config and result of a quantised product fit together, in one of `families`.

    out: the result, or its dtype where the kernel allocates it. makes_codes: a may also come as it is, without a_scale.
    """
    a, w, format, (N, K) = call.a, call.weights, call.weights.format, call.sizes
    if format.family not in families:
        raise FormatError(
            f"Weights in the format {format.name}. Expected one of {', '.join(families)}. Take another kernel."
        )
    check_kernel_device("a", a)
    check_shape("a", a, (call.num_pairs // call.top_k, K))
    codes = format.activations != "none" and not (makes_codes and call.a_scale is None and a.dtype != w.w.dtype)
    dtype = out if isinstance(out, torch.dtype) else out.dtype
    if format.activations != "none":
        check_kernel_device("w", w.w)  # the interpreter knows no fp8, of codes that it would make either
    check_dtype("a", a, (w.w.dtype,) if codes else (torch.bfloat16, torch.float16, torch.float32))
    check_stored("w", w, w.w.shape[0], N, K)
    if codes:
        check_given("a_scale", call.a_scale, format.activation_scales(a.shape[0], K), torch.float32)
    result = None if isinstance(out, torch.dtype) else out
    if result is not None:
        check_dtype("out", result, (torch.bfloat16, torch.float16, torch.float32) if codes else (a.dtype,))
        check_shape("out", result, (call.num_pairs, N))
    check_together(a=a, out=result, a_scale=call.a_scale, topk_weights=call.topk_weights, **w.tensors())
    if w.bias is not None:
        check_given("bias", w.bias, (w.w.shape[0], N), dtype)
    if call.topk_weights is not None:
        check_routed(call.topk_weights, dtype)
    if call.topk_weights is not None and call.topk_weights.numel() != call.num_pairs:
        raise ShapeError(
            f"topk_weights holds {call.topk_weights.numel()} values for {call.num_pairs} pairs. Expected one per pair. "
            "Pass the (num_tokens, top_k) weights of this batch."
        )
    checked_config(call.config, a.dtype, K, format)
    _check_alignment(call, w.w.shape[0])


def check_makes_codes(call: GemmCall, swapped: bool) -> None:
    """Raise where codes are made on the way, a step of K at a time: ConfigError where that is not one group, SharedMemoryError.

    swapped: weights are the tensor core's M. Steps of a lie in shared memory as they came, num_stages - 1 of them, and one as
    codes; weights num_stages times where the tensor core reads them there. Source: `metadata.shared` of Triton 3.7.1 for sm_90,
    at twelve configs; at most 128 bytes more than it says.
    """
    if call.a_scale is not None or call.a.dtype == call.weights.w.dtype:
        return
    config, group, target = call.config, call.weights.format.sizes[-1], launch_target()
    if group != config.BLOCK_SIZE_K:
        raise ConfigError(
            f"BLOCK_SIZE_K = {config.BLOCK_SIZE_K} and activations that become codes on the way, a scale for each {group}. "
            f"Expected {group}. Set it, or pass codes and a_scale."
        )
    rows, weights, stages = config.BLOCK_SIZE_M * group, config.BLOCK_SIZE_N * group, config.num_stages
    wide = swapped or config.BLOCK_SIZE_M >= 64
    needs = (stages - 1) * rows * call.a.element_size() + rows + (stages if wide else stages - 1) * weights + 128 * wide
    if target is not None and needs > target.shared_memory_per_block:
        raise SharedMemoryError(
            f"{config.short()} with codes made on the way needs {needs} bytes of shared memory. Expected at most "
            f"{target.shared_memory_per_block} on {target.name}. Lower num_stages or a block, or pass codes and a_scale."
        )


def swaps_operands(call: GemmCall) -> bool:
    """Whether weights are the tensor core's M, as sglang 0.5.23 and vLLM 0.33.0 do on Hopper for fp8 and few rows: an 8-bit wgmma
    takes 64 of M, and fewer rows would be widened to 16 bits."""
    config, target = call.config, launch_target()
    narrow = config.BLOCK_SIZE_M < 64 <= config.BLOCK_SIZE_N
    return narrow and call.weights.w.dtype == torch.float8_e4m3fn and target is not None and target.name == "sm_90"


def gemm_constants(config: KernelConfig, K: int, **constants: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants and launch options of a grouped product's kernel, as a Launcher takes them."""
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M")
    tile = {name: getattr(config, name) for name in names}
    return {**tile, "EVEN_K": K % config.BLOCK_SIZE_K == 0, **constants}, launch_options(config)
