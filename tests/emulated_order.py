"""Runs slot_order.cu on the CPU: built by g++ on emulated_order.h, in a process of its own, which a hang may kill."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import time
from pathlib import Path

import torch
from emulated_gpu import HERE, _compiler
from kept import included, kept

from moelab.kernels import slot_order
from moelab.kernels.slot_order import OrderArguments

MAIN = """
{source}
extern "C" void run(const void* order, int ctas, int threads, int bytes) {{
    emulated::launch(ctas, threads, bytes, ctas, -1, 60, [=] {{ {expression}(*static_cast<const Order*>(order)); }});
}}
"""


@functools.cache
def built(expression: str, source: str) -> ctypes.CDLL:
    """That instance as a shared library."""
    text = MAIN.format(source=source, expression=expression)
    command = ["g++", "-std=c++20", "-O1", "-DMOELAB_EMULATED", "-shared", "-fPIC"]
    made_of = [_compiler(), text, *command, *included(text, slot_order.SOURCE.parent, HERE)]

    def make(path: Path) -> None:
        path.with_name("main.cpp").write_text(text)
        folders = [f"-I{HERE}", f"-I{slot_order.SOURCE.parent}"]
        subprocess.run([*command, *folders, "-o", str(path), str(path.with_name("main.cpp"))], check=True)

    return ctypes.CDLL(str(kept("emulated", made_of, make)))


def run(
    kind: slot_order.Kind, cut: slot_order.Cut, ids: torch.dtype, order: OrderArguments, source: str | None = None
) -> None:
    """One emulated launch of that order, whose outputs lie in shared memory. source: in place of its own."""
    library = built(cut.expression(kind, ids), source or slot_order.source())
    child = os.fork()
    if not child:
        library.run(ctypes.byref(order), cut.ctas, cut.warps * 32, cut.shared_bytes(kind))
        os._exit(0)
    end = time.monotonic() + 60
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise TimeoutError("the emulated launch took over 60 s")
        time.sleep(0.002)
    if done[1]:
        raise RuntimeError(f"the emulated launch ended with status {os.waitstatus_to_exitcode(done[1])}")
