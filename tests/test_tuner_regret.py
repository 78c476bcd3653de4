"""The study tuner_regret: what it writes from small landscapes, and that the recording is of this tuner and keeps its word."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from landscapes import shipped
from synthetic import small_problem, synthetic_landscape

from moelab import recordings, runtime, studies
from moelab.recordings import Recording
from moelab.studies import tuner_regret
from moelab.tuner import landscape
from moelab.tuner.regret import Point
from moelab.tuner.strategies import STRATEGIES

NAMES = ("one", "two")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    folder, problem = tmp_path_factory.mktemp("landscapes"), small_problem((1, 64, 1024))
    paths = [
        landscape.write(synthetic_landscape(problem, seed=seed), folder / f"{name}.parquet")
        for seed, name in enumerate(NAMES)
    ]
    return tuner_regret.record([str(path) for path in paths], seeds=3, strategies=("race", "random"))


def test_what_is_written_loads_again(made: Recording, tmp_path: Path) -> None:
    loaded = recordings.load(recordings.write(made, tmp_path / "tuner_regret.json"))
    assert "SYNTHETIC" in loaded.source() and loaded.provenance["replayed"]["numpy"]
    assert set(loaded.protocol["sha256"]) == set(NAMES) and loaded.protocol["seeds"] == 3
    assert len(loaded.select(kind="end")) == 2 * 2 * 3
    assert len(loaded.select(kind="curve")) == 2 * 2 * 2 * tuner_regret.STOPS


def test_curves_end_where_the_searches_do(made: Recording) -> None:
    """At the last stop of an axis every search is over: the quantiles are those of the ends."""
    for name in NAMES:
        for strategy in ("race", "random"):
            ends = [row["worst"] for row in made.select(kind="end", landscape=name, strategy=strategy)]
            for axis in ("samples", "seconds"):
                rows = made.select(kind="curve", landscape=name, strategy=strategy, axis=axis)
                assert [row["at"] for row in rows] == sorted({row["at"] for row in rows})
                assert rows[-1]["worst"] == tuner_regret.quantiles(ends)
                assert rows[0]["worst"] != rows[-1]["worst"]


def test_a_choice_is_judged_by_the_other_run_too(made: Recording) -> None:
    """These two differ by luck of each config of 2 %: what one run chooses is not the best of the other."""
    race = made.select(kind="end", strategy="race")
    assert all(row["other_unknown"] == 0 for row in race)
    assert max(row["other_worst"] for row in race) > max(row["worst"] for row in race)


def test_a_single_landscape_has_no_other_judge(tmp_path: Path) -> None:
    path = landscape.write(synthetic_landscape(small_problem((1, 64))), tmp_path / "one.parquet")
    ends = tuner_regret.record([str(path)], seeds=1, strategies=("random",)).select(kind="end")
    assert len(ends) == 1 and "other_worst" not in ends[0] and "other_unknown" not in ends[0]


def test_a_run_under_another_routing_judges_nothing(tmp_path: Path) -> None:
    """Other configs win there, so that what they lose says nothing of the search."""
    problem = small_problem((1, 64))
    for routing, judged in (("uniform", True), ("zipf", False)):
        problems = {"one": problem, "two": dataclasses.replace(problem, routing=routing)}
        paths = [
            str(landscape.write(synthetic_landscape(each, seed=seed), tmp_path / f"{name}.parquet"))
            for seed, (name, each) in enumerate(problems.items())
        ]
        ends = tuner_regret.record(paths, seeds=1, strategies=("random",)).select(kind="end")
        assert [("other_worst" in end) for end in ends] == [judged] * 2


def test_no_recorded_choice_is_judged_by_a_skewed_run() -> None:
    recorded, skewed = recordings.load("tuner_regret"), "qwen3-30b-a3b-tp1-NVIDIA_H200-zipf"
    assert skewed in landscape.landscape_names() and skewed not in recorded.protocol["sha256"]
    assert skewed not in {row["run"] for row in recorded.select(kind="run")}


@given(st.lists(st.floats(0, 1) | st.just(math.inf), min_size=1, max_size=40))
def test_quantiles_are_values_that_occurred_and_ascend(values: list[float]) -> None:
    found = tuner_regret.quantiles(values)
    assert found == sorted(found) and set(found) <= set(values)
    assert sum(v <= found[1] for v in values) >= len(values) / 2


def test_no_choice_yet_is_null_in_a_curve() -> None:
    runs = {"race": [[Point("a", 10, 1.0, math.inf, math.inf), Point("b", 100, 9.0, 0.01, 0.02)]] * 2}
    runs["grid"] = [[Point("a", 1000, 90.0, 0.0, 0.0)]] * 2
    rows = tuner_regret.curves(runs)
    first, last = (
        next(r for r in order if r["strategy"] == "grid" and r["axis"] == "samples") for order in (rows, rows[::-1])
    )
    assert first["median"] == [None] * 3 and last["median"] == [0.0] * 3
    assert next(r for r in rows if r["strategy"] == "race")["worst"] == [0.02] * 3


def test_a_cpu_study_may_be_recorded_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moelab import cli

    monkeypatch.setenv("MOELAB_DATA_DIR", str(tmp_path))
    tiny = Recording("tuner_regret", runtime.provenance(0) | {"gpu": "a landscape's"}, {"kind": "test"}, ({"a": 1},))
    monkeypatch.setitem(studies.STUDIES, "tuner_regret", lambda: tiny)  # type: ignore[arg-type]
    assert cli.main(["record", "tuner_regret"]) == 0
    assert (tmp_path / "recordings" / "tuner_regret.json").is_file()


# --- the recording ----------------------------------------------------------------------------------------------------

# strategy -> goals for the recorded searches: largest median over the seeds of the median batch size's regret, largest
# worst batch size in nine of ten, most samples as a share of the grid's.
GOALS = {"grid": (0.002, 0.015, 1.01), "race": (0.01, 0.03, 0.35), "forest": (0.02, 0.04, 0.1)}


@pytest.fixture(scope="module")
def recorded() -> Recording:
    return recordings.load("tuner_regret")


def ends(found: Recording, strategy: str, field: str, **equals: object) -> list[float]:
    return [row[field] for row in found.select(kind="end", strategy=strategy, **equals)]


def test_the_recording_is_of_the_landscapes_that_are_shipped(recorded: Recording) -> None:
    whole = [shipped(name) for name in tuner_regret.shipped()]
    assert {found.problem.shape.name for found in whole} >= {"qwen3-30b-a3b", "llama-4-scout"}
    runs = [shipped(name) for name in landscape.landscape_names() if not name.endswith(tuner_regret.WHOLE)]
    again = tuner_regret._protocol(whole, runs, recorded.protocol["seeds"])
    assert dict(recorded.protocol) == json.loads(json.dumps(again)), "record it again: moelab record tuner_regret"
    assert recorded.path is not None and recorded.path.stat().st_size < 300_000
    for name in tuner_regret.shipped():
        for strategy in STRATEGIES:
            assert len(set(ends(recorded, strategy, "seed", landscape=name))) >= 30


@pytest.mark.parametrize("strategy", GOALS)
def test_the_recorded_searches_reach_their_goals(recorded: Recording, strategy: str) -> None:
    median, worst, share = GOALS[strategy]
    for name in tuner_regret.shipped():
        found = {field: ends(recorded, strategy, field, landscape=name) for field in ("median", "worst", "samples")}
        assert np.median(found["median"]) <= median and np.quantile(found["worst"], 0.9) <= worst
        everything = np.median(ends(recorded, "grid", "samples", landscape=name))
        assert max(found["samples"]) <= share * everything
    assert np.median(ends(recorded, "random", "worst")) > np.median(ends(recorded, strategy, "worst"))


def test_races_that_ran_are_within_their_goals_of_the_whole_grid(recorded: Recording) -> None:
    """At most 1 % in the median and 3 % at worst, over every run of a layer whose whole grid was measured apart from it."""
    rows = recorded.select(kind="run")
    assert {(row["landscape"], row["num_tokens"]) for row in rows} == {
        (name, b) for name, sizes in recorded.protocol["batch_sizes"].items() for b in sizes
    }
    for run in {row["run"] for row in rows}:
        regrets = [row["regret"] for row in rows if row["run"] == run]
        assert np.median(regrets) <= 0.01 and max(regrets) <= 0.03, run


def test_a_fresh_replay_gives_what_was_recorded(recorded: Recording) -> None:
    """The race draws from numpy alone, so it repeats; the forest's trees may differ with scikit-learn, its regret not by much."""
    name = tuner_regret.shipped()[0]
    fresh = tuner_regret.record([name], seeds=1, strategies=("race", "forest"))
    (race,), (forest,) = (fresh.select(kind="end", strategy=s) for s in ("race", "forest"))
    (was,) = recorded.select(kind="end", strategy="race", seed=0, landscape=name)
    assert race["samples"] == pytest.approx(was["samples"], rel=0.02)
    assert race["worst"] == pytest.approx(was["worst"], abs=0.003)
    assert forest["median"] <= 0.02 and forest["worst"] <= 0.05
    assert forest["samples"] <= 0.1 * max(ends(recorded, "grid", "samples", landscape=name))


