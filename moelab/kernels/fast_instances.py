"""The compiled forms of sm90_fast_layer.cu, and which of them serves a batch."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from moelab.kernels import wgmma
from moelab.kernels.residency import WAITS

SOURCE = Path(__file__).with_name("sm90_fast_layer.cu")
STORAGE = {torch.bfloat16: ("__nv_bfloat16", "bf16"), torch.float16: ("__half", "f16")}
"""Type of an element in C++ and in PTX."""

K_STEP = 64
"""Elements of K in a stage: 128 bytes, TMA's widest swizzle. Of codes twice as many."""

BLOCK = 128
"""Rows and columns of weights, and columns of activations, that share a scale in instances over codes."""

MOST_STEPS = 128
"""Steps of BLOCK elements of K that there is room for the scales of: 16,384 elements."""

STAGED_BYTES = 512
"""Of a warp's outputs, that it turns round in shared memory: 8 tokens of GEMM2, 16 of GEMM1."""

MOST_SHARED_BYTES = 228 * 1024
"""Of an SM, 1024 kept of them for each CTA (CUDA C++ Programming Guide, compute capability 9.0)."""

GEMM1, GEMM2, SUM = 1, 2, 4
"""Parts of the layer, for launches of less than the whole."""

SUM_THREADS = 256
"""Of a CTA of sm90_fast_sum.cu, each of which adds up eight columns."""

CONSTANTS = {
    "K_STEP": K_STEP, "BLOCK": BLOCK, "MOST_STEPS": MOST_STEPS, "STAGED_BYTES": STAGED_BYTES,
    "MOST_SHARED": MOST_SHARED_BYTES, "GEMM1": GEMM1, "GEMM2": GEMM2, "SUM": SUM,
    "SUM_THREADS": SUM_THREADS, **{name: kind for kind, (name, _) in WAITS.items()},
}  # fmt: skip
"""What the kernels and their launchers both go by, by its name in C++."""


def constants() -> str:
    """The lines of C++ that come before each kernel's source."""
    return "".join(f"constexpr int {name} = {value};\n" for name, value in CONSTANTS.items())


RECORDED = {"ctas_per_sm": "per_processor"}
"""Our name of a field -> its name in recordings."""


@dataclass(frozen=True)
class Instance:
    """One compiled form of the kernel.

    warpgroups: that multiply, each row_blocks times 64 weight rows. stages: buffers of 64 elements of K in the pipeline.
    tokens: most rows of a tile. grain: a tile of fewer rows is multiplied as tokens less a multiple of it. box: rows that
    one TMA load of tokens brings. ctas_per_sm: CTAs on an SM. cluster: CTAs, 1 or 2, that take tiles side by side,
    and share the weights where both are of one expert. permutes: 1 where rows of x are first written out in order of expert, to
    be loaded by TMA; 0 where three warps gather them for every tile of weight rows. apart: 1 where the sums over each token's
    slots are a launch of their own (sm90_fast_sum.cu). scaled: 1 or 2 where weights and activations are codes (e4m3) with a
    scale for every BLOCK of K, in stages of 128 elements: 1 with weights as wgmma's M (sm90_fast_scaled.cuh), 2 with tokens
    (sm90_fast_rows.cuh), 64 a warpgroup.
    """

    warpgroups: int
    row_blocks: int
    stages: int
    tokens: int
    grain: int
    box: int
    ctas_per_sm: int = 1
    cluster: int = 1
    permutes: int = 0
    apart: int = 0
    scaled: int = 0

    def __repr__(self) -> str:
        """As recordings name it: by `RECORDED` words, and without what older ones had not: a cluster of one CTA, rows that are
        gathered, sums in the same launch, 16-bit weights."""
        later = {"cluster": 1, "permutes": 0, "apart": 0, "scaled": 0}
        named = ((each.name, getattr(self, each.name)) for each in fields(self))
        said = (f"{RECORDED.get(name, name)}={value}" for name, value in named if later.get(name) != value)
        return f"Instance({', '.join(said)})"

    @classmethod
    def named(cls, name: str) -> Instance:
        """The instance that a recording names so, whether or not it is in use."""
        ours = {recorded: name for name, recorded in RECORDED.items()}
        return cls(**{ours.get(key, key): int(value) for key, value in re.findall(r"(\w+)=(\d+)", name)})

    @property
    def threads(self) -> int:
        """Of a CTA: the warpgroups that multiply, and one that copies."""
        return (self.warpgroups + 1) * 128

    @property
    def rows(self) -> int:
        """Weight rows of a tile."""
        return self.warpgroups * self.row_blocks * 64

    @property
    def shared_bytes(self) -> int:
        """Of a CTA: the pipeline, barriers of 8 bytes (two a stage, and four), twice the rows' slots and weights, and where
        outputs are staged 512 bytes a warp, or twice that where they fit; over codes also scales, and the largest outputs."""
        scaled = self.scaled > 0
        stage = (self.rows + self.tokens) * 128 + 16 + 4 * self.tokens * scaled
        rest = self.stages * stage + 32 + 16 * self.tokens + scaled * 16 * (MOST_STEPS + self.tokens)
        staged = self.warpgroups * 4 * STAGED_BYTES if self.stages_rows else 0
        buffers = 2 if rest + 32 + 2 * staged <= MOST_SHARED_BYTES // self.ctas_per_sm - 1024 else 1
        return rest + buffers * staged

    @property
    def step(self) -> int:
        """Elements of K in a stage: 128 bytes."""
        return K_STEP * 2 if self.scaled else K_STEP

    @property
    def stages_rows(self) -> bool:
        """Whether outputs are turned round in shared memory."""
        return self.scaled == 1 or (not self.scaled and self.tokens >= 96 and self.row_blocks == 2)

    @property
    def shape(self) -> str:
        """As sm90_fast_tiles.cuh spells it."""
        return f"Shape<{', '.join(str(getattr(self, each.name)) for each in fields(self))}>"

    def expression(self, dtype: torch.dtype) -> str:
        """The template instance to compile, as NVRTC names it."""
        return f"fast_layer<{self.shape}, {STORAGE[dtype][0]}>"

    def source(self, dtype: torch.dtype) -> str:
        """sm90_fast_layer.cu with the wgmma shapes that this instance asks for."""
        operands = (wgmma.CODES, wgmma.CODES) if self.scaled else STORAGE[dtype]
        shapes = wgmma.functions(range(self.tokens, 0, -self.grain), *operands)
        return f'#include "sm90.cuh"\n{constants()}{shapes}\n{SOURCE.read_text()}'


