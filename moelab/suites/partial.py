"""What a suite has measured so far, kept beside its target until it is done: a run that is cut loses nothing.

A suite that goes shape by shape takes `on_rows` and calls it with all rows so far after each step. `moelab record` hands it a
`keeper`, whose file is a recording of its own: `recordings.load(path)` reads it.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moelab import recordings, runtime
from moelab.recordings import Recording

OnRows = Callable[[Sequence[Mapping[str, Any]]], None]
"""Takes all rows so far; called after each step."""

PROTOCOL = {"kind": "partial: the run was cut, or is under way; timed as the suite's finished recording says"}


def ignore(rows: Sequence[Mapping[str, Any]]) -> None:
    """Keep nothing: for who calls a suite's `record` and holds its rows anyway."""


def partials(target: Path) -> list[Path]:
    """What cut runs have left beside that file, the oldest first."""
    found = target.parent.glob(f"{target.name}.partial*") if target.parent.is_dir() else ()
    return sorted(found, key=lambda path: (len(path.name), path.name))


def keeper(suite: str, target: Path, own: list[Path] | None = None) -> OnRows:
    """An `on_rows` that writes each time all rows so far into a new file beside `target`, whole, as a recording. own: told of
    that file.

    It raises what `recordings.write` does: a row that the finished recording would be refused for ends the run at once.
    """
    own = [] if own is None else own
    provenance = runtime.provenance(seed=0)

    def keep(rows: Sequence[Mapping[str, Any]]) -> None:
        if not rows:
            return
        first = not own
        if first:
            own.append(_taken(target))
        try:
            recordings.write(Recording(suite, provenance, PROTOCOL, tuple(rows)), own[0])
        except BaseException:
            if first:
                own.pop().unlink()
            raise

    return keep


def _taken(target: Path) -> Path:
    """An empty file of the first free name beside `target`: of two runs that begin at once, each has its own."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        path = target.with_name(f"{target.name}.partial{number or ''}")
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path
    raise AssertionError("numbers do not end")


def record_kept(suite: str, measure: Callable[..., Recording], target: Path) -> Path:
    """Run a suite and write its recording to `target`. Until then its rows so far are kept beside it, if it takes `on_rows`;
    once it is written, no partial of the suite is left there but of runs that began meanwhile."""
    takes = "on_rows" in inspect.signature(measure).parameters
    before, own = partials(target), list[Path]()
    recording = measure(on_rows=keeper(suite, target, own)) if takes else measure()
    written = recordings.write(recording, target)
    for path in (*before, *own):  # and none of a run that began meanwhile
        path.unlink(missing_ok=True)
    return written
