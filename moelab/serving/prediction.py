"""What a faster layer should gain a step, beside what it does gain.

A step of `first` takes T, its experts a share s of it. If another contender's experts take 1/r of the first's, the step should
shrink to T (1 - s + s / r): the gain is 1 / (1 - s + s / r) (Amdahl). s and r are taken twice: from the experts of all layers
timed in the model, and from the layer's own recording (`fast_layer`), where shape and batch are in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moelab import recordings
from moelab.errors import RecordingError
from moelab.measure import Measurement, tie

Row = Mapping[str, Any]

STEPS = ("decode", "prefill", "prefill, graph")
"""Kinds of rows that are whole steps, whose gain is predicted; "decode, eager" is the host's."""

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


def experts_of(kind: str) -> str:
    """The kind of the rows that hold the experts' time of such a step."""
    return f"experts of {kind.partition(',')[0]}"


def without_of(kind: str) -> str:
    """The kind of the row that holds such a step's time without any experts."""
    return f"{kind}, no experts"


def gains(
    rows: Sequence[Row], first: str = "grouped_mm", layer: Mapping[tuple[str, int], float] | None = None
) -> list[dict[str, Any]]:
    """A row for each cell and contender beside `first`: both steps, the share, the measured and the predicted gain.

    off, off_by_layer: how far the step is from the predicted one, in parts of it. alone, within: microseconds of the experts of
    `first` and of `impl` by themselves, and within the step, by what it takes more than without experts; None unless known.
    tie: the 95 % intervals of the two steps overlap. layer: (implementation of `fast_layer`, tokens) -> microseconds, for the
    second prediction.
    """
    found = cells(rows)
    table = []
    for (model, layers, kind, batch, length), steps in found.items():
        if kind not in STEPS or first not in steps:
            continue
        own = _measurement(steps[first])
        alone = {name: _measurement(row).median_us
                 for name, row in found.get((model, layers, experts_of(kind), batch, length), {}).items()}  # fmt: skip
        recorded = by_layer(steps[first], layer or {})
        for name, row in steps.items():
            if name == first:
                continue
            step = _measurement(row)
            line: dict[str, Any] = {
                "model": model, "kind": kind, "batch": batch, "length": length, "first": first, "impl": name,
                "first_us": own.median_us, "us": step.median_us, "gain": own.median_us / step.median_us, "tie": tie(own, step),
                "share": share(alone, first, own.median_us),
            }  # fmt: skip
            line["predicted"], line["off"] = _predicted(line, alone)
            rest = found.get((model, layers, without_of(kind), batch, length), {})
            line["alone"] = (alone[first], alone[name]) if {first, name} <= set(alone) else None
            line["within"] = next(((own.median_us - less, step.median_us - less) for less in _medians(rest)), None)
            line["predicted_by_layer"], line["off_by_layer"] = _predicted(line, recorded)
            table.append(line)
    return table


def _medians(cell: Mapping[str, Row]) -> list[float]:
    return [_measurement(row).median_us for row in cell.values()]


def by_layer(row: Row, layer: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Contender -> microseconds of all experts of a step, as the layer's recording has them at the row's number of tokens."""
    return {name: row["moe_layers"] * layer[theirs, row["num_tokens"]]
            for name, theirs in RECORDED.items() if (theirs, row["num_tokens"]) in layer}  # fmt: skip


def share(alone: Mapping[str, float], name: str, step_us: float) -> float | None:
    """Of the experts in a step; None where they are not known, or take longer alone, as calls that wait for the host may."""
    return alone[name] / step_us if name in alone and alone[name] < step_us else None


def _predicted(line: Row, alone: Mapping[str, float]) -> tuple[float | None, float | None]:
    """(the gain, how far off the measured step is) by the experts' times alone."""
    first, name = line["first"], line["impl"]
    part = share(alone, first, line["first_us"])
    if part is None or name not in alone:
        return None, None
    gain = amdahl(part, alone[first] / alone[name])
    return gain, line["us"] * gain / line["first_us"] - 1


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
             if key[2] in STEPS and one in cell and other in cell]  # fmt: skip
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
