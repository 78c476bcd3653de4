"""Contenders timed in turns within one model: as CUDA graphs, or by the wall clock, as who calls without a graph has it."""

from __future__ import annotations

import faulthandler
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from moelab import runtime
from moelab.measure import turns
from moelab.serving.contenders import failures, release, require_timed, told, use
from moelab.serving.steps import Work

GRACE_S = 120.0
"""Past its limit a run is ended from outside Python: a kernel that never returns would hold it for ever."""


SLOW = 3.0
"""Times as slow as the fastest: no tie is in question, and few samples do."""


@dataclass(frozen=True)
class Protocol:
    """sample_ms: what a sample lasts at least; runs fill it, as many as the work allows. cell_s: what all samples of a cell take
    about; rounds, between fewest and most, fill it. seed: of the order within a round."""

    sample_ms: float = 20.0
    cell_s: float = 4.0
    fewest: int = 6
    most: int = 25
    seed: int = 0


@dataclass
class Limit:
    """How long a whole run may take. skipped: what was not begun for want of time."""

    seconds: float
    began: float = field(default_factory=time.perf_counter)
    skipped: list[str] = field(default_factory=list)

    def allows(self, what: str, needs_s: float = 0.0) -> bool:
        """Whether there is time for it; what there is none for is noted."""
        if time.perf_counter() - self.began + needs_s < self.seconds:
            return True
        self.skipped.append(what)
        return False


@contextmanager
def watched(limit: Limit) -> Iterator[None]:
    """On a GPU: end the process, with where it stands on stderr, GRACE_S after the limit, whatever it waits for.

    The watch stays where a thread of the run does: Python would wait for it at its own end.
    """
    before, on_gpu = set(threading.enumerate()), runtime.current().mode == "gpu"
    if on_gpu:
        faulthandler.dump_traceback_later(limit.seconds + GRACE_S, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        left = [thread for thread in set(threading.enumerate()) - before if not thread.daemon]
        if on_gpu and not left:
            faulthandler.cancel_dump_traceback_later()


Found = list[float] | str
"""A contender's samples, microseconds a run, or why there are none."""


def in_turns(
    model: Any, work: Work, names: Sequence[str], protocol: Protocol, *, graph: bool = False
) -> dict[str, Found]:
    """Each contender's samples of that work, taken in turns. One that fails says so, and the others run on."""
    found: dict[str, Found] = {}
    ready: dict[str, _Ready] = {}
    for name in names:
        try:
            require_timed(name)
            ready[name] = _prepared(model, work, name, graph)
        except failures() as error:
            found[name] = told(error)
        if name in found:  # outside the handler, whose traceback holds the tensors
            release()
    samples = _sampled(ready, protocol)
    return {name: found[name] if name in found else samples[name] for name in names}


def _sampled(ready: Mapping[str, _Ready], protocol: Protocol) -> dict[str, list[float]]:
    """Samples of each, in turns. One SLOW times slower than the fastest gets the fewest, so that the others have their rounds."""
    samples: dict[str, list[float]] = {name: [] for name in ready}
    rough = {name: one.once() for name, one in ready.items()}
    slow = {name for name in ready if rough[name] > SLOW * min(rough.values())}
    runs = {
        name: min(ready[name].work.at_most, max(1, math.ceil(protocol.sample_ms * 1e3 / rough[name]))) for name in ready
    }
    a_round = sum(rough[name] * runs[name] for name in ready if name not in slow) / 1e6
    rounds = min(protocol.most, max(protocol.fewest, int(protocol.cell_s / a_round))) if ready else 0
    for name in turns(ready, rounds, protocol.seed):
        if name not in slow or len(samples[name]) < protocol.fewest:
            samples[name].append(round(ready[name].sample(runs[name]), 3))
    return samples


@dataclass(frozen=True)
class _Ready:
    """A contender that has run: what a sample of it is."""

    model: Any
    work: Work
    name: str
    graph: torch.cuda.CUDAGraph | None = None

    def sample(self, runs: int) -> float:
        """Microseconds a run, over so many in a row."""
        if self.graph is None:
            use(self.model, self.name)
        self.work.rewind()
        return (_by_events(self.graph, runs) if self.graph else _by_wall(self.work, runs)) / runs

    def once(self) -> float:
        """The better of two."""
        return max(1e-3, min(self.sample(1) for _ in range(2)))


def _prepared(model: Any, work: Work, name: str, graph: bool) -> _Ready:
    """Compiled, warmed up, and captured if asked for."""
    use(model, name)
    work.rewind()
    if not graph:
        work.run()
        _settle()
        return _Ready(model, work, name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work.run()
    torch.cuda.current_stream().wait_stream(stream)
    _settle()
    work.rewind()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        work.run()
    return _Ready(model, work, name, captured)


def _by_events(graph: torch.cuda.CUDAGraph, runs: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _settle()
    start.record()
    for _ in range(runs):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _by_wall(work: Work, runs: int) -> float:
    _settle()
    begin = time.perf_counter_ns()
    for _ in range(runs):
        work.run()
    _settle()
    return (time.perf_counter_ns() - begin) / 1e3


def _settle() -> None:
    if runtime.current().mode == "gpu":
        torch.cuda.synchronize()


def rows_of(found: Mapping[str, Found], common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row of a recording for each contender."""
    return [
        {**common, "impl": name, **({"refused": one} if isinstance(one, str) else {"samples_us": one})}
        for name, one in found.items()
    ]
