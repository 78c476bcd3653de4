"""A handful of tokens, followed through the layer: one picture that grows by a step at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from moelab.plots.panel import Panel, Row
from moelab.plots.pipeline import DIVERGING, text_color, token_color
from moelab.plots.style import GREY, grid, number

STEPS = ("tokens", "routing", "alignment", "GEMM1", "activation", "GEMM2", "sum")
TENSORS = {"tokens": "hidden_states", "GEMM1": "up", "activation": "act", "GEMM2": "down", "sum": "out"}
"""Steps that show values -> the field of Trace that holds them."""

SORTED = ("alignment", "GEMM1", "GEMM2")
"""Steps whose rows lie as the alignment sorted and padded them; activation's lie as pairs, the others as tokens."""

PADDING_HEIGHT, BLOCK_GAP = 0.17, 0.8
"""Of a row that is padding, and between blocks, where a row in use is 1."""

FADED = 0.1
ROW_PIXELS = 17
HALF_WIDTH = 0.3


@dataclass(frozen=True)
class Trace:
    """One run of the classic layer on M tokens, k slots each, as plain lists.

    topk_ids, topk_weights: (M, k). sorted_token_ids: the used part of Alignment.sorted_token_ids, padding being M * k.
    expert_ids: one per block of block_size rows. hidden_states, out: (M, H). up: (M * k, 2N), GEMM1's. act: (M * k, N).
    down: (M * k, H), GEMM2's, weighted.
    """

    topk_ids: Sequence[Sequence[int]]
    topk_weights: Sequence[Sequence[float]]
    sorted_token_ids: Sequence[int]
    expert_ids: Sequence[int]
    block_size: int
    hidden_states: Sequence[Sequence[float]]
    up: Sequence[Sequence[float]]
    act: Sequence[Sequence[float]]
    down: Sequence[Sequence[float]]
    out: Sequence[Sequence[float]]

    @property
    def num_tokens(self) -> int:
        return len(self.topk_ids)

    @property
    def top_k(self) -> int:
        return len(self.topk_ids[0])

    @property
    def num_pairs(self) -> int:
        return self.num_tokens * self.top_k


