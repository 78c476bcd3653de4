"""How a run that did not come to its end is gone on with: the budgets that `moelab tune` takes, and the command it names."""

from __future__ import annotations

import contextlib
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from moelab.errors import JournalError, MoelabError

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}

MOST_S = 1000 * 3600.0
"""The longest budget."""

NO_BUDGET = "none"
"""What --budget says with --resume to lift the budget that the run had."""


def seconds(text: str | None) -> float | None:
    """ "5m", "90s", "1.5h" or seconds; infinite for "none"; None where nothing is said."""
    if text is None or text == NO_BUDGET:
        return None if text is None else math.inf
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip(), re.ASCII)
    found = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 0 < found <= MOST_S:
        shown = repr(text if len(text) < 40 else f"{text[:30]}...")
        raise typer.BadParameter(
            f"{shown} is no time. Expected a number with s, m or h, such as 5m, 1000 h at most, or {NO_BUDGET}."
        )
    return found


def folder_of(run: Path) -> Path:
    """Where the config files of a run go, whose journal that is, if nobody says otherwise."""
    return run.parent.parent if run.parent.name == "runs" else run.parent


def options(run: Path, out: Path | None, given: Mapping[str, Any]) -> str:
    """What has to follow --resume to go on with a run as it was begun, but for its budget. given: options of `tune`."""
    words = [str(run)]
    words += [] if out is None or out == folder_of(run) else ["--out", str(out)]
    for name in ("freeze", "ray", "gpus"):
        words += [f"--{name}", str(given[name])] if given.get(name) is not None else []
    return shlex.join([*words, *(["--json"] if given.get("as_json") else [])])


def command(options: str, budget_s: float | None) -> str:
    """The command that goes on with a run under the budget that it has."""
    budget = "" if budget_s is None else " --budget " + f"{budget_s:f}".rstrip("0").rstrip(".") + "s"
    return f"moelab tune --resume {options}{budget}"


@contextlib.contextmanager
def told(line: Callable[[str], None], goes_on: str | None) -> Iterator[None]:
    """Whatever ends a run before its files are written says, by `line`, how to go on. goes_on: `command`, None without a
    journal."""
    how = f"go on with: {goes_on}" if goes_on else "it had no journal, because it had no --out"
    try:
        yield
    except KeyboardInterrupt:
        line(f"stopped; {how}")
        raise
    except JournalError:  # says so itself
        raise
    except (MoelabError, OSError):
        line(f"what was measured is kept; {how}" if goes_on else f"what was measured is lost: {how}")
        raise
