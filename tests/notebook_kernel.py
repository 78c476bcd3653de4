"""The kernel of notebooks/07_your_kernel.ipynb, as its cells write it to a file."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
from torch import Tensor

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "07_your_kernel.ipynb"


def write_kernel(path: Path) -> Path:
    """Write the file that the notebook's %%writefile cells make; the path."""
    cells = [c.source for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.source.startswith("%%writefile")]
    assert len(cells) > 2 and all(cell.splitlines()[0].endswith("{FILE}") for cell in cells)
    path.write_text("".join(cell.partition("\n")[2] + "\n" for cell in cells))
    return path


WARP = """
#include <barrier>
#include <thread>
#include <vector>
#define __global__
struct Index { int x, y; };
thread_local Index threadIdx, blockIdx;
Index blockDim;
std::barrier meet(32);
float given[32];
float __shfl_xor_sync(unsigned, float value, int mask) {
    given[threadIdx.x] = value;
    meet.arrive_and_wait();
    float other = given[threadIdx.x ^ mask];
    meet.arrive_and_wait();
    return other;
}
#include "kernel.cu"
extern "C" void run(int blocks, int columns, int warps, const float* h, const float* w2, const int* ids,
                    const float* weights, float* out, int k, int N, int H) {
    blockDim = {32, warps};
    std::vector<std::jthread> lanes;
    for (int lane = 0; lane < 32; ++lane)
        lanes.emplace_back([=] {
            for (int warp = 0; warp < blocks * columns * warps; ++warp) {
                threadIdx = {lane, warp % warps};
                blockIdx = {warp / warps / columns, warp / warps % columns};
                down<float>(h, w2, ids, weights, out, k, N, H);
            }
        });
}
"""
"""The notebook's CUDA C++ on a CPU: a thread of the system for each lane of a warp, one warp after another."""


def cuda_source() -> str:
    """The CUDA C++ that the notebook writes to a file."""
    (cell,) = [c.source for c in nbformat.read(NOTEBOOK, as_version=4).cells if "__global__" in c.source]
    return cell.split('"""')[1]


def layer_of_cuda(pairwise: ModuleType, down: Callable[..., None]) -> Callable[..., Any]:
    """`pairwise_cuda` as the notebook's cell defines it, over that launch of `down`."""
    (cell,) = [c.source for c in nbformat.read(NOTEBOOK, as_version=4).cells if "def pairwise_cuda" in c.source]
    names: dict[str, Any] = {"pairwise": pairwise, "CUDA_FILE": None, "load_cuda": lambda *_: down}
    exec(cell.replace("import load_cuda", "import load_kernels"), names)
    layer: Callable[..., Any] = names["pairwise_cuda"]
    return layer


def on_a_warp(source: str, folder: Path) -> Callable[..., None]:
    """A launch of that source's `down<float>` on `WARP`, called as a `CudaKernel` is."""
    for name, text in {"kernel.cu": source, "main.cpp": WARP, "cuda_bf16.h": "", "cuda_fp16.h": ""}.items():
        (folder / name).write_text(text)
    made = folder / "down.so"
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f"-I{folder}", "-o", str(made)]
    subprocess.run([*command, str(folder / "main.cpp")], check=True)
    library = ctypes.CDLL(str(made))

    def launch(grid: tuple[int, int], block: tuple[int, int], *args: Any) -> None:
        assert block[0] == 32
        library.run(*grid, block[1], *(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in args))

    return launch
