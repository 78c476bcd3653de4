"""A run that another process writes, seen through its journal: read, never locked, never written."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moelab.tuner.board import Board
from moelab.tuner.header import read_header
from moelab.tuner.journal import Content, read
from moelab.tuner.problem import Problem
from moelab.tuner.search import samples_of
from moelab.tuner.snapshot import Standing, best_until, standing
from moelab.tuner.space import build_space

POINTS = 60
"""Moments of a run at which its best is looked up: each looks through the whole board."""

QUIET_S = 120.0
"""Seconds without a line after which a run that has not ended is called silent: a finalists' request takes less."""


@dataclass(frozen=True)
class Watched:
    """A run at one moment. state: "finished", "under way", or "silent" (no line for QUIET_S: it was stopped, or waits). seconds:
    since its first line. curve: (seconds, Standing) of the batch size asked for, its best until then by all that is known now."""

    path: Path
    problem: Problem
    strategy: str
    kind: str
    state: str
    phase: str
    samples: int
    seconds: float
    failures: int
    num_tokens: int
    curve: tuple[tuple[float, Standing], ...]

    @property
    def name(self) -> str:
        return self.path.stem


def watch(path: str | Path, num_tokens: int | None = None) -> Watched:
    """Look at a run. num_tokens: the batch size of the curve; one that the run does not have, or None, is its last.

    Raises JournalError as `journal.read` does.
    """
    content = read(path)
    header = content.header
    problem, _ = read_header(path, header)
    sizes = problem.batch_sizes
    shown = num_tokens if num_tokens in sizes else sizes[-1]
    board = Board(problem, build_space(problem))
    began = _seconds(header["at"])
    moments = _moments(content, board, shown, began)
    curve = best_until(moments, board, shown)
    phases = [note["name"] for note in content.notes if note["kind"] == "phase"]
    kinds = {note["kind"] for note in content.notes}
    last = max(
        [_seconds(at) for at in content.times.values()] + [_seconds(note["at"]) for note in content.notes] + [began]
    )
    state = "finished" if "finished" in kinds else "silent" if time.time() - last > QUIET_S else "under way"
    return Watched(
        Path(path), problem, header["strategy"]["name"], str(header["evaluator"].get("kind")), state,
        phases[-1] if phases else "", samples_of(r.request for r in content.results.values()), last - began,
        sum(board.failures.values()), shown, curve,
    )  # fmt: skip


def _moments(content: Content, board: Board, num_tokens: int, began: float) -> list[tuple[float, Standing]]:
    """The standing at some moments, filling the board on the way."""
    results = list(content.results.items())
    every, found = max(1, math.ceil(len(results) / POINTS)), list[tuple[float, Standing]]()
    for number, (key, result) in enumerate(results, 1):
        board.add([result])
        if number % every == 0 or number == len(results):
            found.append((_seconds(content.times[key]) - began, standing(board, num_tokens)))
    return found


def _seconds(at: str) -> float:
    return datetime.datetime.fromisoformat(at).timestamp()


def common_sizes(problems: Sequence[Problem]) -> tuple[int, ...]:
    """Batch sizes that all of them have, ascending."""
    return tuple(b for b in problems[0].batch_sizes if all(b in problem.batch_sizes for problem in problems))
