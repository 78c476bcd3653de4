"""Compiled instances and passed checks are found again, and nothing else passes for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from test_grouped_gemm import problem

from moelab import runtime
from moelab.config import KernelConfig
from moelab.errors import DtypeError, LayoutError, MoelabError, ShapeError
from moelab.fused_moe import fused_moe
from moelab.inputs import make_inputs
from moelab.kernels import launch
from moelab.kernels.activation import activation
from moelab.kernels.align import align
from moelab.kernels.grouped_gemm import grouped_gemm
from moelab.kernels.launch import Launcher, checked, signature
from moelab.shapes import MoEShape

CONFIG = KernelConfig(16, 32, 32, 1)
ROOT = Path(__file__).resolve().parent.parent


class Compiled:
    """Stands for Triton's compiled kernel: keeps what it is launched with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self._run = lambda *arguments: self.launches.append(arguments)

    @property
    def run(self) -> Callable[..., None]:
        return self._run


class Kernel:
    """Stands for a jit function: counts the calls that come through Triton, and launches as Triton 3.6 and 3.7 do."""

    __name__ = "_copy_kernel"
    arg_names = ("x_ptr", "y_ptr", "size", "B", "A")

    def __init__(self) -> None:
        self.compiled, self.through_triton = Compiled(), 0

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **named: Any) -> Compiled:
        return self.compiled

    def bound(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
        return [*arguments, *(named[name] for name in self.arg_names[len(arguments) :])]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def call(*arguments: Any, **named: Any) -> Compiled:
            self.through_triton += 1
            self.compiled.run(
                *grid,
                1,
                "stream",
                "function",
                "metadata",
                "launch metadata",
                "enter",
                "exit",
                *self.bound(arguments, named),
            )
            return self.compiled

        return call


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """A kernel on a device that is not there."""
    monkeypatch.setattr(launch.checks, "check_kernel_device", lambda name, tensor: None)
    monkeypatch.setattr(launch.torch.cuda, "current_device", lambda: -1)  # what CPU tensors give as their index

    class Driver:
        active = type("Active", (), {"get_current_stream": staticmethod(lambda device: "stream")})

    monkeypatch.setattr(launch.triton.runtime, "driver", Driver)
    monkeypatch.setattr(launch, "RUNTIME", runtime.Runtime("gpu", "cuda", "none", "a stand-in"))
    monkeypatch.setattr(launch, "_warned", set())
    yield Kernel()


def test_the_second_launch_goes_straight_to_the_instance(kernel: Kernel) -> None:
    run, x = Launcher(kernel), torch.zeros(64)
    for size in (5, 7):
        run("key", (2, 3), (x, None), (size,), lambda: ({"A": 1, "B": 2}, {"num_warps": 4}))
    assert kernel.through_triton == 1
    assert kernel.compiled.launches == [
        (2, 3, 1, "stream", "function", "metadata", *hooks, x.data_ptr(), 0, size, 2, 1)
        for size, hooks in ((5, ("launch metadata", "enter", "exit")), (7, (None, None, None)))
    ]


class Slow(Kernel):
    """A Triton whose launch takes a while, so that another thread's begins inside of it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        launch_it = super().__getitem__(grid)

        def call(*arguments: Any, **named: Any) -> Compiled:
            time.sleep(0.01)
            return launch_it(*arguments, **named)

        return call


def test_first_launches_of_several_threads_are_compared_once(kernel: Kernel, recwarn: pytest.WarningsRecorder) -> None:
    """As where tiles are screened: 16 threads launch one kernel for the first time."""
    slow, x = Slow(), torch.zeros(64)
    run, begin = Launcher(slow), threading.Barrier(8)

    def first(_: int) -> None:
        begin.wait()
        run("key", (1, 1), (x, None), (5,), lambda: ({"A": 1, "B": 2}, {"num_warps": 4}))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(first, range(8)))
    assert run._straight and not [one for one in recwarn if one.category is RuntimeWarning]
    assert len(slow.compiled.launches) == 8


class Swapped(Kernel):
    """A Triton that binds its constants in another order."""

    def bound(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
        return [*arguments, named["A"], named["B"]]


class Longer(Kernel):
    """A Triton that passes one argument more."""

    def bound(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
        return [*super().bound(arguments, named), None]


class Elsewhere(Kernel):
    """A Triton whose launch goes by another way than its compiled kernel's run."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        launches = self.compiled.launches

        def call(*arguments: Any, **named: Any) -> Compiled:
            self.through_triton += 1
            launches.append((*grid, *self.bound(arguments, named)))
            return self.compiled

        return call


class OnlyTensors(Kernel):
    """A Triton that takes no address for a tensor."""

    def __init__(self) -> None:
        super().__init__()

        def run(*arguments: Any) -> None:
            if not isinstance(arguments[9], torch.Tensor):
                raise TypeError("pointer argument must be a tensor")
            self.compiled.launches.append(arguments)

        self.compiled._run = run


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (Swapped, "passes int 1 as argument 12, not 2"),
        (Longer, "passes 15 arguments, not 14"),
        (Elsewhere, "does not call Compiled.run"),
        (OnlyTensors, "takes no addresses: pointer argument must be a tensor"),
    ],
)
def test_another_triton_launches_by_itself_and_it_is_said_once(
    kernel: Kernel, recwarn: pytest.WarningsRecorder, other: type[Kernel], why: str
) -> None:
    kernel = other()
    run, x = Launcher(kernel), torch.zeros(64)
    for size in (5, 7, 7):
        run("key", (2, 3), (x, x), (size,), lambda: ({"A": 1, "B": 2}, {"num_warps": 4}))
    assert kernel.through_triton == 3 and len(kernel.compiled.launches) == 3, "every launch once, and by Triton"
    Launcher(other())("key", (2, 3), (x, x), (5,), lambda: ({"A": 1, "B": 2}, {}))
    told = [str(warning.message) for warning in recwarn if warning.category is RuntimeWarning]
    assert len(told) == 1 and why in told[0] and "through Triton" in told[0]


