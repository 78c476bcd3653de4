"""Crew: some child processes that take work from one queue, are watched, and are started anew when they are lost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from moelab.errors import RuntimeModeError
from moelab.tuner.child import Child

NextJob = Callable[[int], Any]
"""Gives the next job for the member of that number, None if there is none now."""

JOBS_AHEAD = 2
"""Jobs that a child holds: while it does one the next is there, whatever the parent is busy with."""

_BUSY_S = 2.0
"""A parent that has not listened for so long was busy elsewhere (a paused session); `wait_for` waits a quarter of it."""

MOST_STARTS = 3
"""Starts in a row after which a member that never came up is given up."""


@dataclass
class Member:
    """One place in the crew, and the child that fills it now. jobs: sent and not done, oldest first.

    about: what the child said of itself when it came up; None before. limit_s: seconds until its next message is due.
    """

    number: int
    child: Child | None = None
    jobs: deque[Any] = field(default_factory=deque)
    about: Any = None
    limit_s: float = 0.0
    since: float = 0.0
    starts: int = 0
    retired: bool = False


@dataclass(frozen=True)
class Event:
    """A message of a member; or, without one, its loss. lost: "timeout" or "crash"; why: a sentence; jobs: what it held."""

    member: Member
    message: Any = None
    lost: str | None = None
    why: str = ""
    jobs: tuple[Any, ...] = ()


class Crew:
    """Up to `size` children. start: makes the child of a place. next_job: where work comes from.

    A child says ("ready", about) first; ("failed", class, text) in its place is an Event too. job_limit_s: seconds
    between two messages of a child at work, start_limit_s: until it is ready. Time in which nobody asks for `events` is
    nobody's delay. Who gets an Event calls `done` when a member has done its oldest job.
    """

    def __init__(
        self,
        size: int,
        start: Callable[[int], Child],
        next_job: NextJob,
        *,
        job_limit_s: float,
        start_limit_s: float,
    ) -> None:
        self.members = [Member(i) for i in range(size)]
        self._start, self._next_job = start, next_job
        self.job_limit_s, self.start_limit_s = job_limit_s, start_limit_s
        self._listened = time.monotonic()
        self._last_loss = ""

    def connections(self) -> list[Any]:
        """What to wait on for the next message."""
        return [m.child.connection for m in self.members if m.child is not None]

    def next_deadline(self) -> float:
        """time.monotonic() of the next deadline, infinite without one."""
        return min((m.since + m.limit_s for m in self.members if self._is_due(m)), default=float("inf"))

    @staticmethod
    def _is_due(member: Member) -> bool:
        return member.child is not None and (bool(member.jobs) or member.about is None)

    def begin(self) -> None:
        """Start the places that have no child, before there is work."""
        for member in self.members:
            if member.child is None and not member.retired:
                self._raise_up(member)

    def _raise_up(self, member: Member) -> None:
        member.child, member.about = self._start(member.number), None
        member.starts += 1
        member.since, member.limit_s = time.monotonic(), self.start_limit_s

    def feed(self) -> None:
        """Hand out work until every member holds JOBS_AHEAD jobs; places without a child get one if there is work."""
        if all(m.retired for m in self.members):
            raise RuntimeModeError(
                f"No worker process is left: each failed to start {MOST_STARTS} times in a row, the last one because "
                f"{self._last_loss}. Expected one that comes up. Free the device's memory, or correct what it says."
            )
        for depth in range(JOBS_AHEAD):
            for member in self.members:
                if len(member.jobs) > depth or member.retired:
                    continue
                job = self._next_job(member.number)
                if job is None:
                    continue
                if member.child is None:
                    self._raise_up(member)
                self.give(member, job)

    def give(self, member: Member, job: Any) -> None:
        """Hand a job to one member, whatever it holds."""
        if member.child is not None:
            if not member.jobs and member.about is not None:
                member.since, member.limit_s = time.monotonic(), self.job_limit_s
            member.jobs.append(job)
            member.child.send(job)

    def done(self, member: Member) -> None:
        """Its oldest job is done."""
        if member.jobs:
            member.jobs.popleft()

    def events(self) -> Iterator[Event]:
        """What has come in, and who was lost, one by one: each is to be dealt with before the next. Never waits."""
        now = time.monotonic()
        if now - self._listened > _BUSY_S:
            for member in self.members:
                member.since += now - self._listened
        for member in self.members:
            yield from self._drain(member)
        now = self._listened = time.monotonic()
        for member in self.members:
            if self._is_due(member) and now - member.since > member.limit_s:
                yield self._lose(member, "timeout", f"no answer for {member.limit_s:.3g} s")

    def _drain(self, member: Member) -> Iterator[Event]:
        child = member.child
        while child is not None and child is member.child:
            try:
                if not child.connection.poll():
                    return
                message = child.connection.recv()
            except (EOFError, OSError):
                yield self._lose(member, "crash", "")
                return
            member.since, member.limit_s = time.monotonic(), self.job_limit_s
            if message[0] == "ready":
                member.about, member.starts = message[1], 0
            yield Event(member, message)

    def drop(self, member: Member) -> tuple[Any, ...]:
        """Kill a member's child; the jobs it held."""
        return self._lose(member, "crash", "dropped").jobs

    def _lose(self, member: Member, lost: str, why: str) -> Event:
        child, jobs = member.child, tuple(member.jobs)
        member.child = None
        member.jobs.clear()
        if child is not None:
            status = child.kill() if lost == "timeout" or why else child.status()
            said = child.last_words()
            why = why or f"the process ended with status {status}"
            why += f": {said}" if said else ""
        if member.about is None and member.starts >= MOST_STARTS:
            member.retired = True
        self._last_loss = why
        return Event(member, lost=lost, why=why, jobs=jobs)

    def close(self) -> None:
        """Kill every child. May be called twice."""
        children = [member.child for member in self.members if member.child is not None]
        for child in children:
            child.process.kill()
        for member in self.members:
            member.child, member.starts = None, 0
            member.jobs.clear()
        for child in children:
            child.kill()


def wait_for(crews: Iterable[Crew]) -> None:
    """Wait until a child of one of the crews says something, ends, or is due; half a second at most."""
    crews = list(crews)
    due = min((crew.next_deadline() for crew in crews), default=float("inf")) - time.monotonic()
    wait([c for crew in crews for c in crew.connections()], max(0.0, min(due, _BUSY_S / 4)))
