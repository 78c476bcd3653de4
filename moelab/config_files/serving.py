"""From a tuner to a server: the one recipe, which `moelab export` prints and 05_config_search ends with."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moelab.config_files.rules import Rules, get_rules

WIDTH, INDENT = 110, "     "
"""Of a step's reason in a shell: characters a line, and what stands before it. Commands and log lines are not broken."""


@dataclass(frozen=True)
class Action:
    """One step. do: what, in a few words; how: a shell line, or a line of the server's log; why: a sentence."""

    do: str
    how: str
    why: str


@dataclass(frozen=True)
class _Server:
    """What a server says, as read in its source (the version in `Rules.source`); {} is a file's path. start: how it is run."""

    start: str
    found: str
    otherwise: str
    adds: str


_SERVERS: Mapping[str, _Server] = {
    "sglang": _Server(
        "python -m sglang.launch_server --model-path MODEL --tp-size TP",
        "Using MoE kernel config from {}.",
        '"Fallback to triton version" means a file of another Triton version than the server\'s: tune under that one. "Using '
        'default MoE kernel config" names the file that it looked for in vain: `moelab explain --rules sglang` says why.',
        "It replaces sglang's own tree: a layer whose file is not in that folder runs sglang's default config. `moelab export "
        "--complete FOLDER`, FOLDER being a copy of sglang's package, adds the files that sglang ships.",
    ),
    "vllm": _Server(
        "vllm serve MODEL --tensor-parallel-size TP",
        "Using configuration from {} for MoE layer.",
        '"Using default MoE config" names the files that it looked for in vain: `moelab explain --rules vllm` says why.',
        "It is searched before vLLM's own folder, which stays.",
    ),
}  # fmt: skip


def to_serve(rules: str | Rules, out: str | Path, files: Iterable[str | Path] = ()) -> tuple[Action, ...]:
    """What is left to do once `export` has written: the variable, the restart, and how to see that the server read it.

    out: the folder that export wrote below. files: what it wrote; without them the log's line names no file.
    """
    loader, folder = get_rules(rules), Path(out).resolve()
    variable = f"export {loader.environment}={shlex.quote(str(folder))}"
    if loader.name not in _SERVERS:
        return (
            Action("Point moelab at it", variable, "It replaces moelab's own configs/."),
            Action("See that it is read", "moelab explain --model MODEL --batch-size B", "It names the file, and why."),
        )
    server = _SERVERS[loader.name]
    path = next((str(Path(file).resolve()) for file in files), str(folder / loader.below / "...json"))
    return (
        Action("Point the server at it", variable, server.adds),
        Action("Restart it", server.start, "A process reads a layer's file once, when it first runs that layer."),
        Action("See that it read the file", server.found.format(path), f"A line of its log. {server.otherwise}"),
    )


def tune_to_serve(
    rules: str | Rules,
    out: str | Path,
    *,
    model: str = "MODEL",
    tp_size: int | None = None,
    tuned: str | Path = "tuned",
) -> tuple[Action, ...]:
    """The whole recipe: tune, export, and `to_serve`. tuned: the folder that `moelab tune` writes."""
    loader, source = get_rules(rules), shlex.quote(str(tuned))
    tp = "TP" if tp_size is None else tp_size
    where = "" if str(tuned) == "tuned" else f" --out {source}"
    return (
        Action(
            "Tune, on the GPU that serves, under the server's Triton",
            f"moelab tune --model {shlex.quote(model)} --tp {tp} --rules {loader.name}{where}",
            "Files are found by the device's name and, but for vLLM, by the Triton version.",
        ),
        Action(
            "Export",
            f"moelab export {source} --rules {loader.name} --out {shlex.quote(str(out))}",
            "Each file is found again through the loader's rules before it counts as written.",
        ),
        *to_serve(loader, out),
    )


def as_text(actions: Sequence[Action]) -> str:
    """The steps as a shell shows them."""
    why = {a: textwrap.fill(a.why, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT) for a in actions}
    return "\n".join(f"{n}. {a.do}\n{INDENT}{a.how}\n{why[a]}" for n, a in enumerate(actions, 1))


def as_markdown(actions: Sequence[Action]) -> str:
    """The steps as a numbered list; commands and log lines as code."""
    return "\n".join(f"{n}. {a.do}: `{a.how}`  \n   {a.why}" for n, a in enumerate(actions, 1))
