"""Quantised experts: what a format does to the floor, to the error and to one weight, and which shipped files serve it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moelab import roofline
from moelab.errors import UnknownNameError
from moelab.formats import Format, get_format
from moelab.plots import roofline as plots_roofline
from moelab.plots.panel import Panel, Row
from moelab.plots.style import GREY, LOOKS, grid, log_axis, number, powers, series
from moelab.shapes import MoEShape

if TYPE_CHECKING:
    from moelab.config_files.shipped_quantised import Shipped
    from moelab.quantised_error import LayerError, Way

BATCHES = (1, 4, 16, 64, 256, 1024, 4096)


def named(format: Format) -> str:
    """A format in a figure's words."""
    return "bf16" if format.is_plain else format.name.replace("_w8a8", "").replace("_w4a16", "").replace("_", " ")


def bits_per_weight(format: Format, shape: MoEShape) -> float:
    """Stored bits for each weight of the layer, scales and zero points included."""
    formatted = _as(shape, format)
    weights = math.prod(shape.w13_shape) + math.prod(shape.w2_shape)
    return 8.0 * formatted.weight_bytes / weights


def _as(shape: MoEShape, format: Format) -> MoEShape:
    from dataclasses import replace

    return replace(shape, format=format)


# --- the floor ---------------------------------------------------------------------------------------------------------


def _floor(shape: MoEShape, num_tokens: int, device: str) -> roofline.Floor | None:
    try:
        at = roofline.load_ceilings(device, "floors", shape.format.product_dtype(shape.dtype))
    except UnknownNameError:
        return None
    return roofline.floor_us(roofline.layer_cost(shape, num_tokens), at)


def floors(
    shape: MoEShape, names: Sequence[str], device: str = "NVIDIA_H200", batches: Sequence[int] = BATCHES
) -> Panel:
    """How many times lower than bfloat16's the layer's floor is in each format, by batch; a hollow marker is compute-bound.

    shape: plain. Formats whose products have no measured rate on the device are in the table without a floor.
    """
    formats = [get_format(name) for name in names]
    plain = {b: _floor(shape, b, device) for b in batches}
    figure = grid("What a format does to the floor", f"computed: {shape.name} tp {shape.tp_size}, bytes of codes, scales and "
                  f"activations and FLOP over the ceilings of {device.replace('_', ' ')}; uniform routing")  # fmt: skip
    table, gains = [], {}
    for name, style in series([named(f) for f in formats]).items():
        format = next(f for f in formats if named(f) == name)
        found = {b: _floor(_as(shape, format), b, device) for b in batches}
        row: dict[str, Any] = {"format": format.name, "bits a weight": bits_per_weight(format, shape),
                               "weights, GB": _as(shape, format).weight_bytes / 1e9}  # fmt: skip
        row |= {f"floor at {b}, µs": one.us if one else None for b, one in found.items() if b in (1, 64, 4096)}
        table.append(row)
        gain = {b: p.us / f.us for b in batches if (p := plain[b]) and (f := found[b])}
        if not gain:
            continue
        gains[name] = gain
        symbols = [style.symbol + "-open" * (f.side == "compute") for f in found.values() if f]
        figure.add_scatter(x=list(gain), y=list(gain.values()), name=name, mode="lines+markers", line=style.line(),
                           marker={**style.marker(9), "symbol": symbols})  # fmt: skip
    figure.update_xaxes(title="batch, tokens", **log_axis(batches))
    figure.update_yaxes(title="bf16's floor / the format's", rangemode="tozero")
    first, last = batches[0], batches[-1]
    said = "; ".join(
        f"{name} {number(gain[first])} times at {first} and {number(gain[last])} at {last}"
        for name, gain in gains.items()
        if name != "bf16"
    )
    missing = [row["format"] for row in table if row["floor at 1, µs"] is None]
    no_rate = (
        f" No rate of int8 products is measured on this device: {', '.join(missing)} have no floor." if missing else ""
    )
    sentence = (
        f"**A floor falls with the bytes where memory is the limit, and with the product's rate where it is not:** {said}. "
        f"Formats that widen weights before a 16-bit product gain no rate once the batch is compute-bound.{no_rate}"
    )
    return Panel(figure, table, sentence)


