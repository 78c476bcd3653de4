"""The Split-K map: where it wins, by which kind, and what it costs in error and in repeatability."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pandas as pd

from moelab import roofline
from moelab.errors import counted
from moelab.plots import ratio_map
from moelab.plots.cells import CLEARLY, cells_of, conclude, extremes, left_out, line, names_of, span, trace, verdict
from moelab.plots.panel import Panel, Row, geometric_mean, timing
from moelab.plots.style import GREY, SERIES, SIDES, WRONG, Look, grid, log_axis, look, series
from moelab.recordings import Recording
from moelab.shapes import MoEShape

CLASSIC = ("classic", 1)
RATIO = "Split-K / classic"
KINDS = ("atomic_f32", "atomic_out", "workspace")
LOOKS: dict[str, Look] = {
    "classic": look("classic"), "atomic_f32": look("split_k_atomic"), "atomic_out": SERIES[5],
    "workspace": look("split_k_workspace"),
}  # fmt: skip
SHORT = {"atomic_f32": "f32", "atomic_out": "out", "workspace": "ws"}
"""Each kind's name in a cell of the map."""

_INT32 = 2**31


def _cells(rows: Iterable[Row]) -> dict[Any, dict[tuple[str, int], Row]]:
    """(shape, stage, batch) -> (variant, SPLIT_K) -> row, without what was skipped."""
    found = [row | {"key": (row["variant"], row["split_k"])} for row in map(dict, rows) if "skipped" not in row]
    return cells_of(found, "shape", "stage", "num_tokens", by="key")


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
            RATIO: best.median_us / classic.median_us, "verdict": verdict(best, classic),
            "same kind, SPLIT_K = 1 / classic": unsplit.median_us / classic.median_us,
            "Split-K / same kind, SPLIT_K = 1": best.median_us / unsplit.median_us,
            "against SPLIT_K = 1": verdict(best, unsplit),
            "faster, past the bound": "yes" if min(t.median_us for t in timed.values()) < best.median_us else "",
            "distinct outputs": cell[key]["distinct"],
        })  # fmt: skip
    return found


def win_map(recording: Recording, shapes: Sequence[str], title: str = "Best Split-K over best classic kernel") -> Panel:
    """Heat map of shape and stage by batch: median time of the best Split-K over that of the classic kernel."""
    table = outcomes(recording, shapes)
    cells = {
        (f"{row['shape']}, {row['stage']}", row["batch"]): ratio_map.Cell(
            row[RATIO], f"{row[RATIO]:.2f} {SHORT[row['kind']]}×{row['SPLIT_K']}", row["verdict"] == "tie"
        )
        for row in table
    }
    source = (f"{recording.source()}, ratio of medians; ws: workspace, f32 and out: atomics in float32, in the output’s dtype; "
              "×: SPLIT_K<br>green: Split-K is faster; orange: the classic kernel is; grey: a tie, the 95 % intervals overlap; "
              "both with the fastest tile of their own, and within the error bound")  # fmt: skip
    figure = ratio_map.chart(
        title, source, cells, [f"{shape}, {stage}" for stage in ("up", "down") for shape in shapes],
        sorted(names_of(table, "batch")), y="shape, GEMM", bar="time ratio", size=11,
    )  # fmt: skip
    count = Counter(row["verdict"] for row in table)
    wins = [row for row in table if row["verdict"] == "faster"]
    kinds, at = Counter(row["kind"] for row in wins), Counter(row["batch"] for row in table)
    head = f"Of {counted(len(table), 'cell')} Split-K wins {count['faster']}, ties {count['tie']} and loses {count['slower']}."
    facts: dict[str, Any] = {"Over the classic kernel": extremes(table, lambda row: row[RATIO], at=_where)}
    if wins:
        clear, fused = (
            sum(row[RATIO] <= 1 - CLEARLY for row in wins),
            sum(row["against SPLIT_K = 1"] != "faster" for row in wins),
        )
        facts |= {
            f"Wins of {CLEARLY:.0%} or more, each the best of up to a dozen candidates against one": f"{clear}",
            "By batch": [f"{sum(row['batch'] == b for row in wins)}/{at[b]} at {b}" for b in sorted(at)],
            "By kind": [f"{kind} {kinds[kind]}" for kind in KINDS],
            "The fused second step wins, not the split: the same kind with SPLIT_K = 1 ties or is faster": f"in {fused}",
        }
    said = conclude(head, facts) + left_out(sum(bool(row["faster, past the bound"]) for row in table))
    return Panel(figure, table, said)


