"""moe_sum_reduce: (num_tokens, top_k, hidden) summed over top_k, times routed_scaling_factor, five ways.

`triton_f32` keeps the accumulator of upstream's Triton kernel, float32 whatever the input, to show what that costs
in float64; the others accumulate in a type at least as wide as the input's.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import functools  # noqa: E402
import importlib.util  # noqa: E402
from collections.abc import Callable  # noqa: E402

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.errors import RuntimeModeError, ShapeError, UnknownNameError, nearest_names  # noqa: E402
from moelab.kernels import checks, sum_reduce_cuda  # noqa: E402
from moelab.kernels.launch import Launcher, checked, signature  # noqa: E402
from moelab.kernels.tiles import start_next  # noqa: E402

# Slots summed in straight-line code, all their loads in flight; more go through a loop.
_MAX_UNROLLED_TOP_K = 32


@triton.jit(do_not_specialize=["num_tokens"])
def _sum_reduce_f32_kernel(
    x_ptr, out_ptr, scale, num_tokens, top_k, hidden, BLOCK_COLS: tl.constexpr, PDL: tl.constexpr = False
):
    """One token, BLOCK_COLS columns, float32 accumulator: upstream's precision and its launch (sglang #10654)."""
    start_next(PDL)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = cols < hidden
    acc = tl.zeros((BLOCK_COLS,), dtype=tl.float32)
    for slot in range(0, top_k):
        acc += tl.load(x_ptr + (token * top_k + slot) * hidden + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * hidden + cols, (acc * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_reduce_kernel(
    x_ptr,
    out_ptr,
    hidden,
    scale: tl.float64,
    TOP_K: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One token, BLOCK_COLS columns, accumulated in float32, or in float64 for float64.

    scale says its type because Triton passes a float as float32 otherwise: 0.3 would be off by 1.2e-8. It is rounded to
    the accumulator's once, as a constant would be, and costs no compile for each factor as one does.
    """
    start_next(PDL)
    token = tl.program_id(0).to(tl.int64)  # int64: tokens * TOP_K * hidden passes 2^31 at 32,768 of 8 x 8192
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = cols < hidden
    wide = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    ptrs = x_ptr + token * TOP_K * hidden + cols
    acc = tl.zeros((BLOCK_COLS,), dtype=wide)
    if UNROLL:
        for _ in tl.static_range(TOP_K):
            acc += tl.load(ptrs, mask=mask, other=0.0).to(wide)
            ptrs += hidden
    else:
        for _ in range(0, TOP_K):
            acc += tl.load(ptrs, mask=mask, other=0.0).to(wide)
            ptrs += hidden
    acc *= tl.full((BLOCK_COLS,), scale, wide)
    tl.store(out_ptr + token * hidden + cols, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _torch(x: Tensor, scale: float, out: Tensor) -> Tensor:
    torch.sum(x, dim=1, out=out)
    return out.mul_(scale)


@functools.cache
def _compiled_sum() -> Callable[[Tensor, float], Tensor]:
    return torch.compile(lambda x, scale: torch.sum(x * scale, dim=1), dynamic=True)


def _compiled(x: Tensor, scale: float, out: Tensor) -> Tensor:
    return out.copy_(_compiled_sum()(x, scale))


_launch_f32 = Launcher(_sum_reduce_f32_kernel)
_launch = Launcher(_sum_reduce_kernel)


def _triton_f32(x: Tensor, scale: float, out: Tensor) -> Tensor:
    num_tokens, top_k, hidden = x.shape
    _launch_f32(
        (top_k, hidden, x.dtype),
        (num_tokens, -(-hidden // 2048)),
        (x, out),
        (scale, num_tokens, top_k, hidden),
        lambda: ({"BLOCK_COLS": 2048}, {"num_warps": 16, "num_stages": 1}),
    )
    return out


@functools.lru_cache(maxsize=4096)
def triton_tile(num_tokens: int, hidden: int, itemsize: int) -> tuple[int, int]:
    """(BLOCK_COLS, num_warps), from sweeps on an H200 over the sizes of the suite `sum_reduce`.

    While tokens are few, single-warp programs of one 16-byte load a thread fill the chip best. With many, rows of at
    most 4 KiB do best as one program of 8-byte loads, longer rows with 8 warps and one 16-byte load a thread, two
    where a row has 8 KiB to give.
    """
    row_bytes, values = hidden * itemsize, 16 // itemsize
    cols = triton.next_power_of_2(hidden)
    if num_tokens < (1024 if row_bytes <= 4096 else 2048):
        return min(cols, 32 * values), 1
    if row_bytes <= 4096:
        return cols, max(1, min(16, cols * itemsize // (32 * 8)))
    return min(cols, 32 * 8 * values * (2 if row_bytes >= 8192 else 1)), 8


def sum_reduce_unchecked(x: Tensor, scale: float, out: Tensor) -> Tensor:
    """`sum_reduce` by "triton" of at least one value, for pipelines whose call was checked as a whole."""
    num_tokens, top_k, hidden = x.shape
    cols, num_warps = triton_tile(num_tokens, hidden, x.element_size())
    constants = {"TOP_K": top_k, "BLOCK_COLS": cols, "UNROLL": top_k <= _MAX_UNROLLED_TOP_K}
    _launch(
        (top_k, hidden, cols, num_warps, x.dtype),
        (num_tokens, -(-hidden // cols)),
        (x, out),
        (hidden, float(scale)),
        lambda: (constants, {"num_warps": num_warps}),
    )
    return out


def _cuda(x: Tensor, scale: float, out: Tensor) -> Tensor:
    sum_reduce_cuda.launch(x, out, scale)
    return out


SUM_REDUCE: dict[str, Callable[[Tensor, float, Tensor], Tensor]] = {
    "torch": _torch,
    "compiled": _compiled,
    "triton_f32": _triton_f32,
    "triton": sum_reduce_unchecked,
    "cuda": _cuda,
}


def available_sum_reduce(dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """The names in SUM_REDUCE that run in this process on `dtype`."""
    mode = runtime.current().mode
    names = ["torch", "compiled"]
    if runtime.runs_kernels(dtype):
        names += ["triton_f32", "triton"]
    if mode == "gpu" and torch.version.cuda and importlib.util.find_spec("cuda") is not None:
        names += ["cuda"]
    return tuple(names)


def sum_reduce(
    x: Tensor, routed_scaling_factor: float = 1.0, *, impl: str = "triton", out: Tensor | None = None
) -> Tensor:
    """out[t, h] = routed_scaling_factor * sum over slots of x[t, slot, h].

    x: (num_tokens, top_k, hidden), contiguous, bfloat16, float16, float32 or float64; out: (num_tokens, hidden).
    impl: "torch" (sum, then multiply, each rounded to x's dtype), "compiled" (torch.compile of sum(x * scale)),
    "triton_f32" (upstream's float32 accumulator), "triton" (wide accumulator), "cuda" (the same in CUDA C++).
    All are deterministic. Raises ShapeError, DtypeError, DeviceError, LayoutError, UnknownNameError, and
    RuntimeModeError where the implementation cannot run here.
    """
    checked(("sum_reduce", impl, signature(x, out)), lambda: _check(x, impl, out))
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeModeError(
            "x requires a gradient, and sum_reduce has no backward. Expected inference. Call it under torch.no_grad(), or "
            "use torch.sum."
        )
    if out is None:
        out = x.new_empty((x.shape[0], x.shape[2]))
    return out if out.numel() == 0 else SUM_REDUCE[impl](x, routed_scaling_factor, out)


def _check(x: Tensor, impl: str, out: Tensor | None) -> None:
    """Raise what sum_reduce names, of all that depends on shapes, dtypes and devices."""
    if impl not in SUM_REDUCE:
        raise UnknownNameError(
            f"Unknown sum_reduce implementation {impl!r}. Expected one of {list(SUM_REDUCE)}."
            f"{nearest_names(impl, SUM_REDUCE)} Name one of them."
        )
    checks.check_shape("x", x, ("num_tokens", "top_k", "hidden"))
    checks.check_dtype("x", x, checks.FLOATS)
    num_tokens, top_k, hidden = x.shape
    if top_k < 1:
        raise ShapeError(f"x has shape {tuple(x.shape)}. Expected top_k >= 1. Pass at least one slot.")
    checks.check_together(x=x)
    checks.check_out(out, x, (num_tokens, hidden))
