"""The fleet: a list of targets tuned, cut, taken up again and installed, on replayed devices."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from small_fleet import AT, ONE, TWO, Bench, Cut, a_fleet, problem_of, statuses
from small_fleet import small as small  # a fixture of every test here

from moelab import config_files, recordings, runtime
from moelab.config_files import question
from moelab.formats import get_format
from moelab.recordings import Recording
from moelab.studies import fleet, fleet_gain, timeline, tuned_gain
from moelab.studies.fleet import Fleet
from moelab.studies.fleet_job import Job, Makers
from moelab.studies.targets import TARGETS, Target
from moelab.tuner import journal, landscape
from moelab.tuner.evaluate import FAILURES
from moelab.tuner.problem import Problem

BLOCKS = "int8_w8a8_block_64x64"

# --- a whole fleet ----------------------------------------------------------------------------------------------------


def test_parts_write_files_landscapes_and_a_timeline(tmp_path: Path) -> None:
    done = a_fleet(tmp_path)
    assert done.run(["tune", "grid"])
    assert statuses(done) == [("tune", "one", "tuned"), ("tune", "two", "tuned"), ("grid", "one", "tuned")]
    files = sorted(path.name for path in (tmp_path / "configs" / "triton_3_6_0").glob("E=*"))
    assert files == sorted(
        config_files.file_name(8, size, "Synthetic_H200", down=down) for size in (512, 256) for down in (False, True)
    )
    up = config_files.read_config_file(tmp_path / "configs" / "triton_3_6_0" / files[0])
    assert set(up) == set(AT)
    frozen = {path.stem: landscape.load(path) for path in (tmp_path / "landscapes").iterdir()}
    assert set(frozen) == {"one-tp1-Synthetic_H200", "two-tp1-Synthetic_H200", "one-tp1-Synthetic_H200-grid"}
    assert frozen["one-tp1-Synthetic_H200-grid"].problem.batch_sizes == (64,)
    recorded = recordings.load(done.timeline)
    assert {row["run"] for row in recorded.rows} == {"one-tp1-tune", "two-tp1-tune", "one-tp1-grid"}
    assert "over default" in done.table() and done.table().count("tuned") == 3


def test_a_quantised_target_has_files_and_a_landscape_of_its_format(tmp_path: Path) -> None:
    """Under the names that a server asks for, steps of K within a block of scales, and apart from the plain layer's."""
    shape = dataclasses.replace(problem_of(Job("tune", ONE, batch_sizes=AT)).shape, format=get_format(BLOCKS))

    def coded(job: Job) -> Problem:
        return dataclasses.replace(problem_of(job), shape=shape) if job.target is ONE else problem_of(job)

    done = Fleet((ONE, TWO), (0,), tmp_path, makers=Makers(coded, Bench))
    assert done.run(["tune"])
    files = {path.name for path in (tmp_path / "configs" / "triton_3_6_0").glob("E=*")}
    name = question(shape).file_name("Synthetic_H200")
    assert {name, question(shape).file_name("Synthetic_H200", down=True)} < files and len(files) == 4
    assert "dtype=int8_w8a8,block_shape=[64, 64]" in name
    configs = config_files.read_config_file(tmp_path / "configs" / "triton_3_6_0" / name)
    assert set(configs) == set(AT) and all(64 % config.BLOCK_SIZE_K == 0 for config in configs.values())
    frozen = {path.stem for path in (tmp_path / "landscapes").iterdir()}
    assert frozen == {f"one-tp1-{BLOCKS}-Synthetic_H200", "two-tp1-Synthetic_H200"}


def test_what_is_complete_is_not_run_again(tmp_path: Path) -> None:
    a_fleet(tmp_path).run(["tune"])
    before = {path: path.read_bytes() for path in tmp_path.glob("runs/*")}
    (tmp_path / "configs" / "triton_3_6_0").rename(tmp_path / "elsewhere")
    again = a_fleet(tmp_path, bench=lambda *_: pytest.fail("measured again"))
    assert again.run(["tune"])
    assert [status for *_, status in statuses(again)] == ["complete already"] * 2
    assert {path: path.read_bytes() for path in tmp_path.glob("runs/*")} == before
    written = {path.name: path.read_text() for path in (tmp_path / "configs" / "triton_3_6_0").iterdir()}
    assert written == {path.name: path.read_text() for path in (tmp_path / "elsewhere").iterdir()}, "written anew"


