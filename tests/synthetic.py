"""A SYNTHETIC landscape for tests: made up from a plausible model, never a measurement, and never shown as one.

Roofline (bytes and FLOPs of the tiles), wave quantisation over SMs, a share of luck that belongs to each
config, and log-normal noise of about 2 %. Some configs fail on purpose. Its provenance says that it is synthetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moelab import roofline, runtime
from moelab.config import KernelConfig, shared_memory_bytes
from moelab.shapes import MoEShape, load_model
from moelab.tuner.evaluate import Outcome
from moelab.tuner.landscape import Landscape, Row
from moelab.tuner.problem import BATCH_SIZES, GEMMS, Problem, find_incumbents
from moelab.tuner.space import build_space, representatives

PROCESSORS, BYTES_PER_S, FLOPS_PER_S = 132, 4.0e12, 6.5e14
SMALL = MoEShape("synthetic-small", num_experts=8, top_k=2, hidden_size=1024, moe_intermediate_size=512)


AXES = {
    "num_stages": (2, 4),
    "BLOCK_SIZE_M": (16, 64, 128),
    "BLOCK_SIZE_K": (64, 128),
    "BLOCK_SIZE_N": (32, 64, 128),
    "num_warps": (4, 8),
    "GROUP_SIZE_M": (1, 16),
}


def small_problem(batch_sizes: Sequence[int] = (1, 16, 64, 256, 1024), **changes) -> Problem:
    """144 configs, with the loader's default to beat."""
    default = find_incumbents(SMALL, "Synthetic H200", "3.6.0", tuple(batch_sizes), config_dir="nowhere")
    given = {"axes": AXES, "incumbents": default, **changes}
    return Problem(SMALL, "Synthetic H200", "sm_90", "3.6.0", tuple(batch_sizes), **given)


def large_problem() -> Problem:
    """Qwen3-30B-A3B at the usual batch sizes and 8192."""
    shape = load_model("qwen3-30b-a3b")
    return Problem(shape, "Synthetic H200", "sm_90", "3.6.0", (*BATCH_SIZES, 8192))


def times_us(problem: Problem, gemm: str, num_tokens: int, configs: Sequence[KernelConfig], seed: int) -> np.ndarray:
    """The model's true time of each config."""
    K, columns = problem.inner_size(gemm), problem.columns(gemm)
    bm, bn, bk, group, warps, stages = (
        np.array([getattr(c, name) for c in configs], dtype=float)
        for name in ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
    )
    shared = np.array([shared_memory_bytes(c, problem.shape.dtype, problem.target) for c in configs])
    padded = {m: roofline.padding_waste(problem.shape, num_tokens, m).padded_rows for m in np.unique(bm).astype(int)}
    tiles = np.array([padded[int(m)] / m for m in bm]) * np.ceil(columns / bn)
    resident = np.clip(np.minimum(227 * 1024 // shared, 64 // warps), 1, 8)
    waves = np.ceil(tiles / (PROCESSORS * resident)) * resident
    share = np.minimum(1.0, tiles / PROCESSORS)
    efficiency = np.minimum(1.0, 0.35 + 0.1 * np.log2(bm * bn / 512)) * np.where(warps * 1024 > bm * bn, 0.8, 1.0)
    flops = 2 * bm * bn * K / (FLOPS_PER_S / PROCESSORS * efficiency)
    moved = (0.4 * bm / np.minimum(group, 16) ** 0.1 + bn) * K * 2 / (BYTES_PER_S / PROCESSORS)
    moved *= 1 + 0.6 / (stages * bk / 64 * share + 0.2)
    luck = np.random.default_rng([seed, len(gemm)]).normal(0, 0.02, (len(configs), 2)) @ [1, np.log2(num_tokens) / 12]
    found = (2.0 + 1e6 * waves * np.maximum(flops, moved)) * np.exp(luck)
    same, index = representatives(configs, problem, gemm, num_tokens), {c: i for i, c in enumerate(configs)}
    return found[[index[same[c]] for c in configs]]


def rows_of(problem: Problem, configs: dict, *, samples: int, seed: int, noise: float) -> list[Row]:
    rows, at = [], "2026-11-21T00:00:00.000+00:00"
    draws = np.random.default_rng([seed, 7])
    for side, gemm in enumerate(GEMMS):
        own = [pairs[b][side] for pairs in problem.incumbents.values() for b in sorted(pairs)]
        tried = tuple(dict.fromkeys([*configs[gemm], *own]))
        fails = {c: "compile" for i, c in enumerate(configs[gemm]) if i % 97 == 96}
        wrong = {c: "wrong" for i, c in enumerate(configs[gemm]) if i % 89 == 88}
        compiling = draws.uniform(0.25, 0.7, len(tried)).tolist()
        for c, seconds in zip(tried, compiling, strict=True):
            outcome = Outcome((), fails.get(c), "made to fail" if c in fails else "", compile_s=seconds)
            rows.append(Row(gemm, problem.batch_sizes[0], (c,), outcome, False, at))
        for b in problem.batch_sizes:
            true = times_us(problem, gemm, b, tried, seed)
            drawn = (true[:, None] * np.exp(draws.normal(0, noise, (len(tried), samples)))).tolist()
            for c, values in zip(tried, drawn, strict=True):
                if c in wrong and c not in own:
                    rows.append(Row(gemm, b, (c,), Outcome((), "wrong", "made to be wrong"), False, at))
                elif c not in fails:
                    rows.append(Row(gemm, b, (c,), Outcome(tuple(values), measure_s=0.0005 * samples), False, at))
    return rows


def synthetic_landscape(problem: Problem, *, samples: int = 10, seed: int = 0, noise: float = 0.02) -> Landscape:
    """Every config of the problem's pruned grid at every batch size."""
    space = build_space(problem)
    configs = space.configs
    provenance = runtime.provenance(seed) | {"gpu": "SYNTHETIC, no device", "date": "2026-11-21"}
    evaluator = {"kind": "synthetic", "measured": False, "protocol": "a model in tests/synthetic.py"}
    rows = rows_of(problem, configs, samples=samples, seed=seed, noise=noise)
    return Landscape(problem, provenance, evaluator, space.summary(), tuple(rows))
