"""The fleet as a command, in real processes: on faulty devices, ended by signals, and refused where it cannot run.

Over Ray it runs in test_tuner_cluster.py, where Ray is started once.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faulty_device import COMPILER, DEVICE
from small_fleet import ONE, ROOT, TWO, Bench, Cut, problem_of, statuses
from small_fleet import small as small  # a fixture of every test here
from synthetic import AXES, small_problem

from moelab import recordings, runtime
from moelab.errors import LandscapeError, UnknownNameError
from moelab.studies import fleet, fleet_job
from moelab.studies.fleet import Fleet
from moelab.studies.fleet_job import Job, Makers
from moelab.studies.targets import TARGETS
from moelab.tuner import evaluators, journal
from moelab.tuner.gpu import GpuEvaluator
from moelab.tuner.problem import Problem
from moelab.tuner.space import build_space

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
        "import runpy, sys, time; sys.path.insert(0, 'tests'); import small_fleet as t\n"
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
