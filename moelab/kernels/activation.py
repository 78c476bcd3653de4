"""The activation between the two GEMMs: gated (silu, gelu, gpt-oss's clamped SwiGLU) or plain."""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import functools  # noqa: E402

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.errors import ShapeError  # noqa: E402
from moelab.kernels import checks  # noqa: E402
from moelab.kernels.launch import Launcher, checked, signature  # noqa: E402
from moelab.kernels.tiles import gated_activation, plain_activation, start_next  # noqa: E402
from moelab.reference import check_activation  # noqa: E402

# 1024 values a program in 4 warps is one 16-byte load a thread in bf16; smaller rows share a program.
_TILE = 1024


@triton.jit(do_not_specialize=["num_rows"])
def _activation_kernel(
    x_ptr,
    out_ptr,
    num_rows,
    N,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """A (BLOCK_ROWS, BLOCK_COLS) tile of out, computed in float32 (float64 for float64) and rounded once."""
    start_next(PDL)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = (rows < num_rows)[:, None] & (cols < N)[None, :]
    wide = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    width = 2 * N if GATED else N
    x_ptrs = x_ptr + rows[:, None] * width + cols[None, :]
    first = tl.load(x_ptrs, mask=mask, other=0.0).to(wide)
    if GATED:
        up = tl.load(x_ptrs + N, mask=mask, other=0.0).to(wide)
        out = gated_activation(first, up, ACTIVATION)
    else:
        out = plain_activation(first, ACTIVATION)
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


_launch = Launcher(_activation_kernel)


def activation(
    x: Tensor,
    kind: str = "silu",
    *,
    gated: bool = True,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """(rows, 2N) -> (rows, N), kind(first half) * second half; without a gate (rows, N) -> (rows, N).

    kind: "silu", "gelu" (erf), "gelu_tanh", gated only "swiglu_oai", ungated only "relu2". x: bfloat16, float16,
    float32 or float64, contiguous. dtype: the result's, x's own unless told otherwise: float32 sums of a Split-K GEMM
    are rounded to the layer's dtype here, once. Deterministic. Raises UnknownNameError, ShapeError, DtypeError,
    DeviceError, LayoutError, RuntimeModeError.
    """
    rows, N = checked(("activation", kind, gated, dtype, signature(x, out)), lambda: _check(x, kind, gated, dtype, out))
    if out is None:
        out = x.new_empty((rows, N), dtype=dtype)
    if out.numel():
        activation_unchecked(x, out, kind, gated)
    return out


@functools.cache
def _tile(N: int) -> tuple[int, int]:
    block_cols = min(triton.next_power_of_2(N), _TILE)
    return _TILE // block_cols, block_cols


def activation_unchecked(x: Tensor, out: Tensor, kind: str, gated: bool) -> None:
    """`activation` of at least one value, for pipelines whose call was checked as a whole."""
    rows, N = out.shape
    block_rows, block_cols = _tile(N)
    constants = {"ACTIVATION": kind, "GATED": gated, "BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols}
    _launch(
        (kind, gated, N, x.dtype, out.dtype),
        (-(-rows // block_rows), -(-N // block_cols)),
        (x, out),
        (rows, N),
        lambda: (constants, {"num_warps": 4}),
    )


def _check(x: Tensor, kind: str, gated: bool, dtype: torch.dtype | None, out: Tensor | None) -> tuple[int, int]:
    """(rows, N) of the result; raises what activation names."""
    check_activation(kind, gated)
    checks.check_kernel_device("x", x)
    checks.check_dtype("x", x, checks.FLOATS)
    checks.check_shape("x", x, ("rows", "2N" if gated else "N"))
    rows, width = x.shape
    if gated and width % 2:
        raise ShapeError(
            f"x has {width} columns. Expected an even number, gate columns and then up columns. Pass gated=False for none."
        )
    N = width // 2 if gated else width
    checks.check_together(x=x)
    if dtype is not None:
        runtime.require_kernels(dtype)
    checks.check_out(out, x, (rows, N), dtype)
    return rows, N
