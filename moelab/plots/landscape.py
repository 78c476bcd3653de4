"""A recorded landscape: config by batch, plateaus and covers, and what each parameter explains."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from moelab.config import SHORT
from moelab.plots.panel import Panel, Row
from moelab.plots.style import BLUE, GREEN, GREY, ORANGE, SCALE, bar_title, grid, hold_margins, on_scale, text_on
from moelab.tuner.problem import GEMMS, Gemm
from moelab.tuner.survey import PARAMETERS, Cover, Survey, cover, importance, plateau, short_names

GEMM_NAMES: Mapping[Gemm, str] = {"up": "GEMM1", "down": "GEMM2"}
WITHIN = (0.01, 0.02, 0.05)
"""Shares of the best within which configs count as equally good, for covers and plateaus."""

ROWS = 48
"""Configs that a heat map shows: their labels can still be read."""

LOWEST = 50.0
"""Per cent of the best at which the colours of a heat map end."""

NEAR = 0.2
"""Share of the best within which importance is asked once more: there the slow majority has no say."""

Allowed = Mapping[str, Sequence[int]]
Shares = Sequence[Mapping[str, float]]


def describe(allowed: Allowed, survey: Survey) -> str:
    """The brushed parameters in words: "BLOCK M 16–64, warps 4"; "all configs" for none."""
    names, parts = short_names(), []
    for name, values in allowed.items():
        if sorted(values) != survey.axis(name):
            low, high = min(values), max(values)
            parts.append(f"{names[name]} {low}" if low == high else f"{names[name]} {low}–{high}")
    return ", ".join(parts) or "all configs"


# --- config by batch ----------------------------------------------------------------------------------------------


def heat_map(survey: Survey, gemm: Gemm, allowed: Allowed | None = None, rows: int = ROWS) -> Panel:
    """Per cent of the best by config and batch: the configs that are best somewhere, of those allowed, in the order of
    their parameters, so that a plateau is a block. Blank: not measured there.

    The configs are chosen by turns: the best of each batch size, then the second best, until there are `rows`.
    """
    allowed = allowed or {}
    keep = survey.chosen(gemm, allowed)
    share = 100 * survey.best_share[gemm]
    shown = _by_turns(np.where(keep, np.nan_to_num(share, nan=-1.0), -1.0), rows)
    configs = [survey.configs[gemm][i].short() for i in shown]
    figure = grid(
        f"{GEMM_NAMES[gemm]}: per cent of the best, {len(shown)} of {int(keep.sum())} configs ({describe(allowed, survey)})",
        f"{survey.landscape.source()}; blank: not measured there<br>a config: {SHORT}",
        height=186 + 13 * max(12, len(shown)),
    )
    figure.add_heatmap(
        z=share[:, shown].T.astype(np.float32), x=[str(b) for b in survey.batch_sizes], y=configs, zmin=LOWEST, zmax=100,
        colorscale=SCALE, colorbar={"title": bar_title("% of best"), "tickfont": {"color": GREY}, "outlinewidth": 0},
        hovertemplate="%{y}<br>batch %{x}: %{z:.1f} % of the best<extra></extra>", xgap=1, ygap=1,
    )  # fmt: skip
    figure.update_xaxes(title="batch, tokens", type="category")
    figure.update_yaxes(title="config", type="category", autorange="reversed", dtick=1, tickfont={"size": 10})
    hold_margins(figure, configs, 10)
    table: list[Row] = []
    for index in sorted(shown, key=lambda i: -float(np.nanmean(share[:, i]))):
        known, worst = np.isfinite(share[:, index]), int(np.nanargmin(share[:, index]))
        table.append({
            "config": survey.configs[gemm][index].short(), "batch sizes measured": int(known.sum()),
            "within 2 %": int((share[known, index] >= 100 / 1.02).sum()), "mean % of best": float(np.nanmean(share[:, index])),
            "worst %": float(share[worst, index]), "at batch": survey.batch_sizes[worst],
        })  # fmt: skip
    return Panel(figure, table[:12], _heat_sentence(survey, gemm, keep))


def _by_turns(share: np.ndarray, columns: int) -> list[int]:
    """Indices of the columns that are best in some row, then second best, and so on; ascending. Negative: left out."""
    order = np.argsort(-share, axis=1, kind="stable")
    turns = [int(i) for rank in range(order.shape[1]) for row, i in enumerate(order[:, rank]) if share[row, i] > 0]
    return sorted(list(dict.fromkeys(turns))[:columns])


def _heat_sentence(survey: Survey, gemm: Gemm, keep: np.ndarray) -> str:
    if not keep.any():
        return "**No config has these values.** Widen a range."
    times = np.where(keep, survey.times[gemm], np.inf)
    loss = times.min(axis=1) / survey.times[gemm].min(axis=1) - 1
    worst = int(np.argmax(loss))
    if not np.isfinite(loss[worst]):
        return f"**At batch {survey.batch_sizes[worst]} none of these configs was measured.**"
    if loss[worst] == 0:
        return f"**The selection holds the best {GEMM_NAMES[gemm]} config of every batch size.**"
    return (
        f"**The best of the selection loses {100 * float(np.median(loss)):.1f} % to the best of all in the median batch size, "
        f"and at most {100 * float(loss[worst]):.1f} %, at batch {survey.batch_sizes[worst]}.**"
    )


# --- plateaus and covers ------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def _covers(survey: Survey, gemm: Gemm) -> tuple[Cover, ...]:
    return tuple(cover(survey, gemm, within) for within in WITHIN)


def plateaus(survey: Survey) -> Panel:
    """How many programs are as good as the best by batch, and the fewest configs that serve all batch sizes."""
    figure = grid(
        "How flat the top is, and how few configs serve every batch",
        f"{survey.landscape.source()}; equal programs counted once; hollow: not the whole grid was measured there",
        titles=[f"{GEMM_NAMES[gemm]}: configs near the best" for gemm in GEMMS],
        shared_y=True,
    )
    ticks = [str(b) for b in survey.batch_sizes]
    solid = ["circle" if b in survey.well_covered else "circle-open" for b in survey.batch_sizes]
    for column, gemm in enumerate(GEMMS, 1):
        for within, color in zip(WITHIN, (BLUE, ORANGE, GREEN), strict=True):
            counts = plateau(survey, gemm, within)
            figure.add_scatter(
                x=ticks, y=list(counts.values()), name=f"within {within:.0%}", row=1, col=column, mode="lines+markers",
                line={"color": color}, marker={"color": color, "symbol": solid, "size": 8}, showlegend=column == 1,
                hovertemplate="batch %{x}: %{y} configs<extra></extra>",
            )  # fmt: skip
        figure.update_xaxes(
            title="batch, tokens", type="category", tickvals=ticks[::-2], tickangle=0, row=1, col=column
        )
    figure.update_yaxes(title="different programs", row=1, col=1)
    figure.update_yaxes(type="log", dtick=1, row=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.22})
    table = [
        {"GEMM": GEMM_NAMES[gemm], "within": f"{found.within:.0%}", "configs needed": len(found.chosen), "config": config.short(),
         "for the batch sizes": ", ".join(map(str, batches))}
        for gemm in GEMMS for found in _covers(survey, gemm)
        for config, batches in sorted(found.chosen.items(), key=lambda item: item[1] or (0,))
    ]  # fmt: skip
    parts = []
    for gemm in GEMMS:
        needed = ", ".join(f"{len(c.chosen)} within {c.within:.0%}" for c in _covers(survey, gemm))
        parts.append(f"{GEMM_NAMES[gemm]} needs {needed}")
    said = (
        f"**To serve all {len(survey.batch_sizes)} batch sizes, {'; '.join(parts)}.** These are the smallest sets (exact set "
        "cover); a config counts only where it was measured, so the true sets may be smaller still."
    )
    return Panel(figure, table, said)


# --- what matters -------------------------------------------------------------------------------------------------


def importances(survey: Survey) -> Panel:
    """The share of the variance of log time that each parameter explains alone, by batch (survey.importance)."""
    batches = survey.well_covered
    if not batches:
        return Panel(None, [], "**No batch size has the whole grid, so nothing is said of importance.**")
    found = {gemm: [importance(survey, gemm, b) for b in batches] for gemm in GEMMS}
    names = short_names()
    figure = grid(
        "What decides the time: variance of log time explained by each parameter alone",
        f"{survey.landscape.source()}; the number: per cent, eta squared over every measured config<br>"
        "batches with the whole grid only",
        titles=[GEMM_NAMES[gemm] for gemm in GEMMS],
        shared_y=True,
        height=360,
    )
    for column, gemm in enumerate(GEMMS, 1):
        z = np.array([[100 * each[name] for each in found[gemm]] for name in PARAMETERS], dtype=np.float32)
        figure.add_heatmap(
            z=z, x=[str(b) for b in batches], y=[names[name] for name in PARAMETERS], zmin=0, zmax=100, row=1, col=column,
            colorscale=SCALE, showscale=False, xgap=1, ygap=1, hoverinfo="skip",
        )  # fmt: skip
        across, down = zip(*itertools.product(map(str, batches), (names[name] for name in PARAMETERS)), strict=True)
        shares = [float(share) for share in z.T.ravel()]
        figure.add_scatter(
            x=across, y=down, text=[f"{share:.0f}" for share in shares], mode="text", showlegend=False, row=1, col=column,
            textfont={"color": [text_on(on_scale(share / 100)) for share in shares]},
            hovertemplate="%{y} at batch %{x}: %{text} %<extra></extra>",
        )  # fmt: skip
        figure.update_xaxes(title="batch, tokens", type="category", row=1, col=column)
    figure.update_yaxes(autorange="reversed", row=1)
    table = [
        {"GEMM": GEMM_NAMES[gemm], "batch": b, **{names[n]: f"{100 * each[n]:.1f} %" for n in PARAMETERS}}
        for gemm in GEMMS
        for b, each in zip(batches, found[gemm], strict=True)
    ]
    near = {gemm: [importance(survey, gemm, b, NEAR) for b in batches] for gemm in GEMMS}
    names, parts = short_names(), []
    for gemm in GEMMS:
        mean, nearest = _means(found[gemm]), next(iter(_means(near[gemm]).items()))
        ranked = [f"{names[name]} {share:.1%}" for name, share in mean.items()]
        parts.append(f"{GEMM_NAMES[gemm]}: {ranked[0]}, {ranked[1]}, least {ranked[-1]}; within {NEAR:.0%} of the best "
                     f"{names[nearest[0]]} {nearest[1]:.1%}")  # fmt: skip
    said = (
        f"**Explained on average: {'. '.join(parts)}.** The pruned grid is not balanced: parameters share some of what they "
        "explain, and the shares need not add up to 100 %."
    )
    return Panel(figure, table, said)


def _means(shares: Shares) -> dict[str, float]:
    """The mean share of each parameter over the batch sizes, largest first."""
    mean = {name: float(np.mean([each[name] for each in shares])) for name in PARAMETERS}
    return dict(sorted(mean.items(), key=lambda item: -item[1]))
