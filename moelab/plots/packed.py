"""Figures as a notebook stores them: coordinates packed in base64.

A notebook is indented JSON, so that each number of a list takes a line of its own, with a dozen blanks before it and as many
digits as float64 has: packed as float32 it takes five characters, and a tenth of a pixel is still told apart.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

COORDINATES = ("x", "y", "z", "base", "array", "arrayminus")
"""Attributes of a trace, and of its error bars, that are packed; others may be shown as they are, digit by digit."""

FEWEST = 6
"""Shorter lists stay lists: packing saves nothing."""


def packed(figure: Mapping[str, Any]) -> dict[str, Any]:
    """A figure's JSON with long lists of numbers among COORDINATES as plotly's typed arrays; None becomes NaN."""
    return {**figure, "data": [_packed(trace) for trace in figure.get("data", [])]}


def _packed(values: Mapping[str, Any]) -> dict[str, Any]:
    done = dict(values)
    for name, value in values.items():
        if name in COORDINATES and isinstance(value, list):
            done[name] = _array(value)
        elif name in ("error_x", "error_y"):
            done[name] = _packed(value)
        elif name == "marker":
            done[name] = {key: _one(each) for key, each in value.items()}
        elif name == "customdata" and isinstance(value, list) and all(isinstance(each, int) for each in value):
            done[name] = _array(value)  # whole numbers are shown as they are
    return done


def _one(value: Any) -> Any:
    """A list of nothing but one text, as the symbols of a line's markers mostly are, as that text."""
    alike = isinstance(value, list) and value and isinstance(value[0], str) and len(set(map(str, value))) == 1
    return value[0] if alike else value


def _array(values: list[Any]) -> Any:
    """The list as a typed array, or as it is where it is short, ragged, or holds anything but numbers."""
    rows = values if values and all(isinstance(row, list) for row in values) else [values]
    numbers = [v for row in rows for v in row]
    if len(numbers) < FEWEST or len({len(row) for row in rows}) > 1 or not all(map(_plain, numbers)):
        return values
    filled = np.array([np.nan if v is None else v for v in numbers], dtype=np.float64)
    whole = all(isinstance(v, int) for v in numbers) and np.abs(filled).max() < 2**31
    kind = "i4" if whole else "f4" if _fits(filled) else "f8"
    spec = {"dtype": kind, "bdata": base64.b64encode(filled.astype(f"<{kind}").tobytes()).decode()}
    return spec if rows[0] is values else spec | {"shape": f"{len(rows)}, {len(rows[0])}"}


def _plain(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _fits(values: np.ndarray) -> bool:
    """Whether float32 holds the values, and tells them apart: to a thousandth of their range, as a figure draws them."""
    known = np.abs(values[np.isfinite(values)])
    limits = np.finfo(np.float32)
    if not known.size or known.max() > limits.max or (known[known > 0].size and known[known > 0].min() < limits.tiny):
        return not known.size
    spread = float(np.ptp(values[np.isfinite(values)]))
    return spread == 0 or spread > 1e3 * float(known.max()) * float(limits.eps)
