"""Who goes where: routings to measure under, recorded ones, and the order and alignment of their slots.

Everything here is torch and runs on any device without a host synchronisation, so that it may be captured in a
CUDA graph. Kernels that do the same work faster live in moelab.kernels (align, expert_order, route); this is what
they are checked with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moelab.errors import RoutingError, UnknownNameError, nearest_names
from moelab.reading import UnreadableError
from moelab.routers import check_local_experts, check_top_k, grouped_topk
from moelab.routing_files import read_ids


@dataclass(frozen=True)
class Routing:
    """A routing of num_tokens tokens to top_k experts each.

    topk_ids: (num_tokens, top_k) int32, expert ids in [0, num_experts), or -1 for an expert of another rank.
    topk_weights: (num_tokens, top_k) float32.
    num_experts: experts of this rank. name: where the routing comes from, e.g. "uniform".
    """

    topk_ids: Tensor
    topk_weights: Tensor
    num_experts: int
    name: str = ""

    @property
    def num_tokens(self) -> int:
        return self.topk_ids.shape[0]

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]

    def tokens_per_expert(self) -> Tensor:
        """(num_experts,) int64: how many (token, slot) pairs each expert of this rank gets."""
        return count_experts(self.topk_ids, self.num_experts)

    def experts_touched(self) -> int:
        """How many experts of this rank get at least one token (synchronises with the host)."""
        return int((self.tokens_per_expert() > 0).sum())


@dataclass(frozen=True)
class Alignment:
    """Tokens sorted by expert and padded so that each BLOCK_SIZE_M rows belong to one expert.

    sorted_token_ids: (P,) int32, flat pair index token * top_k + slot; padding holds num_tokens * top_k.
    expert_ids: (P / block_size,) int32, the expert of each block; -1 where its rows are another rank's.
    num_tokens_post_padded: (1,) int32, how many entries of sorted_token_ids are in use.
    block_size: rows of a block. num_pairs, num_experts: what was aligned, and to how many experts.
    """

    sorted_token_ids: Tensor
    expert_ids: Tensor
    num_tokens_post_padded: Tensor
    block_size: int
    num_pairs: int
    num_experts: int

    @property
    def rows_in_use(self) -> int:
        """Rows that a grid must cover: with fewer pairs than a block has rows, at most one block per pair is in use."""
        return min(self.sorted_token_ids.shape[0], self.num_pairs * self.block_size)


@dataclass(frozen=True)
class ExpertOrder:
    """Slots sorted by expert, without padding.

    A slot is one of a token's top_k choices, t * top_k + j (a pair, in an Alignment).
    sorted_slots: (num_slots,) int32, the slots of expert 0 in ascending order, then those of expert 1, and so on; behind
    them num_slots, once for each slot whose expert is another rank's (id -1).
    expert_offsets: (num_experts + 1,) int32; expert e has sorted_slots[expert_offsets[e] : expert_offsets[e + 1]].
    """

    sorted_slots: Tensor
    expert_offsets: Tensor


@dataclass(frozen=True)
class Routed:
    """What a layer needs to know of its tokens' routing.

    topk_weights: (num_tokens, top_k) float32. topk_ids: (num_tokens, top_k) int32, -1 for another rank's expert.
    order: the slots by expert of this rank.
    """

    topk_weights: Tensor
    topk_ids: Tensor
    order: ExpertOrder


def count_experts(topk_ids: Tensor, num_experts: int) -> Tensor:
    """(num_experts,) int64 pairs per expert; ids outside [0, num_experts) are not counted. No host sync."""
    flat = topk_ids.flatten().long()
    flat = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]


# --- routings to measure under ------------------------------------------------------------------------------------


def _topk_by_popularity(popularity: np.ndarray, num_tokens: int, top_k: int, rng: np.random.Generator) -> np.ndarray:
    # Gumbel top-k draws top_k distinct experts with probability proportional to popularity, one after another.
    keys = np.log(popularity)[None, :] + rng.gumbel(size=(num_tokens, popularity.size))
    return (
        np.argpartition(-keys, top_k - 1, axis=1)[:, :top_k] if top_k < popularity.size else np.argsort(-keys, axis=1)
    )


def _uniform(num_experts: int, rng: np.random.Generator) -> np.ndarray:
    return np.full(num_experts, 1.0)


def _zipf(num_experts: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(1.0 / np.arange(1, num_experts + 1))


def _dirichlet(num_experts: int, rng: np.random.Generator) -> np.ndarray:
    # Concentration 0.3: a few hot experts and a long tail, as routers without balancing show.
    return np.maximum(rng.dirichlet(np.full(num_experts, 0.3)), 1e-12)


ROUTINGS = {"uniform": _uniform, "zipf": _zipf, "dirichlet": _dirichlet}


def make_routing(
    name: str, num_tokens: int, num_experts: int, top_k: int, *, seed: int = 0, device: str | torch.device = "cpu"
) -> Routing:
    """A random routing: every token draws top_k distinct experts by a popularity of the given kind.

    name: "uniform"; "zipf" (popularity 1/rank, ranks shuffled); "dirichlet" (popularity drawn once).
    The same arguments give the same routing on every device. Weights are positive and sum to 1 for each token.
    Raises RoutingError where top_k does not fit, UnknownNameError on another name.
    """
    if name not in ROUTINGS:
        raise UnknownNameError(
            f"Unknown routing {name!r}. Expected one of {sorted(ROUTINGS)}.{nearest_names(name, ROUTINGS)} "
            "Name one of them, or use load_routing(path) for topk_ids recorded from a server."
        )
    check_top_k(num_experts, top_k)
    if num_tokens < 0:
        raise RoutingError(f"num_tokens = {num_tokens}. Expected 0 or more. Pass the batch size.")
    rng = np.random.default_rng(seed)
    ids = _topk_by_popularity(ROUTINGS[name](num_experts, rng), num_tokens, top_k, rng)
    weights = rng.uniform(0.1, 1.0, size=ids.shape)
    weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-30)
    return Routing(
        torch.from_numpy(ids.astype(np.int32)).to(device),
        torch.from_numpy(weights.astype(np.float32)).to(device),
        num_experts,
        name,
    )


def load_routing(path: str | Path, num_experts: int, *, device: str | torch.device = "cpu") -> Routing:
    """topk_ids recorded from a server, (num_tokens, top_k): a .npy array, a .pt tensor (loaded with weights_only), a
    .safetensors file of one tensor, or FlashInfer-Bench's workloads of one layer, .jsonl, one after another.

    Weights are uniform, 1 / top_k: timing does not depend on them. Raises RoutingError on a file that cannot be
    read, another rank, ids that are no integers or out of range, or the same expert twice for one token.
    """
    path = Path(path)
    try:
        found = read_ids(path)
    except (OSError, UnreadableError) as error:
        raise _unreadable(path, f"it {error}" if isinstance(error, UnreadableError) else str(error.strerror)) from None
    except Exception as error:  # three parsers of other people's bytes, each with errors of its own
        # torch's own text would suggest weights_only=False, which runs whatever code the file holds.
        raise _unreadable(path, type(error).__name__) from error
    is_array = isinstance(found, np.ndarray)
    if not is_array or found.ndim != 2 or found.dtype.kind not in "iu" or found.size > LARGEST_SIZE:
        what = f"{found.dtype} {found.shape}" if is_array else type(found).__name__
        raise RoutingError(
            f"{path} holds {what}. Expected an integer array (num_tokens, top_k) of at most {LARGEST_SIZE:,} ids. Save "
            "topk_ids of one layer."
        )
    # What is beyond any number of experts stays beyond it; unsigned ids above 2^63 would come out negative.
    ids = torch.from_numpy((np.minimum(found, 2**31 - 1) if found.itemsize == 8 else found).astype(np.int64))
    check_ids(ids, num_experts)
    check_top_k(num_experts, ids.shape[1])
    weights = torch.full(ids.shape, 1.0 / ids.shape[1])
    return Routing(ids.int().to(device), weights.to(device), num_experts, path.name)


def _unreadable(path: Path, why: str) -> RoutingError:
    return RoutingError(
        f"Cannot read a routing from {path}: {why}. Expected .npy, .pt or .safetensors holding (num_tokens, top_k) integer "
        "ids, or a .jsonl of workloads that name such files. Record topk_ids again."
    )


LARGEST_SIZE = 1 << 27
"""Ids of the largest routing; a tensor of strides 0 could claim any number of them in a small file."""


def check_ids(topk_ids: Tensor, num_experts: int) -> None:
    """Raise RoutingError unless every id is -1 or in [0, num_experts), each at most once a token (host sync)."""
    if topk_ids.numel() == 0:
        return
    low, high = int(topk_ids.min()), int(topk_ids.max())
    if low < -1 or high >= num_experts:
        raise RoutingError(
            f"Expert ids span [{low}, {high}] with {num_experts} experts. Expected ids in [0, {num_experts}), or -1 "
            "for an expert of another rank. Map global ids to this rank's first."
        )
    ordered = topk_ids.sort(dim=1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise RoutingError(
            "A token names the same expert twice. Expected distinct experts in each row of topk_ids. "
            "Take them from one topk call."
        )


def expected_experts_touched(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Expected number of experts that get a token under uniform routing: E (1 - (1 - k/E)^M)."""
    check_top_k(num_experts, top_k)
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** num_tokens)


