"""The Split-K map: where it wins, by which kind, and what it costs in error and in repeatability."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moelab.errors import counted
from moelab.plots.panel import Panel, Row, geometric_mean, timing
from moelab.plots.style import GREY, SERIES, error_bars, grid, log_axis, powers, series
from moelab.recordings import Recording
from moelab.shapes import MoEShape

CLASSIC = ("classic", 1)
KINDS = ("atomic_f32", "atomic_out", "workspace")
SHORT = {"atomic_f32": "f32", "atomic_out": "out", "workspace": "ws"}
"""Each kind's name in a cell of the map."""

CLEARLY = 0.05  # a win that another run, or another machine of the kind, will hardly turn
_COLORS = [[0.0, "#0072B2"], [0.5, "#f7f7f7"], [1.0, "#D55E00"]]
_INT32 = 2**31


def _cells(rows: Iterable[Row]) -> dict[tuple[str, str, int], dict[tuple[str, int], Row]]:
    """(shape, stage, batch) -> (variant, SPLIT_K) -> row, without what was skipped."""
    cells: dict[tuple[str, str, int], dict[tuple[str, int], Row]] = {}
    for row in rows:
        if "skipped" not in row:
            cell = cells.setdefault((row["shape"], row["stage"], row["num_tokens"]), {})
            cell[row["variant"], row["split_k"]] = row
    return cells


def _verdict(ours: Any, rival: Any) -> str:
    from moelab.measure import tie

    if tie(ours, rival):
        return "tie"
    return "win" if ours.median_us < rival.median_us else "loss"


