"""`moelab record`: suites measured again and written; what a cut run has left is named, never lost."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from moelab.cli import printing
from moelab.errors import RecordingError, RuntimeModeError


def record(
    suite: Annotated[list[str] | None, typer.Argument(metavar="SUITE...", help="Suites, or: all.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the files; default: data/recordings.")] = None,
    list_them: Annotated[bool, typer.Option("--list", help="List the suites and what was recorded there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a data set again and write it, with its provenance. Exit status 1 if --list finds a broken file."""
    if list_them:
        if out is not None and not out.is_dir():
            raise RecordingError(f"There is no folder {out}. Expected one that holds recordings. Correct --out.")
        broken = printing.list_suites(as_json, out)
        raise typer.Exit(int(broken))
    if not suite:
        raise typer.BadParameter("name a suite, or: all. `moelab record --list` lists them.")
    from moelab import runtime, studies, suites

    names = suites.suite_names(suite, studies.known())
    if runtime.current().mode != "gpu" and out is None and not set(names) <= set(studies.ANYWHERE):
        raise RuntimeModeError(
            f"Recording here ({runtime.current().reason}) would put numbers of this machine in the place of a GPU's. "
            "Expected a GPU, or a folder of its own. Pass --out DIR."
        )
    targets = [suites.target(name, out) for name in names]
    before = _partials(targets)
    _say("an earlier run was cut; until this one is done", before)
    try:
        written = suites.record(names, out, studies.known())
    except BaseException:
        _say("this run was cut", [path for path in _partials(targets) if path not in before])
        raise
    printing.show_rows([{"wrote": str(path)} for path in written], as_json)


def _partials(targets: Iterable[Path]) -> list[Path]:
    from moelab.suites.partial import partials

    return [path for target in targets for path in partials(target)]


def _say(why: str, paths: Iterable[Path]) -> None:
    """On stderr, where the rows of a cut run lie."""
    for path in paths:
        print(f"moelab: {why}, what it measured lies in {path} (moelab.recordings.load reads it)", file=sys.stderr)
