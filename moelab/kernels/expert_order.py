"""The order of a batch's slots by expert, without padding: the sort of a layer whose kernels find their rows themselves.

Stable and deterministic, no host synchronisation. One launch where `moelab.kernels.slot_order` serves, and while a program can
look at every slot; three above (chunks counted, scanned, placed). From router logits `moelab.kernels.route` gives the same
order along with them.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.errors import ShapeError  # noqa: E402
from moelab.kernels import checks, slot_order  # noqa: E402
from moelab.kernels.chunk_counts import CHUNK, chunk_counts, rank_in_chunk  # noqa: E402
from moelab.kernels.launch import Launcher, checked, signature  # noqa: E402
from moelab.kernels.tiles import bucket_of, start_next  # noqa: E402
from moelab.kernels.token_tiles import TokenTiles, new_token_tiles, token_tiles_unchecked  # noqa: E402
from moelab.routing import ExpertOrder  # noqa: E402

# Up to this many slots one launch does everything; as for `align`, whose sweep on an H200 chose it.
_ONE_LAUNCH = 2048


@triton.jit(do_not_specialize=["num_slots", "num_experts"])
def _order_small_kernel(
    ids_ptr, sorted_ptr, offsets_ptr, num_slots, num_experts, CHUNK: tl.constexpr, PDL: tl.constexpr = False
):
    """One program per bucket, each looking at all slots for itself: for num_slots <= CHUNK."""
    start_next(PDL)
    bucket = tl.program_id(0)
    slot = tl.arange(0, CHUNK)
    inside = slot < num_slots
    found = bucket_of(tl.load(ids_ptr + slot, mask=inside, other=0), num_experts)
    start = tl.sum((inside & (found < bucket)).to(tl.int32), axis=0)
    mine = inside & (found == bucket)
    place = start + tl.cumsum(mine.to(tl.int32), axis=0) - 1
    tl.store(sorted_ptr + place, tl.where(bucket < num_experts, slot, num_slots), mask=mine)
    tl.store(offsets_ptr + bucket, start)


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_chunks"])
def _order_place_kernel(
    ids_ptr, before_ptr, sorted_ptr, offsets_ptr, num_slots, num_experts, num_chunks,
    BUCKETS: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """One program per chunk places its slots; the first writes the offsets too."""
    start_next(PDL)
    chunk = tl.program_id(0)
    lanes = tl.arange(0, BUCKETS)
    totals = tl.load(before_ptr + num_chunks * BUCKETS + lanes, mask=lanes <= num_experts, other=0)
    starts = tl.cumsum(totals, axis=0) - totals
    if chunk == 0:
        tl.store(offsets_ptr + lanes, starts, mask=lanes <= num_experts)
    starts += tl.load(before_ptr + chunk * BUCKETS + lanes)
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = slot < num_slots
    found = bucket_of(tl.load(ids_ptr + slot, mask=inside, other=0), num_experts)
    place = tl.gather(starts, found, axis=0) + rank_in_chunk(
        ids_ptr, slot, found, num_slots, num_experts, CHUNK, COLUMNS
    )
    tl.store(sorted_ptr + place, tl.where(found < num_experts, slot, num_slots), mask=inside)


_order_small = Launcher(_order_small_kernel)
_order_place = Launcher(_order_place_kernel)


def _check(topk_ids: Tensor, num_experts: int, out: ExpertOrder | None) -> None:
    checks.check_kernel_device("topk_ids", topk_ids)
    checks.check_shape("topk_ids", topk_ids, ("num_tokens", "top_k"))
    checks.check_dtype("topk_ids", topk_ids, (torch.int32, torch.int64))
    if num_experts < 1:
        raise ShapeError(f"num_experts = {num_experts}. Expected at least one. Pass the number of this rank's experts.")
    check_order("topk_ids", topk_ids, topk_ids.numel(), num_experts, out)


def check_order(name: str, beside: Tensor, num_slots: int, num_experts: int, out: ExpertOrder | None) -> None:
    """Raise unless an order to write to, where there is one, holds num_slots and num_experts, on the device of `beside`."""
    if out is None:
        checks.check_together(**{name: beside})
        return
    for part, values, size in (
        ("out.sorted_slots", out.sorted_slots, num_slots),
        ("out.expert_offsets", out.expert_offsets, num_experts + 1),
    ):
        checks.check_shape(part, values, (size,))
        checks.check_dtype(part, values, (torch.int32,))
    checks.check_together(
        **{name: beside, "out.sorted_slots": out.sorted_slots, "out.expert_offsets": out.expert_offsets}
    )


def new_expert_order(num_slots: int, num_experts: int, device: str | torch.device) -> ExpertOrder:
    """An order to write to; one allocation, both parts on 16 bytes at every size, so that one compiled kernel serves all."""
    room = -(-num_slots // 4) * 4
    buffer = torch.empty(room + num_experts + 1, dtype=torch.int32, device=device)
    return ExpertOrder(buffer[:num_slots], buffer[room:])


def expert_order(topk_ids: Tensor, num_experts: int, *, out: ExpertOrder | None = None) -> ExpertOrder:
    """Sort slots (t * top_k + j) by expert, stable, without padding.

    topk_ids: (num_tokens, top_k) int32 or int64, contiguous; ids outside [0, num_experts) are another rank's, and no
    part of the order. out: written to where given, see `new_expert_order`. Equals routing.expert_order_ref, bit by
    bit and at every run. Raises ShapeError, DtypeError, DeviceError, LayoutError, RuntimeModeError.
    """
    parts = (None, None) if out is None else (out.sorted_slots, out.expert_offsets)
    key = ("expert_order", num_experts, signature(topk_ids, *parts))
    checked(key, lambda: _check(topk_ids, num_experts, out))
    order = out or new_expert_order(topk_ids.numel(), num_experts, topk_ids.device)
    expert_order_unchecked(topk_ids, num_experts, order)
    return order


def expert_order_unchecked(topk_ids: Tensor, num_experts: int, order: ExpertOrder) -> None:
    """`expert_order` into `order`, for callers that have checked the call as a whole."""
    num_slots = topk_ids.numel()
    if num_slots == 0:
        order.expert_offsets.zero_()
    elif slot_order.serves(slot_order.DENSE, topk_ids, num_experts):
        given = slot_order.arguments(topk_ids, num_experts, order.sorted_slots, first_rows=order.expert_offsets)
        slot_order.order_slots(slot_order.DENSE, topk_ids, given)
    elif num_slots <= _ONE_LAUNCH:
        _in_one_launch(topk_ids, num_experts, order)
    else:
        _in_three_launches(topk_ids, num_experts, order)


def _in_one_launch(topk_ids: Tensor, num_experts: int, order: ExpertOrder) -> None:
    num_slots = topk_ids.numel()
    chunk = next(size for size in (128, 512, _ONE_LAUNCH) if num_slots <= size)
    _order_small(
        (topk_ids.dtype, chunk),
        (num_experts + 1, 1),
        (topk_ids, order.sorted_slots, order.expert_offsets),
        (num_slots, num_experts),
        lambda: ({"CHUNK": chunk}, {"num_warps": 8 if chunk == _ONE_LAUNCH else 4}),
    )


def _in_three_launches(topk_ids: Tensor, num_experts: int, order: ExpertOrder) -> None:
    counts = chunk_counts(topk_ids, num_experts)
    chunks, buckets = counts.shape[0] - 1, counts.shape[1]
    _order_place(
        (topk_ids.dtype, buckets),
        (chunks, 1),
        (topk_ids, counts, order.sorted_slots, order.expert_offsets),
        (topk_ids.numel(), num_experts, chunks),
        lambda: ({"BUCKETS": buckets, "CHUNK": CHUNK, "COLUMNS": 32}, {"num_warps": 8}),
    )


def ordered_tiles(
    topk_ids: Tensor, num_experts: int, tile_rows: int, grain: int = 1, for_clusters: bool = False
) -> TokenTiles:
    """`expert_order`, and its slots cut into tiles as by `token_tiles`: in one launch where `moelab.kernels.slot_order` serves.

    topk_ids as `expert_order` takes them, checked by the caller. No host synchronisation.
    """
    order = new_expert_order(topk_ids.numel(), num_experts, topk_ids.device)
    kind = slot_order.Kind("TILED", tile_rows, grain, for_clusters)
    if topk_ids.numel() and slot_order.serves(kind, topk_ids, num_experts):
        tiles = new_token_tiles(order.sorted_slots, num_experts, tile_rows, for_clusters)
        given = slot_order.tile_arguments(topk_ids, num_experts, tiles, order.expert_offsets)
        slot_order.order_slots(kind, topk_ids, given)
        return tiles
    expert_order_unchecked(topk_ids, num_experts, order)
    return token_tiles_unchecked(order.sorted_slots, order.expert_offsets, tile_rows, grain, for_clusters)
