"""The host's time of a whole layer in eager mode beside the GPU's: to scale, by implementation, and by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moelab.plots import ratio_map
from moelab.plots.cells import CLEARLY, names_of, span, timed
from moelab.plots.panel import Panel, timing
from moelab.plots.style import GREY, SERIES, grid, look
from moelab.plots.style import STEPS as STEP_COLORS
from moelab.plots.tma_overhead import PLAIN, times
from moelab.recordings import Recording

STEPS = {
    "align": ("step", "align", STEP_COLORS["align"]),
    "GEMM1": ("launch", PLAIN, STEP_COLORS["GEMM1"]),
    "activation": ("step", "activation", STEP_COLORS["activation"]),
    "GEMM2": ("launch", PLAIN, STEP_COLORS["GEMM2"]),
    "sum-reduce": ("step", "sum_reduce", STEP_COLORS["sum-reduce"]),
}
"""Steps of the classic layer in order: what was timed for each (GEMM2 is GEMM1's kernel), and its colour."""

DRAWN = 2
"""Layers in the timeline: more than one, so that a wait lies between two; the same for all, so that shorter is faster."""

REST, WHOLE = "fused_moe’s own", "a whole layer"
SGLANG = "sglang’s launcher"
GRAPH, WALL = "GPU in a graph, µs", "eager wall, µs"


@dataclass(frozen=True)
class Lane:
    """One layer after another: what the host does for one (name, microseconds, colour), and the GPU's microseconds."""

    name: str
    parts: tuple[tuple[str, float, str], ...]
    gpu_us: float

    @property
    def host_us(self) -> float:
        """Host time of a layer."""
        return math.fsum(us for _, us, _ in self.parts)

    @property
    def period_us(self) -> float:
        """From one layer to the next: the slower of the two sets the pace."""
        return max(self.host_us, self.gpu_us)

    @property
    def waits_us(self) -> float:
        """How long the GPU waits for the host, each layer."""
        return max(0.0, self.host_us - self.gpu_us)


def gpu_us(baseline: Recording, shape: str, impl: str, num_tokens: int) -> float | None:
    """Median of a layer in a CUDA graph, where that was recorded."""
    found = [row for row in baseline.select(shape=shape, impl=impl, num_tokens=num_tokens) if "samples_us" in row]
    return timing(found[0]).median_us if found else None


def lanes(recording: Recording, baseline: Recording, shape: str, peers: Mapping[str, Any]) -> list[Lane]:
    """The classic layer, the pipeline with the least host time, sglang's; each with its GPU time of one token of `shape`.

    A pipeline past its error bound, or one without a GPU time, is no candidate.
    """
    layers, found = times(recording, "layer"), []
    sound = {row["name"] for row in recording.select(kind="layer") if row["within_bound"]}
    gpu = {name: us for name in layers if name in sound and (us := gpu_us(baseline, shape, name, 1)) is not None}
    least = min(gpu, key=lambda name: layers[name].median_us)
    for name in dict.fromkeys(("triton", least)):
        parts = _steps(recording) if name == "triton" else ()
        rest = layers[name].median_us - math.fsum(us for _, us, _ in parts)
        whole = (REST, rest, GREY) if parts else (WHOLE, rest, look(name).color)
        found.append(Lane(name, (*parts, whole) if rest > 0 else parts, gpu[name]))
    peer = next(row for row in peers["rows"] if row["kind"] == "layer")
    found.append(Lane(SGLANG, ((WHOLE, float(peer["us"]), look("sglang").color),), float(peer["gpu_us"])))
    return found


def _steps(recording: Recording) -> tuple[tuple[str, float, str], ...]:
    by_kind = {kind: times(recording, kind) for kind in ("launch", "step")}
    return tuple((name, by_kind[kind][row].median_us, color) for name, (kind, row, color) in STEPS.items())


def timeline(recording: Recording, baseline: Recording, shape: str, peers: Mapping[str, Any]) -> Panel:
    """As many layers of one token with each launcher, one after another, host above GPU, drawn to scale."""
    drawn = lanes(recording, baseline, shape, peers)
    figure = grid(f"Who waits for whom: {DRAWN} layers of one token, launched eagerly", f"host: {recording.source()}<br>GPU: "
                  f"recording layer_baseline, {shape}, in a CUDA graph, drawn in one piece a layer<br>{SGLANG}: "
                  f"{peers['source']}", height=216 + 95 * len(drawn))  # fmt: skip
    window = DRAWN * max(lane.period_us for lane in drawn)
    named: set[str] = set()
    for lane in drawn:
        starts = [i * lane.period_us for i in range(DRAWN)]
        host, gpu = (
            f"{lane.name}: host",
            "GPU" + "\u200b" * drawn.index(lane),
        )  # a category of its own, the same to read
        at = 0.0
        for name, us, color in lane.parts:
            _blocks(figure, host, [s + at for s in starts], us, name, color, named)
            at += us
        _blocks(figure, gpu, starts, lane.gpu_us, "GPU busy", SERIES[5].color, named)
        _blocks(figure, gpu, [s + lane.gpu_us for s in starts], lane.waits_us, "GPU waits", "", named)
        end = starts[-1] + lane.period_us
        said = (f" {lane.host_us:.0f} µs a layer", f" busy {lane.gpu_us:.0f}, waits {lane.waits_us:.0f} µs")
        figure.add_scatter(x=[end, end], y=[host, gpu], mode="text", text=said, textposition="middle right",
                           showlegend=False, hoverinfo="skip")  # fmt: skip
    figure.update_layout(barmode="overlay", bargap=0.15, legend={"orientation": "h", "y": -0.2, "traceorder": "normal"})
    figure.update_xaxes(title="µs, from the host’s start with the first layer", range=[0, 1.24 * window])
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    table = [
        {"one layer of one token": lane.name, "host, µs": lane.host_us}
        | {name: us for name, us, _ in lane.parts if len(lane.parts) > 1}
        | {"GPU, µs": lane.gpu_us, "GPU waits, µs": lane.waits_us, "share of the time": lane.waits_us / lane.period_us}
        for lane in drawn
    ]  # fmt: skip
    classic = drawn[0]
    graphs = [gpu_us(baseline, shape, "triton", 1) for shape in names_of(baseline.rows, "shape")]
    known = [us for us in graphs if us is not None]
    rest = sum(us for name, us, _ in classic.parts if name == REST)
    sentence = (
        f"**{_waiting(classic)}** fused_moe’s own part of the host’s time: {rest:.1f} µs. Over the recorded shapes the GPU needs "
        f"{min(known):.0f} to {max(known):.0f} µs for one token. {' '.join(_waiting(lane) for lane in drawn[1:])} In a CUDA "
        "graph the host drops out."
    )
    return Panel(figure, table, sentence)


def _blocks(figure: Any, lane: str, starts: list[float], us: float, name: str, color: str, named: set[str]) -> None:
    if us <= 0:
        return
    marker: dict[str, Any] = {"color": color, "line": {"width": 0.8, "color": "#f7f7f7"}}
    if not color:
        marker = {"color": "rgba(128, 128, 128, 0.12)", "line": {"width": 0.8, "color": GREY},
                  "pattern": {"shape": "/", "fgcolor": GREY, "size": 6, "solidity": 0.15}}  # fmt: skip
    figure.add_bar(y=[lane] * len(starts), x=[us] * len(starts), base=starts, orientation="h", name=name, marker=marker,
                   legendgroup=name, showlegend=name not in named and name != WHOLE, constraintext="none",
                   text=[f"layer {i}" for i in range(1, len(starts) + 1)] if name == WHOLE else None, textposition="inside",
                   insidetextanchor="middle", insidetextfont={"color": "#1c1c1c"},
                   hovertemplate=f"{name}: {us:.1f} µs<extra></extra>")  # fmt: skip
    named.add(name)


def _waiting(lane: Lane) -> str:
    if not lane.waits_us:
        return f"With {lane.name} the GPU never waits: {lane.gpu_us:.0f} µs a layer, the host {lane.host_us:.0f}."
    return (
        f"With {lane.name} the GPU waits {lane.waits_us:.0f} µs of every {lane.host_us:.0f} "
        f"({lane.waits_us / lane.period_us:.0%}): a layer of one token is {lane.gpu_us:.0f} µs of work."
    )


def layers(recording: Recording, baseline: Recording, shape: str, one: Recording | None = None) -> Panel:
    """Every pipeline's layer of one token: the host's time, the GPU's in a graph, and the wall's in eager mode.

    one: the recording fast_layer, for the GPU's time of *fast*, whose host time is not recorded.
    """
    found = sorted(recording.select(kind="layer"), key=lambda row: timing(row).median_us)
    figure = grid("A layer of one token, by implementation", f"host: {recording.source()}, medians, {recording.protocol['shape']}"
                  f"<br>GPU and eager wall time: {baseline.source()}, {shape}", height=190 + 34 * len(found))  # fmt: skip
    table: list[dict[str, Any]] = []
    for row in found:
        host, (low, high) = timing(row), timing(row).interval_us
        other = next(
            (r for r in baseline.select(shape=shape, num_tokens=1, impl=row["name"]) if "samples_us" in r), None
        )
        wall = timing({"samples_us": other["eager_samples_us"]}).median_us if other else None
        over = row["max_abs_error"] / row["bound"] if row["max_abs_error"] is not None else None
        table.append({
            "implementation": row["name"], "host, µs": host.median_us, "95 % low": low, "95 % high": high,
            "99th percentile": host.quantile_us(0.99), GRAPH: timing(other).median_us if other else None,
            WALL: wall, "error / bound": over, "within its bound": row["within_bound"],
        })  # fmt: skip
    fast = gpu_us(one, shape, "fast", 1) if one else None
    if fast:
        table.insert(0, {"implementation": "fast", "host, µs": None, GRAPH: fast, WALL: None, "within its bound": True})
    names = [row["implementation"] + ("" if row["within its bound"] else " (past its bound)") for row in table]
    pale = {"color": "#f7f7f7", "line": {"width": 1.2, "color": GREY}}
    figure.add_bar(y=names, x=[row["host, µs"] for row in table], orientation="h", name="host", width=0.62, showlegend=False,
                   marker={"color": [look(row["implementation"]).color for row in table]},
                   hovertemplate="%{y}: host %{x:.1f} µs<extra></extra>")  # fmt: skip
    figure.add_bar(
        y=names, x=[row[GRAPH] for row in table], orientation="h", name="GPU, in a CUDA graph", width=0.2, marker=pale
    )
    figure.add_scatter(y=names, x=[row[WALL] for row in table], mode="markers", name="wall, eagerly",
                       marker={"symbol": "diamond", "size": 10, **pale})  # fmt: skip
    ends = [max(row["host, µs"] or 0.0, row[WALL] or 0.0, row[GRAPH] or 0.0) for row in table]
    figure.add_scatter(y=names, x=ends, mode="text", text=[_ends(row) for row in table], showlegend=False,
                       textposition="middle right", hoverinfo="skip")  # fmt: skip
    figure.update_layout(barmode="overlay", legend={"orientation": "h", "y": -70 / (90 + 34 * len(found))})
    figure.update_xaxes(title="µs a layer; coloured bars: host", range=[0, 1.3 * max(ends)])
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    timed_here = [row for row in table if row["host, µs"]]
    sound = [row for row in timed_here if row["within its bound"]] or timed_here
    waits = sum(row[GRAPH] is not None and row[GRAPH] < row["95 % low"] for row in sound)
    past = [row["implementation"] for row in table if not row["within its bound"]]
    first_last = " to ".join(f"{row['host, µs']:.1f} µs ({row['implementation']})" for row in (sound[0], sound[-1]))
    said = (
        f"**Host time of a layer: {first_last}.** In {waits} of {sum(row[GRAPH] is not None for row in sound)} implementations "
        f"with both times the GPU is done before the host is.{f' Past its error bound: {chr(44).join(past)}.' if past else ''}"
    )
    if fast:
        said += f" fast: the GPU’s {fast:.1f} µs in a CUDA graph, recording fast_layer; its host time is not recorded."
    return Panel(figure, table, said)


def _ends(row: Mapping[str, Any]) -> str:
    """What stands behind a bar and its diamond: both numbers, each with its name."""
    if row["host, µs"] is None:
        return f"   GPU {row[GRAPH]:.1f}, host not recorded"
    return f"   host {row['host, µs']:.1f}" + (f", wall {row[WALL]:.1f} µs" if row[WALL] is not None else " µs")


def by_batch(recording: Recording, baseline: Recording) -> Panel:
    """Map of shape by batch: eager mode's time over a CUDA graph's, grey where the host hardly matters any more."""
    host = times(recording, "layer")["triton"].median_us
    found = [row for row in timed(baseline) if row["impl"] == "triton"]
    table: list[dict[str, Any]] = []
    for row in found:
        gpu, wall = span(row)[0], span(row, samples="eager_samples_us")[0]
        table.append(
            {"shape": row["shape"], "batch": row["num_tokens"], "GPU, µs": gpu, WALL: wall, "eager / GPU": wall / gpu}
        )
    shapes, batches = names_of(found, "shape"), sorted(names_of(found, "num_tokens"))
    ratios = {(row["shape"], row["batch"]): row["eager / GPU"] for row in table}
    cells = {
        (row["shape"], row["batch"]): ratio_map.Cell(
            row["eager / GPU"], f"{row['eager / GPU']:.2f}<br>{row['GPU, µs']:,.0f} µs", row["eager / GPU"] <= 1 + CLEARLY
        ) for row in table
    }  # fmt: skip
    figure = ratio_map.chart(
        "From which batch on the host does not matter: triton", f"{baseline.source()}, eager wall time over the GPU’s in a CUDA "
        f"graph, and that in µs, medians<br>grey: at most {CLEARLY:.0%} more, the host does not matter; a layer of "
        f"{recording.protocol['num_tokens']} token takes it {host:.0f} µs",
        cells, shapes, batches, tall=44, low=None, bar="eager / graph",
    )  # fmt: skip
    first = batches[0]
    small = [ratio for (_, batch), ratio in ratios.items() if batch == first]
    over = [row for row in table if row["GPU, µs"] >= host]
    turns = {shape: min((r["batch"] for r in over if r["shape"] == shape), default=None) for shape in shapes}
    said = "; ".join(f"{shape} {f'from batch {b} on' if b else 'at none'}" for shape, b in turns.items())
    most = (
        f" There eager mode takes at most {max(row['eager / GPU'] for row in over):.2f} times as long." if over else ""
    )
    return Panel(figure, table, f"**At batch {first} eager mode takes {min(small):.1f} to {max(small):.1f} times as long as a "
                 f"CUDA graph.** The GPU takes longer than the host’s {host:.0f} µs: {said}.{most}")  # fmt: skip