def floor_map(shape: MoEShape, names: Sequence[str], device: str = "NVIDIA_H200") -> Panel:
    """`plots.roofline.floors` of one plain layer with its experts in each format, which multiplies at the rate of its codes.

    Formats whose products have no measured rate on the device are said, and not drawn.
    """
    rates, missing = {}, []
    formats = {named(format): format for format in map(get_format, names)}
    for name, format in formats.items():
        try:
            rates[name] = roofline.load_ceilings(device, "floors", format.product_dtype(shape.dtype))
        except UnknownNameError:
            missing.append(name)
    shapes = {name: _as(shape, formats[name]) for name in rates}
    at_16_bits = roofline.load_ceilings(device, "floors", shape.dtype)
    what = f"{shape.name} tp {shape.tp_size}, by format"
    drawn = plots_roofline.floors(shapes, at_16_bits, rates=rates, what=what)
    table = []
    for (name, at), row in zip(rates.items(), drawn.table, strict=True):
        about = {"format": formats[name].name, "bits a weight": bits_per_weight(formats[name], shape)}
        floor_at = {f"floor at {batch}, µs": us for batch, us in row.items() if batch != "floor, µs"}
        table.append({**about, "TFLOP/s": at.flops_per_s / 1e12, **floor_at})
    no_rate = f" No rate of products is measured on this device for {', '.join(missing)}." if missing else ""
    turns = drawn.sentence.partition("** ")[2]
    return Panel(
        drawn.figure,
        table,
        f"**Fewer bits lower the memory side of the floor, a faster product the other.** {turns}{no_rate}",
    )


# --- the error ---------------------------------------------------------------------------------------------------------


