"""The path of a GPU through the serving benchmark, with stand-ins for its graphs, events and streams."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_serving import DEVICE, a_file, alone, plan

from moelab import runtime
from moelab.errors import (
    RuntimeModeError,
)
from moelab.serving import clock, steps, suite
from moelab.serving.clock import Limit, Protocol

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    yield from alone()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_file(tmp_path_factory.mktemp("tiny"))


class Graph:
    """Replays the work that was run while it was captured."""

    work: steps.Work
    replays = 0

    def replay(self) -> None:
        Graph.replays += 1
        self.work.run()


class Event:
    """Times by the wall; enters no queue."""

    def __init__(self, **_: object) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


class Stream:
    def wait_stream(self, other: object) -> None:
        pass


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that takes its CPU for a GPU."""
    for name, one in {"CUDAGraph": Graph, "Event": Event, "Stream": Stream, "current_stream": Stream}.items():
        monkeypatch.setattr(torch.cuda, name, one)
    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(runtime, "current", lambda: runtime.Runtime("gpu", "cpu", "pretended", "a test"))
    prepared = clock._prepared

    def of_work(made: Any, work: steps.Work, name: str, graph: bool) -> Any:
        monkeypatch.setattr(Graph, "work", work, raising=False)
        return prepared(made, work, name, graph)

    monkeypatch.setattr(clock, "_prepared", of_work)


@pytest.mark.skipif(DEVICE != "cpu", reason="has a GPU, which does it itself")
def test_the_path_of_a_gpu(config: Path, pretended: None) -> None:
    found = suite.serve_bench(plan(config, contenders=("batched_mm", "eager"), load=None))
    graphs = {row["kind"]: row["graph"] for row in found.rows if "graph" in row}
    assert graphs == {"decode": True, "decode, eager": False, "experts of decode": True, "prefill": False,
                      "prefill, graph": True, "experts of prefill": True, "decode, no experts": True,
                      "prefill, graph, no experts": True}  # fmt: skip
    assert all("samples_us" in row for row in found.rows if "graph" in row) and Graph.replays > 0
    assert "a CUDA graph" in found.protocol["decode"]


@pytest.mark.skipif(DEVICE != "cpu", reason="has a GPU, which does it itself")
def test_a_context_that_is_gone_ends_the_run_and_keeps_its_rows(
    config: Path, pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fatal(*_: Any) -> Any:
        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rows: list[Any] = []
    monkeypatch.setattr(suite, "decode", fatal)
    with pytest.raises(RuntimeModeError, match="ended this process's CUDA context"):
        suite.serve_bench(
            plan(config, contenders=("eager",), load=None), lambda so_far: rows.__setitem__(slice(None), so_far)
        )
    assert {row["kind"] for row in rows} == {"error", "logits"}


class Paced:
    """A contender that takes so many microseconds by its own account."""

    def __init__(self, us: float) -> None:
        self.us, self.work = us, steps.Work("decode", 1, lambda: None)

    def once(self) -> float:
        return self.us

    def sample(self, runs: int) -> float:
        return self.us


def test_a_slow_one_gets_few_samples_and_the_others_their_rounds() -> None:
    protocol = Protocol(sample_ms=1.0, cell_s=0.1, fewest=3, most=9)
    found = clock._sampled({"a": Paced(1000.0), "b": Paced(1100.0), "c": Paced(1e6)}, protocol)  # type: ignore[dict-item]
    assert {name: len(samples) for name, samples in found.items()} == {"a": 9, "b": 9, "c": 3}
    assert clock._sampled({}, protocol) == {}


@pytest.mark.skipif(DEVICE != "cpu", reason="has a GPU, which does it itself")
def test_the_watch_stays_while_a_thread_of_the_run_does(pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        clock.faulthandler, "dump_traceback_later", lambda seconds, **_: said.append(f"armed {seconds:.0f}")
    )
    monkeypatch.setattr(clock.faulthandler, "cancel_dump_traceback_later", lambda: said.append("cancelled"))
    end = threading.Event()
    hung = threading.Thread(target=end.wait)
    with clock.watched(Limit(10.0)):
        hung.start()
    assert said == ["armed 130"]
    end.set()
    hung.join()
    with pytest.raises(ZeroDivisionError), clock.watched(Limit(10.0)):
        1 / 0  # noqa: B018
    assert said == ["armed 130", "armed 130", "cancelled"]
