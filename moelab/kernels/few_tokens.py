"""The layer for a few tokens in two launches of Triton, as matrix-vector products: no order, no tiles, no tensor cores.

At so few tokens the weights are all there is to move, and time is lost by launches, and by SMs with nothing to
read. So GEMM1 has a program for every few elements of every pair of a token and one of its experts, gate and up rows side by
side, which stores them activated; and GEMM2 one for every few elements of every token's output, over all its experts, so that
nothing is added up afterwards. On NVIDIA chips since Hopper the second launch is set up, and its first weights read, while the
first one ends (programmatic dependent launch).
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

from dataclasses import dataclass  # noqa: E402

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.kernels.launch import Launcher  # noqa: E402
from moelab.kernels.tiles import start_next  # noqa: E402


@dataclass(frozen=True)
class Tile:
    """What a program of one GEMM reads at a time: rows of weights, by columns of them; its warps. Powers of two."""

    rows: int
    columns: int
    warps: int


@dataclass(frozen=True)
class FewTokens:
    """The tiles of GEMM1, whose rows are pairs of a gate and an up row, and of GEMM2. early: tiles of its weights that a program
    of GEMM2 asks for before GEMM1 has ended."""

    up: Tile
    down: Tile
    early: int = 4


FORMS = (
    FewTokens(Tile(1, 1024, 2), Tile(2, 512, 2), early=3),
    FewTokens(Tile(1, 1024, 2), Tile(2, 256, 1)),
    FewTokens(Tile(1, 2048, 4), Tile(2, 256, 1)),
    FewTokens(Tile(1, 512, 2), Tile(4, 256, 1)),
    FewTokens(Tile(1, 1024, 2), Tile(4, 256, 1)),
)
"""Those in use; data/recordings/fast_choice.json has all of them at every shape. GEMM2 has 10 to 16 warps a
SM in each, at the fewest tokens and the largest hidden size that it serves (of the last: of these shapes): fewer
leave memory idle, more come in turns."""

MOST_TOKENS = 12
"""Of a batch that the forms are recorded at, and predicted for."""

MOST_STEPS = 256
"""Of a program: they are unrolled, so that all loads may be on their way together."""

MOST_PROGRAMS = 65535
"""In a grid's second dimension (CUDA C++ Programming Guide, technical specifications per compute capability)."""


