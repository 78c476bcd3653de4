"""The recording fast_layer, cell by cell: the fastest layer beside the classic one, as maps of shape by batch size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from moelab.config import KernelConfig
from moelab.errors import counted
from moelab.plots import ratio_map
from moelab.plots.cells import cells_of, names_of, sound, timed
from moelab.plots.fast_layer import NOTHING, default_only
from moelab.plots.panel import Panel, Row, geometric_mean, timing
from moelab.plots.style import GREY, grid
from moelab.recordings import Recording

COLORS = "green: fast is faster; blue: classic is; grey: a tie, the 95 % intervals overlap"
UNTUNED = "<br>default only: no tuned file there, so classic ran sglang’s default config"


def outcomes(recording: Recording, what: str = "") -> list[dict[str, Any]]:
    """One row per routing, shape and batch whose "fast" and "classic" are timed and within their error bounds: times, ratio
    and verdict. what: ends the contenders' names, such as ", from logits", whose results were judged without it."""
    from moelab.measure import tie

    found = []
    rows = timed(recording)
    for routing in names_of(rows, "routing"):
        for (shape, batch), cell in cells_of([row for row in rows if row["routing"] == routing]).items():
            pair = {
                name: {"within_bound": True, **cell[name]} for name in ("classic" + what, "fast" + what) if name in cell
            }
            if len(sound(pair)) < 2:
                continue
            classic, fast = (timing(row) for row in pair.values())
            verdict = "tie" if tie(fast, classic) else "faster" if fast.median_us < classic.median_us else "slower"
            found.append({
                "routing": routing, "shape": shape, "batch": batch, "classic, µs": classic.median_us,
                "fast, µs": fast.median_us, "classic / fast": classic.median_us / fast.median_us, "fast is": verdict,
                **_configs(cell["classic" + what]),
            })  # fmt: skip
    return found


def _configs(row: Row) -> dict[str, Any]:
    if "config" not in row:
        return {}
    both = (KernelConfig.from_json(row[key]).short() for key in ("config", "down_config"))
    return {"classic’s configs": " / ".join(both), "tried": row.get("tried")}


def _sorted_apart(table: Sequence[Row], recording: Recording) -> tuple[list[str], list[str]]:
    """The shapes of a table, those without a tuned config last, and those alone."""
    shapes, untuned = names_of(table, "shape"), default_only(recording)
    fallen = [shape for shape in shapes if shape in untuned]
    return [shape for shape in shapes if shape not in fallen] + fallen, fallen


def _labels(shapes: Sequence[str], fallen: Sequence[str]) -> dict[str, str]:
    return {shape: f"{shape}<br>classic: default only" if shape in fallen else shape for shape in shapes}


def beside_classic(recording: Recording, gains: Recording | None = None) -> Panel:
    """Maps of shape by batch, one for each routing: the classic layer's time over fast's; over 1, fast is faster.

    gains: the recording tuned_gain, which knows what a tuned config is worth where this one had none.
    """
    table = outcomes(recording)
    if not table:
        return Panel(None, [], NOTHING)
    shapes, fallen = _sorted_apart(table, recording)
    routings, batches = names_of(table, "routing"), sorted(names_of(table, "batch"))
    labels = _labels(shapes, fallen)
    figure = grid(
        f"The fastest layer beside the classic one: {_tally(table, fallen)}",
        f"{recording.source()}; classic’s time over fast’s; {COLORS}{UNTUNED if fallen else ''}",
        titles=[f"{routing} routing" for routing in routings], rows=len(routings),
        height=190 + (34 * len(shapes) + 40) * len(routings),
    )  # fmt: skip
    cells = {routing: _cells(table, routing, labels) for routing in routings}
    span = max(ratio_map.span_of(each) for each in cells.values())
    for number, routing in enumerate(routings, 1):
        bar = "classic / fast" if number == 1 else ""
        ratio_map.draw(figure, cells[routing], list(labels.values()), batches, row=number, span=span, bar=bar)
        _set_apart(figure, shapes, fallen, number)
    figure.update_xaxes(title="batch, tokens", row=len(routings))
    return Panel(figure, table, _said(table, fallen, gains) + _said_of_better(better(recording)))


