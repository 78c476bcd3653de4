"""What the fastest layer is made of: what each of its ideas is worth, and which of its forms serves which batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moelab.errors import counted
from moelab.plots import ratio_map
from moelab.plots.fast_layer import LEVEL, NOTHING, runs_of
from moelab.plots.layer_baseline import cells_of, names_of, timed
from moelab.plots.panel import Panel, Row, geometric_mean, timing
from moelab.plots.style import GREEN, GREY, VERMILLION, grid, number
from moelab.recordings import Recording
from moelab.shapes import MoEShape

WITHOUT = "fast without "
SMALL = 0.01
"""A mean so near to 1 is worth nothing, whatever its shapes agree on."""

# --- what each idea is worth --------------------------------------------------------------------------------------


def ablation(recording: Recording) -> Panel:
    """Map of idea by batch: the layer's time with the idea switched off over its time with it, geometric mean over shapes.

    Grey, worth nothing: within SMALL of 1, or not more than half of the shapes agree beyond their 95 % intervals.
    """
    single = _single(recording)
    if not single:
        return Panel(None, [], NOTHING)
    means = _means(single)
    ideas = sorted(names_of(single, "idea"), key=lambda idea: -max(c.ratio for (i, _), c in means.items() if i == idea))
    batches = sorted(names_of(single, "batch"))
    figure = grid(
        f"What each idea is worth: {_short(means, ideas, batches)}",
        f"{recording.source()}; time without the idea over time with it, geometric mean over shapes, uniform routing<br>"
        f"green: it helps; orange: it costs; grey: under {100 * SMALL:g} %, or most shapes do not agree beyond 95 % intervals<br>"
        "in brackets: how many shapes use it, where not all do",
        height=180 + 36 * len(ideas),
    )  # fmt: skip
    ratio_map.draw(figure, means, ideas, batches, low=VERMILLION, high=GREEN, bar="without / with")
    figure.update_xaxes(title="batch, tokens")
    return Panel(figure, _by_shape(single, ideas), _said(means, ideas, batches, single))


def _single(recording: Recording) -> list[dict[str, Any]]:
    """One row per idea, shape and batch: the ratio, and whether the idea helps, costs or ties (uniform routing)."""
    from moelab.measure import tie

    found = []
    rows = [row for row in timed(recording) if row["routing"] == "uniform" and row.get("within_bound")]
    for (shape, batch), cell in cells_of(rows).items():
        for impl, row in cell.items():
            if not impl.startswith(WITHOUT) or "fast" not in cell:
                continue
            off, on = timing(row), timing(cell["fast"])
            verdict = "ties" if tie(off, on) else "helps" if on.median_us < off.median_us else "costs"
            found.append({"idea": impl.removeprefix(WITHOUT), "shape": shape, "batch": batch,
                          "ratio": off.median_us / on.median_us, "verdict": verdict})  # fmt: skip
    return found


def _means(single: Sequence[Row]) -> dict[tuple[str, int], ratio_map.Cell]:
    means = {}
    shapes = len(names_of(single, "shape"))
    for idea, batch in dict.fromkeys((row["idea"], row["batch"]) for row in single):
        here = [row for row in single if (row["idea"], row["batch"]) == (idea, batch)]
        mean = geometric_mean([row["ratio"] for row in here])
        agree = sum(row["verdict"] == ("helps" if mean > 1 else "costs") for row in here)
        cell = ratio_map.cell_of(mean, 2 * agree <= len(here) or abs(mean - 1) < SMALL)
        few = f" ({len(here)})" if len(here) < shapes else ""
        means[idea, batch] = replace(cell, text=cell.text + few)
    return means


def _by_shape(single: Sequence[Row], ideas: Sequence[str]) -> list[Row]:
    """A line per idea and shape, a column per batch."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(single, key=lambda row: ideas.index(row["idea"])):
        line = lines.setdefault((row["idea"], row["shape"]), {"without": row["idea"], "shape": row["shape"]})
        line[str(row["batch"])] = row["ratio"]
    columns = ["without", "shape", *map(str, sorted(names_of(single, "batch")))]
    return [{column: line.get(column) for column in columns} for line in lines.values()]


Means = Mapping[tuple[str, int], ratio_map.Cell]


def _where(means: Means, idea: str, batches: Sequence[int], up: bool) -> list[int]:
    """The batch sizes at which an idea helps (up) or costs."""
    return [b for b in batches if (cell := means.get((idea, b))) and not cell.tie and (cell.ratio > 1) is up]