def _where(row: Row) -> str:
    return f"{row['shape']}, {row['stage']}, batch {row['batch']}, {row['kind']}, SPLIT_K = {row['SPLIT_K']}"


BUSY = (0.125, 0.25, 0.5, 1, 2, 4)
"""Tiles an SM of the classic kernel, BLOCK_SIZE_N columns each: the ends of the map's columns."""


def tiles_an_sm(shape: MoEShape, stage: str, num_tokens: int, sms: int, columns: int = 128) -> float:
    """How many tiles of so many columns each SM would get without a split, one tile of rows an expert touched."""
    width = shape.hidden_size if stage == "down" else shape.moe_intermediate_size * (2 if shape.gated else 1)
    return roofline.experts_touched(shape.num_experts, shape.top_k, num_tokens) * math.ceil(width / columns) / sms


def tiled(recording: Recording, shapes: Mapping[str, MoEShape], sms: int) -> list[dict[str, Any]]:
    """`outcomes` with the tiles an SM of each cell."""
    return [row | {"tiles an SM": tiles_an_sm(shapes[row["shape"]], row["stage"], row["batch"], sms)}
            for row in outcomes(recording, list(shapes))]  # fmt: skip


def when(recording: Recording, shapes: Mapping[str, MoEShape], sms: int) -> Panel:
    """When to use Split-K: map of GEMM by tiles an SM, the best Split-K's time over the classic kernel's, geometric mean."""
    rows = tiled(recording, shapes, sms)
    ends = [*BUSY, math.inf]
    names = [f"under {ends[0]:g}", *(f"{a:g} to {b:g}" for a, b in pairwise(BUSY)), f"over {BUSY[-1]:g}"]
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["stage"], names[bisect.bisect_right(BUSY, row["tiles an SM"])]), []).append(row)
    cells, table = {}, []
    for (stage, busy), of in found.items():
        mean, wins = geometric_mean([row[RATIO] for row in of]), sum(row["verdict"] == "faster" for row in of)
        cells[stage, busy] = ratio_map.Cell(mean, f"{mean:.2f}<br>{wins} of {len(of)} win", False)
        table.append({"GEMM": stage, "tiles an SM": busy, "cells": len(of), "Split-K is faster": wins,
                      "slower": sum(row["verdict"] == "slower" for row in of), "geometric mean over classic": mean,
                      "least": min(row[RATIO] for row in of), "most": max(row[RATIO] for row in of)})  # fmt: skip
    table.sort(key=lambda row: (row["GEMM"] != "up", names.index(row["tiles an SM"])))
    figure = ratio_map.chart(
        "Split-K pays where tiles are fewer than SMs", f"{recording.source()}, the best Split-K’s time over the best classic "
        f"kernel’s, geometric mean<br>tiles an SM: experts touched × columns / 128, over {sms} SMs; green: Split-K is faster",
        cells, ["up", "down"], names, tall=52, y="GEMM", bar="time ratio",
    )  # fmt: skip
    figure.update_xaxes(title="tiles of 128 columns an SM, without a split")
    use, leave = (of_all(rows, few) for few in (True, False))
    return Panel(figure, table, f"**Use Split-K where a GEMM has fewer tiles than the GPU has SMs: {use}. Leave it where it has "
                 f"more: {leave}.** Both are against the classic kernel with its own best tile.")  # fmt: skip