def test_a_cut_run_goes_on_and_ends_as_if_undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cut, "left", 10)
    first = a_fleet(tmp_path / "cut", bench=Cut)
    with pytest.raises(KeyboardInterrupt):
        first.run(["tune"])
    assert statuses(first) == [("tune", "one", "cut")]
    (row,) = recordings.load(first.timeline).select(phase="all")
    assert row["finished"] is False and row["contenders"] > 0 and row["end_s"] is None
    second = a_fleet(tmp_path / "cut")
    assert second.run(["tune"])
    assert [status for *_, status in statuses(second)] == ["resumed", "tuned"]
    rows = recordings.load(second.timeline).select(phase="all")
    assert [(r["run"], r["resumed"], r["finished"]) for r in rows] == [
        ("one-tp1-tune", 1, True),
        ("two-tp1-tune", 0, True),
    ]
    plain = a_fleet(tmp_path / "plain")
    plain.run(["tune"])
    for path in (tmp_path / "plain" / "configs").rglob("*.json"):
        assert path.read_text() == (tmp_path / "cut" / path.relative_to(tmp_path / "plain")).read_text()


def test_a_file_that_a_kill_left_empty_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one-tp1-tune.jsonl").write_text('{"kind": "hea')
    done = a_fleet(tmp_path, (ONE,))
    assert done.run(["tune"]) and statuses(done) == [("tune", "one", "tuned")]


def test_a_failing_target_does_not_end_the_fleet(tmp_path: Path) -> None:
    def broken(job: Job, problem: Problem, quarantine: Path) -> Bench:
        if job.target is ONE:
            raise RuntimeError("CUDA error: out of memory")
        return Bench(job, problem, quarantine)

    done = a_fleet(tmp_path, bench=broken)
    assert not done.run(["tune"])
    assert [d.failed for d in done.done] == [True, False] and "out of memory" in done.table()


def test_a_run_of_other_batch_sizes_is_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cut, "left", 10)
    with pytest.raises(KeyboardInterrupt):
        a_fleet(tmp_path, bench=Cut).run(["tune"])
    monkeypatch.setattr(fleet, "TUNED_AT", (1, 64, 256))
    done = a_fleet(tmp_path, (ONE,))
    assert not done.run(["tune"]) and "was begun with" in done.done[0].status


def test_a_part_begins_nothing_once_its_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 60)
    monkeypatch.setattr(fleet.time, "monotonic", lambda: next(clock))
    done = a_fleet(tmp_path, stop_after_s=100.0)
    done.run(["tune", "grid"])
    assert done.done[0].status == "tuned" and "time is up" in done.done[1].status
    assert done.done[2].job.part == "grid" and done.done[2].status == "tuned", "each part has a time of its own"


# --- what it asks for --------------------------------------------------------------------------------------------------


def test_parts_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    gpus = (0, 1, 2, 3)
    tune = fleet.jobs("tune", TARGETS, gpus)
    assert [job.target for job in tune] == list(TARGETS) and all(
        len(job.batch_sizes) == 19 and job.files for job in tune
    )
    assert [j.target.name for j in fleet.jobs("grid", TARGETS, gpus)] == ["qwen3-30b-a3b/tp1", "llama-4-scout/tp4"]
    assert all(
        j.strategy == "grid" and j.batch_sizes == (1, 8, 64, 256, 1024, 4096) for j in fleet.jobs("grid", TARGETS, gpus)
    )
    assert {j.seed for j in fleet.jobs("second", TARGETS, gpus)} == {1}
    assert [len(j.gpus) for j in fleet.jobs("scaling", TARGETS, gpus)] == [1, 2]
    assert [len(j.gpus) for j in fleet.jobs("scaling", TARGETS, (0,))] == [1]
    assert [(j.target, len(j.gpus)) for j in fleet.jobs("gain", TARGETS, gpus)] == [(t, 1) for t in TARGETS]
    every = [job.stem for part in fleet.PARTS for job in fleet.jobs(part, TARGETS, gpus)]
    assert len(set(every)) == len(every)


