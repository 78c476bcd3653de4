"""Runs fast_layer.cu on the CPU: built by g++ on emulated_hopper.h, in a process of its own, which a hang may kill."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from moelab.kernels import fast_layer
from moelab.kernels.fast_instances import SOURCE, STORAGE, Instance
from moelab.kernels.tensor_map import TensorMap
from moelab.kernels.token_tiles import TokenTiles

HERE = Path(__file__).parent / "emulator"
MAIN = """
#include "{source}"
extern "C" void run(const TensorMap* maps, const void* layer, int blocks) {{
    typedef {storage} T;
    emulated::launch(blocks, {threads}, sizeof(Shared<{shape}>), [=] {{
        {expression}(maps[0], maps[1], maps[2], *static_cast<const Layer<T>*>(layer));
    }});
}}
extern "C" int shared_bytes() {{ return sizeof(Shared<{shape}>); }}
extern "C" int argument_bytes() {{ return sizeof(Layer<{storage}>); }}
"""


class EmulatedMap(ctypes.Structure):
    """`TensorMap` of emulated_hopper.h, field for field."""

    _fields_ = [
        ("address", ctypes.c_uint64), ("rank", ctypes.c_uint32), ("unused", ctypes.c_uint32),
        ("size", ctypes.c_uint64 * 5), ("stride", ctypes.c_uint64 * 5), ("box", ctypes.c_uint32 * 5),
        ("unused_too", ctypes.c_uint32),
    ]  # fmt: skip

    @classmethod
    def of(cls, spec: TensorMap, tensor: Tensor) -> EmulatedMap:
        found = cls(tensor.data_ptr(), len(spec.sizes))
        found.size[: len(spec.sizes)] = spec.sizes
        found.stride[: len(spec.sizes)] = [2, *(2 * stride for stride in spec.strides)]
        found.box[: len(spec.box)] = spec.box
        return found


@functools.cache
def built(instance: Instance, dtype: torch.dtype, source: Path = SOURCE, races: bool = False) -> ctypes.CDLL:
    """That instance as a shared library; with `races` it tells ThreadSanitizer of all that it reads and writes."""
    folder = Path(tempfile.mkdtemp(prefix="moelab-emulated-"))
    text = MAIN.format(
        source=source, storage=STORAGE[dtype][0], threads=instance.threads, shape=instance.shape,
        expression=instance.expression(dtype),
    )  # fmt: skip
    (folder / "main.cpp").write_text(text)
    command = ["g++", "-std=c++20", "-O2", "-DMOELAB_EMULATED", f"-I{HERE}", f"-I{SOURCE.parent}", "-shared"]
    command += ["-g", "-fsanitize=thread"] if races else []
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run([*command, "-fPIC", "-o", str(folder / "main.so"), str(folder / "main.cpp")], check=True, env=plain)
    return ctypes.CDLL(str(folder / "main.so"))


def shared(tensor: Tensor) -> Tensor:
    """A copy that a forked process writes to for both."""
    return tensor.clone().share_memory_()


def run_layer(
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
    blocks: int = 2,
    timeout_s: float = 60.0,
    library: ctypes.CDLL | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, inner, y, ready) of one emulated launch; what the kernel writes starts as NaN.

    library: run this one, in this process.
    """
    slots, size, nan = topk_ids.numel(), w2.shape[2], float("nan")
    inner, y = (shared(x.new_full((slots, columns), nan)) for columns in (size, x.shape[1]))
    out, ready = shared(torch.full_like(x, nan)), shared(tiles.ready)
    specs = fast_layer.tensor_maps(instance, w13, w2, inner)
    maps = (EmulatedMap * 3)(*map(EmulatedMap.of, specs, (w13, w2, inner)))
    given = (x, inner, y, out, topk_weights, topk_ids, tiles._replace(ready=ready))
    arguments = fast_layer.layer_arguments(*given, w13.shape[0], parts, scale=scale, weights_on_input=weights_on_input)
    if library is not None:
        library.run(maps, ctypes.byref(arguments), blocks)
        return out, inner, y, ready
    library = built(instance, x.dtype)
    child = os.fork()
    if not child:
        library.run(maps, ctypes.byref(arguments), blocks)
        os._exit(0)
    end = time.monotonic() + timeout_s
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise TimeoutError(f"the emulated launch took over {timeout_s} s")
        time.sleep(0.005)
    if status:
        raise RuntimeError(f"the emulated launch ended with status {os.waitstatus_to_exitcode(status)}")
    return out, inner, y, ready
