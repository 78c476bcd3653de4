"""Which form of the fastest layer serves which batch best, and what the rule that chooses one loses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moelab.errors import counted
from moelab.plots.cells import names_of, timed
from moelab.plots.fast_layer import LEVEL
from moelab.plots.panel import Panel, Row, geometric_mean, timing
from moelab.plots.style import GREY, grid
from moelab.recordings import Recording
from moelab.shapes import MoEShape


def short(instance: str) -> str:
    """An instance's repr as "16×128 w1 s6 b2": tokens by weight rows of a tile, multiplying warpgroups, stages, blocks on a
    SM; "c2" with clusters of two, "p" where tokens are first permuted. Of a form for a few tokens
    "few 1×1024 2×512": rows by columns of weights in a tile of GEMM1 and of GEMM2; and "gated", under its tuned configs."""
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
        "bold: the best; boxed: what the rule chooses; 16×128 w1 s6 b2: tiles of 16 tokens by 128 weight rows, 1 warpgroup, "
        f"6 stages, 2 blocks an SM{'<br>' * bool(notes)}{'; '.join(notes)}",
        height=190 + 27 * len(names),
    )  # fmt: skip
    _draw_forms(figure, over, names, columns, rows, shapes, rule)
    return Panel(
        figure, table, _said_of_rule(judged, table) + _said_of_skewed(skewed) + _changed_since(rows, shapes, rule)
    )


_NOTES = {
    "cluster": "c2: two CTAs share weights",
    "permutes": "p: tokens permuted first",
    "FewTokens": "few 1×1024 2×512: tiles of 1 row by 1024 columns of weights in GEMM1, 2 by 512 in GEMM2",
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
