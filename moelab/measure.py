"""The timing protocol: CUDA graphs over rotated inputs, contenders interleaved, every sample kept.

A contender is a callable that takes a rotation index and launches the work on that rotation's tensors. All
contenders of one call are captured into graphs of their own, replayed in turns in shuffled order, and timed with
CUDA events around a replay: one sample is the replay's time over the number of calls in the graph. What is compared
was thus measured by the same protocol, in the same seconds, on the same card.

Interpreted kernels are never timed: without a GPU `measure` raises, and recordings are there to be read.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moelab import runtime
from moelab.errors import RecordingError, RuntimeModeError

Contender = Callable[[int], Any]


@dataclass(frozen=True)
class Protocol:
    """How samples are taken.

    rotations: sets of inputs a graph walks through. rounds: samples per contender. graph_us: what one replay
    should last at least, microseconds; repeats of the whole rotation fill it. seed: of the order within a round.
    """

    rotations: int = 8
    rounds: int = 30
    graph_us: float = 1000.0
    max_calls: int = 4096
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """For a recording's `protocol` field."""
        return {"kind": "cuda-graph, rotated inputs, contenders interleaved", **asdict(self)}


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Distribution-free confidence interval of the median, from order statistics.

    The interval [x_(j), x_(n+1-j)] covers the median with probability 1 - 2 P(B < j), B ~ Binomial(n, 1/2) (David and
    Nagaraja, Order Statistics, section 7.1). Fewer than 6 samples cannot reach 95 %: then it is (min, max).
    """
    if not samples or not all(math.isfinite(s) for s in samples):
        raise RecordingError(
            f"{len(samples)} samples, or some that are no numbers. Expected at least one finite sample. Measure again."
        )
    ordered, n = sorted(samples), len(samples)
    tail, j = 0.0, 0
    while j < n // 2 and tail + math.comb(n, j) / 2**n <= (1 - confidence) / 2:
        tail += math.comb(n, j) / 2**n
        j += 1
    j = max(j, 1)
    return ordered[j - 1], ordered[n - j]


@dataclass(frozen=True)
class Measurement:
    """Samples of one contender, microseconds per call."""

    name: str
    samples_us: tuple[float, ...]
    protocol: Protocol | None = None

    @property
    def median_us(self) -> float:
        """Median, microseconds."""
        return statistics.median(self.samples_us)

    @property
    def interval_us(self) -> tuple[float, float]:
        """95 % interval of the median, microseconds."""
        return median_interval(self.samples_us)

    def quantile_us(self, q: float) -> float:
        """The q-quantile (0 to 1) of the samples, linearly interpolated, microseconds."""
        ordered = sorted(self.samples_us)
        position = q * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def tie(a: Measurement, b: Measurement) -> bool:
    """Whether the 95 % intervals of the medians overlap: then neither may be called faster."""
    (a_low, a_high), (b_low, b_high) = a.interval_us, b.interval_us
    return a_low <= b_high and b_low <= a_high


def rotations_for(bytes_per_call: float, *, l2_bytes: float = 60e6, at_least: int = 2, at_most: int = 64) -> int:
    """How many input sets make one round pass three times the L2 cache (60 MB on an H200), within bounds."""
    return max(at_least, min(at_most, math.ceil(3 * l2_bytes / max(bytes_per_call, 1.0))))


def _elapsed_us(work: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _capture(contender: Contender, protocol: Protocol) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of the contender over all rotations, repeated to fill protocol.graph_us; and its number of calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile, load and warm up outside the capture
        for rotation in range(protocol.rotations):
            contender(rotation)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    once = _graph_of(contender, protocol.rotations, 1)
    once.replay()
    rough = min(_elapsed_us(once.replay) for _ in range(3))
    repeats = max(1, min(math.ceil(protocol.graph_us / max(rough, 1e-3)), protocol.max_calls // protocol.rotations))
    graph = once if repeats == 1 else _graph_of(contender, protocol.rotations, repeats)
    graph.replay()
    torch.cuda.synchronize()
    return graph, repeats * protocol.rotations


def _graph_of(contender: Contender, rotations: int, repeats: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for rotation in range(rotations):
                contender(rotation)
    return graph


def measure(contenders: Mapping[str, Contender], protocol: Protocol | None = None) -> dict[str, Measurement]:
    """Time contenders against each other on the GPU: name -> Measurement, microseconds per call.

    A contender must be capturable in a CUDA graph (no host synchronisation) and keep its inputs alive. Raises
    RuntimeModeError without a GPU; what a contender raises passes through.
    """
    protocol = protocol or Protocol()
    mode = runtime.current()
    if mode.mode != "gpu":
        raise RuntimeModeError(
            f"Timing needs a GPU; here {mode.reason}. Interpreted kernels say nothing about speed. Expected a GPU; "
            "read a recording instead (moelab.recordings.load), or run this on a GPU node."
        )
    graphs = {name: _capture(contender, protocol) for name, contender in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    order, shuffle = list(graphs), random.Random(protocol.seed)
    for _ in range(protocol.rounds):
        shuffle.shuffle(order)
        for name in order:
            graph, calls = graphs[name]
            samples[name].append(_elapsed_us(graph.replay) / calls)
    return {name: Measurement(name, tuple(values), protocol) for name, values in samples.items()}