def of_all(rows: Sequence[Row], few: bool) -> str:
    """Wins, mean and extremes of the cells with fewer tiles than SMs, or of the others."""
    of = [row for row in rows if (row["tiles an SM"] < 1) is few]
    wins, losses = (sum(row["verdict"] == verdict for row in of) for verdict in ("faster", "slower"))
    mean, ends = geometric_mean([row[RATIO] for row in of]), extremes(of, lambda row: row[RATIO], at=_where)
    return (
        f"of {counted(len(of), 'cell')} {wins} win and {losses} lose, {mean:.2f} of classic’s time on average, {ends}"
    )


def by_split(recording: Recording, shape: str, stage: str, num_tokens: int) -> Panel:
    """One cell's time against SPLIT_K, a line per kind, beside the classic kernel's."""
    cell = _cells(recording.select(shape=shape, stage=stage, num_tokens=num_tokens))[shape, stage, num_tokens]
    figure = grid(f"Time against SPLIT_K: {shape}, {stage}, batch {num_tokens}", f"{recording.source()}, 95 % intervals; each "
                  "point with its own fastest tile")  # fmt: skip
    classic, low, high = span(cell[CLASSIC])
    splits = sorted({split for _, split in cell})
    table: list[dict[str, Any]] = []
    for (variant, split), row in cell.items():
        (us, below, above), config = span(row), row["config"]
        table.append({
            "kind": variant, "SPLIT_K": split, "µs": us, "95 % low": below, "95 % high": above, "over classic": us / classic,
            "tile M×N×K": "×".join(str(config[f"BLOCK_SIZE_{axis}"]) for axis in "MNK"), "stages": config["num_stages"],
        })  # fmt: skip
    figure.add_hrect(low, high, fillcolor=GREY, opacity=0.25, line_width=0)
    figure.add_scatter(x=splits, y=[classic] * len(splits), mode="lines", line={"color": GREY, "dash": "dot"},
                       name="classic, best tile")  # fmt: skip
    for kind in KINDS:
        mine = sorted(split for variant, split in cell if variant == kind)
        line(figure, mine, [span(cell[kind, split]) for split in mine], kind, LOOKS[kind])
    figure.update_xaxes(title="SPLIT_K", **log_axis(splits))
    figure.update_xaxes(ticktext=[str(s) for s in splits])
    figure.update_yaxes(title="µs, the whole step", rangemode="tozero")
    best = min(table, key=lambda row: row["µs"])
    unsplit = next(row for row in table if (row["kind"], row["SPLIT_K"]) == (best["kind"], 1))
    return Panel(figure, table, f"**Fastest: {best['kind']} with SPLIT_K = {best['SPLIT_K']}, {best['over classic']:.2f} times "
                 f"the classic kernel’s {classic:.2f} µs.** The same kind with SPLIT_K = 1: {unsplit['over classic']:.2f} times; "
                 "the difference between the two is the split’s own.")  # fmt: skip


