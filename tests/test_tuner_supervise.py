"""Real processes around a made-up device: whatever a contender does, the run goes on, and the contender does not win."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from error_rows import unhelpful
from faulty_device import COMPILER, DEVICE
from synthetic import small_problem

from moelab import runtime
from moelab.config import KernelConfig
from moelab.errors import JournalError, RoutingError, RuntimeModeError, UnknownNameError
from moelab.tuner import device, repro, worker
from moelab.tuner.child import Child, load
from moelab.tuner.evaluate import FAILURES, Request, Result
from moelab.tuner.gpu import GpuEvaluator, visible
from moelab.tuner.placement import Placement
from moelab.tuner.rig import Rig, routings_of
from moelab.tuner.session import TuneSession
from moelab.tuner.space import build_space

AXES = {
    "num_stages": (2, 4), "BLOCK_SIZE_M": (16, 64), "BLOCK_SIZE_K": (64,), "BLOCK_SIZE_N": (32, 64, 128), "num_warps": (4,),
    "GROUP_SIZE_M": (1,),
}  # fmt: skip
PROBLEM = small_problem((1, 256), axes=AXES, incumbents={})
CONFIGS = build_space(PROBLEM).configs["up"]


class Rack:
    """Makes evaluators of made-up devices, closes them, and reads what the devices were asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch, self.made = folder, monkeypatch, []

    def __call__(self, faults: dict | None = None, gpus: int = 1, **more) -> GpuEvaluator:
        self.monkeypatch.setenv("FAULTS", pickle.dumps(faults or {}).hex())
        given = {"measure_s": 1.0, "compile_s": 1.0, "processes": 1, **more}
        evaluator = GpuEvaluator(
            PROBLEM, range(gpus), device=DEVICE, device_arguments=(faults or {}, str(self.folder / "trail")),
            compiler=COMPILER, quarantine=self.folder / "bad", **given,
        )  # fmt: skip
        self.made.append(evaluator)
        return evaluator

    def trail(self, word: str) -> list[str]:
        lines = (self.folder / "trail").read_text().splitlines()
        return [line for line in lines if line.split()[1] == word]

    def close(self) -> None:
        for evaluator in self.made:
            evaluator.close()
            for member in [*evaluator.crew.members, *evaluator.pool.crew.members]:
                assert member.child is None


@pytest.fixture
def rack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = Rack(tmp_path, monkeypatch)
    yield made
    made.close()


def up(*configs: KernelConfig, b: int = 256, rounds: int = 3, **more) -> Request:
    return Request("up", b, tuple((c,) for c in configs), rounds, **more)


def failures(result: Result) -> list[str | None]:
    return [outcome.failure for outcome in result.outcomes]


FAULTS = {
    "hangs": "timeout", "dies": "crash", "aborts": "crash", "sticky": "crash", "nan": "nan", "wrong": "wrong",
    "memory": "memory", "resources": "resources", "launch": "launch", "no compile": "compile", "compiler dies": "compile",
    "compiler hangs": "timeout",
}  # fmt: skip


@pytest.mark.parametrize("interleaved", [False, True])
def test_every_fault_costs_its_contender_and_no_other(rack: Rack, interleaved: bool) -> None:
    assert set(FAULTS.values()) | {"unrecorded"} == set(FAILURES)
    bad = dict(zip(CONFIGS[1::2], list(FAULTS)[interleaved::2], strict=False))
    assert len(bad) == 6
    evaluator = rack(bad)
    (result,) = evaluator.run([up(*CONFIGS, interleaved=interleaved)])
    assert failures(result) == [FAULTS.get(bad.get(config)) for config in CONFIGS]
    assert all(len(o.samples_us) == (0 if o.failure else 3) for o in result.outcomes)
    lost = [name for name in bad.values() if FAULTS[name] in ("crash", "timeout") and "compiler" not in name]
    assert len(evaluator.incidents) == 2 * len(lost) and len(list((rack.folder / "bad").iterdir())) == len(lost)


