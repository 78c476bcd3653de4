"""What a notebook needs of the tuner: finals, snapshots, runs on disk, and a replay that takes its time."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import small_problem, synthetic_landscape

from moelab.errors import LandscapeError
from moelab.tuner.finals import Finals
from moelab.tuner.landscape import Row
from moelab.tuner.paced import PacedReplay
from moelab.tuner.progress import Progress
from moelab.tuner.replay import ReplayEvaluator
from moelab.tuner.runs import find_runs
from moelab.tuner.session import TuneSession
from moelab.tuner.snapshot import Snapshot, Standing, best_until, snapshot, standing
from moelab.tuner.watching import common_sizes, watch

PROBLEM = small_problem((1, 64))
LANDSCAPE = synthetic_landscape(PROBLEM)


def a_session(run: Path | None = None, **given) -> TuneSession:
    return TuneSession(PROBLEM, ReplayEvaluator(LANDSCAPE, PROBLEM), strategy="random", run=run, **given)


@pytest.fixture(scope="module")
def finished() -> TuneSession:
    session = a_session()
    session.run()
    return session


@pytest.fixture(scope="module")
def finals(finished: TuneSession) -> Finals:
    return Finals.of_results(PROBLEM, finished.results(), "made up", measured=False)


def test_finals_decide_as_the_session_did(finished: TuneSession, finals: Finals) -> None:
    assert finals.result().batches == finished.result().batches
    assert finals.result().complete and not finals.result().errors


def test_contests_are_ranked_and_labelled(finals: Finals) -> None:
    for b in PROBLEM.batch_sizes:
        contests = finals.contests(b)
        assert [c.median_us for c in contests] == sorted(c.median_us for c in contests)
        assert [c.label for c in contests].count("default") == 1
        assert all(c.low_us <= c.median_us <= c.high_us and c.samples == 30 for c in contests)


def test_an_excluded_pair_does_not_win(finals: Finals) -> None:
    first = finals.winner(64)
    other = finals.winner(64, {(64, (first.up, first.down))})
    assert (other.up, other.down) != (first.up, first.down) and other.layer_us is not None
    assert finals.winner(1, {(64, (first.up, first.down))}) == finals.winner(1), "another batch size is another matter"
    everything = {(64, c.pair) for c in finals.contests(64)}
    assert finals.winner(64, everything).error and finals.winner(64, everything).up is None
    default = {(64, c.pair) for c in finals.contests(64) if c.label == "default"}
    assert finals.winner(64, default).gain("default") is None


def test_finals_of_a_landscape_are_those_recorded(finished: TuneSession, finals: Finals) -> None:
    rows = tuple(
        Row("layer", r.request.num_tokens, pair, outcome, True, "")
        for r in finished.results()
        if r.request.stage == "layer"
        for pair, outcome in zip(r.request.contenders, r.outcomes, strict=True)
    )
    again = Finals.of_landscape(replace(LANDSCAPE, rows=(*LANDSCAPE.rows, *rows)))
    assert again.result().batches == finals.result().batches and again.measured
    with pytest.raises(LandscapeError, match="no finals"):
        Finals.of_landscape(LANDSCAPE)


def test_snapshots_follow_a_run() -> None:
    taken: list[Snapshot] = []

    def look(_: Progress) -> None:
        taken.append(snapshot(session))

    session = a_session(on_progress=look)
    before = snapshot(session)
    assert before.standings[64].pair is None and math.isinf(before.standings[64].best_us)
    session.run()
    best = [s.standings[64].best_us for s in taken]
    assert math.isfinite(best[-1]) and {s.progress.phase for s in taken} >= {"random", "finalists", "layers"}
    last = taken[-1].standings[64]
    assert last.low_us <= last.best_us <= last.high_us
    assert last.best_us == pytest.approx(session.board.best_us(64))
    ups = [x for x in last.leaders if x.gemm == "up"]
    assert len(ups) == 5 and all(x.samples >= 10 for x in last.leaders)


def test_runs_on_disk_are_found(tmp_path: Path) -> None:
    assert find_runs(tmp_path / "nowhere") == ()
    a_session(tmp_path / "one.jsonl").run()
    stopped = a_session(tmp_path / "two.jsonl", on_progress=lambda _: stopped.stop())
    stopped.run()
    (tmp_path / "other.jsonl").write_text("no journal\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "list.jsonl").write_text("[1]\n")
    found = find_runs(tmp_path)
    assert [(run.path.stem, run.finished) for run in found] == [("two", False), ("one", True)]
    assert found[0].kind == "replay" and found[0].strategy == "random" and found[0].batch_sizes == (1, 64)
    assert "not finished" in found[0].label() and "batch 1, 64" in found[0].label()
    torn = (tmp_path / "one.jsonl").read_bytes()[:-9]
    (tmp_path / "one.jsonl").write_bytes(torn)
    assert not find_runs(tmp_path)[1].finished


def test_a_paced_replay_answers_as_a_plain_one(finished: TuneSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results; and it waits for the simulated cost, divided by its speed."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for speed in (math.inf, 20.0):
        waited.clear()
        paced = PacedReplay(LANDSCAPE, PROBLEM, speed=speed)
        result = TuneSession(PROBLEM, paced, strategy="random").run()
        assert result.batches == finished.result().batches
        assert max(waited) <= 0.5
    assert sum(waited) == pytest.approx(paced.clock_s() / 20.0, rel=1e-6)


# --- watching a run of another process --------------------------------------------------------------------------------


def test_a_journal_is_watched_and_not_touched(tmp_path: Path) -> None:
    """While it is written, torn, and once it has ended; who watches takes no lock and leaves every byte."""
    path, seen = tmp_path / "run.jsonl", []

    def look(progress: Progress) -> None:
        if progress.phase not in [each.phase for each in seen]:
            seen.append(watch(path, 64))

    a_session(path, on_progress=look).run()
    assert [each.state for each in seen] == ["under way"] * len(seen) and len(seen) >= 3
    assert [each.samples for each in seen] == sorted(each.samples for each in seen)
    before = path.read_bytes(), path.stat().st_mtime_ns
    ended = watch(path, 64)
    assert (ended.state, ended.phase, ended.strategy, ended.kind) == ("finished", "layers", "random", "replay")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    path.write_bytes(before[0][: len(before[0]) // 2])
    os.utime(path)
    half = watch(path, 64)
    assert half.state == "under way" and half.samples < ended.samples
    assert watch(path, 7).num_tokens == 64, "a batch size that it does not have"


def test_a_run_without_a_line_for_long_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.jsonl"
    session = a_session(path, on_progress=lambda progress: session.stop())
    session.run()
    assert watch(path).state == "under way"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1000)
    assert watch(path).state == "silent"


def test_the_best_so_far_never_gets_worse(finished: TuneSession) -> None:
    """A pair that a few lucky samples put first, and that more samples take back, was never the best."""
    board = finished.board
    now = standing(board, 64)
    ups = board.ranked("up", 64, 20)
    worse = next(
        (board.configs["up"][i], now.pair[1])
        for i in ups[1:]
        if board.configs["up"][i].BLOCK_SIZE_M == now.pair[1].BLOCK_SIZE_M
    )
    lucky = Standing(0.5 * now.best_us, 0.4 * now.best_us, 0.6 * now.best_us, worse, ())
    nothing = Standing(math.inf, math.inf, math.inf, None, ())
    curve = best_until([(0.0, nothing), (1.0, lucky), (2.0, now), (3.0, lucky)], board, 64)
    assert [seconds for seconds, _ in curve] == [1.0, 2.0, 3.0]
    values = [each.best_us for _, each in curve]
    assert values == sorted(values, reverse=True) and values[-1] == now.best_us and values[0] > now.best_us
    assert curve[-1][1].pair == now.pair


def test_what_two_runs_have_in_common() -> None:
    assert common_sizes([small_problem((1, 16, 64)), small_problem((16, 64, 256))]) == (16, 64)
