"""What the commands print: tables, listings, lookups and bench results, as text or as JSON."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moelab.config_files import Lookup, Question
    from moelab.shapes import MoEShape
    from moelab.suites.bench import Result


def sizes(found: MoEShape) -> dict[str, Any]:
    """The shape as JSON has it: MoEShape's fields, its format and the shapes of both weights."""
    shapes = {"w13_shape": list(found.w13_shape), "w2_shape": list(found.w2_shape)}
    return found.to_json() | {"keys_used": None, "format": found.format.name, **shapes}


def file_names(asked: Question, device: str) -> dict[str, str | None]:
    """The names of the files that a server asks for, GEMM1's and GEMM2's; None where it asks for none, with the reason."""
    from moelab.config_files import get_rules
    from moelab.errors import FormatError

    try:
        up, down = (asked.file_name(device, down=down) for down in (False, True))
    except FormatError as error:
        return {"config_file": None, "config_file_down": None, "no_config_file": str(error)}
    return {"config_file": up, "config_file_down": down if get_rules(asked.rules).names_down else None}


def question_json(asked: Question) -> dict[str, Any]:
    """What a loader asks for, and why, as JSON has it."""
    return {
        "rules": asked.rules, "num_experts": asked.num_experts, "top_k": asked.top_k, "format": asked.shape.format.name,
        "because": list(asked.because),
    }  # fmt: skip


def print_question(asked: Question) -> None:
    """What a loader asks for, and which rule of which version says so."""
    shape = asked.shape
    print(
        f"E={asked.num_experts}, top_k {asked.top_k}, N={shape.moe_intermediate_size}, {shape.format.name}, {shape.dtype}"
    )
    for sentence in asked.because:
        print(f"     {sentence}")


def lookup_json(answer: Lookup, problems: Sequence[str], warnings: Sequence[str] = ()) -> dict[str, Any]:
    """A lookup as JSON has it."""
    return {
        "config": answer.config.to_json() if answer.config else None,
        "path": str(answer.path) if answer.path else None,
        "key": answer.key,
        "is_default": answer.is_default,
        "steps": [{"what": s.what, "result": s.result, "reason": s.reason} for s in answer.steps],
        "problems": list(problems),
        "warnings": list(warnings),
    }


def print_lookup(answer: Lookup, problems: Sequence[str]) -> None:
    """The steps of a lookup, its config, and what is wrong with it."""
    for number, step in enumerate(answer.steps, 1):
        print(f"{number}. {step.what}: {step.result}\n     {step.reason}")
    if answer.config is not None:
        print(f"\nconfig  {answer.config.short()}  {json.dumps(answer.config.to_json())}")
    for problem in problems:
        print(f"problem: {problem}")


def refused(error: OSError) -> str:
    """What the system refused, with what to do; as it stands where it names no file."""
    if error.filename is None:
        return str(error)
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"{error.filename}: {error.strerror}. Expected a folder, and a file is in its way. Name another, or move the file."
    return f"{error.filename}: {error.strerror}. Expected a path that can be used. Check it, its rights and its disk."


def print_json(value: Any) -> None:
    """Print strict JSON."""
    print(
        json.dumps(value, indent=2, allow_nan=False).replace("\x7f", "\\u007f")
    )  # the one control that json lets through


