"""Experts that transformers keeps as fp8 codes (its FP8Experts, of checkpoints quantised in blocks), as moelab's weights.

What is read: `gate_up_proj` (E, 2N, H) of float8_e4m3fn, gate rows and then up rows (`up_proj` (E, N, H) without a gate),
`down_proj` (E, H, N), beside each its scales, `*_scale_inv`, one a block of `block_size`, which multiply in spite of their name.
The tensors are taken as they lie at each call: no code is copied.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moelab.dtypes import dtype_name
from moelab.errors import DtypeError, FormatError, LayoutError, ShapeError
from moelab.experts_block import refuse_foreign
from moelab.formats import FAMILIES, Format, get_format
from moelab.weights import ExpertWeights

FAMILY = "fp8_w8a8_block"


def interface() -> Any | None:
    """transformers' registry for such experts; None where it has none, or cannot import it."""
    try:
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    except ImportError:
        return None
    return FP8ExpertsInterface


def is_coded(block: nn.Module) -> bool:
    """Whether the block's experts have scales beside them."""
    return hasattr(block, "down_proj_scale_inv")


def format_of(block: Any) -> Format:
    """How the block's experts are stored and what becomes of their activations, in moelab's terms.

    Raises FormatError for activations with a checkpoint's scale, a scale for a whole matrix, and four bits; DtypeError for codes
    and scales of another dtype; ShapeError for scales of other blocks, and blocks that hold gate and up rows; LayoutError for
    tensors that are sharded, not there, or rearranged for another kernel.
    """
    what = type(block).__name__
    if getattr(block, "_megamoe_transformed", False):
        raise LayoutError(
            f"{what} was rearranged for deepgemm_megamoe. Expected its weights as they were loaded. Load the model under "
            "another experts_implementation."
        )
    scheme = getattr(block, "activation_scheme", "dynamic")
    if scheme != "dynamic":
        raise FormatError(
            f"{what} has activation_scheme = {scheme!r}, a checkpoint's scale for each expert's activations. Expected 'dynamic': "
            "scales of the activations themselves. Keep this model's own implementation, or load it with dequantize=True."
        )
    size = getattr(block, "block_size", None)
    if size is None:
        raise FormatError(
            f"{what} has one scale for a whole matrix (weight_block_size None), and transformers a scale for each token beside "
            "it. Expected scales in blocks, as [128, 128]. Keep this model's own implementation, or load it with dequantize=True."
        )
    gated = bool(getattr(block, "has_gate", True))
    names = ("gate_up_proj" if gated else "up_proj", "down_proj")
    for name in names:
        _check_codes(block, name)
        _check_scales(block, name)
    found = get_format(f"{FAMILY}_{int(size[0])}x{int(size[1])}")
    _check_sizes(block, names, found, gated)
    return found


def weights_of(block: Any, format: Format, gated: bool) -> ExpertWeights:
    """The block's own tensors, of a format that `format_of` found."""
    first = "gate_up_proj" if gated else "up_proj"
    return ExpertWeights(
        getattr(block, first), block.down_proj,
        w13_scale=getattr(block, f"{first}_scale_inv"), w2_scale=block.down_proj_scale_inv, format=format,
    )  # fmt: skip


def _tensor(block: Any, name: str) -> Tensor:
    found = getattr(block, name, None)
    if not isinstance(found, Tensor):
        raise ShapeError(
            f"{type(block).__name__} has no {name}. Expected codes and their scales, gate_up_proj or up_proj and down_proj. Pass "
            "the experts block itself."
        )
    refuse_foreign(name, found)
    return found


def _check_codes(block: Any, name: str) -> None:
    dtype = dtype_name(_tensor(block, name).dtype)
    if dtype == "int8":
        raise FormatError(
            f"{name} holds int8, two values of four bits to a byte (expert_dtype 'fp4'). Expected codes of eight bits. Keep this "
            "model's own implementation, or load it with dequantize=True."
        )
    if dtype != FAMILIES[FAMILY].weight_dtype:
        raise DtypeError(
            f"{name} is {dtype}, with scales beside it. Expected {FAMILIES[FAMILY].weight_dtype}. Load the checkpoint again, "
            "with dequantize=True for plain experts."
        )


def _check_scales(block: Any, name: str) -> None:
    scale = f"{name}_scale_inv"
    dtype = dtype_name(_tensor(block, scale).dtype)
    if dtype == "float8_e8m0fnu":
        raise DtypeError(
            f"{scale} is {dtype} (scale_fmt 'ue8m0'): powers of two, beside which activations get such scales too. Expected "
            "float32. Keep this model's own implementation, or load it with dequantize=True."
        )
    if dtype != "float32":
        raise DtypeError(f"{scale} is {dtype}. Expected float32. Load the checkpoint as it is, without a cast after.")


def _check_sizes(block: Any, names: tuple[str, str], format: Format, gated: bool) -> None:
    w13, w2 = (getattr(block, name) for name in names)
    halves = 2 if gated else 1
    if w13.ndim != 3 or w2.ndim != 3 or w13.shape != (w2.shape[0], halves * w2.shape[2], w2.shape[1]):
        raise ShapeError(
            f"{names[0]} is {tuple(w13.shape)} and down_proj {tuple(w2.shape)}. Expected (E, {'2N' if gated else 'N'}, H) and "
            "(E, H, N). Keep this model's own implementation if it stores them otherwise."
        )
    if gated and w2.shape[2] % format.sizes[0]:
        raise ShapeError(
            f"An expert's intermediate size is {w2.shape[2]}, and blocks have {format.sizes[0]} rows: one would hold gate and up "
            "rows. Expected a multiple. Shard the model otherwise."
        )
    for name, w in zip(names, (w13, w2), strict=True):
        scale, (_, expected, _) = getattr(block, f"{name}_scale_inv"), format.stored_shapes(*w.shape)
        if tuple(scale.shape) != expected:
            raise ShapeError(
                f"{name}_scale_inv is {tuple(scale.shape)} beside {name} {tuple(w.shape)}. Expected {expected}, one for each "
                f"block of {format.sizes[0]} x {format.sizes[1]}. Check block_size, and that both are of one layer."
            )
        for what, tensor in ((name, w), (f"{name}_scale_inv", scale)):
            if not tensor.is_contiguous():
                raise LayoutError(
                    f"{what} has shape {tuple(tensor.shape)} with strides {tensor.stride()}. Expected contiguous memory: "
                    "anything else would be copied at each call. Load the checkpoint again, or keep this model's own "
                    "implementation."
                )
