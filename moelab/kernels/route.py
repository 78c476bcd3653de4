"""From router logits to weights, experts, and the order of slots by expert: routing and alignment in one launch.

While the tokens are few, one program does it all on one tile of logits, a row a token and a lane an expert. The
chosen lanes are a 0/1 matrix: its column sums give the experts' offsets, its running column sums the places within an
expert, so that nothing is sorted. Beyond that programs route a few tokens each, and `expert_order` follows.
Deterministic, no host synchronisation; compiled once for each kind of router and each of five tiles, not for each batch.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

from typing import Any, NamedTuple  # noqa: E402

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.errors import RoutingError  # noqa: E402
from moelab.kernels import checks  # noqa: E402
from moelab.kernels.expert_order import check_order, expert_order_unchecked  # noqa: E402
from moelab.kernels.launch import Launcher, checked, signature  # noqa: E402
from moelab.kernels.tiles import start_next  # noqa: E402
from moelab.kernels.token_tiles import TokenTiles  # noqa: E402
from moelab.kernels.top_k import (  # noqa: E402
    LOWEST,
    key_of,
    router_scores,
    shares,
    top_k_ranks,
    with_lane,
    within_best_groups,
)
from moelab.routers import check_local_experts, check_router  # noqa: E402
from moelab.routing import ExpertOrder, Routed  # noqa: E402

# Rows of the one program's tile, and the most logits that it may hold: the registers of 8 warps, 16 a thread.
_ROWS = (1, 4, 16, 64)
_ONE_PROGRAM = 4096
_ROWS_OF_MANY = 4


@triton.jit
def _experts(
    NUM_EXPERTS: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr
):
    """(LANES,) the expert of each lane, ascending; -1, or NUM_EXPERTS and more, where there is none.

    A group starts at a multiple of LANES / GROUPS. The lanes of several rows are written so that the compiler sees
    neighbours and loads them together. A single row does better loaded as its scattered stores lie, a lane a thread:
    nothing passes through shared memory then, and no barrier stands in the way.
    """
    lane = tl.arange(0, LANES)
    SIZE: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    if ROWS > 1 and (GROUPS == 1 or LANES == NUM_EXPERTS):
        return lane
    group, member = lane // (LANES // GROUPS), lane % (LANES // GROUPS)
    return tl.where((member < SIZE) & (group < NUM_GROUPS), group * SIZE + member, -1)


@triton.jit
def _route_rows(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, row, num_tokens, first_expert, num_local, scale,
    TOP_K: tl.constexpr, NUM_EXPERTS: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, TOP_K_GROUPS: tl.constexpr, SUM_OF_TWO: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Store weights and ids of a tile of tokens. (slots, which are chosen) of (ROWS, LANES), and each lane's local id."""
    expert = _experts(NUM_EXPERTS, NUM_GROUPS, GROUPS, LANES, row.shape[0])
    present = (expert >= 0) & (expert < NUM_EXPERTS)
    inside = (row < num_tokens)[:, None] & present[None, :]
    ptrs = logits_ptr + row[:, None] * NUM_EXPERTS + expert[None, :]
    logits = tl.load(ptrs, mask=inside, other=float("-inf")).to(tl.float32)
    # Without bias and groups the greatest is chosen: the sum of the chosen is no less than its 1, and 1e-20 no part of it.
    scores = router_scores(logits, SCORE, RENORMALIZE and bias_ptr is None and GROUPS == 1)
    if bias_ptr is None:
        key = key_of(logits)
    else:
        key = key_of(scores + tl.load(bias_ptr + expert, mask=present, other=0.0).to(tl.float32)[None, :])
    key = tl.where(inside, key, LOWEST)
    if GROUPS > 1:
        key = within_best_groups(key, SUM_OF_TWO, GROUPS, TOP_K_GROUPS)
    NARROW: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth == 16 and bias_ptr is None and LANES <= 8192
    if NARROW:
        key = with_lane(key)
    rank = top_k_ranks(key, TOP_K, NARROW)
    chosen = inside & (rank >= 0)
    if RENORMALIZE:
        scores = shares(scores, tl.sum(tl.where(chosen, scores, 0.0).to(tl.float64), axis=1) + 1e-20)
    slot = row[:, None] * TOP_K + rank
    tl.store(weights_ptr + slot, scores * scale, mask=chosen)
    local = expert - first_expert
    local = tl.where(present & (local >= 0) & (local < num_local), local, -1)
    tl.store(ids_ptr + slot, tl.broadcast_to(local[None, :], slot.shape), mask=chosen)
    return slot, chosen, local


