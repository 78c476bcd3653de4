"""The strategies by name, and two plain ones: everything (`grid`), and a random sample (`random`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moelab.errors import UnknownNameError, nearest_names
from moelab.tuner.forest import forest
from moelab.tuner.problem import GEMMS
from moelab.tuner.race import race
from moelab.tuner.search import Finals, Plan, Search, Step, by_turns, finals


def grid(search: Search) -> Plan:
    """Every candidate at every batch size, `long` samples each: what records a landscape."""
    yield from search.compile_all()
    groups = [
        search.requests(gemm, b, search.board.candidates(gemm, b), search.settings.long)
        for b in search.problem.batch_sizes
        for gemm in GEMMS
    ]
    yield (Step("grid", by_turns(groups)))


def random(search: Search) -> Plan:
    """A `fraction` of each GEMM's configs, the same at every batch size so that few are compiled, `long` samples each."""
    groups = []
    for side, gemm in enumerate(GEMMS):
        configs = len(search.space.configs[gemm])
        chosen = set(search.draws(1, side).permutation(configs)[: max(1, round(search.settings.fraction * configs))])
        for b in search.problem.batch_sizes:
            row = search.board.representative[gemm][search.board.row[b]]
            programs = sorted({int(row[i]) for i in chosen})
            groups.append(search.requests(gemm, b, programs, search.settings.long))
    yield (Step("random", by_turns(groups)))


STRATEGIES: Mapping[str, Callable[[Search], Plan]] = {"race": race, "forest": forest, "grid": grid, "random": random}
"""Strategies by name. Each fills the board; `plan` ends all of them with the same finals."""


def plan(name: str, search: Search) -> Finals:
    """The whole search by the strategy of that name. Raises UnknownNameError for another."""
    if name not in STRATEGIES:
        raise UnknownNameError(
            f"Unknown strategy {name!r}.{nearest_names(name, STRATEGIES)} Expected one of {', '.join(STRATEGIES)}. Name one."
        )
    return _plan(name, search)


def _plan(name: str, search: Search) -> Finals:
    yield from STRATEGIES[name](search)
    return (yield from finals(search))
