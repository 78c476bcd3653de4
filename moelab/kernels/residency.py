"""What a kernel needs whose CTAs wait for each other: that they are all on the GPU at once, and word of it where they were not.

Such a launch can wait for ever beside another one, when each holds SMs that the other's CTAs need: from two streams, two branches
of a graph, two graphs, two processes under MPS. So launches from a second stream are ordered behind the first (`Order`), also
as branches of one captured graph; and a wait that lasts seconds ends its launch and leaves a report (`raise_if_lost`). What no
launch sees: replays of a graph beside another one or beside other launches, and other processes.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch

from moelab.errors import KernelTimeoutError, RuntimeModeError

WAITS = {
    1: ("STAGE_EMPTY", "consumers to empty a stage of weights and tokens"),
    2: ("SLOTS_EMPTY", "consumers to empty a buffer of slots"),
    3: ("ROWS_READY", "the rows that a tile multiplies"),
    4: ("ALL_READY", "all tiles of GEMM2, to add up"),
}
"""What a wait is for, as one that is given up reports it: its name in C++, and in words."""

COUNTS = ("ROWS_READY", "ALL_READY")
"""Those of them that wait for a count in device memory; their value is how much of it was missing, of others the parity."""

_reports: dict[int, torch.Tensor] = {}


def report_of(device: int) -> torch.Tensor:
    """Where kernels on that GPU report a wait that they gave up: (4,) int32 in host memory, zeros as long as none has."""
    found = _reports.get(device)
    if found is None:
        if not _reports:
            atexit.register(_say_at_exit)
        found = _reports[device] = torch.zeros(4, dtype=torch.int32, pin_memory=True)
    return found


def lost_wait() -> str | None:
    """What a kernel of this process gave up waiting for, None where none has: readable after its CUDA context is gone."""
    for device, report in _reports.items():
        if ctypes.c_uint32.from_address(report.data_ptr()).value:
            return f"on GPU {device} {in_words(report.tolist())}"
    return None


def in_words(report: Sequence[int]) -> str:
    """What a report says: kind of wait and thread, CTA, tile descriptor or -1, value."""
    kind, cta, tile, value = report
    name, words = WAITS[kind & 0xFF]
    thread = kind >> 8 & 0xFFFFFF
    of_tile = f" of tile descriptor {tile}" if tile >= 0 else ""
    counts = f"{value} counts missing" if name in COUNTS else f"parity {value & 1}"
    return f"CTA {cta}, thread {thread}, waited for {words}{of_tile} ({counts})"


def raise_if_lost() -> None:
    """Raise KernelTimeoutError where a kernel of this process has given up a wait."""
    if (lost := lost_wait()) is not None:
        _told.append(lost)
        raise KernelTimeoutError(_message(lost))


def _message(lost: str) -> str:
    return (
        f"The one-launch layer ended itself: {lost}, for seconds. Expected all CTAs of the launch on the GPU at once, which "
        "another such launch beside it (a second stream or graph, another process under MPS) or a part of a GPU takes away. "
        "This process's CUDA context is gone: start it again, and run one such launch at a time, or use impl='triton'."
    )


_told: list[str] = []


def _say_at_exit() -> None:
    """For who saw only torch's error: `unspecified launch failure` names no wait."""
    if (lost := lost_wait()) is not None and not _told:
        print(f"moelab: {_message(lost)}", file=sys.stderr)


class Order:
    """Launches on one GPU, each behind those from other streams. To be held (`lock`) from `follow` until after the launch.

    Nothing is done, and the driver not asked, while the stream stays the same. Where it changes, one event is recorded on the
    stream before and waited for; in a stream that is being captured only behind streams of the same capture, as an edge of the
    graph. A stream must live until another one has launched.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._stream: int | None = None
        self._of_captures: dict[int, int] = {}  # id of a capture, 0 for none -> the last stream of it before `_stream`
        self._event: Any = None

    def follow(self, stream: int) -> bool:
        """Order what this stream gets next behind earlier launches. Whether it now waits for one."""
        if stream == self._stream:
            return False
        _check_whole(stream)
        capture, waits = _capture_of(stream), False
        for earlier in {each for each in (self._stream, self._of_captures.get(capture)) if each is not None} - {stream}:
            if _capture_of(earlier) == capture:
                self._wait(stream, earlier)
                waits = True
        if self._stream is not None:
            self._of_captures[_capture_of(self._stream)] = self._stream
        kept = self._of_captures.items()
        self._of_captures = {of: each for of, each in kept if not of or _capture_of(each) == of}
        self._stream = stream
        return waits

    def _wait(self, stream: int, earlier: int) -> None:
        from cuda.bindings import driver

        if self._event is None:
            error, self._event = driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
            require(error, "an event")
        (error,) = driver.cuEventRecord(self._event, driver.CUstream(earlier))
        require(error, "to record an event on the stream of the last launch")
        (error,) = driver.cuStreamWaitEvent(driver.CUstream(stream), self._event, 0)
        require(error, "to wait for the stream of the last launch")


@functools.cache
def order_of(device: int) -> Order:
    """That GPU's order of launches."""
    return Order()


def _capture_of(stream: int) -> int:
    """Id of the capture that a stream is in: 0 for none, -1 - stream where the driver will not say, which equals no other's."""
    from cuda.bindings import driver

    error, status, capture, *_ = driver.cuStreamGetCaptureInfo(driver.CUstream(stream))
    if error.value:
        return -1 - stream
    return int(capture) if status == driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE else 0


def _check_whole(stream: int) -> None:
    """Raise RuntimeModeError for a stream of a green context, which has some of the GPU's SMs."""
    from cuda.bindings import driver

    error, green = driver.cuStreamGetGreenCtx(driver.CUstream(stream))
    if not error.value and int(green):
        raise RuntimeModeError(
            "The one-launch layer was launched on a stream of a green context. Expected a stream that has all SMs of the GPU, "
            "on which its CTAs are at once. Use another stream, or impl='triton'."
        )


def require(error: Any, what: str) -> None:
    """Raise RuntimeModeError where the driver refused something, KernelTimeoutError where a kernel before it ended itself."""
    if error.value:
        raise_if_lost()
        raise RuntimeModeError(
            f"The CUDA driver refused {what}: {error.name}. Expected a Hopper GPU with a driver for CUDA 12.8 or later. "
            "Look at nvidia-smi, or use impl='triton'."
        )
