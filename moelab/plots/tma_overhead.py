"""What the host does for one launch in eager mode, microsecond by microsecond, and what was reported end to end."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from moelab.plots.panel import Panel, timing
from moelab.plots.style import BETTER, GREY, SERIES, WORSE, grid, look
from moelab.recordings import Recording

if TYPE_CHECKING:  # it loads torch
    from moelab.measure import Measurement

PLAIN, KEPT, REBUILT, ALLOCATED = WAYS = (
    "no TMA",
    "TMA, kept descriptor",
    "TMA, descriptor each call",
    "TMA, allocator and descriptor each call",
)
"""The ways of one launch, each with one part more than the one before."""

THROUGH_TRITON = "no TMA, through Triton"
PARTS = ("the launch", "a descriptor among the arguments", "descriptor made", "allocator set")
"""What each of WAYS adds to the one before."""

ALONE = ("descriptor alone", "set_allocator alone")
GOALS_US = {
    "a kept descriptor, over no TMA": 4.0,
    "one launch of the classic kernel": 30.0,
    "a layer of one token through fused_moe": 80.0,
}
"""Set for this package before anything was measured, on an H200's host, checks of the arguments included."""

LOOKS = {
    PLAIN: look("classic"),
    KEPT: look("tma"),
    REBUILT: SERIES[1],
    ALLOCATED: SERIES[3],
    THROUGH_TRITON: SERIES[4],
}


def times(recording: Recording, kind: str) -> dict[str, Measurement]:
    """Name -> host time of a call, of one kind of row ("launch", "step", "layer")."""
    return {row["name"]: timing(row) for row in recording.select(kind=kind)}


def difference(more: Measurement, less: Measurement) -> tuple[float, float, float]:
    """Difference of the medians, microseconds, and the widest interval that both 95 % intervals allow."""
    (low, high), (below, above) = more.interval_us, less.interval_us
    return more.median_us - less.median_us, low - above, high - below


# --- one launch ---------------------------------------------------------------------------------------------------


def launches(recording: Recording, peers: Mapping[str, Any]) -> Panel:
    """Host time of one launch by each way, part by part, and below it sglang's launcher by the same ways.

    peers: data/upstream/h200_sglang_host.json.
    """
    ours = times(recording, "launch")
    theirs = {row["name"]: float(row["us"]) for row in peers["rows"] if row["kind"] == "launch"}
    figure = grid("What the host does for one launch", f"{recording.source()}, medians of "
                  f"{len(ours[PLAIN].samples_us):,} calls<br>below: {peers['source']}, another host, medians only",
                  titles=["moelab", "sglang’s own launcher"], rows=2, height=560)  # fmt: skip
    figure.update_layout(barmode="overlay", legend={"orientation": "h", "y": -0.16, "traceorder": "normal"})
    here = {name: ours[name].median_us for name in (*WAYS, THROUGH_TRITON)}
    for line, found in enumerate((here, theirs), start=1):
        _stack(figure, found, line)
    top = 1.6 * max(*here.values(), *(theirs[way] for way in WAYS))
    figure.update_xaxes(range=[0, top])
    figure.update_xaxes(title="host time of one launch, µs", row=2)
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    table = [
        {
            "host time of one call": name, "µs": time.median_us, "95 % low": time.interval_us[0],
            "95 % high": time.interval_us[1], "99th percentile": time.quantile_us(0.99),
            "over no TMA": time.median_us - ours[PLAIN].median_us if name in WAYS else None,
            "sglang’s launcher": theirs.get(name),
            "sglang’s, over no TMA": theirs[name] - theirs[PLAIN] if name in WAYS else None,
        }
        for name, time in ((name, ours[name]) for name in (THROUGH_TRITON, *WAYS, *ALONE))
    ]  # fmt: skip
    added = [_told(difference(ours[b], ours[a])) for a, b in pairwise(WAYS)]
    each = "; ".join(f"{part} {us}" for part, us in zip(PARTS[1:], added, strict=True))
    peer = ", ".join(_signed(theirs[b] - theirs[a]) for a, b in pairwise(WAYS))
    said = (
        f"**One launch keeps the host busy for {ours[PLAIN].median_us:.1f} µs; added by {each}.** Triton’s own path to the same "
        f"kernel: {ours[THROUGH_TRITON].median_us:.1f} µs. sglang’s launcher: {theirs[PLAIN]:.1f} µs without TMA, then {peer}."
    )
    return Panel(figure, table, said)


