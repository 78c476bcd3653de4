"""The one-launch layer over fp8 codes with scales in blocks of 128 x 128: the launcher of sm90_fast_layer.cu's SCALED instances.

Activations become codes in a launch ahead, one scale a token and 128 of K: of instances that gather as they lie, of those that
permute in order of expert, with each tile's scales side by side. GEMM1's outputs become codes in its epilogue.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moelab.chips import Target
from moelab.dtypes import dtype_name
from moelab.errors import DtypeError, FormatError, RuntimeModeError, ShapeError
from moelab.formats import Format
from moelab.kernels import residency
from moelab.kernels.fast_instances import BLOCK, GEMM1, GEMM2, MOST_STEPS, STORAGE, SUM, Instance
from moelab.kernels.fast_layer import launch_layer, layer_arguments
from moelab.kernels.quantise_activations import quantise_activations_unchecked
from moelab.kernels.quantise_tiles import quantise_tiles_unchecked
from moelab.kernels.token_tiles import TokenTiles
from moelab.weights import ExpertWeights

FAMILY = "fp8_w8a8_block"

LOOKS_FROM = 512
"""Tokens from which the sums look at ids first: under expert parallelism most slots are other ranks', whose rows nobody wrote. Of
fewer tokens the second trip to memory would weigh more."""


class Coded(NamedTuple):
    """Activations as an instance reads them: codes (M, H) and scales (M, H / BLOCK), or of one that permutes codes (S, H) in
    order of expert and scales (tiles.most, H / BLOCK, tokens), each tile's as `scale_place` orders them."""

    codes: Tensor
    scale: Tensor


def scale_place(row: int, instance: Instance) -> int:
    """Where the scale of a tile's row lies among its tile's, as in sm90_fast_tiles.cuh."""
    if instance.scaled == 2:
        return row
    return (row & ~15) | (row & 6) << 1 | (row & 8) >> 2 | (row & 1)


def coded_cut(instance: Instance) -> tuple[int, int, bool]:
    """How that instance's tiles are cut, as `ordered_tiles` takes it: by 16 tokens, by 64 where they are wgmma's M."""
    return instance.tokens, 64 if instance.scaled == 2 else 16, instance.cluster > 1


def coded(x: Tensor, tiles: TokenTiles, top_k: int, instance: Instance, format: Format) -> Coded:
    """x (M, H) as that instance reads it; one launch."""
    if instance.permutes:
        return Coded(*quantise_tiles_unchecked(x, tiles, top_k, instance.tokens, format, in_rows=instance.scaled == 2))
    codes, scale = quantise_activations_unchecked(x, format)
    return Coded(codes, scale)


def coded_scratch(
    tiles: TokenTiles, instance: Instance, num_slots: int, weights: ExpertWeights, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What GEMM1 and GEMM2 write: codes (S, N), their scales (tiles.most, N / BLOCK, tokens), rows (S, H) of dtype."""
    w2 = weights.w2
    hidden, size = w2.shape[1:]
    return (
        w2.new_empty((num_slots, size)),
        w2.new_empty((tiles.most, size // BLOCK, instance.tokens), dtype=torch.float32),
        w2.new_empty((num_slots, hidden), dtype=dtype),
    )


def check_coded_layer(x: Tensor, weights: ExpertWeights, target: Target | None) -> None:
    """Raise unless the kernel takes this format, these sizes and dtypes on that chip: RuntimeModeError, FormatError, DtypeError,
    ShapeError."""
    if target is None or target.name != "sm_90":
        raise RuntimeModeError(
            f"impl='fast' was asked for on {'no GPU' if target is None else target.name}. Expected a Hopper GPU (sm_90), whose "
            "wgmma and TMA it is written for. Use impl='triton'."
        )
    format = weights.format
    if format.family != FAMILY or format.sizes != (BLOCK, BLOCK):
        raise FormatError(
            f"impl='fast' was asked for weights in the format {format.name}. Expected plain ones, or {FAMILY}_{BLOCK}x{BLOCK}. "
            "Use impl='triton'."
        )
    if x.dtype not in STORAGE:
        raise DtypeError(
            f"hidden_states is {dtype_name(x.dtype)}. Expected bfloat16 or float16 for impl='fast'. Cast it, "
            "or use impl='triton'."
        )
    for name, size in (("hidden_size", x.shape[1]), ("moe_intermediate_size", weights.w2.shape[2])):
        if size % BLOCK or size > BLOCK * MOST_STEPS:
            raise ShapeError(
                f"{name} is {size}. Expected a multiple of {BLOCK}, at most {BLOCK * MOST_STEPS}, for impl='fast' over weights "
                "in blocks. Shard the layer otherwise, or use impl='triton'."
            )
    for name, tensor in (("w13", weights.w13), ("w2", weights.w2)):
        if tensor.data_ptr() % 16:
            raise ShapeError(
                f"{name} starts {tensor.data_ptr() % 16} bytes past a multiple of 16. Expected an address on 16 bytes for TMA. "
                "Call .clone() on the slice once, outside the hot path."
            )


def coded_layer(
    x: Coded,
    weights: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    tiles: TokenTiles,
    instance: Instance,
    dtype: torch.dtype,
    *,
    scale: float = 1.0,
    weights_on_input: bool = False,
    parts: int = GEMM1 | GEMM2 | SUM,
    scratch: tuple[Tensor, Tensor, Tensor] | None = None,
    overlap: bool = True,
    looks: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`fast_layer` of checked tensors (`check_coded_layer`) over codes: x as `coded` makes it; out (M, H) of dtype.

    instance: one that is scaled; tiles, topk_weights, topk_ids, weights_on_input, parts, overlap, and what is said there of
    launches beside each other: as there. scratch: as `coded_scratch` makes it; its own unless given. looks: whether sums look
    at ids before they read rows, None for LOOKS_FROM.
    Deterministic; no host synchronisation. Raises RuntimeModeError; KernelTimeoutError.
    """
    residency.raise_if_lost()
    w13, w2, (num_tokens, top_k) = weights.w13, weights.w2, topk_ids.shape
    out = w2.new_empty((num_tokens, w2.shape[1]), dtype=dtype) if out is None else out
    inner, inner_scale, y = scratch or coded_scratch(tiles, instance, topk_ids.numel(), weights, dtype)
    if top_k == 1 and parts & GEMM2 and parts & SUM:
        y = out  # GEMM2 writes the output
    assert weights.w13_scale is not None and weights.w2_scale is not None  # of such a format
    arguments = layer_arguments(
        x.codes, x.codes, inner, y, out, topk_weights, topk_ids, tiles, w13.shape[0], parts,
        report=residency.report_of(out.get_device()), scale=scale, weights_on_input=weights_on_input,
        powers=weights.format.power_of_two_scales,
        scales=(x.scale, weights.w13_scale, weights.w2_scale, x.scale, inner_scale),
    )  # fmt: skip
    looks = num_tokens >= LOOKS_FROM if looks is None else looks
    launch_layer(instance, (w13, w2, x.codes, inner), arguments, out, topk_ids, overlap=overlap, looks=looks)
    return out