def error_and_spread(recording: Recording) -> Panel:
    """Error over bound, cells whose runs are bitwise equal, and the spread between runs, by kind and SPLIT_K."""
    rows = pd.DataFrame([row for row in recording.rows if "skipped" not in row])
    runs = int(rows.runs.max())
    rows = rows.assign(
        error=rows.max_abs_error / rows.bound, spread=rows.spread_abs / rows.bound, past=~rows.within_bound.astype(bool),
        equal=rows.distinct == 1,
    )  # fmt: skip
    found = rows.groupby(["variant", "split_k"], sort=True)
    columns = {"cells": found.size(), "median error / bound": found.error.median(), "largest error / bound": found.error.max(),
               "past the bound": found.past.sum(), "all runs equal": found.equal.sum(), "most distinct": found.distinct.max(),
               "largest spread": found.spread_abs.max(), "largest spread / bound": found.spread.max()}  # fmt: skip
    frame = pd.DataFrame(columns).rename_axis(["kind", "SPLIT_K"]).reset_index()
    table: list[Row] = [{str(k): v for k, v in row.items()} for row in frame.astype(object).to_dict("records")]
    figure = grid("What Split-K costs in error and in repeatability", f"{recording.source()}, {runs} runs a cell; bound: twice "
                  "torch’s own error against float64; left and right: the worst cell", titles=[
                      "largest error / bound", f"cells with {runs} equal runs", "largest spread / bound"], gap=0.12)  # fmt: skip
    frame["share"] = frame["all runs equal"] / frame.cells
    drawn = {
        "largest error / bound": "error / bound",
        "share": "share of cells",
        "largest spread / bound": "spread / bound",
    }
    for kind, style in LOOKS.items():
        mine = frame[frame.kind == kind]
        for col, column in enumerate(drawn, start=1):
            points = dict(zip(mine.SPLIT_K.tolist(), mine[column].tolist(), strict=True))
            trace(figure, points, kind, style, legend=col == 1, row=1, col=col)
    splits = sorted(int(s) for s in frame.SPLIT_K.unique())
    for col, name in enumerate(drawn.values(), start=1):
        figure.update_xaxes(title="SPLIT_K", **log_axis(splits), row=1, col=col)
        figure.update_yaxes(title=name, rangemode="tozero", row=1, col=col)
    figure.update_xaxes(ticktext=[str(s) for s in splits])
    figure.update_yaxes(tickformat=".0%", range=[-0.04, 1.08], row=1, col=2)
    figure.add_hline(1.0, line={"color": GREY, "dash": "dot"}, row=1, col=1)
    split = frame[(frame.SPLIT_K > 1) & frame.kind.isin(KINDS)]
    sums = {"cells": "sum", "all runs equal": "sum", "past the bound": "sum", "largest spread / bound": "max"}
    found = split.groupby("kind").agg(sums).to_dict("index")
    steady = [kind for kind, row in found.items() if row["cells"] == row["all runs equal"]]
    return Panel(figure, table, conclude(f"The same bits in every run of every cell: {', '.join(steady) or 'no kind'}.", {
        f"{kind}, SPLIT_K > 1": f"{row['all runs equal']} of {row['cells']} cells give {runs} equal runs, spread up to "
        f"{row['largest spread / bound']:.2g} of the bound, {row['past the bound']} past it" for kind, row in found.items()
    }))  # fmt: skip


def versus_upstream(recording: Recording, reported: Mapping[str, Any]) -> Panel:
    """Time over the baseline of each one's own chip, by batch, at upstream's hidden sizes: ours as lines, theirs hollow."""
    hidden = sorted({row["hidden_size"] for row in reported["rows"]})
    splits = (2, 4, 8)
    figure = grid("Beside upstream’s Split-K: each over its own baseline", f"lines: {recording.source()}, atomic_out, GEMM1 and "
                  f"GEMM2 steps added<br>hollow: reported on {reported['device']}, {reported['source']}; sizes other than hidden "
                  "are not named there", titles=[f"hidden {h}" for h in hidden], shared_y=True)  # fmt: skip
    cells, table = _cells(recording.rows), []
    for col, size in enumerate(hidden, start=1):
        theirs = {row["num_tokens"]: row for row in reported["rows"] if row["hidden_size"] == size}
        both = {b: [cells[f"upstream/hidden{size}", stage, b] for stage in ("up", "down")] for b in theirs}
        for split, style in series(splits).items():
            ours = {b: _sum(pair, ("atomic_out", split)) / _sum(pair, CLASSIC) for b, pair in both.items()}
            peer = {b: row[f"split_k_{split}"] / row["baseline"] for b, row in theirs.items()}
            shared: dict[str, Any] = {"legendgroup": f"{split}", "legend": col == 1, "row": 1, "col": col}
            trace(figure, ours, f"SPLIT_K = {split}, here", style, **shared)
            trace(figure, peer, f"SPLIT_K = {split}, reported", style, hollow=True, mode="markers", **shared)
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
    return Panel(figure, table, f"**Geometric means over the baseline: {means}.** Best cell: {min(r['here'] for r in table):.2f} "
                 f"here, {min(r['reported'] for r in table):.2f} as reported.")  # fmt: skip


