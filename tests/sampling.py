"""Which of all combinations a test runs by default; the rest have the marker `whole`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest


def whole(*values: object) -> object:
    """One case, as parameters, that `make whole` alone runs."""
    return pytest.param(*values, marks=pytest.mark.whole)


def sampled(*axes: Sequence[object], together: int = 2) -> list[object]:
    """Every combination of the axes, as parameters. By default as few run as hold every combination of any `together` of them:
    with 1 each value at least once, with 2 each pair of values of two axes, with 0 the first combination alone."""
    everything = list(itertools.product(*(range(len(axis)) for axis in axes)))
    places = list(itertools.combinations(range(len(axes)), together))
    # From the diagonal on, so that with together=1 the longest axis is gone through once.
    order = sorted(everything, key=lambda one: [(i - one[0]) % len(axis) for i, axis in zip(one, axes, strict=True)])
    missing = {(place, tuple(one[i] for i in place)) for place in places for one in everything}
    chosen = set()
    while missing:
        gains = [(sum((place, tuple(one[i] for i in place)) in missing for place in places), one) for one in order]
        best = max(gain for gain, _ in gains)
        one = next(one for gain, one in gains if gain == best)
        chosen.add(one)
        missing -= {(place, tuple(one[i] for i in place)) for place in places}
    params = [[axis[i] for axis, i in zip(axes, one, strict=True)] for one in everything]
    marks = [() if one in chosen else (pytest.mark.whole,) for one in everything]
    return [pytest.param(*values, marks=mark) for values, mark in zip(params, marks, strict=True)]
