"""Kernels from a file that a notebook wrote: Triton's as a module, loaded anew whenever its text has changed; and CUDA C++'s."""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import ctypes  # noqa: E402
import functools  # noqa: E402
import hashlib  # noqa: E402
import linecache  # noqa: E402
import sys  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from types import ModuleType  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.errors import DeviceError, LayoutError, ShapeError, UnknownNameError  # noqa: E402
from moelab.kernels import cubin, nvrtc  # noqa: E402


def load_kernels(path: str | Path) -> ModuleType:
    """The module in that file, whose Triton kernels are compiled from the text that is there now.

    Triton reads a kernel's source from its file. It also keeps what it has compiled: a kernel whose helper was defined
    anew beside it goes on running the old one. Here all kernels of a file are made together; the same text gives the
    same module. What the file raises passes through. Raises UnknownNameError where there is no such file.
    """
    file, text = _read(path, "a Python file of kernels")
    name = f"{file.stem}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(file):
        return known
    module = ModuleType(name)
    module.__file__ = str(file)
    linecache.checkcache(str(file))
    sys.modules[name] = module  # before it runs: triton looks a kernel's module up
    try:
        exec(compile(text, str(file), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _read(path: str | Path, what: str) -> tuple[Path, str]:
    file = Path(path).resolve()
    if not file.is_file():
        raise UnknownNameError(f"There is no file {file}. Expected {what}. Run the cells that write it.")
    return file, file.read_text(encoding="utf-8")


# --- CUDA C++ -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CudaKernel:
    """A kernel in CUDA C++, compiled by NVRTC when it is first asked for. name: as C++ has it, "down<float>" of a template."""

    source: str
    name: str

    def usage(self, arch: str = "sm_90") -> tuple[int, int]:
        """(registers, bytes of stack) of a thread, compiled for that chip, which need not be here.

        What NVRTC says against the source passes through. Raises RuntimeModeError without the extra `cuda`.
        """
        return cubin.usage(nvrtc.compiled(arch, self.source, self.name).code)

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], *args: object) -> None:
        """Launch it on torch's current stream: blocks in the grid, threads in a block.

        args: contiguous tensors of one GPU as pointers, an int as `int`, a float as `float`, else a ctypes value.
        Raises LayoutError, ShapeError for an int past 32 bits, DeviceError, RuntimeModeError without an NVIDIA GPU.
        """
        values = [_argument(place, value) for place, value in enumerate(args)]
        runtime.require_cuda(f"the CUDA C++ kernel {self.name}", "ask for its `usage`, which compiles it anywhere")
        devices = {value.device for value in args if isinstance(value, Tensor)}
        if len(devices) != 1 or (where := devices.pop()).type != "cuda":
            raise DeviceError(
                f"{self.name} was given tensors of no single GPU. Expected one. Move them with .to(device)."
            )
        core = nvrtc.cuda_core()
        device, kernel = _on_device(where.index or 0, self.source, self.name)
        stream = device.create_stream(nvrtc.TorchStream(torch.cuda.current_stream(where)))
        core.launch(stream, core.LaunchConfig(grid=grid, block=block), kernel, *values)


def load_cuda(path: str | Path, name: str) -> CudaKernel:
    """The kernel of that name in that file of CUDA C++, as the file is now. Raises UnknownNameError where there is none."""
    return CudaKernel(_read(path, "a file of CUDA C++")[1], name)


def _argument(place: int, value: object) -> Any:
    """A kernel's argument as cuda.core takes it."""
    if isinstance(value, Tensor):
        if not value.is_contiguous():
            raise LayoutError(
                f"Argument {place} has strides {value.stride()}. Expected a contiguous tensor. Pass x.contiguous()."
            )
        return value.data_ptr()
    if isinstance(value, int):
        if not -(2**31) <= value < 2**31:
            raise ShapeError(
                f"Argument {place} is {value}. Expected an int of 32 bits. Pass ctypes.c_longlong(...), for a `long long`."
            )
        return ctypes.c_int(value)
    return ctypes.c_float(value) if isinstance(value, float) else value


@functools.cache
def _on_device(index: int, source: str, name: str) -> tuple[Any, Any]:
    device = nvrtc.cuda_core().Device(index)
    device.set_current()
    return device, nvrtc.compiled(f"sm_{device.arch}", source, name).get_kernel(name)
