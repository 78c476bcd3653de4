"""A whole model under each implementation of its experts: gains of a step, what a step is made of, predictions, tokens a second.

Drawn from the recording `serve_bench`; while there is none, from data/upstream/h200_realmodel.json, single medians without
intervals, of whose experts' time only the layer's own recording tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moelab.errors import counted
from moelab.plots.panel import Panel, Row, timing
from moelab.plots.style import GREY, LOOKS, Look, error_bars, grid, number, series
from moelab.serving.measured import Measured

FIRST, FAST = "grouped_mm", "moelab_fast"
NOUNS = {"decode": "decode step", "prefill": "prefill", "prefill, graph": "captured prefill"}
NEAR = 0.03
"""A prediction within this of the step, in parts of it, is one that holds."""

KINDS = {
    "decode": "a decode step (in a CUDA graph)",
    "prefill": "a prefill (eager)",
    "prefill, graph": "a prefill (in a graph)",
}
UNLIKE = {"moelab_fast": "fast", "moelab_triton": "classic", "moelab_gated_tma": "gated_tma", FIRST: FIRST}
"""A contender -> whose look it has elsewhere."""


def _ordered(rows: Sequence[Row]) -> list[Any]:
    return sorted(rows, key=lambda row: (row["kind"], row["batch"] * row["length"], row["batch"]))


def _cell(row: Row) -> str:
    return str(row["batch"]) if row["kind"].startswith("decode") else f"{row['batch']} × {row['length']}"


def _where(row: Row) -> str:
    return f"{row['kind']} {_cell(row)}"


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Of contenders: as elsewhere for what is drawn elsewhere, muted for transformers' other ones."""
    rest = series([name for name in names if name not in UNLIKE])
    return {name: LOOKS[UNLIKE[name]] if name in UNLIKE else rest[name] for name in names}


def _gains(measured: Measured, first: str = FIRST) -> list[dict[str, Any]]:
    from moelab.serving.prediction import gains, recorded_layer

    return _ordered(gains(measured.rows, first, recorded_layer(f"{measured.model}/tp1")))


def _base(measured: Measured) -> str:
    """Over whom gains are told: transformers' grouped_mm, or where it has no time the first contender that has one."""
    timed = [row["impl"] for row in measured.rows if row["kind"] in KINDS and "samples_us" in row]
    return FIRST if FIRST in timed or not timed else timed[0]


def gains(measured: Measured) -> Panel:
    """Of each contender over transformers' grouped_mm, or over the first that was timed, by batch for a decode step, by prompt
    for a prefill."""
    first = _base(measured)
    lines = _gains(measured, first)
    shown = [kind for kind in KINDS if any(line["kind"] == kind for line in lines)]
    figure = grid("What its experts' implementation gains a step", measured.source, titles=[KINDS[kind] for kind in shown],
                  shared_y=True)  # fmt: skip
    names = list(dict.fromkeys(line["impl"] for line in lines))
    for name, style in looks(names).items():
        for column, kind in enumerate(shown, start=1):
            mine = [line for line in lines if line["impl"] == name and line["kind"] == kind]
            spans = [_span(measured, line) for line in mine]
            bars = (
                {}
                if measured.single
                else {"error_y": error_bars(*map(list, zip(*spans, strict=True)))}
                if spans
                else {}
            )
            figure.add_scatter(
                x=[_cell(line) for line in mine], y=[line["gain"] for line in mine], name=name, mode="lines+markers",
                line=style.line(), marker=style.marker(), legendgroup=name, showlegend=column == 1, row=1, col=column, **bars,
            )  # fmt: skip
    figure.add_hline(1.0, line={"color": GREY, "dash": "dot"})
    for column, kind in enumerate(shown, start=1):
        cells = len({_cell(line) for line in lines if line["kind"] == kind})
        figure.update_xaxes(
            title="batch" if kind == "decode" else "batch × tokens",
            type="category",
            range=[-0.5, cells - 0.5],
            row=1,
            col=column,
        )  # a label keeps within its plot
    figure.update_yaxes(title=f"{first}'s time / its time", col=1)
    table = [
        {"step": _where(line), "experts": line["impl"], "ms": line["us"] / 1e3, f"{first}, ms": line["first_us"] / 1e3,
         "gain": line["gain"]} | ({} if measured.single else {"tie": line["tie"]})
        for line in lines
    ]  # fmt: skip
    return Panel(
        figure,
        table,
        f"**{_said_of_gains(first, lines, shown)}**{_untold(measured)}{_where_it_pays(lines)}{_without_time(measured)}",
    )


