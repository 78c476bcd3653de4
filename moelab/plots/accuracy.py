"""Errors against float64: what a ULP is, the upstream table reproduced, and why one kernel fails."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from moelab.dtypes import LAYER_DTYPES
from moelab.plots import ratio_map
from moelab.plots.panel import Panel, Row
from moelab.plots.style import GREY, GRID, LOOKS, SERIES, WRONG, grid, look, number, powers, series
from moelab.plots.sum_reduce import ORDER

FRACTION_BITS = {name: dtype.fraction_bits for name, dtype in LAYER_DTYPES.items()}
"""Stored fraction bits of a dtype: the spacing in [2^e, 2^(e+1)) is 2^(e - bits)."""

BIN = 0.2
"""Width of a histogram bin, in powers of ten."""

SMALLEST_EXPONENT = {name: dtype.smallest_exponent for name, dtype in LAYER_DTYPES.items()}


def spacing(value: float, dtype: str) -> float:
    """One ULP of `dtype` at |value| > 0: the gap to the next number above, subnormals included."""
    exponent = max(math.frexp(abs(value))[1] - 1, SMALLEST_EXPONENT[dtype])
    return 2.0 ** (exponent - FRACTION_BITS[dtype])


def ulp(dtypes: Sequence[str] = tuple(FRACTION_BITS)) -> Panel:
    """Left: a toy format with two fraction bits on the number line. Right: one ULP by magnitude, per dtype."""
    figure = grid("One ULP: the gap between neighbouring numbers", "computed; left: a toy format with 2 fraction bits, so "
                  "that single numbers can be seen", titles=["numbers of the toy format", "one ULP of real formats"])  # fmt: skip
    toy = [2.0**e * (1 + f / 4) for e in range(-2, 3) for f in range(4)] + [8.0]
    figure.add_scatter(x=toy, y=[0.0] * len(toy), mode="markers", marker={**SERIES[0].marker(16), "symbol": "line-ns"},
                       showlegend=False, row=1, col=1, hovertemplate="%{x}")  # fmt: skip
    for e in range(-1, 3):
        start, gap = 2.0**e, 2.0 ** (e - 2)
        text = f"from {start:g}: gap {gap:g}"
        figure.add_annotation(x=start, y=0.12 + 0.2 * (e + 1), text=text, showarrow=False, xanchor="left", row=1, col=1)
        figure.add_scatter(x=[start, start + gap], y=[0.05 + 0.2 * (e + 1)] * 2, mode="lines", showlegend=False, row=1, col=1,
                           line={"color": SERIES[1].color, "width": 4})  # fmt: skip
    figure.update_yaxes(visible=False, range=[-0.15, 0.95], row=1, col=1)
    figure.update_xaxes(title="value", tickvals=[0.25, 1, 2, 4, 8], range=[0, 8.4], row=1, col=1)
    table = []
    for dtype, style in series(list(dtypes)).items():
        xs = [2.0 ** (e / 4) for e in range(-56, 57)]
        ys = [spacing(x, dtype) for x in xs]
        figure.add_scatter(x=xs, y=ys, name=dtype, mode="lines", line={**style.line(), "shape": "hv"}, row=1, col=2)
        table.append({"dtype": dtype, "fraction bits": FRACTION_BITS[dtype], "one ULP at 1": spacing(1.0, dtype),
                      "at 1000": spacing(1000.0, dtype), "at 0.001": spacing(0.001, dtype)})  # fmt: skip
    figure.update_xaxes(title="|value|", row=1, col=2, **powers(1e-4, 2e4))
    figure.update_yaxes(title="one ULP", row=1, col=2, **powers(1e-21, 1e3))
    one = {row["dtype"]: row["one ULP at 1"] for row in table}
    sentence = (
        f"**The same absolute error is many ULP of a fine format and a fraction of one of a coarse one:** at 1, an error of "
        f"{number(one['float32'])} is 1 ULP of float32, {number(one['float32'] / one['float64'])} of float64 and "
        f"{number(one['float32'] / one['bfloat16'])} of bfloat16. Rounding a result right costs at most half a ULP."
    )
    return Panel(figure, table, sentence)


def _symbols(verdict: bool | None) -> str:
    return {True: "✓", False: "✗", None: ""}[verdict]


def _upstream_rows(reported: Mapping[str, Any]) -> list[dict[str, Any]]:
    """sglang's reported table in the columns of precision_rows."""
    dtype = reported["dtype"]
    return [{"dtype": dtype, "impl": row["name"], "max_abs_from_torch": row["max_abs_difference"],
             "upstream_tolerance": reported["tolerance"][dtype], "upstream_passes": row["passes"]}
            for row in reported["rows"]]  # fmt: skip


