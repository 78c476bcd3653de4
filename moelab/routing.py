"""Who goes where: top-k routing of tokens to experts, routings to measure under, and their alignment to tiles.

Everything here is torch and runs on any device without a host synchronisation, so that it may be captured in a
CUDA graph. Kernels that do the same work faster live in moelab.kernels (align, expert_order, route); this is what
they are checked with.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moelab.errors import RoutingError, ShapeError, UnknownNameError, nearest_names


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


def _check_top_k(num_experts: int, top_k: int) -> None:
    if not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise RoutingError(
            f"top_k = {top_k} with {num_experts} experts. Expected 1 <= top_k <= num_experts, "
            "since a token goes to an expert at most once. Lower top_k."
        )


def _check_logits(logits: Tensor, top_k: int) -> None:
    if logits.ndim != 2:
        raise ShapeError(
            f"Router logits have shape {tuple(logits.shape)}. Expected (num_tokens, num_experts). Flatten the batch "
            "first."
        )
    _check_top_k(logits.shape[1], top_k)


def softmax_topk(logits: Tensor, top_k: int, *, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """Softmax over experts, then the top_k of each token (Mixtral, Qwen-MoE).

    logits: (num_tokens, num_experts), any float dtype; computed in float32. Ties fall as torch.topk lets them.
    Returns topk_weights (num_tokens, top_k) float32 and topk_ids (num_tokens, top_k) int32.
    renormalize: make each token's weights sum to 1 (Qwen3's norm_topk_prob).
    Raises ShapeError on another rank, RoutingError where top_k does not fit.
    """
    _check_logits(logits, top_k)
    weights, ids = torch.softmax(logits.float(), dim=-1).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, ids.int()


def sigmoid_topk(
    logits: Tensor, top_k: int, *, correction_bias: Tensor | None = None, renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Sigmoid scores; the bias chooses experts but does not weigh them (Llama-4 with top_k 1, LFM2-MoE).

    Shapes, dtypes and errors as in `softmax_topk`; correction_bias: (num_experts,) float.
    """
    return grouped_topk(logits, top_k, score="sigmoid", correction_bias=correction_bias, renormalize=renormalize)


