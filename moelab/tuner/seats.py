"""What a cluster's evaluator keeps in mind: its actors' places, the requests to hand out, and what a new actor is told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moelab.tuner.compile import Kernel, kernels_of
from moelab.tuner.evaluate import Request, Result
from moelab.tuner.problem import GEMMS, Problem

COMPILE_CHUNK = 64
"""Kernels in a request that only compiles, where a strategy asked for none."""


@dataclass
class Seat:
    """One place in the cluster. clock_s: seconds its actors worked in this step; busy: requests handed to it."""

    number: int
    actor: Any = None
    node: str = ""
    clock_s: float = 0.0
    busy: int = 0
    losses: int = 0
    up: bool = False


@dataclass
class Job:
    """A request to hand out; node: where it has to be done, None for anywhere. dropped: nobody waits for it any more."""

    request: Request
    node: str | None = None
    dropped: bool = False


@dataclass
class Known:
    """What a new actor is told: what is compiled, on which nodes, and who lost workers. charge: kernel -> seconds of
    compiling that no result has been charged with yet."""

    compiled: list[Result] = field(default_factory=list)
    kernels: set[Kernel] = field(default_factory=set)
    bad: list[Result] = field(default_factory=list)
    nodes: set[str] = field(default_factory=set)
    charge: dict[Kernel, float] = field(default_factory=dict)

    def add_compiled(self, result: Result, nodes: Iterable[str], *, charged: bool) -> None:
        """A request was compiled on all those nodes. charged: its seconds are in its own result."""
        self.compiled.append(result)
        self.nodes.update(nodes)
        for contender, outcome in zip(result.request.contenders, result.outcomes, strict=True):
            for kernel in kernels_of(result.request.stage, contender):
                self.kernels.add(kernel)
                if not charged:
                    self.charge[kernel] = outcome.compile_s

    def take_charge(self, result: Result, position: int) -> float:
        """Seconds that were spent on compiling ahead for that contender; they are given out once."""
        kernels = kernels_of(result.request.stage, result.request.contenders[position])
        return sum(self.charge.pop(kernel, 0.0) for kernel in kernels)


def compile_requests(problem: Problem, kernels: Sequence[Kernel]) -> list[Request]:
    """Requests that only compile those kernels."""
    found = []
    for gemm in GEMMS:
        contenders = [(config,) for g, config in kernels if g == gemm]
        for at in range(0, len(contenders), COMPILE_CHUNK):
            found.append(Request(gemm, problem.batch_sizes[0], tuple(contenders[at : at + COMPILE_CHUNK]), 0))
    return found


def is_bad(result: Result) -> bool:
    """Whether a contender of it cost workers their lives: news for the other actors."""
    return bool(result.request.rounds) and any(o.failure in ("crash", "timeout") for o in result.outcomes)
