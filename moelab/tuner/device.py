"""A GPU as the worker uses it: short looks behind a delay, and CUDA graphs for contenders that take turns.

A launch costs the host some microseconds, a small batch's kernel not many more: calls one after the other would time the
host. For a short look the calls are therefore queued while the device is kept busy with a delay, so that they follow each
other without a gap; a look during which the queue ran dry is taken again behind a longer delay. This costs what the calls
cost, where a CUDA graph costs milliseconds to make. Finals, with many samples each, are replays of graphs (moelab.measure).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moelab import measure, runtime
from moelab.errors import RuntimeModeError
from moelab.measure import Protocol, rotations_for
from moelab.tuner.evaluate import Contender, Stage
from moelab.tuner.problem import Problem
from moelab.tuner.rig import Rig

SAMPLE_L2S = 8
"""A sample of a short look reads the weights of calls that together pass the last cache before memory this many times,
if so many are rotated: about 0.1 ms, some hundred times the resolution of events."""

GRAPH_US = 1000.0
"""What one replay of a graph lasts at least, microseconds, as in the suite layer_classic."""

MOST_QUEUED = 256
"""Calls queued behind one delay; the launch queue takes 1024 before it makes the host wait."""

_HOST_US = 8.0
"""Host time of a call that the delay allows for at least, microseconds. A launch took 3 to 5 on the H200's host."""

_TRIES = 7
"""Looks behind a delay that doubles; a host that stalls longer than the last is none to measure on."""


class GpuDevice(Rig):
    """The current GPU of this process. Raises RuntimeModeError without one, or on another than the problem's."""

    def __init__(self, problem: Problem) -> None:
        here = runtime.current()
        if here.mode != "gpu":
            raise RuntimeModeError(
                f"Tuning measures kernels, and here {here.reason}. Expected a GPU: interpreted kernels say nothing about "
                "speed. Run this on a GPU node, or replay a recorded landscape."
            )
        _require_same(problem, here.device_name)
        super().__init__(problem)
        self._host_us = _HOST_US
        self._cycles_per_us = 1000.0
        self._delay(1000.0)
        cycles = 10_000_000
        self._cycles_per_us = cycles / measure._elapsed_us(lambda: torch.cuda._sleep(cycles))

    def about(self) -> dict[str, Any]:
        """See worker.Device."""
        return {
            "gpu": runtime.current().device_name, "triton": runtime.triton_version(),
            "free_bytes": torch.cuda.mem_get_info()[0], "cycles_per_us": self._cycles_per_us,
        }  # fmt: skip

    def trouble(self) -> str | None:
        """See worker.Device: an illegal access shows at every later call."""
        try:
            torch.cuda.synchronize()
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return None

    # --- short looks ------------------------------------------------------------------------------------------------

    def calls_per_sample(self, stage: Stage, num_tokens: int) -> int:
        """The same for every contender, so that all samples of one number see the same inputs."""
        l2 = SAMPLE_L2S / 3  # rotations_for counts calls that pass the cache three times
        calls = rotations_for(self.bytes_per_call(stage, num_tokens) / l2, at_least=1)
        return min(calls, self.cell(num_tokens).rotations)

    def sample(
        self, stage: Stage, num_tokens: int, contender: Contender, rounds: int, stop_us: float | None
    ) -> list[float]:
        """See worker.Device. The rotation that `check` has just run, whose weights may lie in the cache, comes last."""
        run, calls = self.launch(stage, num_tokens, contender).run, self.calls_per_sample(stage, num_tokens)
        rotations = self.cell(num_tokens).rotations
        turns = [[(1 + s * calls + j) % rotations for j in range(calls)] for s in range(rounds)]
        found = self._queued(run, turns[:1]) if stop_us is not None else []
        if found and stop_us is not None and found[0] > stop_us:
            return found
        step = max(1, MOST_QUEUED // calls)
        for at in range(len(found), rounds, step):
            found += self._queued(run, turns[at : at + step])
        return found

    def _queued(self, run: Callable[[int], None], turns: Sequence[Sequence[int]]) -> list[float]:
        """Microseconds per call of each turn, a turn being the rotations that one sample calls, back to back."""
        wait_us = 20.0 + self._host_us * sum(map(len, turns))
        for _ in range(_TRIES):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(len(turns) + 1)]
            self._delay(wait_us)
            events[0].record()
            for turn, after in zip(turns, events[1:], strict=True):
                for rotation in turn:
                    run(rotation)
                after.record()
            dry = events[0].query()
            events[-1].synchronize()
            if not dry:
                self._host_us = max(_HOST_US, self._host_us * 0.98)
                break
            wait_us *= 2.0
            self._host_us = min(100.0, self._host_us * 1.1)
        return [
            before.elapsed_time(after) * 1e3 / len(turn)
            for turn, before, after in zip(turns, events, events[1:], strict=False)
        ]

    def _delay(self, us: float) -> None:
        torch.cuda._sleep(math.ceil(us * self._cycles_per_us))

    # --- graphs -----------------------------------------------------------------------------------------------------

    def capture(self, stage: Stage, num_tokens: int, contender: Contender) -> Any:
        """See worker.Device: a graph over all rotations, as `moelab.measure.measure` makes it."""
        protocol = Protocol(self.cell(num_tokens).rotations, graph_us=GRAPH_US)
        return measure._capture(self.launch(stage, num_tokens, contender).run, protocol)

    def replay(self, captured: Any) -> float:
        """See worker.Device."""
        graph, calls = captured
        return measure._elapsed_us(graph.replay) / calls


def protocol() -> dict[str, Any]:
    """How samples are taken, for a journal's header."""
    return {
        "short": "calls back to back behind a delay, rotated inputs, CUDA events",
        "interleaved": "cuda-graph, rotated inputs, contenders interleaved",
        "sample_l2s": SAMPLE_L2S, "graph_us": GRAPH_US, "checked": "every contender at every batch size, before its first sample",
    }  # fmt: skip


def _require_same(problem: Problem, device_name: str) -> None:
    found = (device_name, runtime.triton_version())
    if found != (problem.device, problem.triton_version):
        raise RuntimeModeError(
            f"This process has {found[0]} and triton {found[1]}; the problem is of {problem.device} and triton "
            f"{problem.triton_version}. Expected the same: times of two do not compare. Tune on that device, or begin "
            "another run."
        )
