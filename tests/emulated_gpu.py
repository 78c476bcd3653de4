"""Runs sm90_fast_layer.cu on the CPU: built by g++ on emulated_sm90.h, in a process of its own, which a hang may kill."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from kept import included, kept
from torch import Tensor

from moelab.kernels import fast_layer
from moelab.kernels.fast_instances import SOURCE, STORAGE, Instance, constants
from moelab.kernels.fast_quantised import Coded, coded_scratch
from moelab.kernels.residency import in_words
from moelab.kernels.tensor_map import TensorMap
from moelab.kernels.token_tiles import TokenTiles
from moelab.weights import ExpertWeights

HERE = Path(__file__).parent / "emulator"
MAIN = """
{constants}
#include "{source}"
#include "{sums}"
template <typename T, typename Id>
void sums(const Layer<T>& given) {{
    constexpr bool LOOKS = {looks};
    if (given.top_k <= 2) return fast_sum<T, 2, Id, LOOKS>(given);
    given.top_k <= 4 ? fast_sum<T, 4, Id, LOOKS>(given) : fast_sum<T, 8, Id, LOOKS>(given);
}}
extern "C" void run(const TensorMap* maps, const void* layer, int blocks, int late, int patience) {{
    typedef {storage} T;
    emulated::launch(blocks, {threads}, sizeof(Shared<{shape}>), {cluster}, late, patience, [=] {{
        {expression}(maps[0], maps[1], maps[2], maps[3], *static_cast<const Layer<T>*>(layer));
    }});
}}
extern "C" void add_up(const void* layer, int blocks) {{
    typedef {storage} T;
    const auto& given = *static_cast<const Layer<T>*>(layer);  // its blocks wait for nobody: one after the other
    for (int b = 0; b < blocks; ++b)
        for (int t = 0; t < SUM_THREADS; ++t) {{
            threadIdx = {{t}}, blockIdx = {{b}}, gridDim = {{blocks}};
            given.wide_ids ? sums<T, long long>(given) : sums<T, int>(given);
        }}
}}
"""


class EmulatedMap(ctypes.Structure):
    """`TensorMap` of emulated_sm90.h, field for field."""

    _fields_ = [
        ("address", ctypes.c_uint64), ("rank", ctypes.c_uint32), ("element", ctypes.c_uint32),
        ("size", ctypes.c_uint64 * 5), ("stride", ctypes.c_uint64 * 5), ("box", ctypes.c_uint32 * 5),
        ("unused_too", ctypes.c_uint32),
    ]  # fmt: skip

    @classmethod
    def of(cls, spec: TensorMap, tensor: Tensor) -> EmulatedMap:
        found = cls(tensor.data_ptr(), len(spec.sizes), tensor.itemsize)
        found.size[: len(spec.sizes)] = spec.sizes
        found.stride[: len(spec.sizes)] = [tensor.itemsize * stride for stride in (1, *spec.strides)]
        found.box[: len(spec.box)] = spec.box
        return found


@functools.cache
def built(instance: Instance, dtype: torch.dtype, source: Path = SOURCE) -> ctypes.CDLL:
    """That instance as a shared library."""
    return ctypes.CDLL(str(compiled(instance, dtype, source)))


def altered(folder: Path, *changes: tuple[str, str, str]) -> Path:
    """The source with some of its text replaced: (file, old, new), each old found once. For tests that must be able to fail."""
    folder.mkdir(exist_ok=True)
    for path in [SOURCE, fast_layer.SUM_SOURCE, *SOURCE.parent.glob("*.cuh")]:
        (folder / path.name).write_text(path.read_text())
    for name, old, new in changes:
        text = (folder / name).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{name} holds {old!r} {text.count(old)} times. Expected once. Write the change anew.")
        (folder / name).write_text(text.replace(old, new))
    return folder / SOURCE.name


@functools.cache
def _compiler() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def compiled(instance: Instance, dtype: torch.dtype, source: Path = SOURCE, *, races: bool = False) -> Path:
    """Its file; with `races` it tells ThreadSanitizer of all that it reads and writes."""
    text = MAIN.format(
        constants=constants(), looks=str(instance.scaled == 1).lower(), source=source.name, sums=fast_layer.SUM_SOURCE.name,
        storage=STORAGE[dtype][0], shape=instance.shape,
        threads=instance.threads, expression=instance.expression(dtype), cluster=instance.cluster,
    )  # fmt: skip
    command = ["g++", "-std=c++20", "-O1", "-DMOELAB_EMULATED", "-shared", "-fPIC"]
    command += ["-g", "-fsanitize=thread"] if races else []
    made_of = [_compiler(), text, *command, *included(text, source.parent, HERE)]

    def make(path: Path) -> None:
        path.with_name("main.cpp").write_text(text)
        folders = [f"-I{HERE}", f"-I{source.parent}"]
        subprocess.run([*command, *folders, "-o", str(path), str(path.with_name("main.cpp"))], check=True)

    return kept("emulated", made_of, make)


def refused(lines: Iterable[str]) -> str:
    """What the compiler says against those lines after the kernel's source; nothing where they hold."""
    text = "\n".join([constants(), f'#include "{SOURCE.name}"', *lines])
    command = [
        "g++",
        "-std=c++20",
        "-DMOELAB_EMULATED",
        "-fsyntax-only",
        f"-I{HERE}",
        f"-I{SOURCE.parent}",
        "-xc++",
        "-",
    ]
    return subprocess.run(command, input=text, capture_output=True, text=True).stderr


