"""Launches that must not run beside each other: their order over streams and captures, and word of a wait that was given up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda.bindings import driver

from moelab.errors import KernelTimeoutError, RuntimeModeError
from moelab.kernels import residency
from moelab.kernels.residency import Order

OK = driver.CUresult.CUDA_SUCCESS


class Driver:
    """Stands in for the CUDA driver: which stream is in which capture, which of a green context; what was asked, in words."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.captures: dict[int, int] = {}
        self.silent: set[int] = set()  # streams that it will say nothing of
        self.green: set[int] = set()
        self.asked: list[str] = []
        for name in ("cuStreamGetCaptureInfo", "cuEventCreate", "cuEventRecord", "cuStreamWaitEvent"):
            patch.setattr(driver, name, getattr(self, name))
        patch.setattr(driver, "cuStreamGetGreenCtx", lambda s: (OK, driver.CUgreenCtx(int(s) in self.green)))

    def cuStreamGetCaptureInfo(self, stream: driver.CUstream) -> tuple:
        if int(stream) in self.silent:
            return (driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, None, None)
        capture = self.captures.get(int(stream), 0)
        status = driver.CUstreamCaptureStatus
        active, none = status.CU_STREAM_CAPTURE_STATUS_ACTIVE, status.CU_STREAM_CAPTURE_STATUS_NONE
        return (OK, active if capture else none, capture, None, None, None, 0)

    def cuEventCreate(self, flags: object) -> tuple:
        return (OK, "event")

    def cuEventRecord(self, event: str, stream: driver.CUstream) -> tuple:
        self.asked.append(f"record {int(stream)}")
        return (OK,)

    def cuStreamWaitEvent(self, stream: driver.CUstream, event: str, flags: int) -> tuple:
        self.asked.append(f"wait {int(stream)}")
        return (OK,)

    def follows(self, order: Order, stream: int) -> list[str]:
        """What a launch on that stream asks for; `follow` says whether it waits."""
        self.asked.clear()
        assert order.follow(stream) == bool(self.asked)
        return list(self.asked)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def test_a_second_stream_waits_for_the_first_and_back(fake: Driver) -> None:
    order = Order()
    assert [fake.follows(order, stream) for stream in (7, 7, 8, 8, 7, 8)] == [
        [], [], ["record 7", "wait 8"], [], ["record 8", "wait 7"], ["record 7", "wait 8"],
    ]  # fmt: skip
    assert {"record 8", "wait 9"} <= set(fake.follows(order, 9))


def test_one_stream_asks_the_driver_nothing_after_its_first_launch(
    fake: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = Order()
    order.follow(7)
    monkeypatch.setattr(driver, "cuStreamGetCaptureInfo", None)
    assert not any(order.follow(7) for _ in range(3))


def test_branches_of_one_graph_become_an_edge(fake: Driver) -> None:
    order, fake.captures = Order(), {7: 1, 8: 1}
    assert fake.follows(order, 7) == [] and fake.follows(order, 8) == ["record 7", "wait 8"]


def test_a_capture_draws_in_no_stream_from_outside(fake: Driver) -> None:
    """An event of a stream in a capture, waited for by another, would pull that one into the graph; and the other way round."""
    order, fake.captures = Order(), {7: 1}
    assert fake.follows(order, 6) == [] and fake.follows(order, 7) == [] and fake.follows(order, 6) == []
    fake.captures[8] = 2
    assert fake.follows(order, 8) == []


def test_an_order_is_kept_across_what_comes_between(fake: Driver) -> None:
    """A branch of a graph waits for the branch before, an eager stream for the eager one before, whatever was launched since."""
    order, fake.captures = Order(), {7: 1, 8: 1}
    assert fake.follows(order, 5) == [] and fake.follows(order, 7) == []
    assert fake.follows(order, 6) == ["record 5", "wait 6"]
    assert fake.follows(order, 8) == ["record 7", "wait 8"]
    fake.captures.clear()  # it ended; its streams are ordinary ones again
    assert sorted(fake.follows(order, 4)) == ["record 6", "record 8", "wait 4", "wait 4"]
    assert order._of_captures == {0: 8}, "no capture that has ended is kept"


def test_captures_that_the_driver_will_not_tell_are_left_alone(fake: Driver) -> None:
    """The legacy default stream, while another stream is in a capture: error 906 for whatever is asked of it."""
    order, fake.silent = Order(), {0}
    assert [fake.follows(order, stream) for stream in (7, 0, 8)] == [[], [], ["record 7", "wait 8"]]


def test_a_stream_with_some_of_the_sms_is_refused(fake: Driver) -> None:
    fake.green = {8}
    with pytest.raises(RuntimeModeError, match="green context"):
        Order().follow(8)


def test_what_the_driver_refuses_is_told(fake: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order()
    order.follow(7)
    refused = driver.CUresult.CUDA_ERROR_INVALID_HANDLE
    monkeypatch.setattr(driver, "cuEventRecord", lambda event, stream: (refused,))
    with pytest.raises(RuntimeModeError, match=r"refused to record an event.*INVALID_HANDLE"):
        order.follow(8)


def test_a_wait_that_was_given_up_is_an_error_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next launch, and where the driver answers one with an error; in words that name what was waited for."""
    report = torch.zeros(4, dtype=torch.int32)
    monkeypatch.setattr(residency, "_reports", {0: report})
    residency.raise_if_lost()
    failed = driver.CUresult.CUDA_ERROR_LAUNCH_FAILED
    with pytest.raises(RuntimeModeError, match="LAUNCH_FAILED"):
        residency.require(failed, "a launch")
    report.copy_(torch.tensor([3 | 64 << 8, 17, 5, 12]))
    said = "GPU 0 CTA 17, thread 64, waited for the rows that a tile multiplies of tile descriptor 5 .12 counts missing"
    for raises in (residency.raise_if_lost, lambda: residency.require(failed, "a launch")):
        with pytest.raises(KernelTimeoutError, match=said) as error:
            raises()
        assert "CUDA context is gone" in str(error.value) and isinstance(error.value, TimeoutError)


def test_a_report_that_nobody_raised_is_said_at_exit() -> None:
    """Torch's own error names no wait."""
    code = (
        "import atexit, torch\nfrom moelab.kernels import residency\n"
        "residency._reports[0] = torch.tensor([1 | 5 << 8, 2, -1, 1], dtype=torch.int32)\n"
        "atexit.register(residency._say_at_exit)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "CTA 2, thread 5, waited for consumers to empty a stage" in done.stderr