@triton.jit(do_not_specialize=["num_tokens", "first_expert", "num_local"])
def _route_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, num_tokens, first_expert, num_local, scale,
    TOP_K: tl.constexpr, NUM_EXPERTS: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, TOP_K_GROUPS: tl.constexpr, SUM_OF_TWO: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Weights and ids, ROWS tokens a program."""
    start_next(PDL)
    # int64: num_tokens * num_experts passes 2^31 at 8.4 million tokens of 256 experts.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    _route_rows(
        logits_ptr, bias_ptr, weights_ptr, ids_ptr, row, num_tokens, first_expert, num_local, scale,
        TOP_K, NUM_EXPERTS, SCORE, RENORMALIZE, NUM_GROUPS, GROUPS, TOP_K_GROUPS, SUM_OF_TWO, LANES,
    )  # fmt: skip


@triton.jit
def _store_tiles(tiles_ptr, num_tiles_ptr, ready_ptr, local, counts, starts, first_slot, room):
    """A tile for each expert that has rows, and zeros to count in; see moelab.kernels.token_tiles."""
    has_rows = counts > 0
    record = tiles_ptr + 4 * (tl.cumsum(has_rows.to(tl.int32), axis=0) - 1)
    tl.store(record, starts, mask=has_rows)
    tl.store(record + 1, counts, mask=has_rows)
    tl.store(record + 2, local, mask=has_rows)
    tl.store(record + 3, first_slot, mask=has_rows)
    tl.store(num_tiles_ptr, tl.sum(has_rows.to(tl.int32), axis=0))
    for start in range(0, room, 512):
        place = start + tl.arange(0, 512)
        tl.store(ready_ptr + place, 0 * place, mask=place < room)


@triton.jit(do_not_specialize=["num_tokens", "first_expert", "num_local", "room"])
def _route_order_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, sorted_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, ready_ptr,
    num_tokens, first_expert, num_local, room, scale,
    TOP_K: tl.constexpr, NUM_EXPERTS: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, TOP_K_GROUPS: tl.constexpr, SUM_OF_TWO: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Weights, ids and order of at most ROWS tokens, SLOTS slots, by one program; and a tile an expert where asked for."""
    start_next(PDL)
    slot, chosen, local = _route_rows(
        logits_ptr, bias_ptr, weights_ptr, ids_ptr, tl.arange(0, ROWS), num_tokens, first_expert, num_local, scale,
        TOP_K, NUM_EXPERTS, SCORE, RENORMALIZE, NUM_GROUPS, GROUPS, TOP_K_GROUPS, SUM_OF_TWO, LANES,
    )  # fmt: skip
    ours = (chosen & (local >= 0)[None, :]).to(tl.int32)
    counts = tl.sum(ours, axis=0)
    starts = tl.cumsum(counts, axis=0) - counts
    total = tl.sum(counts, axis=0)
    tl.store(offsets_ptr + local, starts, mask=local >= 0)
    tl.store(offsets_ptr + num_local, total)
    # Down an expert's column tokens ascend, and so do their slots: the order is stable.
    tl.store(sorted_ptr + starts[None, :] + tl.cumsum(ours, axis=0) - 1, slot, mask=ours == 1)
    num_slots = num_tokens * TOP_K
    if tiles_ptr is not None:
        first_slot = tl.min(tl.where(ours == 1, slot, num_slots), axis=0)
        _store_tiles(tiles_ptr, num_tiles_ptr, ready_ptr, local, counts, starts, first_slot, room)
    if total < num_slots:
        behind = total + tl.arange(0, SLOTS)
        tl.store(sorted_ptr + behind, tl.full((SLOTS,), 0, tl.int32) + num_slots, mask=behind < num_slots)


_route_many = Launcher(_route_kernel)
_route_one = Launcher(_route_order_kernel)


