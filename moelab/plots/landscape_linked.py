"""Two linked views of one batch size: every config as a point, and the brushed ones as lines across their parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from plotly.colors import sample_colorscale

from moelab.plots.landscape import GEMM_NAMES, Allowed, describe
from moelab.plots.panel import Panel
from moelab.plots.style import BLUE, GREY, SCALE, grid, hold_margins, number, round_ticks
from moelab.tuner.problem import Gemm
from moelab.tuner.survey import PARAMETERS, Detail, Floats, Survey, short_names

SHOWN = 250
"""Brushed configs drawn with everything that is known of them: more would make a saved notebook heavy."""

SPREAD = 0.04
"""How far a line may pass beside its value, of an axis' height: configs that share a value would lie on each other."""

LEVELS = 6
"""Colours of the lines: each is a trace."""

SPECKS = (220, 75)
"""Specks of the scatter's grey points that fit beside and above each other."""

AXES = {
    "shared memory": ("shared memory a program, KiB", lambda d: d.shared_bytes / 1024),
    "waves": ("waves: programs over what the chip holds at once", lambda d: d.waves),
    "padding": ("rows computed per row that exists", lambda d: d.padding),
}
"""What the scatter's x axis can be: name -> (title, value of a Detail)."""

_HOVER = (
    "%{customdata[0]}x%{customdata[1]}x%{customdata[2]} g%{customdata[3]} w%{customdata[4]} s%{customdata[5]}"
    "<br>%{y:.2f} µs (%{customdata[6]:.2f} … %{customdata[7]:.2f}, %{customdata[8]} samples)"
    "<br>%{customdata[9]:.1f} KiB shared memory, %{customdata[10]:.2f} waves"
    "<br>padding %{customdata[11]:.2f}, %{customdata[12]:.0f} % of the floor's speed"
    "<br>registers: not recorded<extra></extra>"
)


def brushed(survey: Survey, gemm: Gemm, num_tokens: int, allowed: Allowed, within: float) -> list[int]:
    """Indices of the configs that are allowed and at most `within` slower than the best there, best first; each program
    once."""
    row = survey.row(num_tokens)
    times = survey.times[gemm][row]
    own = survey.representative[gemm][row] == np.arange(len(times))
    keep = survey.chosen(gemm, allowed) & own & np.isfinite(times) & (times <= times.min() * (1 + within))
    return [int(i) for i in np.argsort(np.where(keep, times, np.inf), kind="stable")[: int(keep.sum())]]


def in_a_line(survey: Survey, gemm: Gemm, num_tokens: int, allowed: Allowed, within: float) -> str:
    """How many configs are brushed, and the fastest of them: quick enough to follow a slider while it is dragged."""
    indices = brushed(survey, gemm, num_tokens, allowed, within)
    start = f"{GEMM_NAMES[gemm]}, batch {num_tokens}, {describe(allowed, survey)}: {len(indices)} configs within {within:.0%}"
    if not indices:
        return f"{start}; widen a range"
    first = float(survey.times[gemm][survey.row(num_tokens)][indices[0]])
    return f"{start}; fastest {survey.configs[gemm][indices[0]].short()}, {number(first, 4)} µs"


def _counted(indices: Sequence[int]) -> str:
    return f"{len(indices)}" if len(indices) <= SHOWN else f"fastest {SHOWN} of {len(indices)}"


