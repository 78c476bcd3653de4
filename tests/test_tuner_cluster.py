"""Tuning over Ray: real Ray and real actor processes, whose devices are replays of a synthetic landscape."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from error_rows import unhelpful
from small_fleet import ONE, a_fleet
from small_fleet import small as small  # a fixture of every test here
from synthetic import small_problem, synthetic_landscape

from moelab import recordings
from moelab.errors import LandscapeError, RuntimeModeError
from moelab.studies.fleet_job import Job
from moelab.tuner.actor import Host
from moelab.tuner.cluster import RayEvaluator
from moelab.tuner.problem import Problem
from moelab.tuner.replay import ReplayEvaluator
from moelab.tuner.search import Settings
from moelab.tuner.session import TuneSession

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="the package ray is not installed (extra 'ray')")

PROBLEM = small_problem((16, 256))
RECORDED = synthetic_landscape(PROBLEM)
SETTINGS = Settings(chunk=8, final=5, layer=5)


@pytest.mark.skipif(HAS_RAY, reason="ray is installed")
def test_without_ray_the_message_says_what_to_install() -> None:
    with pytest.raises(
        RuntimeModeError, match=r"Expected the extra 'ray'. Install it with pip install 'moelab\[ray\]'"
    ):
        RayEvaluator(PROBLEM, landscape=RECORDED)


def test_a_ray_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(RuntimeModeError, match=r"moelab\[ray\]") as caught:
        RayEvaluator(PROBLEM, landscape=RECORDED)
    assert unhelpful(str(caught.value)) is None


LISTENS = """
import psutil, sys
from test_tuner_cluster import PROBLEM, RECORDED, RayEvaluator
evaluator = RayEvaluator(PROBLEM, landscape=RECORDED)
here = psutil.Process()
for process in [here, *here.children(recursive=True)]:
    for found in process.net_connections(kind="inet"):
        if found.status == "LISTEN":
            print(process.name(), found.laddr.ip)
evaluator.close()
"""


@needs_ray
@pytest.mark.whole
def test_a_cluster_that_is_started_here_listens_here_alone() -> None:
    """Before: gcs_server and raylet on all interfaces, and Ray's warning of it was not shown."""
    pytest.importorskip("psutil")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    ran = subprocess.run([sys.executable, "-c", LISTENS], env=environment, capture_output=True, text=True, timeout=250)
    heard = dict(line.rsplit(maxsplit=1) for line in ran.stdout.splitlines())
    assert {"gcs_server", "raylet"} <= set(heard), ran.stderr[-2000:]
    assert {address.removeprefix("::ffff:") for address in heard.values()} == {"127.0.0.1"}, heard