def shared(tensor: Tensor) -> Tensor:
    """A copy that a forked process writes to for both."""
    return tensor.clone().share_memory_()


def arguments_of(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    tiles: TokenTiles,
    instance: Instance,
    *,
    scale: float = 1.0,
    weights_on_input: bool = False,
    parts: int = 7,
    report: Tensor | None = None,
) -> tuple[Any, fast_layer.LayerArguments, list[Tensor]]:
    """(maps, arguments, every tensor they point to: x, w13, w2, inner, y, out, ready, rows first); outputs start as NaN."""
    slots, size, nan = topk_ids.numel(), w2.shape[2], float("nan")
    inner, y = (shared(x.new_full((slots, columns), nan)) for columns in (size, x.shape[1]))
    out, ready = shared(torch.full_like(x, nan)), shared(tiles.ready)
    rows = shared(x.new_full((slots, x.shape[1]), nan)) if instance.permutes else x
    if topk_ids.shape[1] == 1 and parts & fast_layer.GEMM2 and parts & fast_layer.SUM:
        y = out
    mapped = (w13, w2, rows, inner)
    maps = (EmulatedMap * 4)(*map(EmulatedMap.of, fast_layer.tensor_maps(instance, *mapped), mapped))
    given = (x, rows, inner, y, out, topk_weights, topk_ids, tiles._replace(ready=ready))
    options: dict[str, Any] = {"scale": scale, "weights_on_input": weights_on_input}
    report = torch.zeros(4, dtype=torch.int32) if report is None else report
    arguments = fast_layer.layer_arguments(*given, w13.shape[0], parts, report=report, **options)
    return maps, arguments, [x, w13, w2, inner, y, out, ready, rows, topk_weights, topk_ids, *tiles[:3], report]


