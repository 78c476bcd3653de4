"""Timing protocols over rotated inputs: contenders interleaved in shuffled order, every sample kept.

A contender is a callable that takes a rotation index and launches the work on that rotation's tensors. What is
compared in one call was measured by the same protocol, in the same seconds, on the same card.

measure        the GPU's time: each contender in a CUDA graph of its own, CUDA events around a replay.
measure_eager  the wall's: calls back to back without a graph until the device is done; what a server without graphs
               gets, the longer of the host's time and the GPU's.
measure_host   the host's: a clock around one eager call, which returns while the GPU still works.

Interpreted kernels are never timed: without a GPU all three raise, and recordings are there to be read.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from moelab import roofline, runtime
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


@dataclass(frozen=True)
class EagerProtocol:
    """How `measure_eager` takes samples.

    rotations, rounds, seed: as in Protocol. sample_us: what one sample should last at least, microseconds, so that the
    device's last call and the synchronisation weigh little; whole rotations of calls fill it, max_calls at most.
    """

    rotations: int = 8
    rounds: int = 25
    sample_us: float = 5000.0
    max_calls: int = 4096
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """For a recording's `protocol` field."""
        return {"kind": "eager, calls back to back until the device is done, contenders interleaved", **asdict(self)}


@dataclass(frozen=True)
class HostProtocol:
    """How `measure_host` takes samples: rounds * burst of each contender.

    A round is a burst of calls of each contender, one after another, the device synchronised after each burst: CUDA's
    queue holds about 1,024 launches, and a call that found it full would wait for the GPU. 16 calls may thus have
    60 launches each. warm_up: calls of each before the first sample, compiling ones among them.
    """

    rotations: int = 8
    rounds: int = 128
    burst: int = 16
    warm_up: int = 64
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """For a recording's `protocol` field."""
        kind = "host time of one eager call, bursts of contenders interleaved, synchronised between, no gc"
        return {"kind": kind, **asdict(self), "rounded_to_us": HOST_RESOLUTION_US}


HOST_RESOLUTION_US = 0.01
"""Host samples are rounded to this, and kept: a call of Python costs more, and 2,000 of them take 14 KB of JSON."""


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Distribution-free 95 % confidence interval of the median, from order statistics.

    The interval [x_(j), x_(n+1-j)] covers the median with probability 1 - 2 P(B < j), B ~ Binomial(n, 1/2) (David and
    Nagaraja, Order Statistics, section 7.1). Fewer than 6 samples cannot reach 95 %: then it is (min, max).
    """
    if not samples or not all(math.isfinite(s) for s in samples):
        raise RecordingError(
            f"{len(samples)} samples, or some that are no numbers. Expected at least one finite sample. Measure again."
        )
    ordered, n = sorted(samples), len(samples)
    j = _rank(n)
    return ordered[j - 1], ordered[n - j]


@lru_cache(maxsize=64)  # a second of arithmetic at 2,560 samples if every binomial coefficient is made anew each time
def _rank(n: int) -> int:
    """The j of median_interval: the largest whose tail P(B < j) is at most 2.5 %, at least 1."""
    tail, term, j = 0, 1, 0  # in units of 2^-n, exact
    while j < n // 2 and (tail + term) / 2**n <= 0.025:
        tail, term, j = tail + term, term * (n - j) // (j + 1), j + 1
    return max(j, 1)


@dataclass(frozen=True)
class Measurement:
    """Samples of one contender, microseconds per call."""

    name: str
    samples_us: tuple[float, ...]
    protocol: Protocol | EagerProtocol | HostProtocol | None = None

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


def cache_bytes() -> int:
    """Bytes of the current GPU's last cache before memory, which weights must pass to come from memory.

    On NVIDIA what the driver says, which knows a partition's share; elsewhere data/devices, for ROCm tells the L2 of one die
    and leaves out the Infinity Cache. Raises RuntimeModeError where neither knows: nothing may be recorded there, because
    weights that lie in a cache would pass for weights from memory.
    """
    _require_gpu()
    return _cache_bytes_of(torch.cuda.current_device())


@lru_cache(maxsize=64)
def _cache_bytes_of(index: int) -> int:
    properties = torch.cuda.get_device_properties(index)
    reported = 0 if torch.version.hip else getattr(properties, "L2_cache_size", 0)
    if not reported:
        key = runtime.device_key(properties.name)
        reported = roofline.device_data(key)["l2_bytes"] if key in roofline.device_names() else 0
    if not reported:
        raise RuntimeModeError(
            f"The size of the last cache of {properties.name} is unknown: the driver does not say, nor does data/devices. "
            "Expected it: inputs are rotated until they pass it three times, or they would be read from the cache. Add its "
            "l2_bytes to data/devices."
        )
    return int(reported)


def rotations_for(bytes_per_call: float, *, l2_bytes: float | None = None, at_least: int = 2, at_most: int = 64) -> int:
    """How many input sets make one round pass three times a cache, within bounds.

    l2_bytes: None asks the current GPU (`cache_bytes`, and what it raises); without a GPU, where nothing is timed, at_least.
    """
    if l2_bytes is None:
        if runtime.current().mode != "gpu":
            return at_least
        l2_bytes = cache_bytes()
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


def _require_gpu() -> None:
    mode = runtime.current()
    if mode.mode != "gpu":
        raise RuntimeModeError(
            f"Timing needs a GPU; here {mode.reason}. Interpreted kernels say nothing about speed. Expected a GPU; "
            "read a recording instead (moelab.recordings.load), or run this on a GPU node."
        )


def turns(names: Iterable[str], rounds: int, seed: int) -> Iterator[str]:
    """Every name once a round, each round in an order of its own."""
    order, shuffle = list(names), random.Random(seed)
    for _ in range(rounds):
        shuffle.shuffle(order)
        yield from order


def measure(contenders: Mapping[str, Contender], protocol: Protocol | None = None) -> dict[str, Measurement]:
    """Time contenders against each other on the GPU: name -> Measurement, microseconds per call.

    Replays of the contenders' graphs take turns; a sample is a replay's time over the calls in the graph.
    A contender must be capturable in a CUDA graph (no host synchronisation) and keep its inputs alive. Raises
    RuntimeModeError without a GPU; what a contender raises passes through.
    """
    protocol = protocol or Protocol()
    _require_gpu()
    graphs = {name: _capture(contender, protocol) for name, contender in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for name in turns(graphs, protocol.rounds, protocol.seed):
        graph, calls = graphs[name]
        samples[name].append(_elapsed_us(graph.replay) / calls)
    return {name: Measurement(name, tuple(values), protocol) for name, values in samples.items()}


# --- without a graph ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    """Keep Python's garbage collector out of the samples; as it was, afterwards."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _wall_us(contender: Contender, calls: int, rotations: int) -> float:
    """Wall time of calls back to back, from an idle device until it is idle again, microseconds."""
    torch.cuda.synchronize()
    begin = time.perf_counter_ns()
    for call in range(calls):
        contender(call % rotations)
    torch.cuda.synchronize()
    return (time.perf_counter_ns() - begin) / 1e3