@pytest.fixture(scope="module")
def ray():
    module = pytest.importorskip("ray")
    module.init(num_cpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield module
    module.shutdown()


def tuned(evaluator) -> tuple[dict, float]:
    """Winners, and what the run cost; by the strategy that measures everything."""
    result = TuneSession(PROBLEM, evaluator, strategy="grid", settings=SETTINGS).run()
    assert result.complete and not result.errors
    return result.to_configs(), result.spent_s


@needs_ray
def test_more_actors_find_the_same_in_less_time(ray) -> None:
    winners, alone = tuned(ReplayEvaluator(RECORDED, PROBLEM, seed=PROBLEM.seed))
    _, compiling = compile_share()
    costs = {}
    for actors in (1, 2):
        evaluator = RayEvaluator(PROBLEM, landscape=RECORDED, actors=actors)
        assert len({seat.actor._actor_id for seat in evaluator.seats}) == actors == evaluator.describe()["ray_actors"]
        found, costs[actors] = tuned(evaluator)
        assert found == winners and not evaluator.incidents
    assert costs[1] == pytest.approx(alone)
    assert (alone - compiling) / (costs[2] - compiling) > 0.8 * 2


def compile_share() -> tuple[list, float]:
    """Seconds of the run that are compiling, which no GPU speeds up."""
    evaluator = ReplayEvaluator(RECORDED, PROBLEM, seed=PROBLEM.seed)
    session = TuneSession(PROBLEM, evaluator, strategy="grid", settings=SETTINGS)
    requests = next(session.search.compile_all()).requests
    return list(evaluator.run(requests)), evaluator.clock_s()


@needs_ray
@pytest.mark.whole
def test_a_budget_cuts_compiling_on_a_cluster_too(ray) -> None:
    """What was left out is compiled by no actor, and what was compiled is measured."""
    _, compiling = compile_share()
    evaluator = RayEvaluator(PROBLEM, landscape=RECORDED, actors=2)
    session = TuneSession(PROBLEM, evaluator, strategy="grid", settings=SETTINGS, budget_s=compiling / 2)
    coverage = session.run().coverage
    assert coverage.cut[0] == "compile" and coverage.needed_s > compiling
    assert all(0 < here.measured <= here.compiled < here.candidates for here in coverage.batches.values())
    assert not any(o.compile_s for r in session.results() if r.request.rounds for o in r.outcomes)


@needs_ray
def test_an_actor_that_is_killed_costs_nothing_but_time(ray) -> None:
    winners, _ = tuned(ReplayEvaluator(RECORDED, PROBLEM, seed=PROBLEM.seed))
    evaluator = RayEvaluator(PROBLEM, landscape=RECORDED, actors=2)
    answered, run = 0, evaluator.run

    def struck(requests: object) -> object:
        nonlocal answered
        for result in run(requests):
            answered += 1
            if answered in (5, 40):
                ray.kill(evaluator.seats[answered % 2].actor)
            yield result

    evaluator.run = struck
    session = TuneSession(PROBLEM, evaluator, strategy="grid", settings=SETTINGS)
    result = session.run()
    assert result.complete and result.to_configs() == winners
    assert len(evaluator.incidents) == 2 and "lost" in evaluator.incidents[0].what
    asked = [result.request.key() for result in session.results()]
    assert len(asked) == len(set(asked))


@needs_ray
@pytest.mark.whole
def test_actors_that_measure_keep_to_their_batch_sizes(ray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays here, told that they measure: no batch size is timed by two of them, and all have work."""
    evaluator = RayEvaluator(PROBLEM, landscape=RECORDED, actors=2)
    evaluator._described["measured"] = True
    handed: dict[int, set[int]] = {}
    real = RayEvaluator._job_for

    def spied(self, seat):
        job = real(self, seat)
        if job is not None and job.request.rounds:
            handed.setdefault(job.request.num_tokens, set()).add(seat.number)
        return job

    monkeypatch.setattr(RayEvaluator, "_job_for", spied)
    winners, _ = tuned(evaluator)
    assert winners == tuned(ReplayEvaluator(RECORDED, PROBLEM, seed=PROBLEM.seed))[0]
    assert set(handed) == set(PROBLEM.batch_sizes) and all(len(seats) == 1 for seats in handed.values())
    assert set.union(*handed.values()) == {0, 1}


@needs_ray
@pytest.mark.whole
def test_a_seat_that_is_lost_again_and_again_is_given_up(ray) -> None:
    evaluator = RayEvaluator(PROBLEM, landscape=RECORDED, actors=1)
    session = TuneSession(PROBLEM, evaluator, strategy="grid", settings=SETTINGS)

    class Stillborn(Host):
        def __init__(self, *arguments: object) -> None:
            raise ValueError("stillborn")

    evaluator._remote = ray.remote(num_cpus=0)(Stillborn)
    ray.kill(evaluator.seats[0].actor)
    with pytest.raises(RuntimeModeError, match="stillborn"):
        session.run()


@needs_ray
def test_what_the_cluster_lacks_is_said(ray) -> None:
    with pytest.raises(RuntimeModeError, match="has no GPU") as caught:
        RayEvaluator(PROBLEM)
    assert unhelpful(str(caught.value)) is None
    with pytest.raises(LandscapeError, match="batch size 7"):
        RayEvaluator(small_problem((7,)), landscape=RECORDED)


@needs_ray
@pytest.mark.whole
def test_a_run_that_is_given_up_leaves_the_actors_usable(ray) -> None:
    evaluator = RayEvaluator(PROBLEM, landscape=RECORDED, actors=2)
    session = TuneSession(PROBLEM, evaluator, strategy="grid", settings=SETTINGS)
    board, search = session.board, session.search
    largest = PROBLEM.batch_sizes[-1]
    requests = search.requests("up", largest, board.candidates("up", largest), 3)
    running = evaluator.run(requests)
    next(running)
    running.close()
    again = {result.request: result for result in evaluator.run(requests)}
    expected = ReplayEvaluator(RECORDED, PROBLEM, seed=PROBLEM.seed).run(requests)
    for result in expected:
        assert [o.samples_us for o in again[result.request].outcomes] == [o.samples_us for o in result.outcomes]
    evaluator.close()


@needs_ray
@pytest.mark.whole
def test_a_fleet_of_one_and_two_actors(ray, tmp_path: Path) -> None:
    """Replays in the actors."""

    def over_ray(job: Job, problem: Problem, _: Path) -> RayEvaluator:
        return RayEvaluator(problem, landscape=synthetic_landscape(problem), actors=len(job.gpus))

    done = a_fleet(tmp_path, (ONE,), bench=over_ray)
    assert done.run(["scaling"]), done.table()
    rows = recordings.load(done.timeline).select(phase="all")
    assert [(row["run"], row["gpus"], row["via"]) for row in rows] == [
        ("one-tp1-scaling-1-ray", 1, "ray"), ("one-tp1-scaling-2-ray", 2, "ray"),
    ]  # fmt: skip
    assert rows[1]["end_s"] < rows[0]["end_s"], "simulated seconds: two actors measure at once"
    winners = [{b: (x.up, x.down) for b, x in d.result.batches.items()} for d in done.done]
    assert winners[0] == winners[1]