def _short(means: Means, ideas: Sequence[str], batches: Sequence[int]) -> str:
    """The idea that is worth most, and how many never help."""
    helps = [idea for idea in ideas if _where(means, idea, batches, True)]
    idle = len(ideas) - len(helps)
    return f"{helps[0]} most" + (f", {idle} of {len(ideas)} nothing" if idle else "") if helps else "nothing that shows"


def _said(means: Means, ideas: Sequence[str], batches: Sequence[int], single: Sequence[Row]) -> str:
    """Ideas by what they are worth at best, with where; those worth nothing; those that cost."""
    worth, nothing, costs = [], [], []
    for idea in ideas:
        up, down = (_where(means, idea, batches, side) for side in (True, False))
        used = [b for b in batches if (idea, b) in means]
        if up:
            low, high = (number(pick(means[idea, b].ratio for b in up)) for pick in (min, max))
            span = high if low == high else f"{low} to {high}"
            worth.append(f"{idea} {span} at batch {runs_of(up, used)}")
        elif not down:
            nothing.append(idea)
        if down:
            least = min(down, key=lambda b: means[idea, b].ratio)
            costs.append(f"{idea} at batch {runs_of(down, used)}, {means[idea, least].ratio:.2f} at {least}")
    said = (
        f"**Without each the layer takes so many times as long: {'; '.join(worth)}.**"
        if worth
        else "**No idea shows a gain.**"
    )
    said += f" Worth nothing that most shapes agree on: {', '.join(nothing)}." if nothing else ""
    said += f" Switched off, the layer is faster: {'; '.join(costs)}." if costs else ""
    most = max(single, key=lambda row: row["ratio"])
    return (
        said + f" The most in one cell: {most['idea']}, {most['ratio']:.2f} ({most['shape']}, batch {most['batch']})."
    )


# --- which form serves which batch --------------------------------------------------------------------------------


def short(instance: str) -> str:
    """An instance's repr as "16×128 w1 s6 b2": tokens by weight rows of a tile, multiplying warpgroups, stages, blocks on a
    multiprocessor; "c2" with clusters of two, "p" where tokens are first permuted. Of a form for a few tokens
    "few 1×1024 2×256": rows by columns of weights in a tile of GEMM1 and of GEMM2; and "gated", under its tuned configs."""
    if not instance.startswith(("Instance", "FewTokens")):
        return "gated"
    if instance.startswith("FewTokens"):
        tiles = re.findall(r"rows=(\d+), columns=(\d+)", instance)
        return f"few {' '.join(f'{rows}×{columns}' for rows, columns in tiles)}"
    field = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", instance)}
    rows = 64 * field["warpgroups"] * field["row_blocks"]
    cluster = (f" c{field['cluster']}" if "cluster" in field else "") + (" p" if "permutes" in field else "")
    return (
        f"{field['tokens']}×{rows} w{field['warpgroups']} s{field['stages']} b{field.get('per_processor', 1)}{cluster}"
    )


def _order(instance: str) -> tuple[int, ...]:
    """Forms for a few tokens first, then the gated pipeline."""
    numbers = tuple(int(value) for value in re.findall(r"\d+", short(instance)))
    kinds = ("FewTokens", "gated", "Instance")
    return (next(i for i, kind in enumerate(kinds) if instance.startswith(kind)), *numbers)


Rule = Callable[[MoEShape, int], str]
"""A shape and a batch size -> the instance chosen for it, as rows name it."""


def rule_in_use(recording: Recording) -> Rule:
    """What `moelab.pipelines.fast` chooses on the recording's device, the rule's instance where that is the classic layer: the
    rule follows the recording, whose `by_rule` is of the rule before. Of a recording of instances alone, what their rule
    chooses.
    """
    from moelab.pipelines.fast import choose_for
    from moelab.suites.fast_layer import instance_of, name_of

    others = any(not row["instance"].startswith("Instance") for row in recording.rows if "instance" in row)
    device = str(recording.provenance["gpu"])

    def rule(shape: MoEShape, num_tokens: int) -> str:
        served = choose_for(shape, num_tokens, None, device).form if others else None
        return name_of(served or instance_of(shape, num_tokens))

    return rule


