"""A tuner to start, pause, stop and take up again from a notebook: on a GPU it measures, elsewhere it replays.

The session runs in a thread, so that the notebook stays responsive; its journal lies on disk, so that a restarted kernel
finds it among `Runs`. An exception of a drawing function does not end a run, but `wait` raises it.
"""

from __future__ import annotations

import functools
import html
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets as widgets

from moelab import runtime
from moelab.errors import MoelabError
from moelab.plots import tuning as plots
from moelab.shapes import MoEShape
from moelab.tuner import runs as run_files
from moelab.tuner.evaluate import Evaluator
from moelab.tuner.finals import Finals
from moelab.tuner.landscape import Landscape, default_name, load
from moelab.tuner.problem import Problem
from moelab.tuner.progress import Progress
from moelab.tuner.replay import Table
from moelab.tuner.session import TuneSession
from moelab.tuner.snapshot import Snapshot, best_until, snapshot
from moelab.tuner.starting import evaluator_of, gpu_problem, replay_of, replay_problem
from moelab.tuner.strategies import STRATEGIES
from moelab.widgets import page
from moelab.widgets.choice import Choice
from moelab.widgets.fields import dropdown
from moelab.widgets.panels import show

DRAW_EVERY_S = 0.4
"""Shortest time between two drawings of a run under way."""

PAUSE_S = 0.6
"""How long Pause waits for the measurement under way before it says so anyway: a replay's longest wait and a bit."""

SPEEDS = (("1 ×", 1.0), ("10 ×", 10.0), ("50 ×", 50.0), ("no waiting", math.inf))
BUDGETS = (("none", math.inf), ("10 s", 10.0), ("30 s", 30.0), ("2 min", 120.0), ("10 min", 600.0))


