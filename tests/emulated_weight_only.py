"""Runs weight_only.cu on the CPU: built by g++ on emulated_warp.h, in a process of its own, which a hang may kill."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from emulated_gpu import HERE, _compiler, shared
from kept import kept, texts
from torch import Tensor

from moelab.kernels import weight_only
from moelab.kernels.align import align
from moelab.kernels.sum_reduce import sum_reduce
from moelab.kernels.weight_only import WeightOnly
from moelab.weights import ExpertWeights

MAIN = """
{source}
extern "C" void up(const void* layer, int blocks, int threads) {{
    emulated::run_ctas(blocks, threads, [=] {{ {up}(*static_cast<const Layer*>(layer)); }});
}}
extern "C" void down(const void* layer, int blocks, int threads) {{
    emulated::run_ctas(blocks, threads, [=] {{ {down}(*static_cast<const Layer*>(layer)); }});
}}
"""


@functools.cache
def built(up: str, down: str, source: str) -> ctypes.CDLL:
    """Both launches of that form as a shared library."""
    text = MAIN.format(source=source, up=up, down=down)
    folder = weight_only.SOURCE.parent
    command = ["g++", "-std=c++20", "-O1", "-DMOELAB_EMULATED", "-shared", "-fPIC"]

    def make(path: Path) -> None:
        path.with_name("main.cpp").write_text(text)
        folders = [f"-I{HERE}", f"-I{folder}"]
        subprocess.run([*command, *folders, "-o", str(path), str(path.with_name("main.cpp"))], check=True)

    return ctypes.CDLL(str(kept("emulated", [_compiler(), text, *command, *texts(HERE)], make)))


def run_weight_only(
    x: Tensor, weights: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor, form: WeightOnly, *,
    scale: float = 1.0, source: str | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """The layer, (M, H), by both emulated launches, and the sum-reduce where the form leaves one. source: in place of its own."""
    alignment = align(topk_ids, form.columns, weights.num_experts) if form.sorted else None
    rows = topk_ids.numel() if form.sorted else x.shape[0]
    inner = shared(x.new_full((topk_ids.numel(), weights.w13.shape[1] // 2), float("nan")))
    out = shared(x.new_full((rows, x.shape[1]), float("nan")))
    up, down = weight_only.launches(
        x, weights, topk_weights, topk_ids, inner, out, form, alignment, scale=scale, **options
    )
    library = built(up.expression, down.expression, source or weight_only.source())
    child = os.fork()
    if not child:
        library.up(ctypes.byref(up.arguments), up.grid, up.threads)
        library.down(ctypes.byref(down.arguments), down.grid, down.threads)
        os._exit(0)
    end = time.monotonic() + 240
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise TimeoutError("the emulated launches took over 240 s")
        time.sleep(0.005)
    if done[1]:
        raise RuntimeError(f"the emulated launches ended with status {os.waitstatus_to_exitcode(done[1])}")
    if not form.sorted:
        return out
    summed = sum_reduce(out.view(x.shape[0], -1, x.shape[1]), scale, impl="torch")
    assert torch.is_tensor(summed)
    return summed
