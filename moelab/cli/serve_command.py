"""`moelab serve-bench`: a whole model under each implementation of its experts."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moelab.cli import printing

if TYPE_CHECKING:
    from moelab.recordings import Recording
    from moelab.serving.suite import Plan


def serve_bench(
    model: Annotated[
        str | None, typer.Option("--model", help="A preset, a Hugging Face id, or the path of a config.json.")
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="The first so many; default: all.")] = None,
    experts: Annotated[
        list[str] | None, typer.Option("--experts", help="A name of transformers' experts; repeat. moelab_fast is one.")
    ] = None,
    prefill: Annotated[list[str] | None, typer.Option("--prefill", help="BATCHxLENGTH, as 4x2048; repeat.")] = None,
    decode: Annotated[list[int] | None, typer.Option("--decode", min=1, help="A batch; repeat.")] = None,
    context: Annotated[int | None, typer.Option("--context", min=1, help="Tokens before a decode step.")] = None,
    routing: Annotated[
        str,
        typer.Option(
            "--routing",
            help="balanced, uniform, zipf, dirichlet, a folder of saved ids; real: as its gates say.",
        ),
    ] = "balanced",
    eager: Annotated[bool, typer.Option(help="Decode without a CUDA graph too.")] = True,
    requests: Annotated[
        int | None, typer.Option("--requests", min=0, help="Of the serving run; 0 leaves it out.")
    ] = None,
    rate: Annotated[str, typer.Option("--rate", help="Requests a second, or inf: all at once.")] = "8",
    prompt_tokens: Annotated[int | None, typer.Option("--prompt-tokens", min=1, help="Of each request.")] = None,
    new_tokens: Annotated[int | None, typer.Option("--new-tokens", min=2, help="Of each request.")] = None,
    tree: Annotated[
        list[Path] | None, typer.Option("--tree", help="A folder of tuned configs; twice: the two beside each other.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of weights and activations.")] = "bfloat16",
    limit: Annotated[float, typer.Option("--limit", min=1, help="Seconds, after which no cell is begun.")] = 300.0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Also write a recording, beside rows of other models in it; kept after each cell."),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option("--replay", help="Print this recording, or what a cut run has left of one; needs no GPU."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time a whole model of random weights, contender by contender. To the first token, to each further one, tokens a second.

    Contenders take turns in one model; ties are told. Exit status 1 if one is over its error bound, or could not run anywhere.
    """
    if replay is not None:
        return _show(_of(replay, model), (), as_json)
    if model is None:
        raise typer.BadParameter("name a model by --model, or a recording by --replay.")
    from moelab.serving import contenders
    from moelab.serving.suite import Plan

    trees = contenders.of_trees(tree or ())
    given: dict[str, Any] = {
        "layers": layers, "dtype": dtype, "contenders": (*(experts or ()), *trees), "routing": routing, "eager": eager,
        "limit_s": limit, "load": _load(requests, rate, prompt_tokens, new_tokens),
    }  # fmt: skip
    given |= {"prefills": tuple(map(_shape, prefill))} if prefill else {}
    given |= {"decodes": tuple(decode)} if decode else {}
    given |= {"context": context} if context else {}
    found = _measured(Plan(model, **given), out)
    _show(found, trees, as_json)
    if not _sound(found, named=bool(experts)):
        raise typer.Exit(1)


def _of(path: Path, model: str | None) -> Recording:
    """The recording, or that model's rows of it."""
    from dataclasses import replace

    from moelab import recordings
    from moelab.errors import RecordingError

    found = recordings.load(path)
    rows = tuple(found.select(model=model) if model else found.rows)
    there = list(dict.fromkeys(str(row.get("model")) for row in found.rows))
    if found.suite != "serve_bench" or not rows:
        raise RecordingError(
            f"{path} is a recording of {found.suite}, of {', '.join(there)[:200]}. Expected one of serve_bench with that model. "
            "Name another."
        )
    return replace(found, rows=rows)


def _shape(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,6})", text)):
        raise typer.BadParameter(f"{text!r} is no batch and length. Expected as in --prefill 4x2048.")
    return int(found[1]), int(found[2])


def _load(requests: int | None, rate: str, prompt_tokens: int | None, new_tokens: int | None) -> Any:
    from moelab.serving.requests import Load

    try:
        a_second = float(rate)
    except ValueError:
        a_second = math.nan
    if not a_second > 0:
        raise typer.BadParameter(f"--rate {rate!r} is no rate. Expected requests a second, over 0, or inf.")
    if requests == 0:
        return None
    given = {"requests": requests, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    return Load(rate=a_second, **{name: value for name, value in given.items() if value})


def _measured(plan: Plan, out: Path | None) -> Recording:
    from moelab import recordings
    from moelab.serving.suite import joined, require_same
    from moelab.serving.suite import serve_bench as measure
    from moelab.suites.partial import OnRows, record_kept

    def say(text: str) -> None:
        print(f"moelab: {text}", file=sys.stderr, flush=True)

    if out is None:
        return measure(plan, say=say)
    before = recordings.load(out) if out.exists() else None
    if before is not None:
        require_same(before)
    found: list[Recording] = []

    def kept(on_rows: OnRows) -> Recording:
        found.append(measure(plan, on_rows, say))
        return joined(before, found[0])

    say(f"wrote {record_kept('serve_bench', kept, out)}")
    return found[0]


SAID = ("decode", "routing", "format", "in that format")
"""Of the protocol, above the tables."""


def _show(found: Recording, trees: tuple[str, ...], as_json: bool) -> None:
    from moelab.serving import prediction, table

    timed, served, judged = table.times(found.rows), table.serving(found.rows), table.errors(found.rows)
    verdicts = [prediction.verdict(found.rows, one, trees[0]) for one in trees[1:]]
    if as_json:
        printing.print_json({"source": found.source(), "protocol": dict(found.protocol), "times": timed, "serving": served,
                             "errors": judged, "verdicts": verdicts})  # fmt: skip
        return
    how = [f"{name}: {found.protocol[name]}" for name in SAID if name in found.protocol]
    over = [f"gains over {line['experts']}" for line in timed if "ms" in line][:1]
    print("; ".join([found.source(), *how, *over]), end="\n\n")
    for rows in (judged, timed, served):
        if rows:
            printing.show_rows(_narrow(rows), False)
            print()
    for skipped in found.protocol.get("not begun for want of time", ()):
        print(f"not begun for want of time: {skipped}")
    for line in verdicts:
        print(line)


def _narrow(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Without columns that say nothing: of no value in any row, or of one model in all."""
    said = {key for row in rows for key, value in row.items() if value is not None}
    said -= {"model"} if len({row["model"] for row in rows}) == 1 else set()
    return [{key: value for key, value in row.items() if key in said} for row in rows]


def _sound(found: Recording, named: bool) -> bool:
    """Whether every contender was within its bound, and ran in some cell; of those that nobody named one at least."""
    asked = {row["impl"] for row in found.rows}
    ran = {row["impl"] for row in found.rows if "samples_us" in row or "itl_ms" in row}
    return all(row.get("within_bound", True) for row in found.rows) and (ran == asked or not ran or not named)
