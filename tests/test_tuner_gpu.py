"""The tuner on a real GPU: a small run for real, real faults, and what a contender costs. `pytest -s` prints timelines."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path

import pytest
from faulty_gpu import DEVICE

from moelab import runtime
from moelab.chips import get_target
from moelab.config import KernelConfig
from moelab.measure import Protocol, measure
from moelab.shapes import load_model
from moelab.tuner.evaluate import Request
from moelab.tuner.gpu import GpuEvaluator
from moelab.tuner.problem import COMPATIBLE, Problem, find_incumbents
from moelab.tuner.search import Settings
from moelab.tuner.session import Progress, TuneSession
from moelab.tuner.space import build_space
from moelab.tuner.tuned_kernels import TUNED, implementation_of

pytestmark = pytest.mark.gpu

AXES = {
    "num_stages": (3, 4), "BLOCK_SIZE_M": (16, 64), "BLOCK_SIZE_K": (64, 128), "BLOCK_SIZE_N": (64, 128), "num_warps": (4,),
    "GROUP_SIZE_M": (1, 16),
}  # fmt: skip
BATCH_SIZES = (1, 64, 1024)


def problem(**changes) -> Problem:
    from moelab.kernels.checks import current_target

    shape, target = load_model("qwen3-30b-a3b"), current_target()
    name, version = runtime.current().device_name, runtime.triton_version() or ""
    incumbents = find_incumbents(shape, name, version, BATCH_SIZES)
    given = {"axes": AXES, "incumbents": incumbents, **changes}
    return Problem(shape, name, target.name if target else "", version, BATCH_SIZES, **given)


def entries(cache: Path) -> set[str]:
    return {path.parent.name for path in cache.glob("*/_grouped_gemm_kernel.json")}


def test_a_run_from_a_cold_cache(tmp_path: Path) -> None:
    tuned, said = problem(), []

    def show(now: Progress) -> None:
        if now.phase not in said:
            said.append(now.phase)
            print(f"  {now.spent_s:6.2f} s  {now.phase}")

    evaluator = GpuEvaluator(tuned, cache_dir=tmp_path / "cache", quarantine=tmp_path / "bad")
    session = TuneSession(
        tuned, evaluator, strategy="grid", settings=Settings(long=5, final=10, layer=10), run=tmp_path / "run.jsonl",
        on_progress=show,
    )  # fmt: skip
    begin = time.monotonic()
    result = session.run()
    print(f"wall {time.monotonic() - begin:.1f} s, phases {[(n, round(s, 1)) for n, s in result.timeline]}")
    print(f"worker {evaluator.crew.members[0].about}, failures {dict(result.failures)}")
    for batch in result.batches.values():
        print(
            batch.num_tokens,
            batch.up and batch.up.short(),
            batch.down and batch.down.short(),
            batch.layer_us,
            batch.gains,
        )
    assert result.complete and not result.errors and not evaluator.incidents
    assert set(result.failures) <= {"compile", "resources"}
    assert len(entries(tmp_path / "cache")) == len({(g, c) for g in ("up", "down") for c in session.board.configs[g]})


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_compiled_ahead_is_not_compiled_again(warm: Path) -> None:
    """The cache holds the same kernels after measuring as after compiling alone."""
    tuned = problem()
    configs = build_space(tuned).configs["up"]
    evaluator = GpuEvaluator(tuned, cache_dir=warm)
    try:
        requests = [Request(s, 64, tuple((c,) for c in configs), 0) for s in ("up", "down")]
        assert all(o.failure is None for r in evaluator.run(requests) for o in r.outcomes)
        before = entries(warm)
        costs = {}
        for b in BATCH_SIZES:
            for stage in ("up", "down"):
                begin = time.monotonic()
                (result,) = evaluator.run([Request(stage, b, tuple((c,) for c in configs), 3)])
                assert all(o.failure is None and min(o.samples_us) > 0 for o in result.outcomes)
                costs[stage, b] = (time.monotonic() - begin) * 1e3 / len(configs)
        print("ms per contender of 3 samples:", {key: round(cost, 2) for key, cost in costs.items()})
        assert entries(warm) == before
    finally:
        evaluator.close()


@pytest.mark.parametrize("kernel", [name for name in TUNED if name != COMPATIBLE])
def test_kernels_beside_the_classic_kernel(tmp_path: Path, kernel: str) -> None:
    """Each passes its gate in every stage, and is measured without another compile of its GEMMs."""
    tuned = problem(kernel=kernel, split_k=implementation_of(kernel).split_k[:2])
    if implementation_of(kernel).needs_tma and not get_target(tuned.target).has_tma:
        pytest.skip(f"{tuned.target} has no TMA")
    spaces = build_space(tuned).configs
    evaluator = GpuEvaluator(tuned, cache_dir=tmp_path / "cache")
    try:
        list(evaluator.run([Request(gemm, 64, tuple((c,) for c in spaces[gemm]), 0) for gemm in ("up", "down")]))
        before = gemm_entries(tmp_path / "cache")
        both = [c for c in spaces["up"] if c in spaces["down"]][::8]
        asked = [Request(gemm, b, tuple((c,) for c in spaces[gemm]), 3) for b in BATCH_SIZES for gemm in ("up", "down")]
        asked += [Request("layer", b, tuple((c, c) for c in both), 3, True) for b in BATCH_SIZES]
        for result in evaluator.run(asked):
            assert {o.failure for o in result.outcomes} <= {None, "compile", "resources"}, result.outcomes
            assert any(o.samples_us for o in result.outcomes)
        assert not evaluator.incidents and before and gemm_entries(tmp_path / "cache") == before
    finally:
        evaluator.close()


def gemm_entries(cache: Path) -> set[str]:
    """Every GEMM and Split-K kernel in the cache, not the activation, the sort or the sum."""
    return {path.parent.name for name in ("*gemm*", "_split_k*") for path in cache.glob(f"*/{name}_kernel.json")}


def test_real_faults_cost_only_their_contenders(warm: Path, tmp_path: Path) -> None:
    tuned = problem()
    configs = build_space(tuned).configs["up"][:8]
    faults = dict(zip(configs[1::2], ("illegal", "endless", "wrong", "unwritten"), strict=False))
    evaluator = GpuEvaluator(
        tuned, device=DEVICE, device_arguments=(faults,), cache_dir=warm, measure_s=5.0, quarantine=tmp_path / "bad"
    )
    expected = {"illegal": "crash", "endless": "timeout", "wrong": "wrong", "unwritten": "nan"}
    try:
        for interleaved in (False, True):
            begin = time.monotonic()
            request = Request("up", 64, tuple((c,) for c in configs), 3, interleaved)
            (result,) = evaluator.run([request])
            print(f"interleaved {interleaved}: {time.monotonic() - begin:.1f} s")
            for config, outcome in zip(configs, result.outcomes, strict=True):
                print(f"  {config.short()}: {outcome.failure} {outcome.message[:160]} {outcome.samples_us}")
            assert [o.failure for o in result.outcomes] == [expected.get(faults.get(c, "")) for c in configs]
            assert all(len(o.samples_us) == 3 for o in result.outcomes if not o.failure)
        for incident in evaluator.incidents:
            print(f"  {incident.clock_s:6.2f} s  gpu {incident.device}: {incident.what[:200]}")
        assert len(evaluator.incidents) == 4 and len(list((tmp_path / "bad").iterdir())) == 2
    finally:
        evaluator.close()


def test_memory_that_runs_out_fails_one_contender(warm: Path) -> None:
    tuned = problem()
    configs = build_space(tuned).configs["up"][:3]
    evaluator = GpuEvaluator(tuned, device=DEVICE, device_arguments=({configs[1]: "memory"},), cache_dir=warm)
    try:
        (result,) = evaluator.run([Request("up", 64, tuple((c,) for c in configs), 2)])
        assert [o.failure for o in result.outcomes] == [None, "memory", None] and not evaluator.incidents
    finally:
        evaluator.close()


def test_short_looks_beside_graphs() -> None:
    """Prints how far the two protocols are apart; what is asserted is that neither gives nonsense."""
    from moelab.tuner.device import GpuDevice

    tuned = problem()
    device = GpuDevice(tuned)
    for b in BATCH_SIZES:
        for stage in ("up", "down", "layer"):
            device.prepare(stage, b)
            small = KernelConfig(16, 64, 128, 1, 4, 3)
            chosen = [small, dataclasses.replace(small, BLOCK_SIZE_N=128), KernelConfig(64, 128, 64, 16, 4, 3)]
            contenders = [(c, c) if stage == "layer" else (c,) for c in chosen]
            for contender in contenders:
                assert device.check(stage, b, contender) is None
            short = {c: device.sample(stage, b, c, 10, None) for c in contenders}
            calls = {str(i): device.launch(stage, b, c).run for i, c in enumerate(contenders)}
            graphs = measure(calls, Protocol(device.cell(b).rotations, rounds=10))
            for i, c in enumerate(contenders):
                a, g = statistics.median(short[c]), graphs[str(i)].median_us
                spread = (max(short[c]) - min(short[c])) / a
                print(
                    f"{stage} {b} {c[0].short()}: short {a:.2f} us (spread {spread:.1%}), graph {g:.2f} us, {a / g:.3f}"
                )
                assert 0.3 < a / g < 3
    print("host us a call in the end:", device._host_us, "cycles per us:", device._cycles_per_us)
