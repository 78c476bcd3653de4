"""What the commands print: tables, listings, lookups and bench results, as text or as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moelab.config_files import Lookup
    from moelab.shapes import MoEShape
    from moelab.suites.bench import Result


def sizes(found: MoEShape) -> dict[str, Any]:
    """The shape as JSON has it: MoEShape's fields and the shapes of both weights."""
    from dataclasses import asdict

    return asdict(found) | {"keys_used": None, "w13_shape": list(found.w13_shape), "w2_shape": list(found.w2_shape)}


def weight_bytes(found: MoEShape) -> int:
    """Bytes of w13 and w2 on this rank."""
    import math

    from moelab.config import dtype_bytes

    return (math.prod(found.w13_shape) + math.prod(found.w2_shape)) * dtype_bytes(found.dtype)


def lookup_json(answer: Lookup, problems: Sequence[str]) -> dict[str, Any]:
    """A lookup as JSON has it."""
    return {
        "config": answer.config.to_json() if answer.config else None,
        "path": str(answer.path) if answer.path else None,
        "key": answer.key,
        "is_default": answer.is_default,
        "steps": [{"what": s.what, "result": s.result, "reason": s.reason} for s in answer.steps],
        "problems": list(problems),
    }


def print_lookup(answer: Lookup, problems: Sequence[str]) -> None:
    """The steps of a lookup, its config, and what is wrong with it."""
    for number, step in enumerate(answer.steps, 1):
        print(f"{number}. {step.what}: {step.result}\n     {step.reason}")
    if answer.config is not None:
        print(f"\nconfig  {answer.config.short()}  {json.dumps(answer.config.to_json())}")
    for problem in problems:
        print(f"problem: {problem}")


def print_json(value: Any) -> None:
    """Print strict JSON."""
    print(json.dumps(value, indent=2, allow_nan=False))


def show_rows(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print rows as JSON or as a table."""
    if as_json:
        print_json(rows)
    else:
        print(table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows under their keys; numbers to the right, the rest to the left."""
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
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def listing(values: Mapping[str, Any]) -> str:
    """One "name  value" line each."""
    width = max(map(len, values))
    shown = {name: ", ".join(map(str, v)) if isinstance(v, list | tuple) else v for name, v in values.items()}
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())


def list_suites(as_json: bool) -> bool:
    """Print suites and recordings; whether a file is broken."""
    from moelab import recordings, suites

    found = {item.suite: item for item in recordings.list_recordings()}
    rows: list[dict[str, Any]] = []
    for name in sorted({*suites.SUITES, *found}):
        item = found.get(name)
        text = "not recorded" if item is None else item.recording.source() if item.recording else f"BROKEN {item.error}"
        count = len(item.recording.rows) if item and item.recording else None
        rows.append({"suite": name, "rows": count, "recording": text})
    show_rows(rows, as_json)
    return any(item.error for item in found.values())


def bench_json(found: MoEShape, result: Result) -> dict[str, Any]:
    """One batch size of a bench as JSON has it, every sample included."""
    return {
        "shape": sizes(found), "num_tokens": result.num_tokens, "floor_us": result.floor_us,
        "ceilings": result.ceilings, "config": lookup_json(result.config, ()),
        "down_config": lookup_json(result.down, ()), "rows": list(result.rows),
    }  # fmt: skip


def print_bench(found: MoEShape, result: Result) -> None:
    """One batch size of a bench as a table, with its floor and the configs that were used."""
    floor = "no floor" if result.floor_us is None else f"floor {result.floor_us:.2f} us"
    print(f"{found.name}, tp_size {found.tp_size}, {found.dtype}, {result.num_tokens} tokens: {floor}")
    for label, used in (("GEMM1", result.config), ("GEMM2", result.down)):
        if used.config is not None:
            print(f"triton, {label}: {used.config.short()} from {used.path or 'the default rule'}")
    rows = [
        {
            "impl": row["impl"],
            "median us": f"{row['median_us']:.2f}" if "median_us" in row else "-",
            "95 % interval": f"{row['low_us']:.2f} ... {row['high_us']:.2f}" if "low_us" in row else "-",
            "floor / time": f"{row['floor_fraction']:.0%}" if row.get("floor_fraction") else "-",
            "max error": row["max_abs_error"],
            "": "tie with the fastest" if row.get("tie") else row.get("note", ""),
        }
        for row in result.rows
    ]
    print(textwrap.indent(table(rows), "  ") + "\n")