def outcomes(recording: Recording, shapes: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """One row per cell: its best Split-K (SPLIT_K > 1, any kind), the classic kernel, and the same kind unsplit.

    A result past its error bound is not in the contest, however fast; "faster, past the bound" says that one would have
    been the fastest.
    """
    found = []
    for (shape, stage, batch), cell in _cells(recording.rows).items():
        if shapes is not None and shape not in shapes:
            continue
        timed = {key: timing(row) for key, row in cell.items() if key[1] > 1}
        split = {key: time for key, time in timed.items() if cell[key]["within_bound"]}
        if CLASSIC not in cell or not split:
            continue
        key = min(split, key=lambda k: split[k].median_us)
        best, classic, unsplit = split[key], timing(cell[CLASSIC]), timing(cell[key[0], 1])
        found.append({
            "shape": shape, "stage": stage, "batch": batch, "kind": key[0], "SPLIT_K": key[1],
            "Split-K, µs": best.median_us, "classic, µs": classic.median_us,
            "classic BLOCK_SIZE_N": cell[CLASSIC]["config"]["BLOCK_SIZE_N"],
            "Split-K / classic": best.median_us / classic.median_us, "verdict": _verdict(best, classic),
            "same kind, SPLIT_K = 1 / classic": unsplit.median_us / classic.median_us,
            "Split-K / same kind, SPLIT_K = 1": best.median_us / unsplit.median_us,
            "against SPLIT_K = 1": _verdict(best, unsplit),
            "faster, past the bound": "yes" if min(t.median_us for t in timed.values()) < best.median_us else "",
            "distinct outputs": cell[key]["distinct"],
        })  # fmt: skip
    return found


def win_map(recording: Recording, shapes: Sequence[str], title: str = "Best Split-K over best classic kernel") -> Panel:
    """Heat map of shape and stage by batch: median time of the best Split-K over that of the classic kernel."""
    table = outcomes(recording, shapes)
    names = [f"{shape}, {stage}" for stage in ("up", "down") for shape in shapes]
    batches = sorted({row["batch"] for row in table})
    source = (f"{recording.source()}, ratio of medians; ws: workspace, f32 and out: atomics in float32, in the output’s dtype; "
              "×: SPLIT_K<br>blue: Split-K is faster; grey: a tie, the 95 % intervals overlap; "
              "both with the fastest tile of their own, and within the error bound")  # fmt: skip
    figure = grid(title, source, height=190 + 27 * len(names))
    at = {(f"{row['shape']}, {row['stage']}", row["batch"]): row for row in table}

    ratio = "Split-K / classic"
    span = max([abs(row[ratio] - 1) for row in table] + [0.05])
    for tie in (False, True):
        z = [[row[ratio] if row and (row["verdict"] == "tie") is tie else None for row in (at.get((name, b)) for b in batches)]
             for name in names]  # fmt: skip
        figure.add_heatmap(
            x=[str(b) for b in batches], y=names, z=z, xgap=2, ygap=2, zmin=1 - span, zmax=1 + span, showscale=not tie,
            colorscale=[[0, "#bdbdbd"], [1, "#bdbdbd"]] if tie else _COLORS, hoverinfo="skip",
            colorbar={"title": {"text": "time ratio"}, "outlinewidth": 0, "thickness": 14},
        )  # fmt: skip
    dark = [row["verdict"] != "tie" and abs(row[ratio] - 1) > 0.8 * span for row in table]
    figure.add_scatter(
        x=[str(row["batch"]) for row in table], y=[f"{row['shape']}, {row['stage']}" for row in table], mode="text",
        text=[_label(row) for row in table], textfont={"size": 11, "color": ["#fff" if d else "#222" for d in dark]},
        hovertemplate="%{y}, batch %{x}: %{text}<extra></extra>", showlegend=False,
    )  # fmt: skip
    figure.update_xaxes(title="batch, tokens", type="category", showgrid=False)
    figure.update_yaxes(title="shape, GEMM", autorange="reversed", showgrid=False, automargin=True)
    return Panel(figure, table, _said_of(table))


def _label(row: Row) -> str:
    return f"{row['Split-K / classic']:.2f} {SHORT[row['kind']]}×{row['SPLIT_K']}"


def _said_of(table: Sequence[Row]) -> str:
    """Wins, ties, losses; the largest gain; by batch; by kind; and what of it is the fused second step."""
    ratio, count = "Split-K / classic", Counter(row["verdict"] for row in table)
    wins = [row for row in table if row["verdict"] == "win"]
    head = (
        f"**Of {counted(len(table), 'cell')} Split-K wins {count['win']}, ties {count['tie']} and loses {count['loss']}"
    )
    worst = max(table, key=lambda row: row[ratio])
    slowest = f"The worst is {worst[ratio]:.2f} ({_where(worst)}, {worst['kind']}, SPLIT_K = {worst['SPLIT_K']})."
    if not wins:
        return f"{head}.** {slowest}"
    best = min(wins, key=lambda row: row[ratio])
    clear = sum(row[ratio] <= 1 - CLEARLY for row in wins)
    kinds = Counter(row["kind"] for row in wins)
    batches = sorted({row["batch"] for row in table})
    by_batch = ", ".join(
        f"{sum(r['batch'] == b for r in wins)}/{sum(r['batch'] == b for r in table)} at {b}" for b in batches
    )
    fused = sum(row["against SPLIT_K = 1"] != "win" for row in wins)
    barred = sum(bool(row["faster, past the bound"]) for row in table)
    return (
        f"{head}; at best it takes {best[ratio]:.2f} of the classic kernel’s time ({_where(best)}, {best['kind']}, SPLIT_K = "
        f"{best['SPLIT_K']}).** The gain is {100 * CLEARLY:g} % or more in {clear} of the {counted(len(wins), 'win')}; each is "
        f"the best of up to a dozen candidates against one, which flatters Split-K where the gain is small. {slowest} Wins by "
        f"batch: {by_batch}. By kind: "
        + ", ".join(f"{kind} {kinds[kind]}" for kind in KINDS)
        + f". In {fused} of the {counted(len(wins), 'win')} the same kind with SPLIT_K = 1 ties or is faster: what wins there is "
        "the second step that the kind fuses, not the split."
        + (f" In {counted(barred, 'cell')} something faster is left out, its error past the bound." if barred else "")
    )


def _where(row: Row) -> str:
    return f"{row['shape']}, {row['stage']}, batch {row['batch']}"


def by_split(recording: Recording, shape: str, stage: str, num_tokens: int) -> Panel:
    """One cell's time against SPLIT_K, a line per kind, beside the classic kernel's."""
    cell = _cells(recording.select(shape=shape, stage=stage, num_tokens=num_tokens))[shape, stage, num_tokens]
    figure = grid(f"Time against SPLIT_K: {shape}, {stage}, batch {num_tokens}", f"{recording.source()}, 95 % intervals; each "
                  "point with its own fastest tile")  # fmt: skip
    classic = timing(cell[CLASSIC])
    splits = sorted({split for _, split in cell})
    table: list[dict[str, Any]] = []
    for (variant, split), row in cell.items():
        time, config = timing(row), row["config"]
        table.append({
            "kind": variant, "SPLIT_K": split, "µs": time.median_us, "95 % low": time.interval_us[0],
            "95 % high": time.interval_us[1], "over classic": time.median_us / classic.median_us,
            "tile M×N×K": "×".join(str(config[f"BLOCK_SIZE_{axis}"]) for axis in "MNK"), "stages": config["num_stages"],
        })  # fmt: skip
    figure.add_hrect(*classic.interval_us, fillcolor=GREY, opacity=0.25, line_width=0)
    figure.add_scatter(x=splits, y=[classic.median_us] * len(splits), mode="lines", line={"color": GREY, "dash": "dot"},
                       name="classic, best tile")  # fmt: skip
    for kind, style in series(KINDS).items():
        mine = sorted((row for row in table if row["kind"] == kind), key=lambda row: row["SPLIT_K"])
        ys = [row["µs"] for row in mine]
        bars = error_bars(ys, [row["95 % low"] for row in mine], [row["95 % high"] for row in mine])
        figure.add_scatter(x=[row["SPLIT_K"] for row in mine], y=ys, error_y=bars, name=kind, mode="lines+markers",
                           line=style.line(), marker=style.marker())  # fmt: skip
    figure.update_xaxes(title="SPLIT_K", **log_axis(splits))
    figure.update_xaxes(ticktext=[str(s) for s in splits])
    figure.update_yaxes(title="µs, the whole step", rangemode="tozero")
    best = min(table, key=lambda row: row["µs"])
    if best["kind"] == "classic":
        return Panel(figure, table, f"**Here nothing beats the classic kernel: {classic.median_us:.2f} µs.**")
    unsplit = next(row for row in table if (row["kind"], row["SPLIT_K"]) == (best["kind"], 1))
    sentence = (
        f"**Fastest: {best['kind']} with SPLIT_K = {best['SPLIT_K']}, {best['µs']:.2f} µs, {best['over classic']:.2f} times the "
        f"classic kernel’s {classic.median_us:.2f} µs.** The same kind with SPLIT_K = 1 takes {unsplit['over classic']:.2f} "
        "times: the difference between the two is the split’s own."
    )
    return Panel(figure, table, sentence)


def error_and_spread(recording: Recording) -> Panel:
    """Error over bound, cells whose runs are bitwise equal, and the spread between runs, by kind and SPLIT_K."""
    rows = [row for row in recording.rows if "skipped" not in row]
    runs = max(row["runs"] for row in rows)
    figure = grid("What Split-K costs in error and in repeatability", f"{recording.source()}, {runs} runs a cell; bound: twice "
                  "torch’s own error against float64; left and right: the worst cell", titles=[
                      "largest error / bound", f"cells with {runs} equal runs", "largest spread / bound"], gap=0.12)  # fmt: skip
    table: list[dict[str, Any]] = []
    for kind in ("classic", *KINDS):
        for split in sorted({row["split_k"] for row in rows if row["variant"] == kind}):
            mine = [row for row in rows if (row["variant"], row["split_k"]) == (kind, split)]
            over = [row["max_abs_error"] / row["bound"] for row in mine]
            table.append({
                "kind": kind, "SPLIT_K": split, "cells": len(mine), "median error / bound": statistics.median(over),
                "largest error / bound": max(over), "past the bound": sum(not row["within_bound"] for row in mine),
                "all runs equal": sum(row["distinct"] == 1 for row in mine),
                "most distinct": max(row["distinct"] for row in mine),
                "largest spread": max(row["spread_abs"] for row in mine),
                "largest spread / bound": max(row["spread_abs"] / row["bound"] for row in mine),
            })  # fmt: skip
    splits = sorted({row["SPLIT_K"] for row in table})
    for kind, style in zip(("classic", *KINDS), (SERIES[3], *SERIES), strict=False):
        mine = [row for row in table if row["kind"] == kind]
        columns = ([row["largest error / bound"] for row in mine], [row["all runs equal"] / row["cells"] for row in mine],
                   [row["largest spread / bound"] for row in mine])  # fmt: skip
        for col, ys in enumerate(columns, start=1):
            figure.add_scatter(x=[row["SPLIT_K"] for row in mine], y=ys, name=kind, mode="lines+markers", line=style.line(),
                               marker=style.marker(), legendgroup=kind, showlegend=col == 1, row=1, col=col)  # fmt: skip
    for col, name in enumerate(("error / bound", "share of cells", "spread / bound"), start=1):
        figure.update_xaxes(title="SPLIT_K", **log_axis(splits), row=1, col=col)
        figure.update_yaxes(title=name, rangemode="tozero", row=1, col=col)
    figure.update_xaxes(ticktext=[str(s) for s in splits])
    figure.update_yaxes(tickformat=".0%", range=[-0.04, 1.08], row=1, col=2)
    figure.add_hline(1.0, line={"color": GREY, "dash": "dot"}, row=1, col=1)
    return Panel(figure, table, _said_of_spread(table, runs))


def _said_of_spread(table: Sequence[Row], runs: int) -> str:
    said = {}
    for kind in KINDS:
        mine = [row for row in table if row["kind"] == kind and row["SPLIT_K"] > 1]
        cells, equal, past = (sum(row[c] for row in mine) for c in ("cells", "all runs equal", "past the bound"))
        worst = max(row["largest spread / bound"] for row in mine)
        said[kind] = (equal == cells, f"{kind}: {equal} of {counted(cells, 'cell')} give {runs} equal runs, "
                      f"they spread over up to {worst:.2g} of the bound, {past or 'none'} past it")  # fmt: skip
    steady = [kind for kind, (equal, _) in said.items() if equal]
    head = (
        f"Bit for bit the same in every run, in every cell: {', '.join(steady)}"
        if steady
        else "No kind repeats its bits"
    )
    return f"**{head}.** With SPLIT_K > 1, {'; '.join(text for _, text in said.values())}."


def versus_upstream(recording: Recording, reported: Mapping[str, Any], kind: str = "atomic_out") -> Panel:
    """Time over the baseline of each one's own chip, by batch, at upstream's hidden sizes: ours as lines, theirs hollow."""
    hidden = sorted({row["hidden_size"] for row in reported["rows"]})
    splits = (2, 4, 8)
    figure = grid("Beside upstream’s Split-K: each over its own baseline", f"lines: {recording.source()}, {kind}, GEMM1 and "
                  f"GEMM2 steps added<br>hollow: reported on {reported['device']}, {reported['source']}; sizes other than hidden "
                  "are not named there", titles=[f"hidden {h}" for h in hidden], shared_y=True)  # fmt: skip
    cells, table = _cells(recording.rows), []
    for col, size in enumerate(hidden, start=1):
        theirs = {row["num_tokens"]: row for row in reported["rows"] if row["hidden_size"] == size}
        both = {b: [cells[f"upstream/hidden{size}", stage, b] for stage in ("up", "down")] for b in theirs}
        for split, style in series(splits).items():
            ours = {b: _sum(pair, (kind, split)) / _sum(pair, CLASSIC) for b, pair in both.items()}
            peer = {b: row[f"split_k_{split}"] / row["baseline"] for b, row in theirs.items()}
            figure.add_scatter(x=list(ours), y=list(ours.values()), name=f"SPLIT_K = {split}, here", mode="lines+markers",
                               line=style.line(), marker=style.marker(), legendgroup=f"{split}", showlegend=col == 1,
                               row=1, col=col)  # fmt: skip
            figure.add_scatter(x=list(peer), y=list(peer.values()), name=f"SPLIT_K = {split}, reported", mode="markers",
                               marker=style.marker(12, hollow=True), legendgroup=f"{split}", showlegend=col == 1,
                               row=1, col=col)  # fmt: skip
            table += [
                {"hidden": size, "batch": b, "SPLIT_K": split, "here": ours[b], "reported": peer[b]} for b in ours
            ]
        figure.update_xaxes(title="batch, tokens", **log_axis(list(theirs)), row=1, col=col)
        figure.update_xaxes(ticktext=[str(b) for b in theirs], row=1, col=col)
    figure.add_hline(1.0, line={"color": GREY, "dash": "dot"})
    figure.update_yaxes(title="time / own baseline", col=1)
    figure.update_layout(legend={"traceorder": "grouped"})
    means = "; ".join(f"SPLIT_K = {split}: {_mean(table, split, 'here'):.2f} here, {_mean(table, split, 'reported'):.2f} reported"
                      for split in splits)  # fmt: skip
    best, theirs_best = min(table, key=lambda r: r["here"]), min(table, key=lambda r: r["reported"])
    sentence = (
        f"**Geometric means over the baseline: {means}.** The best cell is {best['here']:.2f} here (hidden {best['hidden']}, "
        f"batch {best['batch']}, SPLIT_K = {best['SPLIT_K']}) and {theirs_best['reported']:.2f} as reported (hidden "
        f"{theirs_best['hidden']}, batch {theirs_best['batch']}, SPLIT_K = {theirs_best['SPLIT_K']})."
    )
    return Panel(figure, table, sentence)


def _mean(table: Sequence[Row], split: int, column: str) -> float:
    return geometric_mean([row[column] for row in table if row["SPLIT_K"] == split])


def _sum(pair: Sequence[Mapping[tuple[str, int], Row]], key: tuple[str, int]) -> float:
    return sum(float(timing(cell[key]).median_us) for cell in pair)


def as_int32(value: int) -> int:
    """What an int32 register holds where `value` was meant."""
    return (value + _INT32) % (2 * _INT32) - _INT32


def int32_limits(name: str, shape: MoEShape, splits: Sequence[int] = (1, 2, 4, 8, 16)) -> Panel:
    """From which batch on the largest element offset of each buffer of GEMM1 does not fit int32, and what it becomes."""
    N = shape.moe_intermediate_size * (2 if shape.gated else 1)
    row = shape.top_k * N  # elements of one token's pairs
    table: list[dict[str, Any]] = []
    figure = grid(f"Largest element offset of GEMM1’s buffers: {name}", f"arithmetic, no kernel: top_k = {shape.top_k}, N = {N}, "
                  f"K = {shape.hidden_size}, {shape.num_experts} experts; dotted: 2<sup>31</sup>, the end of int32")  # fmt: skip
    batches = [2**i for i in range(21)]
    for split, style in series(splits).items():
        what = "product, pairs × N" if split == 1 else f"workspace, {split} × pairs × N"
        first = (
            _INT32 // (split * row) + 1
        )  # the smallest batch whose last offset, split * batch * row - 1, is past int32
        table.append(_limit(what, first, split * first * row - 1))
        figure.add_scatter(
            x=batches, y=[split * b * row - 1 for b in batches], name=what, mode="lines", line=style.line()
        )
    weights = shape.num_experts * N * shape.hidden_size
    table.append(_limit("weights, experts × N × K", 1 if weights > _INT32 else None, weights - 1))
    figure.add_scatter(x=batches, y=[weights - 1] * len(batches), name="weights, experts × N × K", mode="lines",
                       line={"color": GREY, "width": 2})  # fmt: skip
    figure.add_hline(_INT32, line={"color": GREY, "dash": "dot"})
    figure.update_xaxes(title="batch, tokens", **powers(1, batches[-1]))
    figure.update_yaxes(title="largest offset, elements", **powers(row / 2, max(splits) * batches[-1] * row * 2))
    last, product = table[len(splits) - 1], table[0]
    fits = "do not fit either, whatever the batch" if weights > _INT32 else "still fit"
    sentence = (
        f"**With SPLIT_K = {splits[-1]} the workspace passes 2³¹ elements at batch {last['smallest batch past int32']:,}; the "
        f"product alone at {product['smallest batch past int32']:,}.** In int32 the offset {last['largest offset']:,} becomes "
        f"{last['in int32']:,}: memory ahead of the buffer, an illegal access at best. The weights’ {weights:,} elements {fits}. "
        "The kernels here compute these offsets in int64."
    )
    return Panel(figure, table, sentence)


def _limit(what: str, batch: int | None, offset: int) -> dict[str, Any]:
    return {"buffer": what, "smallest batch past int32": batch, "largest offset": offset, "in int32": as_int32(offset)}
