"""The order in which configs are compiled, for a budget that does not reach all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from moelab.config import KernelConfig


def promising(configs: Sequence[KernelConfig], known: Sequence[KernelConfig], draws: np.random.Generator) -> list[int]:
    """Indices of all configs, the most promising first: those that are known, then by turns the nearest to one of them
    and one drawn at random. Winners lie near what has won before; the drawn ones find them where what is known is bad.

    Nearness is the sum over fields of the difference of logarithms, so that a tile twice as wide is one step away.
    """
    places = _places(configs)
    away = np.abs(places[:, None] - _places(known)[None]).sum(axis=2).min(axis=1, initial=np.inf)
    near, drawn = np.argsort(away, kind="stable").tolist(), draws.permutation(len(configs)).tolist()
    first = set(known)
    turns = [i for pair in zip(near, drawn, strict=True) for i in pair]
    return list(dict.fromkeys([*(i for i, config in enumerate(configs) if config in first), *turns]))


def _places(configs: Sequence[KernelConfig]) -> NDArray[np.float64]:
    """(configs, fields) logarithms; what a config leaves open, or has none of, counts as zero."""
    names = [field.name for field in fields(KernelConfig)]
    rows = [[getattr(config, name) or 0 for name in names] for config in configs]
    return np.log2(1.0 + np.array(rows, dtype=np.float64).reshape(len(rows), len(names)))