def scatter(survey: Survey, gemm: Gemm, num_tokens: int, allowed: Allowed, within: float, x: str = "waves") -> Panel:
    """Time against something known of a config, the brushed ones in colour, the others grey. x: a name of AXES."""
    title, value = AXES[x]
    everything = brushed(survey, gemm, num_tokens, allowed, within)
    indices = everything[:SHOWN]
    details = survey.details(gemm, num_tokens, indices)
    times = survey.times[gemm][survey.row(num_tokens)]
    own = survey.representative[gemm][survey.row(num_tokens)] == np.arange(len(times))
    others = np.setdiff1d(np.flatnonzero(np.isfinite(times) & own), indices)
    behind = survey.details(gemm, num_tokens, [int(i) for i in others])
    figure = grid(
        f"{GEMM_NAMES[gemm]}, batch {num_tokens}: {_counted(everything)} configs brushed ({describe(allowed, survey)})",
        f"{survey.landscape.source()}; within {within:.0%} of the best; grey: the other {len(behind)}, near ones as one speck",
        height=420,
    )
    specks = _apart(np.array([value(d) for d in behind]), times[others])
    figure.add_scatter(
        x=specks[0].astype(np.float32), y=specks[1].astype(np.float32), mode="markers", name="others",
        marker={"color": GREY, "size": 4, "opacity": 0.45}, hoverinfo="skip",
    )  # fmt: skip
    rows = [
        [
            *(getattr(d.config, name) for name in PARAMETERS), d.low_us, d.high_us, d.samples, d.shared_bytes / 1024,
            d.waves, d.padding, 100 * d.roof,
        ]
        for d in details
    ]  # fmt: skip
    customdata = np.array(rows, dtype=np.float32).reshape(len(rows), len(PARAMETERS) + 7)
    figure.add_scatter(
        x=np.array([value(d) for d in details], dtype=np.float32), y=times[indices].astype(np.float32), mode="markers",
        name="brushed", marker={"color": BLUE, "size": 7}, customdata=customdata, hovertemplate=_HOVER,
    )  # fmt: skip
    floor = survey.floor_us(gemm, num_tokens)
    if np.isfinite(floor):
        figure.add_hline(y=floor, line={"color": GREY, "dash": "dot"})
        figure.add_annotation(  # of add_hline it would lie at 10**floor: on a log axis annotations count in powers of ten
            x=1, xref="x domain", xanchor="right", y=math.log10(floor), yanchor="bottom", text="floor", showarrow=False,
            font={"color": GREY},
        )  # fmt: skip
    figure.update_xaxes(title=title)
    finite = [float(t) for t in times if np.isfinite(t)]
    low = min([*finite, floor] if np.isfinite(floor) else finite)
    figure.update_yaxes(title="µs", **round_ticks(low * 0.95, max(finite) * 1.05))
    hold_margins(figure)
    figure.update_layout(legend={"orientation": "h", "y": 1.12, "x": 1, "xanchor": "right"})
    table = [
        {"config": d.config.short(), "µs": d.median_us, "95 % interval": f"{number(d.low_us, 4)} … {number(d.high_us, 4)}",
         "samples": d.samples, "shared memory, KiB": d.shared_bytes / 1024, "waves": d.waves,
         "rows computed / existing": d.padding, "floor / time": d.roof}
        for d in details[:12]
    ]  # fmt: skip
    return Panel(figure, table, _sentence(survey, gemm, num_tokens, details))


