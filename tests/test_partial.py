"""Suites that are cut: what they had measured lies beside the target, whole, and is named; what is done leaves nothing behind."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moelab import cli, recordings, runtime, suites
from moelab.errors import RecordingError, RuntimeModeError
from moelab.recordings import Recording
from moelab.studies import STUDIES
from moelab.suites.partial import OnRows, ignore, keeper, partials, record_kept

SHAPES = ("a", "b", "c")
AT_ONCE = {"ceilings", "sum_reduce_precision", "tma_overhead", "tuner_regret"}
"""Suites whose rows are all measured together, or replayed."""


def row(shape: str) -> dict:
    return {"shape": shape, "samples_us": [1.0, 2.0]}


def suite_that(at_b: Callable[[], None]) -> Callable[..., Recording]:
    """A suite of three shapes to which something happens at the second."""

    def record(on_rows: OnRows = ignore) -> Recording:
        rows = []
        for shape in SHAPES:
            if shape == "b":
                at_b()
            rows.append(row(shape))
            on_rows(rows)
        return Recording("slow", runtime.provenance(seed=0), {"kind": "test"}, tuple(rows))

    return record


def fail(error: BaseException) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


def shapes_in(path: Path) -> list[str]:
    return [found["shape"] for found in recordings.load(path).rows]


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), 130), (RuntimeModeError("the GPU is lost"), 2), (MemoryError(), None)]
)
def test_a_cut_run_says_where_its_rows_lie(run, tmp_path: Path, monkeypatch, capsys, error, status) -> None:
    monkeypatch.setitem(suites.SUITES, "slow", suite_that(fail(error)))
    if status is None:
        with pytest.raises(MemoryError):
            cli.main(["record", "slow", "--out", str(tmp_path)])
        err = capsys.readouterr().err
    else:
        found, out, err = run("record", "slow", "--out", tmp_path)
        assert (found, out) == (status, "")
    (kept,) = tmp_path.iterdir()
    assert f"this run was cut, what it measured lies in {kept} " in err and shapes_in(kept) == ["a"]
    assert kept.name == "slow.json.partial" and recordings.list_recordings(tmp_path) == []


def test_a_finished_run_leaves_its_recording_alone(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(suites.SUITES, "slow", suite_that(fail(KeyboardInterrupt())))
    run("record", "slow", "--out", tmp_path)
    seen: list[list[str]] = []
    looking = suite_that(lambda: seen.append(sorted(path.name for path in tmp_path.iterdir())))
    monkeypatch.setitem(suites.SUITES, "slow", looking)
    status, _, err = run("record", "slow", "--out", tmp_path)
    assert status == 0 and "an earlier run was cut" in err and "slow.json.partial " in err and "this run" not in err
    assert seen == [["slow.json.partial", "slow.json.partial1"]], "the rows of the earlier run are still there"
    assert [path.name for path in tmp_path.iterdir()] == ["slow.json"] and shapes_in(tmp_path / "slow.json") == [
        *SHAPES
    ]
    assert run("record", "slow", "--out", tmp_path)[2] == ""


def test_every_cut_run_keeps_its_own(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(suites.SUITES, "slow", suite_that(fail(KeyboardInterrupt())))
    for _ in range(12):
        err = run("record", "slow", "--out", tmp_path)[2]
    found = partials(tmp_path / "slow.json")
    assert [path.name.removeprefix("slow.json.partial") for path in found] == ["", *map(str, range(1, 12))]
    assert err.count("earlier run") == 11 and err.count("this run was cut") == 1
    found[3].unlink()
    run("record", "slow", "--out", tmp_path)
    assert partials(tmp_path / "slow.json") == found


def test_a_run_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    """Not even a finally runs: the file is on disk after each step."""
    script = (
        "import os, sys; from pathlib import Path; from test_partial import suite_that\n"
        "from moelab.suites.partial import record_kept\n"
        "record_kept('slow', suite_that(lambda: os._exit(9)), Path(sys.argv[1]) / 'slow.json')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment).returncode == 9
    assert shapes_in(tmp_path / "slow.json.partial") == ["a"]


def test_a_partial_is_a_recording_that_says_so(tmp_path: Path) -> None:
    keep = keeper("slow", tmp_path / "slow.json")
    keep([])
    assert not list(tmp_path.iterdir())
    keep([row("a"), row("b")])
    made = recordings.load(tmp_path / "slow.json.partial")
    assert (made.suite, len(made.rows)) == ("slow", 2) and "partial" in made.protocol["kind"]
    assert made.provenance["gpu"] == runtime.provenance()["gpu"] and made.provenance["date"]


def test_a_row_that_would_be_refused_ends_the_run_and_not_the_rows_before(tmp_path: Path) -> None:
    def record(on_rows: OnRows = ignore) -> Recording:
        on_rows([row("a")])
        on_rows([row("a"), {"samples_us": [float("nan")]}])
        raise AssertionError("it goes on for hours")

    with pytest.raises(RecordingError, match="samples_us"):
        record_kept("slow", record, tmp_path / "slow.json")
    assert shapes_in(tmp_path / "slow.json.partial") == ["a"]


def test_a_suite_that_measures_all_at_once_is_run_as_ever(tmp_path: Path) -> None:
    made = Recording("tiny", runtime.provenance(seed=0), {"kind": "test"}, (row("a"),))
    assert record_kept("tiny", lambda: made, tmp_path / "tiny.json") == tmp_path / "tiny.json"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


@pytest.mark.parametrize("name", sorted({**suites.SUITES, **STUDIES}))
def test_what_goes_shape_by_shape_keeps_its_rows(name: str) -> None:
    taken = inspect.signature({**suites.SUITES, **STUDIES}[name]).parameters
    assert ("on_rows" in taken) == (name not in AT_ONCE)


def test_the_list_names_what_cut_runs_left(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MOELAB_DATA_DIR", str(tmp_path))
    folder = tmp_path / "recordings"
    folder.mkdir()
    keeper("fast_layer", folder / "fast_layer.json")([row("a")])
    status, out, _ = run("record", "--list", "--json")
    cut = {found["suite"]: found["cut"] for found in json.loads(out)}
    assert (
        status == 0 and cut.pop("fast_layer") == str(folder / "fast_layer.json.partial") and set(cut.values()) == {None}
    )
    assert "fast_layer.json.partial" in run("record", "--list")[1]


def test_two_runs_at_once_keep_their_own(tmp_path: Path) -> None:
    """Before: both chose the free name before either had written, and the second run's rows replaced the first's."""
    target = tmp_path / "slow.json"
    first, second = keeper("slow", target), keeper("slow", target)
    first([row("a")])
    second([row("b")])
    first([row("a"), row("c")])
    assert sorted(map(shapes_in, partials(target))) == [["a", "c"], ["b"]]


def test_a_finished_run_leaves_what_another_is_keeping(tmp_path: Path) -> None:
    other = keeper("slow", tmp_path / "slow.json")

    def record(on_rows: OnRows = ignore) -> Recording:
        on_rows([row("a")])
        other([row("b")])
        return Recording("slow", runtime.provenance(seed=0), {"kind": "test"}, (row("a"),))

    record_kept("slow", record, tmp_path / "slow.json")
    (left,) = partials(tmp_path / "slow.json")
    assert shapes_in(left) == ["b"]
