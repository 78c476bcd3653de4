"""A small fleet for tests: two targets of few configs, replayed on made-up landscapes that say they measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from synthetic import SMALL, small_problem, synthetic_landscape

from moelab.studies import fleet
from moelab.studies.fleet import Fleet
from moelab.studies.fleet_job import Job, Makers
from moelab.studies.targets import Target
from moelab.tuner.problem import Problem
from moelab.tuner.replay import ReplayEvaluator, Table

ONE, TWO = Target("one", 1, keep=True, grid=True), Target("two", 1)
ROOT = Path(__file__).resolve().parent.parent
SIZES = {"one": 512, "two": 256}
AT = (1, 64)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two batch sizes, and a repository of our own to install into."""
    monkeypatch.setattr(fleet, "TUNED_AT", AT)
    monkeypatch.setattr(fleet, "GRID_AT", (64,))
    for variable, name in (("MOELAB_DATA_DIR", "data"), ("MOELAB_CONFIG_DIR", "repo_configs")):
        (tmp_path / name / "recordings").mkdir(parents=True)
        monkeypatch.setenv(variable, str(tmp_path / name))


def problem_of(job: Job) -> Problem:
    shape = dataclasses.replace(SMALL, name=job.target.model, moe_intermediate_size=SIZES[job.target.model])
    return dataclasses.replace(small_problem(job.batch_sizes), shape=shape, seed=job.seed)


class Bench(ReplayEvaluator):
    """A replay of a made-up landscape that says it measures, on as many GPUs as it is given."""

    def __init__(self, job: Job, problem: Problem, _: Path) -> None:
        super().__init__(Table(synthetic_landscape(problem)), problem, seed=problem.seed)
        self.gpus = len(job.gpus)

    def describe(self) -> dict:
        return {"kind": "gpu", "measured": True, "devices": self.gpus, "compile_processes": 3, "protocol": "made up"}


class Cut(Bench):
    """One that is interrupted after some results."""

    left = 10

    def run(self, requests):
        for result in super().run(requests):
            yield result
            Cut.left -= 1
            if Cut.left == 0:
                raise KeyboardInterrupt


def a_fleet(out: Path, targets: Sequence[Target] = (ONE, TWO), bench: type = Bench, **more) -> Fleet:
    return Fleet(targets, (0, 1, 2, 3), out, makers=Makers(problem_of, bench), **more)


def statuses(done: Fleet) -> list[tuple[str, str, str]]:
    return [(d.job.part, d.job.target.model, d.status) for d in done.done]