def _apart(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The points, y on a log axis, without those that lie within a speck's size of another: a page draws each as an element of
    its own, and a thousand of them are most of what a change of a control takes."""
    known = np.isfinite(x)
    x, y = x[known], y[known]
    if not len(x):
        return x, y
    cells = [
        np.round(count * (v - v.min()) / max(float(np.ptp(v)), 1e-9))
        for v, count in zip((x, np.log(y)), SPECKS, strict=True)
    ]
    _, first = np.unique(np.column_stack(cells), axis=0, return_index=True)
    return x[first], y[first]


def _sentence(survey: Survey, gemm: Gemm, num_tokens: int, details: Sequence[Detail]) -> str:
    if not details:
        return f"**No config of the selection was measured within that distance at batch {num_tokens}.** Widen a range."
    best, first = float(survey.times[gemm][survey.row(num_tokens)].min()), details[0]
    tied = sum(d.low_us <= first.high_us for d in details)
    text = (
        f"**Fastest of the brushed: {first.config.short()} at {number(first.median_us, 4)} µs, "
        f"{100 * (first.median_us / best - 1):.1f} % behind the best of all; the intervals of {tied} overlap with its own.** "
    )
    if num_tokens not in survey.well_covered:
        text += f"At batch {num_tokens} the run measured only what was good at a neighbouring batch size. "
    return text + "The table shows the first 12."


def parallel(survey: Survey, gemm: Gemm, num_tokens: int, allowed: Allowed, within: float) -> Panel:
    """The brushed configs as lines across their parameters, coloured by per cent of the best.

    Drawn as lines, not by plotly's parallel coordinates: those need WebGL, over a second where a browser computes it, and
    their ticks have a white halo on dark pages.
    """
    everything = brushed(survey, gemm, num_tokens, allowed, within)
    indices = everything[:SHOWN]
    share = 100 * survey.best_share[gemm][survey.row(num_tokens)][indices]
    low = min(99.0, float(np.floor(min(share, default=99.0))))
    draws, columns = np.random.default_rng(0), []
    for column, name in enumerate(PARAMETERS):
        values = survey.axis(name)
        at = np.array([values.index(int(v)) for v in survey.values[gemm][indices, column]], dtype=float)
        columns.append(at / max(1, len(values) - 1) + draws.uniform(-SPREAD, SPREAD, len(at)))
    heightss = np.column_stack(columns)
    heights = np.column_stack([heightss, (share - low) / (100 - low)])
    figure = grid(
        f"{GEMM_NAMES[gemm]}, batch {num_tokens}: the same {_counted(everything)} configs across their parameters",
        f"{survey.landscape.source()}; one line a config, blue: {low:g} % of the best, yellow: the best",
        height=400,
    )
    axes = {short_names()[name]: [str(v) for v in survey.axis(name)] for name in PARAMETERS}
    axes["% of best"] = [f"{v:g}" for v in np.linspace(low, 100, 5)]
    for level in range(LEVELS):  # the best last, on top
        among = np.minimum((heights[:, -1] * LEVELS).astype(int), LEVELS - 1) == level
        lines = np.column_stack([heights[among], np.full(among.sum(), np.nan)])  # a gap between two lines
        figure.add_scatter(
            x=np.tile(np.arange(lines.shape[1], dtype=np.float32), len(lines)), y=lines.ravel().astype(np.float32),
            mode="lines", line={"width": 1, "color": sample_colorscale(SCALE, (level + 0.5) / LEVELS)[0]},
            opacity=0.7, hoverinfo="skip", showlegend=False,
        )  # fmt: skip
    ticks = [
        (i, j / max(1, len(values) - 1), text)
        for i, values in enumerate(axes.values())
        for j, text in enumerate(values)
    ]
    x, y, text = zip(*ticks, strict=True)
    figure.add_scatter(x=x, y=y, text=text, mode="markers+text", textfont={"color": "white", "size": 11}, hoverinfo="skip",
                       marker={"symbol": "square", "size": 22, "color": "#666666"}, showlegend=False)  # fmt: skip
    figure.update_xaxes(tickvals=list(range(len(axes))), ticktext=list(axes), side="top", range=[-0.25, len(axes) - 0.75],
                        gridcolor=GREY, showline=False, zeroline=False, fixedrange=True)  # fmt: skip
    figure.update_yaxes(visible=False, range=[-0.12, 1.12], fixedrange=True)
    figure.update_layout(margin={"l": 30, "r": 30, "t": 110, "b": 20})
    hold_margins(figure)
    names = short_names()
    table = [
        {
            "parameter": names[name],
            "values among the brushed": ", ".join(
                f"{v}: {int((survey.values[gemm][indices, column] == v).sum())}" for v in survey.axis(name)
            ),
        }
        for column, name in enumerate(PARAMETERS)
    ]
    return Panel(figure, table, _values_sentence(survey, gemm, indices))


def _values_sentence(survey: Survey, gemm: Gemm, indices: Sequence[int]) -> str:
    if not indices:
        return "**No config is brushed.**"
    names = short_names()
    fixed = [
        f"{names[name]} = {int(survey.values[gemm][indices[0], column])}"
        for column, name in enumerate(PARAMETERS)
        if len(np.unique(survey.values[gemm][indices, column])) == 1
    ]
    return f"**All brushed configs share {', '.join(fixed) if fixed else 'no parameter'}.**"
