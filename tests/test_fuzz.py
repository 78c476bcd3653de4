"""A few spoiled inputs of every kind; `make fuzz` tries some hundred."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest
from fuzz.kinds import KINDS

from moelab.errors import JournalError

FEW = 12


@pytest.mark.parametrize("kind", KINDS)
def test_spoiled_input_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    found = fuzz.run(KINDS[kind], FEW, seed=0, folder=tmp_path)
    assert fuzz.faults(found) == [] and fuzz.unhelpful_messages(found) == []
    assert {each.outcome for each in found} & {fuzz.REFUSED}, "nothing was spoiled"


def wait() -> None:
    while True:
        pass


def refuse() -> None:
    raise JournalError("It is spoiled. Expected another. Correct it.")


@pytest.mark.parametrize(
    ("case", "outcome"),
    [
        (fuzz.Case("", lambda: 1, lambda value: value == 1), fuzz.RIGHT),
        (fuzz.Case("", lambda: 2, lambda value: value == 1), fuzz.WRONG),
        (fuzz.Case("", lambda: {}["x"], lambda _: True), fuzz.TRACEBACK),
        (fuzz.Case("", lambda: fuzz.command("--version"), lambda said: said.startswith("moelab ")), fuzz.RIGHT),
        (fuzz.Case("", lambda: fuzz.command("shape"), lambda _: True), fuzz.REFUSED),
        (fuzz.Case("", refuse, lambda _: True), fuzz.REFUSED),
        (fuzz.Case("", wait, lambda _: True), fuzz.HANG),
    ],
)
def test_what_becomes_of_a_case(case: fuzz.Case, outcome: str) -> None:
    found = fuzz.judge(case, longest_s=0.3)
    assert found.outcome == outcome
    assert bool(fuzz.faults([found])) == (outcome in fuzz.FAULTS)
    assert outcome in fuzz.table({"made up": [found]})


def test_a_message_that_helps_nobody_is_seen() -> None:
    assert fuzz.unhelpful_messages([fuzz.Found("", fuzz.REFUSED, "It is spoiled.")])
    assert not fuzz.unhelpful_messages([fuzz.Found("", fuzz.REFUSED, "It is spoiled. Expected another. Correct it.")])
