"""Where a tuning run stands, for progress bars and widgets."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """Where a run stands. state: "new", "running", "paused", "stopped", "finished" or "failed".

    done, total: samples asked for in this phase, and how many of them are through. spent_s: the evaluator's clock; eta_s:
    seconds still to go at the rate so far, None before there is one. best_us: batch size -> GEMM1 plus GEMM2 of the best
    pair so far, microseconds. failures: class -> outcomes.
    """

    state: str
    phase: str
    done: int
    total: int
    spent_s: float
    eta_s: float | None
    best_us: Mapping[int, float]
    failures: Mapping[str, int]


@dataclass
class Pace:
    """How far a phase is. timeline: phases and when they were entered, on the clock; one that was taken up again is there
    twice."""

    phase: str = ""
    done: int = 0
    total: int = 0
    later: int = 0
    began_s: float = 0.0
    fresh: int = 0
    reported_s: float | None = None
    timeline: list[tuple[str, float]] = field(default_factory=list)

    def seconds(self, clock_s: float) -> tuple[tuple[str, float], ...]:
        """How long each phase took until now."""
        found: dict[str, float] = {}
        for (name, began), (_, ended) in itertools.pairwise([*self.timeline, ("", clock_s)]):
            found[name] = found.get(name, 0.0) + ended - began
        return tuple(found.items())
