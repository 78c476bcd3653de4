"""Landscapes in the formats of the autotuning community, one file for each GEMM and batch size.

Kernel Tuner's cache file (its schema 1.1.0), which its simulation mode and dashboard read, and T4 results (schema 1.0.0),
the exchange format of the BAT benchmark suite and others. Both schemas lie in kernel_tuner/schema of Kernel Tuner's
repository. Times are in milliseconds, as Kernel Tuner's are. A file covers the grid, as Kernel Tuner's simulation asks: a
config that a rule excluded is invalid, and one whose equal program was timed has that program's times. Pairs timed as
whole layers, and incumbents outside the grid, are left out: both formats know one kernel and one grid a file.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moelab import writing
from moelab.config import KernelConfig
from moelab.errors import UnknownNameError, nearest_names
from moelab.tuner.landscape import FIELDS, Landscape, Row
from moelab.tuner.problem import GEMMS, Gemm, Problem
from moelab.tuner.space import build_space, grid, representatives

_COMPILE = ("compile", "resources")
_WRONG = ("wrong", "nan")
_EXCLUDED = "excluded"


@dataclass(frozen=True)
class _Entry:
    """All rows of one config, pooled. Times in milliseconds."""

    config: KernelConfig
    times_ms: tuple[float, ...]
    failure: str | None
    message: str
    compile_ms: float
    benchmark_ms: float
    at: str


def export(landscape: Landscape, out: str | Path, kind: str) -> list[Path]:
    """Write a landscape into folder `out` as "kernel_tuner" or "t4"; the files' paths.

    Raises UnknownNameError for another kind, OSError from the disk.
    """
    if kind not in FORMATS:
        raise UnknownNameError(
            f"Unknown format {kind!r}.{nearest_names(kind, FORMATS)} Expected one of {', '.join(FORMATS)}. Name one."
        )
    written = []
    for gemm in GEMMS:
        for num_tokens in landscape.problem.batch_sizes:
            entries = _entries(landscape, gemm, num_tokens)
            if entries:
                content = FORMATS[kind](landscape, gemm, num_tokens, entries)
                path = Path(out) / f"{landscape.name}-{gemm}-{num_tokens}.{kind}.json"
                written.append(writing.write(path, json.dumps(content, indent=1, allow_nan=False) + "\n"))
    return written


def _entries(landscape: Landscape, gemm: Gemm, num_tokens: int) -> list[_Entry]:
    """One entry for each config that was tried there; its compile time, or its failure to compile, from any batch size."""
    here: dict[KernelConfig, list[Row]] = {}
    compiled: dict[KernelConfig, list[Row]] = {}
    for row in landscape.rows:
        if row.stage == gemm:
            compiled.setdefault(row.contender[0], []).append(row)
            if row.num_tokens == num_tokens and (row.outcome.samples_us or row.outcome.failure):
                here.setdefault(row.contender[0], []).append(row)
    for config, rows in compiled.items():
        if any(row.outcome.failure in _COMPILE for row in rows):
            here.setdefault(config, [row for row in rows if row.outcome.failure in _COMPILE])
    measured = {config: _pooled(config, rows, compiled[config]) for config, rows in here.items()}
    return list(_over_the_grid(landscape.problem, gemm, num_tokens, measured)) if measured else []


def _over_the_grid(
    problem: Problem, gemm: Gemm, num_tokens: int, measured: Mapping[KernelConfig, _Entry]
) -> Iterator[_Entry]:
    """An entry for each config of the grid: its own, its equal program's, or that a rule excluded it."""
    allowed = build_space(problem).configs[gemm]
    same = representatives(allowed, problem, gemm, num_tokens)
    for config in grid(problem.target, problem.split_k, problem.axes):
        if config not in same:
            yield _Entry(
                config, (), _EXCLUDED, "a rule excludes this config", 0.0, 0.0, next(iter(measured.values())).at
            )
        elif found := measured.get(config) or measured.get(same[config]):
            yield replace(found, config=config)


