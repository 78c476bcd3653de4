"""The process that measures: one for each GPU, holding the tensors, doing what it is sent, saying what it is about to do.

Before each contender it says ("begin", task, index), after it ("end", task, index, outcome): whoever watches knows whom to
suspect when nothing more comes. Each contender ends with a synchronisation, so that an error of its launches is seen while
it is the one begun. After an error that leaves the device unusable the process says so and ends.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from moelab.errors import MoelabError
from moelab.tuner.child import Channel, load
from moelab.tuner.compile import first_words
from moelab.tuner.evaluate import Contender, Outcome, Request, Stage
from moelab.tuner.problem import Problem

DEVICE = "moelab.tuner.device:GpuDevice"


@dataclass(frozen=True, slots=True)
class Task:
    """Part of a request: `request` holds the contenders to run now, `positions` their places in the whole."""

    number: int
    request: Request
    positions: tuple[int, ...]


class Device(Protocol):
    """What a worker needs of a device. Any method may raise; `trouble` then says whether the device can go on."""

    def about(self) -> dict[str, Any]:
        """What it is: "gpu", "triton" and "protocol" among it."""

    def prepare(self, stage: Stage, num_tokens: int) -> None:
        """Make the inputs of that batch size, unless they are there."""

    def check(self, stage: Stage, num_tokens: int, contender: Contender) -> tuple[str, str] | None:
        """Run once and hold the result against float64: the class of failure and a sentence, or None."""

    def sample(
        self, stage: Stage, num_tokens: int, contender: Contender, rounds: int, stop_us: float | None
    ) -> list[float]:
        """`rounds` samples, microseconds per call; only the first, if that is above stop_us."""

    def capture(self, stage: Stage, num_tokens: int, contender: Contender) -> Any:
        """Make ready for `replay`."""

    def replay(self, captured: Any) -> float:
        """One sample, microseconds per call."""

    def trouble(self) -> str | None:
        """Why nothing more can run on it after an error, or None."""

    def release(self) -> None:
        """Free what can be made again, after memory ran out."""


# By name, so that no class has to be imported (torch's and Triton's moved between versions); first match along the MRO.
_CLASSES: Mapping[str, str] = {
    "OutOfMemoryError": "memory",
    "OutOfResources": "resources",
    "SharedMemoryError": "resources",
    "TritonError": "compile",
}


def classify(error: BaseException) -> str:
    """The failure class (a key of FAILURES) of what a launch raised."""
    for ancestor in type(error).__mro__:
        if ancestor.__name__ in _CLASSES:
            return _CLASSES[ancestor.__name__]
    return "memory" if "out of memory" in str(error).lower() else "launch"


class _Lost(Exception):
    """The device cannot go on."""


class Worker:
    """Does tasks on a device. send: how it reports."""

    def __init__(self, device: Device, send: Callable[[tuple[Any, ...]], None]) -> None:
        self.device, self.send = device, send

    def run(self, task: Task) -> None:
        """Do a task: an "end" for each contender, then "done"; or "poisoned", and no more after that."""
        request, number = task.request, task.number
        try:
            self.send(("begin", number, -1))
            failed = self._attempt(lambda: self.device.prepare(request.stage, request.num_tokens))
            if failed is not None:
                for i in range(len(request.contenders)):
                    self.send(("end", number, i, failed))
            elif request.interleaved:
                self._interleave(task)
            else:
                for i, contender in enumerate(request.contenders):
                    self.send(("begin", number, i))
                    self.send(("end", number, i, self._one(request, contender)))
        except _Lost as error:
            self.send(("poisoned", number, str(error)))
        else:
            self.send(("done", number))

    def _one(self, request: Request, contender: Contender) -> Outcome:
        begin = time.perf_counter()
        samples: list[float] = []

        def measure() -> tuple[str, str] | None:
            verdict = self.device.check(request.stage, request.num_tokens, contender)
            if verdict is None:
                samples[:] = self.device.sample(
                    request.stage, request.num_tokens, contender, request.rounds, request.stop_above_us
                )
            return verdict

        outcome = self._attempt(measure) or Outcome(tuple(samples))
        return replace(outcome, measure_s=time.perf_counter() - begin)

    def _attempt(self, work: Callable[[], tuple[str, str] | None]) -> Outcome | None:
        """None, or the outcome of what failed. Raises _Lost if the device is no use any more."""
        try:
            verdict = work()
        except Exception as error:  # of any class: what it does to the device decides, and then its name
            failure, words = classify(error), first_words(error)
            trouble = self.device.trouble()
            if trouble is not None:
                raise _Lost(f"{words}; then {trouble}" if trouble not in words else words) from None
            del error
            if failure == "memory":
                self.device.release()
            return Outcome((), failure, words)
        return None if verdict is None else Outcome((), *verdict)

    def _interleave(self, task: Task) -> None:
        request, number = task.request, task.number
        ready: dict[int, Any] = {}
        seconds = [0.0] * len(request.contenders)
        samples: list[list[float]] = [[] for _ in request.contenders]

        def work_on(i: int, work: Callable[[], tuple[str, str] | None]) -> None:
            self.send(("begin", number, i))
            begin = time.perf_counter()
            failed = self._attempt(work)
            seconds[i] += time.perf_counter() - begin
            if failed is not None:
                ready.pop(i, None)
                self.send(("end", number, i, replace(failed, measure_s=seconds[i])))

        for i, contender in enumerate(request.contenders):
            work_on(i, lambda i=i, contender=contender: self._make_ready(request, i, contender, ready))  # type: ignore[misc]
        shuffle = random.Random(request.key())
        for _ in range(request.rounds):
            order = list(ready)
            shuffle.shuffle(order)
            for i in order:
                work_on(i, lambda i=i: samples[i].append(self.device.replay(ready[i])))  # type: ignore[misc]
        for i in ready:
            self.send(("end", number, i, Outcome(tuple(samples[i]), measure_s=seconds[i])))

    def _make_ready(
        self, request: Request, i: int, contender: Contender, ready: dict[int, Any]
    ) -> tuple[str, str] | None:
        verdict = self.device.check(request.stage, request.num_tokens, contender)
        if verdict is None:
            ready[i] = self.device.capture(request.stage, request.num_tokens, contender)
        return verdict


def serve(channel: Channel, device: str, arguments: Sequence[Any], problem: Problem) -> None:
    """A measuring process: tasks in, reports out."""
    try:
        made: Device = load(device)(problem, *arguments)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        print(said, flush=True)
        channel.send(("failed", isinstance(error, MoelabError), said))
        os._exit(1)
    gc.disable()  # a collection within a sample would be timed with it: one after each task, of what the task left
    channel.send(("ready", made.about()))

    def send(message: tuple[Any, ...]) -> None:
        channel.send(message)
        if message[0] == "poisoned":
            os._exit(1)  # nothing that ends politely works with a broken context

    worker = Worker(made, send)
    while True:
        gc.collect()
        gc.freeze()
        worker.run(channel.receive())
