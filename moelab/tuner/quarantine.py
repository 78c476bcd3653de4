"""Quarantine: which contenders cost workers their lives, and are measured no more."""

from __future__ import annotations

from pathlib import Path

from moelab.tuner import repro
from moelab.tuner.compile import kernels_of
from moelab.tuner.evaluate import Contender, Outcome, Request, Stage
from moelab.tuner.problem import Problem

Suspect = tuple[Stage, int, Contender]
"""Stage, batch size and contender that a worker was at; no contender for its inputs."""


class Quarantine:
    """Contenders by what they did. folder: where a repro of each is written, None for nowhere."""

    def __init__(self, problem: Problem, folder: Path | None) -> None:
        self.problem, self.folder = problem, folder
        self._lost_once: set[Suspect] = set()
        self._bad: dict[tuple[Stage, Contender], tuple[str, str]] = {}

    def learn(self, request: Request, contender: Contender, outcome: Outcome) -> None:
        """Take over what another run or machine found."""
        if outcome.failure in ("crash", "timeout") and request.rounds:
            self._bad[request.stage, contender] = (outcome.failure, outcome.message)

    def known(self, stage: Stage, contender: Contender) -> tuple[str, str] | None:
        """Failure and message of what is in quarantine, alone or as a GEMM of a layer; None for what is not."""
        names: list[tuple[Stage, Contender]] = [(stage, contender)]
        names += [(gemm, (config,)) for gemm, config in kernels_of(stage, contender)]
        return next((self._bad[name] for name in names if name in self._bad), None)

    def is_second_loss(self, suspect: Suspect) -> bool:
        """Whether a worker was lost at it before; it is remembered now."""
        before = suspect in self._lost_once
        self._lost_once.add(suspect)
        return before

    def put_away(self, request: Request, contender: Contender, lost: str, why: str) -> None:
        """Put a contender there that cost two workers, at all batch sizes, and write its repro."""
        message = f"lost two workers at {request.num_tokens} tokens, the second: {why}"[:600]
        if self.folder is not None:
            path = repro.write(self.folder, self.problem, request.stage, request.num_tokens, contender, lost, message)
            message += f"; repeat with: python -m moelab.tuner.repro {path}"
        self._bad[request.stage, contender] = (lost, message)
