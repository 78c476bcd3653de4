"""Statistics by law and by hand; the GPU protocol where there is one; a plain error where there is none."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelab import measure as measure_room
from moelab import runtime
from moelab.errors import RecordingError, RuntimeModeError
from moelab.measure import Measurement, Protocol, measure, median_interval, rotations_for, tie


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=80))
def test_interval_holds_the_median_and_lies_in_the_samples(samples: list[float]) -> None:
    low, high = median_interval(samples)
    assert min(samples) <= low <= Measurement("x", tuple(samples)).median_us <= high <= max(samples)


def test_interval_of_25_by_the_book() -> None:
    # Binomial(25, 1/2): P(B < 8) = 0.0216 <= 0.025 < P(B < 9) = 0.0539, so the 8th and the 18th order statistic.
    assert median_interval(range(1, 26)) == (8, 18)


def test_interval_covers_the_median_as_often_as_it_says() -> None:
    rng = random.Random(0)
    hits = 0
    for _ in range(1000):
        low, high = median_interval([rng.expovariate(1.0) for _ in range(25)])
        hits += low <= 0.6931 <= high
    assert hits >= 930  # 95.7 % expected at n = 25; 930 is over four standard errors below


def test_few_samples_give_their_range() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")]])
def test_samples_that_are_none(samples: list[float]) -> None:
    with pytest.raises(RecordingError, match="Measure again"):
        median_interval(samples)


def test_ties_are_overlaps() -> None:
    a, b = Measurement("a", tuple(range(10, 40))), Measurement("b", tuple(range(12, 42)))
    assert tie(a, b) and tie(b, a)
    assert not tie(a, Measurement("c", tuple(range(100, 130))))


def test_quantiles_by_hand() -> None:
    m = Measurement("m", (4.0, 1.0, 3.0, 2.0))
    assert m.quantile_us(0) == 1 and m.quantile_us(1) == 4 and m.quantile_us(0.5) == m.median_us == 2.5


@given(st.floats(1, 1e12))
def test_rotations_pass_three_caches_within_bounds(bytes_per_call: float) -> None:
    count = rotations_for(bytes_per_call)
    assert 2 <= count <= 64 and (count == 64 or count * bytes_per_call >= 180e6)


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="about machines without a GPU")
def test_without_a_gpu_nothing_is_timed() -> None:
    with pytest.raises(RuntimeModeError, match="read a recording instead"):
        measure({"x": lambda _: None})


def test_a_sample_is_a_replay_over_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        def __init__(self, us: float) -> None:
            self.us = us

        def replay(self) -> float:
            return self.us

    graphs = {"a": (Graph(100.0), 4), "b": (Graph(90.0), 30)}
    monkeypatch.setattr(measure_room, "_capture", lambda contender, protocol: graphs[contender])
    monkeypatch.setattr(measure_room, "_elapsed_us", lambda work: work())
    monkeypatch.setattr(runtime, "current", lambda: runtime.Runtime("gpu", "cuda", "a fake", "a test"))
    found = measure({"a": "a", "b": "b"}, Protocol(rounds=3))
    assert found["a"].samples_us == (25.0,) * 3 and found["b"].samples_us == (3.0,) * 3


@pytest.mark.gpu
def test_on_the_gpu_more_work_takes_longer_and_every_rotation_runs() -> None:
    counts = torch.zeros(4, device="cuda")
    big = torch.randn(4096, 4096, device="cuda")
    found = measure(
        {"small": lambda i: counts[i].add_(1), "large": lambda _: big @ big},
        Protocol(rotations=4, rounds=7, graph_us=50.0),
    )
    assert {len(m.samples_us) for m in found.values()} == {7}
    assert (counts > 7).all() and counts.unique().numel() == 1
    assert found["large"].median_us > 10 * found["small"].median_us