def better(recording: Recording) -> list[dict[str, Any]]:
    """Cells where a form that does not serve was faster than "fast" beyond the intervals, the most first: how many per cent
    longer "fast" takes, and that form."""
    from moelab.measure import tie

    found: list[dict[str, Any]] = []
    rows = timed(recording)
    for routing in names_of(rows, "routing"):
        for (shape, batch), cell in cells_of([row for row in rows if row["routing"] == routing]).items():
            pair: dict[str, Row] = {name: cell[name] for name in ("fast", "fast, best instance") if name in cell}
            if len(sound(pair)) < 2:
                continue
            fast, best = (timing(row) for row in pair.values())
            if not tie(fast, best) and best.median_us < fast.median_us:
                more, form = 100 * (fast.median_us / best.median_us - 1), pair["fast, best instance"]["instance"]
                found.append({"routing": routing, "shape": shape, "batch": batch, "more, %": more, "form": form})
    return sorted(found, key=lambda row: -row["more, %"])


def _said_of_better(found: Sequence[Row]) -> str:
    """How far what serves is from the best that ran beside it."""
    if not found:
        return ""
    at = "; ".join(f"{row['more, %']:.1f} % at {_where(row)}" for row in found[:3])
    which = "the most: " if len(found) > 3 else ""
    return f" Another form of fast was faster than what serves in {counted(len(found), 'cell')} ({which}{at})."


def _set_apart(figure: Any, shapes: Sequence[str], fallen: Sequence[str], row: int) -> None:
    """A line above the shapes without a tuned config."""
    if 0 < len(fallen) < len(shapes):
        figure.add_hline(len(fallen) - 0.5, line={"color": GREY, "width": 2}, row=row, col=1)


def _cells(table: Sequence[Row], routing: str, labels: Mapping[str, str]) -> dict[tuple[str, int], ratio_map.Cell]:
    return {
        (labels[row["shape"]], row["batch"]): ratio_map.cell_of(row["classic / fast"], row["fast is"] == "tie")
        for row in table
        if row["routing"] == routing
    }


def _counts(table: Sequence[Row]) -> str:
    count = Counter(row["fast is"] for row in table)
    return f"faster in {count['faster']}, level in {count['tie']} and slower in {count['slower']}"


def _tally(table: Sequence[Row], fallen: Sequence[str]) -> str:
    """For the title: the counts where the classic layer was tuned, if it was anywhere."""
    tuned = [row for row in table if row["shape"] not in fallen]
    if not tuned:
        return f"{_counts(table)} of {counted(len(table), 'cell')}, none tuned"
    return f"{_counts(tuned)} of {counted(len(tuned), 'cell')}{' where classic is tuned' if fallen else ''}"


def _said(table: Sequence[Row], fallen: Sequence[str], gains: Recording | None) -> str:
    tuned, apart = ([row for row in table if (row["shape"] in fallen) is there] for there in (False, True))
    said = [_said_of_tuned(tuned)] if tuned else []
    if apart:
        mean = geometric_mean([row["classic / fast"] for row in apart])
        said.append(
            f"Counted apart: {' and '.join(fallen)}, where there was no tuned file and classic ran sglang’s default config "
            f"alone; fast is {_counts(apart)} of {counted(len(apart), 'cell')} there, {mean:.2f} on average, which says as much "
            "of that config as of the layer."
        )
        said += [text for shape in fallen if (text := _since([row for row in apart if row["shape"] == shape], gains))]
    return " ".join(said)


def _said_of_tuned(tuned: Sequence[Row]) -> str:
    best, worst = (pick(tuned, key=lambda row: row["classic / fast"]) for pick in (max, min))
    parts = []
    for routing in names_of(tuned, "routing"):
        mine = [row for row in tuned if row["routing"] == routing]
        parts.append(f"{routing} {geometric_mean([row['classic / fast'] for row in mine]):.3f}")
    wins = ", ".join(
        f"{sum(row['fast is'] == 'faster' for row in here)}/{len(here)} at {batch}"
        for batch in sorted(names_of(tuned, "batch"))
        if (here := [row for row in tuned if row["batch"] == batch])
    )
    return (
        f"**Where classic had tuned configs to choose from, fast is {_counts(tuned)} of {counted(len(tuned), 'cell')}.** Classic "
        f"takes from {worst['classic / fast']:.2f} of fast’s time ({_where(worst)}) to {best['classic / fast']:.2f} "
        f"({_where(best)}); geometric mean: {', '.join(parts)}. Cells where fast is faster, by batch: {wins}."
    )


