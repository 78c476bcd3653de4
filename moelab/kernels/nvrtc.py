"""CUDA C++ compiled through NVRTC, and launched on torch's current stream, both by NVIDIA's cuda.core.

Compiling needs no GPU and no driver: `compiled("sm_90", ...)` works on a laptop, and the tests do it there.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch

from moelab.errors import RuntimeModeError


def cuda_core() -> Any:
    """The module cuda.core. Raises RuntimeModeError where it is not installed."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        raise RuntimeModeError(
            "Kernels in CUDA C++ need NVIDIA's cuda.core and NVRTC. Expected the extra `cuda`. Install it with "
            "`pip install moelab[cuda]`, or use an implementation in Triton."
        )
    import cuda.core

    return cuda.core


@functools.cache
def _include_paths() -> list[str]:
    from cuda.pathfinder import find_nvidia_header_directory

    found = [find_nvidia_header_directory(name) for name in ("cudart", "nvcc")]
    return [str(Path(__file__).parent), *dict.fromkeys(path for path in found if path)]


@functools.cache
def compiled(arch: str, source: str, expression: str) -> Any:
    """The object code of one template instance, by the name that NVRTC gives it, for `arch` ("sm_80", "sm_90a")."""
    core = cuda_core()
    options = core.ProgramOptions(arch=arch, std="c++17", include_path=_include_paths())
    program = core.Program(source, code_type="c++", options=options)
    return program.compile("cubin", name_expressions=(expression,))


class TorchStream:
    """torch's current stream, in the protocol that cuda.core reads."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._handle = stream.cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self._handle)
