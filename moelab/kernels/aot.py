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
from typing import TYPE_CHECKING, Any

from moelab import runtime
from moelab.chips import TARGETS
from moelab.config import shared_memory_bytes, tma_shared_memory_bytes
from moelab.errors import RuntimeModeError, UnknownNameError
from moelab.kernels import cubin

if TYPE_CHECKING:
    from moelab.kernels.aot_cases import Case

CHECKED_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: bytes of shared memory a block, registers a thread, bytes spilled a thread.

    kernel: "module:function"; family, note: the case that launched it. predicted_shared_bytes is exact, and with tma the most
    it can be; None for a kernel whose shared memory config.py does not predict.
    """

    kernel: str
    family: str
    note: str
    target: str
    shared_bytes: int
    shared_limit: int
    predicted_shared_bytes: int | None
    registers: int
    spilled_bytes: int
    tma: bool = False


class AheadDriver:
    """Stands in for Triton's driver where there is no such device: everything that compiling for a target asks of it."""

    def __init__(self, target: str) -> None:
        self._target = _gpu_target(target)
        # Triton keeps what it compiled by the device's number, and would take one target's for another's.
        self._device = list(TARGETS).index(target)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_case(case: Case, target: str) -> list[Resources]:
    """Compile what one case launches on a target ("sm_90", "gfx942"), and read what each kernel takes.

    Replaces this process's driver of Triton. Raises RuntimeModeError in a process whose Triton interprets,
    UnknownNameError for another target; what the compiler raises passes through.
    """
    runtime.prepare_triton()
    import triton
    from triton.runtime.driver import driver

    if triton.knobs.runtime.interpret:
        raise RuntimeModeError(
            "Triton was imported for its interpreter in this process. Expected TRITON_INTERPRET=0. "
            "Run `python -m moelab.kernels.aot`, which starts its own."
        )
    from moelab.kernels.launch import compiling

    driver.set_active(AheadDriver(target))
    with compiling() as made:
        case.launch(TARGETS[target])
    return [_resources(case, target, compiled) for compiled in made]


def _resources(case: Case, target: str, compiled: Any) -> Resources:
    kernel = compiled.src.fn
    tma = any(str(kind).startswith("tensordesc") for kind in compiled.src.signature.values())
    predicted = None
    if case.config is not None and "BLOCK_SIZE_K" in kernel.arg_names:
        dots = 2 if kernel.__name__ == "_gated_gemm_kernel" else 1  # products in a step of its loop
        predicted = shared_memory_bytes(case.config, case.dtype, target, dots=dots)
        predicted = tma_shared_memory_bytes(case.config, case.dtype, target) if tma else predicted
    registers, spilled = _amd_usage(compiled.asm) if target.startswith("gfx") else cubin.usage(compiled.asm["cubin"])
    limit, shared = TARGETS[target].shared_memory_per_block, compiled.metadata.shared
    name = f"{kernel.__module__}:{kernel.__name__}"
    return Resources(name, case.family, case.note, target, shared, limit, predicted, registers, spilled, tma)


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


def plan(*, sample: bool = False) -> list[tuple[Case, str]]:
    """What is compiled: every case, for every checked target that it runs on.

    sample: of each family the cases and the targets in turn, until each of both has been: every kernel for every target, and
    every case for one.
    """
    from moelab.kernels.aot_cases import cases

    families: dict[str, list[Case]] = {}
    for case in cases():
        families.setdefault(case.family, []).append(case)
    found = []
    for family in families.values():
        fit = [name for name in CHECKED_TARGETS if TARGETS[name].has_tma or not family[0].needs_tma]
        if sample:
            turns = range(max(len(family), len(fit)))
            found += [(family[i % len(family)], fit[i % len(fit)]) for i in turns]
        else:
            found += [(case, target) for case in family for target in fit]
    return found


def table(targets: Iterable[str] = CHECKED_TARGETS, *, sample: bool = False) -> list[Resources]:
    """What every kernel of the plan takes, of those for these targets."""
    wanted = set(targets)
    return [row for case, target in plan(sample=sample) if target in wanted for row in compile_case(case, target)]


def main() -> None:
    """Print the table, as text or JSON (--json), or a sample of it (--sample)."""
    rows = table(sample="--sample" in sys.argv)
    if "--json" in sys.argv:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(f"{'kernel':<70} {'target':<7} {'shared':>7} {'limit':>7} {'regs':>5} {'spilled':>7}")
    for row in rows:
        label = f"{row.kernel.partition(':')[2].strip('_').removesuffix('_kernel')}, {row.family} {row.note}"
        print(
            f"{label:<70} {row.target:<7} {row.shared_bytes:>7} {row.shared_limit:>7} "
            f"{row.registers:>5} {row.spilled_bytes:>7}"
        )


if __name__ == "__main__":
    main()
