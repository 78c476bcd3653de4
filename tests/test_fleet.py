"""The fleet: a list of targets tuned, cut, taken up again and installed, on replayed and on faulty devices."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from faulty_device import COMPILER, DEVICE
from synthetic import AXES, SMALL, small_problem, synthetic_landscape

from moelab import config_files, recordings, runtime
from moelab.errors import LandscapeError, UnknownNameError
from moelab.recordings import Recording
from moelab.studies import fleet, fleet_gain, fleet_job, timeline, tuned_gain
from moelab.studies.fleet import Fleet
from moelab.studies.fleet_job import Job, Makers
from moelab.studies.targets import TARGETS, Target
from moelab.tuner import evaluators, journal, landscape
from moelab.tuner.cluster import RayEvaluator
from moelab.tuner.evaluate import FAILURES
from moelab.tuner.gpu import GpuEvaluator
from moelab.tuner.problem import Problem
from moelab.tuner.replay import ReplayEvaluator, Table
from moelab.tuner.space import build_space

ONE, TWO = Target("one", 1, keep=True, grid=True), Target("two", 1)
ROOT = Path(__file__).resolve().parent.parent
SIZES = {"one": 512, "two": 256}
AT = (1, 64)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two batch sizes, and a repository of our own to install into."""
    monkeypatch.setattr(fleet, "TUNED_AT", AT)
    monkeypatch.setattr(fleet, "GRID_AT", (64,))
    for variable, name in (("MOELAB_DATA_DIR", "data"), ("MOELAB_CONFIG_DIR", "repo_configs")):
        (tmp_path / name / "recordings").mkdir(parents=True)
        monkeypatch.setenv(variable, str(tmp_path / name))


def problem_of(job: Job) -> Problem:
    shape = dataclasses.replace(SMALL, name=job.target.model, moe_intermediate_size=SIZES[job.target.model])
    return dataclasses.replace(small_problem(job.batch_sizes), shape=shape, seed=job.seed)


class Bench(ReplayEvaluator):
    """A replay of a made-up landscape that says it measures, on as many GPUs as it is given."""

    def __init__(self, job: Job, problem: Problem, _: Path) -> None:
        super().__init__(Table(synthetic_landscape(problem)), problem, seed=problem.seed)
        self.gpus = len(job.gpus)

    def describe(self) -> dict:
        return {"kind": "gpu", "measured": True, "devices": self.gpus, "compile_processes": 3, "protocol": "made up"}


class Cut(Bench):
    """One that is interrupted after some results."""

    left = 10

    def run(self, requests):
        for result in super().run(requests):
            yield result
            Cut.left -= 1
            if Cut.left == 0:
                raise KeyboardInterrupt


def a_fleet(out: Path, targets: Sequence[Target] = (ONE, TWO), bench: type = Bench, **more) -> Fleet:
    return Fleet(targets, (0, 1, 2, 3), out, makers=Makers(problem_of, bench), **more)


def statuses(done: Fleet) -> list[tuple[str, str, str]]:
    return [(d.job.part, d.job.target.model, d.status) for d in done.done]


# --- a whole fleet ----------------------------------------------------------------------------------------------------


