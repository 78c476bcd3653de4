"""What a run has measured, looked up by what was measured, whatever request it was asked in.

A compile or a short look is known by stage, batch size, rounds and config; configs that run the same program at a batch
size share what one of them measured. Finals are comparisons, sample beside sample: one is known to those that stood in it,
and to some of them; with a newcomer it has to be made again, whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from moelab.config import KernelConfig
from moelab.tuner.board import Board
from moelab.tuner.evaluate import Contender, Outcome, Request, Result
from moelab.tuner.problem import GEMMS, Gemm
from moelab.tuner.space import representatives

What = tuple[str, int, int, int, bool]
"""Stage, batch size, rounds, repeat, interleaved."""

Outcomes = dict[Contender, Outcome]


class Known:
    """Every result of a run, in the order measured. board: whose configs are asked for. results: those of a journal."""

    def __init__(self, board: Board, results: Iterable[Result] = ()) -> None:
        self.results: list[Result] = []
        self._board = board
        self._programs: dict[tuple[Gemm, int], dict[KernelConfig, KernelConfig]] = {}
        self._looks: dict[What, Outcomes] = {}
        self._comparisons: dict[What, list[Outcomes]] = {}
        self._told: set[tuple[What, Contender]] = set()
        for result in results:
            self._learn(result)

    def add(self, result: Result) -> None:
        """Take in what was measured just now; `untold` will not tell it."""
        self._learn(result)
        self._told.update((_what(result.request), contender) for contender in result.request.contenders)

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """What has to be measured before all of these can be answered: of a request for short looks what is left of it."""
        found: dict[Request, None] = {}
        for request in requests:
            known = self._outcomes(request)
            left = tuple(c for c, outcome in zip(request.contenders, known, strict=True) if outcome is None)
            if left:
                found[request if len(left) == len(known) else replace(request, contenders=left)] = None
        return list(found)

    def answer(self, request: Request) -> Result | None:
        """The result of a request; None unless all of it is known."""
        known = [outcome for outcome in self._outcomes(request) if outcome is not None]
        return Result(request, tuple(known)) if len(known) == len(request.contenders) else None

    def untold(self, requests: Iterable[Request]) -> Iterator[Result]:
        """What is known of these requests, each contender told once: for a board."""
        for request in requests:
            what, known = _what(request), zip(request.contenders, self._outcomes(request), strict=True)
            part = {c: o for c, o in known if o is not None and (what, c) not in self._told}
            if part:
                self._told.update((what, contender) for contender in part)
                yield Result(replace(request, contenders=tuple(part)), tuple(part.values()))

    def _learn(self, result: Result) -> None:
        self.results.append(result)
        what = _what(result.request)
        table: Outcomes = {}
        if result.request.interleaved:
            self._comparisons.setdefault(what, []).append(table)
        else:
            table = self._looks.setdefault(what, table)
        measured = list(zip(result.request.contenders, result.outcomes, strict=True))
        for contender, outcome in measured:
            table.setdefault(self._program(what, contender), outcome)
        table.update(measured)

    def _outcomes(self, request: Request) -> list[Outcome | None]:
        """Of each contender, None for what is not known; of a comparison all or none, from the latest that held them all."""
        what = _what(request)
        tables = self._comparisons.get(what, []) if request.interleaved else [self._looks.get(what, {})]
        for table in filter(None, reversed(tables)):
            found = [table.get(c) or table.get(self._program(what, c)) for c in request.contenders]
            if not request.interleaved or None not in found:
                return found
        return [None] * len(request.contenders)

    def _program(self, what: What, contender: Contender) -> Contender:
        """The contender that stands for all that run the same program there; what is only compiled is nobody else's."""
        stage, num_tokens, rounds, *_ = what
        if rounds == 0:
            return contender
        sides: Sequence[Gemm] = GEMMS if stage == "layer" else [gemm for gemm in GEMMS if gemm == stage]
        return tuple(
            self._same(gemm, num_tokens).get(config, config) for gemm, config in zip(sides, contender, strict=True)
        )

    def _same(self, gemm: Gemm, num_tokens: int) -> dict[KernelConfig, KernelConfig]:
        if (gemm, num_tokens) not in self._programs:
            configs = self._board.configs[gemm]
            self._programs[gemm, num_tokens] = representatives(configs, self._board.problem, gemm, num_tokens)
        return self._programs[gemm, num_tokens]


def _what(request: Request) -> What:
    return request.stage, request.num_tokens, request.rounds, request.repeat, request.interleaved
