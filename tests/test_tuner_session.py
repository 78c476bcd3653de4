"""Sessions: progress, pause, stop, budgets, and runs that are killed and taken up again."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
from synthetic import small_problem, synthetic_landscape

from moelab import config_files
from moelab.errors import JournalError, RuntimeModeError
from moelab.tuner.evaluate import Request, Result
from moelab.tuner.journal import Journal, read
from moelab.tuner.problem import Problem
from moelab.tuner.replay import ReplayEvaluator, Table
from moelab.tuner.search import Settings
from moelab.tuner.session import TuneSession

PROBLEM = small_problem((1, 64, 1024))
TABLE = Table(synthetic_landscape(PROBLEM))
CHUNKS = Settings(chunk=24)  # small requests: more moments at which a run can be interrupted


def evaluator(problem: Problem = PROBLEM) -> ReplayEvaluator:
    return ReplayEvaluator(TABLE, problem)


def session(run: Path | None = None, strategy: str = "race", **more) -> TuneSession:
    return TuneSession(PROBLEM, more.pop("evaluator", None) or evaluator(), strategy=strategy, run=run, **more)


def rows(path: Path) -> Counter[str]:
    """How often each request stands in a journal, read without moelab's reader."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return Counter(line["key"] for line in lines if line["kind"] == "result")


UNDISTURBED: dict[str, tuple[list[dict], set[str]]] = {}
SIZES: dict[str, int] = {}
"""Bytes of the journals of those runs."""


def undisturbed(tmp: Path, strategy: str = "race") -> tuple[list[dict], set[str]]:
    """Winners and requests of a run that nothing interrupts."""
    if strategy not in UNDISTURBED:
        path = tmp / f"undisturbed-{strategy}.jsonl"
        result = session(path, strategy, settings=CHUNKS).run()
        UNDISTURBED[strategy], SIZES[strategy] = (result.rows(), set(rows(path))), path.stat().st_size
    return UNDISTURBED[strategy]


# --- the plain run ---------------------------------------------------------------------------------------------------


def test_a_run_from_start_to_files(tmp_path: Path) -> None:
    result = session(tmp_path / "run.jsonl").run()
    assert result.complete and not result.errors and "SYNTHETIC" in result.source
    for batch in result.batches.values():
        assert batch.up.BLOCK_SIZE_M == batch.down.BLOCK_SIZE_M
        low, high = batch.interval_us
        assert low <= batch.layer_us <= high and batch.gain("default").factor > 1
    assert [name for name, _ in result.timeline] == [
        "compile", "scouts", "screen", "neighbours", "longer", "finalists", "layers",
    ]  # fmt: skip
    assert sum(seconds for _, seconds in result.timeline) == pytest.approx(result.spent_s)
    up, down = result.write(tmp_path)
    assert up.parent.name == "triton_3_6_0" and down.stem.endswith("_down")
    assert config_files.read_config_file(up) == result.to_configs()["up"]
    assert config_files.read_config_file(down) == result.to_configs()["down"]
    found = config_files.lookup(
        8, 512, "Synthetic H200", num_tokens=64, triton_version="3.6.0", down=True, config_dir=tmp_path
    )
    assert found.config == result.batches[64].down
    assert [note["kind"] for note in read(tmp_path / "run.jsonl").notes][-1] == "finished"


def test_one_config_for_both_gemms(tmp_path: Path) -> None:
    problem = dataclasses.replace(PROBLEM, separate_down=False)
    result = TuneSession(problem, evaluator(problem)).run()
    assert all(batch.up == batch.down for batch in result.batches.values())
    assert set(result.to_configs()) == {"up"} and len(result.write(tmp_path)) == 1


def test_progress_counts_up_and_knows_the_best() -> None:
    seen = []
    result = session(on_progress=seen.append).run()
    assert {p.state for p in seen} == {"running"} and seen[0].phase == "compile"
    for before, after in itertools.pairwise(seen):
        assert after.spent_s >= before.spent_s and (after.phase != before.phase or after.done > before.done)
    last = {p.phase: p for p in seen}
    assert all(p.done == p.total for p in last.values())
    assert all(p.eta_s is not None and p.eta_s >= 0 for p in seen)
    assert set(last["layers"].best_us) == set(PROBLEM.batch_sizes) and last["layers"].failures == result.failures
    assert result.failures["compile"] > 0 and result.failures["wrong"] > 0


def test_what_fails_wins_nothing() -> None:
    made_to_fail = {row.contender[0] for row in TABLE.landscape.rows if row.outcome.failure}
    result = session(strategy="grid").run()
    assert made_to_fail and not made_to_fail & {c for b in result.batches.values() for c in (b.up, b.down)}


