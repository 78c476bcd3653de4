"""Which form of the fastest layer serves which batch best, and what the rule that chooses one loses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moelab.errors import counted
from moelab.plots import ratio_map
from moelab.plots.cells import cells_of, conclude, fastest, names_of, timed
from moelab.plots.fast_layer import LEVEL
from moelab.plots.panel import Panel, Row, geometric_mean, timing
from moelab.plots.style import GREY
from moelab.recordings import Recording
from moelab.shapes import MoEShape


def words(instance: str) -> str:
    """An instance's repr in words, in two lines: its tile; warpgroups that multiply it, pipeline stages, CTAs on an SM."""
    if not instance.startswith(("Instance", "FewTokens")):
        return "gated kernels,<br>tuned configs"
    if instance.startswith("FewTokens"):
        (rows, columns), (after, across) = re.findall(r"rows=(\d+), columns=(\d+)", instance)
        return f"few tokens: GEMM1 {rows} × {columns} weights,<br>GEMM2 {after} × {across}"
    field = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", instance)}
    ctas = field.get("per_processor", field.get("ctas_per_sm", 1))
    more = [f"{field['warpgroups']} warpgroup{'s' * (field['warpgroups'] > 1)}", f"{field['stages']} stages"]
    more += (
        [f"{ctas} CTAs an SM"] * (ctas > 1)
        + ["cluster of 2"] * ("cluster" in field)
        + ["permuted"] * ("permutes" in field)
    )
    return (
        f"{field['tokens']} tokens × {64 * field['warpgroups'] * field['row_blocks']} weight rows,<br>{', '.join(more)}"
    )


def _line(instance: str) -> str:
    return words(instance).replace("<br>", " ")


def _order(instance: str) -> tuple[int, ...]:
    """Forms for a few tokens first, then the gated pipeline."""
    numbers = tuple(int(value) for value in re.findall(r"\d+", words(instance)))
    kinds = ("FewTokens", "gated", "Instance")
    return (next(i for i, kind in enumerate(kinds) if instance.startswith(kind)), *numbers)


ROWS, LOSS = "rows an expert", "the rule’s loss, %"

Rule = Callable[[MoEShape, int], str]
"""A shape and a batch size -> the instance chosen for it, as rows name it."""


def rule_in_use(recording: Recording) -> Rule:
    """What `moelab.pipelines.fast` chooses on the recording's device, of instances where that is the classic layer: the
    rule follows the recording, whose `by_rule` is of the rule before. Of a recording of instances alone, what their rule
    chooses.
    """
    from moelab.pipelines.fast import choose_for
    from moelab.pipelines.form_choice import Classic
    from moelab.suites.fast_layer import instance_of, name_of

    others = any(not row["instance"].startswith("Instance") for row in recording.rows if "instance" in row)
    device = str(recording.provenance["gpu"])

    def rule(shape: MoEShape, num_tokens: int) -> str:
        served = choose_for(shape, num_tokens, None, device).form if others else None
        return name_of(instance_of(shape, num_tokens) if served is None or isinstance(served, Classic) else served)

    return rule


def instances(recording: Recording, shapes: Mapping[str, MoEShape], rule: Rule | None = None) -> Panel:
    """Map of instance by rows an expert gets: its time over the best instance's, geometric mean over the cells there, uniform
    routing; the table has skewed cells too.

    recording: of the suite fast_choice. shapes: its shapes by name. rule: None for the one in use. Bold: the best; boxed: what
    the rule chooses.
    """
    rule = rule or rule_in_use(recording)
    rows = [row for row in timed(recording) if row["within_bound"] and row["shape"] in shapes]
    cells = cells_of(rows, "shape", "num_tokens", "routing", by="instance")
    table = [_chosen(key, cell, shapes[key[0]], rule) for key, cell in cells.items()]
    if not table:
        return Panel(None, [], "**Nothing of it was timed.** Record it again: `moelab record fast_choice`.")
    table.sort(key=lambda row: row[ROWS])
    judged, skewed = ([row for row in table if row[LOSS] is not None and (row["routing"] == "uniform") is plain]
                      for plain in (True, False))  # fmt: skip
    uniform = {key: cell for key, cell in cells.items() if key[2] == "uniform"} or cells
    over = _over_best(uniform, shapes)
    columns = sorted({at for _, at in over})
    names = sorted(names_of(rows, "instance"), key=_order)
    best = {at: min(ratio for (_, column), ratio in over.items() if column == at) for at in columns}
    drawn = {}
    for (name, at), ratio in over.items():
        text = f"<b>{ratio:.2f}</b>" if ratio == best[at] else f"{ratio:.2f}"
        drawn[words(name), _as_text(at)] = ratio_map.Cell(ratio, text, False)
    figure = ratio_map.chart(
        f"Which form of the kernel serves best: {_short_of_rule(judged)}",
        f"{recording.source()}, short passes; time over the best form’s, geometric mean over shapes, uniform routing<br>"
        "bold: the best; boxed: what the rule chooses; permuted: activations gathered once, in order of expert",
        drawn, [words(name) for name in names], [_as_text(at) for at in columns], low=None,
        span=math.log(_WORST), bar="over best", size=10, tall=34,
    )  # fmt: skip
    figure.update_xaxes(title="rows an expert gets if tokens spread evenly", tickangle=0)
    timed_at = {(shapes[row["shape"]], row["num_tokens"]) for row in rows}
    places = {(rule(shape, num_tokens), _rows_an_expert(shape, num_tokens)) for shape, num_tokens in timed_at}
    for x, y in sorted((columns.index(at), len(names) - 1 - names.index(name)) for name, at in places if name in names):
        box = {"x0": x - 0.47, "x1": x + 0.47, "y0": y - 0.45, "y1": y + 0.45}
        figure.add_shape(type="rect", **box, line={"color": GREY, "width": 2.5})
    then = [row for row in rows if row.get("by_rule")]
    other = sum(row["instance"] != rule(shapes[row["shape"]], row["num_tokens"]) for row in then)
    changed_since = f"{other} of {counted(len(then), 'cell')}" if other else ""
    return Panel(figure, table, _said(judged, skewed, table, changed_since))


