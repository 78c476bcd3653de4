"""Requests answered by a Ray cluster: one actor for each GPU of any number of nodes, work handed out as it finishes.

An actor holds an evaluator of its own: a `GpuEvaluator` of its one GPU, which deals with hangs and crashes there, or for
trials the replay of a landscape. moelab has to be installed on every node. Kernels are compiled once on each node, by one
of its actors. An actor that dies is replaced, and what it had been handed is done again.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from moelab.errors import MoelabError, RuntimeModeError
from moelab.tuner.actor import Host, import_ray
from moelab.tuner.compile import kernels_of
from moelab.tuner.evaluate import Request, Result
from moelab.tuner.landscape import Landscape
from moelab.tuner.placement import Placement
from moelab.tuner.problem import Problem
from moelab.tuner.replay import _require_same as require_same
from moelab.tuner.seats import Job, Known, Seat, compile_requests, is_bad
from moelab.tuner.supervise import Incident

START_LIMIT_S = 300.0
"""Until an actor is up: Ray starts a process on its node, which imports torch."""

MOST_LOSSES = 3
"""Times in a row that a seat's actor may be lost without an answer in between."""


class RayEvaluator:
    """An Evaluator on a Ray cluster.

    address: as ray.init takes it ("auto", "ray://HOST:PORT"); None or "local" starts Ray on this machine. landscape: have
    the actors replay it, `actors` of them, in place of GPUs. actors: default one for each GPU of the cluster.
    Raises RuntimeModeError without Ray, without a GPU in the cluster, or when no actor comes up.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        address: str | None = None,
        landscape: Landscape | None = None,
        actors: int | None = None,
    ) -> None:
        local = address in (None, "local")
        self.problem, self.ray = problem, import_ray(local)
        if landscape is not None:
            require_same(problem, landscape)
        self._own = not self.ray.is_initialized()
        if self._own:
            given = {"include_dashboard": False} if local else {"address": address}
            # What Ray says of its own safety, that it takes commands from whoever reaches it without a token, is for the user.
            self.ray.init(log_to_driver=False, logging_level="WARNING", **given)
        self._landscape = landscape if landscape is None else self.ray.put(landscape)
        count = actors or (int(self.ray.cluster_resources().get("GPU", 0)) if landscape is None else 1)
        if count < 1:
            self.close()
            raise RuntimeModeError(
                f"The Ray cluster at {address or 'this machine'} has no GPU. Expected at least one. Run `ray start` on GPU "
                "nodes, or pass --replay LANDSCAPE."
            )
        self.incidents: list[Incident] = []
        self._known = Known()
        self._pending: dict[Any, tuple[Seat, Job | None]] = {}
        self._jobs: deque[Job] = deque()
        self._described: dict[str, Any] = {}
        self._spent_s, self._wall_from = 0.0, None  # type: float, float | None
        self._remote = self.ray.remote(num_cpus=0, num_gpus=1 if landscape is None else 0, max_restarts=0)(Host)
        self.seats = [Seat(i) for i in range(count)]
        self.placement = Placement(problem.batch_sizes, range(count))
        for seat in self.seats:
            self._start(seat)
        self._wait_until_up()

    # --- Evaluator --------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """See `Evaluator`: as an actor describes its own, and how many there are."""
        return {**self._described, "ray_actors": len(self.seats)}

    def recall(self, results: Sequence[Result]) -> None:
        """See `Evaluator`."""
        processes = self._described.get("compile_processes", 1)
        for result in results:
            for outcome in result.outcomes:
                self._spent_s += outcome.compile_s / processes + outcome.measure_s / len(self.seats)
        self._share([result for result in results if is_bad(result) or self._landscape], None)

    def run(self, requests: Sequence[Request]) -> Generator[Result, None, None]:
        """See `Evaluator`. What has to be compiled is compiled first, on every node."""
        self._wall_from = time.monotonic() if self._wall_from is None else self._wall_from
        try:
            yield from self._compile(requests)
            self._barrier()
            for result in self._answers(Job(request) for request in requests if request.rounds):
                yield self._charged(result)
        finally:
            for job in (*self._jobs, *(job for _, job in self._pending.values() if job is not None)):
                job.dropped = True
            self._jobs.clear()
            self._barrier()

    def clock_s(self) -> float:
        """See `Evaluator`: wall time; of replays, the simulated time of the actor that was busy longest in each step."""
        if self._described.get("measured"):
            return self._spent_s + (time.monotonic() - self._wall_from if self._wall_from is not None else 0.0)
        return self._spent_s + max((seat.clock_s for seat in self.seats), default=0.0)

    def close(self) -> None:
        """See `Evaluator`: the actors go, and Ray with them if it was started here."""
        for seat in getattr(self, "seats", ()):
            if seat.actor is not None:
                self.ray.kill(seat.actor)
                seat.actor, seat.up = None, False
        if self._own and self.ray.is_initialized():
            self.ray.shutdown()

    def _barrier(self) -> None:
        """The end of a step for all: who finished early waited."""
        if not self._described.get("measured"):
            self._spent_s = self.clock_s()
        for seat in self.seats:
            seat.clock_s = 0.0

    # --- compiling --------------------------------------------------------------------------------------------------

    def _compile(self, requests: Sequence[Request]) -> Iterator[Result]:
        """Compile what the requests need on every node; the results of those that only ask for that."""
        asked = {request for request in requests if request.rounds == 0}
        needed = dict.fromkeys(k for r in requests for c in r.contenders for k in kernels_of(r.stage, c))
        offered = {k for r in asked for c in r.contenders for k in kernels_of(r.stage, c)}
        extra = [k for k in needed if k not in offered and k not in self._known.kernels]
        jobs = [*dict.fromkeys(r for r in requests if r in asked), *compile_requests(self.problem, extra)]
        nodes = sorted({seat.node for seat in self.seats if seat.up})
        left = {request: len(nodes) for request in jobs}
        first: dict[Request, Result] = {}
        for result in self._answers(Job(request, node) for request in jobs for node in nodes):
            request = result.request
            first.setdefault(request, result)
            left[request] -= 1
            if left[request] == 0:
                self._known.add_compiled(first[request], nodes, charged=request in asked)
                self._share([first[request]], None)
                if request in asked:
                    yield first[request]

    def _charged(self, result: Result) -> Result:
        """With the time that was spent on compiling ahead for it."""
        outcomes = [
            replace(outcome, compile_s=outcome.compile_s + self._known.take_charge(result, i))
            for i, outcome in enumerate(result.outcomes)
        ]
        return Result(result.request, tuple(outcomes))

    def _share(self, results: list[Result], but: Seat | None) -> None:
        """Tell the other actors, now and those to come."""
        self._known.bad += [result for result in results if is_bad(result)]
        for seat in self.seats:
            if results and seat.up and seat is not but:
                seat.actor.learn.remote(results)

    # --- handing out ------------------------------------------------------------------------------------------------

    def _answers(self, jobs: Iterable[Job]) -> Iterator[Result]:
        """Hand out jobs and give back what comes, until all are answered."""
        self._jobs.extend(jobs)
        while self._jobs or any(job is not None and not job.dropped for _, job in self._pending.values()):
            self._hand_out()
            for ref in self.ray.wait(list(self._pending), num_returns=1, timeout=START_LIMIT_S)[0]:
                result = self._take(ref)
                if result is not None:
                    yield result

    def _hand_out(self) -> None:
        if not self._described.get("measured"):
            # A replay answers at once: the next job goes to who is free first by the simulated clock, not by the wall's.
            if not any(seat.busy for seat in self.seats):
                any(self._hand(seat) for seat in sorted(self.seats, key=lambda seat: seat.clock_s))
            return
        for depth in range(2):  # a GPU shall not wait for its next
            for seat in self.seats:
                if seat.busy <= depth:
                    self._hand(seat)

    def _hand(self, seat: Seat) -> bool:
        job = self._job_for(seat) if seat.up else None
        if job is not None:
            seat.busy += 1
            self._pending[seat.actor.answer.remote(job.request)] = (seat, job)
        return job is not None

    def _job_for(self, seat: Seat) -> Job | None:
        """The first job that this seat may do: compiling for a node is for the first of its seats, measuring a batch size for
        the seat that has it (replayed devices are all the same: there for any)."""
        leads = next(s for s in self.seats if s.up and s.node == seat.node) is seat
        for job in self._jobs:
            if job.node is None:
                measured = self._described.get("measured") and job.request.rounds
                mine = not measured or self.placement.owner(job.request.stage, job.request.num_tokens) == seat.number
            else:
                mine = job.node == seat.node and leads
            if mine:
                self._jobs.remove(job)
                return job
        return None

    def _take(self, ref: Any) -> Result | None:
        """What a finished call brought: a result, an actor that is up, or the news that one is lost."""
        seat, job = self._pending.pop(ref)
        seat.busy -= job is not None
        try:
            found = self.ray.get(ref)
        except self.ray.exceptions.RayActorError as error:
            self._lost(seat, job, error)
            return None
        except self.ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            raise cause if isinstance(cause, MoelabError) else error from None
        if isinstance(found, dict):
            self._is_up(seat, found)
            return None
        result, seconds = found
        seat.clock_s += seconds
        seat.losses = 0
        if job is None or job.dropped:
            return None
        if is_bad(result) and self._landscape is None:
            self._share([result], seat)
        return result

    # --- actors -----------------------------------------------------------------------------------------------------

    def _start(self, seat: Seat) -> None:
        seat.up, seat.busy = False, 0
        seat.actor = self._remote.remote(self.problem, self._landscape)
        self._pending[seat.actor.about.remote()] = (seat, None)

    def _is_up(self, seat: Seat, about: dict[str, Any]) -> None:
        if about["device"] != self.problem.device:
            self._note(seat, f"{about['node']} has {about['device']}, and the problem is of {self.problem.device}")
            self._give_up(seat)
            return
        seat.node, seat.up = about["node"], True
        self._described = self._described or {
            "address": self.ray.get_runtime_context().gcs_address,
            **about["described"],
        }
        known = self._known
        told = known.bad + (known.compiled if seat.node in known.nodes or self._landscape else [])
        if told:
            seat.actor.learn.remote(told)

    def _wait_until_up(self) -> None:
        until = time.monotonic() + START_LIMIT_S
        while self._pending and time.monotonic() < until:
            for ref in self.ray.wait(list(self._pending), num_returns=1, timeout=until - time.monotonic())[0]:
                self._take(ref)
        for seat in [seat for seat in self.seats if not seat.up]:
            self._note(seat, f"the actor was not up within {START_LIMIT_S:.0f} s")
            self._give_up(seat)

    def _lost(self, seat: Seat, job: Job | None, error: Exception) -> None:
        """Take back all that the seat's actor had been handed, and start another."""
        dead = [ref for ref, (owner, _) in self._pending.items() if owner is seat]
        handed = [job, *(self._pending.pop(ref)[1] for ref in dead)]
        seat.up = False
        self._jobs.extendleft(j for j in reversed(handed) if j is not None and not j.dropped)
        nodes = {s.node for s in self.seats if s.up}
        for waiting in self._jobs:
            if waiting.node not in nodes:
                waiting.node = None
        said = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # Ray colours its messages
        lines = [line for line in said.splitlines() if line.strip()] or [type(error).__name__]
        seat.losses += 1
        self._note(seat, f"the actor was lost: {' ... '.join(dict.fromkeys((lines[0].strip(), lines[-1].strip())))}")
        if seat.losses >= MOST_LOSSES:
            self._give_up(seat)
        else:
            self._start(seat)

    def _give_up(self, seat: Seat) -> None:
        self.seats.remove(seat)
        self.placement.drop(seat.number)
        if seat.actor is not None:
            self.ray.kill(seat.actor)
        if not self.seats:
            what = self.incidents[-1].what if self.incidents else "none came up"
            self.close()
            raise RuntimeModeError(
                f"No actor of the Ray cluster can measure: {what}. Expected at least one on {self.problem.device}. Look at "
                "`ray status`, and check that moelab is installed on every node."
            )

    def _note(self, seat: Seat, what: str) -> None:
        self.incidents.append(Incident(self.clock_s(), seat.number, what))
