"""Where the tokens of a model with random weights go: as its gates say, or as a routing says in their place.

Gates of random weights route degenerately, so that a step would read fewer experts than one of a trained model. A hook on each
block of experts replaces the ids, and leaves the gate's work, and its weights, in the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moelab import hf
from moelab.errors import RoutingError, UnknownNameError, nearest_names
from moelab.routing import ROUTINGS as POPULARITIES
from moelab.routing import count_experts, load_routing, make_routing

ROUTINGS = ("balanced", "real", *POPULARITIES)
"""balanced: each expert gets as many tokens as any other, or one more. real: the model's own gates."""


def require_routing(name: str) -> str:
    """The name, or the folder. Raises UnknownNameError for another."""
    if name not in ROUTINGS and not Path(name).is_dir():
        raise UnknownNameError(
            f"Unknown routing {name!r}. Expected one of {', '.join(ROUTINGS)}, or a folder that moelab.hf.save_routing wrote."
            f"{nearest_names(name, ROUTINGS)} Name one of them."
        )
    return name


def table(name: str, num_tokens: int, num_experts: int, top_k: int) -> np.ndarray:
    """(num_tokens, top_k) int64 ids, distinct in a row: of "balanced" the experts in turn, else as popular as `name` says."""
    if name == "balanced":
        return np.arange(num_tokens * top_k).reshape(num_tokens, top_k) % num_experts
    return make_routing(name, num_tokens, num_experts, top_k).topk_ids.numpy().astype(np.int64)


@contextmanager
def routed(model: nn.Module, name: str, most_tokens: int, seed: int = 0) -> Iterator[None]:
    """Within it, each block's ids are those of the table, its experts shuffled anew for each block, or those of its file in the
    folder; nothing for "real".

    most_tokens: of a forward; a longer one takes the table again from its start. Raises RoutingError for another model's folder.
    """
    if require_routing(name) == "real":
        yield
        return
    blocks = hf.experts_of(model)
    found = _drawn(blocks, name, most_tokens, seed) if name in ROUTINGS else _saved(blocks, Path(name))
    handles = [
        block.register_forward_pre_hook(_replacing(torch.from_numpy(found[path]).to(block.down_proj.device)))
        for path, block in blocks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _drawn(blocks: Mapping[str, Any], name: str, most_tokens: int, seed: int) -> dict[str, np.ndarray]:
    shuffled, tables = np.random.default_rng(seed), dict[tuple[int, int], np.ndarray]()
    found = {}
    for path, block in blocks.items():
        experts, top_k = block.down_proj.shape[0], top_k_of(block)
        if (experts, top_k) not in tables:
            tables[experts, top_k] = table(name, most_tokens, experts, top_k)
        found[path] = shuffled.permutation(experts)[tables[experts, top_k]]
    return found


def _saved(blocks: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray]:
    """What `moelab.hf.save_routing` wrote of such a model, a file a block."""
    lacking = [path for path in blocks if not (folder / f"{path}.npy").is_file()]
    if lacking:
        raise RoutingError(
            f"{folder} has no {lacking[0]}.npy, nor {len(lacking) - 1} others of {len(blocks)}. Expected a file for each "
            "block of experts. Record the routing of this model: moelab.hf.captured_routing, then save_routing."
        )
    found = {}
    for path, block in blocks.items():
        recorded = load_routing(folder / f"{path}.npy", block.down_proj.shape[0])
        if recorded.top_k != top_k_of(block) or recorded.num_tokens == 0:
            raise RoutingError(
                f"{folder / path}.npy holds {recorded.num_tokens} tokens of {recorded.top_k} experts each. Expected at least "
                f"one, of {top_k_of(block)} experts. Record the routing of this model."
            )
        found[path] = recorded.topk_ids.numpy().astype(np.int64)
    return found


def top_k_of(block: Any) -> int:
    """Experts that a token goes to, as the block's config names it."""
    config = block.config
    return next(int(found) for name in ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "num_experts_per_token")
                if (found := getattr(config, name, None)))  # fmt: skip


def _replacing(ids: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens = args[1].shape[0]
        taken = ids[:tokens] if tokens <= len(ids) else ids.repeat(-(-tokens // len(ids)), 1)[:tokens]
        return args[0], taken.to(args[1].dtype), *args[2:]

    return hook


@dataclass(frozen=True)
class Asked:
    """What one block of experts was asked in a forward: ids (T, k) and weights (T, k), as transformers passes them."""

    ids: Tensor
    weights: Tensor


@contextmanager
def asked(model: nn.Module) -> Iterator[dict[str, Asked]]:
    """Within it, block -> what its last forward was asked, after `routed` has had its say; stays on the device."""
    found: dict[str, Asked] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            found[name] = Asked(args[1].clone(), args[2].clone())

        return keep

    handles = [block.register_forward_pre_hook(hook(name)) for name, block in hf.experts_of(model).items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def load_of(model: nn.Module, found: Mapping[str, Asked]) -> dict[str, float]:
    """experts_touched: mean over blocks; load: the fullest expert's tokens over the mean, mean over blocks."""
    blocks = hf.experts_of(model)
    counts = [count_experts(one.ids, blocks[name].down_proj.shape[0]).double() for name, one in found.items()]
    touched = [float((count > 0).sum()) for count in counts]
    load = [float(count.max() / count.mean()) for count in counts]
    return {"experts_touched": sum(touched) / len(touched), "load": sum(load) / len(load)}
