"""A device without a GPU: results of Triton's interpreter, held against the gate, and made-up times. No measurement."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # a worker starts with 0; nothing has imported triton yet

from moelab.config import KernelConfig
from moelab.tuner import rig as module
from moelab.tuner.evaluate import Contender, Stage
from moelab.tuner.rig import Rig

module.MOST_ROTATIONS = 1  # each is aligned by an interpreted kernel


def made_up_us(config: KernelConfig) -> float:
    """More slices, narrower tiles and fewer stages are faster, by what is plain to see."""
    return 10.0 + config.BLOCK_SIZE_N / 32 + config.num_stages / 2 - config.SPLIT_K


class InterpretedDevice(Rig):
    """Checks for real, and makes up every time."""

    def about(self) -> dict[str, object]:
        return {"gpu": self.problem.device}

    def trouble(self) -> str | None:
        return None

    def sample(
        self, stage: Stage, num_tokens: int, contender: Contender, rounds: int, stop_us: float | None
    ) -> list[float]:
        return [sum(map(made_up_us, contender)) + i / 1000 for i in range(rounds)]

    def capture(self, stage: Stage, num_tokens: int, contender: Contender) -> object:
        return sum(map(made_up_us, contender))

    def replay(self, captured: object) -> object:
        return captured
