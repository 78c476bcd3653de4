"""The rows of a serving benchmark in a form to read: a line for each cell and contender, and one for each serving run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moelab.measure import Measurement, tie
from moelab.serving.prediction import gains, recorded_layer
from moelab.serving.requests import summary

Row = Mapping[str, Any]


def where(row: Row) -> str:
    """A cell in words: "decode 16x256" is 16 sequences of 256 tokens."""
    return f"{row['kind']} {row['batch']}x{row['length']}"


def times(rows: Sequence[Row], first: str | None = None) -> list[dict[str, Any]]:
    """A line for each cell and contender: ms with its 95 % interval, fastest or tie, the experts' share, and gains over `first`.

    first: None is the first contender of the rows that was timed. A contender that was refused has the reason in place of times.
    """
    done = [row for row in rows if row["kind"] not in ("error", "logits", "serving")]
    first = first or next((row["impl"] for row in done if "samples_us" in row), "")
    layers = {model: recorded_layer(f"{model}/tp1") for model in {row["model"] for row in done}}
    gained = {(one["model"], one["kind"], one["batch"], one["length"], one["impl"]): one
              for model, layer in layers.items()
              for one in gains([row for row in done if row["model"] == model], first, layer)}  # fmt: skip
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in done:
        cells.setdefault((row["model"], where(row)), []).append(row)
    return [line for cell in cells.values() for line in _lines(cell, gained)]


def _lines(cell: Sequence[Row], gained: Mapping[tuple[Any, ...], Row]) -> list[dict[str, Any]]:
    found = {row["impl"]: Measurement(row["impl"], tuple(row["samples_us"])) for row in cell if "samples_us" in row}
    best = min(found.values(), key=lambda one: one.median_us, default=None)
    lines = []
    for row in cell:
        line: dict[str, Any] = {"model": row["model"], "cell": where(row), "experts": row["impl"]}
        if row["impl"] in found and best is not None:
            one = found[row["impl"]]
            low, high = one.interval_us
            line |= {"ms": one.median_us / 1e3, "low": low / 1e3, "high": high / 1e3,
                     "": "fastest" if one is best else "tie" if tie(one, best) else None}  # fmt: skip
        gain = gained.get((row["model"], row["kind"], row["batch"], row["length"], row["impl"]), {})
        line |= {
            name: gain.get(name) for name in ("gain", "predicted", "off", "predicted_by_layer", "off_by_layer", "share")
        }
        line |= {"touched": row.get("experts_touched"), "load": row.get("load"), "refused": row.get("refused")}
        lines.append(line)
    return lines


def serving(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for each contender's serving runs: TTFT, TPOT, ITL at p50, p90, p99, and output tokens a second."""
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "serving":
            runs.setdefault((row["model"], row["impl"]), []).append(row)
    lines = []
    for (model, name), each in runs.items():
        sound = [row for row in each if "refused" not in row]
        told = summary(sound) if sound else {"refused": each[0]["refused"]}
        lines.append({"model": model, "experts": name, "runs": len(sound), **told})
    return lines


def errors(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for each contender: its relative error beside eager's, or that of `beside`, of one block and of the logits."""
    kept = ("impl", "kind", "rel_error", "rel_error_eager", "beside", "within_bound", "problem", "refused")
    return [
        {"model": row["model"], **{name: row.get(name) for name in kept}}
        for row in rows
        if row["kind"] in ("error", "logits")
    ]
