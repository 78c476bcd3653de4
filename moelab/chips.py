"""What a chip's architecture allows one program."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from moelab.errors import UnknownNameError, nearest_names


@dataclass(frozen=True)
class Target:
    """What a chip's architecture allows one program (thread block).

    name: "sm_90", "gfx942", ... as Triton names it; shared_memory_per_block: bytes;
    threads_per_warp: 32, or 64 on gfx; max_threads_per_block: threads;
    wide_dot_warps: values of num_warps with which `tl.dot` reads both operands from shared memory (wgmma on
    sm_90, tcgen05 on sm_100), which takes one pipeline buffer more than mma.sync; empty where there is no
    such dot;
    barrier_bytes: shared memory of such a dot's barriers.
    """

    name: str
    shared_memory_per_block: int
    threads_per_warp: int = 32
    max_threads_per_block: int = 1024
    wide_dot_warps: tuple[int, ...] = ()
    barrier_bytes: int = 0

    @property
    def is_amd(self) -> bool:
        """Whether this is a ROCm target, whose configs carry waves_per_eu, matrix_instr_nonkdim and kpack."""
        return self.name.startswith("gfx")

    @property
    def has_tma(self) -> bool:
        """Whether the chip has NVIDIA's tensor memory accelerator: sm_90 and later (PTX ISA, cp.async.bulk.tensor)."""
        generation = self.name.removeprefix("sm_").rstrip("af")
        return generation.isdecimal() and int(generation) >= 90

    @property
    def has_pdl(self) -> bool:
        """Whether a launch may begin while the one before it ends (programmatic dependent launch): sm_90 and later (PTX ISA,
        griddepcontrol)."""
        return self.has_tma


# Limits: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability" (opt-in maximum
# per block), and the LDS size of AMD's CDNA3 and CDNA4 instruction-set documents.
TARGETS: Mapping[str, Target] = {
    t.name: t
    for t in (
        Target("sm_80", 166912),
        Target("sm_86", 101376),
        Target("sm_89", 101376),
        Target("sm_90", 232448, wide_dot_warps=(4, 8, 16)),
        Target("sm_100", 232448, wide_dot_warps=(4, 8), barrier_bytes=16),
        Target("sm_120", 101376),
        Target("gfx942", 65536, threads_per_warp=64),
        Target("gfx950", 163840, threads_per_warp=64),
    )
}
"""Architectures by Triton's name."""


@functools.cache
def gpu_target(index: int) -> Target:
    """The chip of the GPU of that index in this process: from the table, or with the limits its driver reports."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    nvidia = f"sm_{properties.major}{properties.minor}"
    name = properties.gcnArchName.split(":")[0] if torch.version.hip else nvidia
    limit = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return TARGETS.get(name) or Target(name, limit, threads_per_warp=properties.warp_size)


def get_target(target: str | Target) -> Target:
    """The Target of that name ("sm_90", "gfx942"), or `target` itself. Raises UnknownNameError."""
    if isinstance(target, Target):
        return target
    if target not in TARGETS:
        raise UnknownNameError(
            f"Unknown target {target!r}.{nearest_names(str(target), TARGETS)} Expected one of {', '.join(TARGETS)}; "
            "or pass a Target with the limits of another chip."
        )
    return TARGETS[target]
