"""The runs that lie in a folder, so that a notebook whose kernel was restarted finds its own again."""

from __future__ import annotations

import io
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from moelab.errors import MoelabError
from moelab.reading import UnreadableError, opened
from moelab.tuner.header import read_header
from moelab.tuner.journal_lines import parsed

_TAIL = 1 << 16
"""Bytes at a journal's end that are looked at: its last note is far shorter."""

LONGEST_HEADER = 1 << 20
"""Bytes of the longest first line that is looked at: one of 19 batch sizes has 12,000."""


def new_label(strategy: str) -> str:
    """What a run that begins now is called: strategy, local time, and what no other has that begins in the same second."""
    return f"{strategy}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


@dataclass(frozen=True)
class Run:
    """A journal on disk. at: when it was begun (UTC). kind: who measured ("gpu", "replay", ...)."""

    path: Path
    strategy: str
    kind: str
    at: str
    batch_sizes: tuple[int, ...]
    finished: bool

    def label(self) -> str:
        """For a list to choose from."""
        state = "finished" if self.finished else "not finished"
        sizes = ", ".join(map(str, self.batch_sizes[:4])) + (", …" if len(self.batch_sizes) > 4 else "")
        return f"{self.path.stem} ({self.kind}, batch {sizes}; {state})"


def find_runs(folder: str | Path) -> tuple[Run, ...]:
    """The runs in a folder, newest first; a file that is no journal is passed over, and so is a folder that is not there.

    Only the first line and the end of each file are read.
    """
    found = [run for path in Path(folder).glob("*.jsonl") if (run := _read(path)) is not None]
    return tuple(sorted(found, key=lambda run: (run.at, run.path.name), reverse=True))


def _read(path: Path) -> Run | None:
    try:
        with io.BufferedReader(opened(path)) as file:
            header = parsed(file.readline(LONGEST_HEADER).rstrip(b"\n"), True)
            file.seek(max(0, os.path.getsize(path) - _TAIL))
            last = file.read(_TAIL).splitlines()[-1:]
        problem, _ = read_header(path, header)
        return Run(
            path,
            header["strategy"]["name"],
            header["evaluator"]["kind"],
            header["at"],
            problem.batch_sizes,
            _is_finished(last),
        )
    except (OSError, UnreadableError, MoelabError):
        return None


def _is_finished(last: list[bytes]) -> bool:
    try:
        return bool(last) and parsed(last[0], False)["kind"] == "finished"
    except UnreadableError:  # a line torn by a kill
        return False
