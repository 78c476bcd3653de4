"""The one-launch layer beside itself on a Hopper GPU: right, or ended by a named error, and never a hang; and what that costs.

`python tests/two_streams.py` runs every case, each in a process that a hang may not outlive, and exits with 1 where one hung or
was wrong; `python tests/two_streams.py CASE ...` some of them. About a minute on an H200. What each prints is for a note: the
costs are medians and 95 % intervals of interleaved samples of one process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DEADLINE_S = 120  # of a case, with the time that it waits for the others and for the compiler
ROUNDS = 1000
TOKENS = (8192, 64)


def tensors(num_tokens: int, experts: int = 128, top_k: int = 8, hidden: int = 2048, size: int = 768) -> Any:
    """Those of a layer by Qwen3-30B-A3B's sizes."""
    import torch

    from moelab.inputs import make_inputs
    from moelab.shapes import MoEShape

    shape = MoEShape.from_sizes(num_experts=experts, top_k=top_k, hidden_size=hidden, moe_intermediate_size=size)
    return make_inputs(shape, num_tokens, dtype=torch.bfloat16, device="cuda", seed=3)


def served(num_tokens: int) -> Callable[[], Any]:
    """fused_moe(impl="fast") of that many tokens."""
    from moelab.fused_moe import fused_moe

    i = tensors(num_tokens)
    return lambda: fused_moe(
        i.hidden_states, i.w13, i.w2, topk_weights=i.topk_weights, topk_ids=i.topk_ids, impl="fast"
    )


def one_launch(i: Any, missing: int = 0) -> Callable[[], Any]:
    """fast_layer, its order and tiles made beforehand. missing: of the counts that GEMM2's first tile waits for."""
    from forms import instance_for

    from moelab.kernels.expert_order import expert_order
    from moelab.kernels.fast_layer import fast_layer
    from moelab.pipelines.fast import tiles_for

    (experts, _, size), (num_tokens, top_k) = i.w2.shape, i.topk_ids.shape
    instance = instance_for(num_tokens, top_k, experts, size)
    tiles = tiles_for(expert_order(i.topk_ids, experts), instance)
    tiles.ready[0] = -missing
    return lambda: fast_layer(i.hidden_states, i.w13, i.w2, i.topk_weights, i.topk_ids, tiles, instance)


def unordered() -> None:
    """From now on without the order over streams: what could hang."""
    from moelab.kernels.residency import Order

    Order.follow = lambda self, stream: False  # type: ignore[method-assign]


def beside(rounds: int = ROUNDS) -> str:
    """Rounds of two launches on two streams, of 8192 tokens each, from two threads; every result is compared."""
    import torch

    runs = [served(TOKENS[0]), served(TOKENS[0])]
    expected = [run() for run in runs]
    torch.cuda.synchronize()
    wrong, errors = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in runs], []

    def work(place: int, stream: Any) -> None:
        try:
            with torch.cuda.stream(stream):
                for _ in range(rounds):
                    wrong[place] += (runs[place]() != expected[place]).any()
        except Exception as error:
            errors.append(error)

    with _alone():
        begin = time.monotonic()
        threads = [threading.Thread(target=work, args=(i, torch.cuda.Stream())) for i in range(2)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        for error in errors:
            raise error
        torch.cuda.synchronize()
        seconds = time.monotonic() - begin
    return _verdict(int(sum(wrong)), f"{rounds} rounds of two launches in {seconds:.1f} s")


def branches(rounds: int = ROUNDS) -> str:
    """Replays of one graph whose two branches have two launches each."""
    import torch

    runs = [served(TOKENS[0]), served(TOKENS[0])]
    expected = [run() for run in runs]
    torch.cuda.synchronize()
    graph, other, outs = torch.cuda.CUDAGraph(), torch.cuda.Stream(), []
    with _alone():
        with torch.cuda.graph(graph):
            origin = torch.cuda.current_stream()
            other.wait_stream(origin)
            for _ in range(2):
                for place, stream in enumerate((origin, other)):
                    with torch.cuda.stream(stream):
                        outs.append((place, runs[place]()))
            origin.wait_stream(other)
        wrong, begin = torch.zeros((), dtype=torch.int64, device="cuda"), time.monotonic()
        for _ in range(rounds):
            graph.replay()
            for place, out in outs:
                wrong += (out != expected[place]).any()
        torch.cuda.synchronize()
        seconds = time.monotonic() - begin
    return _verdict(int(wrong), f"{rounds} replays of two branches, two launches each, in {seconds:.1f} s")


def graphs(rounds: int = ROUNDS) -> str:
    """Replays of two graphs on two streams, which nothing orders: right, or a named error within seconds."""
    import torch

    runs = [served(TOKENS[0]), served(TOKENS[0])]
    expected = [run() for run in runs]
    torch.cuda.synchronize()
    made, outs, streams = [], [], [torch.cuda.Stream(), torch.cuda.Stream()]
    with _alone():
        for run in runs:
            made.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(made[-1]):
                outs.append(run())
        wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in runs]
        begin = time.monotonic()
        for _ in range(rounds):
            for place, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    made[place].replay()
                    wrong[place] += (outs[place] != expected[place]).any()
        torch.cuda.synchronize()
        seconds = time.monotonic() - begin
    return _verdict(int(sum(wrong)), f"{rounds} rounds of two graphs on two streams in {seconds:.1f} s")


