"""What a form of the fastest layer takes for a batch, predicted: a small model, whose coefficients data/fast_times.json holds.

A launch costs something; then it takes as long as memory has to move, or as its tiles need, whichever is more: as many waves of
CTAs over the SMs as there are tiles, a tile as long as its steps of K, each of which waits for a load, streams its operands or
multiplies them. Rows of an expert are as `moelab.pipelines.spread` expects them. `moelab.studies.fast_fit` fits the
coefficients on recordings; there is none in code. Times are in microseconds, sizes of memory in MB.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moelab import runtime
from moelab.config import KernelConfig
from moelab.errors import ConfigError
from moelab.kernels.fast_instances import Instance
from moelab.kernels.few_tokens import FewTokens
from moelab.pipelines.spread import Batch, Floats, Spread
from moelab.reading import MIB, UnreadableError, read_json

ONE_LAUNCH, FEW_TOKENS, GATED, CLASSIC = KINDS = ("one_launch", "few_tokens", "gated_tma", "triton")
"""Of forms: one persistent launch; two launches for a few tokens; the two Triton layers, by their implementations' names."""

FILE = "fast_times.json"
ELEMENT = 2e-6
"""MB of an element of bfloat16 or float16, which all forms take."""

MOVED = ("weights", "states", "again", "gathered")
"""What memory moves, the L2 among it: experts' weights once; rows of both GEMMs; weights that another tile of the same expert has
read; rows that tiles of other columns have read."""

FAR = 30.0
"""MB of an expert's weights in one GEMM of which a Triton layer finds half in the L2 when another tile of the same expert reads
them again: half an H200's L2. How much that costs is fitted."""

Columns = Mapping[str, Any]
"""Name of a feature -> its value, or an array of it, one for each form and batch."""


@dataclass(frozen=True)
class Chip:
    """What the prediction knows of a GPU: its SMs; and what a byte of memory and a step of a tile take there, over what they take
    on the GPU of the recordings."""

    sms: int
    memory: float = 1.0
    compute: float = 1.0