def _where(row: Row) -> str:
    return f"{row['shape']}, batch {row['batch']}, {row['routing']}"


def _since(apart: Sequence[Row], gains: Recording | None) -> str:
    """What would be left of a shape's ratio beside a pair tuned since, if the recording tuned_gain has one: two runs."""
    worth = {} if gains is None else {(row["target"], row["num_tokens"]): row["ratio"]
                                      for row in gains.select(kind="layer", config_name="default") if "ratio" in row}  # fmt: skip
    known = [row for row in apart if (row["shape"], row["batch"]) in worth and row["routing"] == "uniform"]
    if not known:
        return ""
    default = geometric_mean([worth[row["shape"], row["batch"]] for row in known])
    ratio = geometric_mean([row["classic / fast"] for row in known])
    return (
        f"{known[0]['shape']} has been tuned since (recording tuned_gain, another run): its default takes {default:.2f} times "
        f"the tuned pair’s time at these batch sizes, which would leave {ratio / default:.2f} of the {ratio:.2f} under uniform "
        "routing."
    )


# --- from router logits -------------------------------------------------------------------------------------------


def from_logits(recording: Recording, shape: str = "qwen3-30b-a3b/tp1", mark_us: float = 30.0) -> Panel:
    """From router logits, routing and order included: microseconds of fast above those of classic, coloured by their ratio.

    shape, mark_us: whose time at the smallest batch the sentence sets beside a mark.
    """
    table = outcomes(recording, ", from logits")
    if not table:
        return Panel(None, [], NOTHING)
    shapes, fallen = _sorted_apart(table, recording)
    labels = _labels(shapes, fallen)
    figure = grid(
        f"From router logits, fast is {_tally(table, fallen)}",
        f"{recording.source()}; µs, above fast’s, below classic’s; {COLORS}{UNTUNED if fallen else ''}",
        height=190 + 44 * len(shapes),
    )  # fmt: skip
    cells = {
        (labels[row["shape"]], row["batch"]): ratio_map.Cell(
            row["classic / fast"],
            f"<b>{_us(row['fast, µs'])}</b><br>{_us(row['classic, µs'])}",
            row["fast is"] == "tie",
        )
        for row in table
    }
    ratio_map.draw(figure, cells, list(labels.values()), sorted(names_of(table, "batch")), bar="classic / fast")
    _set_apart(figure, shapes, fallen, 1)
    figure.update_xaxes(title="batch, tokens")
    return Panel(figure, table, _said_of_logits(recording, table, fallen, shape, mark_us))


def _us(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:,.0f}"


def _said_of_logits(
    recording: Recording, table: Sequence[Row], fallen: Sequence[str], shape: str, mark_us: float
) -> str:
    tuned = [row for row in table if row["shape"] not in fallen]
    said = f"**From router logits fast is {_tally(table, fallen)}.**"
    if tuned and fallen:
        apart = [row for row in table if row["shape"] in fallen]
        said += (
            f" Under sglang’s default alone ({', '.join(fallen)}): {_counts(apart)} of {counted(len(apart), 'cell')}."
        )
    parts = []
    for impl in ("fast", "classic"):
        rows = recording.select(impl=f"{impl}, from logits", shape=shape)
        for row in [row for row in rows if "samples_us" in row and row["num_tokens"] == 1]:
            low, high = timing(row).interval_us
            side = "under" if high < mark_us else "over" if low > mark_us else "not to be told from"
            parts.append(
                f"{impl} takes {timing(row).median_us:.1f} µs ({low:.1f} to {high:.1f}), {side} {mark_us:g} µs"
            )
    return said + (f" {shape} at one token: {'; '.join(parts)}." if parts else "")
