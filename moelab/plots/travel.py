"""How well a run's configs travel: what is recorded of it, and the command that records what is not."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from moelab.plots.panel import Panel, Row
from moelab.tuner.landscape import Landscape, default_name
from moelab.tuner.problem import Problem
from moelab.tuner.transfer import Transfer

_SAME = ("routing", "device", "triton_version", "seed")
_DIFFERS: Mapping[str, str] = {
    "another seed": "seed", "a skewed routing": "routing", "another device": "device",
    "another Triton version": "triton_version",
}  # fmt: skip
"""Question -> the one field of a problem that differs; with two that differ a loss cannot be told apart."""

_WHERE: Mapping[str, str] = {
    "another seed": "on this device", "a skewed routing": "on this device", "another device": "on that device",
    "another Triton version": "with that Triton installed",
}  # fmt: skip


def travel(home: Transfer, landscapes: Sequence[Landscape]) -> Panel:
    """What the winners of `home` lose elsewhere, for each thing that can differ; not recorded is said, with its command.

    landscapes: all there are. One answers where the layer is the same and nothing but that thing differs.
    """
    found = {question: _answers(home, landscapes, field) for question, field in _DIFFERS.items()}
    table: list[Row] = []
    for question, others in found.items():
        command = {"to record it": f"{_command(home.problem, question)}, {_WHERE[question]}"}
        table += [{"run under": question, **_loss(home, other), "landscape": other.name, **command} for other in others]
        if not others:
            nothing = {"lost on average, %": None, "at worst, %": None, "cells": None, "landscape": "not recorded"}
            table.append({"run under": question, **nothing, **command})
    missing = [question for question, others in found.items() if not others]
    known = [f"{row['run under']} {_said(row)}" for row in table if row["landscape"] != "not recorded"]
    said = (
        f"Not recorded: {', '.join(missing)}; the table has the command for each." if missing else "All are recorded."
    )
    return Panel(
        None, table, f"**Recorded of {home.landscape.name}’s winners: {'; '.join(known) or 'nothing'}.** {said}"
    )


def _answers(home: Transfer, landscapes: Sequence[Landscape], field: str) -> list[Landscape]:
    def same(other: Landscape, name: str) -> bool:
        # another routing or device draws other inputs in any case, so that its seed may be any
        return getattr(other.problem, name) == getattr(home.problem, name) or (name == "seed" and field != "seed")

    return [
        other
        for other in landscapes
        if other.problem.shape == home.problem.shape
        and getattr(other.problem, field) != getattr(home.problem, field)
        and all(same(other, name) for name in _SAME if name != field)
    ]


def _loss(home: Transfer, other: Landscape) -> dict[str, float | int | None]:
    cells = Transfer(other).cells("both", home.winners["both"].get)
    lost = [max(0.0, loss.percent) for loss in cells.values() if loss]
    mean = 100 * (statistics.geometric_mean([1 + each / 100 for each in lost]) - 1) if lost else None
    return {"lost on average, %": mean, "at worst, %": max(lost, default=None), "cells": len(lost)}


def _said(row: Row) -> str:
    mean, worst = row["lost on average, %"], row["at worst, %"]
    return f"loses {mean:.1f} % on average, {worst:.1f} % at worst" if mean is not None else "was not measured"


def _command(problem: Problem, question: str) -> str:
    """The command that records a landscape which differs in that one thing."""
    shape = problem.shape
    stem = f"data/landscapes/{default_name(problem)}"
    options = {
        "another seed": (f"--seed {problem.seed + 1}", f"{stem}-seed{problem.seed + 1}.parquet"),
        "a skewed routing": ("--routing zipf", f"{stem}-zipf.parquet"),
        "another device": ("", f"{stem}.parquet".replace(problem.device.replace(" ", "_"), "DEVICE")),
        "another Triton version": ("", f"{stem}-triton_X_Y_Z.parquet"),
    }
    option, file = options[question]
    parts = [
        "moelab tune",
        f"--model {shape.name}",
        f"--tp-size {shape.tp_size}",
        option,
        f"--strategy grid --freeze {file}",
    ]
    return " ".join(part for part in parts if part)
