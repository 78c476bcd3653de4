"""Who wins a final: the fastest, unless the incumbent stays inside a tie."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moelab.tuner.evaluate import Outcome, Request, Result
from moelab.tuner.results import decide


def layers(**samples: Sequence[float]) -> tuple[list[tuple[str, tuple]], Result]:
    """A final of pairs named "default", "current" and others; incumbents are the two."""
    from moelab.config import KernelConfig

    pairs = {name: (KernelConfig(16, 32, 64, i + 1),) * 2 for i, name in enumerate(samples)}
    outcomes = tuple(Outcome(tuple(s)) if s else Outcome((), "timeout", "hung") for s in samples.values())
    result = Result(Request("layer", 8, tuple(pairs.values()), 9, True), outcomes)
    return [(name, pairs[name]) for name in ("default", "current") if name in pairs], result


WAVE = [0.99, 1.01, 1.0, 0.98, 1.02, 1.0, 0.99, 1.01, 1.0]


def times(us: float, wave: Sequence[float] = WAVE) -> list[float]:
    return [us * w for w in wave]


def test_the_fastest_wins_with_its_gains() -> None:
    won = decide(8, *layers(new=times(10), default=times(20), current=times(11)))
    assert (won.up.GROUP_SIZE_M, won.kept) == (1, None)
    assert won.gain("default").factor == pytest.approx(2) and won.gain("current").factor == pytest.approx(1.1)
    assert not won.gain("current").tie


def test_the_incumbent_stays_inside_a_tie() -> None:
    won = decide(8, *layers(new=times(10), default=times(20), current=times(10.05, WAVE[::-1])))
    assert won.kept == "current" and won.gain("current").factor == 1 and won.gain("current").tie
    won = decide(8, *layers(new=times(10), default=times(10.05, WAVE[::-1])))
    assert won.kept == "default"  # without a file the default is what has to be beaten


def test_the_default_does_not_push_out_a_faster_file() -> None:
    won = decide(8, *layers(new=times(10), default=times(10.01, WAVE[::-1]), current=times(12)))
    assert (won.kept, won.up.GROUP_SIZE_M) == (None, 1)


def test_pairs_that_fail_cannot_win_and_none_is_an_error() -> None:
    won = decide(8, *layers(new=(), default=times(20), current=()))
    assert won.kept == "default" and won.gain("current") is None
    assert "timeout: hung" in decide(8, *layers(new=(), default=())).error
    assert decide(8, [], None).error