def instances(recording: Recording, shapes: Mapping[str, MoEShape], rule: Rule | None = None) -> Panel:
    """Map of instance by rows an expert gets: its time over the best instance's, geometric mean over the cells there, uniform
    routing; the table has skewed cells too.

    recording: of the suite fast_choice. shapes: its shapes by name. rule: None for the one in use. Bold: the best; boxed: what
    the rule chooses.
    """
    rule = rule or rule_in_use(recording)
    rows = [row for row in timed(recording) if row["within_bound"] and row["shape"] in shapes]
    cells: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["shape"], row["num_tokens"], row["routing"]), []).append(row)
    table = [_chosen(key, cell, shapes[key[0]], rule) for key, cell in cells.items()]
    if not table:
        return Panel(None, [], "**Nothing of it was timed.** Record it again: `moelab record fast_choice`.")
    table.sort(key=lambda row: row["rows an expert"])
    judged = [row for row in table if row["the rule’s loss, %"] is not None and row["routing"] == "uniform"]
    skewed = [row for row in table if row["the rule’s loss, %"] is not None and row["routing"] != "uniform"]
    uniform = {key: cell for key, cell in cells.items() if key[2] == "uniform"} or cells
    over = _over_best(uniform, shapes)
    columns = sorted({at for _, at in over})
    names = sorted(names_of(rows, "instance"), key=_order)
    notes = [note for start, note in _NOTES.items() if any(start in name for name in names)]
    figure = grid(
        f"Which form of the kernel serves best: {_short_of_rule(judged)}",
        f"{recording.source()}, short passes; time over the best form’s, geometric mean over shapes, uniform routing<br>"
        "bold: the best; boxed: what the rule chooses; 16×128 w1 s6 b2: tiles of 16 tokens by 128 weight rows, 1 warpgroup,<br>"
        f"6 stages, 2 blocks a multiprocessor{''.join(notes)}",
        height=190 + 27 * len(names),
    )  # fmt: skip
    _draw_forms(figure, over, names, columns, rows, shapes, rule)
    return Panel(
        figure, table, _said_of_rule(judged, table) + _said_of_skewed(skewed) + _changed_since(rows, shapes, rule)
    )


_NOTES = {
    "cluster": "; c2: two blocks share weights",
    "permutes": "; p: tokens permuted first",
    "FewTokens": "; few 1×1024 2×256: tiles of 1 row by 1024 columns of weights in GEMM1, 2 by 256 in GEMM2",
}
"""What a subtitle says of forms whose names hold a word."""


def _changed_since(rows: Sequence[Row], shapes: Mapping[str, MoEShape], rule: Rule) -> str:
    """In how many cells the rule chose otherwise when this was recorded; empty where in none, or rows do not say."""
    then = [row for row in rows if row.get("by_rule")]
    other = sum(row["instance"] != rule(shapes[row["shape"]], row["num_tokens"]) for row in then)
    if not other:
        return ""
    return f" When this was recorded the rule chose another form in {other} of {counted(len(then), 'cell')}; it follows this now."


def _rows_an_expert(shape: MoEShape, num_tokens: int) -> float:
    """If tokens spread evenly."""
    return num_tokens * shape.top_k / shape.num_experts


def _as_text(rows: float) -> str:
    """1/32 rather than 0.03125."""
    return f"1/{round(1 / rows)}" if rows < 1 else f"{rows:.4g}"


def _chosen(key: tuple[str, int, str], cell: Sequence[Row], shape: MoEShape, rule: Rule) -> dict[str, Any]:
    """One cell: the best instance, the rule's, and what the rule loses; None where it was not timed."""
    from moelab.measure import tie

    times = {row["instance"]: timing(row) for row in cell}
    best = min(times, key=lambda name: times[name].median_us)
    chosen = rule(shape, key[1])
    known = chosen in times
    loss = 100 * (times[chosen].median_us / times[best].median_us - 1) if known else None
    return {
        "shape": key[0], "batch": key[1], "routing": key[2], "rows an expert": _rows_an_expert(shape, key[1]),
        "best": short(best), "µs": times[best].median_us,
        "the rule’s": short(chosen) if known else None, "the rule’s loss, %": loss,
        "tie": known and tie(times[chosen], times[best]), "candidates": len(cell),
    }  # fmt: skip


def _over_best(cells: Mapping[Any, Sequence[Row]], shapes: Mapping[str, MoEShape]) -> dict[tuple[str, float], float]:
    """(instance, rows an expert) -> its time over the best one's, geometric mean over the cells with so many rows."""
    found: dict[tuple[str, float], list[float]] = {}
    for (shape, num_tokens, _), cell in cells.items():
        times = {row["instance"]: timing(row).median_us for row in cell}
        at = _rows_an_expert(shapes[shape], num_tokens)
        for name, us in times.items():
            found.setdefault((name, at), []).append(us / min(times.values()))
    return {key: geometric_mean(values) for key, values in found.items()}


_COLORS = [[0.0, "#d5eee4"], [0.1, "#f3efd9"], [0.4, "#f3cf9d"], [1.0, "#e8935a"]]
_WORST = 1.5
"""Times the best from which on the colour is the same: what is so far off is not worth telling apart."""