def unguarded() -> str:
    """`beside` without the order over streams: right, or a named error within seconds."""
    unordered()
    return beside()


def cooperative() -> str:
    """`unguarded`, as cooperative grids, with programmatic dependent launch as well: whether CUDA takes both, and does better."""
    from moelab.kernels import fast_layer

    fast_layer.COOPERATIVE = True
    unordered()
    return beside()


def forced() -> str:
    """A count that starts below zero is never reached: the launch must end itself, and say what it waited for."""
    import torch

    run = one_launch(tensors(300, 8, 2, 512, 512), missing=1)
    with _alone():
        run()
        torch.cuda.synchronize()
    return "WRONG: it ended as if nothing were missing"


def cost() -> str:
    """The layer as it was (waits that may last for ever, no order), with its clock, with both, and as a cooperative grid."""
    from moelab.kernels import fast_layer
    from moelab.kernels.residency import Order
    from moelab.measure import EagerProtocol, HostProtocol, Protocol, measure, measure_eager, measure_host

    said, follow = [], Order.follow
    unordered()
    alone = Order.follow

    def variant(run: Callable[[], Any], watched: bool, ordered: bool, cooperates: bool = False) -> Callable[[int], Any]:
        def call(_: int) -> Any:
            fast_layer.WATCHED, fast_layer.COOPERATIVE = watched, cooperates
            Order.follow = follow if ordered else alone  # type: ignore[method-assign]
            return run()

        return call

    ways = {"before": (False, False), "clock": (True, False), "clock, order": (True, True)}
    if os.environ.get("COOPERATIVE", "1") == "1":
        ways["clock, order, cooperative"] = (True, True, True)
    for num_tokens in TOKENS:
        run = one_launch(tensors(num_tokens))
        contenders = {name: variant(run, *how) for name, how in ways.items()}
        for each in contenders.values():
            each(0)
        with _alone():
            graphs = measure(contenders, Protocol(rotations=1, rounds=60, graph_us=3000.0))
            eager = measure_eager(contenders, EagerProtocol(rotations=1, rounds=25))
            host = measure_host(contenders, HostProtocol(rotations=1)) if num_tokens == TOKENS[-1] else {}
        for label, found in (("graph", graphs), ("eager", eager), ("host", host)):
            for name, each in found.items():
                low, high = each.interval_us
                ratio = each.median_us / found["before"].median_us
                said.append(
                    f"{num_tokens} tokens, {label}, {name}: {each.median_us:.2f} us ({low:.2f} to {high:.2f}), {ratio:.4f}"
                )
    return "\n".join(["right", *said])


CASES = {each.__name__: each for each in (beside, branches, graphs, unguarded, cooperative, forced, cost)}
MAY_END = ("graphs", "unguarded", "cooperative")
"""Cases where a named error is an answer too; of `forced` it is the only one."""


def _verdict(wrong: int, said: str) -> str:
    return f"WRONG in {wrong} results: {said}" if wrong else f"right: {said}"


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process on the GPU at a time: others load and compile meanwhile."""
    with open(os.environ["TWO_STREAMS_LOCK"], "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def child(name: str) -> int:
    from moelab.errors import KernelTimeoutError
    from moelab.kernels import residency

    begin = time.monotonic()
    try:
        said, ended = CASES[name](), False
    except Exception as error:  # torch's own names no wait: ours does
        lost = residency.lost_wait()
        said, ended = f"{type(error).__name__}: {error}", lost is not None
        if ended:
            try:
                residency.raise_if_lost()
            except KernelTimeoutError as named:
                said = f"named error after {time.monotonic() - begin:.1f} s in all: {named}"
    print(f"{name}: {said}", flush=True)
    good = ended if name == "forced" else said.startswith("right") or (ended and name in MAY_END)
    os._exit(0 if good else 1)  # a context that is gone may not end well


def main(names: list[str]) -> int:
    """Cases in processes side by side, one at a time on the GPU; 1 if any of them is wrong or hangs."""
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TWO_STREAMS_LOCK": str(Path(folder) / "lock")}
        running = {}
        for name in names:
            command = [sys.executable, "-u", __file__, "--child", name]
            running[name] = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        end = time.monotonic() + DEADLINE_S
        for name, process in running.items():
            try:
                said, _ = process.communicate(timeout=max(end - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                process.kill()
                said = f"{process.communicate()[0]}{name}: HANGS\n"
            failed |= process.returncode != 0
            print(said, end="", flush=True)
    return int(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    sys.exit(main(sys.argv[1:] or list(CASES)))