def _stack(figure: Any, found: Mapping[str, float], line: int) -> None:
    """One bar per way, a segment per part; what it sums up to at its end."""
    looks = list(LOOKS.values())
    for index, (part, style) in enumerate(zip(PARTS, looks, strict=False)):
        rows = WAYS[index:]
        base = found[WAYS[index - 1]] if index else 0.0
        length = found[WAYS[index]] - base
        figure.add_bar(y=list(rows), x=[length] * len(rows), base=[base] * len(rows), orientation="h", name=part, width=0.6,
                       marker={"color": style.color}, legendgroup=part, showlegend=line == 1, row=line, col=1,
                       hovertemplate=f"{part}: {length:.2f} µs<extra></extra>")  # fmt: skip
    if THROUGH_TRITON in found:
        figure.add_bar(y=[THROUGH_TRITON], x=[found[THROUGH_TRITON]], orientation="h", name="the launch, by Triton’s own path",
                       width=0.6, marker={"color": GREY}, row=line, col=1)  # fmt: skip
    shown = [name for name in (*WAYS, THROUGH_TRITON) if name in found]
    figure.add_scatter(y=shown, x=[found[name] for name in shown], mode="text", text=[_sum(found, name) for name in shown],
                       textposition="middle right", showlegend=False, hoverinfo="skip", row=line, col=1)  # fmt: skip


def _sum(found: Mapping[str, float], name: str) -> str:
    if name not in WAYS[1:]:
        return f" <b>{found[name]:.1f} µs</b>"
    ways = WAYS[: WAYS.index(name) + 1]
    steps = [found[b] - found[a] for a, b in pairwise(ways)]
    return f" <b>{found[name]:.1f} µs</b> = {found[PLAIN]:.1f}" + "".join(f" {_signed(step)}" for step in steps)


def _signed(value: float) -> str:
    return f"{'−' if value < 0 else '+'} {abs(value):.1f}"


def _told(found: tuple[float, float, float]) -> str:
    middle, low, high = found
    return f"{'a tie with 0' if low <= 0 <= high else f'{middle:.2f} µs'} ({low:.2f} to {high:.2f})"


def spread(recording: Recording) -> Panel:
    """Share of calls that took at most so long, a line per way of launching: every sample, up to the 99th percentile."""
    ours = times(recording, "launch")
    names = [name for name in LOOKS if name in ours]
    figure = grid("How much one launch differs from the next", f"{recording.source()}; every sample of "
                  f"{len(ours[PLAIN].samples_us):,} calls, up to the 99th percentile; dotted: the median")  # fmt: skip
    table: list[dict[str, Any]] = []
    shares = [0.99 * i / 200 for i in range(201)]
    for name in names:
        time, style = ours[name], LOOKS[name]
        figure.add_scatter(x=[time.quantile_us(q) for q in shares], y=shares, name=name, mode="lines", line=style.line(2.5),
                           hovertemplate=f"{name}: %{{y:.0%}} of calls within %{{x:.1f}} µs<extra></extra>")  # fmt: skip
        figure.add_scatter(x=[time.median_us], y=[0.5], mode="markers", marker=style.marker(9), showlegend=False,
                           hoverinfo="skip")  # fmt: skip
        table.append({
            "one launch": name, "fastest, µs": min(time.samples_us), "1 in 20 within": time.quantile_us(0.05),
            "median": time.median_us, "19 in 20 within": time.quantile_us(0.95), "99th percentile": time.quantile_us(0.99),
            "slowest": max(time.samples_us), "99th / median": time.quantile_us(0.99) / time.median_us,
        })  # fmt: skip
    figure.add_hline(0.5, line={"color": GREY, "dash": "dot", "width": 1})
    figure.update_xaxes(title="host time of one launch, µs")
    figure.update_yaxes(title="share of calls within that time", tickformat=".0%", range=[0, 1.02])
    worst, plain = max(table, key=lambda row: row["99th / median"]), table[names.index(PLAIN)]
    return Panel(figure, table, f"**Without TMA 19 of 20 launches take at most {plain['19 in 20 within']:.1f} µs, median "
                 f"{plain['median']:.1f}.** The longest tail is {worst['one launch']}’s: one in a hundred over "
                 f"{worst['99th percentile']:.1f} µs, {worst['99th / median']:.2f} times its median.")  # fmt: skip


