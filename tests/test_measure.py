"""Statistics by law and by hand; the GPU protocol where there is one; a plain error where there is none."""

from __future__ import annotations

import gc
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelab import measure as measure_room
from moelab import roofline, runtime
from moelab.errors import RecordingError, RuntimeModeError
from moelab.measure import (
    EagerProtocol,
    HostProtocol,
    Measurement,
    Protocol,
    measure,
    measure_eager,
    measure_host,
    median_interval,
    rotations_for,
    tie,
)


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
    count = rotations_for(bytes_per_call, l2_bytes=60e6)
    assert 2 <= count <= 64 and (count == 64 or count * bytes_per_call >= 180e6)


@pytest.fixture
def gpu_called(monkeypatch: pytest.MonkeyPatch):
    """Pretends a GPU of that name, whose driver tells that L2; on ROCm where asked."""

    def pretend(name: str, l2: int | None, hip: str | None = None) -> None:
        properties = SimpleNamespace(name=name, **({} if l2 is None else {"L2_cache_size": l2}))
        monkeypatch.setattr(runtime, "current", lambda: FAKE_GPU)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index=0: properties)
        monkeypatch.setattr(torch.version, "hip", hip)
        measure_room._cache_bytes_of.cache_clear()

    yield pretend
    measure_room._cache_bytes_of.cache_clear()


MiB = 2**20


@pytest.mark.parametrize(
    ("name", "l2", "hip", "expected"),
    [
        ("NVIDIA H200", 60 * MiB, None, 60 * MiB),
        ("NVIDIA H200 MIG 1g.18gb", 8 * MiB, None, 8 * MiB),  # a partition's share, which no file knows
        ("NVIDIA B200", None, None, 126 * MiB),  # a torch that does not say
        ("AMD Instinct MI300X", 4 * MiB, "6.4", 256 * MiB),  # ROCm tells the L2 of one die
    ],
)
def test_rotations_pass_the_cache_of_this_gpu(gpu_called, name: str, l2: int, hip: str | None, expected: int) -> None:
    gpu_called(name, l2, hip)
    assert measure_room.cache_bytes() == expected
    assert rotations_for(16 * MiB) == max(2, -(-3 * expected // (16 * MiB)))


@pytest.mark.parametrize(("name", "l2", "hip"), [("Unheard-of 1", None, None), ("AMD Radeon Unheard", 4 * MiB, "6.4")])
def test_an_unknown_cache_is_refused(gpu_called, name: str, l2: int | None, hip: str | None) -> None:
    gpu_called(name, l2, hip)
    with pytest.raises(RuntimeModeError, match=f"last cache of {name} is unknown.*Add its l2_bytes to data/devices"):
        rotations_for(1e6)


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="about machines without a GPU")
def test_without_a_gpu_nothing_rotates() -> None:
    assert rotations_for(1.0) == 2 and rotations_for(1.0, at_least=5) == 5


@pytest.mark.gpu
def test_the_device_file_says_what_the_driver_says() -> None:
    name = torch.cuda.get_device_name()
    if torch.version.hip or runtime.device_key(name) not in roofline.device_names():
        pytest.skip(f"no NVIDIA file for {name}")
    assert roofline.device_data(name)["l2_bytes"] == torch.cuda.get_device_properties().L2_cache_size


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="about machines without a GPU")
@pytest.mark.parametrize("way", [measure, measure_eager, measure_host])
def test_without_a_gpu_nothing_is_timed_nor_run(way) -> None:
    ran: list[int] = []
    with pytest.raises(RuntimeModeError, match="read a recording instead"):
        way({"x": ran.append})
    assert not ran


FAKE_GPU = runtime.Runtime("gpu", "cuda", "a fake", "a test")


class Machine:
    """A host and a device, in nanoseconds: a call keeps the host busy, and leaves the device work of its own."""

    def __init__(self) -> None:
        self.now, self.device_done, self.waiting, self.longest_queue = 0, 0, 0, 0
        self.calls: list[tuple[str, int]] = []
        self.gc_seen: set[bool] = set()

    def clock(self) -> int:
        return self.now

    def synchronize(self) -> None:
        self.now, self.waiting = max(self.now, self.device_done), 0

    def contender(self, name: str, host_ns: int, device_ns: int):
        def call(rotation: int) -> None:
            self.calls.append((name, rotation))
            self.gc_seen.add(gc.isenabled())
            self.now += host_ns
            self.device_done = max(self.device_done, self.now) + device_ns
            self.waiting += 1
            self.longest_queue = max(self.longest_queue, self.waiting)

        return call


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(measure_room, "time", SimpleNamespace(perf_counter_ns=made.clock))
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(runtime, "current", lambda: FAKE_GPU)
    return made