def _mean(table: Sequence[Row], split: int, column: str) -> float:
    return geometric_mean([row[column] for row in table if row["SPLIT_K"] == split])


def _sum(pair: Sequence[Mapping[tuple[str, int], Row]], key: tuple[str, int]) -> float:
    return sum(float(timing(cell[key]).median_us) for cell in pair)


def as_int32(value: int) -> int:
    """What an int32 register holds where `value` was meant."""
    return (value + _INT32) % (2 * _INT32) - _INT32


def int32_limits(name: str, shape: MoEShape, splits: Sequence[int] = (1, 2, 4, 8, 16)) -> Panel:
    """Map of GEMM1's buffers by batch: the largest element offset over the largest int32; and what it becomes past that."""
    N = shape.moe_intermediate_size * (2 if shape.gated else 1)
    row = shape.top_k * N  # elements of one token's pairs
    turns = [_INT32 // (split * row) for split in splits]  # one batch more, and the last offset is past int32
    batches = [2**i for i in range(max(0, min(turns).bit_length() - 4), max(turns).bit_length() + 2)]
    table: list[dict[str, Any]] = []
    offsets: dict[tuple[str, int], int] = {}
    for split, turn in zip(splits, turns, strict=True):
        what = "product, pairs × N" if split == 1 else f"workspace, {split} × pairs × N"
        table.append(_limit(what, turn + 1, split * (turn + 1) * row - 1))
        offsets |= {(what, b): split * b * row - 1 for b in batches}
    weights = shape.num_experts * N * shape.hidden_size
    table.append(_limit("weights, experts × N × K", 1 if weights > _INT32 else None, weights - 1))
    offsets |= {("weights, experts × N × K", b): weights - 1 for b in batches}
    cells = {at: ratio_map.Cell(max(offset, 1) / (_INT32 - 1), _times(offset), False) for at, offset in offsets.items()}
    figure = ratio_map.chart(
        f"Where an int32 offset wraps: GEMM1’s buffers, {name}", "computed, no kernel: largest offset over int32’s largest "
        f"value; blue: fits; white: just so; red: wraps<br>top_k = {shape.top_k}, N = {N}, K = {shape.hidden_size}, "
        f"{shape.num_experts} experts", cells, [row["buffer"] for row in table], batches, low=SIDES["memory"].color, high=WRONG,
        span=math.log(16), bar="offset / limit",
    )  # fmt: skip
    last, product = table[len(splits) - 1], table[0]
    fits = "do not fit either, whatever the batch" if weights > _INT32 else "still fit"
    sentence = (
        f"**With SPLIT_K = {splits[-1]} the workspace passes 2³¹ elements at batch {last['smallest batch past int32']:,}; the "
        f"product alone at {product['smallest batch past int32']:,}.** In int32 the offset {last['largest offset']:,} becomes "
        f"{last['in int32']:,}: memory ahead of the buffer, an illegal access at best. The weights’ {weights:,} elements {fits}. "
        "The kernels here compute these offsets in int64."
    )
    return Panel(figure, table, sentence)


def _times(offset: int) -> str:
    """An offset over int32's largest, rounded to the side of 1 that it is on."""
    over = offset / (_INT32 - 1)
    if 0.95 <= over < 1.05:
        return "1" if offset < _INT32 else "> 1"
    return f"{over:.2g}" if over < 99.5 else f"{over:.0f}"


def _limit(what: str, batch: int | None, offset: int) -> dict[str, Any]:
    return {"buffer": what, "smallest batch past int32": batch, "largest offset": offset, "in int32": as_int32(offset)}
