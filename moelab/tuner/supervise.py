"""Who answers requests with processes: compile first, hand tasks to workers, and let no contender end the run.

A worker that hangs, dies or loses its device is replaced. The contender it was at is tried once more in the fresh one,
first; if that is lost too, the contender is quarantined: it fails, at this batch size and all others, and a repro is
written. The others of its request are run again as if nothing had been. Which device measures what is `placement`'s.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moelab.errors import RuntimeModeError
from moelab.tuner.child import Child
from moelab.tuner.compile import Compiled, CompilePool, Kernel, kernels_of
from moelab.tuner.crew import Crew, Event, Member, wait_for
from moelab.tuner.evaluate import Outcome, Request, Result
from moelab.tuner.placement import STAGES, Placement
from moelab.tuner.problem import Problem
from moelab.tuner.quarantine import Quarantine
from moelab.tuner.worker import Task

START_LIMIT_S = 300.0
"""Until a worker is ready: importing torch, and drawing the weights."""

PREPARE_LIMIT_S = 120.0
"""For the inputs of a batch size: routings of many tokens are drawn on the host."""


@dataclass
class _Open:
    """A request under way. missing: its kernels that are not compiled yet."""

    request: Request
    outcomes: list[Outcome | None]
    missing: set[Kernel]

    @property
    def left(self) -> list[int]:
        return [i for i, outcome in enumerate(self.outcomes) if outcome is None]


@dataclass(frozen=True)
class Incident:
    """A worker that was lost. clock_s: when; device: which; what: a sentence."""

    clock_s: float
    device: int
    what: str


class Supervisor:
    """Answers requests with worker processes: an Evaluator.

    start_worker: makes the child process of a device by number, `devices` of them. deadline_s: for one contender, from
    one report to the next. quarantine: a folder for repros, None for none. about: what `describe` says.
    Raises RuntimeModeError if no worker comes up.
    """

    def __init__(
        self,
        problem: Problem,
        pool: CompilePool,
        start_worker: Callable[[int], Child],
        *,
        devices: int,
        deadline_s: float,
        quarantine: Path | None,
        about: Mapping[str, Any],
    ) -> None:
        self.problem, self.pool, self.quarantine = problem, pool, Quarantine(problem, quarantine)
        self.incidents: list[Incident] = []
        self.crew = Crew(devices, start_worker, self._next_task, job_limit_s=deadline_s, start_limit_s=START_LIMIT_S)
        self.placement = Placement(problem.batch_sizes, range(devices))
        self._about, self._deadline_s = dict(about), deadline_s
        self._open: dict[int, _Open] = {}
        self._ready: deque[int] = deque()
        self._again: deque[Task] = deque()
        self._whole: deque[int] = deque()
        self._at: dict[int, tuple[int, int]] = {}
        self._charge: dict[Kernel, float] = {}
        self._numbers, self._began, self._before = 0, None, 0.0  # type: int, float | None, float

    # --- Evaluator --------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """See `Evaluator`."""
        return {**self._about, "devices": len(self.crew.members), "compile_processes": self.pool.processes}

    def recall(self, results: Sequence[Result]) -> None:
        """See `Evaluator`: the clock goes on, and what was quarantined stays so. Compiles are found in Triton's cache."""
        for result in results:
            for contender, outcome in zip(result.request.contenders, result.outcomes, strict=True):
                self._before += outcome.compile_s / self.pool.processes + outcome.measure_s / len(self.crew.members)
                self.quarantine.learn(result.request, contender, outcome)

    def learn(self, results: Sequence[Result]) -> None:
        """Take over what others found on this machine: what they compiled is in its cache, what they lost is bad."""
        for result in results:
            for contender, outcome in zip(result.request.contenders, result.outcomes, strict=True):
                self.quarantine.learn(result.request, contender, outcome)
                if result.request.rounds == 0:
                    for kernel in kernels_of(result.request.stage, contender):
                        self.pool.take_over(kernel, Compiled(0.0, outcome.failure, outcome.message))

    def run(self, requests: Sequence[Request]) -> Generator[Result, None, None]:
        """See `Evaluator`."""
        self._began = time.monotonic() if self._began is None else self._began
        numbers = [self._admit(request) for request in requests]
        self.crew.begin()  # workers come up while the compilers work
        try:
            while any(number in self._open for number in numbers):
                for kernel in self.pool.poll():
                    self._compiled(kernel)
                if self._ready or self._again or any(m.jobs for m in self.crew.members):
                    self.crew.feed()
                for event in self.crew.events():
                    self._handle(event)
                if not self._whole:
                    wait_for((self.pool.crew, self.crew))
                while self._whole:
                    yield self._finish(self._whole.popleft())
        finally:
            for number in numbers:
                self._open.pop(number, None)
            self._whole.clear()
            self.pool.drop_waiting()

    def clock_s(self) -> float:
        """See `Evaluator`: wall time since the first request, and what was recalled."""
        return self._before + (time.monotonic() - self._began if self._began is not None else 0.0)

    def close(self) -> None:
        """See `Evaluator`."""
        self.pool.close()
        self.crew.close()

    # --- requests ---------------------------------------------------------------------------------------------------

    def _admit(self, request: Request) -> int:
        self._numbers += 1
        missing = {kernel for kernel in _kernels(request) if kernel not in self.pool.known}
        self._open[self._numbers] = _Open(request, [None] * len(request.contenders), missing)
        self.pool.ask(_kernels(request))
        if not missing:
            self._all_compiled(self._numbers)
        return self._numbers

    def _compiled(self, kernel: Kernel) -> None:
        self._charge[kernel] = self.pool.known[kernel].seconds
        for number, open_ in list(self._open.items()):
            if kernel in open_.missing:
                open_.missing.remove(kernel)
                if not open_.missing:
                    self._all_compiled(number)

    def _all_compiled(self, number: int) -> None:
        """Decide the contenders that do not compile, and of a compile-only request all; queue what is left."""
        open_ = self._open[number]
        request = open_.request
        for i, contender in enumerate(request.contenders):
            found = [self.pool.known[kernel] for kernel in kernels_of(request.stage, contender)]
            failed = next((c for c in found if c.failure), None)
            if failed is not None:
                open_.outcomes[i] = Outcome((), failed.failure, failed.message)
            elif request.rounds == 0:
                open_.outcomes[i] = Outcome()
        if open_.left:
            self._ready.append(number)
        else:
            self._whole.append(number)

    def _finish(self, number: int) -> Result:
        open_ = self._open.pop(number)
        outcomes = []
        for contender, outcome in zip(open_.request.contenders, open_.outcomes, strict=True):
            if outcome is None:
                raise AssertionError(f"{open_.request} was called whole and is not")
            seconds = sum(self._charge.pop(k, 0.0) for k in kernels_of(open_.request.stage, contender))
            outcomes.append(replace(outcome, compile_s=seconds))
        return Result(open_.request, tuple(outcomes))

    # --- tasks ------------------------------------------------------------------------------------------------------

    def _next_task(self, device: int) -> Task | None:
        """The next for that device: first what was under way in a worker that was lost."""
        for task in [task for task in self._again if task.number not in self._open or self._owns(device, task.number)]:
            self._again.remove(task)
            made = self._task(task.number, task.positions) if task.number in self._open else None
            if made is not None:
                return made
        for number in [n for n in self._ready if n not in self._open or self._owns(device, n)]:
            self._ready.remove(number)
            made = self._task(number, self._open[number].left) if number in self._open else None
            if made is not None:
                return made
        return None

    def _owns(self, device: int, number: int) -> bool:
        request = self._open[number].request
        return self.placement.owner(request.stage, request.num_tokens) == device

    def _task(self, number: int, positions: Iterable[int]) -> Task | None:
        """A task of those positions, less what is quarantined or done; None, and the request whole, if none is left."""
        open_ = self._open[number]
        request = open_.request
        for i in open_.left:
            known = self.quarantine.known(request.stage, request.contenders[i])
            if known is not None:
                open_.outcomes[i] = Outcome((), *known)
        left = tuple(i for i in positions if open_.outcomes[i] is None)
        if left:
            return Task(number, replace(request, contenders=tuple(request.contenders[i] for i in left)), left)
        if number not in self._whole:
            self._whole.append(number)
        return None

    def _handle(self, event: Event) -> None:
        if event.lost is not None:
            self._lost(event.member, event.lost, event.why, event.jobs)
            return
        kind, member = event.message[0], event.member
        if kind == "failed":
            self._failed(*event.message[1:])
        elif kind == "ready":
            self._warm(member)
        elif kind == "begin":
            self._at[member.number] = event.message[1:]
            member.limit_s = self._deadline_s if event.message[2] >= 0 else PREPARE_LIMIT_S
        elif kind == "end":
            self._end(member, *event.message[1:])
        elif kind == "done":
            self._done(member)
        elif kind == "poisoned":
            self._lost(member, "crash", event.message[2], self.crew.drop(member))

    def _warm(self, member: Member) -> None:
        """Have a worker make its inputs while others compile: it has nothing else to do."""
        if not any(open_.missing for open_ in self._open.values()):
            return
        for b in self.problem.batch_sizes:
            for stage in STAGES:
                if self.placement.owner(stage, b) == member.number:
                    self.crew.give(member, Task(0, Request(stage, b, (), 0), ()))

    @staticmethod
    def _failed(is_final: bool, text: str) -> None:
        if is_final:
            raise RuntimeModeError(f"A worker cannot measure here. {text}")

    def _end(self, member: Member, number: int, index: int, outcome: Outcome) -> None:
        if member.jobs and number in self._open and member.jobs[0].number == number:
            self._open[number].outcomes[member.jobs[0].positions[index]] = outcome

    def _done(self, member: Member) -> None:
        number = member.jobs[0].number if member.jobs else None
        self.crew.done(member)
        self._at.pop(member.number, None)
        if number in self._open and not self._open[number].left:
            self._whole.append(number)

    # --- losses -----------------------------------------------------------------------------------------------------

    def _lost(self, member: Member, lost: str, why: str, jobs: Sequence[Task]) -> None:
        """Blame the contender that was begun, and take up again what the worker held, its task first."""
        at = self._at.pop(member.number, None)
        if member.retired:
            self.placement.drop(member.number)
        if jobs or member.about is None:
            self.incidents.append(Incident(self.clock_s(), member.number, f"{lost}: {why}"))
        again = list(jobs)
        if again and at is not None and again[0].number == at[0] and at[0] in self._open:
            again[0] = self._blame(again[0], at[1], lost, why)
        self._again.extendleft(reversed(again))

    def _blame(self, task: Task, index: int, lost: str, why: str) -> Task:
        """The task to go on with: its suspect first, or no more."""
        if index < 0:  # in the inputs: if that happens again, nothing of this request can be measured
            if self.quarantine.is_second_loss((task.request.stage, task.request.num_tokens, ())):
                for i in task.positions:
                    self._open[task.number].outcomes[i] = Outcome((), lost, f"its inputs cost two workers: {why}")
            return task
        suspect, contender = task.positions[index], task.request.contenders[index]
        if self._open[task.number].outcomes[suspect] is not None:  # it was through, and said so
            return task
        request = task.request
        if self.quarantine.is_second_loss((request.stage, request.num_tokens, contender)):
            self.quarantine.put_away(request, contender, lost, why)
        order = task.positions if request.interleaved else (suspect, *(i for i in task.positions if i != suspect))
        return replace(task, positions=order)


def _kernels(request: Request) -> list[Kernel]:
    return [kernel for contender in request.contenders for kernel in kernels_of(request.stage, contender)]
