"""The Split-K map: where it wins, by which kind, and what it costs in error and in repeatability."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from moelab.errors import counted
from moelab.plots import ratio_map
from moelab.plots.cells import CLEARLY, cells_of, fastest, left_out, line, names_of, span
from moelab.plots.panel import Panel, Row, geometric_mean, timing
from moelab.plots.style import GREY, SERIES, VERMILLION, grid, log_axis, powers, series
from moelab.recordings import Recording
from moelab.shapes import MoEShape

CLASSIC = ("classic", 1)
KINDS = ("atomic_f32", "atomic_out", "workspace")
SHORT = {"atomic_f32": "f32", "atomic_out": "out", "workspace": "ws"}
"""Each kind's name in a cell of the map."""

_INT32 = 2**31


def _cells(rows: Iterable[Row]) -> dict[Any, dict[tuple[str, int], Row]]:
    """(shape, stage, batch) -> (variant, SPLIT_K) -> row, without what was skipped."""
    found = [row | {"key": (row["variant"], row["split_k"])} for row in map(dict, rows) if "skipped" not in row]
    return cells_of(found, "shape", "stage", "num_tokens", by="key")


def _verdict(ours: Any, rival: Any) -> str:
    first = fastest({"win": ours, "loss": rival})
    return "tie" if len(first) > 1 else first[0]


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
    cells = {
        (f"{row['shape']}, {row['stage']}", row["batch"]): ratio_map.Cell(
            row["Split-K / classic"], f"{row['Split-K / classic']:.2f} {SHORT[row['kind']]}×{row['SPLIT_K']}",
            row["verdict"] == "tie",
        )
        for row in table
    }  # fmt: skip
    ratio_map.draw(figure, cells, names, batches, high=VERMILLION, bar="time ratio", size=11)
    figure.update_xaxes(title="batch, tokens")
    figure.update_yaxes(title="shape, GEMM", automargin=True)
    return Panel(figure, table, _said_of(table))


def _said_of(table: Sequence[Row]) -> str:
    """Wins, ties, losses; the best and the worst cell; by batch; by kind; and what of it is the fused second step."""
    ratio, count = "Split-K / classic", Counter(row["verdict"] for row in table)
    wins = [row for row in table if row["verdict"] == "win"]
    best, worst = min(table, key=lambda row: row[ratio]), max(table, key=lambda row: row[ratio])
    kinds, fused = Counter(row["kind"] for row in wins), sum(row["against SPLIT_K = 1"] != "win" for row in wins)
    by_batch = (f"{sum(r['batch'] == b for r in wins)}/{sum(r['batch'] == b for r in table)} at {b}"
                for b in sorted(names_of(table, "batch")))  # fmt: skip
    said = (f"**Of {counted(len(table), 'cell')} Split-K wins {count['win']}, ties {count['tie']} and loses {count['loss']}.** "
            f"Over the classic kernel: {best[ratio]:.2f} ({_where(best)}) to {worst[ratio]:.2f} ({_where(worst)}).")  # fmt: skip
    if wins:
        clear = sum(row[ratio] <= 1 - CLEARLY for row in wins)
        said += (
            f" {counted(clear, 'win')} of {CLEARLY:.0%} or more; each is the best of up to a dozen candidates against one. By "
            f"batch: {', '.join(by_batch)}. By kind: {', '.join(f'{kind} {kinds[kind]}' for kind in KINDS)}. In {fused} the same "
            "kind with SPLIT_K = 1 ties or is faster: there the fused second step wins, not the split."
        )
    return said + left_out(sum(bool(row["faster, past the bound"]) for row in table))


def _where(row: Row) -> str:
    return f"{row['shape']}, {row['stage']}, batch {row['batch']}, {row['kind']}, SPLIT_K = {row['SPLIT_K']}"


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
    for kind, style in series(KINDS).items():
        mine = sorted(split for variant, split in cell if variant == kind)
        line(figure, mine, [span(cell[kind, split]) for split in mine], kind, style)
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
    for kind, style in zip(("classic", *KINDS), (SERIES[3], *SERIES), strict=False):
        mine = frame[frame.kind == kind]
        for col, column in enumerate(drawn, start=1):
            figure.add_scatter(x=mine.SPLIT_K.tolist(), y=mine[column].tolist(), name=kind, mode="lines+markers",
                               line=style.line(), marker=style.marker(), legendgroup=kind, showlegend=col == 1, row=1,
                               col=col)  # fmt: skip
    splits = sorted(int(s) for s in frame.SPLIT_K.unique())
    for col, name in enumerate(drawn.values(), start=1):
        figure.update_xaxes(title="SPLIT_K", **log_axis(splits), row=1, col=col)
        figure.update_yaxes(title=name, rangemode="tozero", row=1, col=col)
    figure.update_xaxes(ticktext=[str(s) for s in splits])
    figure.update_yaxes(tickformat=".0%", range=[-0.04, 1.08], row=1, col=2)
    figure.add_hline(1.0, line={"color": GREY, "dash": "dot"}, row=1, col=1)
    split = frame[(frame.SPLIT_K > 1) & frame.kind.isin(KINDS)]
    sums, worst = (
        split.groupby("kind")[["cells", "all runs equal", "past the bound"]].sum(),
        split.groupby("kind")["largest spread / bound"].max(),
    )
    steady = [kind for kind, row in sums.iterrows() if row["cells"] == row["all runs equal"]]
    each = "; ".join(f"{kind}: {row['all runs equal']} of {row['cells']} cells give {runs} equal runs, spread "
                     f"up to {worst[kind]:.2g} of the bound, {row['past the bound']} past it"
                     for kind, row in sums.iterrows())  # fmt: skip
    return Panel(figure, table, f"**The same bits in every run of every cell: {', '.join(map(str, steady)) or 'no kind'}.** With "
                 f"SPLIT_K > 1, {each}.")  # fmt: skip


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