def _span(measured: Measured, line: Row) -> tuple[float, float, float]:
    rows = {row["impl"]: row for row in measured.rows
            if all(row.get(key) == line[key] for key in ("kind", "batch", "length")) and "samples_us" in row}  # fmt: skip
    low, high = timing(rows[line["impl"]]).interval_us
    return line["gain"], line["first_us"] / high, line["first_us"] / low


def _said_of_gains(first: str, lines: Sequence[Row], shown: Sequence[str]) -> str:
    said = []
    for kind in shown:
        fast = [line for line in lines if line["impl"] == FAST and line["kind"] == kind]
        if fast:
            most, least = (of(fast, key=lambda line: line["gain"]) for of in (max, min))
            ends = f"{number(least['gain'])} (at {_cell(least)})"
            ends += f" to {number(most['gain'])} (at {_cell(most)})" if len(fast) > 1 else ""
            said.append(f"{KINDS[kind]} takes {first} {ends} times as long as moelab's fast layer")
    text = "; ".join(said) or f"nothing is measured beside {first}"
    return f"{text[0].upper()}{text[1:]}."


def _untold(measured: Measured) -> str:
    return " Single medians: whether two are a tie, nobody can say." if measured.single else ""


def _without_time(measured: Measured) -> str:
    """Contenders that were refused in a step, or had no room."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in _ordered([row for row in measured.rows if row["kind"] in KINDS and "refused" in row]):
        found.setdefault((row["impl"], row["refused"].partition(":")[0]), []).append(_where(row))
    said = "; ".join(f"{name} at {', '.join(where)} ({why})" for (name, why), where in found.items())
    return f" Without a time: {said}." if said else ""


def _where_it_pays(lines: Sequence[Row]) -> str:
    """Tuned files beside the default rule, where both are measured."""
    pairs: dict[str, dict[str, Row]] = {}
    for line in lines:
        pairs.setdefault(_where(line), {})[line["impl"]] = line
    ratio = {where: pair["moelab_triton_default"]["us"] / pair["moelab_triton"]["us"]
             for where, pair in pairs.items() if {"moelab_triton", "moelab_triton_default"} <= set(pair)}  # fmt: skip
    if not ratio:
        return ""
    most, least = max(ratio, key=ratio.__getitem__), min(ratio, key=ratio.__getitem__)
    return (
        f" A tuned config makes the same kernel's step {number(ratio[most])} times as fast at {most}, where it matters most, and "
        f"{number(ratio[least])} at {least}."
    )


# --- what a step is made of -------------------------------------------------------------------------------------------


def walk(measured: Measured) -> Panel:
    """Milliseconds of a step in its experts and in all the rest, under grouped_mm and under fast."""
    parts = _parts(measured)
    figure = grid("What a step is made of", f"{measured.source}; experts: {_experts_from(measured)}",
                  titles=[FIRST, FAST], shared_y=True)  # fmt: skip
    colors = [style.color for style in series(["experts", "the rest"]).values()]
    for column, name in enumerate((FIRST, FAST), start=1):
        mine = [part for part in parts if part["impl"] == name]
        for what, color in zip(("experts", "the rest"), colors, strict=True):
            figure.add_bar(
                x=[_where(part).replace(" × ", "<br>× ").replace(" ", "<br>", 1) for part in mine],
                y=[part[what] for part in mine], name=what, legendgroup=what, marker={"color": color},
                showlegend=column == 1, row=1, col=column,
            )  # fmt: skip
    figure.update_layout(barmode="stack")
    figure.update_yaxes(title="ms a step", col=1)
    figure.update_xaxes(title="kind of step, batch (× tokens)", tickangle=0)
    table = [
        {"step": _where(part), "experts' implementation": part["impl"], "ms": part["ms"], "experts, ms": part["experts"],
         "the rest, ms": part["the rest"], "share": part["experts"] / part["ms"]}
        for part in parts
    ]  # fmt: skip
    if not parts:
        return Panel(None, [], "**Of no step both the whole and its experts are known.**")
    shares = {name: [row["share"] for row in table if row["experts' implementation"] == name] for name in (FIRST, FAST)}
    said = "; ".join(f"under {name} {min(each):.0%} to {max(each):.0%}" for name, each in shares.items() if each)
    return Panel(
        figure, table, f"**The experts' share of a step is {said}.** A faster layer shortens that part alone: what is left of a "
        "step when they cost nothing is the rest, and no kernel for experts goes below it."
    )  # fmt: skip


def _experts_from(measured: Measured) -> str:
    return (
        f"the layer's own recording, fast_layer, times {measured.rows[0]['moe_layers']}"
        if measured.single
        else "timed in it"
    )


def _parts(measured: Measured) -> list[dict[str, Any]]:
    """Of each step whose experts' time is known: ms, experts, the rest. A prefill in a graph, which waits for no host, stands for
    the eager one where both are measured."""
    from moelab.serving.prediction import by_layer, experts_of, recorded_layer

    layer = recorded_layer(f"{measured.model}/tp1")
    alone = {(row["kind"], row["batch"], row["length"], row["impl"]): timing(row).median_us
             for row in measured.rows if row["kind"].startswith("experts of") and "samples_us" in row}  # fmt: skip
    done = [row for row in measured.rows if row["impl"] in (FIRST, FAST) and "samples_us" in row]
    prefill = "prefill, graph" if any(row["kind"] == "prefill, graph" for row in done) else "prefill"
    found = []
    for row in _ordered([row for row in done if row["kind"] in ("decode", prefill)]):
        key = (experts_of(row["kind"]), row["batch"], row["length"], row["impl"])
        us = by_layer(row, layer).get(row["impl"]) if measured.single else alone.get(key)
        step = timing(row).median_us
        if us is not None and us < step:
            times = {"ms": step / 1e3, "experts": us / 1e3, "the rest": (step - us) / 1e3}
            found.append({key: row[key] for key in ("kind", "batch", "length", "impl")} | times)
    return found


# --- predictions --------------------------------------------------------------------------------------------------------


def predictions(measured: Measured) -> Panel:
    """The gain that the layer's time predicts, beside the gain that was measured."""
    by = "_by_layer" if measured.single else ""
    lines = [line for line in _gains(measured) if line[f"predicted{by}"] is not None]
    what = "the layer's own recording" if measured.single else "the experts of all layers, timed in the model"
    if not lines:
        return Panel(
            None, [], f"**No gain is predicted: there is no step beside {FIRST} whose experts' times are known.**"
        )
    figure = grid("Predicted beside measured", f"{measured.source}; predicted by {what}", height=460)
    names = list(dict.fromkeys((line["impl"], line["kind"]) for line in lines))
    styles = looks([name for name, _ in names])
    for name, kind in names:
        mine = [line for line in lines if (line["impl"], line["kind"]) == (name, kind)]
        figure.add_scatter(
            x=[line[f"predicted{by}"] for line in mine], y=[line["gain"] for line in mine], name=f"{name}, {kind}",
            mode="markers", marker=styles[name].marker(9, hollow=kind != "decode"), text=[_where(line) for line in mine],
        )  # fmt: skip
    ends = [min(line[key] for line in lines for key in ("gain", f"predicted{by}")) * 0.98,
            max(line[key] for line in lines for key in ("gain", f"predicted{by}")) * 1.02]  # fmt: skip
    figure.add_scatter(x=ends, y=ends, mode="lines", line={"color": GREY, "dash": "dot"}, name="as predicted")
    figure.update_xaxes(title=f"predicted gain over {FIRST}")
    figure.update_yaxes(title="measured gain")
    table = [
        {"step": _where(line), "experts": line["impl"], "predicted": line[f"predicted{by}"], "measured": line["gain"],
         "step off its prediction": f"{line[f'off{by}']:+.1%}", "why": _why(line, line[f"off{by}"], measured)}
        for line in lines
    ]  # fmt: skip
    return Panel(figure, table, _said_of_predictions(lines, f"off{by}", what))