def test_a_whole_run_among_faults(rack: Rack, tmp_path: Path) -> None:
    """The fastest configs of the model are those that fail: none of them wins, and every batch size has a winner."""
    clean = TuneSession(PROBLEM, rack(), strategy="grid", run=tmp_path / "clean.jsonl").run()
    winners = {c for configs in clean.to_configs().values() for c in configs.values()}
    bad = dict(zip(sorted(winners, key=repr), ["sticky", "wrong", "dies", "nan"], strict=False))
    result = TuneSession(PROBLEM, rack(bad), strategy="grid", run=tmp_path / "faulty.jsonl").run()
    found = {c for configs in result.to_configs().values() for c in configs.values()}
    assert result.complete and not result.errors and found and not found & set(bad)
    assert set(result.failures) <= set(FAULTS.values()) and result.failures


def test_a_suspect_is_tried_again_first_and_its_neighbours_are_not_blamed(rack: Rack) -> None:
    evaluator = rack({CONFIGS[2]: "dies once"})
    (result,) = evaluator.run([up(*CONFIGS[:5])])
    assert failures(result) == [None] * 5 and len(evaluator.incidents) == 1
    checked = [line.split(maxsplit=4)[-1] for line in rack.trail("check")]
    names = [c.short() for c in CONFIGS[:5]]
    assert checked == [*names[:3], names[2], *names[3:]] and len(rack.trail("start")) == 2
    assert not (rack.folder / "bad").exists()


def test_what_was_quarantined_fails_everywhere_and_after_a_resume(rack: Rack) -> None:
    evaluator = rack({CONFIGS[0]: "sticky"})
    first, second = evaluator.run([up(*CONFIGS[:2]), up(*CONFIGS[:2], b=1)])
    layer = Request("layer", 1, ((CONFIGS[0], CONFIGS[1]), (CONFIGS[1], CONFIGS[1])), 2)
    (third,) = evaluator.run([layer])
    assert [failures(r) for r in (first, second, third)] == [["crash", None]] * 3
    assert len(rack.trail("start")) == 3  # two of them lost, at one batch size
    message = first.outcomes[0].message
    assert "illegal memory access" in message and "python -m moelab.tuner.repro" in message
    problem, again = repro.load(message.split()[-1])
    assert problem == PROBLEM and again.contenders == ((CONFIGS[0],),) and again.num_tokens == 256
    fresh = rack({CONFIGS[0]: "sticky"})
    fresh.recall([first])
    (fourth,) = fresh.run([up(*CONFIGS[:2], b=1)])
    assert failures(fourth) == ["crash", None] and len(rack.trail("start")) == 4
    assert fresh.clock_s() > sum(o.measure_s for o in first.outcomes)


def test_a_contender_may_fail_in_a_graph(rack: Rack) -> None:
    bad = {CONFIGS[0]: "no graph", CONFIGS[3]: "sticky later"}
    (result,) = rack(bad).run([up(*CONFIGS[:5], rounds=6, interleaved=True)])
    assert failures(result) == ["launch", None, None, "crash", None]
    assert [len(o.samples_us) for o in result.outcomes] == [0, 6, 6, 0, 6]


