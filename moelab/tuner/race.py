"""The strategy `race`: a short look at everything that could win, a longer one at the best tenth, then the finals.

All batch sizes race together. At every other one (the anchors) each candidate gets a short look, cut to one sample for
those far behind the best of a few scouts. In between only what was among the best quarter at a neighbouring anchor is
looked at: neighbours share their winners, and the finals take over each other's best besides.
"""

from __future__ import annotations

import math

from moelab.tuner.evaluate import Request
from moelab.tuner.problem import GEMMS, Gemm
from moelab.tuner.search import Plan, Search, Step, by_turns, samples_of


def race(search: Search) -> Plan:
    """See the module. Its settings: brief, long, scouts, stop_factor, anchor_stride, between_share, long_share."""
    yield from search.compile_all()
    anchors, between = _anchors(search)
    chosen = {(gemm, b): _scouts(search, gemm, b) for b in anchors for gemm in GEMMS}
    brief = search.settings.brief
    first = [r for (gemm, b), scouts in chosen.items() for r in search.requests(gemm, b, scouts, brief)]
    ahead = _ahead(search)
    yield (Step("scouts", tuple(first), later=ahead))
    groups: list[list[Request]] = []
    for (gemm, b), scouts in chosen.items():
        others = search.by_promise(gemm, set(search.board.candidates(gemm, b)) - set(scouts))
        groups.append(search.requests(gemm, b, others, brief, stop_above_us=_bound(search, gemm, b)))
    rest = by_turns(groups)
    yield (Step("screen", rest, later=ahead - samples_of(rest)))
    near = [search.requests(gemm, b, _near(search, gemm, b, anchors), brief) for b in between for gemm in GEMMS]
    yield (Step("neighbours", by_turns(near)))
    longer: list[Request] = []
    for b in search.problem.batch_sizes:
        for gemm in GEMMS:
            longer += search.requests(gemm, b, _best_share(search, gemm, b), search.settings.long)
    yield (Step("longer", tuple(longer)))


def _anchors(search: Search) -> tuple[list[int], list[int]]:
    """Batch sizes that are looked at in full, the first and the last among them, and those in between."""
    sizes, stride = search.problem.batch_sizes, search.settings.anchor_stride
    anchors = [b for j, b in enumerate(sizes) if j % stride == 0 or j == len(sizes) - 1]
    return anchors, [b for b in sizes if b not in anchors]


def _scouts(search: Search, gemm: Gemm, num_tokens: int) -> list[int]:
    known = search.board.candidates(gemm, num_tokens)
    draws = search.draws(2, search.board.row[num_tokens], GEMMS.index(gemm))
    return sorted(known[i] for i in draws.permutation(len(known))[: search.settings.scouts])


def _bound(search: Search, gemm: Gemm, num_tokens: int) -> float | None:
    best = float(search.board.times(gemm, num_tokens).min(initial=math.inf))
    return best * search.settings.stop_factor if math.isfinite(best) else None


def _near(search: Search, gemm: Gemm, num_tokens: int, anchors: list[int]) -> list[int]:
    """The best share of the anchors on both sides, as programs of this batch size."""
    board = search.board
    sides = [max(b for b in anchors if b < num_tokens), min(b for b in anchors if b > num_tokens)]
    count = math.ceil(search.settings.between_share * len(search.space.configs[gemm]))
    same = board.representative[gemm][board.row[num_tokens]]
    return sorted({int(same[i]) for b in sides for i in board.ranked(gemm, b, count)})


def _best_share(search: Search, gemm: Gemm, num_tokens: int) -> list[int]:
    count = math.ceil(search.settings.long_share * len(search.board.candidates(gemm, num_tokens)))
    return sorted(search.board.ranked(gemm, num_tokens, max(count, search.settings.finalists)))


def _ahead(search: Search) -> int:
    """About how many samples follow the scouts: for the time still to go."""
    settings, sizes = search.settings, len(search.problem.batch_sizes)
    configs = sum(len(search.space.configs[gemm]) for gemm in GEMMS)
    screen = configs * settings.brief * sizes / settings.anchor_stride * (1 + settings.between_share)
    final = 2 * sizes * settings.finalists * settings.final + sizes * settings.pairs * settings.layer
    return int(screen + configs * sizes * settings.long_share * settings.long + final)
