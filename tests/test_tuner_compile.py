"""Compiling ahead, in real processes with the real compiler: failures by class, and the cache entries that launches find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from moelab.config import KernelConfig
from moelab.shapes import MoEShape
from moelab.tuner.compile import Compiled, CompilePool, Kernel, first_words, kernels_of
from moelab.tuner.crew import wait_for
from moelab.tuner.problem import COMPATIBLE, GEMMS, Problem
from moelab.tuner.tuned_kernels import TUNED, implementation_of

SHAPE = MoEShape("small", num_experts=4, top_k=2, hidden_size=256, moe_intermediate_size=128)
PROBLEM = Problem(SHAPE, "NVIDIA H200", "sm_90", "3.6.0", (1, 3, 40))
GOOD = (KernelConfig(16, 32, 64, 1, 4, 3), KernelConfig(64, 64, 64, 16, 8, 2))
NO_PTXAS = KernelConfig(256, 256, 16, 1, 16, 1)  # 512 threads share a register file that its wgmma does not fit into
TOO_LARGE = KernelConfig(128, 256, 128, 1, 8, 4)


def both(kernel: str) -> list[Kernel]:
    """GOOD for both GEMMs, split in two where the kernel splits."""
    split = 2 if max(implementation_of(kernel).split_k) > 1 else 1
    return [(gemm, replace(config, SPLIT_K=split)) for config in GOOD for gemm in GEMMS]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def known(cache: Path) -> dict[Kernel, Compiled]:
    """What becomes of the classic kernel's configs, good and bad, by a pool of one process."""
    asked = [*both(COMPATIBLE), ("up", NO_PTXAS), ("down", TOO_LARGE)]
    pool = CompilePool(PROBLEM, processes=1, environment={"TRITON_CACHE_DIR": str(cache)})
    try:
        pool.ask(asked)
        while len(pool.known) < len(set(asked)):
            list(pool.poll())
            wait_for([pool.crew])
        list(pool.poll())
        assert not pool.crew.connections()  # the processes have gone
        return pool.known
    finally:
        pool.close()


def in_a_compiler(code: str, cache: Path, *kernels: str) -> list:
    """What a program prints, each line as JSON, in a process whose Triton compiles into that cache, and does not interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", code, *kernels], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


# What was compiled ahead for each kernel, and what lies in the cache then; and launches over real tensors, stopped after Triton
# has looked at every argument, and found its cache entry.
LAUNCHES = """
import json, os, sys
from dataclasses import asdict, replace
from test_tuner_compile import COMPATIBLE, PROBLEM, both
from moelab import runtime
runtime.prepare_triton()
from moelab.tuner.compile import TritonCompiler
made = {name: TritonCompiler(replace(PROBLEM, kernel=name)) for name in sys.argv[1:] if name != COMPATIBLE}
print(json.dumps({name: [asdict(compiler(kernel)) for kernel in both(name)] for name, compiler in made.items()}))
print(json.dumps(sorted(os.listdir(os.environ["TRITON_CACHE_DIR"]))))
import torch
from moelab.chips import TARGETS
from moelab.kernels import align, checks
from moelab.kernels.launch import Launcher
from moelab.routing import max_padded_pairs
from moelab.tuner import rig
from moelab.tuner.tuned_kernels import implementation_of

TritonCompiler(PROBLEM)
checks.current_target = lambda: TARGETS[PROBLEM.target]  # where it is measured; the compiling process sees no GPU
found = []
def launch(self, key, grid, tensors, values, instance, descriptors=()):
    constants, options = self._overlapped(*instance())
    if "gemm" in self.kernel.__name__ or "split_k" in self.kernel.__name__:
        assert all(t is None or t.device.type == "cpu" and t.data_ptr() % 16 == 0 for t in tensors)
        arguments = [*tensors, *values]
        for place, descriptor in descriptors:
            arguments[place] = descriptor
        found.append(self.kernel.run(*arguments, grid=grid, warmup=True, **constants, **options).hash)
Launcher.__call__ = launch
def unsorted(ids, block, experts):
    return align._allocate(max_padded_pairs(ids.numel(), block, experts), block, ids.numel(), experts, ids.device)
rig.align = unsorted
entries = {}
for name in sys.argv[1:]:
    made = rig.Rig(replace(PROBLEM, kernel=name, split_k=implementation_of(name).split_k))
    for i, (_, config) in enumerate(both(name)[::2]):
        for b in PROBLEM.batch_sizes:
            found.clear()
            made.launch("layer", b, (config, config)).run(b % made.cell(b).rotations)
            entries[f"{name} {i} {b}"] = list(found)
print(json.dumps(entries))
"""


@pytest.mark.parametrize(
    "kernels", [(COMPATIBLE, "split_k_workspace", "gated_tma"), pytest.param(tuple(TUNED), marks=pytest.mark.whole)]
)
def test_a_launch_finds_what_was_compiled_ahead(
    known: dict[Kernel, Compiled], cache: Path, kernels: tuple[str, ...]
) -> None:
    """The same cache entry, of every kernel, for both GEMMs, at every batch size: nothing is compiled where it is measured."""
    others, before, entries = in_a_compiler(LAUNCHES, cache, *kernels)
    made = {name: [Compiled(**one) for one in ones] for name, ones in others.items()}
    made[COMPATIBLE] = [known[kernel] for kernel in both(COMPATIBLE)]
    every = [one for ones in made.values() for one in ones]
    assert [one.message for one in every if one.failure] == []
    assert all(one.seconds > 0 and one.shared_bytes > 0 for one in every)
    assert len({one.entry for one in every}) == len(every) <= len(before)
    for name, i, b in product(kernels, range(len(GOOD)), PROBLEM.batch_sizes):
        found, up, down = entries[f"{name} {i} {b}"], *(one.entry for one in made[name][2 * i : 2 * i + 2])
        assert found[0] == up and down in found[1:], (name, i, b)
    assert sorted(os.listdir(cache)) == before


def test_what_does_not_compile_or_fit_is_told_apart(known: dict[Kernel, Compiled]) -> None:
    refused, large = known["up", NO_PTXAS], known["down", TOO_LARGE]
    assert (refused.failure, large.failure) == ("compile", "resources")
    assert "registers" in refused.message and len(refused.message) <= 300 and "232448" in large.message


def test_kernels_of_a_contender() -> None:
    assert kernels_of("layer", GOOD) == (("up", GOOD[0]), ("down", GOOD[1]))
    assert kernels_of("down", GOOD[:1]) == (("down", GOOD[0]),)


def test_a_compilers_novel_is_cut() -> None:
    text = first_words(RuntimeError("\n====\nerror: bad\n" + ".reg\n" * 100000))
    assert text.startswith("RuntimeError: error: bad") and len(text) == 300
