"""Which configs are worth compiling: the peers' grid, less what exact rules exclude, each exclusion counted.

Two kinds of rule. A config that cannot run, or whose accumulators spill, is dropped for every batch size. Configs that
run the same program at one batch size are timed once there. Nothing is dropped because it seldom wins: BLOCK_SIZE_M = 64
wins at batch 1 often enough to be missed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from moelab.chips import get_target
from moelab.config import KernelConfig, prunings, violations
from moelab.errors import ConfigError
from moelab.tuner.problem import GEMMS, Gemm, Problem
from moelab.tuner.tuned_kernels import broken_rule

Grid = Mapping[str, tuple[int, ...]]

# Both grids: benchmark/kernels/fused_moe_triton/common_utils.py of sglang 0.5.23.
NVIDIA_GRID: Grid = {
    "num_stages": (2, 3, 4, 5),
    "BLOCK_SIZE_M": (16, 32, 64, 128, 256),
    "BLOCK_SIZE_K": (64, 128, 256),
    "BLOCK_SIZE_N": (32, 64, 128, 256),
    "num_warps": (4, 8),
    "GROUP_SIZE_M": (1, 16, 32, 64),
}
"""sglang's and vLLM's grid of 1920 configs on NVIDIA."""

ROCM_GRID: Grid = {
    "num_stages": (2,),
    "BLOCK_SIZE_M": (32, 64, 128, 256),
    "BLOCK_SIZE_K": (32, 64, 128, 256),
    "BLOCK_SIZE_N": (16, 32, 64, 128, 256),
    "num_warps": (1, 2, 4, 8),
    "GROUP_SIZE_M": (1, 4, 8, 16, 32),
    "waves_per_eu": (0,),
}
"""sglang's grid of 1600 configs on AMD."""

# What `config.violations` says -> the reason it is counted under.
_REASONS = (
    ("of shared memory", "shared memory"),
    ("empty slices", "empty SPLIT_K slices"),
    ("threads, over", "threads"),
    ("of 8-bit operands", "steps of 8-bit operands"),
)
ACCUMULATORS = "accumulators"


def grid(target: str, split_k: Sequence[int] = (1,), axes: Grid | None = None) -> tuple[KernelConfig, ...]:
    """Every config of the peers' grid for that architecture, times the values of SPLIT_K, in the peers' order.

    axes: another grid. Raises UnknownNameError for an unknown target, ConfigError for axes of no KernelConfig.
    """
    axes = axes or (ROCM_GRID if get_target(target).is_amd else NVIDIA_GRID)
    known = {f.name for f in fields(KernelConfig)} - {"SPLIT_K"}
    if set(axes) - known or not {"BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M"} <= set(axes):
        raise ConfigError(
            f"A grid cannot have the axes {', '.join(axes)}. Expected the four sizes and any of {', '.join(sorted(known))}. "
            "Correct the names; SPLIT_K is an axis of its own, split_k."
        )
    found = [
        KernelConfig(**dict(zip((*axes, "SPLIT_K"), values, strict=True)))
        for values in itertools.product(*axes.values(), split_k)
    ]
    return tuple(found)


@dataclass(frozen=True)
class Space:
    """The configs that a search may try.

    size: of the whole grid. configs: per GEMM, those no rule excludes. pruned: per GEMM, reason -> how many.
    examples: reason -> the sentence of one config it excluded.
    """

    size: int
    configs: Mapping[Gemm, tuple[KernelConfig, ...]]
    pruned: Mapping[Gemm, Mapping[str, int]]
    examples: Mapping[str, str]

    def summary(self) -> dict[str, Any]:
        """For a journal's header: counts before and after, by reason."""
        kept = {gemm: len(configs) for gemm, configs in self.configs.items()}
        return {"size": self.size, "kept": kept, "pruned": {g: dict(p) for g, p in self.pruned.items()}}