def goals(recording: Recording) -> Panel:
    """The most that a kept descriptor, a launch and a layer were meant to cost the host; and whether they keep to it."""
    launch, layer = times(recording, "launch"), times(recording, "layer")["triton"]
    added, low, high = difference(launch[KEPT], launch[PLAIN])
    found = {
        "a kept descriptor, over no TMA": (added, low, high),
        "one launch of the classic kernel": (launch[PLAIN].median_us, *launch[PLAIN].interval_us),
        "a layer of one token through fused_moe": (layer.median_us, *layer.interval_us),
    }
    table: list[dict[str, Any]] = [
        {"host time of": what, "at most, µs": GOALS_US[what], "measured, µs": us, "95 % low": low, "95 % high": high,
         "kept": high <= GOALS_US[what]}
        for what, (us, low, high) in found.items()
    ]  # fmt: skip
    said = "; ".join(
        f"{row['host time of']} {row['measured, µs']:.1f} µs of at most {row['at most, µs']:g}" for row in table
    )
    missed = sum(not row["kept"] for row in table)
    return Panel(
        None, table, f"**{'All goals are kept' if not missed else f'{missed} of {len(table)} goals missed'}: {said}.**"
    )


# --- the end-to-end figures of the pull request -------------------------------------------------------------------


def gains(reported: Mapping[str, Any], peers: Mapping[str, Any]) -> Panel:
    """What sglang #18782 reports end to end, and the most that a launch's two savings could give.

    reported: data/upstream/tma_host_overhead.json. peers: data/upstream/h200_sglang_host.json.
    """
    table: list[dict[str, Any]] = []
    for row in reported["rows"]:
        change = row["after"] / row["before"] - 1
        better = 100 * (change if row["better"] == "higher" else -change)
        table.append({"metric": row["metric"], "unit": row["unit"], "before": float(row["before"]),
                      "after": float(row["after"]), "change": _percent(change), "better by, %": better})  # fmt: skip
    figure = grid("What the two savings gave end to end, as reported", f"reported in {reported['source']}, not measured here:"
                  f"<br>{reported['what'].partition(':')[0]}", height=400)  # fmt: skip
    figure.add_bar(y=[row["metric"] for row in table], x=[row["better by, %"] for row in table], orientation="h",
                   marker={"color": [BETTER if row["better by, %"] > 0 else WORSE for row in table]}, showlegend=False,
                   text=[f" {row['before']:,g} → {row['after']:,g} {row['unit']} ({row['change']})" for row in table],
                   textposition="outside", cliponaxis=False, hoverinfo="skip")  # fmt: skip
    figure.update_xaxes(title="better by, %", range=[0, 2.1 * max(row["better by, %"] for row in table)])
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    theirs = {row["name"]: float(row["us"]) for row in peers["rows"]}
    before, after = theirs[ALLOCATED], theirs[KEPT]
    ends = " to ".join(f"{row['better by, %']:.1f} % ({row['metric']})" for row in (
        min(table, key=lambda row: row["better by, %"]), max(table, key=lambda row: row["better by, %"])))  # fmt: skip
    said = (
        f"**Reported, for the better by {ends}.** In sglang’s launcher on an H200’s host both savings take a launch from "
        f"{before:.1f} to {after:.1f} µs: at most {100 * (before / after - 1):.1f} % of throughput for a server that waits for "
        "nothing else. How much of its time that server spent in launches was not reported."
    )
    return Panel(figure, table, said)


def _percent(change: float) -> str:
    return f"{'−' if change < 0 else '+'}{100 * abs(change):.1f} %"