# --- pause, stop, interrupt ------------------------------------------------------------------------------------------


class Slow(ReplayEvaluator):
    """Takes a little real time for each request, and may raise at one."""

    def __init__(
        self, pause_s: float = 0.0, raise_at: int = -1, error: type[BaseException] = KeyboardInterrupt
    ) -> None:
        super().__init__(TABLE, PROBLEM)
        self.pause_s, self.raise_at, self.error, self.closed, self.answered = pause_s, raise_at, error, False, 0

    def run(self, requests: Sequence[Request]) -> Generator[Result, None, None]:
        for result in super().run(requests):
            time.sleep(self.pause_s)
            if self.answered == self.raise_at:
                raise self.error("planted")
            self.answered += 1
            yield result

    def close(self) -> None:
        self.closed = True


def test_pause_holds_and_unpause_goes_on() -> None:
    slow = Slow(0.003)
    running = session(evaluator=slow, settings=CHUNKS).start()
    while slow.answered < 3:
        time.sleep(0.001)
    running.pause()
    while running.progress().state != "paused":
        time.sleep(0.001)
    held = slow.answered
    time.sleep(0.03)
    assert slow.answered == held and running.progress().state == "paused"
    running.unpause()
    result = running.wait(60)
    assert result.complete and running.progress().state == "finished"
    with pytest.raises(RuntimeModeError, match="finished"):
        running.run()


@pytest.mark.parametrize("how", ["stop", "interrupt"])
def test_a_run_that_was_stopped_is_taken_up_again(tmp_path: Path, how: str) -> None:
    winners, requests = undisturbed(tmp_path)
    path = tmp_path / "run.jsonl"
    slow = Slow(raise_at=20 if how == "interrupt" else -1)
    first = session(path, evaluator=slow, settings=CHUNKS)
    if how == "stop":
        first._on_progress = lambda p: first.stop() if p.phase == "screen" else None
        partial = first.run()
        assert not partial.complete and all(b.provisional for b in partial.batches.values())
        assert any(b.up for b in partial.batches.values())
    else:
        with pytest.raises(KeyboardInterrupt):
            first.run()
    assert slow.closed and first.progress().state == "stopped"
    result = TuneSession.resume(path, evaluator).run()
    assert result.rows() == winners and set(rows(path)) == requests and max(rows(path).values()) == 1


def test_what_ends_a_run_is_raised_by_wait() -> None:
    running = session(evaluator=Slow(raise_at=5, error=MemoryError)).start()
    with pytest.raises(MemoryError):
        running.wait(60)
    assert running.progress().state == "failed"


def test_a_finished_run_is_read_back_without_measuring(tmp_path: Path) -> None:
    winners, _ = undisturbed(tmp_path)
    path = tmp_path / "run.jsonl"
    session(path, settings=CHUNKS).run()
    before = rows(path)
    silent = Slow(raise_at=0)
    assert TuneSession.resume(path, lambda _: silent).run().rows() == winners
    assert rows(path) == before and silent.answered == 0


def test_a_budget_ends_the_search_but_not_the_finals(tmp_path: Path) -> None:
    """Many processes compile here: it is measuring that costs."""

    def quick(problem: Problem = PROBLEM) -> ReplayEvaluator:
        return ReplayEvaluator(TABLE, problem, compile_processes=60)

    free = session(strategy="grid", settings=CHUNKS, evaluator=quick()).run()
    spent = dict(free.timeline)
    budget = (spent["compile"] + spent["grid"] / 2) / 0.8  # four fifths of it reach half-way into the grid
    path = tmp_path / "run.jsonl"
    result = session(path, strategy="grid", budget_s=budget, settings=CHUNKS, evaluator=quick()).run()
    assert result.complete and dict(result.timeline)["grid"] == pytest.approx(spent["grid"] / 2, rel=0.1)
    assert {"finalists", "layers"} <= set(dict(result.timeline))
    asked, lines = set(rows(path)), path.read_text().splitlines(keepends=True)
    for share in (
        0.3,
        0.6,
        0.9,
    ):  # as if killed in the compiling, in the grid, in the finals: the same budget still holds
        path.write_text("".join(lines[: round(share * len(lines))]))
        assert TuneSession.resume(path, quick).run().rows() == result.rows()
        assert set(rows(path)) == asked


# --- kill -9 -----------------------------------------------------------------------------------------------------------