def _calls_for(contender: Contender, protocol: EagerProtocol) -> int:
    """How many calls, whole rotations of them, last protocol.sample_us; warms up on the way."""
    _wall_us(contender, protocol.rotations, protocol.rotations)
    rough = min(_wall_us(contender, protocol.rotations, protocol.rotations) for _ in range(3))
    passes = min(math.ceil(protocol.sample_us / max(rough, 1e-3)), protocol.max_calls // protocol.rotations)
    return max(1, passes) * protocol.rotations


def measure_eager(contenders: Mapping[str, Contender], protocol: EagerProtocol | None = None) -> dict[str, Measurement]:
    """Wall time per call without a CUDA graph: name -> Measurement, microseconds per call.

    A sample is the time from the first launch of n calls until the device has done the last, over n. A contender may
    synchronise with the host. Raises RuntimeModeError without a GPU; what a contender raises passes through.
    """
    protocol = protocol or EagerProtocol()
    _require_gpu()
    calls = {name: _calls_for(contender, protocol) for name, contender in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    with _no_gc():
        for name in turns(contenders, protocol.rounds, protocol.seed):
            samples[name].append(_wall_us(contenders[name], calls[name], protocol.rotations) / calls[name])
    return {name: Measurement(name, tuple(values), protocol) for name, values in samples.items()}


def _host_burst(contender: Contender, calls: int, rotations: int) -> list[float]:
    """Host time of each of `calls` calls in a row, microseconds; the device is idle before and after."""
    clock, samples = time.perf_counter_ns, []
    for call in range(calls):
        begin = clock()
        out = contender(call % rotations)
        end = clock()
        del out  # freed outside the clock: its caller would free it
        samples.append(max(round((end - begin) / 1e3, 2), HOST_RESOLUTION_US))
    torch.cuda.synchronize()
    return samples


def measure_host(contenders: Mapping[str, Contender], protocol: HostProtocol | None = None) -> dict[str, Measurement]:
    """Host time of a call in eager mode: name -> Measurement, a sample a call, microseconds.

    How long Python is busy until the call returns, its kernels launched and not waited for; a contender that
    synchronises with the host is charged for the wait. At least 2,000 samples by default, rounded to
    HOST_RESOLUTION_US. Raises RuntimeModeError without a GPU; what a contender raises passes through.
    """
    protocol = protocol or HostProtocol()
    _require_gpu()
    for contender in contenders.values():
        _host_burst(contender, max(protocol.warm_up, protocol.rotations), protocol.rotations)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    with _no_gc():
        for name in turns(contenders, protocol.rounds, protocol.seed):
            samples[name] += _host_burst(contenders[name], protocol.burst, protocol.rotations)
    return {name: Measurement(name, tuple(values), protocol) for name, values in samples.items()}