@pytest.mark.parametrize("offset", range(1, 4))
def test_an_unaligned_address_is_another_instance(kernel: Kernel, offset: int) -> None:
    run, x = Launcher(kernel), torch.zeros(64)
    constants = ({"A": 1, "B": 2}, {})
    run("key", (1, 1), (x, x), (0,), lambda: constants)
    run("key", (1, 1), (x, x[offset:]), (0,), lambda: constants)
    run("key", (1, 1), (x[offset:], x), (0,), lambda: constants)
    assert kernel.through_triton == 3
    run("key", (1, 1), (x[offset:], x), (0,), lambda: constants)
    assert kernel.through_triton == 3


def test_another_key_is_another_instance(kernel: Kernel) -> None:
    run, x = Launcher(kernel), torch.zeros(64)
    for key in ("a", "b", "a"):
        run(key, (1, 1), (x, x), (0,), lambda: ({"A": 1, "B": 2}, {}))
    assert kernel.through_triton == 2


def test_a_profiler_hears_of_every_launch(kernel: Kernel) -> None:
    run, x = Launcher(kernel), torch.zeros(64)

    def hook(*_: Any) -> None: ...

    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        for _ in range(3):
            run("key", (1, 1), (x, x), (0,), lambda: ({"A": 1, "B": 2}, {}))
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert kernel.through_triton == 3


def test_a_check_runs_until_it_passes_and_then_never_again() -> None:
    seen: list[int] = []

    def check() -> int:
        seen.append(1)
        if len(seen) < 3:
            raise ShapeError("no. Expected yes. Try again.")
        return 5

    for _ in range(2):
        with pytest.raises(ShapeError):
            checked(("test", check), check)
    assert checked(("test", check), check) == 5
    assert checked(("test", check), check) == 5
    assert len(seen) == 3


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_passed", {})
    monkeypatch.setattr(launch, "_MOST_REMEMBERED", 10)
    for i in range(25):
        checked(("bound", i), lambda: True)
        assert len(launch._passed) <= 10


def test_a_signature_tells_shape_dtype_and_layout_apart() -> None:
    x = torch.zeros(4, 4)
    others = [x[:2], x.double(), x.t()[:, :], torch.zeros(4, 8)[:, ::2], x.to("meta"), None]
    assert signature(x) == signature(torch.ones(4, 4))
    assert len({signature(x), *(signature(other) for other in others[:2]), *(signature(o) for o in others[3:])}) == 6


