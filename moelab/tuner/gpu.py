"""GpuEvaluator: requests answered by the GPUs of this machine, a process for each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from moelab import runtime
from moelab.errors import RuntimeModeError
from moelab.tuner.child import Child
from moelab.tuner.compile import COMPILER, DEADLINE_S, CompilePool
from moelab.tuner.problem import Problem
from moelab.tuner.supervise import Supervisor
from moelab.tuner.worker import DEVICE

MEASURE_S = 20.0
"""Deadline of one contender: hundreds of times what checking and timing the slowest takes."""


class GpuEvaluator(Supervisor):
    """An Evaluator on GPUs of this machine.

    gpus: numbers as torch counts them here; work goes to each as it finishes. measure_s, compile_s: deadlines of one
    contender and of one compile, seconds. processes: that compile, default one less than the cores. cache_dir: Triton's
    cache, default its own. quarantine: a folder for what cost two workers their lives, None to write nothing.
    device, compiler: what runs in the processes, as "module:name", and device_arguments, for tests.
    Raises RuntimeModeError without a GPU, UnknownNameError for a kernel that cannot be tuned.
    """

    def __init__(
        self,
        problem: Problem,
        gpus: Sequence[int] = (0,),
        *,
        measure_s: float = MEASURE_S,
        compile_s: float = DEADLINE_S,
        processes: int | None = None,
        cache_dir: str | Path | None = None,
        quarantine: str | Path | None = None,
        device: str = DEVICE,
        device_arguments: Sequence[object] = (),
        compiler: str = COMPILER,
    ) -> None:
        if device == DEVICE:
            _require_gpus(gpus)
        cache: dict[str, str | None] = {} if cache_dir is None else {"TRITON_CACHE_DIR": str(Path(cache_dir).resolve())}
        arguments = tuple(device_arguments)

        def start(number: int) -> Child:
            seen = visible(gpus[number], os.environ) if device == DEVICE else {}
            return Child(
                "moelab.tuner.worker:serve", device, arguments, problem,
                environment={"TRITON_INTERPRET": "0", **seen, **cache},
            )  # fmt: skip

        super().__init__(
            problem,
            CompilePool(problem, processes=processes, deadline_s=compile_s, compiler=compiler, environment=cache),
            start,
            devices=len(gpus),
            deadline_s=measure_s,
            quarantine=None if quarantine is None else Path(quarantine),
            about={"kind": "gpu", "measured": device == DEVICE, "protocol": _protocol(device)},
        )


def _protocol(device: str) -> dict[str, object]:
    if device != DEVICE:
        return {"device": device}
    from moelab.tuner.device import protocol

    return protocol()


def _require_gpus(gpus: Sequence[int]) -> None:
    here = runtime.current()
    if here.mode != "gpu":
        raise RuntimeModeError(
            f"Tuning measures kernels, and here {here.reason}. Expected a GPU: interpreted kernels say nothing about "
            "speed. Run this on a GPU node, or replay a recorded landscape."
        )
    import torch

    count = torch.cuda.device_count()
    if not gpus or len(set(gpus)) != len(gpus) or not all(0 <= gpu < count for gpu in gpus):
        raise RuntimeModeError(
            f"There are no GPUs {list(gpus)} to tune on. Expected different numbers below {count}, which torch sees here. "
            "Name those."
        )


def visible(gpu: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables under which a child process sees only that GPU, counted among those that are visible now."""
    name = "HIP_VISIBLE_DEVICES" if environment.get("HIP_VISIBLE_DEVICES") else "CUDA_VISIBLE_DEVICES"
    now = [part.strip() for part in environment.get(name, "").split(",") if part.strip()]
    return {name: now[gpu] if now else str(gpu)}
