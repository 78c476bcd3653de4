"""Quantised experts' times over their floor, by format: ours where they are recorded, and sglang's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from moelab import recordings, roofline
from moelab.errors import RecordingError, UnknownNameError
from moelab.formats import get_format
from moelab.plots.cells import timed
from moelab.plots.panel import Panel, Row, timing
from moelab.plots.quantised import named
from moelab.plots.style import CONFIGS, grid, log_axis, number, series
from moelab.recordings import Recording

CLASSIC = "triton"
"""The implementation of rows that name none: recordings made before others took quantised weights."""


FASTEST = "fastest"
"""Of the implementations that were timed, cell by cell."""


def over_the_floor(recording: Recording, config_name: str = "searched") -> Panel:
    """Layer over its floor by format and batch, geometric mean over the recorded shapes that have the cell: the fastest
    implementation of each; every one is a row of the table.

    config_name: whose time stands for an implementation where it was timed under several; one that has none such is taken at
    its fastest. Rows that name no implementation are the classic layer's.
    """
    found = _ratios(recording, config_name)
    means = {key: _by_batch(cells) for key, cells in found.items()}
    every = {key: statistics.geometric_mean(by.values()) for key, by in means.items()}
    formats = list(dict.fromkeys(format for format, _ in means))
    figure = grid(
        "Layers over their floor, by format", f"{recording.source()}; of each format the fastest implementation"
    )
    for format, style in series(formats[:6]).items():
        by = means[format, FASTEST]
        who = [", ".join(_winners(found, format, batch)) for batch in by]
        figure.add_scatter(x=list(by), y=list(by.values()), name=named(get_format(format)), mode="lines+markers",
                           line=style.line(), marker=style.marker(), customdata=who,
                           hovertemplate="%{y:.3g}, %{customdata}<extra>%{fullData.name}</extra>")  # fmt: skip
    batches = sorted({b for by in means.values() for b in by})
    figure.update_xaxes(title="batch, tokens", **log_axis(batches))
    figure.update_yaxes(title="time / floor", rangemode="tozero")
    table = [
        {"format": format, "implementation": impl} | {f"{b}": means[format, impl].get(b) for b in batches}
        for format in formats
        for impl in _impls(means, format) + [FASTEST] * (len(_impls(means, format)) > 1)
    ]
    said = ", ".join(_said(every, format) for format in sorted(formats, key=lambda f: every[f, FASTEST]))
    wrong = sum(row.get("within_bound") is False for row in timed(recording))
    past = f" {wrong} results past their bound on errors are left out." if wrong else ""
    bare = [f for f in dict.fromkeys(row["format"] for row in timed(recording)) if f not in formats]
    without = f" Without a floor, for want of a measured rate of their products: {', '.join(bare)}." if bare else ""
    return Panel(figure, table, f"**Times over the floor, geometric means over batches: {said}.**{past}{without}")


Cells = dict[tuple[str, int], float]
"""(shape, batch) -> time over floor."""


def _ratios(recording: Recording, config_name: str) -> dict[tuple[str, str], Cells]:
    """(format, implementation, FASTEST among them) -> what each cell takes over its floor."""
    device = str(recording.provenance["gpu"]).replace(" ", "_")
    rows = [row for row in timed(recording) if row["within_bound"] is not False]
    named = {_cell(row) for row in rows if row["config_name"] == config_name}
    found: dict[tuple[str, str], Cells] = {}
    for row in rows:
        floor = _recorded_floor(row, device)
        if floor is None or (_cell(row) in named and row["config_name"] != config_name):
            continue
        ratio, cell = timing(row).median_us / floor, (row["shape"], row["num_tokens"])
        for impl in (row.get("impl", CLASSIC), FASTEST):
            of = found.setdefault((row["format"], impl), {})
            of[cell] = min(ratio, of.get(cell, math.inf))
    return found


def _cell(row: Row) -> tuple[Any, ...]:
    return row["format"], row.get("impl", CLASSIC), row["shape"], row["num_tokens"]


def _by_batch(cells: Cells) -> dict[int, float]:
    batches = sorted({batch for _, batch in cells})
    return {b: statistics.geometric_mean(r for (_, at), r in cells.items() if at == b) for b in batches}


def _impls(found: Mapping[tuple[str, str], Any], format: str) -> list[str]:
    return [impl for of, impl in found if of == format and impl != FASTEST]


def _winners(found: Mapping[tuple[str, str], Cells], format: str, batch: int) -> list[str]:
    """Which implementations are the fastest of some shape at that batch size."""
    best = {at: ratio for at, ratio in found[format, FASTEST].items() if at[1] == batch}
    return [i for i in _impls(found, format) if any(found[format, i].get(at) == ratio for at, ratio in best.items())]


def _said(every: Mapping[tuple[str, str], float], format: str) -> str:
    impls = _impls(every, format)
    each = ", ".join(f"{impl} {number(every[format, impl])}" for impl in impls)
    only = "" if impls == [CLASSIC] else f" ({each})" if len(impls) > 1 else f" ({impls[0]})"
    return f"{named(get_format(format))} {number(every[format, FASTEST])}{only}"


def recorded() -> Recording | None:
    """The recording `quantised`, None where there is none yet."""
    try:
        return recordings.load("quantised")
    except RecordingError:
        if (recordings.recordings_dir() / "quantised.json").is_file():
            raise  # it is there, and cannot be read
        return None


def times() -> Panel:
    """`over_the_floor` of the recording, or which command makes it."""
    found = recorded()
    if found is not None:
        return over_the_floor(found)
    command = recordings.MADE_BY["quantised"]
    return Panel(None, [], f"**No layer of quantised experts is recorded yet: `{command}` on a GPU records them all.**")


def _recorded_floor(row: Row, device: str) -> float | None:
    try:
        at = roofline.load_ceilings(device, "floors", row["multiplies"])
    except UnknownNameError:
        return None
    return roofline.floor_us(roofline.Cost(row["flops"], row["bytes"], 0.0), at).us


def peer(data: Mapping[str, Any]) -> Panel:
    """sglang's fp8 kernel in blocks, over the floor by batch, geometric means of shapes, under three kinds of config."""
    kinds = {"default": "default rule", "shipped": "shipped file", "tuned": "searched here"}
    by: dict[str, dict[int, list[float]]] = {kind: {} for kind in kinds}
    for row in data["rows"]:
        if all(kind in row for kind in kinds):  # a mean over other shapes would not compare
            for kind in kinds:
                by[kind].setdefault(row["M"], []).append(row[kind] / row["floor"])
    means = {kind: {b: statistics.geometric_mean(r) for b, r in each.items()} for kind, each in by.items()}
    figure = grid("sglang's fp8 kernel over the floor", data["source"])
    for kind, label in kinds.items():
        style = CONFIGS[kind if kind != "tuned" else "searched"]
        figure.add_scatter(x=list(means[kind]), y=list(means[kind].values()), name=label, mode="lines+markers",
                           line=style.line(), marker=style.marker())  # fmt: skip
    batches = sorted({row["M"] for row in data["rows"]})
    figure.update_xaxes(title="batch, tokens", **log_axis(batches))
    figure.update_yaxes(title="time / floor", rangemode="tozero")
    table = [{"config": kinds[kind], "shapes": max(map(len, by[kind].values()))} | {f"{b}": v for b, v in each.items()}
             for kind, each in means.items()]  # fmt: skip
    best = [min(row[kind] for kind in kinds if kind in row) / row["floor"] for row in data["rows"]]
    got = [row.get("shipped", row["default"]) / row["floor"] for row in data["rows"]]
    sentence = (
        f"**What a user gets without searching takes {number(statistics.geometric_mean(got))} times the floor over {len(got)} "
        f"cells; the best of default, shipped and searched {number(statistics.geometric_mean(best))}.** Both quantisations of "
        "activations are in the time, the order by expert is not; the figure shows the shapes that have all three."
    )
    return Panel(figure, table, sentence)


