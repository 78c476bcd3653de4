"""What `moelab record SUITE` measures: a function per suite, which checks, times, and returns a Recording."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moelab import recordings
from moelab.errors import UnknownNameError, nearest_names
from moelab.recordings import Recording
from moelab.suites.later import Later
from moelab.suites.partial import record_kept

SUITES: dict[str, Callable[..., Recording]] = {
    "ceilings": Later("moelab.suites.ceilings"),
    "sum_reduce_precision": Later("moelab.suites.sum_reduce", "record_precision"),
    "sum_reduce": Later("moelab.suites.sum_reduce", "record_speed"),
    "slot_order": Later("moelab.suites.slot_order"),
    "layer_classic": Later("moelab.suites.layer_classic"),
    "split_k": Later("moelab.suites.split_k"),
    "layer_baseline": Later("moelab.suites.layer_baseline"),
    "tma_overhead": Later("moelab.suites.tma_overhead"),
    "quantised": Later("moelab.suites.quantised"),
    "fast_layer": Later("moelab.suites.fast_layer"),
    "fast_choice": Later("moelab.suites.fast_choice"),
    "serve_bench": Later("moelab.serving.suite"),
    "fast_counters": Later("moelab.suites.fast_counters"),
}

LAST = ("serve_bench", "fast_counters")
"""Suites that need more than a GPU (transformers; ncu, and leave to read the counters): "all" runs them after the others, so
that a machine that lacks it loses no other recording."""


def record(
    suites: Sequence[str], out: Path | None = None, known: Mapping[str, Callable[..., Recording]] = SUITES
) -> list[Path]:
    """Run suites one after another, writing each recording as soon as it is done; "all" means every one that is known,
    those of LAST at the end.

    out: folder of the files; None is data/recordings. Raises UnknownNameError before anything runs, and
    RuntimeModeError where a suite needs a GPU, or ncu; what was done before stays written. A suite that is cut leaves what it
    measured beside its file, in one that partial.py names.
    """
    return [record_kept(name, known[name], target(name, out)) for name in suite_names(suites, known)]


def target(suite: str, out: Path | None = None) -> Path:
    """The file that a suite's recording goes to."""
    return (recordings.recordings_dir() if out is None else out) / f"{suite}.json"


def suite_names(asked: Sequence[str], known: Mapping[str, Callable[..., Recording]] = SUITES) -> list[str]:
    """The suites asked for, "all" spelled out, LAST at the end. Raises UnknownNameError for a name that is not known."""
    for name in asked:
        if name != "all" and name not in known:
            raise UnknownNameError(
                f"Unknown suite {name!r}. Expected 'all' or one of {list(known)}.{nearest_names(name, known)} "
                "Name suites to record."
            )
    return sorted(known, key=lambda name: name in LAST) if "all" in asked else list(asked)