# --- alignment ----------------------------------------------------------------------------------------------------


def max_padded_pairs(num_pairs: int, block_size: int, num_experts: int, *, foreign: bool = True) -> int:
    """Upper bound on the padded length, a multiple of block_size.

    Each bucket in use wastes at most block_size - 1 rows, and at most min(num_pairs, buckets) are in use.
    foreign: count one bucket more, for pairs whose expert is another rank's.
    """
    buckets = min(num_pairs, num_experts + int(foreign))
    return -(-(num_pairs + buckets * (block_size - 1)) // block_size) * block_size


def moe_align_block_size_ref(topk_ids: Tensor, block_size: int, num_experts: int) -> Alignment:
    """Sort pairs by expert (stable) and pad each expert's run to block_size, in torch, without a host sync.

    topk_ids: (num_tokens, top_k) integer; pairs of id -1 (or out of range) come last, in blocks of expert -1.
    """
    flat = topk_ids.flatten().long()
    num_pairs, device = flat.numel(), flat.device
    bucket = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device).scatter_add_(
        0, bucket, torch.ones_like(flat)
    )
    padded = (counts + block_size - 1) // block_size * block_size
    ends = padded.cumsum(0)
    order = bucket.sort(stable=True).indices
    sorted_bucket = bucket[order]
    rank = torch.arange(num_pairs, device=device) - (counts.cumsum(0) - counts)[sorted_bucket]
    length = max_padded_pairs(num_pairs, block_size, num_experts)
    sorted_token_ids = torch.full((length,), num_pairs, dtype=torch.int32, device=device)
    sorted_token_ids[(ends - padded)[sorted_bucket] + rank] = order.int()
    starts = torch.arange(0, length, block_size, device=device)
    expert_ids = torch.searchsorted(ends, starts, right=True)
    expert_ids = torch.where(expert_ids >= num_experts, -1, expert_ids).int()
    return Alignment(sorted_token_ids, expert_ids, ends[-1:].int(), block_size, num_pairs, num_experts)


