"""The seam between a search and whatever runs its kernels: requests go in, results come out as they finish.

A strategy builds `Request`s and reads `Result`s. An `Evaluator` answers them: worker processes on GPUs, actors on a
cluster, or the replay of a recorded landscape. A contender that fails is an `Outcome` with the class of its failure;
an evaluator raises only for what ends the whole run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from moelab.config import KernelConfig

Stage = Literal["up", "down", "layer"]
"""What is timed: GEMM1 alone, GEMM2 alone, or GEMM1, activation, GEMM2 and sum-reduce, as sglang's layer runs them."""

Contender = tuple[KernelConfig, ...]
"""One config for "up" and "down"; GEMM1's and GEMM2's for "layer"."""

FAILURES: Mapping[str, str] = {
    "compile": "the compiler refused the config or crashed on it",
    "resources": "the chip lacks shared memory or registers for a block",
    "memory": "the device's memory was full",
    "wrong": "the result was further from float64 than precision's rule allows",
    "nan": "the result was not finite",
    "timeout": "the measurement passed its deadline",
    "crash": "the worker died, of an illegal access or a sticky error, twice in a row",
    "launch": "the launch was refused for another reason",
    "unrecorded": "the replayed landscape has no measurement of it",
}
"""Classes of failure: class -> what it means."""


@dataclass(frozen=True, slots=True)
class Request:
    """Contenders to time on one stage at one batch size, in one process, `rounds` samples each.

    rounds: 0 means compile only (num_tokens then only names the inputs to compile against).
    interleaved: all contenders in turns, round by round, in shuffled order, every sample taken, so that sample i of one
    was taken beside sample i of another; otherwise one contender after the other.
    stop_above_us: a contender (not interleaved) whose first sample is above it is given up with that one sample.
    repeat: tells apart requests that are otherwise equal.
    """

    stage: Stage
    num_tokens: int
    contenders: tuple[Contender, ...]
    rounds: int
    interleaved: bool = False
    stop_above_us: float | None = None
    repeat: int = 0

    def key(self) -> str:
        """A digest of every field, the same in every process: the request's name in a journal."""
        configs = ";".join(",".join(map(config_key, contender)) for contender in self.contenders)
        parts = (self.stage, self.num_tokens, self.rounds, self.interleaved, self.stop_above_us, self.repeat, configs)
        return hashlib.blake2b(repr(parts).encode(), digest_size=12).hexdigest()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one contender.

    samples_us: microseconds per call (of the launch for "up" and "down", of the layer for "layer"); empty after a
    failure and for a compile-only request. failure: a key of FAILURES, None if there was none; message: its text.
    compile_s: seconds of compiling spent for this outcome, 0 where it was compiled before; measure_s: seconds of device
    time for checking and timing.
    """

    samples_us: tuple[float, ...] = ()
    failure: str | None = None
    message: str = ""
    compile_s: float = 0.0
    measure_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """A request with the outcome of each of its contenders, in its order."""

    request: Request
    outcomes: tuple[Outcome, ...]


class Evaluator(Protocol):
    """Who answers requests. One is made per run, and used by one thread."""

    def describe(self) -> dict[str, Any]:
        """For the journal: "kind" (its name), "measured" (False for a replay), and how it times ("protocol")."""

    def recall(self, results: Sequence[Result]) -> None:
        """Told, before the first `run` of a resumed session, of everything that is done already."""

    def run(self, requests: Sequence[Request]) -> Generator[Result, None, None]:
        """Answer every request once, in any order, each as soon as it is whole.

        Closing the generator early abandons what has not been yielded. All requests are known at once, so that an
        evaluator may compile ahead and keep several devices busy.
        """

    def clock_s(self) -> float:
        """Seconds this run has cost so far, what was recalled included: wall time on a device, simulated in a replay."""

    def close(self) -> None:
        """Stop every process it started. May be called twice."""


def config_key(config: KernelConfig) -> str:
    """Every field of a config in order, as one short string."""
    found = _KEYS.get(config)
    if found is None:
        fields = (getattr(config, name) for name in config.__dataclass_fields__)
        found = _KEYS[config] = ".".join("-" if value is None else str(value) for value in fields)
    return found


_KEYS: dict[KernelConfig, str] = {}


def tidy(result: Result) -> Result:
    """The result with times rounded to what a journal keeps: 0.1 ns, 1 us of cost. Rounding twice changes nothing."""
    return Result(
        result.request,
        tuple(
            Outcome(
                tuple([round(s, 4) for s in o.samples_us]),
                o.failure,
                o.message,
                round(o.compile_s, 6),
                round(o.measure_s, 6),
            )
            for o in result.outcomes
        ),
    )
