"""A device and a compiler for tests that need no GPU, and that fail as told: real processes around made-up times."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path

from moelab.config import KernelConfig
from moelab.tuner.compile import Compiled, Kernel, kernels_of
from moelab.tuner.evaluate import Contender, Stage
from moelab.tuner.problem import Problem

DEVICE = "faulty_device:FaultyDevice"
COMPILER = "faulty_device:FaultyCompiler"

Faults = Mapping[KernelConfig, str]
"""Config -> what goes wrong with it. For COMPILE_FAULTS in a compiler, for the others on the device."""

COMPILE_FAULTS = ("no compile", "compiler hangs", "compiler dies")


def made_up_us(num_tokens: int, config: KernelConfig) -> float:
    """A time for each config, without torch or numpy: a process that imports those takes a second to start."""
    padded = math.ceil(num_tokens / config.BLOCK_SIZE_M) * config.BLOCK_SIZE_M
    return 5.0 + padded / 20 + 200 / config.BLOCK_SIZE_N + config.num_stages / 3


class OutOfMemoryError(RuntimeError):
    """As torch's is called."""


class OutOfResources(Exception):
    """As Triton's is called."""


class FaultyDevice:
    """times: the synthetic model's, with noise. trail: a file to which each check and sample is appended."""

    def __init__(self, problem: Problem, faults: Faults, trail: str) -> None:
        self.problem, self.faults, self.trail = problem, faults, Path(trail)
        self.draws = random.Random(os.getpid())
        self.broken: str | None = None
        self.note("start")

    def note(self, *words: object) -> None:
        with self.trail.open("a") as file:
            file.write(" ".join(map(str, (os.getpid(), *words))) + "\n")

    def about(self) -> dict[str, object]:
        return {"gpu": self.problem.device}

    def prepare(self, stage: Stage, num_tokens: int) -> None:
        if self.faults.get("inputs") == num_tokens:
            os._exit(7)

    def release(self) -> None:
        self.note("release")

    def trouble(self) -> str | None:
        return self.broken

    def check(self, stage: Stage, num_tokens: int, contender: Contender) -> tuple[str, str] | None:
        for gemm, config in kernels_of(stage, contender):
            self.note("check", gemm, num_tokens, config.short())
            fault = self.faults.get(config)
            if fault == "dies once" and self.first_time(config):
                os._exit(11)
            if fault in ("nan", "wrong"):
                return fault, f"made to be {fault}"
            if fault is not None:
                self.fail(fault)
        return None

    def first_time(self, config: KernelConfig) -> bool:
        mark = self.trail.with_suffix("." + config.short().replace(" ", "-"))
        known = mark.exists()
        mark.touch()
        return not known

    def fail(self, fault: str) -> None:
        if fault == "hangs":
            time.sleep(3600)
        elif fault == "dies":
            os._exit(11)
        elif fault == "aborts":
            os.abort()
        elif fault == "sticky":
            self.broken = "CUDA error: an illegal memory access was encountered"
            raise RuntimeError(self.broken)
        elif fault == "memory":
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        elif fault == "resources":
            raise OutOfResources("out of resource: shared memory")
        elif fault == "launch":
            raise RuntimeError("Triton Error [CUDA]: invalid argument")

    def true_us(self, stage: Stage, num_tokens: int, contender: Contender) -> float:
        return sum(made_up_us(num_tokens, config) for _, config in kernels_of(stage, contender))

    def sample(
        self, stage: Stage, num_tokens: int, contender: Contender, rounds: int, stop_us: float | None
    ) -> list[float]:
        self.note("sample", stage, num_tokens, *(c.short() for c in contender))
        true = self.true_us(stage, num_tokens, contender)
        drawn = [true * math.exp(self.draws.gauss(0, 0.01)) for _ in range(rounds)]
        return drawn[:1] if stop_us is not None and drawn[0] > stop_us else drawn

    def capture(self, stage: Stage, num_tokens: int, contender: Contender) -> object:
        for _, config in kernels_of(stage, contender):
            if self.faults.get(config) == "no graph":
                raise RuntimeError("operation not permitted when stream is capturing")
        return [self.true_us(stage, num_tokens, contender), contender, 0]

    def replay(self, captured: object) -> float:
        true, contender, turns = captured  # type: ignore[misc]
        captured[2] += 1  # type: ignore[index]
        if turns == 2 and any(self.faults.get(c) == "sticky later" for c in contender):
            self.fail("sticky")
        return true * math.exp(self.draws.gauss(0, 0.01))


class FaultyCompiler:
    """Takes no time, but for a config that is told to fail. faults come in through the problem's environment."""

    def __init__(self, problem: Problem) -> None:
        import pickle

        self.faults: Faults = pickle.loads(bytes.fromhex(os.environ.get("FAULTS", "")) or pickle.dumps({}))

    def __call__(self, kernel: Kernel) -> Compiled:
        fault = self.faults.get(kernel[1])
        if fault == "compiler hangs":
            time.sleep(3600)
        elif fault == "compiler dies":
            os.abort()
        elif fault == "no compile":
            return Compiled(0.1, "compile", "PTXASError: made to fail")
        return Compiled(0.1, entry=f"{kernel[0]}-{kernel[1].short()}")
