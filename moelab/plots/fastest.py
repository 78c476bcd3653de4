"""Which implementation is fastest where: a map of shape by batch, ties called ties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from moelab.errors import counted
from moelab.plots.layer_baseline import CLEARLY, cells_of, names_of, sound, timed
from moelab.plots.panel import Panel, Row, timing
from moelab.plots.style import grid, look
from moelab.recordings import Recording

CLASSIC = "triton"


def winners(recording: Recording) -> list[dict[str, Any]]:
    """One row per cell: the fastest implementation within its error bound, and who ties with it (overlapping intervals)."""
    from moelab.measure import tie

    found = []
    for (shape, batch), cell in cells_of(timed(recording)).items():
        times = {impl: timing(row) for impl, row in sound(cell).items()}
        if not times:
            continue
        first = min(times, key=lambda impl: times[impl].median_us)
        tied = [impl for impl in times if impl != first and tie(times[first], times[impl])]
        classic = times.get(CLASSIC)
        past = [
            impl
            for impl, row in cell.items()
            if not row["within_bound"] and timing(row).median_us < times[first].median_us
        ]
        found.append({
            "shape": shape, "batch": batch, "fastest": first, "tied with it": ", ".join(tied), "µs": times[first].median_us,
            "95 % low": times[first].interval_us[0], "95 % high": times[first].interval_us[1],
            "classic, µs": classic.median_us if classic else None,
            "over classic": times[first].median_us / classic.median_us if classic else None,
            "faster, past its bound": ", ".join(past),
        })  # fmt: skip
    return found


def fastest(recording: Recording) -> Panel:
    """Map of shape by batch: the fastest implementation's name and its time over the classic layer's; ties in grey."""
    table = winners(recording)
    shapes, batches = names_of(table, "shape"), sorted(names_of(table, "batch"))
    figure = grid("Which implementation is fastest where", f"{recording.source()}; the number: its time over that of "
                  f"{CLASSIC}, the classic layer<br>grey: a tie, the 95 % intervals overlap, the shorter median first; "
                  "within the error bound only", height=190 + 84 * len(shapes))  # fmt: skip
    for impl in [*names_of([row for row in table if not row["tied with it"]], "fastest"), None]:
        z = [[1 if any(_belongs(row, shape, b, impl) for row in table) else None for b in batches] for shape in shapes]
        color = look(impl).color if impl else "#8c8c8c"
        figure.add_heatmap(x=[str(b) for b in batches], y=shapes, z=z, xgap=3, ygap=3, showscale=False, hoverinfo="skip",
                           colorscale=[[0, _tint(color)], [1, _tint(color)]])  # fmt: skip
    figure.add_scatter(
        x=[str(row["batch"]) for row in table], y=[row["shape"] for row in table], mode="text", text=[_label(r) for r in table],
        textfont={"size": 11, "color": "#1c1c1c"}, hovertemplate="%{y}, batch %{x}: %{text}<extra></extra>", showlegend=False,
    )  # fmt: skip
    figure.update_xaxes(title="batch, tokens", type="category", showgrid=False)
    figure.update_yaxes(title="shape", autorange="reversed", showgrid=False, automargin=True)
    sentence = _said_of_winners(table)
    if not any(row["faster, past its bound"] for row in table):
        table = [{k: v for k, v in row.items() if k != "faster, past its bound"} for row in table]
    return Panel(figure, table, sentence)


def _belongs(row: Row, shape: str, batch: int, impl: str | None) -> bool:
    tied = bool(row["tied with it"])
    return (row["shape"], row["batch"]) == (shape, batch) and (
        tied if impl is None else row["fastest"] == impl and not tied
    )


def _tint(color: str, share: float = 0.55) -> str:
    """The colour mixed with white, so that dark text reads on it."""
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - (255 - part) * share):02x}" for part in parts)


def _label(row: Row) -> str:
    """The winner and its ratio; in a tie a second name, or how many more."""
    tied = row["tied with it"].split(", ") if row["tied with it"] else []
    more = "" if not tied else f"<br>= {_broken(tied[0])}" if len(tied) == 1 else f"<br>= {len(tied)} others"
    ratio = f"<br>{row['over classic']:.2f}" if row["over classic"] is not None else ""
    return f"<b>{_broken(row['fastest'])}</b>{more}{ratio}"


def _broken(name: str, length: int = 13) -> str:
    """A long name on two lines, broken after its underscore nearest to the middle."""
    if len(name) <= length or "_" not in name:
        return name
    at = min((i for i, letter in enumerate(name) if letter == "_"), key=lambda i: abs(i - len(name) / 2))
    return name[: at + 1] + "<br>" + name[at + 1 :]


def _said_of_winners(table: Sequence[Row]) -> str:
    clear = [row for row in table if not row["tied with it"]]
    wins = ", ".join(f"{impl} {count}" for impl, count in Counter(row["fastest"] for row in clear).most_common())
    verbs = "has" if len(clear) == 1 else "have"
    ties = len(table) - len(clear)
    head = (
        f"**Of {counted(len(table), 'cell')} {len(clear)} {verbs} one fastest implementation{f' ({wins})' if wins else ''}; "
        f"{ties} {'is a tie' if ties == 1 else 'are ties'}.**"
    )
    past = sum(bool(row["faster, past its bound"]) for row in table)
    left_out = f" In {counted(past, 'cell')} something faster is left out, its error past the bound." if past else ""
    return f"{head} {_gains(table)} Fastest or tied with it in the most shapes: {_by_batch(table)}.{left_out}"


def _gains(table: Sequence[Row]) -> str:
    """How often and by how much the classic layer is beaten; a tie with it is no gain."""
    gains = [
        row
        for row in table
        if row["over classic"] is not None and CLASSIC not in [row["fastest"], *row["tied with it"].split(", ")]
    ]
    if not gains:
        return "Nothing gains over the classic layer."
    best = min(gains, key=lambda row: row["over classic"])
    large = sum(row["over classic"] <= 1 - CLEARLY for row in gains)
    return (
        f"The classic layer is beaten in {counted(len(gains), 'cell')}, by {100 * CLEARLY:g} % or more in {large}; at best in "
        f"{best['over classic']:.2f} of its time ({best['fastest']}, {best['shape']}, batch {best['batch']}). The winner of "
        "many candidates is flattered where the gain is small."
    )


def _by_batch(table: Sequence[Row]) -> str:
    """Who leads at which batch sizes, in their order: "a at 1, 4; b and c at 16"."""
    leads: dict[str, list[str]] = {}
    for batch in sorted({row["batch"] for row in table}):
        leads.setdefault(_most(table, batch), []).append(str(batch))
    return "; ".join(f"{impls} at batch {', '.join(batches)}" for impls, batches in leads.items())


def _most(table: Sequence[Row], batch: int) -> str:
    """Who is fastest, or ties with the fastest, in the most shapes at a batch size."""
    at_top: Counter[str] = Counter()
    for row in table:
        if row["batch"] == batch:
            at_top.update([row["fastest"], *filter(None, row["tied with it"].split(", "))])
    most = max(at_top.values())
    return " and ".join(impl for impl, count in at_top.items() if count == most)
