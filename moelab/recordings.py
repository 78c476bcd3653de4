"""Recordings: measurements on disk, with where they come from.

One JSON file per suite in data/recordings: {"schema": 1, "suite", "provenance", "protocol", "rows"}. A row is
a flat object; where it holds `samples_us`, those are all samples of the measurement, in microseconds. Files
are strict JSON (no NaN, no Infinity), written atomically, one row per line so that a git diff shows which
rows changed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab import writing
from moelab.errors import RecordingError, nearest_names

SCHEMA = 1
"""Version of the file format that this code reads and writes."""

PROVENANCE_KEYS = ("gpu", "driver", "torch", "triton", "cuda", "python", "git_commit", "date", "moelab")
"""Keys that every recording's provenance must hold; a value may be null where there is none (no driver on CPU)."""

MADE_BY = {
    name: f"moelab record {name}"
    for name in (
        "ceilings", "sum_reduce_precision", "sum_reduce", "layer_classic", "split_k", "layer_baseline", "tma_overhead",
        "fast_layer", "fast_choice", "fast_counters", "tuned_gain", "tuner_regret",
    )
} | {"tune_timeline": "make tuned"}  # fmt: skip
"""Recordings by name -> the command that makes each again: suites and studies, which are layers above this, and their own."""

_SAID_BY_SOURCE = ("gpu", "date")  # a recording that cannot say these two names no source at all
_SUITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Recording:
    """One suite's measurements: rows of plain JSON values, with provenance and protocol.

    path: the file it was loaded from or written to, if any.
    """

    suite: str
    provenance: Mapping[str, Any]
    protocol: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    path: Path | None = None

    def source(self) -> str:
        """Where the numbers come from, e.g. "recorded on NVIDIA H200, triton 3.6.0, 2026-11-21"."""
        triton = self.provenance.get("triton")
        kernels = f"triton {triton}" if triton else "no triton"
        return f"recorded on {self.provenance['gpu']}, {kernels}, {self.provenance['date']}"

    def select(self, **equals: Any) -> list[Mapping[str, Any]]:
        """The rows whose fields equal every given value, in file order (a row without the field does not match)."""
        return [r for r in self.rows if all(k in r and r[k] == v for k, v in equals.items())]


@dataclass(frozen=True)
class ListedRecording:
    """A file in the recordings folder: `recording` if it is sound, else `error`, which says what is wrong."""

    suite: str
    path: Path
    recording: Recording | None
    error: str | None


def recordings_dir() -> Path:
    """The folder of the recordings: data/recordings, or below MOELAB_DATA_DIR."""
    from moelab import runtime

    return runtime.data_dir() / "recordings"


def list_recordings(folder: Path | None = None) -> list[ListedRecording]:
    """Every *.json in the recordings folder, by name; a broken one is listed with its error, never left out."""
    folder = folder or recordings_dir()
    listed = []
    for path in sorted(folder.glob("*.json")):
        try:
            listed.append(ListedRecording(path.stem, path, load(path), None))
        except RecordingError as error:
            listed.append(ListedRecording(path.stem, path, None, str(error)))
    return listed


def load(suite: str | Path) -> Recording:
    """Read a recording by suite name ("sum_reduce") or path.

    Raises RecordingError when the file is missing, truncated, of another schema, without provenance, or holds
    NaN, an infinity, or samples that are empty or not positive.
    """
    path = _path_of(suite)
    remedy = _remedy(path.stem)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = sorted(p.stem for p in path.parent.glob("*.json"))
        raise RecordingError(
            f"There is no recording at {path}.{nearest_names(path.stem, known)} "
            f"Expected one of those there: {', '.join(known) or 'none yet'}. {_remedy(path.stem, known)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecordingError(f"Cannot read the recording {path}: {error}. Expected a JSON file. {remedy}") from error
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise RecordingError(
            f"The recording {path} is not strict JSON: {error}. Expected a whole file; it may be cut short. {remedy}"
        ) from error
    _require_content(content, f"The recording {path}", remedy)
    return Recording(content["suite"], content["provenance"], content["protocol"], tuple(content["rows"]), path)


def write(recording: Recording, path: str | Path | None = None) -> Path:
    """Write a recording atomically and return its path (default: data/recordings/<suite>.json).

    The old file stays whole until the new one is on disk. Raises RecordingError, before touching the disk,
    for everything that `load` would refuse.
    """
    content = {
        "schema": SCHEMA,
        "suite": recording.suite,
        "provenance": dict(recording.provenance),
        "protocol": dict(recording.protocol),
        "rows": [dict(row) for row in recording.rows],
    }
    _require_content(content, f"The recording {recording.suite!r}", "Nothing was written. Measure those rows again.")
    target = Path(path) if path is not None else recordings_dir() / f"{recording.suite}.json"
    return writing.write(target, _encode(content))


def _encode(content: Mapping[str, Any]) -> str:
    def compact(value: Any) -> str:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)

    head = [f' "{key}": {compact(content[key])},' for key in ("schema", "suite", "provenance", "protocol")]
    rows = ",\n".join(f"  {compact(row)}" for row in content["rows"])
    return "\n".join(["{", *head, ' "rows": [', rows, " ]", "}", ""])


