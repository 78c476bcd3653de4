"""The Split-K map: where splitting the inner dimension beats a kernel that needs no reduction, and by which kind.

Each GEMM of a layer alone, as stages.py has them, zeroing and second kernels inside what is timed. In every cell
(shape, stage, batch size) each variant and SPLIT_K gets its own best tile from a short screening pass; those winners
are checked, run 20 times over, and timed again, interleaved. A narrower BLOCK_SIZE_N is among the tiles: it fills the
chip without a reduction, and is the rival that Split-K has to beat.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from moelab import config as config_room
from moelab import precision, runtime
from moelab.config import KernelConfig
from moelab.errors import RecordingError, UnknownNameError, nearest_names
from moelab.measure import Measurement, Protocol, measure
from moelab.recordings import Recording
from moelab.shapes import MoEShape, load_model
from moelab.suites.layer_classic import sample_rows
from moelab.suites.partial import OnRows, ignore
from moelab.suites.stages import VARIANTS, Contender, Stage, reference, rows_of, weight_sets

Key = tuple[str, int]  # variant and SPLIT_K

# Model and its finest sharding here: at most 16 ranks (two nodes of eight), and at least 64 of the intermediate size.
FINEST = {"qwen3-30b-a3b": 8, "llama-4-scout": 16, "lfm2-8b-a1b": 16, "deepseek-v3": 16}
# Hidden sizes of the table in sglang #9486. It names no other size: experts, top_k and intermediate size are assumed
# to be those of Mixtral 8x7B, which its benchmark script takes by default, on 8 ranks.
UPSTREAM_HIDDEN = (4096, 8192)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
UPSTREAM_BATCHES = (128, 256, 512, 1024, 2048, 4096, 8192)
SHAPES: dict[str, tuple[int, ...]] = {
    **{f"{model}/tp{tp}": BATCHES for model, finest in FINEST.items() for tp in (1, finest)},
    **{f"upstream/hidden{hidden}": UPSTREAM_BATCHES for hidden in UPSTREAM_HIDDEN},
}
"""Name of each shape -> its batch sizes."""

STAGES = ("up", "down")
SPLITS = (1, 2, 4, 8, 16)
_RUNS = 20


def shape_of(name: str) -> MoEShape:
    """The sharded shape behind a name of SHAPES. Raises UnknownNameError."""
    if name not in SHAPES:
        raise UnknownNameError(
            f"Unknown shape {name!r}. Expected one of {list(SHAPES)}.{nearest_names(name, SHAPES)} Name one of them."
        )
    model, _, size = name.partition("/")
    if model == "upstream":
        hidden = int(size.removeprefix("hidden"))
        return MoEShape.from_sizes(
            num_experts=8, top_k=2, hidden_size=hidden, moe_intermediate_size=14336, tp_size=8, name=name
        )
    return load_model(model, tp_size=int(size.removeprefix("tp")), disable_shared_experts_fusion=True)


def candidates(rows_per_expert: float, K: int, split_k: int) -> list[KernelConfig]:
    """The tiles that a variant may choose from: few, and narrow ones among them; empty where slices would be."""
    if rows_per_expert <= 16:
        block_k = 128 if K >= 2048 else 64
        tiles = [KernelConfig(16, n, block_k, 1, 4, stages) for n in (32, 64, 128) for stages in (3, 5)]
    elif rows_per_expert <= 256:
        tiles = [KernelConfig(64, n, 64, 8, 4, 4) for n in (64, 128)]
    else:
        tiles = [KernelConfig(128, 64, 64, 16, 4, 4), KernelConfig(128, 128, 64, 16, 8, 3)]
    return [c for c in (replace(t, SPLIT_K=split_k) for t in tiles) if not config_room.violations(c, K=K)]


def errors(stage: Stage, contenders: dict[Key, Contender]) -> dict[Key, dict[str, Any]]:
    """Error of each contender against float64 on tokens from head, middle and tail; PrecisionError over twice torch's.

    `atomic_out` rounds every partial sum, so it may exceed that bound: `within_bound` says so, and what it costs is
    part of the map.
    """
    # About 16 pairs: each may name an expert of its own, whose weights are copied in float64.
    tokens = sample_rows(stage.num_tokens, each=max(1, 16 // (3 * stage.shape.top_k))).to(stage.weights[0].w.device)
    plain, exact = (reference(stage, tokens, dtype) for dtype in (stage.dtype, torch.float64))
    found = {}
    for (variant, split_k), run in contenders.items():
        out = rows_of(stage, run(0), tokens)
        name = f"{variant}, SPLIT_K = {split_k}, {stage.name} of {stage.shape.name}, {stage.num_tokens} tokens"
        if variant != "atomic_out":
            precision.check(out, plain, exact, name=name)
        report = precision.error(out, exact)
        bound = precision.tolerance(plain, exact)
        found[variant, split_k] = {
            "max_abs_error": report.max_abs, "rel_error": report.rel_fro, "bound": bound,
            "within_bound": report.max_abs <= bound,
        }  # fmt: skip
    return found


def spread(run: Contender, runs: int = _RUNS) -> dict[str, Any]:
    """How many of `runs` outputs differ in their bits, and by how much at most.

    Outputs are told apart by a sum of their bits times random odd 64-bit factors, modulo 2^64: one number a run.
    """
    low = high = run(0)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[low.element_size()]
    generator = torch.Generator(device=low.device).manual_seed(0)
    limit = 2**62
    factors = torch.randint(-limit, limit, low.shape, generator=generator, device=low.device) * 2 + 1
    prints = [(low.view(bits) * factors).sum()]
    for _ in range(runs - 1):
        out = run(0)
        prints.append((out.view(bits) * factors).sum())
        low, high = torch.minimum(low, out), torch.maximum(high, out)
    largest = (high.double() - low.double()).max().item()
    return {"runs": runs, "distinct": len(set(torch.stack(prints).tolist())), "spread_abs": largest}


def compile_all(contenders: Iterable[Contender]) -> None:
    """Call each once. On a GPU in threads: most of a compile is spent outside Python's lock."""
    if runtime.current().mode != "gpu":  # the interpreter patches triton.language while it runs a kernel
        for run in contenders:
            run(0)
        return
    with ThreadPoolExecutor(8, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),)) as pool:
        for done in [pool.submit(run, 0) for run in contenders]:
            done.result()
    torch.cuda.synchronize()


