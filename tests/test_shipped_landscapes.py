"""The landscapes in data/landscapes load, and the tuned files in configs/ are what their finals say."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import numpy as np
import pytest
from landscapes import shipped

from moelab import recordings, runtime
from moelab.config import KernelConfig, violations
from moelab.config_files import question
from moelab.studies import tuner_regret
from moelab.studies.targets import TARGETS
from moelab.tuner.landscape import Landscape
from moelab.tuner.problem import default_of
from moelab.tuner.regret import Truth, trace
from moelab.tuner.replay import Table
from moelab.tuner.survey import Survey

FILES = sorted((runtime.data_dir() / "landscapes").glob("*.parquet"))
KINDS = ("-seed", "-grid", "-zipf")
"""What follows a landscape's name: an independent run by another seed, the whole grid at a few batch sizes, a run under
skewed routing at a few batch sizes."""
TUNED = [path.stem for path in FILES if not any(kind in path.stem for kind in KINDS)]
"""Runs whose winners are the files in configs/."""


NAMES = [path.stem for path in FILES]


def finals(found: Landscape, num_tokens: int) -> dict[tuple[KernelConfig, ...], float]:
    """Median microseconds of each pair of configs in a batch size's last comparison of whole layers."""
    rows = [row for row in found.rows if row.stage == "layer" and row.num_tokens == num_tokens and row.interleaved]
    return {row.contender: statistics.median(row.outcome.samples_us) for row in rows}


def gained(found: Landscape, num_tokens: int) -> dict[tuple[KernelConfig, ...], float]:
    """Pair of configs -> times as long as the tuned pair takes, in the interleaved layers of the recording tuned_gain."""
    target = next(t.name for t in TARGETS if t.shape() == found.problem.shape)
    rows = recordings.load("tuned_gain").select(kind="layer", target=target, num_tokens=num_tokens)
    return {(KernelConfig(**row["up"]), KernelConfig(**row["down"])): row["ratio"] for row in rows}


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_landscape_is_sound(name: str) -> None:
    found = shipped(name)
    if found.name.endswith("-grid"):
        assert Survey(found).well_covered == found.problem.batch_sizes and len(found.rows) > 10_000
    elif found.name.endswith("-zipf"):
        assert len(found.problem.batch_sizes) == 6 and len(found.rows) > 10_000
    else:
        assert len(found.problem.batch_sizes) == 19 and len(found.rows) > 30_000
    assert found.problem.routing == ("zipf" if found.name.endswith("-zipf") else "uniform")
    assert found.provenance["gpu"] == "NVIDIA H200" and found.provenance["git_commit"]
    assert found.evaluator["measured"] is True
    for row in found.rows[::97]:
        assert bool(row.outcome.samples_us) != bool(row.outcome.failure) or not row.outcome.measure_s
        format = found.problem.shape.format
        of = {"dtype": format.product_dtype(found.problem.shape.dtype), "weight_bits": format.widened_bits}
        assert not any(violations(config, target=found.problem.target, **of) for config in row.contender)


def test_the_protocols_read_up_to_a_quarter_apart() -> None:
    """What replay, board, survey and the notebook give as the reason to keep them apart."""
    ratios = []
    for name in NAMES:
        medians: dict[bool, dict[tuple, float]] = {False: {}, True: {}}
        for row in shipped(name).rows:
            if row.stage != "layer" and row.outcome.samples_us:
                key = row.stage, row.num_tokens, row.contender
                medians[row.interleaved][key] = statistics.median(row.outcome.samples_us)
        ratios += [finals / medians[False][key] for key, finals in medians[True].items() if key in medians[False]]
    assert 0.2 < max(abs(ratio - 1) for ratio in ratios) < 0.28


def test_the_first_model_is_there() -> None:
    assert "qwen3-30b-a3b-tp1-NVIDIA_H200" in TUNED


@pytest.mark.parametrize("name", TUNED)
def test_tuned_files_are_the_winners_of_their_finals(name: str) -> None:
    """No pair of the finals is faster by more than 1 %, a tie in which the old file stays; and none loses to the default.

    An entry that this run's finals never met, taken from another file, is held to the comparison in tuned_gain.
    """
    found = shipped(name)
    shape = found.problem.shape
    strangers = []
    for num_tokens in found.problem.batch_sizes:
        of = {"num_tokens": num_tokens, "triton_version": found.problem.triton_version}
        up, down = (question(shape).lookup(found.problem.device, **of, down=down) for down in (False, True))
        assert up.key == down.key == num_tokens and Path(str(down.path)).stem.endswith("_down")
        assert up.config is not None and down.config is not None
        pair = (up.config, down.config)
        times = finals(found, num_tokens)
        if pair not in times:
            strangers.append(num_tokens)
            times = gained(found, num_tokens)
            assert len(times) >= 3, num_tokens  # the entry, the default and another run's winner at least
        mine = times[pair]
        assert mine <= 1.01 * min(times.values()), num_tokens
        default = default_of(shape, found.problem.device, num_tokens)
        assert mine < times[default, default] or pair == (default, default), num_tokens
    assert strangers == {"qwen3-30b-a3b-tp1-NVIDIA_H200": [8], "deepseek-v3-fp8-tp8-NVIDIA_H200": [1536]}.get(name, [])


@pytest.mark.parametrize("name", [name for name in TUNED if any(p.stem == f"{name}-seed1" for p in FILES)])
def test_two_runs_of_the_race_agree(name: str) -> None:
    """Each run's winner at a batch size, timed in the other's finals where it got there, is within 1 % of the best there."""
    runs = [shipped(each) for each in (name, f"{name}-seed1")]
    met = 0
    for num_tokens in runs[0].problem.batch_sizes:
        times = [finals(found, num_tokens) for found in runs]
        for mine, other in (times, times[::-1]):
            winner = min(mine, key=lambda pair: mine[pair])
            if winner in other:
                met += 1
                assert other[winner] <= 1.01 * min(other.values()), num_tokens
    assert met >= 10


# Largest median over batch sizes, and largest of the worst batch size in four of five seeds, on whole grids. The goals are 1 %
# and 3 % for the race, 2 % in the median for the forest; data/recordings/tuner_regret.json holds 32 seeds.
MARGINS = {"race": (0.005, 0.02), "forest": (0.01, 0.03)}


# Most samples, finals included, as a share of what `grid` takes.
SHARES = {"race": 0.35, "forest": 0.1}


@pytest.mark.whole
@pytest.mark.parametrize("name", tuner_regret.shipped())
def test_regret_on_a_real_landscape(name: str) -> None:
    found = shipped(name)
    truth = Truth(Table(found), dataclasses.replace(found.problem, batch_sizes=Survey(found).well_covered))
    everything = trace(truth, "grid", 0, every=10**9)[-1].samples
    for strategy, (median, worst) in MARGINS.items():
        ends = [trace(truth, strategy, seed, every=10**9)[-1] for seed in range(5)]
        assert statistics.median(end.median for end in ends) <= median, strategy
        assert np.quantile([end.worst for end in ends], 0.8) <= worst, strategy
        assert max(end.samples for end in ends) <= SHARES[strategy] * everything, strategy