def serves(form: FewTokens, num_tokens: int, top_k: int, hidden_size: int, moe_intermediate_size: int) -> bool:
    """Whether a form can run a batch of these sizes, as on this rank: its programs are neither too long to unroll nor too many.
    Of more than MOST_TOKENS none is tried: each pair reads its expert's weights for itself."""
    steps = max(-(-hidden_size // form.up.columns), top_k * -(-moe_intermediate_size // form.down.columns))
    programs = max(-(-moe_intermediate_size // form.up.rows), -(-hidden_size // form.down.rows))
    return 0 < num_tokens <= MOST_TOKENS and steps <= MOST_STEPS and programs <= MOST_PROGRAMS


@triton.jit(do_not_specialize=["num_experts"])
def _up_kernel(
    x_ptr, w_ptr, ids_ptr, routed_ptr, inner_ptr, num_experts,
    N: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, ON_INPUT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr, SIDE_BY_SIDE: tl.constexpr,
):  # fmt: skip
    """ROWS elements of one pair's activated row: silu(gate) * up. x (M, H), w (E, 2N, H), inner (pairs, N)."""
    pair = tl.program_id(0 if SIDE_BY_SIDE else 1)
    n = tl.program_id(1 if SIDE_BY_SIDE else 0) * ROWS + tl.arange(0, ROWS)
    start_next(PDL)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        return
    column = tl.arange(0, COLUMNS)
    gate_ptrs = w_ptr + (expert * 2 * N + n[:, None]) * H + column[None, :]
    up_ptrs = gate_ptrs + N * H
    x_ptrs = x_ptr + (pair // TOP_K).to(tl.int64) * H + column
    wide = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    gate = tl.zeros((ROWS, COLUMNS), dtype=wide)
    up = tl.zeros((ROWS, COLUMNS), dtype=wide)
    for step in tl.static_range((H + COLUMNS - 1) // COLUMNS):
        start = step * COLUMNS
        there = column + start < H
        mask = (n < N)[:, None] & there[None, :]
        g = tl.load(gate_ptrs + start, mask=mask, other=0.0, eviction_policy="evict_first")
        u = tl.load(up_ptrs + start, mask=mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptrs + start, mask=there, other=0.0).to(wide)[None, :]
        gate += g.to(wide) * x
        up += u.to(wide) * x
    a = tl.sum(gate, axis=1)
    b = tl.sum(up, axis=1)
    if ON_INPUT:
        by = tl.load(routed_ptr + pair).to(wide)
        a *= by
        b *= by
    silu = a / (1.0 + tl.exp(-a))
    tl.store(inner_ptr + pair.to(tl.int64) * N + n, (silu * b).to(inner_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _weights(
    w_ptr, ids_ptr, pair, h, start, num_experts, N: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Rows h, columns from start, of the weights of a pair's expert; zero where its id counts nothing."""
    column = start + tl.arange(0, COLUMNS)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    counts = (expert >= 0) & (expert < num_experts)
    expert = tl.where(counts, expert, 0)
    mask = (h < H)[:, None] & (column < N)[None, :] & counts
    ptrs = w_ptr + (expert * H + h[:, None]) * N + column[None, :]
    return tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["num_experts", "scale"])
def _down_kernel(
    inner_ptr, w_ptr, ids_ptr, routed_ptr, out_ptr, num_experts, scale,
    N: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, ON_INPUT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr, SIDE_BY_SIDE: tl.constexpr,
):  # fmt: skip
    """ROWS elements of one token's output: scale * sum over its pairs. inner (pairs, N), w (E, H, N), out (M, H)."""
    token = tl.program_id(0 if SIDE_BY_SIDE else 1)
    h = tl.program_id(1 if SIDE_BY_SIDE else 0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    wide = tl.float64 if inner_ptr.dtype.element_ty == tl.float64 else tl.float32
    sums = tl.zeros((ROWS, COLUMNS), dtype=wide)
    STEPS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    # Ids were there before GEMM1 let this launch begin, weights always; only `inner` is to be waited for.
    early = ()
    if PDL:
        for n in tl.static_range(EARLY):
            pair = token * TOP_K + n // STEPS
            w = _weights(w_ptr, ids_ptr, pair, h, n % STEPS * COLUMNS, num_experts, N, H, COLUMNS)
            early = early + (w,)  # type: ignore[assignment] # noqa: RUF005 (Triton does not unpack)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        expert = tl.load(ids_ptr + pair).to(tl.int64)
        counts = (expert >= 0) & (expert < num_experts)
        # Selected, not multiplied: the weight of an id that counts nothing may be NaN, and its row of `inner` is never written.
        if not ON_INPUT:
            by = tl.load(routed_ptr + pair, mask=counts, other=0.0).to(wide)
        inner_ptrs = inner_ptr + pair.to(tl.int64) * N + column
        for step in tl.static_range(STEPS):
            start = step * COLUMNS
            if PDL and j * STEPS + step < EARLY:
                w = early[j * STEPS + step]
            else:
                w = _weights(w_ptr, ids_ptr, pair, h, start, num_experts, N, H, COLUMNS)
            there = (column + start < N) & counts
            a = tl.load(inner_ptrs + start, mask=there, other=0.0).to(wide)
            if not ON_INPUT:
                a *= by
            sums += w.to(wide) * a[None, :]
    out = tl.sum(sums, axis=1) * scale
    tl.store(out_ptr + token.to(tl.int64) * H + h, out.to(out_ptr.dtype.element_ty), mask=h < H)


_up, _down = Launcher(_up_kernel), Launcher(_down_kernel)


def few_tokens(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    form: FewTokens,
    *,
    scale: float = 1.0,
    weights_on_input: bool = False,
    overlap: bool = True,
    side_by_side: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """The layer of checked tensors: x (M, H), w13 (E, 2N, H), w2 (E, H, N); out (M, H). Deterministic, no host synchronisation.

    topk_weights (M, k), float32 or x's dtype, topk_ids (M, k) int32 or int64; those outside of the experts add nothing, whatever
    their weight and whatever NaN the experts that nobody chose hold. scale: an int counts as the float it equals.
    weights_on_input: weigh GEMM1's rows, before the activation. overlap: programmatic dependent launch, for NVIDIA chips since
    Hopper. side_by_side: run programs of the same rows of all experts (GEMM1) and of all tokens (GEMM2) next to each other: of
    tokens that share an expert only the first then reads its weights from memory, the others find them in the L2.
    """
    num_experts, hidden, size = w2.shape
    num_tokens, top_k = topk_ids.shape
    inner, out = x.new_empty((num_tokens * top_k, size)), torch.empty_like(x) if out is None else out
    early = min(form.early, top_k * triton.cdiv(size, form.down.columns))
    for launcher, tile, programs, rows, tensors, values, own in (
        (_up, form.up, num_tokens * top_k, size, (x, w13, topk_ids, topk_weights, inner), (), {}),
        (
            _down,
            form.down,
            num_tokens,
            hidden,
            (inner, w2, topk_ids, topk_weights, out),
            (float(scale),),
            {"EARLY": early},
        ),
    ):
        constants = {
            "N": size, "H": hidden, "TOP_K": top_k, "ON_INPUT": weights_on_input, "ROWS": tile.rows,
            "COLUMNS": tile.columns, **own, "PDL": overlap, "SIDE_BY_SIDE": side_by_side,
        }  # fmt: skip
        across = triton.cdiv(rows, tile.rows)
        options = {"num_warps": tile.warps, **({"launch_pdl": True} if overlap else {})}
        launcher(
            (
                x.dtype,
                topk_weights.dtype,
                topk_ids.dtype,
                hidden,
                size,
                top_k,
                weights_on_input,
                tile,
                early,
                overlap,
                side_by_side,
            ),
            (programs, across) if side_by_side else (across, programs),
            tensors,
            (num_experts, *values),
            lambda constants=constants, options=options: (constants, options),  # type: ignore[misc]
        )
    return out