def errors(found: Sequence[LayerError], source: str) -> Panel:
    """Quantising and rounding apart, by format; the kernel's beside torch's where it runs here."""
    figure = grid("Two errors, apart", source)
    names = [named(get_format(each.format)) for each in found]
    parts: Mapping[str, list[float | None]] = {
        "quantising: the codes' own": [each.quantising or None for each in found],
        "rounding: torch, bf16, given the codes": [each.rounding for each in found],
        "rounding: the kernel, fp16, given the codes": [each.kernel for each in found],
    }
    for (label, values), style in zip(parts.items(), series(list(parts)).values(), strict=True):
        figure.add_scatter(x=names, y=values, name=label, mode="markers", marker=style.marker(11))
    figure.update_yaxes(title="relative error of the layer", **powers(1e-4, 1.0))
    figure.update_xaxes(title="format")
    figure.update_layout(legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"}, margin={"t": 120})
    table = [
        {"format": e.format, "quantising": e.quantising, "rounding, torch bf16": e.rounding, "kernel fp16": e.kernel,
         "torch fp16": e.torch_beside, "kernel not run here": e.why or None}
        for e in found
    ]  # fmt: skip
    coded = [e for e in found if e.quantising]
    ratio = [e.quantising / e.rounding for e in coded]
    here = [e.kernel / e.torch_beside for e in coded if e.kernel and e.torch_beside]
    kernels = f" Where the kernel runs here its error is {number(max(here))} times torch's at most." if here else ""
    sentence = (
        f"**Quantising costs {number(min(ratio))} to {number(max(ratio))} times what rounding does, and no kernel can win it "
        f"back:** so a kernel is judged given its codes, against float64 of codes times scales.{kernels}"
    )
    return Panel(figure, table, sentence)


def judged(found: Sequence[LayerError]) -> Panel:
    """`errors` as verdicts: what a format costs, which nobody is judged by, and a kernel given the codes, allowed twice torch."""
    table: list[Row] = []
    for e in (e for e in found if e.quantising):
        times = e.kernel / e.torch_beside if e.kernel and e.torch_beside else None
        verdict = f"not run here: {e.why}" if times is None else "passes" if times <= 2 else "FAILS"
        row = {"format": e.format, "quantising, judged by none": e.quantising}
        row |= {"rounding: torch": e.torch_beside or e.rounding, "rounding: kernel": e.kernel}
        table.append(row | {"kernel / torch": times, "verdict": verdict})
    ran = [row["kernel / torch"] for row in table if row["kernel / torch"]]
    most = f"at most {number(max(ran))} times torch’s, where 2 is allowed" if ran else "not run here"
    least, largest = (of(row["quantising, judged by none"] for row in table) for of in (min, max))
    sentence = (
        f"**Given the codes, the kernel’s error is {most}.** What the codes themselves are off by, {least:.1%} to {largest:.1%} "
        "of a layer’s result, is the format’s, and every kernel’s alike."
    )
    return Panel(None, table, sentence)


def errors_by_k(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> Panel:
    """A product's errors by K: quantising, and sums given the codes, those of fp8's tensor core simulated."""
    figure = grid("What a longer sum adds", "computed here: normal values, errors before the result is rounded; the tensor "
                  "core's sums are simulated (each 32 products, and the sum, cut behind 13 bits of the largest)")  # fmt: skip
    lines = {f"{named(get_format(name))}: {label}": {K: by[label] for K, by in sizes.items()}
             for name, sizes in found.items() for label in next(iter(sizes.values()))}  # fmt: skip
    for label, style in series(list(lines)).items():
        figure.add_scatter(x=list(lines[label]), y=list(lines[label].values()), name=label, mode="lines+markers",
                           line=style.line(), marker=style.marker())  # fmt: skip
    sizes = list(next(iter(found.values())))
    figure.update_xaxes(title="K, the length of the sum", **log_axis(sizes))
    figure.update_yaxes(title="relative error", **powers(1e-8, 1.0))
    table: list[Row] = [
        {"sum": label} | {f"K = {K}": value for K, value in line.items()} for label, line in lines.items()
    ]
    core = next((line for label, line in lines.items() if label.endswith(": tensor core")), None)
    kept = next((line for label, line in lines.items() if label.endswith("every 128")), None)
    grows = ""
    if core and kept:
        grows = (
            f" A tensor core's own sum over all of K = {sizes[-1]} is off by {number(core[sizes[-1]])}, "
            f"{number(core[sizes[-1]] / core[sizes[0]])} times as much as at {sizes[0]}; with float32 every 128 it stays at "
            f"{number(kept[sizes[-1]])}, which is what scales by blocks get for nothing."
        )
    level = [line[sizes[-1]] / line[sizes[0]] for label, line in lines.items() if label.endswith("quantising")]
    ends = f"{number(min(level))} to {number(max(level))}"
    sentence = f"**Quantising's error does not grow with K ({ends} times over these sizes).**{grows}"
    return Panel(figure, table, sentence)


# --- one weight -----------------------------------------------------------------------------------------------------------


def way(found: Way) -> Panel:
    """The first weights of a row, and what became of them; the levels that their codes can have, where those are few."""
    format, places = found.format, list(range(len(found.values)))
    dotted = "; dotted: what codes × scales can say" if found.levels else ""
    figure = grid(f"Weights into {format.name} and back", "computed here: normal bfloat16 weights, the fourth of them enlarged; "
                  f"one row, first columns{dotted}", height=400)  # fmt: skip
    before, after = series(["before", "after"]).values()
    figure.add_scatter(x=places, y=found.values, name="bfloat16", mode="markers", marker=before.marker(9, hollow=True))
    figure.add_scatter(x=places, y=found.back, name="codes × scales", mode="markers", marker=after.marker(7))
    for level in found.levels:
        figure.add_hline(level, line={"color": GREY, "width": 0.6, "dash": "dot"})
    figure.update_xaxes(title="column")
    figure.update_yaxes(title="weight")
    table = [
        {"column": i, "weight": v, "scale": s, "weight / scale": v / s, "stored bits": c, "back": b, "off by": b - v}
        for i, (v, s, c, b) in enumerate(zip(found.values, found.scales, found.codes, found.back, strict=True))
    ]  # fmt: skip
    off = math.sqrt(sum((b - v) ** 2 for b, v in zip(found.back, found.values, strict=True)))
    share = off / math.sqrt(sum(v * v for v in found.values))
    others = [(v, b) for i, (v, b) in enumerate(zip(found.values, found.back, strict=True)) if i != 3]
    lost = sum(b == 0 and v != 0 for v, b in others)
    rest = math.sqrt(sum((b - v) ** 2 for v, b in others) / sum(v * v for v, _ in others))
    sentence = (
        f"**These {len(places)} weights come back {share:.1%} off, all but the fourth {rest:.1%}; {lost} of them as zero.** "
        f"A scale serves {_serves(format)}, so one large weight coarsens its neighbours’ steps."
    )
    return Panel(figure, table, sentence)


def _serves(format: Format) -> str:
    words = {
        "none": "nobody", "tensor": "an expert’s whole matrix", "channel": "a row",
        "group": f"{format.sizes[0] if format.sizes else 0} neighbours of a row",
        "block": f"a block of {' x '.join(map(str, format.sizes))}",
    }  # fmt: skip
    return words[format.granularity]


# --- the peers' files -------------------------------------------------------------------------------------------------------


def shipped(found: Mapping[str, Iterable[Shipped]], source: str) -> Panel:
    """What is wrong with the files that loaders ship for quantised experts, counted by loader."""
    rows = {loader: list(each) for loader, each in found.items()}
    counts = {loader: Counter(one.problem for one in each if one.problem) for loader, each in rows.items()}
    kinds = sorted({kind for each in counts.values() for kind in each})
    figure = grid("Shipped for quantised experts, and of no use as they are", source, height=380)
    for loader, muted in series(list(rows)).items():
        many = [counts[loader][kind] for kind in kinds]
        figure.add_bar(x=kinds, y=many, name=loader, marker={"color": LOOKS.get(loader, muted).color})
    totals = [sum(each[kind] for each in counts.values()) for kind in kinds]
    figure.add_scatter(
        x=kinds, y=totals, text=totals, mode="text", textposition="top center", showlegend=False, hoverinfo="skip"
    )
    figure.update_layout(barmode="stack")
    figure.update_yaxes(title="files", rangemode="tozero")
    figure.update_xaxes(title="what is wrong", categoryorder="array", categoryarray=kinds)
    table: list[Row] = []
    for loader, each in rows.items():
        for kind, count in counts[loader].items():
            one = next(s for s in each if s.problem == kind)
            about = {"one of them": one.name, "why": one.why}
            table.append({"loader": loader, "what": kind, "files": count, "of": len(each), **about})
    said = " and ".join(f"{sum(counts[loader].values())} of {loader}'s {len(each)}" for loader, each in rows.items())
    scales = [s for each in rows.values() for s in each if s.problem == "wrong scales"]
    worst = f" {len(scales)} would give wrong sums without a word: {scales[0].name}." if scales else ""
    return Panel(
        figure,
        table,
        f"**Of the files for quantised experts {said} are never asked for, or do not run as written.**{worst}",
    )


# --- in short ---------------------------------------------------------------------------------------------------------


def in_short_floor(found: Panel) -> str:
    """How far the floor falls, at the ends of its table."""
    rows = [row for row in found.table if row["floor at 1, µs"] is not None]
    plain, *others = rows
    best = min(others, key=lambda row: row["floor at 1, µs"])
    last = min(others, key=lambda row: row["floor at 4096, µs"])
    few, many = (plain[key] / row[key] for row, key in ((best, "floor at 1, µs"), (last, "floor at 4096, µs")))
    return (
        f"A floor up to {number(few)} times lower at one token ({named(get_format(best['format']))}), {number(many)} at 4096 "
        f"({named(get_format(last['format']))}): bytes first, then the product's rate."
    )


def in_short_error(found: Panel) -> str:
    """Quantising's error by format, from the least to the most."""
    rows = sorted((row for row in found.table if row["quantising"]), key=lambda row: row["quantising"])
    ends = [f"{row['quantising']:.1%} ({named(get_format(row['format']))})" for row in (rows[0], rows[-1])]
    worst = max(row["rounding, torch bf16"] for row in rows)
    return (
        f"{ends[0]} to {ends[1]} of a layer's result, by the codes alone; rounding given the codes {worst:.1%} at most."
    )


def in_short_files(found: Panel) -> str:
    """How many of the peers' files do not serve as written."""
    total = {row["loader"]: row["of"] for row in found.table}
    wrong = {loader: sum(row["files"] for row in found.table if row["loader"] == loader) for loader in total}
    return (
        "; ".join(f"{wrong[loader]} of {loader}'s {total[loader]} for quantised experts do not" for loader in total)
        + "."
    )
