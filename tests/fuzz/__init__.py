"""Seeded abuse: every kind of input that moelab reads, spoiled in some hundred ways, and what became of each.

A kind is a function `cases(rng, folder)` that yields `Case`s for ever, and has an entry in `KINDS` (tests/fuzz/__main__.py). A
case spoils one input and says what may come of it. Run them with `make fuzz`, or `python -m fuzz --kind journals --seed 3`
in tests/; tests/test_fuzz.py runs a few of each.

Five things may become of a case: it is accepted and right; it is refused by name, with exit status 1 or 2; and three that are
faults: a traceback, a wrong acceptance, and a hang.
"""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import random
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from error_rows import unhelpful

from moelab.errors import MoelabError

RIGHT, REFUSED, TRACEBACK, WRONG, HANG = "accepted, right", "refused by name", "traceback", "wrong acceptance", "hang"
OUTCOMES = (RIGHT, REFUSED, TRACEBACK, WRONG, HANG)
FAULTS = (TRACEBACK, WRONG, HANG)
LONGEST_S = 5.0
"""No input may keep a reader busy longer (seconds of computing), or waiting four times as long (a busy machine is no fault)."""


@dataclass(frozen=True)
class Case:
    """One spoiled input.

    what: what was done to it, enough to do it again by hand. run: reads it; raises `MoelabError` or `Refused` if it is refused.
    right: whether accepting it with what `run` returned is right.
    """

    what: str
    run: Callable[[], Any]
    right: Callable[[Any], bool]


@dataclass(frozen=True)
class Found:
    """What became of a case, with the message or the traceback."""

    what: str
    outcome: str
    said: str = ""


Kind = Callable[[random.Random, Path], Iterator[Case]]


class Refused(Exception):
    """A command line that ended with exit status 1 or 2 and said why."""


class _TooLong(BaseException):
    pass


def judge(case: Case, longest_s: float = LONGEST_S) -> Found:
    """Run one case."""
    try:
        with _at_most(longest_s):
            value = case.run()
            outcome, said = (RIGHT, "") if case.right(value) else (WRONG, f"accepted as {str(value)[:300]}")
    except _TooLong:
        return Found(case.what, HANG, f"longer than {longest_s:g} s")
    except (MoelabError, Refused) as error:
        return Found(case.what, REFUSED, str(error))
    except Exception:
        return Found(case.what, TRACEBACK, traceback.format_exc())
    return Found(case.what, outcome, said)


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooLong

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 4 * seconds)}
    before = {number: signal.signal(number, stop) for number in timers}
    try:
        for timer, limit in timers.values():
            signal.setitimer(timer, limit)
        yield
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def command(*arguments: object) -> str:
    """Run `moelab arguments...` in this process and return what it printed. Raises Refused for exit status 1 and 2.

    Any other status, a traceback, and an error without a word are faults, which pass as another exception.
    """
    from moelab import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(argument) for argument in arguments])
    said = err.getvalue().strip()
    if status == 0:
        return out.getvalue()
    if status not in (1, 2) or not (said + out.getvalue()).strip() or "Traceback" in said:
        raise AssertionError(f"exit status {status}: {said[-2000:] or out.getvalue()[-2000:]}")
    raise Refused(said if status == 2 else f"found: {said}{out.getvalue()}")


def run(kind: Kind, count: int, seed: int, folder: Path) -> list[Found]:
    """The first `count` cases of a kind under a seed."""
    folder.mkdir(parents=True, exist_ok=True)
    return [judge(case) for case in itertools.islice(kind(random.Random(seed), folder), count)]


def faults(found: Sequence[Found]) -> list[Found]:
    """What must not be there."""
    return [each for each in found if each.outcome in FAULTS]


def table(found: Mapping[str, Sequence[Found]]) -> str:
    """Counts, a line for each kind."""
    head = ["kind", "tried", *OUTCOMES]
    lines = [head]
    for kind, each in found.items():
        counts = collections.Counter(one.outcome for one in each)
        lines.append([kind, str(len(each)), *(str(counts[outcome]) for outcome in OUTCOMES)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def unhelpful_messages(found: Sequence[Found]) -> list[Found]:
    """Refusals whose message lacks what each must have: what was wrong, what was expected, what to do."""
    refused = [
        each
        for each in found
        if each.outcome == REFUSED and not each.said.startswith(("found: ", "Usage: ", "Error: "))
    ]
    return [each for each in refused if unhelpful(each.said)]