@dataclass(frozen=True)
class _Places:
    """Heights of rows, from 0 down: of tokens, of pairs as they are numbered, of sorted rows; and of each block's ends."""

    tokens: Sequence[float]
    pairs: Sequence[float]
    rows: Sequence[float]
    blocks: Sequence[tuple[float, float]]
    height: float

    def of_pairs(self, trace: Trace, step: str) -> dict[int, float]:
        """pair -> its height in that step's column (a token's pairs share the token's)."""
        if step in SORTED:
            return {
                pair: y for pair, y in zip(trace.sorted_token_ids, self.rows, strict=True) if pair < trace.num_pairs
            }
        if step in ("routing", "activation"):
            return dict(enumerate(self.pairs))
        return {pair: self.tokens[pair // trace.top_k] for pair in range(trace.num_pairs)}


def _places(trace: Trace) -> _Places:
    rows: list[float] = []
    blocks, at = [], 0.0
    for first in range(0, len(trace.sorted_token_ids), trace.block_size):
        begin = at
        for pair in trace.sorted_token_ids[first : first + trace.block_size]:
            size = 1.0 if pair < trace.num_pairs else PADDING_HEIGHT
            rows.append(at + size / 2)
            at += size
        blocks.append((begin, at))
        at += BLOCK_GAP
    height = at - BLOCK_GAP

    def spread(count: int) -> list[float]:
        return [height * (i + 0.5) / count for i in range(count)]

    return _Places(spread(trace.num_tokens), spread(trace.num_pairs), rows, blocks, height)


def follow(trace: Trace, step: str = STEPS[-1], token: int | None = None) -> Panel:
    """The picture up to a step, every token in its colour; `token` alone in full colour if one is given.

    Squares are rows, with who they are; strips are the values of a row, blue below zero and brown above.
    """
    shown, places = STEPS[: STEPS.index(step) + 1], _places(trace)
    who = "all tokens" if token is None else f"token {token}"
    said = "computed here, by the kernels; a strip: a row’s values, blue below 0, brown above; thin lines: padding"
    figure = grid(
        f"Step {len(shown)} of {len(STEPS)}, {step}: {who}", said, height=165 + round(ROW_PIXELS * places.height)
    )
    for before, after in pairwise(shown):
        _links(figure, trace, places, before, after, token)
    if "alignment" in shown:
        _blocks(figure, trace, places, shown)
    for name in shown:
        if name in TENSORS:
            _strips(figure, trace, places, name, token)
        else:
            _squares(figure, trace, places, name, token)
    ticks = [f"<b>{i}. {name}</b>" if name == step else f"{i}. {name}" for i, name in enumerate(STEPS, start=1)]
    figure.update_xaxes(tickvals=list(range(len(STEPS))), ticktext=ticks, range=[-0.5, len(STEPS) - 0.5], side="top",
                        showgrid=False, ticks="", showline=False, zeroline=False)  # fmt: skip
    figure.update_yaxes(range=[places.height + 0.3, -1.1], visible=False)
    figure.update_layout(margin={"l": 20, "r": 20, "b": 20, "t": 112}, showlegend=False)
    return Panel(figure, _table(trace, step, token), _sentence(trace, step, token))


def _opacity(mine: int, token: int | None) -> float:
    return 1.0 if token is None or token == mine else FADED


def _segments(xs: Sequence[tuple[float, float]], ys: Sequence[tuple[float, float]]) -> dict[str, NDArray[np.float32]]:
    """x and y of separate lines, one for each pair of ends. Arrays: plotly packs them, which keeps notebook files small."""
    nothing = float("nan")
    return {axis: np.array([v for ends in values for v in (*ends, nothing)], dtype=np.float32)
            for axis, values in (("x", xs), ("y", ys))}  # fmt: skip


def _links(figure: go.Figure, trace: Trace, places: _Places, before: str, after: str, token: int | None) -> None:
    """A line for each pair from its row in one column to its row in the next; one trace for each token."""
    left, right = places.of_pairs(trace, before), places.of_pairs(trace, after)
    x = STEPS.index(before)
    for mine in range(trace.num_tokens):
        pairs = range(mine * trace.top_k, (mine + 1) * trace.top_k)
        lines = _segments(
            [(x + HALF_WIDTH, x + 1 - HALF_WIDTH)] * trace.top_k, [(left[pair], right[pair]) for pair in pairs]
        )
        figure.add_scatter(**lines, mode="lines", hoverinfo="skip", name=f"token {mine}", opacity=0.7 * _opacity(mine, token),
                           line={"color": token_color(mine), "width": 2})  # fmt: skip


def _blocks(figure: go.Figure, trace: Trace, places: _Places, shown: Sequence[str]) -> None:
    """A box around each block in the sorted columns, its expert's name, and its padding as thin lines."""
    empty = [y for pair, y in zip(trace.sorted_token_ids, places.rows, strict=True) if pair >= trace.num_pairs]
    for name in (name for name in shown if name in SORTED):
        x = STEPS.index(name)
        for top, bottom in places.blocks:
            figure.add_shape(type="rect", x0=x - HALF_WIDTH - 0.04, x1=x + HALF_WIDTH + 0.04, y0=top - 0.1, y1=bottom + 0.1,
                             line={"color": GREY, "width": 1})  # fmt: skip
        lines = _segments([(x - HALF_WIDTH, x + HALF_WIDTH)] * len(empty), [(y, y) for y in empty])
        figure.add_scatter(**lines, mode="lines", line={"color": GREY, "width": 1}, opacity=0.6, name="padding",
                           hoverinfo="name")  # fmt: skip
    for (top, _), expert in zip(places.blocks, trace.expert_ids, strict=False):
        figure.add_annotation(x=STEPS.index("alignment"), y=top - BLOCK_GAP / 2, text=f"expert {expert}", showarrow=False,
                              font={"size": 11, "color": GREY})  # fmt: skip


def _squares(figure: go.Figure, trace: Trace, places: _Places, name: str, token: int | None) -> None:
    """A square for each pair: with its expert and weight after the routing, with its token after the alignment."""
    x, heights = STEPS.index(name), places.of_pairs(trace, name)
    for mine in range(trace.num_tokens):
        pairs = range(mine * trace.top_k, (mine + 1) * trace.top_k)
        slots = list(zip(trace.topk_ids[mine], trace.topk_weights[mine], strict=True))
        said = [f"e{e} · {w:.2f}" if name == "routing" else f"t{mine}" for e, w in slots]
        common: dict[str, Any] = {"opacity": _opacity(mine, token), "name": f"token {mine}"}
        ys = [heights[p] for p in pairs]
        figure.add_scatter(**_segments([(x - HALF_WIDTH, x + HALF_WIDTH)] * len(ys), [(y, y) for y in ys]), mode="lines",
                           line={"color": token_color(mine), "width": ROW_PIXELS - 2}, hoverinfo="skip", **common)  # fmt: skip
        figure.add_scatter(x=[x] * len(ys), y=ys, mode="text", text=said, textfont={"color": text_color(mine), "size": 10},
                           hovertext=[f"token {mine}, expert {e}, weight {w:.3f}" for e, w in slots], hoverinfo="text",
                           **common)  # fmt: skip


def _strips(figure: go.Figure, trace: Trace, places: _Places, name: str, token: int | None) -> None:
    """The rows' values as one heat map whose gaps are empty; rows of other tokens than the one followed are left pale."""
    x, values = STEPS.index(name), getattr(trace, TENSORS[name])
    heights = places.of_pairs(trace, name)
    by_token = name in ("tokens", "sum")
    rows = {t: places.tokens[t] for t in range(trace.num_tokens)} if by_token else heights
    width = len(values[0])
    for chosen in (True, False):
        kept = [r for r in sorted(rows, key=lambda r: rows[r])
                if (token is None or token == (r if by_token else r // trace.top_k)) == chosen]  # fmt: skip
        if not kept:
            continue
        z = np.full((2 * len(kept) - 1, width), np.nan, dtype=np.float32)
        z[::2] = [values[row] for row in kept]
        edges = np.array([rows[row] + half for row in kept for half in (-0.4, 0.4)], dtype=np.float32)
        largest = max(abs(v) for row in values for v in row)
        figure.add_heatmap(
            z=z, x=np.linspace(x - HALF_WIDTH, x + HALF_WIDTH, width + 1, dtype=np.float32), y=edges,
            colorscale=DIVERGING, zmin=-largest, zmax=largest, showscale=False, opacity=1.0 if chosen else 2 * FADED,
            hoverongaps=False, hovertemplate=f"{name}: %{{z:.2g}}<extra></extra>", name=name,
        )  # fmt: skip


# --- in words and numbers -----------------------------------------------------------------------------------------


def _table(trace: Trace, step: str, token: int | None) -> list[Row]:
    """The rows of a step, of one token or of all."""
    if step == "alignment":
        return _block_rows(trace)
    tokens = range(trace.num_tokens) if token is None else [token]
    if step in ("tokens", "sum"):
        values = getattr(trace, TENSORS[step])
        return [{"token": t, **_spread(values[t])} for t in tokens]
    pairs = [(t, slot) for t in tokens for slot in range(trace.top_k)]
    values = getattr(trace, TENSORS[step]) if step in TENSORS else None
    return [
        {"token": t, "slot": slot, "expert": trace.topk_ids[t][slot], "weight": trace.topk_weights[t][slot],
         **(_spread(values[t * trace.top_k + slot]) if values else {})}
        for t, slot in pairs
    ]  # fmt: skip


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"values": len(values), "smallest": min(values), "largest": max(values),
            "root mean square": (sum(v * v for v in values) / len(values)) ** 0.5}  # fmt: skip


def _block_rows(trace: Trace) -> list[Row]:
    rows: list[Row] = []
    for block, expert in enumerate(trace.expert_ids):
        inside = trace.sorted_token_ids[block * trace.block_size : (block + 1) * trace.block_size]
        real = [pair for pair in inside if pair < trace.num_pairs]
        if inside:
            rows.append({"block": block, "expert": expert, "tokens": ", ".join(f"t{p // trace.top_k}" for p in real),
                         "rows in use": len(real), "padding": len(inside) - len(real)})  # fmt: skip
    return rows


def _sentence(trace: Trace, step: str, token: int | None) -> str:
    """What the step does, in this run's numbers."""
    wide = {name: len(getattr(trace, field)[0]) for name, field in TENSORS.items()}
    pairs, rows = trace.num_pairs, len(trace.sorted_token_ids)
    said: Mapping[str, str] = {
        "tokens": f"**{trace.num_tokens} tokens come in, {wide['tokens']} values each.**",
        "routing": f"**The router gives each token {trace.top_k} experts: {pairs} pairs of a token and a slot, with weights.**",
        "alignment": f"**{pairs} pairs lie sorted by expert in blocks of {trace.block_size}: {rows} rows, {rows - pairs} of them "
        "padding.** Every block belongs to one expert, so that its program reads one weight matrix.",
        "GEMM1": f"**Each row times its expert’s w13: {wide['GEMM1']} values, half gate, half up.** The padding is multiplied "
        f"too ({rows / pairs:.1f} rows for each real one) and thrown away.",
        "activation": f"**silu(gate) · up leaves {wide['activation']} of {wide['GEMM1']} values.** Rows are back in the order of "
        "the pairs: GEMM1 stored each where its token and slot belong.",
        "GEMM2": f"**Each row times its expert’s w2 and its weight: {wide['GEMM2']} values again.** It gathers its rows by the "
        "same sorted list, so one alignment serves both GEMMs.",
        "sum": f"**The {trace.top_k} rows of a token are added up: {trace.num_tokens} × {wide['sum']} values go out.**",
    }  # fmt: skip
    if token is None:
        return said[step]
    experts = " and ".join(
        f"{e} (weight {number(w)})" for e, w in zip(trace.topk_ids[token], trace.topk_weights[token], strict=True)
    )
    return f"{said[step]} Token {token} goes to the experts {experts}."