def test_the_drawn_recording_says_who_needs_least(recorded: Recording) -> None:
    from moelab.plots.tuner_regret import curves

    good = [s for s in GOALS if np.quantile(ends(recorded, s, "worst"), 0.9) <= 0.02]
    least = min(good, key=lambda s: np.median(ends(recorded, s, "samples")))
    for axis in ("samples", "seconds"):
        for which in ("median", "worst"):
            panel = curves(recorded, axis, which)
            assert f"{least} stays within 2 % on the fewest samples" in panel.figure.layout.title.text
            assert len(panel.table) == 4
    assert "by other runs" in panel.sentence and "ran on a GPU" in panel.sentence


def test_the_strategy_for_a_budget_comes_from_the_recording(recorded: Recording) -> None:
    from moelab.plots.tuner_regret import BUDGETS_S, budgets

    panel = budgets(recorded)
    takes = {row["budget, s"]: row["take"] for row in panel.table}
    assert takes[BUDGETS_S[0]] == "forest" and "race" in takes[60] and "forest" not in takes[60]
    for name in tuner_regret.shipped():
        was = [
            row["worst"][1] for row in recorded.select(kind="curve", landscape=name, strategy="forest", axis="seconds")
        ]
        assert panel.table[-1]["forest"] >= f"{100 * was[-1]:.2f} %"
    surest = {
        s: max(100 * np.quantile(ends(recorded, s, "worst", landscape=name), 0.9) for name in tuner_regret.shipped())
        for s in ("race", "forest", "random")
    }
    assert surest["race"] < surest["forest"] < surest["random"], "why race is the default"
    assert all(f"{value:.2f} %" in panel.sentence for value in surest.values())
