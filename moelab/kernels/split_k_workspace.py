"""Split-K with a workspace: SPLIT_K programs write partial sums of their own, a second kernel adds them in order.

Deterministic, at the price of writing and reading SPLIT_K float32 copies of the product. Each partial sum carries the
routed weight; the second kernel applies GEMM1's activation: SwiGLU is not linear, so it must see the whole sum.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.config import KernelConfig  # noqa: E402
from moelab.dtypes import accumulator_dtype  # noqa: E402
from moelab.errors import ShapeError, WorkspaceError  # noqa: E402
from moelab.kernels import checks  # noqa: E402
from moelab.kernels.gemm_call import GemmCall, check_gemm, gemm_constants  # noqa: E402
from moelab.kernels.launch import Launcher, checked  # noqa: E402
from moelab.kernels.tiles import (  # noqa: E402
    add_bias,
    dot_loop,
    gated_activation,
    grouped_tile,
    operand_ptrs,
    plain_activation,
    row_block,
    start_next,
    store_rows,
    times_weight,
)
from moelab.reference import check_activation  # noqa: E402
from moelab.routing import Alignment  # noqa: E402
from moelab.weights import GemmWeights  # noqa: E402

# 512 float32 values a program of 4 warps are one 16-byte load a thread and slice; smaller rows share a program.
_TILE = 512


# num_pairs and num_rows follow the batch size: specialising them would mean another compile per batch size.
@triton.jit(do_not_specialize=["num_pairs", "num_rows"])
def _split_k_partial_kernel(
    a_ptr,
    w_ptr,
    workspace_ptr,
    bias_ptr,
    topk_weights_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    N,
    K,
    num_pairs,
    num_rows,
    TOP_K: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """workspace[split, pair] = every SPLIT_K-th block of K of one (BLOCK_SIZE_M, BLOCK_SIZE_N) tile."""
    start_next(PDL)
    # Neighbours share a tile, whose rows they then read from L2.
    split = tl.program_id(0) % SPLIT_K
    pid_m, pid_n = grouped_tile(
        tl.program_id(0) // SPLIT_K, tl.cdiv(num_rows, BLOCK_SIZE_M), tl.cdiv(N, BLOCK_SIZE_N), GROUP_SIZE_M
    )
    if pid_m * BLOCK_SIZE_M >= tl.load(num_tokens_post_padded_ptr):
        return
    pair, row_mask = row_block(sorted_token_ids_ptr, pid_m, num_pairs, BLOCK_SIZE_M)
    offs_n = pid_n * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    wide = workspace_ptr.dtype.element_ty
    # int64: split * num_pairs * N passes 2^31 at 16 slices of 32,768 pairs of 4096.
    slice_ptr = workspace_ptr + split.to(tl.int64) * num_pairs * N
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=wide)
    expert = tl.load(expert_ids_ptr + pid_m).to(tl.int64)
    if expert < 0:  # another rank's expert: its share of the sum is zero here
        store_rows(slice_ptr, pair, row_mask, offs_n, N, acc)
        return
    offs_k = split * BLOCK_SIZE_K + tl.arange(0, BLOCK_SIZE_K)
    a_ptrs, w_ptrs = operand_ptrs(a_ptr, w_ptr, pair // TOP_K, expert, offs_n, offs_k, N, K)
    acc = dot_loop(a_ptrs, w_ptrs, acc, K, row_mask, split, SPLIT_K, BLOCK_SIZE_K, EVEN_K)
    acc = add_bias(acc, bias_ptr, expert, offs_n, (offs_n < N) & (split == 0), N)  # once, not once a split
    # Here, not on the whole sum: the second kernel does not know which pairs are another rank's, whose weight may be NaN.
    acc = times_weight(acc, topk_weights_ptr, pair, row_mask)
    store_rows(slice_ptr, pair, row_mask, offs_n, N, acc)


@triton.jit
def _sum_of_slices(ptrs, slice_size, mask, SPLIT_K: tl.constexpr):
    """The sum over slices, first to last, of what lies at ptrs in each."""
    total = tl.load(ptrs, mask=mask, other=0.0)
    for _ in tl.static_range(SPLIT_K - 1):
        ptrs += slice_size
        total += tl.load(ptrs, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["num_pairs"])
def _split_k_reduce_kernel(
    workspace_ptr,
    out_ptr,
    num_pairs,
    N,
    SPLIT_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """A (BLOCK_ROWS, BLOCK_COLS) tile of out (num_pairs, N): slices added, activated and rounded once."""
    start_next(PDL)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = (rows < num_pairs)[:, None] & (cols < N)[None, :]
    width = 2 * N if GATED else N
    slice_size = tl.cast(num_pairs, tl.int64) * width
    ptrs = workspace_ptr + rows[:, None] * width + cols[None, :]
    out = _sum_of_slices(ptrs, slice_size, mask, SPLIT_K)
    if GATED:
        up = _sum_of_slices(ptrs + N, slice_size, mask, SPLIT_K)
        out = gated_activation(out, up, ACTIVATION)
    elif ACTIVATION is not None:
        out = plain_activation(out, ACTIVATION)
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def new_workspace(split_k: int, num_pairs: int, N: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """An uninitialised (split_k, num_pairs, N) workspace for operands of `dtype`: float32, or float64 for float64.

    Raises WorkspaceError, naming the bytes, where it does not fit.
    """
    wide = accumulator_dtype(dtype)
    try:
        return torch.empty((split_k, num_pairs, N), dtype=wide, device=device)
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, RuntimeError from the host's allocator
        needed = split_k * num_pairs * N * wide.itemsize
        raise WorkspaceError(
            f"No room for a Split-K workspace of {needed} bytes on {device}: {split_k} slices of {num_pairs} pairs by "
            f"{N}. Expected them to fit. Lower SPLIT_K, or pass fewer tokens at a time."
        ) from error


_partial = Launcher(_split_k_partial_kernel)
_reduce = Launcher(_split_k_reduce_kernel)


def split_k_workspace(
    a: Tensor,
    w: Tensor,
    alignment: Alignment,
    config: KernelConfig,
    *,
    num_pairs: int,
    top_k: int,
    bias: Tensor | None = None,
    topk_weights: Tensor | None = None,
    activation: str | None = None,
    gated: bool = True,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`grouped_gemm` with config.SPLIT_K programs a tile, and an activation, if one is named, on the whole sum.

    Arguments, dtypes and errors as in grouped_gemm; config.SPLIT_K may be 1, and not over the number of K's blocks
    (ConfigError). activation, gated: as in `activation`, applied after bias and routed weight; None for none.
    workspace: at least SPLIT_K * num_pairs * N float32 values (float64 for float64), overwritten; None allocates one,
    see `new_workspace`.
    Returns (num_pairs, N), or (num_pairs, N / 2) after a gated activation, in a's dtype, every row written.
    Deterministic. Raises WorkspaceError besides.
    """
    gated = gated and activation is not None
    call = GemmCall(
        a, GemmWeights(w, bias), alignment, config, num_pairs, top_k, topk_weights, activation, gated, workspace
    )
    N = checked(("split_k_workspace", call.seen(out)), lambda: _check(call, out))
    if out is None:
        out = a.new_empty((num_pairs, N // 2 if gated else N))
    if num_pairs:
        if workspace is None:
            call = call._replace(workspace=new_workspace(config.SPLIT_K, num_pairs, N, a.dtype, a.device))
        split_k_workspace_unchecked(call, out)
    return out


def split_k_workspace_unchecked(call: GemmCall, out: Tensor) -> None:
    """`split_k_workspace` of at least one pair, its workspace there, for callers that checked it as a whole."""
    w, config, (N, K) = call.weights, call.config, call.sizes
    _partial(
        call.key,
        (call.num_tiles, 1),
        (call.a, w.w, call.workspace, w.bias, call.topk_weights, *call.row_tensors),
        (N, K, call.num_pairs, call.num_rows),
        lambda: gemm_constants(config, K, TOP_K=call.top_k, SPLIT_K=config.SPLIT_K),
    )
    _reduce_slices(call, out)


def _check(call: GemmCall, out: Tensor | None) -> int:
    """N of operands that fit together; raises what split_k_workspace names."""
    N, _ = check_gemm(call)
    if call.activation is not None:
        check_activation(call.activation, call.gated)
    if call.gated and N % 2:
        raise ShapeError(f"w has {N} rows an expert. Expected an even number, gate rows and then up. Pass gated=False.")
    checks.check_out(out, call.a, (call.num_pairs, N // 2 if call.gated else N))
    if call.workspace is not None:
        _check_workspace(call.workspace, call.config.SPLIT_K * call.num_pairs * N, call.a)
    return N


def _check_workspace(workspace: Tensor, needed: int, a: Tensor) -> None:
    checks.check_dtype("workspace", workspace, (accumulator_dtype(a.dtype),))
    checks.check_together(a=a, workspace=workspace)
    if workspace.numel() < needed:
        size = workspace.element_size()
        raise WorkspaceError(
            f"workspace holds {workspace.numel() * size} bytes. Expected at least {needed * size} bytes "
            f"(SPLIT_K * num_pairs * N values of {size}). Make one with new_workspace, or pass none."
        )


def _reduce_slices(call: GemmCall, out: Tensor) -> None:
    num_pairs, N = out.shape
    block_cols = min(triton.next_power_of_2(N), _TILE)
    block_rows = _TILE // block_cols
    constants = {
        "SPLIT_K": call.config.SPLIT_K, "ACTIVATION": call.activation, "GATED": call.gated,
        "BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols,
    }  # fmt: skip
    _reduce(
        (call.config.SPLIT_K, call.activation, call.gated, N, out.dtype),
        (-(-num_pairs // block_rows), -(-N // block_cols)),
        (call.workspace, out),
        (num_pairs, N),
        lambda: (constants, {"num_warps": 4}),
    )