def _why(line: Row, off: float, measured: Measured) -> str | None:
    if abs(off) <= NEAR:
        return None
    if line["kind"] == "prefill":
        return "eager: where the host is the slower one, a layer's time changes nothing"
    if measured.single:
        return "the recorded layer lacks grouped_mm's sort, and its own order by expert"
    if line["alone"] and line["within"]:
        names = line["first"], line["impl"]
        both = (f"{name}'s {alone / 1e3:.3g} ms alone, {within / 1e3:.3g} within the step"
                for name, alone, within in zip(names, line["alone"], line["within"], strict=True))  # fmt: skip
        return f"experts take other times than alone: {'; '.join(both)}"
    return "the experts alone are not what they are between attention and gates"


def _said_of_predictions(lines: Sequence[Row], off: str, what: str) -> str:
    said = []
    for kind in dict.fromkeys(line["kind"] for line in lines):
        mine = [line for line in lines if line["kind"] == kind]
        near = sum(abs(line[off]) <= NEAR for line in mine)
        worst = max(mine, key=lambda line: abs(line[off]))
        said.append(f"{near} of {counted(len(mine), NOUNS[kind])} within {NEAR:.0%}, the worst {worst[off]:+.1%} "
                    f"({worst['impl']}, {_where(worst)})")  # fmt: skip
    return (
        f"**Predicted by {what}: {'; '.join(said)}.** A step of T should take T (1 - s + s / r), where the experts have a share "
        "s of it and become r times as fast."
    )


