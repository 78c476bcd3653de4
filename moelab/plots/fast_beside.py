"""The recording fast_layer, cell by cell: the fastest layer beside the classic one, as maps of shape by batch size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from moelab.config import KernelConfig
from moelab.errors import counted
from moelab.plots import ratio_map
from moelab.plots.cells import cells_of, conclude, extremes, names_of, sound, timed, verdict
from moelab.plots.fast_layer import NOTHING, default_only
from moelab.plots.panel import Panel, Row, geometric_mean, timing
from moelab.plots.style import BETTER, GREY, WORSE, grid
from moelab.recordings import Recording

COLORS = "green: fast is faster; orange: classic is; grey: a tie, the 95 % intervals overlap"
UNTUNED = "<br>default only: no tuned file there, so classic ran sglang’s default config"
RATIO = "classic / fast"


def _pairs(recording: Recording, first: str, second: str) -> list[tuple[dict[str, Any], Row, Row]]:
    """(where, a row, the other one) for each routing, shape and batch where both contenders are timed and within their bounds.

    Rows that were judged under another name are taken as right.
    """
    found: list[tuple[dict[str, Any], Row, Row]] = []
    for (routing, shape, batch), cell in cells_of(timed(recording), "routing", "shape", "num_tokens").items():
        pair: dict[str, Row] = {name: {"within_bound": True, **cell[name]} for name in (first, second) if name in cell}
        if len(sound(pair)) == 2:
            found.append(({"routing": routing, "shape": shape, "batch": batch}, pair[first], pair[second]))
    return found


def outcomes(recording: Recording, what: str = "") -> list[dict[str, Any]]:
    """One row per routing, shape and batch whose "fast" and "classic" are timed and within their error bounds: times, ratio
    and verdict. what: ends the contenders' names, such as ", from logits", whose results were judged without it."""
    found = []
    for place, *rows in _pairs(recording, "classic" + what, "fast" + what):
        classic, fast = map(timing, rows)
        found.append({
            **place, "classic, µs": classic.median_us, "fast, µs": fast.median_us, RATIO: classic.median_us / fast.median_us,
            "fast is": verdict(fast, classic), **_configs(rows[0]),
        })  # fmt: skip
    return found


def _configs(row: Row) -> dict[str, Any]:
    if "config" not in row:
        return {}
    both = (KernelConfig.from_json(row[key]).short() for key in ("config", "down_config"))
    return {"classic’s configs": " / ".join(both), "tried": row.get("tried")}


def better(recording: Recording) -> list[dict[str, Any]]:
    """Cells where a form that does not serve was faster than "fast" beyond the intervals, the most first: how many per cent
    longer "fast" takes, and that form."""
    found: list[dict[str, Any]] = []
    for place, row, other in _pairs(recording, "fast", "fast, best instance"):
        fast, best = timing(row), timing(other)
        if verdict(best, fast) == "faster":
            found.append({**place, "more, %": 100 * (fast.median_us / best.median_us - 1), "form": other["instance"]})
    return sorted(found, key=lambda row: -row["more, %"])


# --- drawn --------------------------------------------------------------------------------------------------------


def beside_classic(recording: Recording, gains: Recording | None = None) -> Panel:
    """Maps of shape by batch, one for each routing: the classic layer's time over fast's; over 1, fast is faster.

    gains: the recording tuned_gain, which knows what a tuned config is worth where this one had none.
    """
    table = outcomes(recording)
    cells = [ratio_map.cell_of(row[RATIO], row["fast is"] == "tie") for row in table]
    fallen = default_only(recording)
    facts = _facts(table, fallen, gains)
    if found := better(recording):
        at = "; ".join(f"{row['more, %']:.1f} % at {_where(row)}" for row in found[:3])
        facts["Another form of fast was faster than what serves"] = f"{counted(len(found), 'cell')} ({at})"
    return _maps(
        "The fastest layer beside the classic one:",
        "classic’s time over fast’s",
        recording,
        table,
        cells,
        fallen,
        facts,
    )


def from_logits(recording: Recording, shape: str = "qwen3-30b-a3b/tp1", mark_us: float = 30.0) -> Panel:
    """From router logits, routing and order included: microseconds of fast above those of classic, coloured by their ratio.

    shape, mark_us: whose time at the smallest batch the sentence sets beside a mark.
    """
    table = outcomes(recording, ", from logits")
    cells = [
        ratio_map.Cell(
            row[RATIO], f"<b>{_us(row['fast, µs'])}</b><br>{_us(row['classic, µs'])}", row["fast is"] == "tie"
        )
        for row in table
    ]
    fallen = default_only(recording)
    facts = _facts(table, fallen, None)
    for impl in ("fast", "classic"):
        for row in recording.select(impl=f"{impl}, from logits", shape=shape, num_tokens=1):
            if "samples_us" not in row:
                continue
            low, high = timing(row).interval_us
            side = "under" if high < mark_us else "over" if low > mark_us else "not to be told from"
            facts[f"{impl} at one token of {shape}"] = (
                f"{timing(row).median_us:.1f} µs ({low:.1f} to {high:.1f}), {side} {mark_us:g}"
            )
    return _maps(
        "From router logits, fast is", "µs, above fast’s, below classic’s", recording, table, cells, fallen, facts, 44
    )


