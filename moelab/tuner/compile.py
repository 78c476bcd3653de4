"""Compile kernels in parallel processes, into the cache on disk where the process that measures finds them.

A kernel is compiled once for all batch sizes: sizes that follow the batch are not specialised. The processes ask Triton's
own launcher for the instance (`warmup`), with a driver that only names the target, so that they need no GPU and hold no
context on it, and the cache entry has the name that a launch with real tensors looks for.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moelab.config import KernelConfig, get_target
from moelab.errors import UnknownNameError
from moelab.tuner.child import Channel, Child, load
from moelab.tuner.crew import Crew, Event
from moelab.tuner.evaluate import Contender, Stage
from moelab.tuner.problem import GEMMS, Gemm, Problem

Kernel = tuple[Gemm, KernelConfig]
"""What is compiled: one config for one GEMM."""

DEADLINE_S = 90.0
"""Seconds for one compile; the slowest of the peers' grid takes about 10."""

COMPILER = "moelab.tuner.compile:TritonCompiler"
OWN_ENVIRONMENT: Mapping[str, str | None] = {
    "TRITON_INTERPRET": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": None,
}
"""A compiling process sees no GPU, so that torch makes no context on it: 15 would take 7 GB."""


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel. seconds: of compiling; failure: a key of FAILURES or None, and its text.

    entry: the name of the cache entry; shared_bytes: shared memory of a block.
    """

    seconds: float = 0.0
    failure: str | None = None
    message: str = ""
    entry: str = ""
    shared_bytes: int = 0


def kernels_of(stage: Stage, contender: Contender) -> tuple[Kernel, ...]:
    """The kernels that a contender of that stage launches, of those that are tuned."""
    gemms = GEMMS if stage == "layer" else (stage,)
    return tuple(zip(gemms, contender, strict=True))


def first_words(error: BaseException, length: int = 300) -> str:
    """Class and first lines of an error, one line: a compiler's own text goes on with a whole program."""
    lines = (line.strip() for line in str(error)[:5000].splitlines())
    return f"{type(error).__name__}: {' '.join(line for line in lines if line.strip('='))}"[:length]


# --- in the compiling process -------------------------------------------------------------------------------------