INSTANCES = {
    16: Instance(1, 2, 6, 16, 8, 8, ctas_per_sm=2),
    48: Instance(1, 2, 4, 48, 16, 16, ctas_per_sm=2),
    96: Instance(2, 2, 5, 96, 16, 16, cluster=2, apart=1),
    176: Instance(2, 2, 4, 176, 16, 16, apart=1),
}
"""Widest tile of tokens -> the instance for it. That of 16 serves none of the recorded cells, where a few tokens' form or tuned
configs do, but more tokens than a few where there is no tuned file; at most 3 rows an expert it takes 0.98 to 1.00 of the time of
tiles of 8 and of one CTA an SM (geometric means in data/recordings/fast_choice.json). Two CTAs an SM where weights are all
there is to move; 256 weight rows where tokens are read again and again, once for every tile of weight rows. The pipeline
takes what shared memory is left: 227 KiB a CTA, 228 for all, 1 kept of each. In clusters of two CTAs at 96, for a skewed
batch: an expert with twice its share is read once (data/recordings/fast_choice.json, 64 rows an expert: 1 to 11 % faster than
single CTAs if skewed, within 2 % if even)."""

PERMUTED = replace(INSTANCES[176], permutes=1)
"""Where tokens are first written out in order of expert: their second reading, and all that follow, are TMA's."""

CLUSTERED = replace(INSTANCES[176], cluster=2)
"""In clusters of two CTAs, where an expert's tokens are two tiles: they read its weights once."""

ALL = (*INSTANCES.values(), CLUSTERED, PERMUTED)

CODED = {
    16: Instance(2, 2, 3, 16, 16, 16, ctas_per_sm=2, apart=1, scaled=1),
    48: Instance(2, 2, 5, 48, 16, 16, apart=1, scaled=1),
    128: Instance(2, 2, 4, 128, 64, 64, apart=1, scaled=2),
}
"""Over codes: widest tile of tokens -> the instance for it. 256 weight rows, which hold a group of GEMM1's result; the registers
of a step's sums beside those of all steps leave 128 tokens."""

CODED_SHARED = replace(CODED[128], permutes=1, cluster=2)
"""Where the same tokens are read for many tiles of weight rows: written out once, for TMA, and weights read by pairs of CTAs."""

ALL_CODED = (*CODED.values(), CODED_SHARED)