def test_scaling_is_by_gpus_where_ray_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fleet.importlib.util, "find_spec", lambda name: None)
    done = a_fleet(tmp_path)
    assert done.run(["scaling"])
    rows = recordings.load(done.timeline).select(phase="all")
    assert [(row["run"], row["gpus"], row["via"]) for row in rows] == [
        ("one-tp1-scaling-1-gpus", 1, "gpu"), ("one-tp1-scaling-2-gpus", 2, "gpu"),
    ]  # fmt: skip
    assert not (tmp_path / "landscapes").exists() and not (tmp_path / "configs").exists()


# --- the gain ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What tuned_gain was asked for; it answers with rows of the files that are there."""
    asked: list[tuple] = []

    def record(targets: Sequence[Target], *, config_dir: Path, second: dict) -> Recording:
        (target,) = targets
        asked.append((target, config_dir, dict(second)))
        rows = []
        for b, pair in tuned_gain.tuned_pairs(target.shape(), "Synthetic_H200", config_dir).items():
            row = {"kind": "layer", "target": target.name, "num_tokens": b}
            row |= {side: config.to_json() for side, config in zip(("up", "down"), pair, strict=True)}
            rows += [row | {"config_name": label} for label in ("tuned", *["second"] * bool(second))]
        rows.append(
            {"kind": "summary", "target": target.name, "over": "default", "geometric_mean": 1.25, "slower_at": [64]}
        )
        return Recording("tuned_gain", runtime.provenance(0) | {"gpu": "x"}, {"kind": "test"}, tuple(rows))

    monkeypatch.setattr(tuned_gain, "record", record)
    monkeypatch.setattr(
        fleet_gain.runtime, "device_key", lambda name=None: (name or "Synthetic_H200").replace(" ", "_")
    )
    monkeypatch.setattr(fleet_gain.runtime, "triton_key", lambda version=None: "triton_3_6_0")
    monkeypatch.setattr(tuned_gain.runtime, "triton_version", lambda: "3.6.0")
    shapes = {t: problem_of(Job("tune", t, batch_sizes=AT)).shape for t in (ONE, TWO)}
    monkeypatch.setattr(Target, "shape", lambda self: shapes[self])
    return asked


def test_the_gain_is_measured_of_the_new_files(tmp_path: Path, gains: list[tuple]) -> None:
    done = a_fleet(tmp_path)
    assert done.run(["tune", "gain"])
    assert gains == [(ONE, tmp_path / "configs", {}), (TWO, tmp_path / "configs", {})]
    assert "default 1.250 (slower at 64)" in done.table()
    rows = recordings.load(tmp_path / "recordings" / "tuned_gain.json").rows
    assert {row["target"] for row in rows} == {"one/tp1", "two/tp1"} and len(rows) == 6


def test_a_gain_is_measured_again_for_a_second_run_and_only_then(tmp_path: Path, gains: list[tuple]) -> None:
    a_fleet(tmp_path).run(["tune", "gain"])
    del gains[:]
    again = a_fleet(tmp_path)
    assert again.run(["tune", "gain"]) and gains == []
    assert [status for *_, status in statuses(again)] == ["complete already"] * 4
    assert a_fleet(tmp_path).run(["second", "gain"])
    assert gains == [
        (ONE, tmp_path / "configs", {"one/tp1": tmp_path / "landscapes" / "one-tp1-Synthetic_H200-seed1.parquet"})
    ]
    rows = recordings.load(tmp_path / "recordings" / "tuned_gain.json").rows
    assert [row["target"] for row in rows].count("one/tp1") == 5, "in place of the rows it had"


def test_a_target_without_files_has_no_gain(tmp_path: Path, gains: list[tuple]) -> None:
    a_fleet(tmp_path, (ONE,)).run(["tune"])
    done = a_fleet(tmp_path)
    assert done.run(["gain"]) and [d.status for d in done.done][1] == "has no files yet"
    assert [target for target, *_ in gains] == [ONE]