def checks(
    recorded: Sequence[Row], live: Sequence[Row], reported: Mapping[str, Any], source: str, live_source: str
) -> Panel:
    """Maps of implementation by dtype: the error over upstream's fixed tolerance, and over twice torch's own error; at most 1 is
    right, and past it red. The table has what was reported and what was computed live too.

    recorded, live: rows of suites.sum_reduce.precision_rows. reported: data/upstream/sum_reduce_precision.json.
    """
    dtypes = list(dict.fromkeys(row["dtype"] for row in recorded))
    impls = [impl for impl in ORDER if any(r["impl"] == impl for r in recorded)]
    figure = grid("Sum-reduce, two ways to judge it", f"error over its limit, {source}; table: beside {reported['source']}"
                  f"{f' and {live_source}' if live else ''}<br>the fixed tolerance grows with |torch|, "
                  "so that an error over 1 may pass", titles=["upstream’s: a fixed tolerance", "ours: twice torch’s own error"],
                  rows=2, height=200 + 60 * len(impls))  # fmt: skip
    figure.update_xaxes(title="dtype", row=2)
    for line, (error, bound, verdict) in enumerate(_JUDGED, start=1):
        rows = {(r["impl"], r["dtype"]): r for r in recorded if r.get(bound)}
        _error_map(figure, {at: (r[error] / r[bound], r[verdict]) for at, r in rows.items()}, impls, dtypes, line)
    return Panel(figure, check_table(recorded, live, reported), _check_sentence(recorded, reported))


_JUDGED = (("max_abs_from_torch", "upstream_tolerance", "upstream_passes"), ("max_abs", "bound", "passes"))


def _error_map(
    figure: Any,
    found: Mapping[tuple[str, str], tuple[float, bool]],
    names: Sequence[str],
    dtypes: Sequence[str],
    row: int = 1,
) -> None:
    """Error over its limit by name and dtype: green where it passes, red where it fails."""
    cells = {at: ratio_map.Cell(0.5 if passes else 2.0, f"{number(over, 2)} {_symbols(passes)}", False)
             for at, (over, passes) in found.items()}  # fmt: skip
    ratio_map.draw(figure, cells, names, dtypes, row=row, high=WRONG, span=1.0)


