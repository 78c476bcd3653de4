"""The pipeline in pictures: where this machine stands, who goes where, and the alignment with its padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moelab.plots.panel import Panel, Row
from moelab.plots.style import GREY, MUTED_SCALE, SERIES, grid, number, text_on

TOKEN_COLORS = (*(each.color for each in SERIES), "#6b8fb5", GREY)
DIVERGING = MUTED_SCALE


def routing(topk_ids: Sequence[Sequence[int]], topk_weights: Sequence[Sequence[float]], num_experts: int) -> Panel:
    """Who goes where: a token x expert grid, the chosen cells with their weight, in the token's colour."""
    figure = grid("Routing: each token picks its experts", "computed here; the number is the token’s weight for that expert",
                  height=120 + 40 * len(topk_ids) + 40)  # fmt: skip
    for token, (ids, weights) in enumerate(zip(topk_ids, topk_weights, strict=True)):
        figure.add_scatter(
            x=list(ids), y=[token] * len(ids), mode="markers+text", text=[f"{w:.2f}" for w in weights], name=f"token {token}",
            marker={"symbol": "square", "size": 34, "color": token_color(token)},
            textfont={"color": text_color(token), "size": 12},
            showlegend=False, hovertemplate=f"token {token}, expert %{{x}}: weight %{{text}}",
        )  # fmt: skip
    figure.update_xaxes(tickvals=list(range(num_experts)), ticktext=[f"expert {e}" for e in range(num_experts)],
                        range=[-0.5, num_experts - 0.5])  # fmt: skip
    figure.update_yaxes(tickvals=list(range(len(topk_ids))), ticktext=[f"token {t}" for t in range(len(topk_ids))],
                        range=[len(topk_ids) - 0.5, -0.5])  # fmt: skip
    counts = [sum(e in ids for ids in topk_ids) for e in range(num_experts)]
    table = [{"expert": e, "tokens": counts[e],
              "which": ", ".join(str(t) for t, ids in enumerate(topk_ids) if e in ids)} for e in range(num_experts)]  # fmt: skip
    pairs = sum(len(ids) for ids in topk_ids)
    sentence = (
        f"**{len(topk_ids)} tokens make {pairs} (token, expert) pairs, {min(counts)} to {max(counts)} for each expert.** "
        "A GEMM over experts must cope with rows that come in unequal groups."
    )
    return Panel(figure, table, sentence)


def alignment(
    sorted_token_ids: Sequence[int], expert_ids: Sequence[int], block_size: int, top_k: int, num_pairs: int
) -> Panel:
    """One row per block of BLOCK_SIZE_M rows: which token fills each, and which rows are padding.

    sorted_token_ids: the used part of Alignment.sorted_token_ids, padding being num_pairs; expert_ids: per block.
    """
    blocks = [list(sorted_token_ids[i : i + block_size]) for i in range(0, len(sorted_token_ids), block_size)]
    experts = list(expert_ids)[: len(blocks)]
    figure = grid(f"Alignment: sorted by expert, padded to BLOCK_SIZE_M = {block_size}", "computed here by the align kernel; "
                  "squares: tokens; crosses: rows that the GEMM computes and throws away",
                  height=150 + 36 * max(4, len(blocks)))  # fmt: skip
    size = 30 if block_size <= 16 else 14
    for token in sorted({pair // top_k for pair in sorted_token_ids if pair < num_pairs}):
        places = [
            (b, r) for b, rows in enumerate(blocks) for r, p in enumerate(rows) if p < num_pairs and p // top_k == token
        ]
        figure.add_scatter(
            x=[r for _, r in places], y=[b for b, _ in places], mode="markers+text", text=[f"t{token}"] * len(places),
            marker={"symbol": "square", "size": size, "color": token_color(token)},
            textfont={"color": text_color(token), "size": 11},
            name=f"token {token}", showlegend=False,
        )  # fmt: skip
    empty = [(b, r) for b, rows in enumerate(blocks) for r, p in enumerate(rows) if p >= num_pairs]
    figure.add_scatter(x=[r for _, r in empty], y=[b for b, _ in empty], mode="markers", name="padding", showlegend=False,
                       marker={"symbol": "x-thin", "size": 9, "line": {"width": 1.2, "color": GREY}})  # fmt: skip
    figure.update_xaxes(
        title="row within the block", range=[-0.6, max(block_size, 4) - 0.4], dtick=max(1, block_size // 16)
    )
    figure.update_yaxes(tickvals=list(range(len(blocks))), ticktext=[f"block {b}: expert {e}" for b, e in enumerate(experts)],
                        range=[len(blocks) - 0.4, -0.6])  # fmt: skip
    figure.update_layout(margin={"l": 130})
    table = [{"block": b, "expert": e, "rows in use": sum(p < num_pairs for p in rows),
              "padding": sum(p >= num_pairs for p in rows)}
             for b, (e, rows) in enumerate(zip(experts, blocks, strict=True))]  # fmt: skip
    total = len(sorted_token_ids)
    sentence = (
        f"**{num_pairs} pairs fill {num_pairs} of {total} rows; {total - num_pairs} are padding "
        f"({number(total / num_pairs)} rows computed for each real one).** Every block belongs to one expert, so its program "
        "reads one weight matrix."
    )
    return Panel(figure, table, sentence)


def where(runtime: Any, versions: Mapping[str, Any], recordings: Sequence[Any]) -> Panel:
    """Which device runs the kernels here, under which versions, and which recordings lie at hand.

    runtime: moelab.runtime.Runtime; recordings: of moelab.recordings.list_recordings.
    """
    rows: list[Row] = [{"where am I": "mode", "": runtime.mode}, {"where am I": "device", "": runtime.device_name},
                       {"where am I": "because", "": runtime.reason}]  # fmt: skip
    rows += [{"where am I": name, "": version or "none"} for name, version in versions.items()]
    for each in recordings:
        told = each.recording.source() if each.recording else f"broken: {each.error}"
        rows.append({"where am I": f"recording {each.suite}", "": told})
    live = {
        "gpu": "Kernels run compiled, on this GPU; what says “live” is measured here.",
        "interpreter": "Kernels run in Triton’s interpreter: right, but slow, so no time is taken here. Every time shown comes "
        "from a recording: measurements made on a real GPU, and kept.",
        "none": "No kernel can run here; everything shown comes from recordings.",
    }[runtime.mode]
    sound = sum(each.recording is not None for each in recordings)
    return Panel(
        None, rows, f"**You are on {runtime.device_name} (mode: {runtime.mode}), with {sound} recordings.** {live}"
    )


def text_color(token: int) -> str:
    """What stands out on the token's colour."""
    return text_on(token_color(token))


def token_color(token: int) -> str:
    """A token's colour in every picture."""
    return TOKEN_COLORS[token % len(TOKEN_COLORS)]