def _draw_forms(figure: Any, over: Mapping[tuple[str, float], float], names: Sequence[str], columns: Sequence[float],
                rows: Sequence[Row], shapes: Mapping[str, MoEShape], rule: Rule) -> None:  # fmt: skip
    across, labels = [_as_text(at) for at in columns], [short(name) for name in names]
    z = np.array([[over.get((name, at), np.nan) for at in columns] for name in names], np.float32)
    best = np.nanmin(z, axis=0)
    texts = [
        ["" if np.isnan(v) else f"<b>{v:.2f}</b>" if v == best[i] else f"{v:.2f}" for i, v in enumerate(line)]
        for line in z
    ]
    figure.add_heatmap(
        x=across, y=labels, z=z, zmin=1.0, zmax=_WORST, colorscale=_COLORS, xgap=2, ygap=2, text=texts, texttemplate="%{text}",
        textfont={"size": 11, "color": "#222"}, hoverongaps=False,
        hovertemplate="%{y}, %{x} rows an expert: %{z:.3f}<extra></extra>",
        colorbar={"title": {"text": "over best"}, "outlinewidth": 0, "thickness": 14},
    )  # fmt: skip
    timed_at = {(shapes[row["shape"]], row["num_tokens"]) for row in rows}
    places = {(rule(shape, num_tokens), _rows_an_expert(shape, num_tokens)) for shape, num_tokens in timed_at}
    ruled = {(name, at) for name, at in places if name in names}
    for name, at in sorted(ruled):
        x, y = columns.index(at), names.index(name)
        figure.add_shape(
            type="rect", x0=x - 0.47, x1=x + 0.47, y0=y - 0.45, y1=y + 0.45, line={"color": GREY, "width": 2.5}
        )
    figure.update_xaxes(title="rows an expert gets if tokens spread evenly", tickangle=0, type="category", showgrid=False,
                        categoryorder="array", categoryarray=across)  # fmt: skip
    figure.update_yaxes(title="form", type="category", autorange="reversed", showgrid=False, categoryorder="array",
                        categoryarray=labels)  # fmt: skip


def _short_of_rule(judged: Sequence[Row]) -> str:
    if not judged:
        return "the rule’s choice was not timed"
    near = sum(row["tie"] or row["the rule’s loss, %"] <= 100 * LEVEL for row in judged)
    return f"the rule is within {100 * LEVEL:g} % or a tie in {near} of {counted(len(judged), 'cell')}"


def _said_of_rule(judged: Sequence[Row], table: Sequence[Row]) -> str:
    """How often the rule's choice is the best, what it loses elsewhere, where the most, and from how many rows on nothing."""
    if not judged:
        return f"**The rule’s choice was timed in none of {counted(len(table), 'cell')}.**"
    loss = "the rule’s loss, %"
    lost = [row for row in judged if row[loss] > 0 and not row["tie"]]
    first = sum(row[loss] == 0 for row in judged)
    mean = 100 * (geometric_mean([1 + row[loss] / 100 for row in judged]) - 1)
    said = (
        f"**The rule chooses the fastest form in {first} of {counted(len(judged), 'cell')}, a tie with it in "
        f"{len(judged) - first - len(lost)}, and loses in {len(lost)}; {mean:.1f} % on average over all.**"
    )
    if lost:
        worst = max(lost, key=lambda row: row[loss])
        said += (
            f" The most: {worst[loss]:.1f} % ({worst['shape']}, batch {worst['batch']}, {_as_text(worst['rows an expert'])} "
            f"rows an expert: {worst['best']} in place of {worst['the rule’s']})."
        )
        most = max(row["rows an expert"] for row in lost)
        above = [row for row in judged if row["rows an expert"] > most]
        if above:
            said += f" Above {_as_text(most)} rows an expert it is the fastest or ties ({counted(len(above), 'cell')}"
            tied = max(above, key=lambda row: row[loss])
            said += (
                f"; at most {tied[loss]:.1f} %, a tie: {tied['shape']}, batch {tied['batch']})." if tied[loss] else ")."
            )
    return said + " The best of several short passes is flattered, so a small loss may be none."


def _said_of_skewed(skewed: Sequence[Row]) -> str:
    """What the same rule, which does not know the routing, loses where experts are chosen unevenly."""
    if not skewed:
        return ""
    loss = "the rule’s loss, %"
    mean, worst = geometric_mean([1 + row[loss] / 100 for row in skewed]), max(skewed, key=lambda row: row[loss])
    return (
        f" Under skewed routing, which it does not know, it loses {100 * (mean - 1):.1f} % on average over "
        f"{counted(len(skewed), 'cell')}, at most {worst[loss]:.1f} % ({worst['shape']}, batch {worst['batch']})."
    )
