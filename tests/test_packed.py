"""packed: coordinates in base64 say the same, to what a figure can show."""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab.plots.packed import FEWEST, packed


def unpacked(value: object) -> list:
    """The numbers of a list or of a typed array, as plotly.js reads it."""
    import base64

    if isinstance(value, list):
        return value
    array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=f"<{value['dtype']}")
    return array.reshape([int(n) for n in value["shape"].split(",")] if "shape" in value else -1).tolist()


@given(
    st.lists(st.none() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False), max_size=20)
)
def test_every_number_comes_back_to_a_thousandth_of_the_range(values: list) -> None:
    drawn = unpacked(packed({"data": [{"x": values}]})["data"][0]["x"])
    known = [v for v in values if v is not None]
    close = (max(known) - min(known)) / 1e3 if known else 0.0
    for before, after in zip(values, drawn, strict=True):
        if before is None:
            assert after is None or math.isnan(after)
        else:
            assert after == pytest.approx(before, rel=1e-6, abs=max(close, 1e-300) if math.isfinite(close) else None)


@pytest.mark.parametrize("values", [
    [1] * (FEWEST - 1),  # short
    ["a"] * 9, [True] * 9, [1, "2", 3, 4, 5, 6], [[1, 2, 3], [4, 5]] * 2, [], [[]],  # no numbers, or ragged
])  # fmt: skip
def test_what_is_no_long_row_of_numbers_stays(values: list) -> None:
    assert packed({"data": [{"x": values}]})["data"][0]["x"] == values


def test_error_bars_and_matrices_are_packed_and_nothing_else() -> None:
    trace = {
        "z": [[1.5, None, 3.0], [4, 5, 6]], "error_y": {"array": [0.5] * 9, "type": "data"}, "text": ["a"] * 9,
        "customdata": [1.5] * 9, "name": "n",
    }  # fmt: skip
    done = packed({"data": [trace], "layout": {"title": "t"}})
    (drawn,) = done["data"]
    assert drawn["z"]["shape"] == "2, 3" and unpacked(drawn["z"])[1] == [4, 5, 6]
    assert unpacked(drawn["error_y"]["array"]) == [0.5] * 9 and drawn["error_y"]["type"] == "data"
    assert (drawn["text"], drawn["customdata"], drawn["name"]) == (trace["text"], trace["customdata"], "n")
    assert done["layout"] == {"title": "t"} and trace["z"][0] == [1.5, None, 3.0], "the figure itself is not changed"
    go.Figure(
        data=[{"type": "heatmap", "z": drawn["z"]}, {"x": drawn["z"], "error_y": drawn["error_y"]}]
    )  # plotly's checks


def test_whole_numbers_stay_whole() -> None:
    (drawn,) = packed({"data": [{"x": [2**i for i in range(14)]}]})["data"]
    assert drawn["x"]["dtype"] == "i4" and unpacked(drawn["x"])[-1] == 8192


def test_equal_symbols_become_one_and_whole_customdata_is_packed() -> None:
    trace = {"marker": {"symbol": ["x"] * 3, "size": 8, "color": ["a", "b"]}, "customdata": [1, 4, 16, 64, 256, 1024]}
    (drawn,) = packed({"data": [trace]})["data"]
    assert drawn["marker"] == {"symbol": "x", "size": 8, "color": ["a", "b"]}
    assert unpacked(drawn["customdata"]) == trace["customdata"]