def coded_arguments_of(
    x: Coded,
    weights: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    tiles: TokenTiles,
    instance: Instance,
    dtype: torch.dtype,
    *,
    scale: float = 1.0,
    weights_on_input: bool = False,
    parts: int = 7,
    report: Tensor | None = None,
) -> tuple[Any, fast_layer.LayerArguments, list[Tensor]]:
    """(maps, arguments, every tensor they point to, out, ready, inner, its scales and y first) of an instance over codes;
    outputs start as NaN."""
    w13, w2 = weights.w13, weights.w2
    hidden, nan = w2.shape[1], float("nan")
    inner, inner_scale, y = (
        shared(torch.full_like(t, nan, dtype=torch.float32).to(t.dtype))
        for t in coded_scratch(tiles, instance, topk_ids.numel(), weights, dtype)
    )
    out, ready = shared(torch.full((topk_ids.shape[0], hidden), nan, dtype=dtype)), shared(tiles.ready)
    if topk_ids.shape[1] == 1 and parts & fast_layer.GEMM2 and parts & fast_layer.SUM:
        y = out
    mapped = (w13, w2, x.codes, inner)
    maps = (EmulatedMap * 4)(*map(EmulatedMap.of, fast_layer.tensor_maps(instance, *mapped), mapped))
    report = torch.zeros(4, dtype=torch.int32) if report is None else report
    arguments = fast_layer.layer_arguments(
        x.codes, x.codes, inner, y, out, topk_weights, topk_ids, tiles._replace(ready=ready), w13.shape[0], parts,
        report=report, scale=scale, weights_on_input=weights_on_input, powers=weights.format.power_of_two_scales,
        scales=(x.scale, weights.w13_scale, weights.w2_scale, x.scale, inner_scale),
    )  # fmt: skip
    made = [out, ready, inner, inner_scale, y, *x, *weights.tensors().values(), topk_weights, topk_ids, *tiles[:3]]
    return maps, arguments, [*made, report]


def run_layer(*given: Any, **options: Any) -> tuple[Tensor, ...]:
    """(out, inner, y, ready, rows) of one emulated launch, and of the sums' where they are apart, of what `arguments_of` takes;
    other options are those of `run`."""
    runs = {name: options.pop(name) for name in ("blocks", "late", "patience_s", "source") if name in options}
    report = shared(torch.zeros(4, dtype=torch.int32))
    maps, arguments, tensors = arguments_of(*given, report=report, **options)
    run(given[6], given[0].dtype, maps, arguments, given[0].shape, report, **runs)
    return tensors[5], tensors[3], tensors[4], tensors[6], tensors[7]


def run_coded(*given: Any, **options: Any) -> tuple[Tensor, ...]:
    """(out, ready, inner, its scales, y) likewise, of what `coded_arguments_of` takes."""
    runs = {name: options.pop(name) for name in ("blocks", "late", "patience_s", "source") if name in options}
    report = shared(torch.zeros(4, dtype=torch.int32))
    maps, arguments, tensors = coded_arguments_of(*given, report=report, **options)
    run(given[5], given[6], maps, arguments, tensors[0].shape, report, **runs)
    return tuple(tensors[:5])


def run(
    instance: Instance,
    dtype: torch.dtype,
    maps: Any,
    arguments: fast_layer.LayerArguments,
    shape: tuple[int, ...],
    report: Tensor,
    *,
    blocks: int = 2,
    late: int = -1,
    patience_s: int = 100,
    source: Path = SOURCE,
) -> None:
    """One emulated launch. shape: (M, H). late: a rank in clusters. patience_s: of a wait, which then ends the launch:
    RuntimeError with what it reported."""
    library = built(instance, dtype, source)
    child = os.fork()
    if not child:
        library.run(maps, ctypes.byref(arguments), blocks, late, patience_s)
        if instance.apart and arguments.parts & fast_layer.SUM and arguments.y != arguments.out:
            library.add_up(ctypes.byref(arguments), fast_layer.sum_ctas(*shape))
        os._exit(0)
    deadline_s = max(2 * patience_s, 60)
    end = time.monotonic() + deadline_s
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise TimeoutError(f"the emulated launch took over {deadline_s} s")
        time.sleep(0.005)
    if status:
        lost = f": {in_words(report.tolist())}" if report[0] else ""
        raise RuntimeError(f"the emulated launch ended with status {os.waitstatus_to_exitcode(status)}{lost}")