def _pooled(config: KernelConfig, rows: list[Row], everywhere: list[Row]) -> _Entry:
    failed = next((row.outcome for row in rows if row.outcome.failure), None)
    return _Entry(
        config,
        () if failed else tuple(s / 1e3 for row in rows for s in row.outcome.samples_us),
        failed.failure if failed else None,
        failed.message if failed else "",
        1e3 * max(row.outcome.compile_s for row in everywhere),
        1e3 * sum(row.outcome.measure_s for row in rows),
        rows[-1].at,
    )


def _parameters(entries: Iterable[_Entry]) -> list[str]:
    """Fields that any config sets: AMD's are absent on NVIDIA."""
    configs = [entry.config for entry in entries]
    return [name for name in FIELDS if any(getattr(c, name) is not None for c in configs)]


def _kernel_name(landscape: Landscape, gemm: Gemm) -> str:
    return f"{landscape.problem.kernel}_{gemm}"


def _kernel_tuner(landscape: Landscape, gemm: Gemm, num_tokens: int, entries: list[_Entry]) -> dict[str, Any]:
    names = _parameters(entries)
    problem = landscape.problem
    values = {name: sorted({getattr(e.config, name) for e in entries}) for name in names}
    return {
        "schema_version": "1.1.0",
        "device_name": problem.device,
        "kernel_name": _kernel_name(landscape, gemm),
        "problem_size": [num_tokens * problem.shape.top_k, problem.columns(gemm), problem.inner_size(gemm)],
        "tune_params_keys": names,
        "tune_params": values,
        "objective": "time",
        "cache": {",".join(str(getattr(e.config, name)) for name in names): _cache_line(e, names) for e in entries},
    }


def _cache_line(entry: _Entry, names: list[str]) -> dict[str, Any]:
    failed = "CompilationFailedConfig" if entry.failure in _COMPILE else "RuntimeFailedConfig"
    failed = "InvalidConfig" if entry.failure == _EXCLUDED else failed
    line: dict[str, Any] = {name: getattr(entry.config, name) for name in names}
    line["time"] = failed if entry.failure else statistics.median(entry.times_ms)
    line |= {"times": list(entry.times_ms)} if not entry.failure else {"error": f"{entry.failure}: {entry.message}"}
    costs = {"compile_time": entry.compile_ms, "benchmark_time": entry.benchmark_ms}
    zeros = {"verification_time": 0.0, "strategy_time": 0.0, "framework_time": 0.0}  # not kept apart by the journal
    return line | costs | zeros | {"timestamp": entry.at}


def _t4(landscape: Landscape, gemm: Gemm, num_tokens: int, entries: list[_Entry]) -> dict[str, Any]:
    return {"schema_version": "1.0.0", "results": [_t4_result(entry, _parameters(entries)) for entry in entries]}


def _t4_result(entry: _Entry, names: list[str]) -> dict[str, Any]:
    measured = [{"name": "time", "value": statistics.median(entry.times_ms), "unit": "ms"}] if entry.times_ms else []
    return {
        "timestamp": entry.at,
        "configuration": {name: getattr(entry.config, name) for name in names},
        "objectives": ["time"],
        "times": {
            "compilation_time": entry.compile_ms, "runtimes": list(entry.times_ms), "framework": 0.0,
            "search_algorithm": 0.0, "validation": 0.0,
        },
        "invalidity": _invalidity(entry.failure),
        "correctness": float(entry.failure is None),
        "measurements": measured,
    }  # fmt: skip


def _invalidity(failure: str | None) -> str:
    if failure in (None, _EXCLUDED):
        return "constraints" if failure else "correct"
    if failure in _COMPILE:
        return "compile"
    return "correctness" if failure in _WRONG else "timeout" if failure == "timeout" else "runtime"


FORMATS: Mapping[str, Callable[[Landscape, Gemm, int, list[_Entry]], dict[str, Any]]] = {
    "kernel_tuner": _kernel_tuner,
    "t4": _t4,
}
"""Formats by name."""
