"""Kernels of many shapes compiled in parallel before anything is timed: Triton's in processes, NVRTC's in threads."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from moelab import runtime
from moelab.config import KernelConfig
from moelab.dtypes import torch_dtype
from moelab.kernels import few_tokens, nvrtc
from moelab.kernels.checks import current_target
from moelab.kernels.fast_instances import Instance
from moelab.kernels.few_tokens import FewTokens
from moelab.shapes import MoEShape
from moelab.tuner.compile import Compiled, CompilePool, TritonCompiler, first_words
from moelab.tuner.problem import Gemm, Problem

Job = tuple[MoEShape, str, FewTokens | tuple[Gemm, KernelConfig]]
"""A shape, the tuner's name of a kernel, and what of it: GEMM and config; or a form for a few tokens, whatever the name."""


class Compiler:
    """`TritonCompiler` for kernels of several shapes, and for the forms of a few tokens; in a process of its own."""

    def __init__(self, problem: Problem) -> None:
        self._like, self._of = problem, {(problem.shape, problem.kernel): TritonCompiler(problem)}

    def __call__(self, job: Job) -> Compiled:
        """Compile what one job names, unless the cache holds it already."""
        shape, kernel, what = job
        if (shape, kernel) not in self._of:
            self._of[shape, kernel] = TritonCompiler(replace(self._like, shape=shape, kernel=kernel))
        if not isinstance(what, FewTokens):
            return self._of[shape, kernel](what)
        try:
            return compile_few(shape, what)
        except Exception as error:  # a compiler fails with anything
            return Compiled(0.0, "compile", first_words(error))


def compile_few(shape: MoEShape, form: FewTokens) -> Compiled:
    """Compile both kernels of a form for a few tokens, as a launch over this shape would."""
    from moelab.kernels.launch import compiling

    begin, dtype = time.perf_counter(), torch_dtype(shape.dtype)
    x = torch.empty((1, shape.hidden_size), dtype=dtype, device="meta")
    w13, w2 = (torch.empty(size, dtype=dtype, device="meta") for size in (shape.w13_shape, shape.w2_shape))
    weights = torch.empty((1, shape.top_k), device="meta")
    ids = torch.empty((1, shape.top_k), dtype=torch.int32, device="meta")
    with compiling():
        few_tokens.few_tokens(x, w13, w2, weights, ids, form)
    return Compiled(time.perf_counter() - begin)


def compile_all(
    jobs: Sequence[Job],
    instances: Sequence[Instance] = (),
    dtype: torch.dtype = torch.bfloat16,
    until: float = math.inf,
) -> dict[Job, Compiled]:
    """Compile them, Triton's in processes and NVRTC's in threads, whose weights are of that dtype; what became of Triton's, of
    those done by `until` (perf_counter). The rest is compiled where it is first launched; without a GPU all of it."""

    def by_nvrtc(instance: Instance) -> None:
        nvrtc.compiled("sm_90a", instance.source(dtype), instance.expression(dtype))

    if not jobs or runtime.current().mode != "gpu":
        return {}

    target = current_target()
    problem = Problem(
        jobs[0][0],
        runtime.current().device_name,
        target.name if target else "sm_90",
        runtime.triton_version() or "unknown",
    )
    pool = CompilePool(problem, compiler="moelab.tuner.ahead:Compiler")
    with ThreadPoolExecutor(4) as threads:
        waiting: list[Future[None]] = [threads.submit(by_nvrtc, each) for each in instances]
        try:
            pool.ask(jobs)  # type: ignore[arg-type]
            while len(pool.known) < len(jobs) and time.perf_counter() < until:
                if not list(pool.poll()):
                    time.sleep(0.02)
        finally:
            pool.close()
        for each in waiting:
            each.result()
    return dict(pool.known)  # type: ignore[arg-type]
