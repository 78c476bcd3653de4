"""How every figure looks: one colour, one meaning; units on every axis; light and dark pages.

A saturated colour means the same in every notebook: an implementation or a rival (LOOKS; marker and dash say it a second time),
or a verdict (BETTER, WORSE, WRONG). A muted one (SERIES) means nothing of its own: sizes, dtypes, configs, parts of a layer are
named by their legend or by a plot of their own. A test holds that no colour is used twice.

Backgrounds are transparent. No text colour has WCAG's contrast of 4.5 on white and on JupyterLab's dark #111 at once (4.34 is
the most), so text is drawn in GREY and `INK` paints it for the page at hand.
"""

from __future__ import annotations

import copy
import functools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moelab.implementations import IMPLEMENTATIONS, RETIRED_LOOKS

GREY = "#7b7b7b"
GRID = "rgba(128, 128, 128, 0.25)"
CLEAR = "rgba(0, 0, 0, 0)"
BETTER, WORSE, WRONG = "#009E73", "#E69F00", "#C8402A"
"""Verdicts: faster than what it is compared with, slower, and past its bound or refused."""
HEIGHT = 440
SUBTITLE = 138
"""Characters of a line of a subtitle, which has to fit a page of 1000 pixels."""
MUTED_SCALE = [[0.0, "#4f6d94"], [0.5, "#f4f4f4"], [1.0, "#8f7440"]]
"""Values to either side of 0, or of a bound: no verdict."""
SCALE: list[list[Any]] = [[0.0, "#3f6fa8"], [0.5, "#a3a3a3"], [1.0, "#f2b71f"]]
"""From little to much, blue over grey to yellow: neither end vanishes on a white page or on a dark one."""

TEXT_ON_LIGHT, TEXT_ON_DARK = "#424a53", "#c9d1d9"
_PAINTED = 'text[style*="rgb(123, 123, 123)"]'
_DARK_PAGES = ('body[data-jp-theme-light="false"]', "body.vscode-dark")
INK = (
    f".js-plotly-plot {_PAINTED} {{fill: {TEXT_ON_LIGHT} !important}} "
    f"{', '.join(f'{page} .js-plotly-plot {_PAINTED}' for page in _DARK_PAGES)} {{fill: {TEXT_ON_DARK} !important}}"
)
"""Style rules for GREY text: dark on a light page, light on a dark one (JupyterLab, Voila, VS Code)."""

LEAST_WIDTH = 880
"""Pixels that a figure has at least: drawn narrower, beside JupyterLab's file browser in a window of 1000, its labels would lie
on each other and its titles end at its edge."""
WIDTH = (
    f".js-plotly-plot {{min-width: {LEAST_WIDTH}px}} .jp-OutputArea-child:has(> .js-plotly-plot) {{overflow-x: auto}}"
)
"""Style rules by which a figure in a narrower column scrolls sideways."""


def contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colours "#rrggbb": 1 for none to 21."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def text_on(ground: str) -> str:
    """Dark or white, whichever has more contrast to a ground "#rrggbb"; black where that is less than WCAG's 4.5."""
    best = max(("#222222", "#ffffff"), key=lambda text: contrast(text, ground))
    return best if contrast(best, ground) >= 4.5 else "#000000"


def on_scale(share: float) -> str:
    """The colour "#rrggbb" of SCALE at a share of it, 0 to 1."""
    at = min(int(share * (len(SCALE) - 1)), len(SCALE) - 2)
    (low, first), (high, last) = SCALE[at : at + 2]
    part = (share - low) / (high - low)
    ends = ([int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in (first, last))
    return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in zip(*ends, strict=True))


