"""Recordings: measurements on disk, with where they come from.

One JSON file per suite in data/recordings: {"schema": 1, "suite", "provenance", "protocol", "digest", "rows"}. A row is
a flat object; where it holds `samples_us`, those are all samples of the measurement, in microseconds. Files
are strict JSON (no NaN, no Infinity), written atomically, one row per line so that a git diff shows which
rows changed. The digest is of all the rest: a bit that the disk flipped, or a number that a hand changed, is found.
`python -m moelab.recordings FILE...` puts one into files of an older moelab, which have none.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab import writing
from moelab.errors import RecordingError, nearest_names
from moelab.reading import UnreadableError, parse_json, read_bytes

SCHEMA = 1
"""Version of the file format that this code reads and writes."""

PROVENANCE_KEYS = ("gpu", "driver", "torch", "triton", "cuda", "python", "git_commit", "date", "moelab")
"""Keys that every recording's provenance must hold; a value may be null where there is none (no driver on CPU)."""

MADE_BY = {
    name: f"moelab record {name}"
    for name in (
        "ceilings", "sum_reduce_precision", "sum_reduce", "layer_classic", "split_k", "layer_baseline", "tma_overhead",
        "fast_layer", "fast_choice", "fast_shapes", "fast_counters", "quantised", "serve_bench", "slot_order", "tuned_gain",
        "tuner_regret",
    )
} | {"tune_timeline": "make tuned", "peer_kernels": "python tests/peer_kernels.py KERNELS_OF_SGLANG"}  # fmt: skip
"""Recordings by name -> the command that makes each again: suites and studies, which are layers above this, and their own."""

_SAID_BY_SOURCE = ("gpu", "date")  # a recording that cannot say these two names no source at all


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
    content = _content(path, _remedy(path.stem))
    return Recording(content["suite"], content["provenance"], content["protocol"], tuple(content["rows"]), path)


def _content(path: Path, remedy: str) -> dict[str, Any]:
    """What a sound file holds."""
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        known = sorted(p.stem for p in path.parent.glob("*.json"))
        raise RecordingError(
            f"There is no recording at {path}.{nearest_names(path.stem, known)} "
            f"Expected one of those there: {', '.join(known) or 'none yet'}. {_remedy(path.stem, known)}"
        ) from None
    except OSError as error:
        raise RecordingError(
            f"Cannot read the recording {path}: {error.strerror}. Expected a JSON file. {remedy}"
        ) from error
    except UnreadableError as error:
        raise RecordingError(f"The recording {path} {error}. Expected a JSON file. {remedy}") from None
    try:
        content = parse_json(data)
    except UnreadableError as error:
        raise RecordingError(
            f"The recording {path} {error}. Expected a whole file; it may be cut short. {remedy}"
        ) from None
    _require_sound(content, f"The recording {path}", remedy)
    if (digest := _digest(content)) != content["digest"]:
        raise RecordingError(
            f"The recording {path} is not what was written: its digest is {content['digest'][:12]}…, and what it holds has "
            f"{digest[:12]}…. Expected a file that neither a hand nor the disk has changed. {remedy}"
        )
    return content


def write(recording: Recording, path: str | Path | None = None) -> Path:
    """Write a recording atomically and return its path (default: data/recordings/<suite>.json).

    The old file stays whole until the new one is on disk. Raises RecordingError, before touching the disk,
    for everything that `load` would refuse.
    """
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "suite": recording.suite,
        "provenance": dict(recording.provenance),
        "protocol": dict(recording.protocol),
        "rows": [dict(row) for row in recording.rows],
    }
    what, remedy = f"The recording {recording.suite!r}", "Nothing was written. Measure those rows again."
    if problem := _values_problem(content):
        raise _unsound(what, problem, remedy)
    content = parse_json(_text(content))  # as it will be read: tuples are lists
    content["digest"] = _digest(content)
    _require_sound(content, what, remedy)
    target = Path(path) if path is not None else recordings_dir() / f"{recording.suite}.json"
    return writing.write(target, _text(content))


def _text(content: Mapping[str, Any]) -> str:
    """The file of some content, with its digest if it has one."""

    def compact(value: Any) -> str:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)

    keys = [key for key in ("schema", "suite", "provenance", "protocol", "digest") if key in content]
    head = [f' "{key}": {compact(content[key])},' for key in keys]
    rows = ",\n".join(f"  {compact(row)}" for row in content["rows"])
    return "\n".join(["{", *head, ' "rows": [', rows, " ]", "}", ""])


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the file as it would be without a digest: how it is indented, or its lines end, is no matter."""
    return hashlib.sha256(_text({key: value for key, value in content.items() if key != "digest"}).encode()).hexdigest()


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


def _require_sound(content: Any, what: str, remedy: str) -> None:
    from moelab.schemas import RECORDING, first_problem

    problem = first_problem(RECORDING, content) or _provenance_problem(content["provenance"])
    if problem == "has no digest":
        remedy = (
            f"{remedy} If an older moelab wrote it, and you know that it is whole: python -m moelab.recordings FILE puts "
            "one in; run that."
        )
    if problem:
        raise _unsound(what, problem, remedy)


def _unsound(what: str, problem: str, remedy: str) -> RecordingError:
    return RecordingError(
        f"{what} {problem}. Expected schema {SCHEMA}: provenance, protocol, and rows of finite values, times over 0. {remedy}"
    )


def _provenance_problem(provenance: Mapping[str, Any]) -> str | None:
    missing = [k for k in PROVENANCE_KEYS if k not in provenance]
    missing += [k for k in _SAID_BY_SOURCE if k in provenance and not provenance[k]]
    return f"has no {', '.join(missing)} in its provenance (use moelab.runtime.provenance)" if missing else None


def _values_problem(content: Mapping[str, Any]) -> str | None:
    """The first value that JSON cannot store."""
    parts = {key: content[key] for key in ("provenance", "protocol")}
    parts |= {f"row {index}": row for index, row in enumerate(content["rows"])}
    return next((problem for where, part in parts.items() if (problem := _value_problem(part, where))), None)


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


def seal(path: str | Path) -> Path:
    """Put a digest into a sound file that has none, as an older moelab wrote them. Raises RecordingError for any other."""
    path, remedy = Path(path), "Restore the file from git, or record it again."
    try:
        content = parse_json(read_bytes(path))
    except (OSError, UnreadableError) as error:
        raise RecordingError(f"Cannot read {path}: it {error}. Expected a recording. {remedy}") from None
    if not isinstance(content, dict) or "digest" in content:
        raise RecordingError(f"{path} is no recording without a digest. Expected one of an older moelab. {remedy}")
    _require_sound(content | {"digest": "0" * 64}, f"The recording {path}", remedy)
    writing.write(path, _text(content | {"digest": _digest(content)}))
    return path


if __name__ == "__main__":
    try:
        for name in sys.argv[1:]:
            print(f"sealed {seal(name)}")
    except RecordingError as error:
        sys.exit(f"moelab: {error}")