class Tile(NamedTuple):
    """A Triton kernel's tile; GROUP_SIZE_M is none of it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @classmethod
    def of(cls, config: KernelConfig) -> Tile:
        """That of a config."""
        sizes = config.BLOCK_SIZE_M, config.BLOCK_SIZE_N, config.BLOCK_SIZE_K
        return cls(*sizes, config.num_warps, config.num_stages)

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k} w{self.warps} s{self.stages}"

    @property
    def ctas_per_sm(self) -> float:
        """By shared memory, threads and registers of an SM of compute capability 9.0 (CUDA C++ Programming Guide)."""
        stages = self.stages if self.m >= 64 else max(self.stages - 1, 1)  # wgmma reads both operands in place
        shared, threads = 2 * (self.m + self.n) * self.k * stages + 1024, 32 * self.warps
        registers = min(self.m * self.n / threads + 48 + 16 * (self.m + self.n) / threads, 255)
        return float(max(min(228 * 1024 // shared, 2048 // threads, 65536 // (registers * threads), 16), 1))


# --- what it is predicted from ------------------------------------------------------------------------------------------


def one_launch_features(form: Instance, batch: Batch, spread: Spread, chip: Chip) -> dict[str, float]:
    """Of a one-launch layer: tiles and waves of both GEMMs, what memory moves, and what is done besides."""
    size, hidden, tokens = batch.moe_intermediate_size, batch.hidden_size, batch.num_tokens
    tiles_of = np.ceil(spread.rows / form.tokens)
    grain = min(8 if form.tokens % 16 else 16, form.grain)
    each = np.ceil(spread.rows / tiles_of / grain) * grain
    multiplied = np.ceil(each / form.grain) * form.grain
    tiles = float(tiles_of @ spread.experts)
    shared = float((tiles_of // 2 * 2) @ spread.experts) / tiles if form.cluster > 1 else 0.0
    across1, across2 = -(-2 * size // form.rows), -(-hidden // form.rows)
    at_once = chip.sms * form.ctas_per_sm
    first, second = ((tiles + 0.5 * (form.cluster > 1)) * across / at_once for across in (across1, across2))
    waves1, waves = max(np.ceil(first - 1e-6), 1.0), max(np.ceil(first + second - 1e-6), 1.0)
    pairs, several = spread.pairs, batch.top_k > 1
    weights = 3 * size * hidden * ELEMENT * chip.memory
    rows = pairs * (2 * size + 2 * hidden * several) + 2 * tokens * hidden
    return {
        "first": first, "second": second, "waves1": waves1, "waves2": max(waves - waves1, min(second, 1.0)),
        "steps1": -(-hidden // 64), "steps2": -(-size // 64), "rows": form.rows, "ctas": form.ctas_per_sm,
        "tokens": float((spread.experts * tiles_of) @ multiplied) / tiles, "stages": form.stages, "shared": shared,
        "weights": spread.touched * weights, "again": (tiles * (1 - shared / 2) - spread.touched) * weights,
        "states": rows * ELEMENT * chip.memory,
        "gathered": pairs * (hidden * across1 + size * across2) * ELEMENT * chip.memory,
        "permuted": pairs * 2 * hidden * ELEMENT * chip.memory * form.permutes, "gathers": 1 - form.permutes,
        "cluster": float(form.cluster > 1), "apart": float(form.apart and several), "compute": chip.compute,
    }  # fmt: skip


def few_features(form: FewTokens, batch: Batch, spread: Spread, chip: Chip) -> dict[str, float]:
    """Of a form for a few tokens: what memory moves, what is read again, and multiplied, and pairs that are skipped."""
    size, hidden, tokens, top_k = batch.moe_intermediate_size, batch.hidden_size, batch.num_tokens, batch.top_k
    weights = 3 * size * hidden * ELEMENT * chip.memory
    return {
        "weights": spread.touched * weights, "again": max(spread.pairs - spread.touched, 0.0) * weights,
        "issued": (2 * spread.pairs + tokens * top_k) * size * hidden * 1e-6 / chip.sms * chip.compute,
        "skipped": max(tokens * top_k - spread.pairs, 0.0) * size / chip.sms * chip.compute,
    }  # fmt: skip


def gemm_features(tile: Tile, columns: int, K: int, spread: Spread, chip: Chip) -> dict[str, float]:
    """Of a grouped product (rows, K) by (columns, K) under a tile: its waves, and what memory moves."""
    blocks, across = spread.blocks(tile.m), -(-columns // tile.n)
    ctas, weights = tile.ctas_per_sm, columns * K * ELEMENT * chip.memory
    return {
        "m": tile.m, "n": tile.n, "k": tile.k, "stages": tile.stages, "ctas": ctas, "steps": -(-K // tile.k),
        "ctas_there": min(max(blocks * across / chip.sms, 1.0), ctas), "waves": blocks * across / chip.sms / ctas,
        "weights": spread.touched * weights, "again": (blocks - spread.touched) * weights,
        "far": (blocks - spread.touched) * weights * weights / (weights + FAR * chip.memory),
        "states": spread.pairs * (K + columns) * ELEMENT * chip.memory,
        "gathered": spread.pairs * K * across * ELEMENT * chip.memory, "compute": chip.compute,
    }  # fmt: skip


def layer_features(batch: Batch, spread: Spread, chip: Chip) -> dict[str, float]:
    """Of a Triton layer besides its two products: the sum over slots, and the activation where it has a launch of its own."""
    summed = batch.num_tokens * (batch.top_k + 1) * batch.hidden_size
    return {
        "summed": summed * ELEMENT * chip.memory,
        "activated": spread.pairs * 3 * batch.moe_intermediate_size * ELEMENT * chip.memory,
    }


def before_features(batch: Batch) -> Floats:
    """Of order and alignment, which come before: launches, experts, pairs of this rank and of all, more launches for many."""
    pairs, here = batch.num_tokens * batch.top_k, batch.rows * batch.num_experts
    return np.array([1.0, batch.num_experts / 100, here / 1e4, pairs / 1e4, np.sqrt(here) / 100, float(pairs > 2048)])


# --- the model ----------------------------------------------------------------------------------------------------------


def _either(p: Any, *parts: Any) -> Any:
    """The largest of them, and more where several are nearly as large: (sum of x ** p) ** (1 / p)."""
    most = functools.reduce(np.maximum, parts)
    return most * sum((part / most) ** p for part in parts) ** (1 / p)


def one_launch_us(c: Mapping[str, Any], x: Columns, compute: Any) -> Any:
    """compute: a form's own factor of multiplying, as a logarithm."""
    wide = x["ctas"] * x["rows"] * x["tokens"] / 6144

    def step(gathers: Any) -> Any:
        loads = (c["weight_step"] * x["rows"] / 128 * (1 - x["shared"] / 2) + (c["token_step"] + gathers * c["gather_step"])
                 * x["tokens"] / 64) * x["ctas"]  # fmt: skip
        return _either(
            1 + c["step_power"], c["latency"] / (x["stages"] - 1), loads, c["multiply"] * wide * np.exp(compute)
        )

    base = c["tile"] + c["in_step"] * x["cluster"]
    first = base + c["store"] * wide / 2 + x["steps1"] * step(x["gathers"])
    second = base + c["store"] * wide + x["steps2"] * step(0.0)
    last = c["last_wave"] / (1 + c["last_wave"])
    tiles = (x["first"] + last * (x["waves1"] - x["first"])) * first
    tiles = tiles + (x["second"] + last * (x["waves2"] - x["second"])) * second
    moved = sum(c[name] * x[name] for name in MOVED)
    moved = moved + c["permuted"] * x["permuted"]
    besides = c["launch"] + c["sum_launch"] * x["apart"]
    return besides + _either(1 + c["power"], tiles * x["compute"], moved)


