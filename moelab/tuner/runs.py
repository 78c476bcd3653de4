"""The runs that lie in a folder, so that a notebook whose kernel was restarted finds its own again."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TAIL = 1 << 16
"""Bytes at a journal's end that are looked at: its last note is far shorter."""


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
        with path.open("rb") as file:
            header = json.loads(file.readline())
            file.seek(max(0, os.path.getsize(path) - _TAIL))
            last = file.read().splitlines()[-1:]
        problem: Mapping[str, Any] = header["problem"]
        return Run(
            path, header["strategy"]["name"], str(header["evaluator"].get("kind")), header["at"],
            tuple(problem["batch_sizes"]), _is_finished(last),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_finished(last: list[bytes]) -> bool:
    try:
        return bool(last) and json.loads(last[0]).get("kind") == "finished"
    except ValueError:  # a line torn by a kill
        return False
