"""The recording fast_counters: which units of the chip the one-launch layer keeps busy, and what is left of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moelab.errors import counted
from moelab.plots.cells import names_of
from moelab.plots.panel import Panel, Row
from moelab.plots.style import GREY, SERIES, SIDES, grid
from moelab.recordings import Recording
from moelab.roofline import Ceilings

UNITS: Mapping[str, tuple[str, str]] = {
    "tensor units": ("tensor_percent", SIDES["compute"].color),
    "L2": ("l2_percent", SERIES[2].color),
    "memory": ("memory_percent", SIDES["memory"].color),
    "issue slots": ("issue_percent", SERIES[3].color),
}
"""Unit of the chip -> field of a row, in per cent of its peak, and colour. Of L2 and memory it is their busiest part."""

L2_PARTS: Mapping[str, str] = {
    "lts__ltcfabric2ltc_cycles_active": "the link between its two halves",
    "lts__lts2xbar_cycles_active": "its way to the SMs",
    "lts__lts2xbar_cycles_active_realtime": "its way to the SMs",
    "lts__xbar2lts_cycles_active": "its way from them",
    "lts__t_sectors": "its lookups of sectors",
    "lts__t_tag_requests": "its tags",
    "lts__d_sectors": "its data",
    "lts__d_sectors_fill_device": "what memory fills it with",
}
"""A part of L2, as ncu names it -> in words. Each half serves the SMs next to it, and what lies in the memory of the
other half crosses the link (NVIDIA A100 Tensor Core GPU Architecture, 2020, on its L2 cache; ncu has the link on Hopper too)."""

WHOLE = "whole"


def units(
    recording: Recording, at: Ceilings, device: Mapping[str, Any], rule: Callable[[str, int], str] | None = None
) -> Panel:
    """Bars of per cent of peak for each launch and unit, a small plot for each shape and batch.

    at: what memory was measured to reach on that GPU; device: its `moelab.roofline.device_data`, of which the SMs
    and their FLOPs a clock are read. rule: the form that the kernel has now for a shape and a batch, as kernels name it; cells
    that were counted of another are then said.
    """
    cells = names_of([{"cell": _cell(row)} for row in recording.rows], "cell")
    whole = recording.select(launch=WHOLE)
    if not whole:
        return Panel(None, [], "**No whole layer was counted.** Record it again: `moelab record fast_counters`.")
    launches = names_of(recording.rows, "launch")
    figure = grid(
        f"What the one-launch layer keeps busy: {_short(whole)}",
        f"{recording.source()}; {recording.protocol['tool']}<br>"
        "per cent of each unit’s peak at the clock of the launch; whole: both GEMMs in one launch, and the sums unless they "
        "have their own; below it each part alone",
        titles=[f"{shape},<br>{batch} tokens" for shape, batch in cells], height=216 + 76 * len(launches), shared_y=True,
    )  # fmt: skip
    for place, cell in enumerate(cells, 1):
        rows = [row for row in recording.rows if _cell(row) == cell]
        for unit in UNITS:
            _bars(figure, unit, rows, place)
    figure.update_xaxes(title="% of peak", range=[0, 115], tickvals=[0, 25, 50, 75, 100], showgrid=False)
    figure.update_yaxes(categoryorder="array", categoryarray=launches, autorange="reversed", showgrid=False)
    figure.update_layout(legend={"orientation": "h", "y": -0.2}, bargap=0.2, bargroupgap=0.08)
    names = [_name(row) for row in whole if rule and rule(*_cell(row)) not in row["kernel"]]
    counted_of_another = f" Counted of a form that the rule no longer chooses: {', '.join(names)}." if names else ""
    said = _said(recording, whole, at, device) + counted_of_another
    return Panel(figure, [_line(row) for row in recording.rows], said)


def _cell(row: Row) -> tuple[str, int]:
    return row["shape"], row["num_tokens"]


def _bars(figure: Any, unit: str, rows: Sequence[Row], place: int) -> None:
    """One unit's bar in each launch, with its value."""
    field, color = UNITS[unit]
    rows = [row for row in rows if field in row]
    figure.add_bar(
        x=[row[field] for row in rows], y=[row["launch"] for row in rows], orientation="h", name=unit, legendgroup=unit,
        marker={"color": color}, showlegend=place == 1, offsetgroup=unit,
        text=[f"{row[field]:.0f}" for row in rows], textposition="outside", textangle=0, constraintext="none",
        textfont={"color": GREY, "size": 11}, cliponaxis=False,
        hovertemplate=f"%{{y}}: {unit} %{{x:.1f}} % of peak<extra></extra>", row=1, col=place,
    )  # fmt: skip


def _line(row: Row) -> Row:
    """A row of the table; a counter that the chip did not give stays empty."""
    return {
        "shape": row["shape"], "tokens": row["num_tokens"], "launch": row["launch"],
        "time, µs": row["duration_ns"] / 1e3 if "duration_ns" in row else None,
        **{f"{unit}, %": row.get(field) for unit, (field, _) in UNITS.items()},
        "busiest of L2": _part(row) or None, "memory, TB/s": _rate(row), "clock, GHz": clock_ghz(row),
        "registers a thread": None if "registers" not in row else int(row["registers"]), "warps, %": row.get("warps_percent"),
    }  # fmt: skip