# --- order without padding ----------------------------------------------------------------------------------------


def expert_order_ref(topk_ids: Tensor, num_experts: int) -> ExpertOrder:
    """Slots sorted by expert (stable), in torch, without a host sync.

    topk_ids: (num_tokens, top_k) integer; ids outside [0, num_experts) are another rank's.
    """
    flat = topk_ids.flatten().long()
    here = (flat >= 0) & (flat < num_experts)
    order = torch.where(here, flat, num_experts).sort(stable=True).indices
    sorted_slots = torch.where(here[order], order, flat.numel())
    ends = count_experts(topk_ids, num_experts).cumsum(0)
    return ExpertOrder(sorted_slots.int(), torch.cat([ends.new_zeros(1), ends]).int())


def route_ref(logits: Tensor, top_k: int, *, local_experts: range | None = None, **rule: Any) -> Routed:
    """`grouped_topk` by its rule, then `expert_order_ref`; what moelab.kernels.route does in one launch.

    local_experts: the experts of this rank, of step 1, all of them if None; their ids then count from 0.
    """
    weights, ids = grouped_topk(logits, top_k, **rule)
    local = check_local_experts(local_experts, logits.shape[1])
    ids = torch.where((ids >= local.start) & (ids < local.stop), ids - local.start, -1)
    return Routed(weights, ids, expert_order_ref(ids, len(local)))