def _path_of(suite: str | Path) -> Path:
    text = str(suite)
    if isinstance(suite, Path) or text.endswith(".json") or os.sep in text:
        return Path(suite)
    return recordings_dir() / f"{text}.json"


def _remedy(name: str, known: Sequence[str] = ()) -> str:
    """How to come by the recording `name`; known: others that are at hand."""
    if command := MADE_BY.get(name):
        return f"Record it again with `{command}`, or restore the file from git."
    other = "Name one of those, or fetch" if known else "Fetch"
    return f"{other} the file from where it was made: no suite is called {name!r}, so no command here records it."


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no number")


def _require_content(content: Any, what: str, remedy: str) -> None:
    problem = _problem(content)
    if problem:
        raise RecordingError(
            f"{what} {problem}. Expected schema {SCHEMA}: provenance, protocol, and rows of finite values. {remedy}"
        )


def _problem(content: Any) -> str | None:
    """The first thing wrong with a decoded file, as the end of a sentence; None if it is sound."""
    if not isinstance(content, dict):
        return f"is a JSON {type(content).__name__}, expected an object"
    if content.get("schema") != SCHEMA or isinstance(content.get("schema"), bool):
        return f"has schema {content.get('schema')!r}, this moelab reads schema {SCHEMA}"
    for key, kind in (("suite", str), ("provenance", dict), ("protocol", dict), ("rows", list)):
        if not isinstance(content.get(key), kind):
            return f"has no {key!r} that is a JSON {kind.__name__}"
    if not _SUITE_NAME.fullmatch(content["suite"]):
        return f"has the suite name {content['suite']!r}, expected letters, digits, '_', '-' and '.'"
    return _provenance_problem(content["provenance"]) or _rows_problem(content)


def _provenance_problem(provenance: Mapping[str, Any]) -> str | None:
    missing = [k for k in PROVENANCE_KEYS if k not in provenance]
    missing += [k for k in _SAID_BY_SOURCE if k in provenance and not provenance[k]]
    if missing:
        return f"has no {', '.join(missing)} in its provenance (use moelab.runtime.provenance)"
    return _value_problem(provenance, "provenance")


def _rows_problem(content: Mapping[str, Any]) -> str | None:
    if not content["rows"]:
        return "has no rows"
    problem = _value_problem(content["protocol"], "protocol")
    for index, row in enumerate(content["rows"]):
        if problem:
            break
        if not isinstance(row, dict):
            return f"has a row {index} that is no JSON object"
        problem = _value_problem(row, f"row {index}")
        if not problem and "samples_us" in row:
            problem = _samples_problem(row["samples_us"], index)
    return problem


def _value_problem(value: Any, where: str) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return f"holds {value} in {where}"
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                return f"holds the key {key!r} in {where}, which is no string"
            if problem := _value_problem(item, f"{where}, {key}"):
                return problem
    elif isinstance(value, list | tuple):
        for item in value:
            if problem := _value_problem(item, where):
                return problem
    elif not (value is None or isinstance(value, bool | int | float | str)):
        return f"holds a {type(value).__name__} in {where}, which JSON cannot store"
    return None


def _samples_problem(samples: Any, index: int) -> str | None:
    if not isinstance(samples, Sequence) or isinstance(samples, str) or not samples:
        return f"has no samples in row {index} (samples_us must be a list of at least one time)"
    for sample in samples:
        if isinstance(sample, bool) or not isinstance(sample, int | float):
            return f"holds {sample!r} in samples_us of row {index}, which is no time"
        if not sample > 0:
            return f"holds {sample!r} in samples_us of row {index}; a time is positive"
    return None
