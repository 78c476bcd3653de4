"""TuneSession: one run from start to result, with progress, pause and stop, a journal, and a way to take it up again."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moelab import runtime
from moelab.errors import RuntimeModeError
from moelab.tuner.board import Board
from moelab.tuner.coverage import Coverage, covered, needed_s
from moelab.tuner.evaluate import Evaluator, Request, Result, tidy
from moelab.tuner.header import last_budget, make_header, read_header
from moelab.tuner.journal import Content, Journal
from moelab.tuner.known import Known
from moelab.tuner.problem import Problem
from moelab.tuner.progress import Pace, Progress
from moelab.tuner.results import BatchResult, TuneResult, decide, provisional
from moelab.tuner.search import Search, Settings, Step, samples_of
from moelab.tuner.space import build_space
from moelab.tuner.strategies import plan

PROGRESS_EVERY_S = 0.05
"""Shortest time between two reports of progress within a phase: each looks through the whole board."""

MakeEvaluator = Callable[[Problem], Evaluator]


class _Stop(Exception):
    """The run was asked to stop; it is taken up again from its journal."""


class TuneSession:
    """A tuning run. `run` blocks; `start` runs it in a thread, for notebooks. Made by `TuneSession(...)` or `resume`.

    problem: what is tuned. evaluator: who measures. strategy: a name of STRATEGIES. run: path of the journal, None for
    none. budget_s: seconds on the evaluator's clock, of which the search takes SEARCH_SHARE, and compiling ahead COMPILE_SHARE
    (search.py); the finals are always run.
    on_progress: called with a `Progress` in the run's thread: after the first and the last result of a phase, and in between
    after a result at most every PROGRESS_EVERY_S.
    Raises UnknownNameError for an unknown strategy, JournalError if the journal is there already or in use.
    """

    def __init__(
        self,
        problem: Problem,
        evaluator: Evaluator,
        *,
        strategy: str = "race",
        settings: Settings | None = None,
        run: str | Path | None = None,
        budget_s: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._set_up(problem, evaluator, strategy, settings or Settings(), budget_s, on_progress)
        self._journal = (
            Journal.create(run, make_header(self.search, strategy, self.budget_s, evaluator))
            if run is not None
            else None
        )

    def _set_up(
        self,
        problem: Problem,
        evaluator: Evaluator,
        strategy: str,
        settings: Settings,
        budget_s: float | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        space = build_space(problem)
        self.problem, self.evaluator, self.strategy = problem, evaluator, strategy
        self.budget_s = None if budget_s == math.inf else budget_s
        self.board = Board(problem, space)
        self.search = Search(problem, space, self.board, settings)
        self._plan = plan(strategy, self.search)
        self._on_progress = on_progress
        self._known = Known(self.board)
        self._decided: dict[int, BatchResult] = {}
        self._searched: list[Step] = []
        self._cut: dict[str, None] = {}
        self._ended: set[str] = set()
        self._pace, self._state = Pace(), "new"
        self._go, self._stopping = threading.Event(), False
        self._go.set()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @classmethod
    def resume(
        cls,
        run: str | Path,
        make_evaluator: MakeEvaluator,
        *,
        budget_s: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> TuneSession:
        """Take up the run whose journal that is: the same problem, strategy and settings; what is in it is not measured
        again. budget_s: a new budget, infinite for none; None for the one that the run had last. Raises JournalError as
        `Journal.resume` does."""
        origin = runtime.provenance()  # first: it starts other programs, which must not share the lock
        journal = Journal.resume(run)
        try:
            header = journal.content.header
            problem, settings = read_header(run, header)
            self = cls.__new__(cls)
            budget_s = last_budget(journal.content) if budget_s is None else budget_s
            evaluator = make_evaluator(problem)
            self._set_up(problem, evaluator, header["strategy"]["name"], settings, budget_s, on_progress)
            self._take_in(journal.content)
            self._journal = journal
            journal.note(
                "resumed",
                provenance=origin | {"seed": problem.seed},
                evaluator=evaluator.describe(),
                budget_s=self.budget_s,
            )
        except BaseException:
            journal.close()
            raise
        return self

    def _take_in(self, content: Content) -> None:
        self._known = Known(self.board, content.results.values())
        self.evaluator.recall(list(content.results.values()))
        for note in content.notes:
            if note["kind"] == "phase":
                self._pace.timeline.append((note["name"], note["clock_s"]))
            elif note["kind"] == "cut" and self.budget_s is not None and note["budget_s"] >= self.budget_s:
                self._ended.add(note["phase"])

    # --- running --------------------------------------------------------------------------------------------------

    def run(self) -> TuneResult:
        """Run to the end, or until `stop`; the result so far. Ctrl-C passes through once everything is on disk and the
        evaluator is closed. What ends the run (a full disk, an evaluator that cannot go on) is raised."""
        if self._state in ("running", "paused", "finished"):
            raise RuntimeModeError(
                f"This session is {self._state}. Expected a new one, or one that was stopped. Make another TuneSession."
            )
        self._state = "running"
        try:
            self._drive()
            self._state = "finished"
        except _Stop:
            self._state = "stopped"
        except KeyboardInterrupt:
            self._state = "stopped"
            raise
        except BaseException:
            self._state = "failed"
            raise
        finally:
            self._shut()
        return self.result()

    def start(self) -> TuneSession:
        """Run in a thread and return at once; `wait` for the end."""
        self._thread = threading.Thread(target=self._run_quietly, name="moelab-tune", daemon=True)
        self._thread.start()
        return self

    def _run_quietly(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self._error = error

    def wait(self, timeout: float | None = None) -> TuneResult:
        """Wait for a started session and return its result so far; raises what ended it."""
        if self._thread is not None:
            self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        return self.result()

    def pause(self) -> None:
        """Hold after the result that is under way; `unpause` goes on."""
        self._go.clear()

    def unpause(self) -> None:
        """Go on after `pause`."""
        self._go.set()

    def stop(self) -> None:
        """End after the result that is under way. The journal can be taken up with `resume`."""
        self._stopping = True
        self._go.set()

    def _drive(self) -> None:
        step = next(self._plan)
        while True:
            answers = self._answer(step)
            try:
                step = self._plan.send(answers)
            except StopIteration as end:
                self._finish(end.value)
                return

    def _answer(self, step: Step) -> list[Result | None]:
        missing = self._known.missing(step.requests)
        self.board.add(self._known.untold(step.requests))
        self._enter(step, missing)
        if missing and not self._spent(step):
            with contextlib.closing(self.evaluator.run(missing)) as results:
                for result in results:
                    self._record(result)
                    if self._spent(step):
                        break
        answers = [self._known.answer(request) for request in step.requests]
        if not step.needed:
            self._searched.append(step)
            if None in answers:
                self._cut_short(step.phase)
        return answers

    def _cut_short(self, phase: str) -> None:
        """The budget ended that phase. So it is for whoever takes the run up with no more: a clock read a little earlier
        would search on, and compare other finalists."""
        self._cut[phase] = None
        if self._journal is not None and phase not in self._ended:
            self._journal.note("cut", phase=phase, budget_s=self.budget_s)

    def _enter(self, step: Step, missing: Sequence[Request]) -> None:
        pace, total = self._pace, samples_of(step.requests)
        pace.phase, pace.total, pace.later = step.phase, total, step.later
        pace.done, pace.fresh, pace.began_s = total - samples_of(missing), 0, self.evaluator.clock_s()
        pace.reported_s = None
        entered = [name for name, _ in pace.timeline]
        if missing and (step.phase not in entered or (step.phase != entered[-1] and not self._spent(step))):
            pace.timeline.append((step.phase, pace.began_s))
            if self._journal is not None:
                self._journal.note("phase", name=step.phase, clock_s=pace.began_s)
        self._hold()

    def _spent(self, step: Step) -> bool:
        if step.needed or self.budget_s is None:
            return False
        return step.phase in self._ended or self.evaluator.clock_s() >= step.share * self.budget_s

    def _record(self, result: Result) -> None:
        result = tidy(result)
        if self._journal is not None:
            self._journal.append(result)
        self._known.add(result)
        self.board.add([result])
        count = samples_of([result.request])
        self._pace.done += count
        self._pace.fresh += count
        self._report()
        self._hold()

    def _report(self) -> None:
        pace, now = self._pace, time.monotonic()
        edge = pace.reported_s is None or pace.done >= pace.total
        if self._on_progress is not None and (edge or now - (pace.reported_s or 0.0) > PROGRESS_EVERY_S):
            pace.reported_s = now
            self._on_progress(self.progress())

    def _hold(self) -> None:
        if not self._go.is_set():
            self._state = "paused"
            self._go.wait()
            self._state = "running"
        if self._stopping:
            raise _Stop

    def _finish(self, layers: Mapping[int, Result | None]) -> None:
        for b, result in layers.items():
            self._decided[b] = decide(b, self.board.incumbents(b), result)
        if self._journal is not None:
            self._journal.note("finished", clock_s=self.evaluator.clock_s(), winners=self.result().rows())

    def _shut(self) -> None:
        self._plan.close()
        self.evaluator.close()
        if self._journal is not None:
            self._journal.close()

    # --- looking --------------------------------------------------------------------------------------------------

    def progress(self) -> Progress:
        """Where the run stands now."""
        pace, spent = self._pace, self.evaluator.clock_s()
        eta = None
        if pace.fresh and self._state == "running":
            eta = (spent - pace.began_s) / pace.fresh * (pace.total - pace.done + pace.later)
        best = {b: t for b in self.problem.batch_sizes if math.isfinite(t := self.board.best_us(b))}
        return Progress(self._state, pace.phase, pace.done, pace.total, spent, eta, best, dict(self.board.failures))

    def results(self) -> tuple[Result, ...]:
        """Every result so far, those taken over from the journal included."""
        return tuple(self._known.results)

    def result(self) -> TuneResult:
        """What is known now: decided batch sizes, and the best so far of the others."""
        batches = {b: self._decided.get(b) or provisional(self.board, b) for b in self.problem.batch_sizes}
        spent = self.evaluator.clock_s()
        described = self.evaluator.describe()
        source = described.get("source") or f"measured on {self.problem.device}, triton {self.problem.triton_version}"
        return TuneResult(
            self.problem, batches, source, spent, self._pace.seconds(spent), dict(self.board.failures), self.coverage()
        )

    def coverage(self) -> Coverage:
        """How much of the candidates was compiled and measured so far, and what the budget cut."""
        batches, needed = {b: covered(self.board, b) for b in self.problem.batch_sizes}, None
        if self._cut and self.budget_s is not None:
            spent, about = self.evaluator.clock_s(), self.evaluator.describe()
            needed = max(self.budget_s, needed_s(self._searched, self._known, spent, about))
        return Coverage(self.budget_s, tuple(self._cut), batches, needed)
