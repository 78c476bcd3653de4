"""Both GEMMs of a layer for few rows an expert over quantised weights and bfloat16 activations: the launcher of weight_only.cu.

Weight-only arithmetic: codes are widened in registers, and activations stay as they are, in formats too whose other kernels
quantise them (w8a8): that is closer to the model, and differs from servers by their rounding of activations. Two launches
for a few tokens; with an alignment, two between it and the sum-reduce. Compiling needs no GPU; running one needs sm_90.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelab.chips import Target
from moelab.errors import ConfigError, DtypeError, FormatError, RuntimeModeError, ShapeError
from moelab.formats import Format
from moelab.kernels import nvrtc
from moelab.kernels.cuda_launch import launch, launch_config
from moelab.routing import Alignment
from moelab.weights import ExpertWeights, GemmWeights

SOURCE = Path(__file__).with_name("weight_only.cu")

CODES = ("FP8", "INT8", "UINT8", "INT4", "FP4")
ACTIVATIONS = ("SILU", "GELU", "GELU_TANH", "SWIGLU_OAI")
"""As moelab.reference names them, in capitals."""

CHUNK = 64
"""Bytes of a row of codes that four threads read at once, 16 each."""

MOST_SLOTS = 64
"""Experts a token."""

ROWS_UP, ROWS_DOWN = 16, 32
"""Of a tile: inner columns of GEMM1, with a gate and an up row each, and rows of w2."""


@dataclass(frozen=True)
class Cut:
    """How one launch is cut. stages: chunks that a thread has asked for ahead, even; warps: of a CTA; split: how many of them
    divide K of a tile; turns: tiles of a warp, one after the other, 1 where K is divided."""

    stages: int
    warps: int
    split: int
    turns: int = 1


@dataclass(frozen=True)
class WeightOnly:
    """How both launches are cut, and whose CTAs they are: with `sorted`, of blocks of `columns` (8 or 16) pairs of one expert,
    all columns of the tensor core's tile; else of one pair (GEMM1) and of one token (GEMM2), of which one column is in use."""

    up: Cut
    down: Cut
    sorted: bool = False
    columns: int = 8

    def expression(self, gemm: str, w: GemmWeights, activation: str = "silu") -> str:
        """The template instance to compile, as NVRTC names it. gemm: "up" or "down", whose weights w are."""
        return _expression(self, gemm, w.w.shape[1], w.w.shape[2] * w.format.values_per_byte, w.format, activation)


@functools.lru_cache(maxsize=4096)
def _expression(form: WeightOnly, gemm: str, rows: int, columns: int, format: Format, activation: str) -> str:
    """Kept: in eager decode the GPU waits for the host."""
    cut, step = form.up if gemm == "up" else form.down, format.sizes[-1] if format.sizes else 0
    scaled = {"tensor": 0, "block": format.sizes[0] if format.sizes else 0}.get(format.granularity, 1)
    flags = (format.granularity == "group", format.zero_points)
    coded = ", ".join((codes_of(format), *map(_cpp, flags), *map(str, (rows, columns, step, scaled))))
    cuts = ", ".join(map(str, (form.columns, cut.stages, cut.warps, cut.split, cut.turns)))
    kind = f", {activation.upper()}" if gemm == "up" else ""
    return f"weight_only_{gemm}<Coded<{coded}>, {cuts}, {_cpp(form.sorted)}{kind}>"


def _cpp(flag: bool) -> str:
    return str(flag).lower()


def codes_of(format: Format) -> str:
    """What a stored code is, of CODES."""
    if format.family == "mxfp4_w4a16":
        return "FP4"
    return {"float8_e4m3fn": "FP8", "int8": "INT8", "uint8": "INT4" if format.bits == 4 else "UINT8"}[
        str(format.weight_dtype)
    ]


