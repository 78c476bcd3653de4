"""The layer for a few tokens in two launches of Triton, as matrix-vector products: no order, no tiles, no tensor cores.

At so few tokens the weights are all there is to move, and time is lost by launches, and by multiprocessors with nothing to
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


@dataclass(frozen=True)
class Tile:
    """What a program of one GEMM reads at a time: rows of weights, by columns of them; its warps. Powers of two."""

    rows: int
    columns: int
    warps: int


@dataclass(frozen=True)
class FewTokens:
    """The tiles of GEMM1, whose rows are pairs of a gate and an up row, and of GEMM2."""

    up: Tile
    down: Tile


DOWN = Tile(2, 256, 1)
"""Of GEMM2, at every shape."""

FORMS = (
    FewTokens(Tile(1, 1024, 2), DOWN),
    FewTokens(Tile(1, 512, 2), DOWN),
    FewTokens(Tile(1, 256, 1), DOWN),
)
"""Those in use; data/recordings/fast_choice.json has all of them at every shape."""

UP_COLUMNS = {4096: 256, 5120: 512}
"""hidden_size -> columns of GEMM1's tile where another than the first form is fastest in data/recordings/fast_choice.json."""

MOST_TOKENS = 4
"""Of a batch that goes here."""

MOST_REREAD = 1.12
"""Weights read by pairs over weights read once an expert, if tokens choose evenly, over which another form is faster: each
pair reads its expert's for itself. In data/recordings/fast_choice.json at four tokens, LFM2-8B (1.21) and Mixtral-8x7B (1.46)
are faster by another form, Llama-4-Scout and Qwen3 (both 1.10) by these."""

MOST_STEPS = 256
"""Of a program: they are unrolled, so that all loads may be on their way together."""


def form_for(
    num_tokens: int, top_k: int, num_experts: int, hidden_size: int, moe_intermediate_size: int
) -> FewTokens | None:
    """The form that serves a batch of these sizes, as on this rank; None where another kernel is faster."""
    if not 0 < num_tokens <= MOST_TOKENS or reread(num_tokens, top_k, num_experts) > MOST_REREAD:
        return None
    columns = UP_COLUMNS.get(hidden_size, FORMS[0].up.columns)
    form = next(each for each in FORMS if each.up.columns == columns)
    steps = max(-(-hidden_size // columns), top_k * -(-moe_intermediate_size // form.down.columns))
    return form if steps <= MOST_STEPS else None


def reread(num_tokens: int, top_k: int, num_experts: int) -> float:
    """How often an expert's weights are read, on average, if every token chooses top_k of the experts evenly."""
    touched = num_experts * (1 - (1 - min(top_k / num_experts, 1.0)) ** num_tokens)
    return num_tokens * top_k / touched


@triton.jit
def _start_next(PDL: tl.constexpr):
    """Lets the next launch set its programs up, once what this one was to wait for is there."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit(do_not_specialize=["num_experts"])
def _up_kernel(
    x_ptr, w_ptr, ids_ptr, routed_ptr, inner_ptr, num_experts,
    N: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, ON_INPUT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS elements of one pair's activated row: silu(gate) * up. x (M, H), w (E, 2N, H), inner (pairs, N)."""
    pair = tl.program_id(1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _start_next(PDL)
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
        g = tl.load(gate_ptrs + start, mask=mask, other=0.0)
        u = tl.load(up_ptrs + start, mask=mask, other=0.0)
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


@triton.jit(do_not_specialize=["num_experts", "scale"])
def _down_kernel(
    inner_ptr, w_ptr, ids_ptr, routed_ptr, out_ptr, num_experts, scale,
    N: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, ON_INPUT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS elements of one token's output: scale * sum over its pairs. inner (pairs, N), w (E, H, N), out (M, H)."""
    token = tl.program_id(1)
    h = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    wide = tl.float64 if inner_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows = (h < H)[:, None]
    sums = tl.zeros((ROWS, COLUMNS), dtype=wide)
    # Ids were there before GEMM1 let this launch begin, weights always; only `inner` is to be waited for.
    if PDL:
        first = tl.load(ids_ptr + token * TOP_K).to(tl.int64)
        first_counts = (first >= 0) & (first < num_experts)
        first = tl.where(first_counts, first, 0)
        early_mask = rows & (column < N)[None, :] & first_counts
        early = tl.load(w_ptr + (first * H + h[:, None]) * N + column[None, :], mask=early_mask, other=0.0)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        expert = tl.load(ids_ptr + pair).to(tl.int64)
        counts = (expert >= 0) & (expert < num_experts)
        expert = tl.where(counts, expert, 0)
        by = tl.where(counts, 1.0, 0.0).to(wide)
        if not ON_INPUT:
            by *= tl.load(routed_ptr + pair).to(wide)
        w_ptrs = w_ptr + (expert * H + h[:, None]) * N + column[None, :]
        inner_ptrs = inner_ptr + pair.to(tl.int64) * N + column
        for step in tl.static_range((N + COLUMNS - 1) // COLUMNS):
            start = step * COLUMNS
            there = (column + start < N) & counts
            if PDL and j == 0 and step == 0:  # noqa: SIM108 (only a statement leaves the other branch uncompiled)
                w = early
            else:
                w = tl.load(w_ptrs + start, mask=rows & there[None, :], other=0.0)
            a = tl.load(inner_ptrs + start, mask=there, other=0.0).to(wide) * by
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
) -> Tensor:
    """The layer of checked tensors: x (M, H), w13 (E, 2N, H), w2 (E, H, N); out (M, H). Deterministic, no host synchronisation.

    topk_weights (M, k) float32, topk_ids (M, k) int32, those outside of the experts count nothing. weights_on_input: weigh
    GEMM1's rows, before the activation. overlap: programmatic dependent launch, for NVIDIA chips since Hopper.
    """
    num_experts, hidden, size = w2.shape
    num_tokens, top_k = topk_ids.shape
    inner, out = x.new_empty((num_tokens * top_k, size)), torch.empty_like(x)
    for launcher, tile, rows, programs, tensors, values in (
        (_up, form.up, size, num_tokens * top_k, (x, w13, topk_ids, topk_weights, inner), ()),
        (_down, form.down, hidden, num_tokens, (inner, w2, topk_ids, topk_weights, out), (scale,)),
    ):
        constants = {
            "N": size, "H": hidden, "TOP_K": top_k, "ON_INPUT": weights_on_input, "ROWS": tile.rows,
            "COLUMNS": tile.columns, "PDL": overlap,
        }  # fmt: skip
        options = {"num_warps": tile.warps, **({"launch_pdl": True} if overlap else {})}
        launcher(
            (x.dtype, topk_ids.dtype, hidden, size, top_k, weights_on_input, tile, overlap),
            (triton.cdiv(rows, tile.rows), programs),
            tensors,
            (num_experts, *values),
            lambda constants=constants, options=options: (constants, options),  # type: ignore[misc]
        )
    return out