BAD: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], type[MoelabError]]] = {
    "a of another dtype": (lambda c: {"hidden_states": c["hidden_states"].half()}, DtypeError),
    "ids of another shape": (lambda c: {"topk_ids": c["topk_ids"][:, :1].contiguous()}, ShapeError),
    "ids in int16": (lambda c: {"topk_ids": c["topk_ids"].short()}, DtypeError),
    "weights in float64": (lambda c: {"topk_weights": c["topk_weights"].double()}, DtypeError),
    "w13 with strides": (lambda c: {"w13": c["w13"].transpose(0, 1).contiguous().transpose(0, 1)}, LayoutError),
    "w2 of another shape": (lambda c: {"w2": c["w2"][:, :, :-1].contiguous()}, ShapeError),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_good_call_lets_no_bad_one_through(bad: str, device: str) -> None:
    shape = MoEShape.from_sizes(num_experts=4, top_k=2, hidden_size=48, moe_intermediate_size=32, dtype="float32")
    i = make_inputs(shape, 3, seed=0, device=device)
    call: dict[str, Any] = {
        "hidden_states": i.hidden_states, "w13": i.w13, "w2": i.w2, "topk_weights": i.topk_weights,
        "topk_ids": i.topk_ids,
    }  # fmt: skip
    good = fused_moe(**call)
    change, error = BAD[bad]
    for _ in range(2):
        with pytest.raises(error):
            fused_moe(**{**call, **change(call)})
    assert torch.equal(fused_moe(**call), good)


@pytest.mark.gpu
def test_unaligned_tensors_and_other_sizes_on_the_gpu() -> None:
    """One launcher sees aligned and unaligned addresses, int32 and int64 ids, many batch sizes."""
    a, w, r = problem(40, 4, 2, 96, 128, torch.float16, "cuda")
    w_off = torch.empty(w.numel() + 1, dtype=w.dtype, device="cuda")[1:].view(w.shape).copy_(w)
    assert w_off.data_ptr() % 16
    for tokens in (1, 3, 40, 1):
        ids = r.topk_ids[:tokens].contiguous()
        for given in (ids, ids.long()):
            aligned = align(given, 16, 4)
            outs = [
                grouped_gemm(a[:tokens].contiguous(), weight, aligned, CONFIG, num_pairs=2 * tokens, top_k=2)
                for weight in (w, w_off, w)
            ]
            assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
            assert torch.equal(activation(outs[0]), activation(outs[1]))


@pytest.mark.gpu
def test_instances_are_found_again_on_the_gpu() -> None:
    if runtime.current().mode != "gpu":
        pytest.skip("compiled kernels only")
    from moelab.kernels import grouped_gemm as module

    a, w, r = problem(5, 4, 2, 96, 128, torch.float16, "cuda")
    aligned = align(r.topk_ids, 16, 4)
    first = grouped_gemm(a, w, aligned, CONFIG, num_pairs=10, top_k=2)
    before = len(module._launcher._instances)
    assert torch.equal(grouped_gemm(a, w, aligned, CONFIG, num_pairs=10, top_k=2), first)
    assert len(module._launcher._instances) == before


WITHOUT_A_GPU = """
import json, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

launches = []


class Launch:
    def __init__(self, src, metadata): ...

    def __call__(self, *arguments):
        launches.append([a.data_ptr() if isinstance(a, torch.Tensor) else 0 if a is None else a for a in arguments])


class Utils:
    def load_binary(self, name, kernel, shared, device): return "module", name, 1, 0, 1024
    def get_device_properties(self, device): return {"max_shared_mem": 232448}


class Driver:
    launcher_cls, utils = Launch, Utils()
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 77


driver.set_active(Driver())
from moelab.kernels import launch, sum_reduce, activation
launch.checks.check_kernel_device = lambda name, tensor: None
torch.cuda.current_device = lambda: -1
x = torch.zeros(3, 2, 128)
for tokens in (1, 2, 3):
    sum_reduce.sum_reduce_unchecked(x[:tokens], 0.5, torch.empty(tokens, 128))
    activation.activation_unchecked(x[:tokens, 0], torch.empty(tokens, 64), "silu", True)
for scale in (1.0, 0.3, 2.5e-310, -7.0):  # a factor is an argument: it decides no instance, and no digit of it is lost
    sum_reduce.sum_reduce_unchecked(x, scale, torch.empty(3, 128))
factors = [len(sum_reduce._launch._instances), [one[12] for one in launches[6:]]]
straight = [sum_reduce._launch._straight, activation._launch._straight]
said = {"told": sorted(launch._warned), "straight": straight, "version": triton.__version__}
print(json.dumps({**said, "factors": factors, "launches": [[str(part) for part in one] for one in launches[:6]]}))
"""


def test_the_installed_triton_launches_as_we_do() -> None:
    """Triton's own compiler and its own jit function, up to the driver's launcher, which is a stand-in that takes notes."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_GPU], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["told"] == [] and found["straight"] == [True, True] and found["version"] == triton.__version__
    assert len(found["launches"]) == 6 and found["factors"] == [1, [1.0, 0.3, 2.5e-310, -7.0]]
    for first, *later in (found["launches"][::2], found["launches"][1::2]):
        assert {len(one) for one in later} == {len(first)} and first[6:9] != ["0"] * 3
        assert all(one[3:6] == first[3:6] and one[6:9] == ["0"] * 3 for one in later)
