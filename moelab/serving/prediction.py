"""What a faster layer should gain a step, beside what it does gain.

A step of `first` takes T, its experts a share s of it. If another contender's experts take 1/r of the first's, the step should
shrink to T (1 - s + s / r): the gain is 1 / (1 - s + s / r) (Amdahl). r is taken twice, from the experts of all layers timed in
the model, and from the layer's own recording (`fast_layer`), where shape and batch are in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moelab import recordings
from moelab.errors import RecordingError
from moelab.measure import Measurement, tie

Row = Mapping[str, Any]

RECORDED = {"moelab_fast": "fast", "moelab_triton": "classic", "grouped_mm": "grouped_mm"}
"""A contender -> its name in the recording `fast_layer`, whose times leave order, alignment and sort out; a step has them."""


def _measurement(row: Row) -> Measurement:
    return Measurement(str(row["impl"]), tuple(row["samples_us"]))


def cells(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """(model, layers, kind, batch, length) -> contender -> row, of the rows that hold times."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if "samples_us" in row:
            found.setdefault((row["model"], row["layers"], row["kind"], row["batch"], row["length"]), {})[
                row["impl"]
            ] = row
    return found


def gains(
    rows: Sequence[Row], first: str = "grouped_mm", layer: Mapping[tuple[str, int], float] | None = None
) -> list[dict[str, Any]]:
    """A row for each cell and contender beside `first`: both steps, the share, the predicted and the measured gain.

    off: how far the step is from the one predicted from the experts timed in the model, in parts of it. tie: the 95 % intervals
    of the two steps overlap. layer: (implementation of `fast_layer`, tokens) -> microseconds, for the second prediction.
    """
    found, layer = cells(rows), layer or {}
    table = []
    for (model, layers, kind, batch, length), steps in found.items():
        if kind not in ("prefill", "decode") or first not in steps:
            continue
        tokens = steps[first]["num_tokens"]
        alone = found.get((model, layers, f"experts of {kind}", batch, length), {})
        own = _measurement(steps[first])
        share = _measurement(alone[first]).median_us / own.median_us if first in alone else None
        for name, row in steps.items():
            if name == first:
                continue
            step = _measurement(row)
            line: dict[str, Any] = {
                "model": model, "kind": kind, "batch": batch, "length": length, "first": first, "impl": name,
                "first_us": own.median_us, "us": step.median_us, "gain": own.median_us / step.median_us, "tie": tie(own, step),
                "share": share,
            }  # fmt: skip
            table.append(line | _predicted(line, alone, share, layer, tokens))
    return table


def _predicted(
    line: Row, alone: Mapping[str, Row], share: float | None, layer: Mapping[tuple[str, int], float], tokens: int
) -> dict[str, Any]:
    told: dict[str, Any] = {"predicted": None, "off": None, "predicted_by_layer": None}
    if share is None or share >= 1:  # calls that wait for the host can take longer alone than within a step
        return told
    first, name = line["first"], line["impl"]
    if name in alone:
        ratio = _measurement(alone[first]).median_us / _measurement(alone[name]).median_us
        told["predicted"] = amdahl(share, ratio)
        told["off"] = line["us"] * told["predicted"] / line["first_us"] - 1
    of_first, of_other = layer.get((RECORDED.get(first, ""), tokens)), layer.get((RECORDED.get(name, ""), tokens))
    if of_first and of_other:
        told["predicted_by_layer"] = amdahl(share, of_first / of_other)
    return told


def amdahl(share: float, ratio: float) -> float:
    """The gain of a step, a share of which becomes `ratio` times as fast."""
    return 1 / (1 - share + share / ratio)


def recorded_layer(shape: str) -> dict[tuple[str, int], float]:
    """(implementation, tokens) -> median microseconds of that shape's layer in the recording `fast_layer`, uniform routing;
    nothing where there is no recording."""
    try:
        recording = recordings.load("fast_layer")
    except RecordingError:
        return {}
    rows = [row for row in recording.select(shape=shape, routing="uniform") if "samples_us" in row]
    return {(row["impl"], row["num_tokens"]): _measurement(row).median_us for row in rows}


def verdict(rows: Sequence[Row], one: str, other: str) -> str:
    """A line on two contenders over all cells that hold both: faster, slower or a tie in how many, and by how much at most."""
    pairs = [(key, _measurement(cell[one]), _measurement(cell[other])) for key, cell in cells(rows).items()
             if key[2] in ("prefill", "decode") and one in cell and other in cell]  # fmt: skip
    if not pairs:
        return f"{one} and {other} have no cell in common."
    ratio = {key: b.median_us / a.median_us for key, a, b in pairs}
    ties = [key for key, a, b in pairs if tie(a, b)]
    faster = [key for key in ratio if key not in ties and ratio[key] > 1]
    slower = [key for key in ratio if key not in ties and ratio[key] < 1]
    ends = f"{min(ratio.values()):.3f} to {max(ratio.values()):.3f}"
    return (
        f"{one} is faster than {other} in {len(faster)} of {len(pairs)} cells, slower in {len(slower)}, a tie in {len(ties)}; "
        f"{other} takes {ends} times as long."
    )