def test_without_pyarrow_the_run_and_its_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = a_fleet(tmp_path, (ONE,))
    assert not done.run(["tune"]) and "pip install pyarrow" in done.done[0].status
    assert done.done[0].result is not None and len(list((tmp_path / "configs").rglob("*.json"))) == 2


# --- what goes into the repository ----------------------------------------------------------------------------------------


def test_install_takes_files_kept_landscapes_and_adds_to_the_timeline(tmp_path: Path, monkeypatch) -> None:
    out, timed = tmp_path / "out", tmp_path / "data" / "recordings" / "tune_timeline.json"
    a_fleet(tmp_path / "before", (TWO,)).run(["tune"])
    older = next((tmp_path / "before" / "runs").glob("*.jsonl"))
    timeline.append([older.rename(older.with_name("older.jsonl"))], timed)
    done = a_fleet(out)
    done.run(["tune", "grid"])
    shutil.rmtree(tmp_path / "repo_configs")  # to be written, it need not be there
    copies = done.install()
    assert {path.name for path in (tmp_path / "repo_configs" / "triton_3_6_0").glob("*")} == {
        path.name for path in (out / "configs" / "triton_3_6_0").glob("E=*")
    }
    kept = {path.stem for path in (tmp_path / "data" / "landscapes").iterdir()}
    assert kept == {"one-tp1-Synthetic_H200", "one-tp1-Synthetic_H200-grid"} and timed in copies
    runs = list(dict.fromkeys(row["run"] for row in recordings.load(timed).rows))
    assert runs == ["older", "one-tp1-tune", "two-tp1-tune", "one-tp1-grid"]
    monkeypatch.setattr(fleet, "LARGEST_LANDSCAPE", 10)
    (tmp_path / "data" / "landscapes" / "one-tp1-Synthetic_H200.parquet").unlink()
    assert not [path for path in done.install() if path.suffix == ".parquet"], "too large for the repository"


# --- the timeline -------------------------------------------------------------------------------------------------------


def test_a_timeline_accounts_for_every_result(tmp_path: Path) -> None:
    a_fleet(tmp_path, (ONE,)).run(["tune"])
    path = tmp_path / "runs" / "one-tp1-tune.jsonl"
    *phases, whole = timeline.rows_of(path)
    assert [row["phase"] for row in phases] == ["compile", "scouts", "screen", "longer", "finalists", "layers"]
    assert all(a["end_s"] == b["start_s"] for a, b in itertools.pairwise(phases))
    assert (whole["gpus"], whole["compile_processes"], whole["start_s"]) == (4, 3, 0.0)
    assert phases[0]["compiled_only"] == phases[0]["contenders"] and phases[0]["failures"]["compile"] > 0
    results = journal.read(path).results.values()
    for field in ("contenders", "samples", "compiled_only"):
        assert sum(row[field] for row in phases) == whole[field]
    assert whole["samples"] == sum(len(o.samples_us) for r in results for o in r.outcomes)
    assert sum(sum(row["failures"].values()) for row in phases) == sum(whole["failures"].values())
    assert whole["wall_s"] >= 0 and whole["finished"]


def test_a_run_is_in_the_timeline_once(tmp_path: Path) -> None:
    done = a_fleet(tmp_path, (ONE,))
    done.run(["tune"])
    path, rows = tmp_path / "runs" / "one-tp1-tune.jsonl", recordings.load(done.timeline).rows
    timeline.append([path], done.timeline)
    assert recordings.load(done.timeline).rows == rows


RECORDED = Path(__file__).resolve().parent.parent / "data" / "recordings" / "tune_timeline.json"


@pytest.mark.skipif(not RECORDED.is_file(), reason="not recorded yet: make tuned, on a GPU")
def test_the_recorded_timeline_is_whole() -> None:
    found = recordings.load(RECORDED)
    for whole in found.select(phase="all"):
        phases = [row for row in found.select(run=whole["run"]) if row["phase"] != "all"]
        assert phases and sum(row["samples"] for row in phases) == whole["samples"], whole["run"]
        assert set(whole["failures"]) <= set(FAILURES) and whole["gpus"] >= 1
        if whole["finished"]:
            assert phases[-1]["phase"] == "layers" and phases[-1]["end_s"] == whole["end_s"]
