"""The choice of a form held against models that its fit has not seen: one left out at a time, over all recorded forms.

`python -m moelab.studies.fast_judge` prints, for each shape, how much longer the choice takes than the fastest recorded form, and
how much longer what served when it was recorded. Order or alignment, as predicted, is part of either time.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moelab.kernels.fast_instances import ALL, Instance
from moelab.pipelines import form_choice
from moelab.pipelines import form_times as times
from moelab.pipelines.form_choice import Classic, Form, Gated
from moelab.pipelines.form_times import CLASSIC, GATED, Chip, Coefficients
from moelab.studies import fast_fit
from moelab.studies.fast_fit import Cell, Row


@dataclass(frozen=True)
class Judged:
    """One cell: the form chosen and the fastest recorded, by name; regrets, 0.01 for 1 % longer than that; before: of what served
    when it was recorded, None where that was not timed. off: predicted over recorded time of the form chosen."""

    cell: Cell
    chosen: str
    best: str
    regret: float
    before: float | None
    off: float


def form_of(row: Row) -> Form:
    """A row's form, as `form_choice` has it."""
    if row.kind in (GATED, CLASSIC):
        return (Gated if row.kind == GATED else Classic)(*row.form)
    return row.form


def judge(cell: Sequence[Row], c: Coefficients, chip: Chip) -> Judged:
    """The choice among a cell's recorded forms that are in use, whatever their routing, beside the fastest of all; a tuned form
    is one of them as where its file is."""
    batch = cell[0].batch
    forms = {form_of(row): row for row in cell if not row.default}
    tuned = [form for form, row in forms.items() if not fast_fit.of_the_grid(row)]
    instead = [
        form for form in form_choice.candidates(batch) if form_choice.kind_of(form) in map(form_choice.kind_of, tuned)
    ]
    serve = [form for form in forms if form not in tuned and (not isinstance(form, Instance) or form in ALL)]
    ranked = form_choice.ranked(batch, [*serve, *instead], chip, c)
    for form in tuned:
        ranked = form_choice.with_tuned(form, ranked, batch, chip, c)
    first = form_choice.before_us(batch, c)
    whole = {form: row.us + first[row.kind] for form, row in forms.items()}
    chosen = ranked[0]
    best = min(whole, key=lambda form: whole[form])
    served = [row for row in cell if row.by_rule] or [row for row in cell if row.default]
    then = [row.us + first[row.kind] for row in served]
    return Judged(
        cell[0].cell, form_choice.name_of(chosen.form), form_choice.name_of(best), whole[chosen.form] / whole[best] - 1,
        then[0] / whole[best] - 1 if then else None,
        (chosen.skewed_us if cell[0].cell[1] == "zipf" else chosen.even_us) / whole[chosen.form],
    )  # fmt: skip


def leave_one_out(models: Iterable[str] | None = None) -> list[Judged]:
    """Every recorded cell of those models, None for all, by a fit without its model."""
    _, chip = fast_fit.recorded_chip()
    cells: dict[Cell, list[Row]] = defaultdict(list)
    for row in fast_fit.rows():
        cells[row.cell].append(row)
    begin = times.fitted()
    found = []
    for model in models or sorted({row.model for row in fast_fit.rows()}):
        c = fast_fit.fit(model, begin)
        found += [judge(rows, c, chip) for rows in cells.values() if rows[0].model == model]
    return found


def main() -> None:
    """Print a line for each shape and routing, and one for all."""
    found = leave_one_out()
    groups: dict[tuple[str, str], list[Judged]] = defaultdict(list)
    for each in found:
        groups[each.cell[0], each.cell[1]].append(each)
    print(f"{'shape':<22}{'routing':<9}{'cells':>6}{'mean %':>8}{'worst %':>9}{'before':>9}{'worst %':>9}  worst cell")
    for (shape, routing), of_group in [*groups.items(), (("all", ""), found)]:
        worst = max(of_group, key=lambda each: each.regret)
        then = [each.before for each in of_group if each.before is not None] or [0.0]
        print(
            f"{shape:<22}{routing:<9}{len(of_group):>6}{100 * statistics.mean(each.regret for each in of_group):>8.2f}"
            f"{100 * worst.regret:>9.2f}{100 * statistics.mean(then):>9.2f}{100 * max(then):>9.2f}"
            f"  {worst.cell[2]} tokens: {worst.chosen}, best {worst.best}"
        )


if __name__ == "__main__":
    main()