class _Plan(NamedTuple):
    """What a checked call launches: constants of its kernel, the experts of this rank, and whether one program will do."""

    constants: dict[str, Any]
    key: tuple[object, ...]
    local: range
    one_program: bool


def _plan(
    logits: Tensor, top_k: int, score: str, bias: Tensor | None, num_groups: int, top_k_groups: int, renormalize: bool,
    local_experts: range | None, out: Routed | None,
) -> _Plan:  # fmt: skip
    """Check a call, and say how to launch it."""
    _check_tensors(logits, bias)
    num_tokens, num_experts = logits.shape
    check_router(num_experts, top_k, num_groups, top_k_groups, score, bias)
    local = check_local_experts(local_experts, num_experts)
    if out is not None:
        for part, values, dtype in (
            ("out.topk_weights", out.topk_weights, torch.float32),
            ("out.topk_ids", out.topk_ids, torch.int32),
        ):
            checks.check_shape(part, values, (num_tokens, top_k))
            checks.check_dtype(part, values, (dtype,))
            checks.check_together(**{"router_logits": logits, part: values})
        check_order("router_logits", logits, num_tokens * top_k, len(local), out.order)
    size = num_experts // num_groups
    groups, lanes = _lanes(num_experts, num_groups)
    rows = one_program_rows(num_tokens, lanes)
    constants: dict[str, Any] = {
        "TOP_K": top_k, "NUM_EXPERTS": num_experts, "SCORE": score, "RENORMALIZE": renormalize and top_k > 1,
        "NUM_GROUPS": num_groups, "GROUPS": groups, "TOP_K_GROUPS": top_k_groups,
        "SUM_OF_TWO": bias is not None and size > 1, "LANES": lanes, "ROWS": rows or _ROWS_OF_MANY,
    }  # fmt: skip
    if rows is not None:
        constants["SLOTS"] = triton.next_power_of_2(rows * top_k)
    key = (logits.dtype, bias is None or bias.dtype, *constants.values())
    return _Plan(constants, key, local, rows is not None)


def one_program_rows(num_tokens: int, lanes: int) -> int | None:
    """Rows of the tile on which one program routes and orders num_tokens; None where many programs do."""
    return next((rows for rows in _ROWS if rows >= num_tokens and rows * lanes <= max(_ONE_PROGRAM, lanes)), None)


def tiles_in_one_launch(num_tokens: int, num_experts: int, num_groups: int = 1) -> bool:
    """Whether `route` can write tiles of at least num_tokens rows along with all else: where one program does it all."""
    return num_tokens > 0 and one_program_rows(num_tokens, _lanes(num_experts, num_groups)[1]) is not None