def show_rows(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print rows as JSON or as a table."""
    if as_json:
        print_json(rows)
    else:
        print(table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows under their keys, numbers to the right, the rest to the left; "none" without rows."""
    if not rows:
        return "none"
    columns = list(rows[0])
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    right = [all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns]
    lines = [
        "  ".join(t.rjust(w) if r else t.ljust(w) for t, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in [columns, *cells]
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else _one_line(value)


def _one_line(value: Any) -> str:
    """A value that ends no line, and moves no column: names are others' text."""
    return re.sub(r"[\t\n]", lambda match: repr(match[0])[1:-1], str(value))


def listing(values: Mapping[str, Any]) -> str:
    """One "name  value" line each."""
    width = max(map(len, values))
    shown = {
        name: _one_line(", ".join(map(str, v)) if isinstance(v, list | tuple) else v) for name, v in values.items()
    }
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())


def list_suites(as_json: bool, folder: Path | None = None) -> bool:
    """Print suites and a folder's recordings (None: data/recordings), and what cut runs have left; whether a file is broken."""
    from moelab import recordings, studies, suites
    from moelab.suites.partial import partials

    found = {item.suite: item for item in recordings.list_recordings(folder)}
    rows: list[dict[str, Any]] = []
    for name in sorted({*studies.known(), *found}):
        item = found.get(name)
        text = "not recorded" if item is None else item.recording.source() if item.recording else f"BROKEN {item.error}"
        count = len(item.recording.rows) if item and item.recording else None
        cut = ", ".join(map(str, partials(suites.target(name, folder)))) or None
        rows.append({"suite": name, "rows": count, "recording": text, "cut": cut})
    show_rows(rows, as_json)
    return any(item.error for item in found.values())


def bench_json(found: MoEShape, result: Result) -> dict[str, Any]:
    """One batch size of a bench as JSON has it, every sample included."""
    padding = result.padding
    return {
        "shape": sizes(found), "num_tokens": result.num_tokens, "routing": result.routing,
        "experts_touched": result.experts_touched,
        "padding": {"useful_rows": padding.useful_rows, "padded_rows": padding.padded_rows, "waste": padding.waste},
        "floor_us": result.floor_us, "ceilings": result.ceilings, "config": lookup_json(result.config, ()),
        "down_config": lookup_json(result.down, ()), "rows": list(result.rows),
        "protocols": dict(result.protocols), "provenance": dict(result.provenance),
    }  # fmt: skip


def print_bench(found: MoEShape, result: Result) -> None:
    """One batch size of a bench: floor, routing and configs, a table, and below it what is wrong with its rows."""
    floor = "no floor" if result.floor_us is None else f"floor {result.floor_us:.2f} us"
    rank = f"tp_size {found.tp_size}" + (f", ep_size {found.ep_size} (rank 0)" if found.ep_size > 1 else "")
    print(f"{found.name}, {rank}, {found.dtype}, {result.num_tokens} tokens: {floor}")
    print(
        f"{result.routing} routing: {result.experts_touched:.4g} of {found.num_experts} experts touched, "
        f"{result.padding.padded_rows:.4g} rows computed for {result.padding.useful_rows:.4g} "
        f"(padding {result.padding.waste:.2f} times)"
    )
    for label, used in (("GEMM1", result.config), ("GEMM2", result.down)):
        if used.config is not None:
            key = "" if used.key is None else f", batch size {used.key}"
            print(f"{label}: {used.config.short()} from {used.path or 'the default rule'}{key}")
    for row in result.rows:
        if own := row.get("own_configs"):
            print(f"{row['impl']}: {own['up']} and {own['down']} from {own['path']}")
    print(textwrap.indent(table([_bench_row(row, result) for row in result.rows]), "  "))
    for row in result.rows:
        if "refused" in row:
            print(f"  {row['impl']} did not run: {row['refused']}")
        elif "problem" in row:
            print(f"  {row['problem']}")
    print()


def _bench_row(row: Mapping[str, Any], result: Result) -> dict[str, Any]:
    cells = {"impl": row["impl"], "graph us": _us(row, ""), "95 % interval": _interval(row, "")}
    cells["floor / graph"] = f"{row['floor_fraction']:.0%}" if row.get("floor_fraction") else "-"
    if result.protocols["eager"]:
        cells |= {"eager us": _us(row, "eager_"), "eager interval": _interval(row, "eager_")}
    return cells | {"max error": row["max_abs_error"], "bound": row["bound"], "": _mark(row, result.rows)}


def _us(row: Mapping[str, Any], prefix: str) -> str:
    return f"{row[f'{prefix}median_us']:.2f}" if f"{prefix}median_us" in row else "-"


def _interval(row: Mapping[str, Any], prefix: str) -> str:
    low, high = (row.get(f"{prefix}{end}_us") for end in ("low", "high"))
    return "-" if low is None or high is None else f"{low:.2f} ... {high:.2f}"


def _mark(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What the figures beside it cannot say: a bound that does not hold, a tie, the fastest, why there is no time."""
    if "refused" in row:
        return "did not run"
    marks = [] if row["within_bound"] else ["OVER ITS ERROR BOUND"]
    for prefix, where in (("", "in a graph"), ("eager_", "eagerly")):
        tied = any(other.get(f"{prefix}tie") for other in rows)
        rivals = sum(f"{prefix}median_us" in other for other in rows) > 1
        if row.get(f"{prefix}tie"):
            marks.append(f"tie with the fastest {where}")
        elif row.get(f"{prefix}fastest") and rivals:
            marks.append(f"lowest median {where}" if tied else f"fastest {where}")
    return "; ".join([*marks, *([row["note"]] if "note" in row else [])])