def test_early_stopping_and_order(rack: Rack) -> None:
    evaluator = rack()
    (free,) = evaluator.run([up(*CONFIGS)])
    bound = sorted(o.samples_us[0] for o in free.outcomes)[len(CONFIGS) // 2]
    (result,) = evaluator.run([up(*CONFIGS, stop_above_us=bound, rounds=4)])
    assert {len(o.samples_us) for o in result.outcomes} == {1, 4}
    assert all((o.samples_us[0] > bound) == (len(o.samples_us) == 1) for o in result.outcomes)
    assert all(o.measure_s > 0 for o in result.outcomes)


def test_compiling_alone(rack: Rack) -> None:
    evaluator = rack({CONFIGS[1]: "no compile"})
    (result,) = evaluator.run([up(*CONFIGS, rounds=0)])
    assert failures(result) == [None, "compile", *[None] * (len(CONFIGS) - 2)]
    assert all(o.compile_s == 0.1 and not o.samples_us for o in result.outcomes)
    (again,) = evaluator.run([up(*CONFIGS[:2])])
    assert failures(again) == [None, "compile"] and not any(o.compile_s for o in again.outcomes)


def test_what_is_abandoned_is_not_compiled(rack: Rack) -> None:
    """A budget that ends the compiling: what waits for it must not come before what is asked for next."""
    evaluator = rack()
    running = evaluator.run([up(config, rounds=0) for config in CONFIGS])
    next(running)
    running.close()
    (result,) = evaluator.run([up(CONFIGS[-1])])
    assert failures(result) == [None] and len(evaluator.pool.known) < len(CONFIGS)
    assert not evaluator.pool.known.keys() & {("up", config) for config in CONFIGS[6:-1]}
    (later,) = evaluator.run([up(*CONFIGS[6:])])
    assert failures(later) == [None] * len(CONFIGS[6:])


def test_several_devices_share_the_work(rack: Rack) -> None:
    evaluator = rack({CONFIGS[5]: "dies"}, gpus=2)
    requests = [up(*CONFIGS, b=b, repeat=i) for b in (1, 256) for i in range(8)]
    found = {result.request: result for result in evaluator.run(requests)}
    assert set(found) == set(requests)
    assert all(failures(r) == [None] * 5 + ["crash"] + [None] * (len(CONFIGS) - 6) for r in found.values())
    assert len({line.split()[0] for line in rack.trail("sample")}) >= 2
    assert evaluator.describe()["devices"] == 2


def test_no_comparison_mixes_devices(rack: Rack) -> None:
    """Short looks, finals and layers of a batch size are all timed in one process, though three could share them."""
    evaluator = rack(gpus=3)
    three = (1, 16, 256)
    evaluator.placement = Placement(three, range(3))
    pairs = tuple((c, c) for c in CONFIGS[:3])
    for requests in (
        [up(*CONFIGS[i : i + 4], b=b) for b in three for i in range(0, len(CONFIGS), 4)],
        [up(*CONFIGS[:4], b=b, interleaved=True) for b in three],
        [Request("layer", b, pairs, 2, True) for b in three],
    ):
        assert len(list(evaluator.run(requests))) == len(requests)
    processes = {b: {line.split()[0] for line in rack.trail("check") if line.split()[3] == str(b)} for b in three}
    assert all(len(found) == 1 for found in processes.values()) and len(set.union(*processes.values())) == 3


def test_each_kernel_is_compiled_once_for_all_devices(rack: Rack) -> None:
    """One pool for the machine, as large as without other devices: the workers find what it made in the cache."""
    alone, four = rack(processes=None), rack(gpus=4, processes=None)
    assert four.pool.processes == alone.pool.processes == max(1, len(os.sched_getaffinity(0)) - 1)
    requests = [up(*CONFIGS, b=b, repeat=i) for b in (1, 256) for i in range(2)]
    charged = [o.compile_s for result in four.run(requests) for o in result.outcomes]
    assert sum(charged) == pytest.approx(0.1 * len(CONFIGS)) and len(four.pool.known) == len(CONFIGS)


def test_what_a_device_had_that_never_comes_up_goes_to_the_others(rack: Rack) -> None:
    evaluator = rack(gpus=2)
    start = evaluator.crew._start
    evaluator.crew._start = lambda number: (
        start(number) if number == 0 else Child("moelab.tuner.worker:serve", "nowhere:Device", (), PROBLEM)
    )
    assert {evaluator.placement.owner("up", b) for b in (1, 256)} == {0, 1}
    results = list(evaluator.run([up(*CONFIGS[:2], b=b) for b in (1, 256)]))
    assert all(failures(r) == [None, None] for r in results) and evaluator.crew.members[1].retired
    assert {evaluator.placement.owner("up", b) for b in (1, 256)} == {0}


def test_an_abandoned_run_leaves_the_evaluator_usable(rack: Rack) -> None:
    evaluator = rack()
    running = evaluator.run([up(*CONFIGS, repeat=i) for i in range(20)])
    first = next(running)
    running.close()
    (result,) = evaluator.run([up(*CONFIGS[:3], b=1)])
    assert failures(first) == [None] * len(CONFIGS) and failures(result) == [None] * 3


def test_inputs_that_cannot_be_made_fail_their_batch_size_alone(rack: Rack) -> None:
    evaluator = rack({"inputs": 1})
    first, second = sorted(evaluator.run([up(*CONFIGS[:2], b=1), up(*CONFIGS[:2])]), key=lambda r: r.request.num_tokens)
    assert failures(first) == ["crash"] * 2 and failures(second) == [None] * 2


def test_a_pause_of_the_parent_is_no_delay_of_the_worker(rack: Rack) -> None:
    evaluator = rack(measure_s=0.4)
    running = evaluator.run([up(*CONFIGS, repeat=i, rounds=1) for i in range(40)])
    next(running)
    time.sleep(2.5)  # longer than every deadline
    assert len(list(running)) == 39 and not evaluator.incidents


def test_a_worker_that_never_comes_up_ends_the_run_with_its_reason(rack: Rack) -> None:
    evaluator = GpuEvaluator(PROBLEM, device="nowhere:Device", compiler=COMPILER)
    rack.made.append(evaluator)
    with pytest.raises(RuntimeModeError, match="No module named 'nowhere'"):
        list(evaluator.run([up(*CONFIGS)]))


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="there is a GPU")
def test_nothing_is_timed_without_a_gpu() -> None:
    with pytest.raises(RuntimeModeError, match="Expected a GPU"):
        GpuEvaluator(PROBLEM)
    with pytest.raises(RuntimeModeError, match="Expected a GPU"):
        load(worker.DEVICE)(PROBLEM)