def few_us(c: Mapping[str, Any], x: Columns, local: Any) -> Any:
    """local: what recorded layers of nearly these sizes take more than this says, as a logarithm."""
    moved = c["weights"] * x["weights"] + c["again"] * x["again"]
    issued = c["issue"] * x["issued"] + c["skip"] * x["skipped"]
    return (c["launches"] + _either(1 + c["power"], moved, issued)) * np.exp(local)


def gemm_us(c: Mapping[str, Any], x: Columns, compute: Any, memory: Any) -> Any:
    """compute, memory: a tile's own factors of both, as logarithms."""
    alone = x["waves"] < 1
    last = c["last_wave"] / (1 + c["last_wave"])
    waves = np.where(alone, 1.0, x["waves"] + last * (np.maximum(np.ceil(x["waves"] - 1e-9), 1) - x["waves"]))
    ctas = np.where(alone, x["ctas_there"], x["ctas"])
    multiply = np.where(np.asarray(x["m"]) >= 64, c["wgmma"], c["mma"]) * x["m"] * x["n"] * x["k"] / 1048576
    step = _either(
        1 + c["step_power"], c["latency"] / np.maximum(np.asarray(x["stages"]) - 1, 1),
        c["load_step"] * (x["m"] + x["n"]) * x["k"] / 16384 * ctas, multiply * ctas,
    )  # fmt: skip
    tile = c["tile"] + c["store"] * x["m"] * x["n"] / 16384 * ctas + x["steps"] * step
    moved = sum(c[name] * x[name] for name in (*MOVED, "far"))
    return c["launch"] + _either(1 + c["power"], waves * tile * np.exp(compute) * x["compute"], moved * np.exp(memory))


def layer_us(c: Mapping[str, Any], x: Columns) -> Any:
    """Of a Triton layer besides its products; `between` is 0 where GEMM1 activates."""
    return c["summed"] * x["summed"] + c.get("between", 0.0) * x["activated"]


# --- its coefficients -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coefficients:
    """As the file holds them. shared: kind -> coefficient -> value; of Triton layers "tuned" is what tuned configs take over the
    best that is predicted. own: kind -> a form's or tile's name -> its own, as logarithms: of an instance its factor of
    multiplying; of a tile those of multiplying, of memory, and of memory in GEMM2; of a form for a few tokens its mean, then
    one for each of `anchors`. anchors: logarithms of sizes of recorded batches; widths: how far they reach.
    before: "order" and "align" -> coefficients of `before_features`. chip: of the recordings. sources: those."""

    shared: Mapping[str, Mapping[str, float]]
    own: Mapping[str, Mapping[str, Sequence[float]]]
    anchors: Sequence[Sequence[float]]
    widths: Sequence[float]
    before: Mapping[str, Sequence[float]]
    chip: Mapping[str, Any]
    sources: Sequence[str]

    def own_of(self, kind: str, name: str, count: int) -> Sequence[float]:
        """Those of a form or tile; zeros for one that no recording has."""
        return self.own[kind].get(name) or [0.0] * count


def place_of(batch: Batch) -> list[float]:
    """Where a batch lies among the anchors: logarithms of hidden_size, of the inner size, of top_k, of ranks of experts, and of
    tokens."""
    ranks = max(batch.top_k / batch.share / batch.num_experts, 1.0)
    sizes = batch.hidden_size, batch.moe_intermediate_size, batch.top_k, ranks, batch.num_tokens
    return [float(np.log(value)) for value in sizes]


def nearness(places: Floats, anchors: Floats, widths: Floats) -> Floats:
    """(places, anchors): 1 at an anchor, less the further off."""
    return np.exp(-0.5 * (((places[:, None] - anchors[None]) / widths) ** 2).sum(-1))


@functools.cache
def coefficients(folder: str) -> Coefficients:
    """Those of a data folder, read once. Raises ConfigError for a file that is missing or is no such file."""
    from moelab.schemas import FAST_TIMES, first_problem

    path = f"{folder}/{FILE}"
    remedy = "Restore it from git, or fit it again: python -m moelab.studies.fast_fit."
    try:
        content = read_json(path, MIB)
    except (OSError, UnreadableError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"Cannot read {path}: {why}. Expected what predicts the times of forms. {remedy}") from None
    if problem := first_problem(FAST_TIMES, content):
        raise ConfigError(f"{path} {problem}. Expected the coefficients of every kind of form. {remedy}")
    return Coefficients(**{name: value for name, value in content.items() if name != "schema"})


def fitted() -> Coefficients:
    """Those in data/."""
    return coefficients(str(runtime.data_dir()))