def beside(recording: Recording) -> Panel:
    """Ours over sglang's own kernel by format and batch, geometric means over shapes, GEMMs and configs.

    recording: `peer_kernels`, as tests/peer_kernels.py makes it: both under the same config, at the same problem.
    """
    times = {(*_product(row), row["impl"]): timing(row).median_us for row in recording.rows}
    ratios: dict[str, dict[int, list[float]]] = {}
    for (*product, impl), ours in times.items():
        if impl == "ours":
            format, num_tokens, *_ = product
            ratios.setdefault(format, {}).setdefault(num_tokens, []).append(ours / times[*product, "sglang"])
    figure = grid("Ours over sglang's own kernel", f"{recording.source()}; same config, same problem")
    for format, style in series(list(ratios)).items():
        by = {batch: statistics.geometric_mean(of) for batch, of in ratios[format].items()}
        figure.add_scatter(x=list(by), y=list(by.values()), name=named(get_format(format)), mode="lines+markers",
                           line=style.line(), marker=style.marker())  # fmt: skip
    batches = sorted({batch for by in ratios.values() for batch in by})
    figure.update_xaxes(title="batch, tokens", **log_axis(batches))
    figure.update_yaxes(title="time / sglang's", rangemode="tozero")
    figure.add_hline(y=1.0, line_dash="dot")
    table = [
        {
            "format": format,
            "products": sum(map(len, by.values())),
            "geometric mean": _mean(by),
            "worst": max(map(max, by.values())),
        }
        | {f"{batch}": statistics.geometric_mean(of) for batch, of in by.items()}
        for format, by in ratios.items()
    ]
    said = ", ".join(f"{named(get_format(format))} {number(_mean(by))}" for format, by in ratios.items())
    sentence = f"**Ours over sglang's own kernel, under the same config, geometric means: {said}.** One GEMM at a time."
    return Panel(figure, table, sentence)


def _product(row: Row) -> tuple[Any, ...]:
    return row["format"], row["num_tokens"], row["shape"], row["gemm"], row["config_name"]


def _mean(by: Mapping[int, list[float]]) -> float:
    return statistics.geometric_mean(ratio for of in by.values() for ratio in of)


def in_short(found: Panel) -> str:
    """How near recorded layers come to their floor, or that none are recorded."""
    return found.sentence.replace("**", "")
