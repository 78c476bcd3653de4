"""Compile every Triton kernel ahead of time, for chips that are not here, and say what it takes of them.

`python -m moelab.kernels.aot` prints the table (--json for machines). It needs no GPU, but a process of its own:
where Triton was imported for its interpreter there is no compiler left, so it sets TRITON_INTERPRET=0 first.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moelab import runtime
from moelab.chips import TARGETS
from moelab.config import shared_memory_bytes, tma_shared_memory_bytes
from moelab.errors import RuntimeModeError, UnknownNameError
from moelab.kernels import cubin
from moelab.kernels.aot_cases import Case, cases

CHECKED_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: bytes of shared memory a block, registers a thread, bytes spilled a thread.

    predicted_shared_bytes is exact, and with tma the most it can be.
    """

    label: str
    target: str
    shared_bytes: int
    shared_limit: int
    predicted_shared_bytes: int | None
    registers: int
    spilled_bytes: int
    tma: bool = False


def compile_case(case: Case, target: str) -> Resources:
    """Compile one case for one target ("sm_90", "gfx942") and read what it takes.

    Raises RuntimeModeError in a process whose Triton interprets, UnknownNameError for another target; what the
    compiler raises passes through.
    """
    runtime.prepare_triton()
    import triton
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeModeError(
            "Triton was imported for its interpreter in this process. Expected TRITON_INTERPRET=0. "
            "Run `python -m moelab.kernels.aot`, which starts its own."
        )
    kernel = _kernel(case.kernel)
    names = kernel.arg_names
    signature = {name: case.arguments.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    aligned = sorted(case.aligned & set(case.arguments))  # in one order: Triton's cache key spells them as they come
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=_gpu_target(target),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    registers, spilled = _amd_usage(compiled.asm) if target.startswith("gfx") else cubin.usage(compiled.asm["cubin"])
    predicted = None
    if case.config is not None:
        predicted = shared_memory_bytes(case.config, case.dtype, target, dots=case.dots)
        predicted = tma_shared_memory_bytes(case.config, case.dtype, target) if case.tma else predicted
    limit = TARGETS[target].shared_memory_per_block
    return Resources(case.label, target, compiled.metadata.shared, limit, predicted, registers, spilled, case.tma)


def _kernel(path: str) -> Any:
    import importlib

    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def _gpu_target(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if target not in TARGETS:
        raise UnknownNameError(f"Unknown target {target!r}. Expected one of {', '.join(TARGETS)}. Name one of them.")
    return GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)


def _amd_usage(asm: Mapping[str, Any]) -> tuple[int, int]:
    """(vector registers, bytes of the private segment) from the assembly's metadata."""
    text = asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    private = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    if registers is None or private is None:
        raise RuntimeModeError("The assembly names no register counts. Expected AMD's metadata. Update triton.")
    return int(registers[1]), int(private[1])


def table(targets: Iterable[str] = CHECKED_TARGETS) -> list[Resources]:
    """Every case on every target that it runs on."""
    return [compile_case(case, target) for case in cases() for target in targets if case.runs_on(target)]


def main() -> None:
    """Print the table, as text or JSON."""
    rows = table()
    if "--json" in sys.argv:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(f"{'kernel':<44} {'target':<7} {'shared':>7} {'limit':>7} {'regs':>5} {'spilled':>7}")
    for row in rows:
        print(
            f"{row.label:<44} {row.target:<7} {row.shared_bytes:>7} {row.shared_limit:>7} "
            f"{row.registers:>5} {row.spilled_bytes:>7}"
        )


if __name__ == "__main__":
    main()