def _part(row: Row) -> str:
    """The busiest part of L2, in words; nothing where parts were not counted."""
    parts: Mapping[str, float] = row.get("l2_parts") or {}
    name = max(parts, key=lambda each: parts[each], default="")
    return L2_PARTS.get(name, name)


def _rate(row: Row) -> float | None:
    """Traffic of memory in TB/s, None where that was not counted."""
    return row["memory_bytes"] / row["duration_ns"] / 1e3 if {"memory_bytes", "duration_ns"} <= set(row) else None


def clock_ghz(row: Row) -> float | None:
    """Clocks by nanoseconds: how fast the SMs ran during a launch, None where that was not counted."""
    return row["clocks"] / row["duration_ns"] if {"clocks", "duration_ns"} <= set(row) else None


def busiest(row: Row) -> str:
    """The unit that is nearest to its peak."""
    return max(UNITS, key=lambda unit: row.get(UNITS[unit][0], -1.0))


def _short(whole: Sequence[Row]) -> str:
    """Which unit is busiest in how many of the whole layers."""
    found = Counter(busiest(row) for row in whole)
    if len(found) == 1:
        return f"{next(iter(found))} most, in each of {counted(len(whole), 'layer')}"
    return ", ".join(f"{unit} most in {count}" for unit, count in found.most_common()) + f" of {len(whole)} layers"


def _said(recording: Recording, whole: Sequence[Row], at: Ceilings, device: Mapping[str, Any]) -> str:
    """Each whole layer's busiest unit, then what is left on the side of the roof that it is nearer to."""
    named = {unit: [row for row in whole if busiest(row) == unit] for unit in UNITS}
    peaks = {unit: [f"{row[UNITS[unit][0]]:.0f} % ({_name(row)})" for row in rows] for unit, rows in named.items()}
    shown = "; ".join(f"{unit} at {', '.join(values)}" for unit, values in peaks.items() if values)
    said = [f"**Nearest to its peak in a whole layer: {shown}.**", *_said_of_l2(whole)]
    for row in whole:
        if not {"tensor_percent", "memory_percent", "clocks", "duration_ns", "memory_bytes"} <= set(row):
            continue
        tensor = row["tensor_percent"] >= row["memory_percent"]
        said.append(_left_to_products(recording, row, device) if tensor else _left_to_memory(row, at))
    return " ".join(said)


def _said_of_l2(whole: Sequence[Row]) -> list[str]:
    """Which part of L2 is the busiest, in which layers."""
    found: dict[str, list[str]] = {}
    for row in whole:
        found.setdefault(_part(row), []).append(_name(row))
    if len(found) == 1 and len(whole) > 1:
        return [f"Of L2 it is {part}, in each." for part in found if part]
    return [f"Of L2 it is {part} ({'; '.join(cells)})." for part, cells in found.items() if part]


def _name(row: Row) -> str:
    return f"{row['shape']}, {row['num_tokens']} tokens"


def product_ceiling(row: Row, device: Mapping[str, Any]) -> float:
    """FLOP per second that the tensor units could do in bfloat16 at the clock of a launch."""
    per_clock: float = device["SMs"] * device["SM_flops_per_clock"]["bfloat16"]
    return per_clock * 1e9 * row["clocks"] / row["duration_ns"]


def _left_to_products(recording: Recording, row: Row, device: Mapping[str, Any]) -> str:
    """Nearer to the roof of arithmetic: what the tensor units do of what they could at the clock that the launch had."""
    clock, ceiling, share = clock_ghz(row) or 0.0, product_ceiling(row, device) / 1e12, row["tensor_percent"] / 100
    sheet = device["ceilings"]["datasheet"]["flops_per_s"]["bfloat16"] / 1e12
    clocks = {each["launch"]: clock_ghz(each) or 0.0 for each in recording.rows if _cell(each) == _cell(row)}
    fastest = max(clocks, key=lambda launch: clocks[launch])
    beside = f"; {fastest} alone runs at {clocks[fastest]:.2f} GHz" if fastest != WHOLE else ""
    return (
        f"{_name(row)}: the tensor units do {share * ceiling:.0f} TFLOP/s, padding included, of the {ceiling:.0f} that a clock "
        f"of {clock:.2f} GHz allows (the datasheet’s: {sheet:.0f}{beside}), which leaves {100 - 100 * share:.0f} %."
    )


def _left_to_memory(row: Row, at: Ceilings) -> str:
    """Nearer to the roof of memory: how far from its peak, and from what a copy was measured to reach."""
    rate, copy = _rate(row) or 0.0, at.copy_bytes_per_s / 1e12
    return (
        f"{_name(row)}: memory is at {row['memory_percent']:.0f} % of its peak, {rate:.2f} TB/s, which is "
        f"{100 * rate / copy:.0f} % of the {copy:.2f} TB/s that a copy was measured to reach."
    )
