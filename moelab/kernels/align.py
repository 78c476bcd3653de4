"""moe_align_block_size on the device: sort (token, slot) pairs by expert, each expert padded to BLOCK_SIZE_M rows.

Four ways, all deterministic, none synchronising with the host:
- `align_pairs` gives every pair a block of its own: nothing to sort, for batches so small that experts rarely meet;
- one launch of a cluster of CTAs, where `moelab.kernels.slot_order` serves;
- elsewhere one launch, where a program's histogram holds every pair;
- three launches (count chunks, scan, place), for anything larger.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.errors import DtypeError, ShapeError  # noqa: E402
from moelab.kernels import checks, slot_order  # noqa: E402
from moelab.kernels.chunk_counts import CHUNK, chunk_counts, rank_in_chunk  # noqa: E402
from moelab.kernels.launch import Launcher, checked, signature  # noqa: E402
from moelab.kernels.tiles import bucket_of, start_next  # noqa: E402
from moelab.routing import Alignment, max_padded_pairs  # noqa: E402

# Up to this many pairs one launch does everything; above it chunks are counted, scanned and placed apart.
_ONE_LAUNCH = 2048


@triton.jit
def _bucket_span(counts, bucket, BLOCK_SIZE: tl.constexpr, BUCKETS: tl.constexpr):
    """(first row, rows in use, end of the padded run) of one bucket, given every bucket's count."""
    lanes = tl.arange(0, BUCKETS)
    padded = (counts + BLOCK_SIZE - 1) // BLOCK_SIZE * BLOCK_SIZE
    start = tl.sum(tl.where(lanes < bucket, padded, 0), axis=0)
    count = tl.sum(tl.where(lanes == bucket, counts, 0), axis=0)
    return start, count, start + (count + BLOCK_SIZE - 1) // BLOCK_SIZE * BLOCK_SIZE


