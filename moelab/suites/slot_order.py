"""Sorting a batch's slots by expert, alone: in one launch for Hopper, and by Triton's one to four, padded, dense, and in tiles.

What every layer here begins with. There is next to nothing to move, so that launches, and the depth of one, are all it takes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moelab import runtime
from moelab.errors import PrecisionError
from moelab.kernels import slot_order
from moelab.kernels.align import moe_align_block_size
from moelab.kernels.expert_order import expert_order, ordered_tiles
from moelab.measure import Protocol, measure
from moelab.recordings import Recording
from moelab.routing import Alignment, Routing, make_routing, moe_align_block_size_ref
from moelab.suites.partial import OnRows, ignore

CASES = tuple((tokens, top_k, experts) for experts, top_k in ((8, 2), (32, 4), (128, 8), (256, 8), (384, 8), (512, 10))
              for tokens in (1, 12, 64, 128, 512, 2048, 8192))  # fmt: skip
"""num_tokens, top_k, num_experts."""

BLOCK, TILE, GRAIN = 16, 48, 16
"""Rows of a block, of a tile, and of what a tile's are a multiple of."""

KINDS: dict[str, Callable[[Tensor, int], Any]] = {
    "aligned": lambda ids, experts: moe_align_block_size(ids, BLOCK, experts),
    "dense": expert_order,
    "tiled": lambda ids, experts: ordered_tiles(ids, experts, TILE, GRAIN),
}

IMPLEMENTATIONS = {"triton": (False, False), "cuda": (True, False), "cuda, PDL": (True, True)}
"""Whether slot_order.cu serves, and begins while the launch before it ends, which here is another of its kind."""

ROTATIONS = 8


@contextlib.contextmanager
def forced(serves: bool, overlap: bool = True) -> Iterator[None]:
    """Inside, slot_order.cu does all that it takes, or nothing."""
    before = slot_order.serves
    slot_order.serves, slot_order.OVERLAP = (slot_order.takes if serves else lambda *_: False), overlap
    try:
        yield
    finally:
        slot_order.serves, slot_order.OVERLAP = before, True


def _sorted(kind: str, impl: str, routing: Routing) -> Tensor:
    """The slots in their order, by that implementation."""
    with forced(*IMPLEMENTATIONS[impl]):
        found = KINDS[kind](routing.topk_ids, routing.num_experts)
    return found.sorted_token_ids if isinstance(found, Alignment) else found.sorted_slots


def _rotated(kind: str, impl: str, routings: Sequence[Routing], i: int) -> Tensor:
    return _sorted(kind, impl, routings[i])


def _check(kind: str, routing: Routing) -> None:
    """Raise PrecisionError unless all implementations give the same rows."""
    aligned = moe_align_block_size_ref(routing.topk_ids, BLOCK, routing.num_experts)
    used = int(aligned.num_tokens_post_padded) if kind == "aligned" else routing.topk_ids.numel()
    for impl in IMPLEMENTATIONS:
        if not torch.equal(_sorted(kind, impl, routing)[:used], _sorted(kind, "triton", routing)[:used]):
            raise PrecisionError(
                f"{impl}'s {kind} rows of {tuple(routing.topk_ids.shape)} ids differ from Triton's. Expected the same. Report it."
            )


def record(cases: Sequence[tuple[int, int, int]] = CASES, on_rows: OnRows = ignore) -> Recording:
    """Every kind at every size, its two implementations interleaved, checked against each other first.

    Raises RuntimeModeError without a Hopper GPU.
    """
    runtime.require_cuda("the suite 'slot_order'")
    protocol, rows = Protocol(rotations=ROTATIONS, rounds=15, graph_us=300.0), list[dict[str, Any]]()
    for num_tokens, top_k, num_experts in cases:
        draw = functools.partial(make_routing, "uniform", num_tokens, num_experts, top_k, device="cuda")
        routings = [draw(seed=i) for i in range(ROTATIONS)]
        for kind in KINDS:
            _check(kind, routings[0])
            run = {impl: functools.partial(_rotated, kind, impl, routings) for impl in IMPLEMENTATIONS}
            size = {"kind": kind, "num_tokens": num_tokens, "top_k": top_k, "num_experts": num_experts}
            rows += [
                {**size, "impl": impl, "samples_us": list(found.samples_us)}
                for impl, found in measure(run, protocol).items()
            ]
        on_rows(rows)
    return Recording("slot_order", runtime.provenance(seed=0), protocol.describe(), tuple(rows))