def test_children_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """Even one that hangs: its parent's end of the connection is gone."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_tuner_supervise import *\n"
        "e = GpuEvaluator(PROBLEM, device=DEVICE, device_arguments=({CONFIGS[0]: 'hangs'}, sys.argv[2] + '/trail'),\n"
        "                 compiler=COMPILER, processes=1, measure_s=100.0)\n"
        "list(e.run([up(*CONFIGS)]))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)])
    deadline = time.monotonic() + 60
    while "check" not in ((tmp_path / "trail").read_text() if (tmp_path / "trail").exists() else ""):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    child = int((tmp_path / "trail").read_text().split()[0])
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.02)


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="there is a GPU")
def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.zeros((4, 1), dtype=np.int32))
    refused = {
        "a GPU": (RuntimeModeError, lambda: GpuEvaluator(PROBLEM)),
        "a kernel": (UnknownNameError, lambda: Rig(replace(PROBLEM, kernel="other"))),
        "a repro": (JournalError, lambda: repro.load(tmp_path / "none.json")),
        "a device": (RuntimeModeError, lambda: device._require_same(PROBLEM, "NVIDIA B200")),
        "a routing": (
            RoutingError, lambda: routings_of(replace(PROBLEM, routing=str(tmp_path / "ids.npy")), 1, 1, "cpu")
        ),
    }  # fmt: skip
    for label, (error, call) in refused.items():
        with pytest.raises(error) as caught:
            call()
        assert unhelpful(str(caught.value)) is None, label


def test_a_gpu_is_named_among_those_that_are_visible() -> None:
    assert visible(1, {}) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert visible(1, {"CUDA_VISIBLE_DEVICES": "4, 6"}) == {"CUDA_VISIBLE_DEVICES": "6"}
    assert visible(0, {"HIP_VISIBLE_DEVICES": "3"}) == {"HIP_VISIBLE_DEVICES": "3"}


def test_a_repro_is_read_back_or_refused(tmp_path: Path) -> None:
    path = repro.write(tmp_path, PROBLEM, "layer", 256, (CONFIGS[0], CONFIGS[1]), "crash", "why")
    assert repro.load(path)[1] == Request("layer", 256, ((CONFIGS[0], CONFIGS[1]),), 3)
    assert "python -m moelab.tuner.repro" in json.loads(path.read_text())["run"]
    assert repro.main([]) == 2
