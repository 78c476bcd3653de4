"""Where a tuning run stands, on stderr."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from moelab.cli import terminal

if TYPE_CHECKING:
    from moelab.tuner.progress import Progress


class Bar:
    """Progress on stderr: one line that is rewritten on a terminal; elsewhere a line where a phase begins, and one where it is
    through."""

    def __init__(self) -> None:
        self._live, self._phase, self._shown = sys.stderr.isatty(), "", 0.0

    def progress(self, now: Progress) -> None:
        """Show where a run stands: on a terminal at most ten times a second, but where a phase begins and ends always."""
        edge = now.phase != self._phase or now.done >= now.total
        if not self._live and edge:
            self.line(_status(now))
        elif edge or (self._live and time.monotonic() - self._shown > 0.1):
            terminal.erase_line(sys.stderr)
            print(_status(now), end="", file=sys.stderr, flush=True)
            self._shown = time.monotonic()
        self._phase = now.phase

    def end(self) -> None:
        """Leave the last bar where it stands: what follows begins a line."""
        if self._live and self._phase:
            print(file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        """A line of its own."""
        if self._live:
            terminal.erase_line(sys.stderr)
        print(text, file=sys.stderr, flush=True)


def _status(now: Progress) -> str:
    share = now.done / now.total if now.total else 1.0
    bar = "#" * round(20 * share) + "." * (20 - round(20 * share))
    parts = [f"{now.phase:<10} [{bar}] {now.done}/{now.total}", f"{minutes(now.spent_s)} spent"]
    parts += [f"about {minutes(now.eta_s)} to go"] if now.eta_s is not None else []
    if now.best_us:
        few = list(now.best_us.items())
        few = [few[0], few[len(few) // 2], few[-1]] if len(few) > 3 else few
        parts.append("best us " + ", ".join(f"{b}: {t:.1f}" for b, t in few))
    if now.failures:
        parts.append("failed " + ", ".join(f"{name} {count}" for name, count in now.failures.items()))
    return "  ".join(parts)


def minutes(seconds: float) -> str:
    """As 1:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