def source() -> str:
    """weight_only.cu as it is compiled."""
    return f"enum {{ {', '.join(CODES)} }};\nenum {{ {', '.join(ACTIVATIONS)} }};\n{SOURCE.read_text()}"


def not_taken(format: Format, hidden_size: int, moe_intermediate_size: int) -> str | None:
    """What of a layer the kernels do not take, as a clause with what they do; None if they take it. Sizes as on this rank."""
    if format.is_plain:
        return "plain weights, where it takes quantised ones"
    for name, size, multiple in (
        ("hidden_size", hidden_size, ROWS_DOWN), ("moe_intermediate_size", moe_intermediate_size, ROWS_UP)
    ):  # fmt: skip
        multiple = max(multiple, 128 // format.bits)
        if size % multiple:
            return f"{name} = {size}, where it takes multiples of {multiple}"
    step, chunk = (format.sizes[-1] if format.sizes else 0), 8 * CHUNK // format.bits
    if format.granularity == "block" and (step % chunk or format.sizes[0] % 16):
        return f"blocks of {format.sizes[0]}x{step}, where it takes rows by 16 and columns by {chunk}"
    if format.granularity == "group" and step % (chunk // 4):
        return f"groups of {step}, where it takes multiples of {chunk // 4}"
    return None


class LayerArguments(ctypes.Structure):
    """`Layer` of weight_only.cu, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zeros", "bias", "input", "output")),
        *(
            (name, ctypes.c_void_p)
            for name in ("topk_weights", "topk_ids", "sorted_pairs", "block_experts", "rows_in_use")
        ),
        *(
            (name, ctypes.c_int)
            for name in ("num_experts", "num_pairs", "top_k", "wide_ids", "wide_weights", "weighted")
        ),
        ("factor", ctypes.c_float),
    ]


@dataclass(frozen=True)
class Launch:
    """One launch: which instance, its grid, its threads, its arguments."""

    expression: str
    grid: int
    threads: int
    arguments: LayerArguments


def launches(
    x: Tensor,
    weights: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    inner: Tensor,
    out: Tensor,
    form: WeightOnly,
    alignment: Alignment | None = None,
    *,
    activation: str = "silu",
    scale: float = 1.0,
    weights_on_input: bool = False,
) -> tuple[Launch, Launch]:
    """GEMM1's and GEMM2's launches for these tensors. x (M, H); inner (pairs, N); out (M, H), or of a sorted form (pairs, H),
    whose alignment has blocks of form.columns pairs, and which applies no scale: a sum-reduce follows."""
    pairs, top_k = topk_ids.numel(), topk_ids.shape[1]
    size, hidden = inner.shape[1], x.shape[1]
    which: tuple[Any, ...] = (None, None, None)
    if alignment is not None:
        which = (alignment.sorted_token_ids, alignment.expert_ids, alignment.num_tokens_post_padded)
    blocks = -(-alignment.rows_in_use // form.columns) if alignment is not None else 0
    found = []
    for gemm, cut, of, source_, target, tiles, programs in (
        ("up", form.up, weights.up, x, inner, -(-size // ROWS_UP), blocks or pairs),
        ("down", form.down, weights.down, inner, out, -(-hidden // ROWS_DOWN), blocks or x.shape[0]),
    ):
        pointers = (of.w, of.scale, of.zero_point, of.bias, source_, target, topk_weights, topk_ids, *which)
        arguments = LayerArguments(
            *(None if t is None else t.data_ptr() for t in pointers), weights.num_experts, pairs, top_k,
            topk_ids.dtype == torch.int64, topk_weights.dtype == torch.float32, 1 if weights_on_input else 2, scale,
        )  # fmt: skip
        across = -(-tiles // (cut.warps // cut.split * cut.turns))
        found.append(Launch(form.expression(gemm, of, activation), programs * across, cut.warps * 32, arguments))
    return found[0], found[1]


def weight_only(
    x: Tensor,
    weights: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    form: WeightOnly,
    alignment: Alignment | None = None,
    *,
    activation: str = "silu",
    scale: float = 1.0,
    weights_on_input: bool = False,
    overlap: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """The layer of checked tensors (`check_weight_only`): x (M, H) bfloat16, quantised w13 (E, 2N, H) and w2 (E, H, N).

    topk_weights (M, k), float32 or bfloat16, topk_ids (M, k) int32 or int64. Returns (M, H) bfloat16, scaled; of a sorted form,
    whose alignment has blocks of form.columns, the (pairs, H) products that a sum-reduce adds up and scales. out: for that.
    overlap: programmatic dependent launch. Deterministic; no host synchronisation. Ids of no expert here add nothing. In int4 by
    groups of whole chunks (128), whose zero points are taken from the sums, an infinite activation makes all of its token NaN.
    """
    pairs, size = topk_ids.numel(), weights.w13.shape[1] // 2
    if out is None:
        out = x.new_empty((pairs if form.sorted else x.shape[0], x.shape[1]))
    if not pairs:
        return out
    inner = x.new_empty((pairs, size))
    options: dict[str, Any] = {"activation": activation, "scale": scale, "weights_on_input": weights_on_input}
    for each in launches(x, weights, topk_weights, topk_ids, inner, out, form, alignment, **options):
        start(x, each, overlap)
    return out


def start(x: Tensor, one: Launch, overlap: bool) -> None:
    """Launch it on the current stream of x's device."""
    _, function = _loaded(x.get_device(), one.expression)
    config = launch_config(one.grid, one.threads, 0, torch.cuda.current_stream(x.device).cuda_stream, overlap)
    launch(function, config, (ctypes.addressof(one.arguments),))


@functools.cache
def _loaded(device: int, expression: str) -> tuple[Any, Any]:
    """(kernel, to be kept; function) on that GPU."""
    from cuda.bindings import driver

    nvrtc.cuda_core().Device(device).set_current()
    kernel = nvrtc.compiled("sm_90a", source(), expression).get_kernel(expression)
    return kernel, driver.CUfunction(int(kernel.handle))


def check_weight_only(x: Tensor, weights: ExpertWeights, top_k: int, target: Target | None) -> None:
    """Raise unless the kernels take such a layer on that chip: RuntimeModeError, FormatError, DtypeError, ConfigError, and
    ShapeError for an address."""
    if target is None or target.name != "sm_90":
        raise RuntimeModeError(
            f"impl='weight_only' was asked for on {'no GPU' if target is None else target.name}. Expected a Hopper GPU (sm_90), "
            "where it was tried. Use impl='triton'."
        )
    if why := not_taken(weights.format, x.shape[1], weights.w13.shape[1] // 2):
        raise FormatError(
            f"impl='weight_only' was asked for {why}. Expected one of those. Pad it, or use impl='triton'."
        )
    scales = {"w13_scale": weights.w13_scale, "w2_scale": weights.w2_scale}
    for name, scale in scales.items() if weights.format.granularity == "group" else ():
        if scale is not None and scale.dtype == torch.float16:  # an instance reads 16 bits in one way
            raise DtypeError(
                f"{name} is float16. Expected {weights.format.scale_dtype} for impl='weight_only'. Cast it once with "
                ".to(torch.bfloat16), which rounds it, or use impl='triton'."
            )
    if top_k > MOST_SLOTS:
        raise ConfigError(f"top_k is {top_k}. Expected at most {MOST_SLOTS} for impl='weight_only'. Use impl='triton'.")
    for name, tensor in (("hidden_states", x), ("w13", weights.w13), ("w2", weights.w2)):
        if tensor.data_ptr() % 16:
            raise ShapeError(
                f"{name} starts {tensor.data_ptr() % 16} bytes past a multiple of 16. Expected an address on 16 bytes, as it is "
                "read. Call .clone() on the slice once, outside the hot path."
            )
