"""Where each chunk of a batch's expert ids begins within every expert: what sorting many slots by expert stands on.

Two launches, deterministic, no host synchronisation: chunks are counted, then scanned over chunks. The third, which
places the slots, is the caller's: `align` pads each expert's run, `expert_order` does not.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.kernels.launch import Launcher  # noqa: E402
from moelab.kernels.tiles import bucket_of, start_next  # noqa: E402

# Chunks of 128 in 8 warps were the fastest of a sweep on an H200, up to 65,536 pairs of 256 experts.
CHUNK = 128


@triton.jit(do_not_specialize=["num_pairs", "num_experts"])
def _count_kernel(
    ids_ptr, counts_ptr, num_pairs, num_experts, BUCKETS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr = False
):
    """counts[chunk, bucket]: the pairs of each bucket in one chunk."""
    start_next(PDL)
    chunk = tl.program_id(0)
    pairs = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = pairs < num_pairs
    found = bucket_of(tl.load(ids_ptr + pairs, mask=inside, other=0), num_experts)
    # Lanes past num_pairs count in a bin that no bucket uses: BUCKETS > num_experts + 1.
    counts = tl.histogram(tl.where(inside, found, BUCKETS - 1), BUCKETS)
    lanes = tl.arange(0, BUCKETS)
    tl.store(counts_ptr + chunk * BUCKETS + lanes, tl.where(lanes <= num_experts, counts, 0))


@triton.jit(do_not_specialize=["num_chunks"])
def _scan_kernel(
    counts_ptr, totals_ptr, num_chunks, BUCKETS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr = False
):
    """Replace counts[chunk, bucket] by the pairs of that bucket in earlier chunks; totals[bucket]. One program a bucket."""
    start_next(PDL)
    bucket = tl.program_id(0)
    before = 0
    for first in range(0, num_chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)
        ptrs = counts_ptr + chunk * BUCKETS + bucket
        counts = tl.load(ptrs, mask=chunk < num_chunks, other=0)
        tl.store(ptrs, before + tl.cumsum(counts, axis=0) - counts, mask=chunk < num_chunks)
        before += tl.sum(counts, axis=0)
    tl.store(totals_ptr + bucket, before)


@triton.jit
def rank_in_chunk(ids_ptr, pairs, found, num_pairs, num_experts, CHUNK: tl.constexpr, COLUMNS: tl.constexpr):
    """How many earlier pairs of its chunk share each pair's bucket: compared COLUMNS at a time."""
    rank = tl.zeros((CHUNK,), dtype=tl.int32)
    for first in range(0, CHUNK, COLUMNS):
        other_pairs = tl.program_id(0) * CHUNK + first + tl.arange(0, COLUMNS)
        other = bucket_of(tl.load(ids_ptr + other_pairs, mask=other_pairs < num_pairs, other=0), num_experts)
        earlier = (other[None, :] == found[:, None]) & (other_pairs[None, :] < pairs[:, None])
        rank += tl.sum(earlier.to(tl.int32), axis=1)
    return rank


_count = Launcher(_count_kernel)
_scan = Launcher(_scan_kernel)


def chunk_counts(ids: Tensor, num_experts: int) -> Tensor:
    """(chunks + 1, buckets) int32: the pairs of each bucket in the chunks before this one; the last row holds them all.

    ids: integers, contiguous, checked by the caller; bucket e is expert e, bucket num_experts that of all other ids.
    buckets: a power of two with one to spare; past bucket num_experts the last row is not written.
    """
    num_pairs = ids.numel()
    buckets = triton.next_power_of_2(num_experts + 2)
    chunks = -(-num_pairs // CHUNK)
    counts = torch.empty((chunks + 1, buckets), dtype=torch.int32, device=ids.device)
    _count(
        (ids.dtype, buckets),
        (chunks, 1),
        (ids, counts),
        (num_pairs, num_experts),
        lambda: ({"BUCKETS": buckets, "CHUNK": CHUNK}, {"num_warps": 4}),
    )
    _scan(
        buckets,
        (num_experts + 1, 1),
        (counts, counts[chunks]),
        (chunks,),
        lambda: ({"BUCKETS": buckets, "ROWS": 128}, {"num_warps": 4}),
    )
    return counts
