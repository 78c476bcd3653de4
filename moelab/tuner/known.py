"""What a run has measured, looked up by what was measured, whatever request it was asked in.

A compile or a short look is known by stage, batch size, rounds and config; configs that run the same program at a batch
size share what one of them measured. Finals are comparisons, sample beside sample: one is known to those that stood in it,
and to some of them; with a newcomer it has to be made again, whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        self._aliases: dict[What, Outcomes] = {}
        for result in results:
            self._learn(result)
        self._held = {what: len(table) for what, table in self._looks.items()}

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
        what, measured = _what(result.request), zip(result.request.contenders, result.outcomes, strict=True)
        if result.request.interleaved:
            self._comparisons.setdefault(what, []).append(dict(measured))
        else:
            self._looks.setdefault(what, {}).update(measured)

    def _outcomes(self, request: Request) -> list[Outcome | None]:
        """Of each contender, None for what is not known; of a comparison all or none, from the latest that held them all."""
        what = _what(request)
        if not request.interleaved:
            return self._found(request, self._looks.get(what, {}), lambda table: self._recalled(what, table))
        for table in reversed(self._comparisons.get(what, [])):
            found = self._found(request, table, lambda table: self._by_program(what, table.items()))
            if None not in found:
                return found
        return [None] * len(request.contenders)

    def _found(
        self, request: Request, table: Outcomes, by_program: Callable[[Outcomes], Outcomes]
    ) -> list[Outcome | None]:
        found = [table.get(contender) for contender in request.contenders]
        if None not in found or not table or request.rounds == 0:  # a compile is nobody else's
            return found
        what, same = _what(request), by_program(table)
        return [o or same.get(self._program(what, c)) for c, o in zip(request.contenders, found, strict=True)]

    def _recalled(self, what: What, table: Outcomes) -> Outcomes:
        """By program what the journal held, made when something is missing; a strategy asks for each program once itself."""
        if what not in self._aliases:
            self._aliases[what] = self._by_program(what, itertools.islice(table.items(), self._held.get(what, 0)))
        return self._aliases[what]

    def _by_program(self, what: What, items: Iterable[tuple[Contender, Outcome]]) -> Outcomes:
        return {self._program(what, contender): outcome for contender, outcome in items}

    def _program(self, what: What, contender: Contender) -> Contender:
        """The contender that stands for all that run the same program there."""
        stage, num_tokens, *_ = what
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
