"""What `moelab tune` shows while it runs: each phase from its beginning to 100 %."""

from __future__ import annotations

import io
import sys

import pytest

from moelab.cli.progress_bar import Bar
from moelab.tuner.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(phase: str, total: int) -> list[Progress]:
    return [Progress("running", phase, done, total, 1.0, None, {}, {}) for done in range(1, total + 1)]


@pytest.mark.parametrize("live", [True, False], ids=["terminal", "file"])
def test_each_phase_is_seen_to_its_end(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: the last bars of a replay were `[####......] 96/384`, for no later one came within a tenth of a second."""
    shown = Terminal() if live else io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    bar = Bar()
    for now in [*steps("compile", 50), *steps("layers", 30)]:
        bar.progress(now)
    bar.end()
    said = [line.removeprefix("\x1b[2K") for line in shown.getvalue().replace("\r", "\n").splitlines() if line]
    for phase, total in (("compile", 50), ("layers", 30)):
        own = [line for line in said if line.startswith(phase)]
        assert f" 1/{total} " in own[0] and f"[{'#' * 20}] {total}/{total} " in own[-1]
    assert len(said) == 4 and shown.getvalue().endswith("\n")  # what comes next begins a line