def keys_of() -> list[Key]:
    """Every variant and SPLIT_K of a cell."""
    return [(variant, split_k) for variant in VARIANTS for split_k in (SPLITS[:1] if variant == "classic" else SPLITS)]


def best_tiles(stage: Stage) -> dict[Key, tuple[KernelConfig, Measurement]]:
    """The fastest tile of each key that has any, and its screening: three replays, the lowest median stays.

    atomic_out takes the tiles of atomic_f32, the same kernel but for the width of its additions.
    """
    tiles: dict[str, tuple[Key, KernelConfig]] = {}
    for key in keys_of():
        if key[0] != "atomic_out":
            found = candidates(stage.pairs / stage.shape.num_experts, stage.K, key[1])
            tiles |= {f"{key[0]} {tile.short()}": (key, tile) for tile in found}
    contenders = {label: stage.contender(key[0], tile) for label, (key, tile) in tiles.items()}
    compile_all(contenders.values())
    quick = measure(contenders, Protocol(rotations=stage.rotations, rounds=3, graph_us=1.0))
    best: dict[Key, tuple[KernelConfig, Measurement]] = {}
    for label in sorted(quick, key=lambda label: quick[label].median_us):
        key, tile = tiles[label]
        best.setdefault(key, (tile, quick[label]))
    return best | {("atomic_out", s): found for (variant, s), found in best.items() if variant == "atomic_f32"}


