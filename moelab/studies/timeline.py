"""What a tuning run took, phase by phase, read from its journal: nothing has to be written while it runs or is killed."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moelab import recordings
from moelab.recordings import Recording
from moelab.tuner import journal
from moelab.tuner.evaluate import Result
from moelab.tuner.problem import Problem

SUITE = "tune_timeline"

PROTOCOL: Mapping[str, Any] = {
    "kind": "seconds of tuning runs, from their journals",
    "start_s, end_s": "on the run's clock, which begins with its first request and stands still between a cut and a resume",
    "wall_s": "from the journal's first line to its last, cuts included",
    "compile_s, measure_s": "sums over processes and GPUs",
    "samples": "kept; a contender that failed has none and is counted in `failures`",
}


def rows_of(path: str | Path) -> list[dict[str, Any]]:
    """A row for each phase of a run, then one of phase "all". Raises JournalError for a file that is no journal."""
    content = journal.read(path)
    header, problem = content.header, Problem.from_json(content.header["problem"])
    gpus = header["evaluator"].get("ray_actors", header["evaluator"].get("devices", 1))
    via = {"via": str(header["evaluator"].get("kind")) if "ray_actors" not in header["evaluator"] else "ray", "gpus": gpus,
            "compile_processes": header["evaluator"].get("compile_processes")}  # fmt: skip
    run = {
        "run": Path(path).stem, "model": problem.shape.name, "tp_size": problem.shape.tp_size,
        "strategy": header["strategy"]["name"], "seed": problem.seed, "num_batch_sizes": len(problem.batch_sizes),
        **via,
    }  # fmt: skip
    phases = [note for note in content.notes if note["kind"] == "phase"]
    finished = next((note for note in content.notes if note["kind"] == "finished"), None)
    begins = [note["at"] for note in phases]
    by_phase: list[list[Result]] = [[] for _ in phases]
    for key, result in content.results.items():
        number = sum(at <= content.times[key] for at in begins) - 1
        if number >= 0:
            by_phase[number].append(result)
    end_s: float | None = None if finished is None else finished["clock_s"]
    rows = []
    for number, (note, results) in enumerate(zip(phases, by_phase, strict=True)):
        later = phases[number + 1]["clock_s"] if number + 1 < len(phases) else end_s
        rows.append({**run, "phase": note["name"], **_span(note["clock_s"], later), **_work(results)})
    whole = {**run, "phase": "all", **_span(0.0, end_s), **_work(content.results.values())}
    stamps = [content.header["at"], *content.times.values(), *(note["at"] for note in content.notes)]
    first, last = (datetime.datetime.fromisoformat(at) for at in (min(stamps), max(stamps)))
    wall_s = round((last - first).total_seconds(), 3)
    whole |= {"wall_s": wall_s, "resumed": sum(note["kind"] == "resumed" for note in content.notes)}
    return [*rows, whole | {"finished": finished is not None}]


def _span(start_s: float, end_s: float | None) -> dict[str, float | None]:
    """A phase that was cut has no end."""
    return {"start_s": round(start_s, 3), "end_s": None if end_s is None else round(end_s, 3)}


def _work(results: Iterable[Result]) -> dict[str, Any]:
    """Contenders asked for, kernels among them that were only compiled, samples, failures by class, seconds."""
    found: dict[str, Any] = {"contenders": 0, "compiled_only": 0, "samples": 0}
    failures: Counter[str] = Counter()
    compile_s = measure_s = 0.0
    for result in results:
        found["contenders"] += len(result.outcomes)
        found["compiled_only"] += len(result.outcomes) * (result.request.rounds == 0)
        for outcome in result.outcomes:
            found["samples"] += len(outcome.samples_us)
            failures.update([outcome.failure] if outcome.failure else [])
            compile_s, measure_s = compile_s + outcome.compile_s, measure_s + outcome.measure_s
    return {**found, "failures": dict(failures), "compile_s": round(compile_s, 2), "measure_s": round(measure_s, 2)}


def append(runs: Sequence[str | Path], path: str | Path) -> Path:
    """Put the rows of those runs into the recording at `path` (made if need be), in place of what it had of them.

    The provenance is the latest run's. Raises JournalError for a run, RecordingError for a recording that is broken.
    """
    target, fresh = Path(path), [row for run in runs for row in rows_of(run)]
    names = {row["run"] for row in fresh}
    old = recordings.load(target).rows if target.is_file() else ()
    provenance = journal.read(runs[-1]).header["provenance"]
    kept = tuple(row for row in old if row["run"] not in names)
    made = Recording(SUITE, provenance, dict(PROTOCOL), (*kept, *fresh))
    return recordings.write(replace(made, path=None), target)