# --- without a graph ----------------------------------------------------------------------------------------------------


def host(measured: Measured) -> Panel:
    """A decode step without a CUDA graph beside one within: there the host sets the time, and no kernel for experts."""
    times: dict[tuple[str, int], dict[str, float]] = {}
    for row in _ordered(
        [row for row in measured.rows if row["kind"] in ("decode", "decode, eager") and "samples_us" in row]
    ):
        times.setdefault((row["impl"], row["batch"]), {})[row["kind"]] = timing(row).median_us / 1e3
    both = {key: each for key, each in times.items() if len(each) == 2 and key[0] in (FIRST, FAST)}
    if not both:
        return Panel(None, [], "**No decode step is measured both in a CUDA graph and without one.**")
    figure = grid("A decode step with and without a CUDA graph", measured.source)
    for name, style in looks(list(dict.fromkeys(name for name, _ in both))).items():
        batches = sorted(batch for mine, batch in both if mine == name)
        for kind, hollow in (("decode", False), ("decode, eager", True)):
            figure.add_scatter(
                x=[str(batch) for batch in batches], y=[both[name, batch][kind] for batch in batches], mode="lines+markers",
                name=f"{name}, {'without' if hollow else 'in'} a graph", line=style.line(), marker=style.marker(hollow=hollow),
            )  # fmt: skip
    figure.update_xaxes(title="batch", type="category")
    figure.update_yaxes(title="ms a step", rangemode="tozero")
    table: list[dict[str, Any]] = [
        {"batch": batch, "experts": name, "in a graph, ms": each["decode"], "without, ms": each["decode, eager"],
         "without / in": each["decode, eager"] / each["decode"]}
        for (name, batch), each in both.items()
    ]  # fmt: skip
    most, least = (of(table, key=lambda row: row["without / in"]) for of in (max, min))
    return Panel(
        figure, table, f"**Without a graph a step takes {number(most['without / in'])} times as long at batch {most['batch']} "
        f"({most['experts']}) and {number(least['without / in'])} at {least['batch']} ({least['experts']}):** what "
        "`generate` without compilation waits for is the host, and the experts' kernel hardly shows."
    )  # fmt: skip


# --- in short -------------------------------------------------------------------------------------------------------------


def in_short(measured: Measured) -> Mapping[str, str]:
    """The three answers of 09."""
    lines = [line for line in _gains(measured) if line["impl"] == FAST]
    parts = [part for part in _parts(measured) if part["impl"] == FIRST]
    gained = {kind: [line["gain"] for line in lines if line["kind"] == kind] for kind in KINDS}
    said = "; ".join(
        f"{KINDS[kind]} {number(min(each))} to {number(max(each))} times" for kind, each in gained.items() if each
    )
    share = [part["experts"] / part["ms"] for part in parts]
    told = predictions(measured).sentence.split("**")[1]
    return {
        "What does a faster layer gain": f"{measured.model} over transformers' {FIRST}: {said}.",
        "How much of a step is it": f"The experts are {min(share):.0%} to {max(share):.0%} of a step."
        if share
        else "Not measured.",
        "Can it be told beforehand": told,
    }