def test_host_time_is_the_hosts_alone_every_call_a_sample(machine: Machine) -> None:
    ways = {"light": machine.contender("light", 12_344, 500_000), "heavy": machine.contender("heavy", 40_000, 10)}
    found = measure_host(ways)
    assert set(found["light"].samples_us) == {12.34} and set(found["heavy"].samples_us) == {40.0}
    assert {len(m.samples_us) for m in found.values()} == {2048}
    assert machine.longest_queue <= 64 and {rotation for _, rotation in machine.calls} == set(range(8))


def test_host_bursts_take_turns_in_shuffled_order(machine: Machine) -> None:
    protocol = HostProtocol(rotations=3, rounds=20, burst=5, warm_up=2)
    names = ("a", "b", "c")
    measure_host({name: machine.contender(name, 1000, 1) for name in names}, protocol)
    sampled = machine.calls[3 * 3 :]  # warmed up by a rotation at least, 2 calls would leave one uncompiled
    bursts = [sampled[i : i + 5] for i in range(0, len(sampled), 5)]
    assert all(len({name for name, _ in burst}) == 1 for burst in bursts)
    assert all([rotation for _, rotation in burst] == [0, 1, 2, 0, 1] for burst in bursts)
    order = [burst[0][0] for burst in bursts]
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 20 and all(sorted(found) == list(names) for found in rounds) and len(set(rounds)) > 2


def test_a_host_sample_is_never_zero(machine: Machine) -> None:
    assert measure_host({"x": machine.contender("x", 1, 0)}, HostProtocol(rounds=1))["x"].samples_us == (0.01,) * 16


@pytest.mark.parametrize(("host", "device"), [(80_000, 27_000), (20_000, 300_000)])
def test_eager_time_is_the_longer_of_host_and_device(machine: Machine, host: int, device: int) -> None:
    found = measure_eager({"x": machine.contender("x", host, device), "y": machine.contender("y", 1000, 1000)})
    # The other's share of one call is left at an end: the first launch, or the last call's work.
    longest, other = max(host, device) / 1e3, min(host, device) / 1e3
    assert len(found["x"].samples_us) == EagerProtocol().rounds
    assert all(longest < sample <= longest + other / 8 for sample in found["x"].samples_us)


def test_eager_calls_are_whole_rotations_and_no_more_than_allowed(machine: Machine) -> None:
    protocol = EagerProtocol(rotations=3, rounds=2, sample_us=100.0, max_calls=10)
    measure_eager({"x": machine.contender("x", 1000, 0)}, protocol)
    # To warm up and to see how long one takes: four rotations; then 9 calls a sample, 10 being no whole number of them.
    assert len(machine.calls) == 4 * 3 + 2 * 9
    assert [rotation for _, rotation in machine.calls[12:]] == [0, 1, 2] * 6


@pytest.mark.parametrize("way", [measure_host, measure_eager])
@pytest.mark.parametrize("before", [True, False])
def test_garbage_is_collected_outside_and_then_as_before(machine: Machine, way, before: bool) -> None:
    def fails_late(rotation: int) -> None:
        fine(rotation)
        if len(machine.calls) > 200:
            raise ValueError

    fine = machine.contender("x", 10_000, 1000)
    was = gc.isenabled()
    try:
        gc.enable() if before else gc.disable()
        way({"x": fine})
        assert gc.isenabled() is before and False in machine.gc_seen
        with pytest.raises(ValueError):
            way({"x": fails_late})
        assert gc.isenabled() is before
    finally:
        gc.enable() if was else gc.disable()


def test_protocols_say_what_they_are() -> None:
    found = [protocol.describe() for protocol in (Protocol(), EagerProtocol(rounds=3), HostProtocol(burst=4))]
    assert len({told["kind"] for told in found}) == 3
    assert found[1]["rounds"] == 3 and found[2]["burst"] == 4 and found[2]["rounded_to_us"] == 0.01


def test_a_sample_is_a_replay_over_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        def __init__(self, us: float) -> None:
            self.us = us

        def replay(self) -> float:
            return self.us

    graphs = {"a": (Graph(100.0), 4), "b": (Graph(90.0), 30)}
    monkeypatch.setattr(measure_room, "_capture", lambda contender, protocol: graphs[contender])
    monkeypatch.setattr(measure_room, "_elapsed_us", lambda work: work())
    monkeypatch.setattr(runtime, "current", lambda: FAKE_GPU)
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


@pytest.mark.gpu
def test_on_the_gpu_the_host_does_not_wait_and_the_wall_does() -> None:
    big = torch.randn(4096, 4096, device="cuda")
    ways = {"large": lambda _: big @ big, "waits": lambda _: (big @ big).sum().item()}
    graph = measure({"large": ways["large"]}, Protocol(rotations=2, rounds=5))["large"].median_us
    host = measure_host(ways, HostProtocol(rotations=2, rounds=6, burst=8, warm_up=8))
    eager = measure_eager(ways, EagerProtocol(rotations=2, rounds=5))
    assert {len(m.samples_us) for m in host.values()} == {48}
    assert host["large"].median_us < graph / 2 < host["waits"].median_us
    assert eager["large"].median_us > graph / 2 and eager["waits"].median_us > graph / 2