def _us(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:,.0f}"


def _maps(
    title: str, what: str, recording: Recording, table: Sequence[Row], cells: Sequence[ratio_map.Cell], untuned: Sequence[str],
    facts: Mapping[str, str], tall: int = 34,
) -> Panel:  # fmt: skip
    """A map for each routing, shapes without a tuned config last, under a line."""
    if not table:
        return Panel(None, [], NOTHING)
    shapes = sorted(names_of(table, "shape"), key=lambda shape: shape in untuned)
    fallen = [shape for shape in shapes if shape in untuned]
    labels = {shape: shape + "<br>classic: default only" * (shape in fallen) for shape in shapes}
    drawn: dict[str, dict[tuple[str, int], ratio_map.Cell]] = {routing: {} for routing in names_of(table, "routing")}
    for row, cell in zip(table, cells, strict=True):
        drawn[row["routing"]][labels[row["shape"]], row["batch"]] = cell
    figure = grid(
        f"{title} {_tally(table, fallen)}", f"{recording.source()}; {what}; {COLORS}{UNTUNED if fallen else ''}",
        titles=[f"{routing} routing" for routing in drawn], rows=len(drawn),
        height=190 + (tall * len(shapes) + 40 * (len(drawn) > 1)) * len(drawn),
    )  # fmt: skip
    span, batches = max(map(ratio_map.span_of, drawn.values())), sorted(names_of(table, "batch"))
    for number, each in enumerate(drawn.values(), 1):
        ratio_map.draw(
            figure,
            each,
            [*labels.values()],
            batches,
            row=number,
            span=span,
            low=WORSE,
            high=BETTER,
            bar=RATIO if number == 1 else "",
        )
        if 0 < len(fallen) < len(shapes):
            figure.add_hline(len(fallen) - 0.5, line={"color": GREY, "width": 2}, row=number, col=1)
    figure.update_xaxes(title="batch, tokens", row=len(drawn))
    return Panel(figure, table, conclude(f"{title} {_tally(table, fallen)}.", facts))


# --- in words -----------------------------------------------------------------------------------------------------


def _counts(table: Sequence[Row]) -> str:
    count = Counter(row["fast is"] for row in table)
    return f"faster in {count['faster']}, level in {count['tie']} and slower in {count['slower']}"


def _tally(table: Sequence[Row], fallen: Sequence[str]) -> str:
    """The counts where the classic layer was tuned, if it was anywhere."""
    tuned = [row for row in table if row["shape"] not in fallen]
    if not tuned:
        return f"{_counts(table)} of {counted(len(table), 'cell')}, none tuned"
    return f"{_counts(tuned)} of {counted(len(tuned), 'cell')}{' where classic is tuned' if fallen else ''}"


def _mean(rows: Sequence[Row]) -> float:
    return geometric_mean([row[RATIO] for row in rows])


def _facts(table: Sequence[Row], untuned: Sequence[str], gains: Recording | None) -> dict[str, str]:
    """Where classic had tuned configs: from which ratio to which, means by routing, wins by batch; apart, where it had none."""
    tuned, apart = ([row for row in table if (row["shape"] in untuned) is there] for there in (False, True))
    facts = {}
    if tuned:
        by = {key: {each: [row for row in tuned if row[key] == each] for each in sorted(names_of(tuned, key))}
              for key in ("routing", "batch")}  # fmt: skip
        facts = {
            "Classic’s time over fast’s": extremes(tuned, lambda row: row[RATIO], at=_where),
            "geometric mean": ", ".join(f"{routing} {_mean(rows):.3f}" for routing, rows in by["routing"].items()),
            "fast is faster": ", ".join(
                f"{sum(row['fast is'] == 'faster' for row in rows)}/{len(rows)} at {batch}"
                for batch, rows in by["batch"].items()
            ),
        }
    if apart:
        fallen = names_of(apart, "shape")
        facts["Counted apart, under sglang’s default config alone"] = (
            f"{', '.join(fallen)}, {_counts(apart)} of {counted(len(apart), 'cell')}, {_mean(apart):.2f} on average"
        )
        facts |= {f"{shape}, tuned since in another run": _since(apart, shape, gains) for shape in fallen if gains}
    return facts


def _where(row: Row) -> str:
    return f"{row['shape']}, batch {row['batch']}, {row['routing']}"


def _since(apart: Sequence[Row], shape: str, gains: Recording | None) -> str:
    """What would be left of a shape's ratio beside a pair tuned since, if the recording tuned_gain has one: two runs."""
    rows = gains.select(kind="layer", config_name="default", target=shape) if gains else []
    worth = {row["num_tokens"]: row["ratio"] for row in rows if "ratio" in row}
    known = [row for row in apart if (row["shape"], row["routing"]) == (shape, "uniform") and row["batch"] in worth]
    if not known:
        return ""
    default, ratio = geometric_mean([worth[row["batch"]] for row in known]), _mean(known)
    return (
        f"its default takes {default:.2f} times the tuned pair’s time at these batch sizes, which would leave "
        f"{ratio / default:.2f} of the {ratio:.2f} under uniform routing"
    )