def build_space(problem: Problem) -> Space:
    """The grid of the problem's target, pruned for each GEMM by exact rules: every kernel's, and the problem's kernel's."""
    everything = grid(problem.target, problem.split_k, problem.axes)
    configs: dict[Gemm, tuple[KernelConfig, ...]] = {}
    pruned: dict[Gemm, Mapping[str, int]] = {}
    examples: dict[str, str] = {}
    for gemm in GEMMS:
        why = [_excluded(config, problem, gemm) for config in everything]
        configs[gemm] = tuple(c for c, w in zip(everything, why, strict=True) if w is None)
        pruned[gemm] = dict(Counter(w[0] for w in why if w is not None))
        for config, w in zip(everything, why, strict=True):
            if w is not None:
                examples.setdefault(w[0], f"{config.short()}: {w[1]}")
        if not configs[gemm]:
            reasons = "; ".join(
                f"{count} by {reason}, such as {examples[reason]}" for reason, count in pruned[gemm].items()
            )
            raise ConfigError(
                f"None of the {len(everything)} configs of the grid can run the GEMM {gemm!r} of {problem.shape.name} in the "
                f"format {problem.shape.format.name}: {reasons}. Expected one that can. Tune with other axes."
            )
    return Space(len(everything), configs, pruned, examples)


def _excluded(config: KernelConfig, problem: Problem, gemm: Gemm) -> tuple[str, str] | None:
    """(reason, sentence) for a config that is not worth compiling at any batch size."""
    format = problem.shape.format
    broken = violations(
        config, dtype=format.product_dtype(problem.shape.dtype), target=problem.target, K=problem.inner_size(gemm),
        weight_bits=format.widened_bits,
    )  # fmt: skip
    for sentence in broken:
        reason = next((name for words, name in _REASONS if words in sentence), "other rules")
        return reason, sentence
    if own := broken_rule(config, gemm, problem):
        return own
    spills = prunings(config, target=problem.target)
    return (ACCUMULATORS, spills[0]) if spills else None


def row_blocks(problem: Problem, num_tokens: int, block_size_m: int) -> int:
    """Row blocks in the grid that a launch covers at that batch size: what the tile order is computed from.

    The launch bound, not the blocks in use: min(padded pairs, pairs * BLOCK_SIZE_M) / BLOCK_SIZE_M, for moelab's
    launcher (kernels.checks.rows_in_use) and sglang's alike.
    """
    from moelab.routing import max_padded_pairs

    pairs = num_tokens * problem.shape.top_k
    rows = min(max_padded_pairs(pairs, block_size_m, problem.shape.num_experts), pairs * block_size_m)
    return -(-rows // block_size_m)


def effective_group(config: KernelConfig, num_row_blocks: int, num_column_blocks: int) -> int:
    """The GROUP_SIZE_M that decides the order of tiles: configs that agree in it, and in the rest, run the same program.

    With G >= row blocks there is one group, whose order does not depend on G; with one column of blocks every order is
    the same. Any two others differ: program min(G, G') is in the first column under one and in the second under the
    other (kernels/tiles.py, grouped_tile).
    """
    return 1 if num_column_blocks == 1 else min(config.GROUP_SIZE_M, num_row_blocks)


_rest = attrgetter(*(field.name for field in fields(KernelConfig) if field.name != "GROUP_SIZE_M"))


def representatives(
    configs: Sequence[KernelConfig], problem: Problem, gemm: Gemm, num_tokens: int
) -> dict[KernelConfig, KernelConfig]:
    """config -> the first config in order that runs the same program at that batch size (itself, if none does)."""
    columns = problem.columns(gemm)
    blocks = {m: row_blocks(problem, num_tokens, m) for m in {c.BLOCK_SIZE_M for c in configs}}
    first: dict[tuple[Any, ...], KernelConfig] = {}
    found = {}
    for config in configs:
        group = effective_group(config, blocks[config.BLOCK_SIZE_M], -(-columns // config.BLOCK_SIZE_N))
        found[config] = first.setdefault((group, _rest(config)), config)
    return found
