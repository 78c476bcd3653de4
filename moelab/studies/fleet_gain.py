"""The study tuned_gain over a fleet's own files, target by target: what is on disk of it is not measured again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moelab import recordings, runtime
from moelab.recordings import Recording
from moelab.studies import tuned_gain
from moelab.studies.targets import Target
from moelab.tuner.landscape import landscapes_dir


def second_run(target: Target, out: Path) -> Path | None:
    """The landscape of an independent run: the fleet's own, else the one in data/landscapes."""
    name = f"{target.landscape(runtime.device_key(), seed=1)}.parquet"
    return next((path for folder in (out / "landscapes", landscapes_dir()) if (path := folder / name).is_file()), None)


def is_measured(path: Path, target: Target, out: Path) -> bool:
    """Whether the recording holds this target's gains, of the files that are in `out` now and of a second run if there is
    one."""
    pairs = tuned_gain.tuned_pairs(target.shape(), runtime.device_key(), out / "configs")
    rows = recordings.load(path).select(kind="layer", target=target.name) if path.is_file() else []
    tuned = {row["num_tokens"]: (row["up"], row["down"]) for row in rows if row["config_name"] == "tuned"}
    wanted = {b: (up.to_json(), down.to_json()) for b, (up, down) in pairs.items()}
    has_second = any(row["config_name"] == "second" for row in rows)
    return bool(wanted) and tuned == wanted and (has_second or second_run(target, out) is None)


def has_files(target: Target, out: Path) -> bool:
    """Whether the fleet has written config files of that target, for this device and Triton."""
    return bool(tuned_gain.tuned_pairs(target.shape(), runtime.device_key(), out / "configs"))


def measure(path: Path, target: Target, out: Path) -> list[dict[str, Any]]:
    """Measure one target and put its rows into the recording, in place of those it had; its summaries."""
    second = second_run(target, out)
    made = tuned_gain.record(
        (target,), config_dir=out / "configs", second={} if second is None else {target.name: second}
    )
    merge(made, path)
    return [dict(row) for row in made.select(kind="summary")]


def merge(made: Recording, path: Path) -> Path:
    """Put the rows of a recording of gains into the one at `path`, target by target, in place of those it had.

    The provenance is the latest one's; every summary names the commit, date and driver of its own run.
    """
    targets = {row["target"] for row in made.rows}
    old = _stamped(recordings.load(path)) if path.is_file() else ()
    kept = tuple(row for row in old if row["target"] not in targets)
    return recordings.write(replace(made, rows=(*kept, *_stamped(made)), path=None), path)


def _stamped(recording: Recording) -> tuple[Mapping[str, Any], ...]:
    run = {key: recording.provenance.get(key) for key in ("git_commit", "date", "driver")}
    return tuple({"recorded": run, **row} if row["kind"] == "summary" else row for row in recording.rows)