def _lanes(num_experts: int, num_groups: int) -> tuple[int, int]:
    """(groups, lanes) of a program's tile, both powers of two."""
    groups = triton.next_power_of_2(num_groups)
    return groups, groups * triton.next_power_of_2(num_experts // num_groups)


def _check_tensors(logits: Tensor, bias: Tensor | None) -> None:
    checks.check_kernel_device("router_logits", logits)
    checks.check_shape("router_logits", logits, ("num_tokens", "num_experts"))
    checks.check_dtype("router_logits", logits, _DTYPES)
    checks.check_together(router_logits=logits, correction_bias=bias)
    if bias is not None:
        checks.check_dtype("correction_bias", bias, _DTYPES)


_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def new_routed(num_tokens: int, num_experts: int, top_k: int, device: str | torch.device) -> Routed:
    """A result for `route` to write to; num_experts: this rank's.

    One allocation, each part on 16 bytes at every size, so that one compiled kernel serves all.
    """
    num_slots = num_tokens * top_k
    room = -(-num_slots // 4) * 4
    buffer = torch.empty(3 * room + num_experts + 1, dtype=torch.int32, device=device)
    weights, ids = buffer[:num_slots].view(torch.float32), buffer[room : room + num_slots]
    order = ExpertOrder(buffer[2 * room : 2 * room + num_slots], buffer[3 * room :])
    return Routed(weights.view(num_tokens, top_k), ids.view(num_tokens, top_k), order)


def route(
    router_logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    correction_bias: Tensor | None = None,
    num_groups: int = 1,
    top_k_groups: int = 1,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
    local_experts: range | None = None,
    out: Routed | None = None,
    tiles: TokenTiles | None = None,
) -> Routed:
    """The top_k experts of each token, their weights, and the slots sorted by expert.

    router_logits: (num_tokens, num_experts) bfloat16, float16 or float32, contiguous; computed in float32.
    score, correction_bias (num_experts,), num_groups, top_k_groups, renormalize, routed_scaling_factor: the rule, as
    in routers.grouped_topk. Qwen3: the defaults; Llama 4: top_k=1, score="sigmoid"; LFM2: score="sigmoid" and the bias
    (its own form adds 1e-6 to the sum of scores, this 1e-20); DeepSeek-V3: score="sigmoid", the bias, num_groups=8,
    top_k_groups=4, routed_scaling_factor=2.5.
    local_experts: under expert parallelism, the experts whose weights this rank holds; ids then count from the first
    of them, those of other ranks are -1, and no part of the order. out: written to where given, see `new_routed`.
    tiles: written as well where given, a tile for each expert with rows, in the order of the experts. For few tokens only,
    see `tiles_in_one_launch`; of rows enough for all of them; their slots those of `out`.

    Equals routing.route_ref: ids and order exactly (with a bias: but for scores that round differently), weights within
    float32's rounding. Of equal logits the lower expert comes first. A NaN is not looked for, as that would wait for
    the device: it is chosen before every number, and its weight is NaN. Repeated runs are equal bit by bit.
    Raises ShapeError, DtypeError, DeviceError, LayoutError, RoutingError, UnknownNameError, RuntimeModeError.
    """
    if tiles is not None and not (
        out is not None and tiles_in_one_launch(router_logits.shape[0], router_logits.shape[1], num_groups)
    ):
        raise RoutingError(
            f"Tiles were asked for with {'no result to write to' if out is None else f'{router_logits.shape[0]} tokens'}. "
            "Expected `out`, and tokens few enough for one program. Call token_tiles on the order that this returns."
        )
    parts = () if out is None else (out.topk_weights, out.topk_ids, out.order.sorted_slots, out.order.expert_offsets)
    rule = (top_k, score, num_groups, top_k_groups, renormalize, local_experts)
    plan: _Plan = checked(
        ("route", rule, signature(router_logits, correction_bias, *parts)),
        lambda: _plan(
            router_logits, top_k, score, correction_bias, num_groups, top_k_groups, renormalize, local_experts, out
        ),
    )
    routed = out or new_routed(router_logits.shape[0], len(plan.local), top_k, router_logits.device)
    if router_logits.shape[0] == 0:
        routed.order.expert_offsets.zero_()
    elif plan.one_program:
        _in_one_launch(router_logits, correction_bias, float(routed_scaling_factor), plan, routed, tiles)
    else:
        _in_several_launches(router_logits, correction_bias, float(routed_scaling_factor), plan, routed)
    return routed


def _in_one_launch(
    logits: Tensor, bias: Tensor | None, scale: float, plan: _Plan, routed: Routed, tiles: TokenTiles | None
) -> None:
    num_warps = min(8, plan.constants["ROWS"])  # a row's maxima then stay within a warp
    order, cut = routed.order, (None, None, None) if tiles is None else (tiles.tiles, tiles.num_tiles, tiles.ready)
    _route_one(
        (plan.key, tiles is None),
        (1, 1),
        (logits, bias, routed.topk_weights, routed.topk_ids, order.sorted_slots, order.expert_offsets, *cut),
        (logits.shape[0], plan.local.start, len(plan.local), 0 if tiles is None else tiles.ready.shape[0], scale),
        lambda: (plan.constants, {"num_warps": num_warps}),
    )


def _in_several_launches(logits: Tensor, bias: Tensor | None, scale: float, plan: _Plan, routed: Routed) -> None:
    _route_many(
        plan.key,
        (-(-logits.shape[0] // _ROWS_OF_MANY), 1),
        (logits, bias, routed.topk_weights, routed.topk_ids),
        (logits.shape[0], plan.local.start, len(plan.local), scale),
        lambda: (plan.constants, {"num_warps": _ROWS_OF_MANY}),
    )
    expert_order_unchecked(routed.topk_ids, len(plan.local), routed.order)
