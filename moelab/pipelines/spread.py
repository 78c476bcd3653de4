"""How many rows experts get of a batch whose routing nobody has seen: the expectation that a form's time is predicted from."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_EXACT = 60.0
"""Mean rows of an expert up to which each number of rows is looked at; above, a few quantiles of a normal distribution."""

_QUANTILES = np.linspace(-2.4, 2.4, 13)
_GROUPS = 32
"""Of experts of nearly the same popularity, for a skewed batch: the first few alone, then ever more together."""


class Batch(NamedTuple):
    """Sizes as on this rank. rows: that an expert is expected to get on average, above 0 and at most num_tokens."""

    num_tokens: int
    top_k: int
    num_experts: int
    hidden_size: int
    moe_intermediate_size: int
    rows: float

    @property
    def share(self) -> float:
        """Of all tokens that an expert gets; top_k over the experts of the whole model."""
        return min(self.rows / self.num_tokens, 1.0)


class Spread(NamedTuple):
    """So many experts of this rank get so many rows each, at least one: two arrays of one length."""

    rows: Floats
    experts: Floats

    @property
    def touched(self) -> float:
        """Experts with any rows."""
        return float(self.experts.sum())

    @property
    def pairs(self) -> float:
        """Of a token and an expert of this rank."""
        return float(self.rows @ self.experts)

    def blocks(self, size: int) -> float:
        """Blocks of so many rows of one expert each."""
        return float(np.ceil(self.rows / size) @ self.experts)


def expected(batch: Batch, *, skewed: bool = False) -> Spread:
    """Tokens choose evenly, or, skewed, each expert in proportion to one over its rank in popularity (Zipf), and this rank has
    experts of every rank. A token chooses an expert once; numbers of rows are binomial."""
    return _expected(batch.num_tokens, batch.num_experts, batch.top_k, batch.share, skewed)


@functools.lru_cache(maxsize=256)
def _expected(num_tokens: int, num_experts: int, top_k: int, share: float, skewed: bool) -> Spread:
    shares, weights = np.array([share]), np.array([float(num_experts)])
    if skewed and share < 1:
        everywhere = max(round(top_k / share), num_experts, 2)
        shares, weights = _popular(everywhere, share * everywhere)
        weights = weights * num_experts / everywhere
    rows, experts = [], []
    few = shares * num_tokens < _EXACT
    if few.any():
        n, probability = _binomial(num_tokens, shares[few])
        rows.append(n)
        experts.append(weights[few] @ probability)
    if not few.all():
        mean = shares[~few] * num_tokens
        width = np.sqrt(mean * (1 - shares[~few]))
        found = np.clip(np.round(mean[:, None] + width[:, None] * _QUANTILES), 1, num_tokens)
        of_quantile = np.exp(-_QUANTILES * _QUANTILES / 2)
        rows.append(found.ravel())
        experts.append((weights[~few, None] * (of_quantile / of_quantile.sum())).ravel())
    return Spread(np.concatenate(rows), np.concatenate(experts))


def _popular(experts: int, chosen: float) -> tuple[Floats, Floats]:
    """Shares of tokens that groups of experts get, and experts of each group, where a token chooses that many in all by Zipf."""
    ends = np.unique(np.round(np.geomspace(1, experts, _GROUPS)).astype(int))
    first = np.concatenate([[0], ends[:-1]])
    sizes = (ends - first).astype(float)
    popularity = 1 / np.sqrt((first + 1.0) * ends)
    low, high = 1e-9, 1e12
    for _ in range(60):  # without replacement: 1 - exp(-c p), for the c that makes `chosen` of them
        middle = np.sqrt(low * high)
        low, high = (middle, high) if sizes @ -np.expm1(-middle * popularity) < chosen else (low, middle)
    return -np.expm1(-low * popularity), sizes


def _binomial(num_tokens: int, shares: Floats) -> tuple[Floats, Floats]:
    """Numbers of rows from 1 on, and for each share the probability of each."""
    most = min(num_tokens, int(shares.max() * num_tokens + 6 * np.sqrt(shares.max() * num_tokens) + 8))
    n = np.arange(1.0, most + 1)
    choose = np.cumsum(np.log((num_tokens - n + 1) / n))
    with np.errstate(divide="ignore", invalid="ignore"):
        log = choose + n * np.log(shares)[:, None] + (num_tokens - n) * np.log1p(-shares)[:, None]
    log[:, n == num_tokens] = num_tokens * np.log(shares)[:, None]
    return n, np.exp(np.where(np.isnan(log), -np.inf, log))


def realised(counts: Iterable[int], routings: int = 1) -> Spread:
    """Of tokens that each expert got, over so many routings: their mean."""
    rows, experts = np.unique([count for count in counts if count], return_counts=True)
    return Spread(rows.astype(float), experts / routings)
