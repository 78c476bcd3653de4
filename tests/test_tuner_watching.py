"""What a notebook needs of the tuner: finals, snapshots, runs on disk, and a replay that takes its time."""

from __future__ import annotations

import math
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
from moelab.tuner.snapshot import Snapshot, snapshot

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