def test_parts_write_files_landscapes_and_a_timeline(tmp_path: Path) -> None:
    done = a_fleet(tmp_path)
    assert done.run(["tune", "grid"])
    assert statuses(done) == [("tune", "one", "tuned"), ("tune", "two", "tuned"), ("grid", "one", "tuned")]
    files = sorted(path.name for path in (tmp_path / "configs" / "triton_3_6_0").iterdir())
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
    copies = done.install()
    assert {path.name for path in (tmp_path / "repo_configs" / "triton_3_6_0").iterdir()} == {
        path.name for path in (out / "configs" / "triton_3_6_0").iterdir()
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


# --- real processes -------------------------------------------------------------------------------------------------------

FEW = AXES | {"BLOCK_SIZE_M": (16,), "BLOCK_SIZE_K": (64,), "num_stages": (2,), "GROUP_SIZE_M": (1,)}


def test_four_faulty_devices_cut_and_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real workers and compilers: one config crashes its worker and is no winner; one pool compiles for all four GPUs; a
    Ctrl-C in the middle loses nothing; each batch size is measured in the process of one GPU at a time."""
    monkeypatch.setattr(fleet, "TUNED_AT", (1, 16, 64, 256))
    problem = dataclasses.replace(problem_of(Job("tune", TWO, batch_sizes=fleet.TUNED_AT)), axes=FEW, incumbents={})
    bad = build_space(problem).configs["up"][2]
    monkeypatch.setenv("FAULTS", pickle.dumps({}).hex())
    made: list[GpuEvaluator] = []

    class Interrupted(GpuEvaluator):
        left = 12

        def describe(self) -> dict:
            return super().describe() | {"measured": True}

        def run(self, requests):
            for result in super().run(requests):
                yield result
                Interrupted.left -= 1
                if Interrupted.left == 0:
                    raise KeyboardInterrupt

    def evaluator(job: Job, problem: Problem, quarantine: Path) -> GpuEvaluator:
        made.append(Interrupted(
            problem, job.gpus, device=DEVICE, device_arguments=({bad: "dies"}, str(tmp_path / "trail")), compiler=COMPILER,
            quarantine=quarantine, measure_s=5.0, processes=1,
        ))  # fmt: skip
        return made[-1]

    makers = Makers(lambda job: problem, evaluator)
    with pytest.raises(KeyboardInterrupt):
        Fleet((TWO,), (0, 1, 2, 3), tmp_path, makers=makers).run(["tune"])
    Interrupted.left = 0
    done = Fleet((TWO,), (0, 1, 2, 3), tmp_path, makers=makers)
    assert done.run(["tune"]), done.table()
    assert statuses(done) == [("tune", "two", "resumed")]
    assert all(len(each.crew.members) == 4 and each.pool.processes == 1 for each in made)
    assert not any(bad in (b.up, b.down) for b in done.done[0].result.batches.values())
    assert set(done.done[0].result.batches) == set(fleet.TUNED_AT)
    (row,) = recordings.load(done.timeline).select(phase="all")
    assert row["failures"]["crash"] >= 1 and row["gpus"] == 4 and row["resumed"] == 1
    assert list((tmp_path / "runs" / "two-tp1-tune.quarantine").iterdir())


# --- the command ------------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_goes_on_after_ctrl_c(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(fleet, "chosen", lambda names: (ONE, TWO))
    monkeypatch.setattr(Cut, "left", 10)
    arguments = ["--parts", "tune", "--gpus", "0,1", "--out", str(tmp_path), "--install"]
    assert fleet.main(arguments, Makers(problem_of, Cut)) == 130
    cut = capsys.readouterr().out
    assert "goes on from" in cut and "cut" in cut.splitlines()[-2]
    assert fleet.main(arguments, Makers(problem_of, Bench)) == 0
    said = capsys.readouterr().out
    assert "resumed" in said and "tuned" in said and "installed" in said
    assert json.loads((tmp_path / "data" / "recordings" / "tune_timeline.json").read_text())["suite"] == "tune_timeline"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nobody/tp1"], "Unknown target 'nobody/tp1'"), (["--stop-after", "soon"], "'soon' is no time"),
        (["--gpus", "two"], "'two' names no GPUs"), (["--parts", "tuna"], "'tuna'"),
    ],
)  # fmt: skip
def test_bad_use_is_status_2(arguments: list[str], words: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        fleet.main(arguments, Makers())
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_times_and_gpus_are_read_as_everywhere() -> None:
    assert [fleet.seconds_of(text) for text in ("8m", "90s", "1.5h", "30")] == [480.0, 90.0, 5400.0, 30.0]
    assert fleet.gpus_of("0,3") == (0, 3)


@pytest.mark.parametrize(
    ("via", "expected"), [("ray", ("ray", {"address": "local", "actors": 2})), ("gpus", ("gpu", {}))]
)
def test_who_measures_a_job(via: str, expected: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load(name: str):
        return lambda problem, *given, **named: asked.append((name, given, named))

    monkeypatch.setattr(evaluators, "load_evaluator", load)
    Makers().evaluator(Job("scaling", TARGETS[0], gpus=(0, 1), via=via), small_problem((1,)), tmp_path / "bad")
    ((name, given, named),) = asked
    assert (name, {k: v for k, v in named.items() if k != "quarantine"}) == expected
    assert given == (() if via == "ray" else ((0, 1),))


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="has a GPU")
def test_without_a_gpu_the_command_says_so(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        fleet.main([])
    assert caught.value.code == 2 and "GPU" in capsys.readouterr().err


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(UnknownNameError, match="qwen3-30b-a3b/tp1"):
        fleet.chosen(["qwen3-30b-a3b/tp11"])
    assert fleet.chosen(["mixtral-8x7b/tp2"]) == tuple(t for t in TARGETS if t.model == "mixtral-8x7b")


def test_a_journal_without_finals_has_no_files(tmp_path: Path) -> None:
    with pytest.raises(LandscapeError):
        path = tmp_path / "a.jsonl"
        header = {
            "provenance": {},
            "problem": small_problem((1,)).to_json(),
            "strategy": {},
            "space": {},
            "evaluator": {},
        }
        journal.Journal.create(path, header).close()
        fleet_job.result_of(path).write(tmp_path)


def test_a_kill_by_timeout_is_a_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to the command's own process: a table is printed, and the cut run is in the timeline."""
    monkeypatch.undo()
    script = (
        "import runpy, sys, time; sys.path.insert(0, 'tests'); import test_fleet as t\n"
        "from moelab.studies import fleet, fleet_job\n"
        "class Slow(t.Bench):\n"
        "    def run(self, requests):\n"
        "        for result in super().run(requests):\n            time.sleep(0.05); yield result\n"
        "from moelab import runtime; from moelab.tuner import evaluators\n"
        "runtime.current = lambda: runtime.Runtime('gpu', 'cuda', 'Synthetic H200', '')\n"
        "fleet_job.gpu_problem = lambda shape, sizes, seed: t.problem_of(fleet_job.Job('tune', t.ONE, batch_sizes=(1, 64)))\n"
        "fleet_job.make_gpu_evaluator = lambda p, gpus, **_: Slow(fleet_job.Job('tune', t.ONE, gpus=gpus), p, None)\n"
        "sys.argv = ['fleet', 'qwen3-30b-a3b/tp1', '--gpus', '0', '--parts', 'tune', '--out', sys.argv[1]]\n"
        "runpy.run_module('moelab.studies.fleet', run_name='__main__')"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (found := list(tmp_path.glob("runs/*.jsonl"))) or len(found[0].read_bytes().splitlines()) < 5:
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.02)
    child.terminate()
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 130 and "goes on from" in out and "cut" in out
    assert recordings.load(tmp_path / "recordings" / "tune_timeline.json").rows


def test_one_and_two_actors_over_real_ray(tmp_path: Path) -> None:
    """Replays in the actors; Ray is started once for both runs."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

    def over_ray(job: Job, problem: Problem, _: Path) -> RayEvaluator:
        return RayEvaluator(problem, landscape=synthetic_landscape(problem), actors=len(job.gpus))

    done = a_fleet(tmp_path, (ONE,), bench=over_ray)
    try:
        assert done.run(["scaling"]), done.table()
    finally:
        ray.shutdown()
    rows = recordings.load(done.timeline).select(phase="all")
    assert [(row["run"], row["gpus"], row["via"]) for row in rows] == [
        ("one-tp1-scaling-1-ray", 1, "ray"), ("one-tp1-scaling-2-ray", 2, "ray"),
    ]  # fmt: skip
    assert rows[1]["end_s"] < rows[0]["end_s"], "simulated seconds: two actors measure at once"
    winners = [{b: (x.up, x.down) for b, x in d.result.batches.items()} for d in done.done]
    assert winners[0] == winners[1]


@pytest.mark.gpu
def test_a_small_fleet_on_real_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3-30B-A3B with 8 configs at two batch sizes on every GPU here, then on 1 and 2, and what it gained."""
    monkeypatch.delenv("MOELAB_DATA_DIR")
    import torch

    from moelab.tuner.starting import gpu_problem

    axes = {
        "num_stages": (3, 4), "BLOCK_SIZE_M": (16, 64), "BLOCK_SIZE_K": (64,), "BLOCK_SIZE_N": (64, 128), "num_warps": (4,),
        "GROUP_SIZE_M": (1,),
    }  # fmt: skip

    def problem(job: Job) -> Problem:
        return dataclasses.replace(gpu_problem(job.target.shape(), job.batch_sizes, seed=job.seed), axes=axes)

    gpus = tuple(range(torch.cuda.device_count()))
    done = Fleet((TARGETS[0],), gpus, tmp_path, makers=Makers(problem=problem), say=print)
    assert done.run(["tune", "grid", "gain", "scaling"]), done.table()
    print(done.table())
    for row in recordings.load(done.timeline).rows:
        print({key: row[key] for key in ("run", "phase", "start_s", "end_s", "gpus", "samples", "failures")})
    assert len(recordings.load(tmp_path / "recordings" / "tuned_gain.json").rows) > 3