def check_table(recorded: Sequence[Row], live: Sequence[Row], reported: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per dtype and implementation: largest |out - torch| and |out - exact|, limits, both verdicts."""
    theirs = {(row["dtype"], row["impl"]): row for row in _upstream_rows(reported)}
    here = {(row["dtype"], row["impl"]): row for row in live}
    table = []
    for row in recorded:
        key = row["dtype"], row["impl"]
        now = here.get(key, {})
        table.append({
            "dtype": key[0], "implementation": key[1], "Δtorch, reported": theirs.get(key, {}).get("max_abs_from_torch"),
            "Δtorch, recorded": row["max_abs_from_torch"], "Δtorch, live": now.get("max_abs_from_torch"),
            "tolerance": row["upstream_tolerance"], "upstream passes": row["upstream_passes"],
            "Δexact, recorded": row["max_abs"], "Δexact, live": now.get("max_abs"), "bound": row["bound"],
            "policy passes": row["passes"], "99 % ULP, live": now.get("p99_ulp"),
        })  # fmt: skip
    return table


def _check_sentence(recorded: Sequence[Row], reported: Mapping[str, Any]) -> str:
    def failing(verdict: str) -> list[str]:
        return [f"{r['impl']} in {r['dtype']}" for r in recorded if not r[verdict]]

    theirs = [f"{row['name']} in {reported['dtype']}" for row in reported["rows"] if not row["passes"]]
    fixed = failing("upstream_passes")
    agree = "as" if [each for each in fixed if each.endswith(reported["dtype"])] == theirs else "unlike what was"
    loosest = max((r for r in recorded if r["upstream_passes"] and r["max_abs_from_torch"]),
                  key=lambda r: r["upstream_tolerance"] / r["max_abs_from_torch"])  # fmt: skip
    slack = number(loosest["upstream_tolerance"] / loosest["max_abs_from_torch"])
    return (
        f"**The fixed tolerance fails {', '.join(fixed) or 'nothing'}, {agree} reported; ours fails "
        f"{', '.join(failing('passes')) or 'nothing'}.** A fixed tolerance fits no dtype: in {loosest['dtype']} "
        f"{loosest['impl']} could be {slack} times worse and still pass; twice torch’s own error moves with dtype and size."
    )


def error_distribution(errors: Mapping[str, Sequence[float]], source: str) -> Panel:
    """Histogram of log10 |out - exact| per implementation; an exact result is counted at the left edge."""
    edge = -19.0
    figure = grid("Every error of one run, in float64", source)
    table: list[dict[str, Any]] = []
    for name, values in errors.items():
        logs = [max(edge, math.log10(v)) if v > 0 else edge for v in values]
        counts = Counter(round((v - edge) / BIN) for v in logs)
        bins = range(min(counts) - 1, max(counts) + 2)
        xs, ys = [edge + BIN * i for i in bins], [100 * counts[i] / len(logs) for i in bins]
        line = {**look(name).line(1.5 + 1.5 * (len(errors) - len(table))), "shape": "hvh", "dash": "solid"}
        figure.add_scatter(x=xs, y=ys, name=name, mode="lines", line=line, fill="tozeroy" if not table else None,
                           fillcolor=GRID)  # fmt: skip
        ordered = sorted(values)
        table.append({"implementation": name, "exact results": sum(v == 0 for v in values) / len(values),
                      "median error": ordered[len(ordered) // 2], "99 %": ordered[int(0.99 * (len(ordered) - 1))],
                      "largest": ordered[-1]})  # fmt: skip
    for value, text in ((2.0**-24, "float32: half a ULP at 1"), (2.0**-53, "float64: half a ULP at 1")):
        figure.add_vline(math.log10(value), line={"color": GREY, "dash": "dash"}, annotation_text=text,
                         annotation_position="top left")  # fmt: skip
    ticks = list(range(-18, -4, 2))
    names = ["0", *(f"10<sup>−{-t}</sup>" for t in ticks)]
    figure.update_xaxes(
        title="|out − exact| (0: exact)", tickvals=[edge, *ticks], ticktext=names, range=[edge - 0.3, -5]
    )
    figure.update_yaxes(title="share of results, %")
    largest, least = (of(table, key=lambda row: row["largest"]) for of in (max, min))
    return Panel(figure, table, f"**Largest and median error: {largest['implementation']} {number(largest['largest'])} and "
                 f"{number(largest['median error'])}, at float32’s rounding; {least['implementation']} "
                 f"{number(least['largest'])} "
                 f"and {number(least['median error'])}.** The difference is an accumulator’s, not a bug’s.")  # fmt: skip


def error_by_magnitude(
    reference: Sequence[float], errors: Mapping[str, Sequence[float]], dtype: str, source: str
) -> Panel:
    """Error against |exact value|, with lines at half a ULP and one ULP of the dtype."""
    figure = grid(f"Why the largest ULP explodes: error by magnitude, {dtype}", source)
    low = min((abs(r) for r in reference if r), default=1e-6)
    high = max(abs(r) for r in reference)
    floor = spacing(low, dtype) / 100  # where an exact result is drawn
    table: list[dict[str, Any]] = []
    for name, values in errors.items():
        figure.add_scatter(x=[abs(r) for r in reference], y=[max(v, floor) for v in values], name=name, mode="markers",
                           marker={**look(name).marker(9 if not table else 4, hollow=not table), "opacity": 0.6})  # fmt: skip
        ulps = sorted(v / spacing(r, dtype) for v, r in zip(values, reference, strict=True) if r)
        table.append({"implementation": name, "mean ULP": sum(ulps) / len(ulps), "median ULP": ulps[len(ulps) // 2],
                      "99 % ULP": ulps[int(0.99 * (len(ulps) - 1))], "largest ULP": ulps[-1],
                      "largest error": max(values)})  # fmt: skip
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    figure.add_scatter(x=xs, y=[spacing(x, dtype) for x in xs], name="one ULP", mode="lines",
                       line={**look("floor").line(), "shape": "hv"})  # fmt: skip
    top = max(max(v) for v in errors.values())
    figure.update_xaxes(title="|exact value|", **powers(low / 1.2, high * 1.2))
    figure.update_yaxes(title="|out − exact| (lowest row: exact)", **powers(floor / 2, top * 3))
    worst = max(table, key=lambda row: row["largest ULP"])
    return Panel(figure, table, f"**Errors do not shrink with the sum, ULPs do: {number(worst['largest ULP'])} ULP at worst "
                 f"({worst['implementation']}), {number(worst['99 % ULP'])} at the 99th percentile, "
                 f"{number(worst['median ULP'])} at the median.** A rounding made at size 1 counts so much where terms cancel "
                 f"to {number(low)}: judge by the percentile or by absolute error.")  # fmt: skip


def whole_op(rows: Sequence[Row], source: str) -> Panel:
    """Map of implementation by dtype: the whole layer's error over its bound; 1 is the limit."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    order = list(LOOKS)
    names = sorted({r["name"] for r in rows}, key=lambda n: order.index(n) if n in order else len(order))
    figure = grid("The whole layer against float64", f"{source}; largest error over its bound, at most 1 is right",
                  height=170 + 27 * len(names))  # fmt: skip
    figure.update_xaxes(title="dtype")
    _error_map(figure, {(r["name"], r["dtype"]): (r["max_abs"] / r["bound"], r["passes"]) for r in rows}, names, dtypes)
    table = [{"dtype": r["dtype"], "implementation": r["name"], "max |out − exact|": r["max_abs"], "bound": r["bound"],
              "relative (Frobenius)": r["rel_fro"], "mean ULP": r["mean_ulp"], "99 % ULP": r.get("p99_ulp"),
              "passes": r["passes"]} for r in rows]  # fmt: skip
    failing = [f"{r['name']} in {r['dtype']}" for r in rows if not r["passes"]]
    worst = max(rows, key=lambda r: r["max_abs"] / r["bound"])
    return Panel(figure, table, f"**{'All pass' if not failing else 'Failing: ' + ', '.join(failing)}.** The closest to "
                 f"its bound is {worst['name']} in {worst['dtype']}, at {worst['max_abs'] / worst['bound']:.2g} of it. An "
                 "empty cell: that implementation refuses the dtype here.")  # fmt: skip


def verdicts(recorded: Sequence[Row]) -> Panel:
    """Which implementation passes where, as a table: policy, then upstream's check."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in recorded))
    impls = list(dict.fromkeys(row["impl"] for row in recorded))
    cell = {(r["impl"], r["dtype"]): f"{_symbols(r['passes'])} / {_symbols(r['upstream_passes'])}" for r in recorded}
    table = [{"policy / upstream": impl} | {d: cell.get((impl, d), "–") for d in dtypes} for impl in impls]
    clean = [impl for impl in impls if all(r["passes"] for r in recorded if r["impl"] == impl)]
    least = {d: min(r["mean_abs"] for r in recorded if r["dtype"] == d) for d in dtypes}
    said = "; ".join(f"{d}: {' = '.join(r['impl'] for r in recorded if r['dtype'] == d and r['mean_abs'] <= 1.001 * low)}"
                     for d, low in least.items())  # fmt: skip
    return Panel(None, table, f"**Right in every dtype: {', '.join(clean)}.** Smallest mean error: {said}.")