class _AheadDriver:
    """Stands in for Triton's driver where there is no device: everything a compile asks of it."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class TritonCompiler:
    """Compiles the problem's kernels for the problem's target; only in a process of its own, whose driver it replaces."""

    def __init__(self, problem: Problem) -> None:
        from triton.runtime.driver import driver

        from moelab.kernels.aot import _gpu_target

        require_exchange_kernel(problem)
        self.problem = problem
        self._limit = get_target(problem.target).shared_memory_per_block
        driver.set_active(_AheadDriver(_gpu_target(problem.target)))

    def __call__(self, kernel: Kernel) -> Compiled:
        """Compile one kernel, unless the cache holds it already."""
        begin = time.perf_counter()
        try:
            compiled = self.instance(kernel)
        except Exception as error:  # a compiler fails with anything: its own errors, ptxas's, assertions, RuntimeError
            return Compiled(time.perf_counter() - begin, "compile", first_words(error))
        seconds, shared = time.perf_counter() - begin, compiled.metadata.shared
        if shared > self._limit:
            why = f"{shared} bytes of shared memory, {self.problem.target} gives a block {self._limit}"
            return Compiled(seconds, "resources", why, compiled.hash, shared)
        return Compiled(seconds, None, "", compiled.hash, shared)

    def instance(self, kernel: Kernel) -> Any:
        """Triton's compiled kernel, as a launch over this problem's tensors would make it."""
        from moelab.kernels.grouped_gemm import _grouped_gemm_kernel

        arguments, constants, options = self.launch(kernel)
        return _grouped_gemm_kernel.warmup(*arguments, grid=(1, 1), **constants, **options)

    def launch(self, kernel: Kernel) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, int]]:
        """Arguments (a dtype stands for a tensor at a multiple of 16 bytes), constants and options of a launch."""
        import torch

        from moelab import runtime
        from moelab.kernels.checks import gemm_constants

        gemm, config = kernel
        dtype, i32 = runtime.torch_dtype(self.problem.shape.dtype), torch.int32
        N, K = self.problem.columns(gemm), self.problem.inner_size(gemm)
        tensors = (dtype, dtype, dtype, None, torch.float32 if gemm == "down" else None, i32, i32, i32)
        sizes = (N, K, 1, 1)  # the last two, num_pairs and num_rows, are not specialised
        top_k = self.problem.shape.top_k if gemm == "up" else 1
        constants, options = gemm_constants(config, K, TOP_K=top_k)
        return (*tensors, *sizes), constants, options


def require_exchange_kernel(problem: Problem) -> None:
    """Raise UnknownNameError for a kernel that cannot be tuned on a device yet."""
    if problem.kernel != "grouped_gemm":
        raise UnknownNameError(
            f"Cannot tune the kernel {problem.kernel!r} on a device. Expected 'grouped_gemm', the kernel that sglang and "
            "vLLM run. Name that one."
        )


def serve(channel: Channel, compiler: str, problem: Problem) -> None:
    """A compiling process: kernels in, (kernel, Compiled) out."""
    work = load(compiler)(problem)
    channel.send(("ready", os.getpid()))
    while True:
        kernel = channel.receive()
        channel.send(("compiled", kernel, work(kernel)))


# --- in the process that asks -------------------------------------------------------------------------------------


class CompilePool:
    """Compiles what it is asked for in up to `processes` processes, each kernel once; `known` holds what it learned.

    A process that dies or is late is killed and the kernel tried once more, in another: then it counts as a failure of
    class "compile", or "timeout". The processes end when there is nothing left to do.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        processes: int | None = None,
        deadline_s: float = DEADLINE_S,
        compiler: str = COMPILER,
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        self.known: dict[Kernel, Compiled] = {}
        self.processes = processes or max(1, len(os.sched_getaffinity(0)) - 1)
        self._queue: deque[Kernel] = deque()
        self._asked: set[Kernel] = set()
        self._tried: set[Kernel] = set()
        environment = {**OWN_ENVIRONMENT, **(environment or {})}
        self.crew = Crew(
            self.processes,
            lambda number: Child("moelab.tuner.compile:serve", compiler, problem, environment=environment),
            lambda _: self._queue.popleft() if self._queue else None,
            job_limit_s=deadline_s,
            start_limit_s=120.0,
        )

    def ask(self, kernels: Iterable[Kernel]) -> None:
        """Compile these too, in this order, unless they have been asked for."""
        fresh = [kernel for kernel in dict.fromkeys(kernels) if kernel not in self._asked]
        self._asked.update(fresh)
        self._queue.extend(fresh)

    def take_over(self, kernel: Kernel, compiled: Compiled) -> None:
        """Know of a kernel that another process on this machine has compiled into the same cache."""
        if kernel not in self._asked:
            self._asked.add(kernel)
            self.known[kernel] = compiled

    def poll(self) -> Iterator[Kernel]:
        """Keep the processes busy; the kernels that have been decided since. Never waits."""
        if self._queue:
            self.crew.feed()
        for event in self.crew.events():
            yield from self._handle(event)
        if self._queue:
            self.crew.feed()
        elif len(self.known) == len(self._asked):
            self.crew.close()

    def _handle(self, event: Event) -> Iterator[Kernel]:
        if event.lost is not None:
            yield from self._lost(event)
        elif event.message[0] == "compiled":
            _, kernel, compiled = event.message
            self.crew.done(event.member)
            self.known[kernel] = compiled
            yield kernel

    def _lost(self, event: Event) -> Iterator[Kernel]:
        if event.member.about is None:  # it never came up: nobody's fault
            self._queue.extendleft(reversed(event.jobs))
            return
        for kernel in reversed(event.jobs[1:]):
            self._queue.appendleft(kernel)
        for kernel in event.jobs[:1]:
            if kernel not in self._tried:
                self._tried.add(kernel)
                self._queue.append(kernel)
                continue
            failure = "timeout" if event.lost == "timeout" else "compile"
            self.known[kernel] = Compiled(0.0, failure, f"the compiling process was lost twice: {event.why}"[:300])
            yield kernel

    def close(self) -> None:
        """Stop every process. May be called twice."""
        self.crew.close()