def cell(name: str, stage: Stage) -> list[dict[str, Any]]:
    """A row for every variant and SPLIT_K of one stage, with the tile it chose, or with why it was skipped."""
    best = best_tiles(stage)
    finalists = {key: stage.contender(key[0], best[key][0]) for key in keys_of() if key in best}
    compile_all(finalists.values())
    judged = errors(stage, finalists)
    spreads = {key: spread(run) for key, run in finalists.items()}
    timed = measure({f"{v} {s}": run for (v, s), run in finalists.items()}, protocol_for(stage))
    rows: list[dict[str, Any]] = []
    for key in keys_of():
        row = {"shape": name, "stage": stage.name, "num_tokens": stage.num_tokens, "variant": key[0], "split_k": key[1]}
        if key not in best:
            rows.append({**row, "skipped": f"SPLIT_K = {key[1]} leaves empty slices of K = {stage.K}"})
            continue
        tile, quick = best[key]
        rows.append({
            **row, "config": tile.to_json(), "num_experts": stage.shape.num_experts, "top_k": stage.shape.top_k,
            "N": stage.N, "K": stage.K, "weight_bytes": stage.weight_bytes,
            "flops": 2 * stage.pairs * stage.N * stage.K, "rotations": stage.rotations,
            "weight_sets": len(stage.weights), "screened_us": round(quick.median_us, 4), **judged[key], **spreads[key],
            "samples_us": [round(sample, 4) for sample in timed[f"{key[0]} {key[1]}"].samples_us],
        })  # fmt: skip
    return rows


def protocol_for(stage: Stage) -> Protocol:
    """The finalists': 15 rounds, graphs of at least 300 us over the stage's rotations."""
    return Protocol(rotations=stage.rotations, rounds=15, graph_us=300.0)


def record(
    shapes: Sequence[str] = tuple(SHAPES), batches: Sequence[int] | None = None, on_rows: OnRows = ignore
) -> Recording:
    """The map, or the part of it that `shapes` and `batches` name: parts are put together by `merge`.

    batches: None takes each shape's own. Parts of a few minutes each on an H200: the shapes at tp1, the finest
    shardings, and upstream's. Raises UnknownNameError, RuntimeModeError without a GPU, PrecisionError.
    """
    sizes = {name: shape_of(name) for name in shapes}
    runtime.require_cuda("the suite 'split_k'")
    rows: list[dict[str, Any]] = []
    for name, shape in sizes.items():
        for stage_name in STAGES:
            weights = weight_sets(stage_name, shape)
            for num_tokens in batches if batches is not None else SHAPES[name]:
                rows += cell(name, Stage(stage_name, shape, num_tokens, weights))
                on_rows(rows)
            del weights
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # the next shape's weights may be most of the memory
    protocol = {
        **Protocol(rounds=15, graph_us=300.0).describe(), "rotations": "in each row",
        "up": "GEMM1 and activation, to (pairs, N) in bf16", "down": "GEMM2 and sum over slots, to (num_tokens, H)",
        "screening": "3 replays a tile, the fastest median stays", "alignment": "made beforehand, as in layer_classic",
        "upstream shapes": "experts 8, top_k 2, intermediate 14336 / 8: assumed, sglang #9486 names hidden only",
    }  # fmt: skip
    return Recording("split_k", runtime.provenance(seed=0), protocol, tuple(rows))


def merge(parts: Sequence[Recording]) -> Recording:
    """One recording of parts made on one device and software; a cell in two parts is taken from the later one.

    Raises RecordingError where the parts' origins differ.
    """
    first = parts[0]
    for part in parts[1:]:
        differing = [
            key for key, value in first.provenance.items() if key != "date" and part.provenance.get(key) != value
        ]
        if differing or part.suite != first.suite:
            raise RecordingError(
                f"Parts differ in {', '.join(differing) or 'their suite'}. Expected parts of one suite, device and "
                "software. Record them again together."
            )
    keys = ("shape", "stage", "num_tokens", "variant", "split_k")
    rows = {tuple(row[key] for key in keys): row for part in parts for row in part.rows}
    return Recording(first.suite, parts[-1].provenance, first.protocol, tuple(rows.values()))
