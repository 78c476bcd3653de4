"""Activations into the codes and scales that a format's GEMM multiplies: by token, by groups of a token's row, by matrix.

As `moelab.quantised_weights.quantise_activations` has it in plain torch, bit for bit but where a quotient lies between two codes.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.errors import FormatError  # noqa: E402
from moelab.formats import Format  # noqa: E402
from moelab.kernels import checks  # noqa: E402
from moelab.kernels.launch import Launcher, checked, signature  # noqa: E402
from moelab.kernels.tiles import start_next  # noqa: E402
from moelab.quantised_weights import empty_activations  # noqa: E402

CODE_LIMIT = {"float8_e4m3fn": 448.0, "int8": 127.0}
"""The largest magnitude of a code."""

_TO_NEAREST = 12582912.0  # 1.5 * 2^23: adding and subtracting it leaves a float32 rounded to an integer, ties to even


@triton.jit
def _codes(ratio, DTYPE: tl.constexpr, LIMIT: tl.constexpr, NEAREST: tl.constexpr, TO_NEAREST: tl.constexpr):
    """Clamped to the codes' range, NaN kept, and rounded to them."""
    ratio = tl.minimum(
        tl.maximum(ratio, -LIMIT, propagate_nan=tl.PropagateNan.ALL), LIMIT, propagate_nan=tl.PropagateNan.ALL
    )
    if NEAREST:
        ratio = (ratio + TO_NEAREST) - TO_NEAREST
    return ratio.to(DTYPE)


@triton.jit
def scale_of(x, LIMIT: tl.constexpr, POWER: tl.constexpr):
    """The scale of each row of x (rows, columns) float32."""
    scale = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-10) / LIMIT
    if POWER:
        scale = tl.exp2(tl.ceil(tl.log2(scale)))
    return scale


@triton.jit
def quantise_rows(x, DTYPE: tl.constexpr, LIMIT: tl.constexpr, POWER: tl.constexpr):
    """Rows of a group's columns, float32, in the epilogue or the loop of a GEMM: their codes and scales."""
    scale = scale_of(x, LIMIT, POWER)
    return _codes(x / scale[:, None], DTYPE, LIMIT, False, 0.0), scale


@triton.jit(do_not_specialize=["num_rows"])
def _quantise_groups_kernel(
    x_ptr, out_ptr, scale_ptr, num_rows, K,
    GROUP: tl.constexpr, ROWS: tl.constexpr, LIMIT: tl.constexpr, NEAREST: tl.constexpr, POWER: tl.constexpr,
    TO_NEAREST: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """One group of columns of ROWS rows: scale (rows, K / GROUP rounded up) and codes. GROUP is a power of two or more than K."""
    start_next(PDL)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    columns = group * GROUP + tl.arange(0, GROUP)
    mask = (rows < num_rows)[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * K + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = scale_of(x, LIMIT, POWER)
    tl.store(scale_ptr + rows * tl.num_programs(1) + group, scale, mask=rows < num_rows)
    codes = _codes(x / scale[:, None], out_ptr.dtype.element_ty, LIMIT, NEAREST, TO_NEAREST)
    tl.store(out_ptr + rows[:, None] * K + columns[None, :], codes, mask=mask)


@triton.jit(do_not_specialize=["num_values"])
def _quantise_by_one_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    num_values,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
    TO_NEAREST: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Codes of BLOCK values under the one scale that lies at scale_ptr."""
    start_next(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < num_values, other=0.0).to(tl.float32)
    codes = _codes(x / tl.load(scale_ptr), out_ptr.dtype.element_ty, LIMIT, False, TO_NEAREST)
    tl.store(out_ptr + at, codes, mask=at < num_values)


_groups = Launcher(_quantise_groups_kernel)
_by_one = Launcher(_quantise_by_one_kernel)
_BLOCK = 2048


def quantise_activations(x: Tensor, format: Format, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (rows, K) floating -> codes (rows, K), and float32 scales: (rows, 1) by token, (rows, K / g) by group, () by matrix.

    K / g is rounded up. static_scale: () float32, a checkpoint's, for a format that has one; without it the largest of all rows
    counts. Deterministic.
    Raises FormatError for a format whose activations stay as they are, DtypeError, ShapeError, LayoutError, DeviceError,
    RuntimeModeError.
    """
    checked(("quantise_activations", format, signature(x, static_scale)), lambda: _check(x, format, static_scale))
    return quantise_activations_unchecked(x, format, static_scale)


def quantise_activations_unchecked(
    x: Tensor, format: Format, static_scale: Tensor | None = None, out: tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor, Tensor]:
    """`quantise_activations`, for pipelines whose call was checked as a whole.

    out: where codes, and scales that are made by token or by group, go, as `empty_activations` makes them; None allocates.
    """
    limit = CODE_LIMIT[str(format.weight_dtype)]
    codes, scale = out or empty_activations(format, x.shape[0], x.shape[1], x.dtype, x.device)
    if format.activations in ("token", "group"):
        assert scale is not None  # such a format has them
        _by_groups(x, codes, scale, format, limit)
        return codes, scale
    if static_scale is None:
        largest = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
        static_scale = largest.clamp(min=1e-10) / limit
    if x.numel():
        _by_one(
            (x.dtype, codes.dtype),
            (-(-x.numel() // _BLOCK), 1),
            (x, codes, static_scale),
            (x.numel(),),
            lambda: ({"BLOCK": _BLOCK, "LIMIT": limit, "TO_NEAREST": _TO_NEAREST}, {"num_warps": 4}),
        )
    return codes, static_scale


def _by_groups(x: Tensor, codes: Tensor, scale: Tensor, format: Format, limit: float) -> None:
    rows, K = x.shape
    group = K if format.activations == "token" else format.sizes[-1]
    width = triton.next_power_of_2(group)
    if group != width and format.activations == "group":
        raise FormatError(f"Groups of {group} activations. Expected a power of two. Choose another block.")
    tile = max(1, _BLOCK // width)
    constants = {
        "GROUP": width, "ROWS": tile, "LIMIT": limit, "POWER": format.power_of_two_scales, "TO_NEAREST": _TO_NEAREST,
        "NEAREST": format.weight_dtype == "int8" and format.activations == "token",
    }  # fmt: skip
    if rows:
        _groups(
            (format, x.dtype, K, tile),
            (-(-rows // tile), scale.shape[1]),
            (x, codes, scale),
            (rows, K),
            lambda: (constants, {"num_warps": 8 if width > 4096 else 4}),
        )


def _check(x: Tensor, format: Format, static_scale: Tensor | None) -> None:
    if format.activations == "none":
        raise FormatError(
            f"{format.name} leaves activations as they are. Expected one that quantises them. Pass x itself."
        )
    format.require_static_scale(static_scale is not None)
    checks.check_kernel_device("x", x)
    checks.check_dtype("x", x, checks.FLOATS)
    checks.check_shape("x", x, ("rows", "K"))
    checks.check_together(x=x, static_scale=static_scale)
    if static_scale is not None:
        checks.check_shape("static_scale", static_scale, ())
        checks.check_dtype("static_scale", static_scale, (torch.float32,))