_WORST = 1.5
"""Times the best from which on the colour is the same: what is so far off is not worth telling apart."""


def _rows_an_expert(shape: MoEShape, num_tokens: int) -> float:
    """If tokens spread evenly."""
    return num_tokens * shape.top_k / shape.num_experts


def _as_text(rows: float) -> str:
    """1/32 rather than 0.03125."""
    return f"1/{round(1 / rows)}" if rows < 1 else f"{rows:.4g}"


def _chosen(key: tuple[str, int, str], cell: Mapping[str, Row], shape: MoEShape, rule: Rule) -> dict[str, Any]:
    """One cell: the best instance, the rule's, and what the rule loses; None where it was not timed."""
    times = {name: timing(row) for name, row in cell.items()}
    best, *tied = fastest(times)
    chosen = rule(shape, key[1])
    known = chosen in times
    return {
        "shape": key[0], "batch": key[1], "routing": key[2], ROWS: _rows_an_expert(shape, key[1]), "best": _line(best),
        "µs": times[best].median_us, "the rule’s": _line(chosen) if known else None,
        LOSS: 100 * (times[chosen].median_us / times[best].median_us - 1) if known else None,
        "tie": chosen in (best, *tied), "candidates": len(cell),
    }  # fmt: skip


def _over_best(
    cells: Mapping[Any, Mapping[str, Row]], shapes: Mapping[str, MoEShape]
) -> dict[tuple[str, float], float]:
    """(instance, rows an expert) -> its time over the best one's, geometric mean over the cells with so many rows."""
    found: dict[tuple[str, float], list[float]] = {}
    for (shape, num_tokens, _), cell in cells.items():
        times = {name: timing(row).median_us for name, row in cell.items()}
        for name, us in times.items():
            at = _rows_an_expert(shapes[shape], num_tokens)
            found.setdefault((name, at), []).append(us / min(times.values()))
    return {key: geometric_mean(values) for key, values in found.items()}


def _short_of_rule(judged: Sequence[Row]) -> str:
    if not judged:
        return "the rule’s choice was not timed"
    near = sum(row["tie"] or row[LOSS] <= 100 * LEVEL for row in judged)
    return f"the rule is within {100 * LEVEL:g} % or a tie in {near} of {counted(len(judged), 'cell')}"


def _mean(rows: Sequence[Row]) -> float:
    return 100 * (geometric_mean([1 + row[LOSS] / 100 for row in rows]) - 1)


def _where(row: Row) -> str:
    """A loss, and the cell it is in."""
    return (
        f"{row[LOSS]:.1f} % ({row['shape']}, batch {row['batch']}, {_as_text(row[ROWS])} rows an expert: {row['best']} in place "
        f"of {row['the rule’s']})"
    )


def _said(judged: Sequence[Row], skewed: Sequence[Row], table: Sequence[Row], changed: str) -> str:
    """How often the rule's choice is the best, what it loses elsewhere, where the most, and from how many rows on nothing; under
    skewed routing, which it does not know; and how often it chose otherwise when this was recorded."""
    if not judged:
        return f"**The rule’s choice was timed in none of {counted(len(table), 'cell')}.**"
    lost = [row for row in judged if row[LOSS] > 0 and not row["tie"]]
    first = sum(row[LOSS] == 0 for row in judged)
    most = max((row[ROWS] for row in lost), default=0.0)
    above = [row for row in judged if row[ROWS] > most]
    head = (
        f"The rule chooses the fastest form in {first} of {counted(len(judged), 'cell')}, a tie with it in "
        f"{len(judged) - first - len(lost)}, and loses in {len(lost)}; {_mean(judged):.1f} % on average over all."
    )
    facts = {
        "The most": _where(max(lost, key=lambda row: row[LOSS])) if lost else "",
        f"Above {_as_text(most)} rows an expert it is the fastest or ties" if lost else "The most of a tie":
            f"{counted(len(above), 'cell')}, at most {max(row[LOSS] for row in above):.1f} %" if above else "",
        "Under skewed routing, which it does not know, it loses": f"{_mean(skewed):.1f} % on average over "
            f"{counted(len(skewed), 'cell')}, at most {_where(max(skewed, key=lambda row: row[LOSS]))}" if skewed else "",
        "When this was recorded the rule chose another form in": changed,
    }  # fmt: skip
    return conclude(head, facts) + " The best of several short passes is flattered, so a small loss may be none."
