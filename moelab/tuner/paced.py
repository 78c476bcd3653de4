"""A replay that takes its time: simulated seconds pass at a chosen multiple of real ones, so that one can watch."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Any

from moelab.tuner.evaluate import Request, Result
from moelab.tuner.replay import ReplayEvaluator

PATIENCE_S = 0.5
"""Longest single wait: a request that cost more simulated time is given out at once after it."""


class PacedReplay(ReplayEvaluator):
    """ReplayEvaluator, each result given out only after its simulated cost divided by `speed`, but at most PATIENCE_S, has
    passed. speed: simulated seconds a second; infinite for no waiting. Results are those of ReplayEvaluator."""

    def __init__(self, *given: Any, speed: float = 10.0, **more: Any) -> None:
        super().__init__(*given, **more)
        self.speed = speed

    def run(self, requests: Sequence[Request]) -> Generator[Result, None, None]:
        """See `Evaluator`."""
        before = self.clock_s()
        for result in super().run(requests):
            now = self.clock_s()
            time.sleep(min(PATIENCE_S, (now - before) / self.speed))
            before = now
            yield result
