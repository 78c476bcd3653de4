"""What is timed: a prefill, a decode step, and the experts of all layers alone, each as one call without arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moelab import hf
from moelab.serving.routes import Asked

AHEAD = 8
"""Steps that a decode's cache has room for behind its context: a sample takes at most so many."""


def nothing() -> None:
    """Of what needs no rewinding."""


@dataclass(frozen=True)
class Work:
    """kind: "prefill", "decode" or "experts". num_tokens: rows that each block of experts gets. run: once, without waiting for
    the device, so that a CUDA graph can capture it. rewind: before a sample. at_most: runs a sample."""

    kind: str
    num_tokens: int
    run: Callable[[], Any]
    rewind: Callable[[], None] = nothing
    at_most: int = AHEAD


def random_ids(model: Any, batch: int, length: int, seed: int = 0) -> Tensor:
    """(batch, length) int64 ids of the model's vocabulary, on its device."""
    drawn = torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
    return drawn.to(model.device)


def prefill(model: Any, batch: int, length: int) -> Work:
    """One forward of whole prompts to their next token: the first token's time, without a queue."""
    ids = random_ids(model, batch, length)

    def run() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)

    return Work("prefill", batch * length, run)


def decode(model: Any, batch: int, context: int) -> Work:
    """One token more for each of `batch` sequences of `context` tokens: the next token's time.

    Keys and values are drawn, not computed: what they hold changes no time, and a prefill of every contender would cost minutes.
    """
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=context + AHEAD + 1)
    first = random_ids(model, batch, 1)
    tokens = first.clone()

    def run() -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
            return tokens.copy_(logits[:, -1:].argmax(-1))

    def rewind() -> None:
        tokens.copy_(first)
        for layer in cache.layers:
            if isinstance(length := getattr(layer, "cumulative_length", None), Tensor):
                length.fill_(context)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = context

    run()  # makes the cache's tensors
    for layer in cache.layers:
        for name in ("keys", "values"):
            if isinstance(held := getattr(layer, name, None), Tensor):
                held.normal_()
    rewind()
    return Work("decode", batch, run, rewind)


def experts(model: Any, found: Mapping[str, Asked]) -> Work:
    """Every block of experts once, over normal values, asked as a forward asked them: their share of a step.

    The weights of one layer leave the cache before they are read again, as in the step.
    """
    blocks = hf.experts_of(model)
    tokens = len(next(iter(found.values())).ids)
    weight = next(iter(blocks.values())).down_proj
    states = torch.randn((tokens, weight.shape[1]), generator=torch.Generator().manual_seed(0))
    states = states.to(weight.device, model.dtype)

    def run() -> Tensor:
        with torch.no_grad():
            for name, one in found.items():
                out = blocks[name](states, one.ids, one.weights)
        return out

    return Work("experts", tokens, run)
