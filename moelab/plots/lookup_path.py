"""How a loader arrives at a config, drawn as a path: every place it looks at, what it finds there, and why it goes on."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.config import SHORT
from moelab.config_files import Lookup, Question, Step, ask, get_rules, version_folders
from moelab.config_files.rules import RULES
from moelab.errors import ConfigFileError, FormatError
from moelab.plots.literal import literal
from moelab.plots.panel import Panel
from moelab.plots.style import BETTER, BLUE, BRONZE, GREY, ORANGE, PURPLE, SKY, WRONG, grid

ALL = "all three"
DTYPE = "bfloat16"
"""Of the weights whose files are looked for, unless another is named."""
LINE_PX, GAP_PX, MARGIN_PX = 15, 14, 190
ALONE, BESIDE = 104, 36
"""Characters in a line, where one path is drawn and where three are."""
LOOKS = {
    "variable": ("triangle-down", SKY), "absent": ("x-thin-open", GREY), "found": ("circle", BLUE),
    "passed over": ("circle-open", ORANGE), "left out": ("diamond-open", PURPLE), "changed": ("diamond", BRONZE),
    "used": ("square", BETTER), "error": ("x", WRONG), "config": ("star", BETTER),
}  # fmt: skip
"""Kind of node -> marker and colour. The kinds of `Step.result`, and: variable (where the search starts), error (the loader
ends with one), config (what it answers)."""


@dataclass(frozen=True)
class _Node:
    kind: str
    what: str
    reason: str


def explain(
    tree: Path,
    model: str = "qwen3-30b-a3b",
    tp_size: int = 1,
    num_tokens: int = 64,
    device: str = "NVIDIA H200",
    triton_version: str = "3.6.0",
    down: bool = False,
    rules: str = ALL,
    dtype: str | None = DTYPE,
) -> Panel:
    """The path of each loader through `tree`, which holds configs/triton_X_Y_Z, for one model, GEMM and batch.

    Each loader is pointed there by its own variable: moelab at configs/, sglang at the folder above it, vLLM, which knows no
    versions, at the folder of the version in use or else the newest. rules: one loader's name, or `ALL`. dtype: of plain weights,
    or None for the checkpoint's own format. What ends a loader's search is drawn as the end of its path.
    Raises UnknownModelError, UnknownNameError and ShardError.
    """
    names = list(RULES) if rules == ALL else [get_rules(rules).name]
    asked = {name: ask(model, name, tp_size=tp_size, dtype=dtype or None, device=device) for name in names}
    shape = next(iter(asked.values())).shape
    weights = shape.dtype if shape.format.is_plain else shape.format.name
    found = {name: _look_up(asked[name], tree, num_tokens, device, triton_version, down) for name in names}
    paths = {name: _nodes(name, tree, triton_version, answer) for name, answer in found.items()}
    texts = {
        name: [_text(node, ALONE if len(names) == 1 else BESIDE) for node in nodes] for name, nodes in paths.items()
    }
    height = max(_places(found)[1] for found in texts.values())
    gemm = "GEMM2" if down else "GEMM1"
    each = {name: f"E={q.num_experts}, N={q.columns}" for name, q in asked.items()}
    sizes = (
        next(iter(each.values())) if len(set(each.values())) == 1 else "; ".join(f"{n} {s}" for n, s in each.items())
    )
    figure = grid(
        f"{model}, TP {tp_size}, batch {num_tokens}, {gemm} on {device}: {_agreement(found)}",
        f"{sizes}, {weights}, Triton {triton_version}; read now, by the loaders’ rules, top to bottom; a config: {SHORT}",
        titles=names if len(names) > 1 else (),
        gap=0.02,
        height=MARGIN_PX + height,
    )
    for column, name in enumerate(names, start=1):
        _draw(figure, column, paths[name], texts[name], 0.03 if len(names) > 1 else 0.01)
    drawn = {node.kind for nodes in paths.values() for node in nodes}
    for kind, (symbol, color) in LOOKS.items():
        if kind in drawn:
            marker = {"symbol": symbol, "color": color, "size": 11, "line": {"width": 2, "color": color}}
            figure.add_scatter(x=[None], y=[None], mode="markers", name=kind, marker=marker)
    figure.update_xaxes(range=[0, 1], visible=False)
    figure.update_yaxes(range=[height, 0], visible=False)
    figure.update_layout(legend={"orientation": "h", "y": 0, "yanchor": "top"}, margin={"l": 12, "r": 12, "b": 70})
    table = [{"rules": name, "step": i, "what": node.what, "result": node.kind, "why": node.reason}
             for name, nodes in paths.items() for i, node in enumerate(nodes, start=1)]  # fmt: skip
    return Panel(figure, table, _said(found, tree))


def _config_dir(name: str, tree: Path, triton_version: str) -> Path:
    """What the loader's variable names, so that it reads this tree."""
    if RULES[name].below:
        return tree
    if RULES[name].version_folders:
        return tree / "configs"
    wanted = tree / "configs" / f"triton_{triton_version.replace('.', '_')}"
    newest = version_folders(tree / "configs")
    return wanted if wanted.is_dir() or not newest else newest[0]


def _look_up(
    asked: Question, tree: Path, num_tokens: int, device: str, triton_version: str, down: bool
) -> Lookup | str:
    """The lookup's answer, or the sentence of the error that it ends with."""
    try:
        return asked.lookup(
            device, num_tokens=num_tokens, triton_version=triton_version, down=down,
            config_dir=_config_dir(asked.rules, tree, triton_version),
        )  # fmt: skip
    except (ConfigFileError, FormatError) as error:
        return str(error)


