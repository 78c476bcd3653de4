"""Compile kernels in parallel processes, into the cache on disk where the process that measures finds them.

A kernel is compiled once for all batch sizes: sizes that follow the batch are not specialised. The processes ask Triton's
own launcher for the instance (`warmup`), with a driver that only names the target, so that they need no GPU and hold no
context on it. They launch by the rig's own functions over tensors on "meta", so that the cache entry has the name that a
launch with real tensors looks for.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moelab.chips import get_target
from moelab.config import KernelConfig
from moelab.tuner.child import Channel, Child, load
from moelab.tuner.crew import Crew, Event
from moelab.tuner.evaluate import Contender, Stage
from moelab.tuner.problem import GEMMS, Gemm, Problem
from moelab.tuner.tuned_kernels import require_tunable, result_columns

if TYPE_CHECKING:
    from moelab.kernels.gemm_call import Launch as GemmLaunch

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

    entry: the name of the cache entry, of the first where a GEMM is several kernels; shared_bytes: shared memory of a block,
    of the one that takes most.
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


def launches_of(problem: Problem) -> dict[Gemm, GemmLaunch]:
    """How the problem's kernel launches either GEMM: the same for who measures and for who compiles.

    Of quantised weights, the compatible kernel is their format's.
    """
    tuning, format = require_tunable(problem), problem.shape.format
    if not format.is_plain:
        from moelab.kernels.quantised import GEMMS as OF_FORMATS

        launch: GemmLaunch = OF_FORMATS[format.family][1]
        return {"up": launch, "down": launch}
    return {"up": load(f"moelab.kernels.{tuning.up}"), "down": load(f"moelab.kernels.{tuning.down}")}


# --- in the compiling process -------------------------------------------------------------------------------------


class TritonCompiler:
    """Compiles the problem's kernels for the problem's target; only in a process of its own, whose driver it replaces."""

    def __init__(self, problem: Problem) -> None:
        from triton.runtime.driver import driver

        from moelab.kernels.aot import AheadDriver

        self.problem, self.kernel = problem, require_tunable(problem)
        self._launch = launches_of(problem)
        self._limit = get_target(problem.target).shared_memory_per_block
        driver.set_active(AheadDriver(problem.target))

    def __call__(self, kernel: Kernel) -> Compiled:
        """Compile one kernel, unless the cache holds it already."""
        begin = time.perf_counter()
        try:
            made = self.instances(kernel)
        except Exception as error:  # a compiler fails with anything: its own errors, ptxas's, assertions, RuntimeError
            return Compiled(time.perf_counter() - begin, "compile", first_words(error))
        seconds, shared = time.perf_counter() - begin, max(one.metadata.shared for one in made)
        if shared > self._limit:
            why = f"{shared} bytes of shared memory, {self.problem.target} gives a block {self._limit}"
            return Compiled(seconds, "resources", why, made[0].hash, shared)
        return Compiled(seconds, None, "", made[0].hash, shared)

    def instances(self, kernel: Kernel) -> list[Any]:
        """Triton's compiled kernels, as a launch over this problem's tensors would make them, in launch order."""
        import torch

        from moelab.dtypes import accumulator_dtype, torch_dtype
        from moelab.kernels.gemm_call import GemmCall
        from moelab.kernels.launch import compiling
        from moelab.quantised_weights import empty_activations, empty_weights
        from moelab.routing import Alignment, max_padded_pairs
        from moelab.tuner.tuned_kernels import activation_of

        gemm, config = kernel
        problem, shape = self.problem, self.problem.shape
        top_k, rows = shape.top_k, config.BLOCK_SIZE_M
        dtype = torch_dtype(shape.dtype)
        wide = accumulator_dtype(dtype)
        padded = max_padded_pairs(top_k, rows, shape.num_experts)

        def tensor(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(size, dtype=of, device="meta")

        ids, experts, used = (tensor(size, of=torch.int32) for size in (padded, padded // rows, 1))
        alignment = Alignment(ids, experts, used, rows, top_k, shape.num_experts)
        K, columns = problem.inner_size(gemm), problem.columns(gemm)
        inner = alignment.rows_in_use if self.kernel.sorted_rows else top_k
        factors = None if gemm == "up" else tensor(top_k, of=torch.float32)
        a, a_scale = empty_activations(shape.format, 1 if gemm == "up" else inner, K, dtype, "meta")
        out = tensor(inner if gemm == "up" else top_k, result_columns(problem, gemm))
        with compiling() as made:  # one token: what follows the batch size is not specialised
            w = empty_weights(shape.format, shape.num_experts, columns, K, dtype, "meta")
            slots, activated, workspace = top_k if gemm == "up" else 1, activation_of(problem, gemm), tensor(0, of=wide)
            call = GemmCall(a, w, alignment, config, top_k, slots, factors, *activated, workspace, a_scale)
            self._launch[gemm](call, out)
        return made


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

    def drop_waiting(self) -> None:
        """Nobody waits for what is queued any more: it is not compiled, unless it is asked for again."""
        self._asked.difference_update(self._queue)
        self._queue.clear()

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