@triton.jit
def _finish_bucket(
    sorted_ptr, expert_ids_ptr, total_ptr, bucket, start, count, end, num_pairs, num_experts,
    BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write a bucket's padding, its blocks' expert, and, from the last bucket, the total."""
    rest = start + count + tl.arange(0, BLOCK_SIZE)
    tl.store(sorted_ptr + rest, tl.full((BLOCK_SIZE,), 0, tl.int32) + num_pairs, mask=rest < end)
    blocks = (end - start) // BLOCK_SIZE
    expert = tl.where(bucket < num_experts, bucket, -1)
    for first in range(0, blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        tl.store(expert_ids_ptr + start // BLOCK_SIZE + block, expert, mask=block < blocks)
    if bucket == num_experts:
        tl.store(total_ptr, end)


@triton.jit(do_not_specialize=["num_pairs", "num_experts"])
def _align_small_kernel(
    ids_ptr, sorted_ptr, expert_ids_ptr, total_ptr, num_pairs, num_experts,
    BLOCK_SIZE: tl.constexpr, BUCKETS: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """One program per bucket, each counting all pairs for itself: for num_pairs <= CHUNK."""
    start_next(PDL)
    bucket = tl.program_id(0)
    pairs = tl.arange(0, CHUNK)
    inside = pairs < num_pairs
    found = bucket_of(tl.load(ids_ptr + pairs, mask=inside, other=0), num_experts)
    # Lanes past num_pairs count in a bin that no bucket uses: BUCKETS > num_experts + 1.
    counts = tl.histogram(tl.where(inside, found, BUCKETS - 1), BUCKETS)
    counts = tl.where(tl.arange(0, BUCKETS) <= num_experts, counts, 0)
    start, count, end = _bucket_span(counts, bucket, BLOCK_SIZE, BUCKETS)
    mine = inside & (found == bucket)
    tl.store(sorted_ptr + start + tl.cumsum(mine.to(tl.int32), axis=0) - 1, pairs, mask=mine)
    _finish_bucket(
        sorted_ptr, expert_ids_ptr, total_ptr, bucket, start, count, end, num_pairs, num_experts, BLOCK_SIZE, CHUNK
    )


@triton.jit(do_not_specialize=["num_pairs", "num_experts", "num_chunks"])
def _place_kernel(
    ids_ptr, before_ptr, totals_ptr, sorted_ptr, expert_ids_ptr, total_ptr, num_pairs, num_experts, num_chunks,
    BLOCK_SIZE: tl.constexpr, BUCKETS: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Programs below num_chunks place a chunk's pairs; the others finish a bucket each."""
    start_next(PDL)
    chunk = tl.program_id(0)
    lanes = tl.arange(0, BUCKETS)
    totals = tl.load(totals_ptr + lanes, mask=lanes <= num_experts, other=0)
    if chunk >= num_chunks:
        bucket = chunk - num_chunks
        start, count, end = _bucket_span(totals, bucket, BLOCK_SIZE, BUCKETS)
        _finish_bucket(
            sorted_ptr, expert_ids_ptr, total_ptr, bucket, start, count, end, num_pairs, num_experts, BLOCK_SIZE, CHUNK
        )
        return
    padded = (totals + BLOCK_SIZE - 1) // BLOCK_SIZE * BLOCK_SIZE
    starts = tl.cumsum(padded, axis=0) - padded + tl.load(before_ptr + chunk * BUCKETS + lanes)
    pairs = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = pairs < num_pairs
    found = bucket_of(tl.load(ids_ptr + pairs, mask=inside, other=0), num_experts)
    rank = rank_in_chunk(ids_ptr, pairs, found, num_pairs, num_experts, CHUNK, COLUMNS)
    tl.store(sorted_ptr + tl.gather(starts, found, axis=0) + rank, pairs, mask=inside)


@triton.jit(do_not_specialize=["num_pairs", "num_experts"])
def _align_pairs_kernel(
    ids_ptr,
    sorted_ptr,
    expert_ids_ptr,
    total_ptr,
    num_pairs,
    num_experts,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Block i holds pair i and padding."""
    start_next(PDL)
    pair = tl.program_id(0)
    rows = tl.arange(0, BLOCK_SIZE)
    tl.store(sorted_ptr + pair * BLOCK_SIZE + rows, tl.where(rows == 0, pair, num_pairs))
    expert = tl.load(ids_ptr + pair)
    tl.store(expert_ids_ptr + pair, tl.where((expert >= 0) & (expert < num_experts), expert, -1))
    if pair == 0:
        tl.store(total_ptr, num_pairs * BLOCK_SIZE)


_align_small = Launcher(_align_small_kernel)
_align_pairs = Launcher(_align_pairs_kernel)
_place = Launcher(_place_kernel)


def _check_once(topk_ids: Tensor, block_size: int, num_experts: int) -> None:
    checked(("align", block_size, num_experts, signature(topk_ids)), lambda: _check(topk_ids, block_size, num_experts))


def _check(topk_ids: Tensor, block_size: int, num_experts: int) -> None:
    checks.check_kernel_device("topk_ids", topk_ids)
    checks.check_shape("topk_ids", topk_ids, ("num_tokens", "top_k"))
    checks.check_together(topk_ids=topk_ids)
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"topk_ids is {topk_ids.dtype}. Expected int32 or int64. Cast it with .int().")
    if block_size < 1 or block_size & (block_size - 1) or num_experts < 1:
        raise ShapeError(
            f"block_size = {block_size}, num_experts = {num_experts}. Expected a power of two and at least one expert. "
            "Pass the config's BLOCK_SIZE_M and the number of this rank's experts."
        )


def _allocate(length: int, block_size: int, num_pairs: int, num_experts: int, device: torch.device) -> Alignment:
    # One allocation; the total lies first, in 16 bytes of its own, so that the others start on 16 bytes at every size.
    buffer = torch.empty(4 + length + length // block_size, dtype=torch.int32, device=device)
    total, _, tokens, experts = buffer.split_with_sizes([1, 3, length, length // block_size])
    return Alignment(tokens, experts, total, block_size, num_pairs, num_experts)


def align_pairs(topk_ids: Tensor, block_size: int, num_experts: int) -> Alignment:
    """A block for every pair, in pair order: no sort. An expert that two pairs name is read twice.

    Arguments, result and errors as in `moe_align_block_size`.
    """
    _check_once(topk_ids, block_size, num_experts)
    return _pairs(topk_ids, block_size, num_experts)


def _pairs(topk_ids: Tensor, block_size: int, num_experts: int) -> Alignment:
    num_pairs = topk_ids.numel()
    result = _allocate(num_pairs * block_size, block_size, num_pairs, num_experts, topk_ids.device)
    if num_pairs == 0:
        result.num_tokens_post_padded.zero_()
        return result
    _align_pairs(
        (topk_ids.dtype, block_size),
        (num_pairs, 1),
        (topk_ids, result.sorted_token_ids, result.expert_ids, result.num_tokens_post_padded),
        (num_pairs, num_experts),
        lambda: ({"BLOCK_SIZE": block_size}, {"num_warps": 1}),
    )
    return result


def moe_align_block_size(topk_ids: Tensor, block_size: int, num_experts: int) -> Alignment:
    """Sort pairs by expert (stable) and pad each expert's run to a multiple of block_size.

    topk_ids: (num_tokens, top_k) int32 or int64, contiguous; ids outside [0, num_experts) are another rank's, and
    come last in blocks of expert -1. Equals routing.moe_align_block_size_ref up to num_tokens_post_padded; entries
    past it are not written. Raises ShapeError, DtypeError, DeviceError, LayoutError, RuntimeModeError.
    """
    _check_once(topk_ids, block_size, num_experts)
    return _sorted(topk_ids, block_size, num_experts)


def _sorted(topk_ids: Tensor, block_size: int, num_experts: int) -> Alignment:
    num_pairs = topk_ids.numel()
    length = max_padded_pairs(num_pairs, block_size, num_experts)
    result = _allocate(length, block_size, num_pairs, num_experts, topk_ids.device)
    if num_pairs == 0:
        result.num_tokens_post_padded.zero_()
    elif slot_order.serves(kind := slot_order.aligned(block_size), topk_ids, num_experts):
        tokens, experts, total = result.sorted_token_ids, result.expert_ids, result.num_tokens_post_padded
        given = slot_order.arguments(topk_ids, num_experts, tokens, block_experts=experts, rows_in_use=total)
        slot_order.order_slots(kind, topk_ids, given)
    elif num_pairs <= _ONE_LAUNCH:
        _in_one_launch(topk_ids, result)
    else:
        _in_three_launches(topk_ids, result)
    return result


def _in_one_launch(topk_ids: Tensor, result: Alignment) -> None:
    num_pairs, block_size, num_experts = result.num_pairs, result.block_size, result.num_experts
    buckets = triton.next_power_of_2(num_experts + 2)
    chunk = next(size for size in (128, 512, _ONE_LAUNCH) if num_pairs <= size)
    constants = {"BLOCK_SIZE": block_size, "BUCKETS": buckets, "CHUNK": chunk}
    _align_small(
        (topk_ids.dtype, block_size, buckets, chunk),
        (num_experts + 1, 1),
        (topk_ids, result.sorted_token_ids, result.expert_ids, result.num_tokens_post_padded),
        (num_pairs, num_experts),
        lambda: (constants, {"num_warps": 8 if chunk == _ONE_LAUNCH else 4}),
    )  # fmt: skip


def _in_three_launches(topk_ids: Tensor, result: Alignment) -> None:
    num_pairs, block_size, num_experts = result.num_pairs, result.block_size, result.num_experts
    counts = chunk_counts(topk_ids, num_experts)
    chunks, buckets = counts.shape[0] - 1, counts.shape[1]
    sizes = {"BUCKETS": buckets, "CHUNK": CHUNK}
    _place(
        (topk_ids.dtype, block_size, buckets),
        (chunks + num_experts + 1, 1),
        (topk_ids, counts, counts[chunks], result.sorted_token_ids, result.expert_ids, result.num_tokens_post_padded),
        (num_pairs, num_experts, chunks),
        lambda: ({**sizes, "BLOCK_SIZE": block_size, "COLUMNS": 32}, {"num_warps": 8}),
    )  # fmt: skip


def align(topk_ids: Tensor, block_size: int, num_experts: int) -> Alignment:
    """`align_pairs` where a quarter as many pairs as experts can hardly meet, else `moe_align_block_size`.

    The quarter is vLLM's rule (0.33.0): at num_pairs = E/4 uniform routing repeats few experts.
    """
    _check_once(topk_ids, block_size, num_experts)
    return align_unchecked(topk_ids, block_size, num_experts)


def align_unchecked(topk_ids: Tensor, block_size: int, num_experts: int) -> Alignment:
    """`align`, for pipelines whose call was checked as a whole."""
    small = topk_ids.numel() * 4 <= num_experts
    return (_pairs if small else _sorted)(topk_ids, block_size, num_experts)