def in_a_child(run: Callable[[], object]) -> int:
    """Start that in a process of its own; its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run()
            status = 0
        except JournalError as error:
            status = 3 if "the disk is full" in str(error) and "--resume" in str(error) else 4
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def has_begun(path: Path) -> bool:
    return path.exists() and b"\n" in path.read_bytes()


def begun_or_taken_up(path: Path, by: ReplayEvaluator) -> TuneSession:
    if has_begun(path):
        return TuneSession.resume(path, lambda _: by)
    return session(path, evaluator=by, settings=CHUNKS)


def killed_at(share: float, delay_s: float, path: Path, size: int) -> bool:
    """Start a run in a child, or take it up there, and kill -9 it a moment after its journal has that share of its whole
    size; whether it was still running."""
    child = in_a_child(lambda: begun_or_taken_up(path, Slow(0.002)).run())
    status = None
    while status is None and (not path.exists() or path.stat().st_size < share * size):
        time.sleep(0.0005)
        status = child if os.waitpid(child, os.WNOHANG)[0] else None
    if status is not None:
        return False
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    return ended(child) == -signal.SIGKILL


@pytest.mark.parametrize("moments", [4, pytest.param(100, marks=pytest.mark.whole)])
def test_kill_9_at_random_moments(tmp_path: Path, moments: int) -> None:
    """Each moment: killed, taken up, killed again perhaps, and finished: the winners and rows of an undisturbed run."""
    winners, requests = undisturbed(tmp_path)
    draws, kills, trial = random.Random(0), 0, 0
    while kills < moments:
        path = tmp_path / f"run-{trial}.jsonl"
        for share in sorted(draws.uniform(0, 1) for _ in range(1 + trial % 2)):
            before = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1] if path.exists() else b""
            kills += killed_at(share, draws.uniform(0, 0.004), path, SIZES["race"])
            assert path.read_bytes().startswith(before), "what was whole before stays"
        result = begun_or_taken_up(path, evaluator()).run()
        assert result.rows() == winners, f"trial {trial}"
        assert set(rows(path)) == requests and max(rows(path).values()) == 1
        trial += 1
        assert trial < 3 * moments, "most moments have to hit a run under way"


# --- a disk that is full -----------------------------------------------------------------------------------------------


def under_a_limit(size: int, path: Path) -> int:
    """Run, or go on, in a child whose files may have that size; its exit status."""

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        begun_or_taken_up(path, evaluator()).run()

    return ended(in_a_child(run))


@pytest.mark.parametrize(
    "share", [pytest.param(i / 12, marks=[] if i in (0, 5, 12) else pytest.mark.whole) for i in range(13)]
)
def test_a_full_disk_loses_nothing(tmp_path: Path, share: float) -> None:
    """Wherever it fills up, twice: the journal is whole, it is said, and with room the winners are the same."""
    winners, requests = undisturbed(tmp_path)
    size = SIZES["race"]
    path, limit = tmp_path / "run.jsonl", max(10, round(share * size) - 10)
    for room in (limit, min(limit + 3000, size - 1)):
        assert under_a_limit(room, path) == 3
        assert path.stat().st_size <= room
        if has_begun(path):
            assert read(path).whole_bytes == path.stat().st_size
    assert begun_or_taken_up(path, evaluator()).run().rows() == winners
    assert set(rows(path)) == requests and max(rows(path).values()) == 1


@hypothesis.given(st.sampled_from(["race", "grid", "random"]), st.floats(0, 1))
@hypothesis.settings(max_examples=12)
def test_a_run_cut_anywhere_and_resumed_is_the_undisturbed_run(
    tmp_path_factory: pytest.TempPathFactory, strategy: str, share: float
) -> None:
    tmp = tmp_path_factory.mktemp("cut")
    winners, requests = undisturbed(tmp, strategy)
    path = tmp / "run.jsonl"
    session(path, strategy, settings=CHUNKS).run()
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    path.write_bytes(whole[: header + round(share * (len(whole) - header))])
    assert TuneSession.resume(path, evaluator).run().rows() == winners
    assert set(rows(path)) == requests and max(rows(path).values()) == 1


def test_two_tuners_on_one_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    first = session(path)
    for other in (lambda: session(path), lambda: TuneSession.resume(path, evaluator)):
        with pytest.raises(JournalError, match="Another tuner"):
            other()
    assert first.run().complete
    with pytest.raises(JournalError, match="already"):
        session(path)


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    header = {"provenance": {}, "problem": {"shape": 1}, "strategy": {}, "space": {}, "evaluator": {}}
    Journal.create(tmp_path / "run.jsonl", header).close()
    with pytest.raises(JournalError, match=r"holds 1 at problem\.shape"):
        TuneSession.resume(tmp_path / "run.jsonl", evaluator)
    Journal.resume(tmp_path / "run.jsonl").close()  # the lock is free again
