"""How fast a journal is written, read and gone on with, on this machine: `python tests/journal_speed.py [RESULTS]`.

Prints the best of five rounds by the processor's time, which what else runs here does not move, and asserts nothing. A
result holds 64 contenders, as a search asks for them; "resume" is what a session does before its first request: read, recall,
and take in what is known.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from synthetic import small_problem

from moelab.tuner.evaluate import Outcome, Request, Result
from moelab.tuner.header import make_header
from moelab.tuner.journal import Journal, read
from moelab.tuner.problem import GEMMS
from moelab.tuner.replay import ReplayEvaluator
from moelab.tuner.search import Settings
from moelab.tuner.session import TuneSession
from moelab.tuner.space import build_space

ROUNDS = 5
CONTENDERS = 64
PROBLEM = small_problem(tuple(range(1, 20)))


class Nobody(ReplayEvaluator):
    """Has nothing to answer."""

    def __init__(self) -> None:
        self._compiled: set = set()
        self._compile_s = self._measure_s = 0.0
        self.compile_processes = 1

    def describe(self) -> dict:
        return {"kind": "nobody", "measured": False}


def results(count: int) -> list[Result]:
    configs, draws = build_space(PROBLEM).configs, np.random.default_rng(0)
    found = []
    for i in range(count):
        gemm = GEMMS[i % 2]
        chosen = draws.choice(len(configs[gemm]), CONTENDERS, replace=False)
        request = Request(gemm, PROBLEM.batch_sizes[i % 19], tuple((configs[gemm][j],) for j in chosen), 3, repeat=i)
        samples = draws.uniform(10, 500, (CONTENDERS, 3)).round(4).tolist()
        found.append(Result(request, tuple(Outcome(tuple(s), measure_s=0.0012) for s in samples)))
    return found


def best(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        call()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def main(count: int = 500) -> None:
    made = results(count)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        session = TuneSession(PROBLEM, Nobody(), settings=Settings())
        header = make_header(session.search, "race", None, session.evaluator)

        def write() -> None:
            path.unlink(missing_ok=True)
            journal = Journal.create(path, header)
            for result in made:
                journal.append(result)
            journal.close()

        steps = {
            "append": write,
            "read": lambda: read(path),
            "resume": lambda: TuneSession.resume(path, lambda _: Nobody())._shut(),
        }
        for name, call in steps.items():
            seconds = best(call)
            size = path.stat().st_size / 1e6
            print(f"{name:<7} {count / seconds:7.0f} results/s  {size / seconds:6.1f} MB/s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
