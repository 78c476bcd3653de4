"""The header of a run's journal: written when a session begins, read when one is taken up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moelab import runtime
from moelab.errors import JournalError, MoelabError
from moelab.tuner.evaluate import Evaluator
from moelab.tuner.journal import Content, read
from moelab.tuner.problem import Problem
from moelab.tuner.search import Search, Settings, settings_json


def make_header(search: Search, strategy: str, budget_s: float | None, evaluator: Evaluator) -> dict[str, Any]:
    """Provenance, problem, strategy, space and evaluator, as JSON values."""
    return {
        "provenance": runtime.provenance(search.problem.seed),
        "problem": search.problem.to_json(),
        "strategy": {"name": strategy, "settings": settings_json(search.settings), "budget_s": budget_s},
        "space": search.space.summary(),
        "evaluator": evaluator.describe(),
    }


def read_header(run: str | Path, header: Mapping[str, Any]) -> tuple[Problem, Settings]:
    """Problem and settings of the run of that header. Raises JournalError for what no moelab wrote."""
    from moelab.schemas import first_problem
    from moelab.tuner.schemas import RUN

    if problem := first_problem(RUN, dict(header)):
        raise JournalError(
            f"The header of {run} {problem}. Expected what this moelab's `tune` wrote. Take the run up with the moelab that "
            "wrote it, or tune again."
        )
    given = header["strategy"]["settings"]
    counts = [one.name for one in dataclasses.fields(Settings) if isinstance(one.default, int)]
    if broken := [name for name in counts if type(given.get(name, 0)) is not int]:
        raise JournalError(
            f"The header of {run} holds {given[broken[0]]!r} at strategy.settings.{broken[0]}. Expected a whole number. Tune "
            "again."
        )
    try:
        return Problem.from_json(header["problem"]), Settings(**given)
    except (KeyError, TypeError, ValueError, MoelabError) as error:
        raise JournalError(
            f"The header of {run} does not describe a problem ({type(error).__name__}: {error}). Expected what this "
            "moelab's `tune` wrote. Take the run up with the moelab that wrote it, or tune again."
        ) from error


def last_budget(content: Content) -> float | None:
    """The budget that a run had when it went on last, in seconds; None for none."""
    resumed = [note["budget_s"] for note in content.notes if note["kind"] == "resumed" and "budget_s" in note]
    budget_s: float | None = resumed[-1] if resumed else content.header["strategy"].get("budget_s")
    return budget_s


def header_of(run: str | Path) -> Mapping[str, Any]:
    """The header of a run's journal: provenance, problem, strategy, space, evaluator. Raises JournalError."""
    return read(run).header