def luminance(color: str) -> float:
    """WCAG's relative luminance of "#rrggbb"."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@dataclass(frozen=True)
class Look:
    """How one series is drawn: colour, marker symbol, line dash (plotly's names)."""

    color: str
    symbol: str
    dash: str

    def line(self, width: float = 2.0) -> dict[str, Any]:
        """For a trace's `line`."""
        return {"color": self.color, "dash": self.dash, "width": width}

    def marker(self, size: float = 8, *, hollow: bool = False) -> dict[str, Any]:
        """For a trace's `marker`."""
        symbol = f"{self.symbol}-open" if hollow else self.symbol
        return {"color": self.color, "symbol": symbol, "size": size, "line": {"width": 1.5, "color": self.color}}


LOOKS: Mapping[str, Look] = {
    **{name: Look(*of) for name, of in RETIRED_LOOKS.items()},
    **{name: Look(*one.look) for name, one in IMPLEMENTATIONS.items() if one.look},
    "classic": Look(*(IMPLEMENTATIONS["triton"].look or ())),
    "grouped_mm": Look("#E98A4B", "circle-x", "dash"),
    "sglang": Look("#56B4E9", "star-square", "dot"),
    "triton_f32": Look("#2F8FC4", "x", "dashdot"),
    "cuda": Look("#7B5BD6", "triangle-right", "solid"),
    "FlashInfer": Look("#D6336C", "triangle-left", "dashdot"),
    "floor": Look(GREY, "line-ew", "dot"),
}
"""Implementations as their table has them; torch's grouped product; sglang, and its Triton sum-reduce; our CUDA C++ sum-reduce
(purple, as *fast*); FlashInfer; the floor."""

SERIES = (
    Look("#4f6d94", "circle", "solid"),
    Look("#a18a4f", "square", "dash"),
    Look("#5f8a78", "diamond", "dashdot"),
    Look("#8d6a80", "triangle-up", "longdash"),
    Look("#7d7466", "triangle-down", "dot"),
    Look("#84a0b8", "pentagon", "longdashdot"),
)
"""Muted: for series that are no implementations, such as block sizes, dtypes, configs, parts."""

BLUE, ORANGE, GREEN, PURPLE, BRONZE, SKY = (each.color for each in SERIES)

CONFIGS: Mapping[str, Look] = {
    **dict(zip(("default", "shipped", "shipped elsewhere", "searched"), SERIES, strict=False)), "tuned": LOOKS["classic"]
}  # fmt: skip
"""The classic layer by where its config comes from: tuned is the layer at its best, and has its colour."""

SIDES: Mapping[str, Look] = {"memory": SERIES[0], "compute": SERIES[1]}
"""The two sides of the roofline."""

STEPS: Mapping[str, str] = dict(
    zip(("GEMM1", "activation", "GEMM2", "sum-reduce", "align"), (each.color for each in SERIES), strict=False)
)
"""The launches of the classic layer."""


def look(name: str) -> Look:
    """The look of an implementation; one of SERIES, always the same, for a name that is not in LOOKS."""
    return LOOKS.get(name) or SERIES[sum(name.encode()) % len(SERIES)]


def series(names: Sequence[Any]) -> dict[Any, Look]:
    """A look for each of at most six names, in order."""
    return dict(zip(names, SERIES, strict=False))


def number(value: Any, digits: int = 3) -> str:
    """A value as a table shows it: `digits` significant ones, an exponent only beyond 1e-3 ... 1e6."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, int) or not isinstance(value, float):
        return str(value)
    value = float(f"{value:.{digits}g}") if abs(value) < 10**digits else value
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    if value == 0:
        return "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


_AXIS = {"automargin": True, "title": {"standoff": 15}, "zerolinewidth": 2}
_BAR = {"thickness": 1.2, "width": 3}
TEMPLATE = go.layout.Template(
    layout={
        "autotypenumbers": "strict", "hoverlabel": {"align": "left"}, "hovermode": "closest",
        "annotationdefaults": {"arrowcolor": GREY, "arrowhead": 0, "arrowwidth": 1}, "xaxis": _AXIS, "yaxis": _AXIS,
    },
    data={"bar": [{"error_x": {"color": GREY} | _BAR, "error_y": {"color": GREY} | _BAR}],
          "scatter": [{"error_x": _BAR, "error_y": _BAR}], "heatmap": [{"colorbar": {"outlinewidth": 0}}]},
)  # fmt: skip
"""Instead of plotly's own, of which nothing else is used: 6 kB in every figure of a saved notebook."""


def grid(
    title: str,
    source: str,
    *,
    titles: Sequence[str] = (),
    rows: int = 1,
    height: int = HEIGHT,
    shared_y: bool = False,
    gap: float | None = None,
) -> go.Figure:
    """An empty figure of rows x (len(titles) / rows) plots, with its source as the subtitle ("<br>" breaks it)."""
    figure = copy.deepcopy(_plots(tuple(titles), rows, shared_y, gap))
    given = source.count("<br>")
    source = "<br>".join(part for line in source.split("<br>") for part in broken(line))
    lines = 1 + source.count("<br>")
    height += 16 * (lines - 1 - given)
    plot_titles = 24 if len(titles) > 1 else 0
    layout = figure.layout
    layout.title.text, layout.title.subtitle.text, layout.title.y = title, source, 1 - 24 / height
    layout.height, layout.margin.t = height, 64 + 16 * lines + plot_titles
    return figure


@functools.lru_cache(maxsize=128)
def _plots(titles: tuple[str, ...], rows: int, shared_y: bool, gap: float | None) -> go.Figure:
    """`grid` without its words and height: most of what a figure takes plotly to make, and the same at each move of a slider."""
    cols = max(1, math.ceil(len(titles) / rows))
    spacing = gap if gap is not None else (0.03 if shared_y else 0.09)
    figure = make_subplots(
        rows=rows,
        cols=cols,
        subplot_titles=list(titles) if len(titles) > 1 else None,
        shared_yaxes=shared_y,
        horizontal_spacing=spacing if cols > 1 else 0.0,
        vertical_spacing=0.17 if rows > 1 else 0.0,
    )
    figure.layout.template = TEMPLATE
    figure.update_layout(
        title={
            "font": {"size": 17},
            "subtitle": {"font": {"size": 12, "color": GREY}},
            "x": 0.0,
            "xref": "container",
            "pad": {"l": 12},
            "yref": "container",
        },
        font={"size": 12, "color": GREY},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        colorway=[each.color for each in SERIES],
        margin={"l": 70, "r": 30, "b": 60},
        legend={"bgcolor": CLEAR, "font": {"size": 12}, "tracegroupgap": 4},
        hoverlabel={"font": {"size": 12}},
        bargap=0.25,
    )
    axis = {"gridcolor": GRID, "linecolor": GREY, "zerolinecolor": GRID, "showline": True, "ticks": "outside"}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_annotations(font={"size": 13, "color": GREY})
    return figure


def broken(line: str, width: int = SUBTITLE) -> list[str]:
    """A line of a subtitle as lines of at most `width`, each of whole statements ("; " ends one); a statement that is longer
    is broken into lines of about the same length."""
    lines = [""]
    for statement in line.split("; "):
        together = f"{lines[-1]}; {statement}" if lines[-1] else statement
        if len(together) <= width:
            lines[-1] = together
            continue
        count = len(textwrap.wrap(statement, width))
        even = next(w for w in range(len(statement) // count, width + 1) if len(textwrap.wrap(statement, w)) == count)
        lines[len(lines) - (not lines[-1]) :] = textwrap.wrap(statement, even)
    return lines


def hold_margins(figure: go.Figure, labels: Sequence[str] = (), size: int = 12) -> None:
    """The figure's margins as they are, the left one wide enough for its y axis' labels in that size and its title: where a
    figure is drawn while someone waits, since plotly's automatic margins take a second drawing."""
    widest = max(map(len, labels), default=0)
    figure.update_xaxes(automargin=False)
    figure.update_yaxes(automargin=False)
    figure.layout.margin.l = max(figure.layout.margin.l, math.ceil(WIDEST_DIGIT * size * widest) + 40)


WIDEST_DIGIT = 0.64
"""Of the fonts at hand (DejaVu Sans), in its size: 636 of 1000 units."""


def bar_title(text: str) -> dict[str, str]:
    """The title of a colour bar, and a line below it that is not seen: the highest tick may stand at the bar's very end. Plotly
    makes no room for a line of spaces."""
    return {"text": f'{text}<br><span style="color: {CLEAR}">.</span>'}


def log_axis(values: Sequence[float]) -> dict[str, Any]:
    """A log axis whose ticks are the values themselves (batch sizes, as a rule), level, with as many labels as have room.

    Steps of a factor under 3 beside wider ones lose the label of their lower end; of more than 9 every second one is shown.
    """
    wide = any(b >= 3 * a for a, b in pairwise(values))
    shown = ["" if wide and b < 3 * a else str(a) for a, b in pairwise(values)] + [str(v) for v in values[-1:]]
    if sum(map(bool, shown)) > 9:
        shown = [text if (len(shown) - 1 - at) % 2 == 0 else "" for at, text in enumerate(shown)]
    return {"type": "log", "tickvals": list(values), "ticktext": shown, "minor": {"showgrid": False}, "tickangle": 0}


def powers(low: float, high: float) -> dict[str, Any]:
    """A log axis over [low, high], one labelled tick per power of ten that lies in it."""
    exponents = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    step = max(1, round(len(exponents) / 7))
    ticks = [10.0**e for e in exponents if e % step == 0]
    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": ticks,
        "ticktext": [_power(t) for t in ticks],
    }


def round_ticks(low: float, high: float) -> dict[str, Any]:
    """A log axis over [low, high], which may be less than a power of ten: at most eight ticks, each labelled with its value."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for leading in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [
            float(f"{first * 10.0**e:.3g}") for e in decades for first in leading if low <= first * 10.0**e <= high
        ]
        if len(ticks) <= 8:
            break
    else:
        return powers(low, high)
    if len(ticks) < 3:  # so narrow that it is all but linear
        step = 10.0 ** math.floor(math.log10((high - low) / 3))
        step *= next(by for by in (5, 2, 1) if by * step <= (high - low) / 3)
        ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": ticks,
        "ticktext": [f"{t:.6g}" for t in ticks],
        "tickangle": 0,
    }


def _power(value: float) -> str:
    exponent = round(math.log10(value))
    if abs(exponent) <= 3:
        return f"{round(value, 3):g}"
    return f"10<sup>{'−' if exponent < 0 else ''}{abs(exponent)}</sup>"


def error_bars(middle: Sequence[float], low: Sequence[float], high: Sequence[float]) -> dict[str, Any]:
    """Asymmetric bars from interval ends, for a trace's `error_y`."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [h - m for m, h in zip(middle, high, strict=True)],
        "arrayminus": [m - below for m, below in zip(middle, low, strict=True)],
    }