def grouped_topk(
    logits: Tensor,
    top_k: int,
    *,
    num_groups: int = 1,
    top_k_groups: int = 1,
    score: str = "softmax",
    correction_bias: Tensor | None = None,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Top-k among the experts of the best groups (DeepSeek-V2: softmax; DeepSeek-V3: sigmoid with a bias).

    A group's score is its best expert's without a bias, and the sum of its two best with one, as in the
    DeepSeek-V2 and -V3 reports (arXiv 2405.04434 section 2.1.2, arXiv 2412.19437 section 2.1.2).
    Which experts: by logit without a bias (Llama 4 does so; scores round neighbours to ties), by score + bias with one;
    greatest first, of equals the lower id. A NaN is greater than all, so that it reaches a weight and is seen.
    Shapes and dtypes as in `softmax_topk`, float64 logits in float64; with top_k = 1 weights are not renormalised, as in
    those models, whose single weight would become 1. Raises RoutingError where the groups do not divide the experts, or
    the chosen groups hold fewer than top_k experts, UnknownNameError on another score.
    """
    _check_logits(logits, top_k)
    check_router(logits.shape[1], top_k, num_groups, top_k_groups, score, correction_bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = SCORES[score](logits)
    choice = logits if correction_bias is None else scores + correction_bias.to(scores.dtype)
    order = _descending(choice)
    if num_groups > 1:
        grouped = choice.unflatten(1, (num_groups, -1))
        two = correction_bias is not None and grouped.shape[2] > 1
        best = grouped.gather(2, _descending(grouped)[..., : 1 + two]).sum(-1)
        keep = torch.zeros_like(best).scatter_(1, _descending(best)[:, :top_k_groups], 1.0)
        kept = keep.repeat_interleave(grouped.shape[2], dim=1).gather(1, order)
        order = order.gather(1, _descending(kept))
    ids = order[:, :top_k]
    weights = scores.gather(1, ids)
    if renormalize and top_k > 1:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * routed_scaling_factor, ids.int()


SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
    "sigmoid": torch.sigmoid,
}
"""What a router makes of its logits, by name; both grow with the logit."""


def _descending(values: Tensor) -> Tensor:
    """Places along the last dimension, the greatest value first: NaN before all, equals in order of their place."""
    return values.sort(dim=-1, descending=True, stable=True).indices


def check_router(
    num_experts: int,
    top_k: int,
    num_groups: int = 1,
    top_k_groups: int = 1,
    score: str = "softmax",
    correction_bias: Tensor | None = None,
) -> None:
    """Raise RoutingError, UnknownNameError or ShapeError unless a router's rule fits its experts, as `grouped_topk` says."""
    _check_top_k(num_experts, top_k)
    if score not in SCORES:
        raise UnknownNameError(f"Unknown score {score!r}. Expected one of {sorted(SCORES)}. Name one of them.")
    if num_groups < 1 or num_experts % num_groups or not 1 <= top_k_groups <= num_groups:
        raise RoutingError(
            f"{num_groups} groups ({top_k_groups} chosen) over {num_experts} experts. Expected groups that divide the "
            "experts, and 1 <= top_k_groups <= num_groups. Take n_group and topk_group from the model's config.json."
        )
    if top_k > top_k_groups * (num_experts // num_groups):
        raise RoutingError(
            f"top_k = {top_k} but {top_k_groups} groups hold {top_k_groups * (num_experts // num_groups)} experts. "
            "Expected top_k experts to choose from. Raise top_k_groups."
        )
    if correction_bias is not None and correction_bias.shape != (num_experts,):
        raise ShapeError(
            f"correction_bias has shape {tuple(correction_bias.shape)}. Expected ({num_experts},): one value an expert. "
            "Pass the layer's e_score_correction_bias."
        )


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
    _check_top_k(num_experts, top_k)
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
    """topk_ids recorded from a server, (num_tokens, top_k): a .npy array, a .pt tensor (loaded with weights_only), or a
    .safetensors file of one tensor.

    Weights are uniform, 1 / top_k: timing does not depend on them. Raises RoutingError on a file that cannot be
    read, another rank, ids that are no integers or out of range, or the same expert twice for one token.
    """
    path = Path(path)
    try:
        ids = _READERS.get(path.suffix, _read_npy)(path)
    except (OSError, ValueError, EOFError, RuntimeError, TypeError, LookupError, pickle.UnpicklingError) as error:
        # torch's own text would suggest weights_only=False, which runs whatever code the file holds.
        why = error if isinstance(error, OSError) else type(error).__name__
        raise RoutingError(
            f"Cannot read a routing from {path}: {why}. Expected .npy, .pt or .safetensors holding (num_tokens, top_k) "
            "integer ids. "
            "Record topk_ids again."
        ) from error
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise RoutingError(
            f"{path} holds {found}. Expected an integer array (num_tokens, top_k). Save topk_ids of one layer."
        )
    check_ids(ids, num_experts)
    _check_top_k(num_experts, ids.shape[1])
    weights = torch.full(ids.shape, 1.0 / ids.shape[1])
    return Routing(ids.int().to(device), weights.to(device), num_experts, path.name)


def _read_npy(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path))


def _read_pt(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def _read_safetensors(path: Path) -> Tensor:
    """The only tensor of a safetensors file. Its format: the length of a JSON header (8 bytes, little-endian), the header
    with each tensor's dtype, shape and data_offsets, then the data (the README of its project, section Format)."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {name: about for name, about in json.loads(data[8:start]).items() if name != "__metadata__"}
    (about,) = tensors.values()
    low, high = about["data_offsets"]
    kind = np.dtype(_SAFETENSORS_INTEGERS[about["dtype"]])
    return torch.from_numpy(np.frombuffer(data[start + low : start + high], kind).reshape(about["shape"]).copy())


_SAFETENSORS_INTEGERS = {"I16": "<i2", "I32": "<i4", "I64": "<i8", "I8": "i1", "U8": "u1"}
_READERS: Mapping[str, Callable[[Path], Any]] = {".pt": _read_pt, ".safetensors": _read_safetensors}


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
    _check_top_k(num_experts, top_k)
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


def check_local_experts(local_experts: range | None, num_experts: int) -> range:
    """The experts of this rank, all of them if None; raises RoutingError on a range that is no part of them."""
    local = range(num_experts) if local_experts is None else local_experts
    if local.step != 1 or not 0 <= local.start < local.stop <= num_experts:
        raise RoutingError(
            f"local_experts = {local} of {num_experts} experts. Expected range(first, last + 1) within "
            f"range(0, {num_experts}). Pass the experts whose weights this rank holds."
        )
    return local