def _nodes(name: str, tree: Path, triton_version: str, answer: Lookup | str) -> list[_Node]:
    place = _shown(tree, str(_config_dir(name, tree, triton_version)))
    nodes = [_Node("variable", f"{RULES[name].environment} = {place}", _searches(name))]
    if isinstance(answer, str):
        return [*nodes, _Node("error", "the search ends", _shown(tree, answer))]
    nodes += [_node(tree, step) for step in answer.steps]
    source = f"{answer.path.name}, key {answer.key}" if answer.path else "the default rule"
    config = answer.config.short() if answer.config else "none: the launcher computes one"
    return [*nodes, _Node("config", config, source)]


def _node(tree: Path, step: Step) -> _Node:
    return _Node(step.result, _shown(tree, step.what), _shown(tree, step.reason))


def _searches(name: str) -> str:
    rules = RULES[name]
    if not rules.version_folders:
        return "one flat folder; versions do not count"
    return f"{rules.below + '/' if rules.below else ''}triton_X_Y_Z below it: the version in use, then the others, newest first"


def _shown(tree: Path, text: str) -> str:
    """A text with the tree's own path left out."""
    return text.replace(f"{tree}/", "").replace(str(tree), "the tree")


def _text(node: _Node, wrap: int) -> tuple[str, int]:
    """A node's label, and how many lines it has."""
    head, why = _wrapped(node.what, wrap), _wrapped(node.reason, wrap)
    return f"<b>{'<br>'.join(head)}</b><br><span style='font-size: 11px'>{'<br>'.join(why)}</span>", len(head) + len(
        why
    )


def _places(texts: Sequence[tuple[str, int]]) -> tuple[list[float], int]:
    """The middle of each label from the top, and the height of all, in pixels."""
    y, middles = 0, []
    for _, lines in texts:
        middles.append(y + (GAP_PX + LINE_PX * lines) / 2)
        y += GAP_PX + LINE_PX * lines
    return middles, y + GAP_PX


def _draw(figure: Any, column: int, nodes: Sequence[_Node], texts: Sequence[tuple[str, int]], x: float) -> None:
    """Draw one loader's path downwards, its markers at x (a share of the plot's width)."""
    at, looks = _places(texts)[0], [LOOKS[node.kind] for node in nodes]
    where = {"row": 1, "col": column, "showlegend": False}
    figure.add_scatter(
        x=[x] * len(at), y=at, mode="lines", line={"color": GREY, "width": 1.5}, hoverinfo="skip", **where
    )
    figure.add_scatter(
        x=[x] * len(at), y=at, mode="markers", hovertemplate="%{text}<extra></extra>", text=[node.kind for node in nodes],
        marker={"symbol": [symbol for symbol, _ in looks], "color": [color for _, color in looks], "size": 11,
                "line": {"width": 2, "color": [color for _, color in looks]}}, **where,
    )  # fmt: skip
    figure.add_scatter(
        x=[2.5 * x] * len(at), y=at, mode="text", text=[text for text, _ in texts], textposition="middle right",
        hoverinfo="skip", cliponaxis=False, textfont={"size": 11, "color": GREY}, **where,
    )  # fmt: skip


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters, broken at spaces, and at commas and slashes of file names."""
    spaced = text.replace(",", ",\0").replace("/", "/\0").replace("_", "_\0")
    lines: list[str] = []
    for word in spaced.replace("\0 ", " ").split(" "):
        for i, piece in enumerate(word.split("\0")):
            joint = " " if i == 0 and lines and lines[-1] else ""
            if lines and len(lines[-1]) + len(joint) + len(piece) <= width:
                lines[-1] += joint + piece
            else:
                lines += textwrap.wrap(piece, width) or [""]
    return [html.escape(line, quote=False) for line in lines]


def _agreement(found: dict[str, Lookup | str]) -> str:
    configs = {answer.config if isinstance(answer, Lookup) else answer for answer in found.values()}
    if len(found) == 1:
        (answer,) = found.values()
        return _short(answer)
    return "all agree" if len(configs) == 1 else f"{len(configs)} different answers"


def _short(answer: Lookup | str) -> str:
    if isinstance(answer, str):
        return "an error"
    return answer.config.short() if answer.config else "no config"


def _said(found: dict[str, Lookup | str], tree: Path) -> str:
    takes = {name: _takes(answer, tree) for name, answer in found.items()}
    by_answer: dict[str, list[str]] = {}
    for name, answer in takes.items():
        by_answer.setdefault(answer, []).append(name)
    each = "; ".join(f"{', '.join(names)}: {answer}" for answer, names in by_answer.items())
    results = [step.result for answer in found.values() if isinstance(answer, Lookup) for step in answer.steps]
    absent, late = results.count("absent"), results.count("passed over")
    return f"**{each}.** Places on the way without such a file: {absent}; with one that came too late: {late}."


def _takes(answer: Lookup | str, tree: Path) -> str:
    if isinstance(answer, str):
        return "ends with an error"
    if answer.path is None:
        return f"no file, so the default, {_short(answer)}"
    place = literal(f"{answer.path.name} in {_shown(tree, str(answer.path.parent))}")
    return f"{_short(answer)}, batch size {answer.key} of {place}"
