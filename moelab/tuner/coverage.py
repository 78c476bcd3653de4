"""How much of a search a budget left: how many candidates were compiled and measured, and what budget would do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moelab.tuner.board import Board
from moelab.tuner.known import Known
from moelab.tuner.problem import GEMMS
from moelab.tuner.search import COMPILE_SHARE, SEARCH_SHARE, Step, samples_of

ROUND_TO_S = 10
"""A budget that is named is rounded up to this many seconds: it is an estimate."""


@dataclass(frozen=True)
class BatchCoverage:
    """One batch size. candidates: different programs of both GEMMs; compiled: those that went through the compiler, what it
    refused among them; measured: those with a look of their own, what failed in it among them. The finals count for none."""

    candidates: int
    compiled: int
    measured: int


@dataclass(frozen=True)
class Coverage:
    """How far a search came. budget_s: its budget, None for none. cut: phases that the budget ended early or left out.
    batches: by batch size. needed_s: about the budget that would have cut nothing, from the cost of what was done; None
    where nothing was cut."""

    budget_s: float | None
    cut: tuple[str, ...]
    batches: Mapping[int, BatchCoverage]
    needed_s: float | None

    def needed(self) -> str | None:
        """`needed_s` as --budget takes it, rounded up."""
        return None if self.needed_s is None else f"{math.ceil(self.needed_s / ROUND_TO_S) * ROUND_TO_S}s"

    def sentences(self, run: str | None = "RUN") -> list[str]:
        """What a reader has to know of a search that was cut; empty for one that was not. run: its journal, and what else goes on
        with it, as a shell takes them; None for none."""
        if not self.cut:
            return []
        said = [f"The budget of {self.budget_s:g} s cut the search short, in: {', '.join(self.cut)}."]
        empty = [str(b) for b, here in self.batches.items() if not here.measured]
        if empty:
            said.append(
                f"Nothing was searched at batch {', '.join(empty)}: only what was known before, and the best of neighbouring "
                "sizes where those were searched, went into the final."
            )
        counts = [f"{b}: {x.compiled}, {x.measured} of {x.candidates}" for b, x in self.batches.items()]
        said.append(f"Compiled, measured of candidates by batch size: {'; '.join(counts)}.")
        how = f": moelab tune --resume {run} --budget {self.needed()}" if run else "."
        return [*said, f"About {self.needed()} would do{how}"]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "budget_s": self.budget_s, "cut": list(self.cut), "needed_s": self.needed_s,
            "batches": [{"num_tokens": b, **asdict(here)} for b, here in self.batches.items()],
        }  # fmt: skip


def covered(board: Board, num_tokens: int) -> BatchCoverage:
    """Of the space's configs at that batch size, different programs: all, compiled, measured."""
    row, counts = board.row[num_tokens], np.zeros(3, dtype=np.int64)
    for gemm in GEMMS:
        own = len(board.space.configs[gemm])
        programs = board.representative[gemm][row]
        looked = board.looked_at[gemm][row]
        kept = programs[:own], programs[:own][board.compiled[gemm][:own]], programs[:own][looked[programs[:own]]]
        counts += [len(np.unique(found)) for found in kept]
    return BatchCoverage(*counts.tolist())


def needed_s(steps: Sequence[Step], known: Known, clock_s: float, about: Mapping[str, Any]) -> float:
    """About the budget, in seconds, in which all of these steps could have been done, and can be by taking the run up: its
    clock goes on, the finals that it holds included.

    steps: of the search, in order, whole or not. known: what came back. clock_s: what they cost in all;
    about: what the evaluator says of itself, for how many compile and measure at once. The compiler's and the device's
    seconds are counted by kernel and by sample, and stretched to the clock, which also holds starts and waits.
    """
    outcomes = [outcome for result in known.results for outcome in result.outcomes]
    compiles = [outcome.compile_s for outcome in outcomes if outcome.compile_s > 0]
    timed = [result for result in known.results if result.request.rounds]
    measures = sum(outcome.measure_s for result in timed for outcome in result.outcomes)
    processes = about.get("compile_processes") or 1
    devices = about.get("devices") or about.get("ray_actors") or 1
    counted = sum(compiles) / processes + measures / devices
    each_kernel = sum(compiles) / max(1, len(compiles)) / processes
    each_sample = measures / max(1, samples_of(result.request for result in timed)) / devices
    kernels, samples = _whole(steps, known)
    stretch = clock_s / counted if counted else 1.0
    finals = samples_of(result.request for result in timed if result.request.interleaved)
    whole_s = (each_kernel * kernels + each_sample * (samples + finals)) / SEARCH_SHARE
    ahead = [request for step in steps for request in step.requests if request.rounds == 0]
    left = samples_of(known.missing(ahead))
    if ahead:
        whole_s = max(whole_s, each_kernel * kernels / COMPILE_SHARE)
    compiled_s = (clock_s + each_kernel * left * stretch) / COMPILE_SHARE if left else 0.0
    return max(whole_s * stretch, compiled_s)


def _whole(steps: Sequence[Step], known: Known) -> tuple[float, float]:
    """How many kernels and samples the whole search would have been: what it asked for, and foresaw. A strategy that compiles
    ahead asks for every kernel, and then for samples of those that it has; another meets new kernels as it goes on."""
    compiles = [request for step in steps for request in step.requests if request.rounds == 0]
    kernels = len({(r.stage, c) for step in steps for r in step.requests for c in r.contenders})
    asked, foreseen = 0, 0
    for step in steps:
        asked += samples_of(request for request in step.requests if request.rounds)
        foreseen = max(foreseen, asked + step.later)
    if not compiles:
        return kernels * foreseen / max(1, asked), foreseen
    reached = samples_of(compiles) - samples_of(known.missing(compiles))
    return kernels, max(asked * samples_of(compiles) / max(1, reached), foreseen)