class LiveTuner(widgets.VBox):
    """Controls and status of one run at a time. landscape: replayed where there is no GPU, and whose layer is tuned where
    there is one, unless `shape` names another. landscapes: names of others in data/landscapes to choose among. runs: folder of
    the journals. choice: told of the finals of a run that ended. Every button calls the method of its name.
    """

    def __init__(
        self,
        landscape: Landscape,
        runs: str | Path,
        choice: Choice,
        *,
        shape: MoEShape | None = None,
        landscapes: Sequence[str] = (),
        speed: float = 10.0,
    ) -> None:
        super().__init__()
        self.landscape, self.runs, self.choice = landscape, Path(runs), choice
        self.shape = shape or landscape.problem.shape
        self.live = runtime.current().mode == "gpu"
        self.session: TuneSession | None = None
        self._history: list[Snapshot] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._drawn, self._said = 0.0, ""
        self._first, self._layers = landscape, list(dict.fromkeys([landscape.name, *landscapes]))
        self._make_controls(speed)
        page.furnish(self, [self._settings, self._buttons, self.sign], [self.output])
        self.find_runs()
        self.draw()

    # --- controls -------------------------------------------------------------------------------------------------

    def _make_controls(self, speed: float) -> None:
        few, options = self._batches()
        self.layer = dropdown("Landscape", self._layers, self._layers[0])
        self.strategy = dropdown("Strategy", tuple(STRATEGIES), "race")
        self.sizes = dropdown("Batches", options, few)
        self.budget = dropdown("Time limit", BUDGETS, math.inf)
        self.speed = dropdown("Replay speed", SPEEDS, speed)
        self.speed.disabled = self.live
        self.shown = dropdown("Shown batch", few, few[-1])
        self.found = dropdown("Runs", [("none found", "")], "")
        self.found.layout.max_width = "520px"
        self.shown.observe(self.draw, "value")
        self.layer.observe(self.choose_layer, "value")
        offered = [self.layer] if len(self._layers) > 1 else []
        self._settings = _row(*offered, self.strategy, self.sizes, self.budget, self.speed, self.shown)
        self._while_running = [
            self._button("Pause", "Hold after the measurement under way", self.pause),
            self._button("Go on", "Go on after Pause", self.go_on),
            self._button("Stop", "End; the run can be taken up again", self.stop),
        ]
        self._to_begin = [
            self._button("Start", "A new run with these settings", self.start),
            self._button("Take up", "Go on with the chosen run from its journal", self.take_up),
        ]
        begin, take_up = self._to_begin
        again = self._button("Look again", "Look for runs in the folder once more", self.find_runs)
        self._buttons = _row(begin, *self._while_running, self.found, take_up, again)
        self.output, self.sign = widgets.Output(), widgets.HTML()

    def _button(self, name: str, tooltip: str, call: Callable[[], None]) -> widgets.Button:
        def pressed(_: object) -> None:
            try:
                call()
            except MoelabError as error:  # what the reader can do something about belongs on the page
                self._said = str(error)
                self.draw()

        button = widgets.Button(description=name, tooltip=tooltip, layout=widgets.Layout(width="auto"))
        button.on_click(pressed)
        return button

    def _batches(self) -> tuple[tuple[int, ...], list[tuple[str, tuple[int, ...]]]]:
        """Batch sizes for a look, and what can be chosen."""
        sizes = self.landscape.problem.batch_sizes
        few = tuple(sizes[i] for i in sorted({0, len(sizes) // 2, len(sizes) - 1}))
        return few, [(", ".join(map(str, few)), few), *((str(b), (b,)) for b in sizes), (f"all {len(sizes)}", sizes)]

    def choose_layer(self, _: object = None) -> None:
        """Take the chosen landscape, and its layer, in place of the one at hand; the panels that follow show its winners."""
        self.landscape = self._first if self.layer.value == self._first.name else load(self.layer.value)
        self.shape, self.session, self._history, self._said = self.landscape.problem.shape, None, [], ""
        self.__dict__.pop("table", None)
        few, self.sizes.options = self._batches()
        self.sizes.value, self.shown.options = few, few
        self.shown.value = few[-1]
        self.choice.take(Finals.of_landscape(self.landscape))
        self.draw()

    def find_runs(self) -> None:
        """List the runs in the folder again, newest first."""
        found = [(run.label(), run.path) for run in run_files.find_runs(self.runs)]
        self.found.options = found or [("none found", "")]
        self.found.value = self.found.options[0][1]

    # --- the run --------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether a run is under way, paused ones included."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begin a new run. Raises MoelabError where none can begin; does nothing while one is under way."""
        if self.running:
            self._say("A run is under way. Stop it first.")
            return
        self._begin(self._new)

    def take_up(self) -> None:
        """Go on with the run that is chosen under Runs. Raises JournalError where it cannot be taken up."""
        path = self.found.value
        if self.running or not path:
            self._say(
                "A run is under way. Stop it first." if self.running else "There is no run to take up in the folder."
            )
            return
        self._begin(
            lambda: TuneSession.resume(path, lambda problem: self._evaluator(path, problem), on_progress=self._look)
        )

    def _begin(self, make: Callable[[], TuneSession]) -> None:
        """Say at once that something happens: what there is to search takes a second to build."""
        self._said = ""
        self._enable(under_way=None)
        self._show_sign("Starting: the candidates are being listed.")
        try:
            session = make()
        except BaseException:
            self._enable(under_way=False)
            self._show_sign("")
            raise
        self._go(session)

    def _new(self) -> TuneSession:
        from moelab.tuner.evaluators import make_gpu_evaluator

        problem = self._problem()
        self.runs.mkdir(parents=True, exist_ok=True)
        kind, stamp = "live" if self.live else "replay", time.strftime("%Y%m%d-%H%M%S")
        path = self.runs / f"{default_name(problem)}-{self.strategy.value}-{kind}-{stamp}.jsonl"
        evaluator = make_gpu_evaluator(problem) if self.live else replay_of(
            self.table, problem, seed=problem.seed, speed=self.speed.value
        )  # fmt: skip
        return TuneSession(
            problem, evaluator, strategy=self.strategy.value, run=_free(path), on_progress=self._look,
            budget_s=None if math.isinf(self.budget.value) else self.budget.value,
        )  # fmt: skip

    def _problem(self) -> Problem:
        if self.live:
            return gpu_problem(self.shape, self.sizes.value)
        return replay_problem(self.landscape, self.sizes.value)

    @functools.cached_property
    def table(self) -> Table:
        """The landscape, whole, as replays draw from it."""
        return Table(self.landscape)

    def _evaluator(self, path: Path, problem: Problem) -> Evaluator:
        return evaluator_of(path, problem, speed=self.speed.value, known=[self.table])

    def _go(self, session: TuneSession) -> None:
        self.session, self._history, self._error, self._said = session, [], None, ""
        self.shown.options = list(session.problem.batch_sizes)
        self._history.append(snapshot(session))
        self._thread = threading.Thread(target=self._run, args=(session,), name="moelab-tune", daemon=True)
        self._thread.start()
        self.draw()

    def _run(self, session: TuneSession) -> None:
        try:
            session.run()
            self._said = " ".join(session.coverage().sentences())
        except Exception as error:
            self._error, self._said = error, f"{type(error).__name__}: {error}"
        try:
            self._history.append(snapshot(session))
            self.find_runs()
            finals = Finals.of_results(
                session.problem,
                session.results(),
                _source(session),
                measured=bool(session.evaluator.describe()["measured"]),
            )
            if finals.layers:
                self.choice.take(finals)
            self.draw()
        except Exception as error:
            self._error = self._error or error

    def pause(self) -> None:
        """Hold after the result under way."""
        if self.session is not None and self.running:
            self.session.pause()
            until = time.monotonic() + PAUSE_S
            while self.session.progress().state == "running" and time.monotonic() < until:
                time.sleep(0.01)
            self._history.append(snapshot(self.session))
            self._say("Held after the measurement under way; Go on, or Stop.")

    def go_on(self) -> None:
        """Go on after a pause."""
        if self.session is not None and self.running:
            self.session.unpause()
            self._say("")

    def stop(self) -> None:
        """End after the result under way."""
        if self.session is not None and self.running:
            self.session.stop()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end of the run; raises what ended it, or what a drawing function raised."""
        if self._thread is not None:
            self._thread.join(timeout)
        if self._error is not None:
            raise self._error

    # --- looking --------------------------------------------------------------------------------------------------

    def _look(self, progress: Progress) -> None:
        """In the run's thread: remember where it stands, and draw, but not at every result."""
        now = time.monotonic()
        changed = not self._history or self._history[-1].progress.phase != progress.phase
        if self.session is None or (now - self._drawn < DRAW_EVERY_S and not changed):
            return
        self._drawn = now
        try:
            self._history.append(snapshot(self.session))
            self.draw()
        except Exception as error:
            self._error = error

    def _say(self, text: str) -> None:
        self._said = text
        self.draw()

    def draw(self, _: object = None) -> None:
        """Show where the run stands; Pause, Go on and Stop can be pressed while there is a run."""
        self._enable(
            under_way=self.session is not None and self.session.progress().state in ("new", "running", "paused")
        )
        history = self._history or [self._blank()]
        shown = self.shown.value if self.shown.value in history[-1].standings else next(iter(history[-1].standings))
        curve = None
        if self.session is not None:
            moments = [(each.progress.spent_s, each.standings[shown]) for each in history]
            curve = best_until(moments, self.session.board, shown)
        panels = plots.status(history, shown, _source(self.session) if self.session else self._intent(), curve)
        self._show_sign(self._said or plots.in_a_line(history[-1], shown))
        show(self.output, panels)

    def _enable(self, *, under_way: bool | None) -> None:
        """What can be pressed now; None: nothing that begins, holds or ends a run."""
        for button in self._while_running:
            button.disabled = not under_way
        for control in (*self._to_begin, self.layer):
            control.disabled = under_way is not False

    def _show_sign(self, sentence: str) -> None:
        self.sign.value = f'<b role="status">{html.escape(sentence)}</b>' if sentence else ""

    def _blank(self) -> Snapshot:
        from moelab.tuner.snapshot import Standing

        nothing = Standing(math.inf, math.inf, math.inf, None, ())
        return Snapshot(Progress("new", "", 0, 0, 0.0, None, {}, {}), dict.fromkeys(self.sizes.value, nothing))

    def _intent(self) -> str:
        if self.live:
            return f"{self.shape.name} will be measured on this machine's {runtime.current().device_name}"
        return f"{self.landscape.problem.shape.name}; no GPU here, so this replays what was {self.landscape.source()}"


def _source(session: TuneSession) -> str:
    described = session.evaluator.describe()
    if described["measured"]:
        return f"measured on {session.problem.device}, triton {session.problem.triton_version}"
    return f"replay of what was {described.get('source', 'made up')}"


def _free(path: Path) -> Path:
    """The path, or one like it that is free: two runs may begin within a second."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def _row(*children: widgets.Widget) -> widgets.HBox:
    return widgets.HBox(list(children), layout=widgets.Layout(flex_flow="row wrap"))
