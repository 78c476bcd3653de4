"""What tests compile is kept in build/, under all that it was made of, for the runs and the processes that come after."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from moelab.kernels import nvrtc
from moelab.kernels.fast_instances import SOURCE

BUILD = Path(__file__).resolve().parent.parent / "build"
INCLUDED = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
UNUSED_S = 30 * 86400
"""What nobody asked for as long as that goes: sources change."""


def kept(kind: str, made_of: Iterable[str], make: Callable[[Path], object]) -> Path:
    """The file that `make` writes to the path that it is given, made once for what it is made of: sources, flags, compiler."""
    folder = BUILD / kind
    found = folder / hashlib.sha256(repr(list(made_of)).encode()).hexdigest()[:32]
    if found.exists():
        found.touch()
    else:
        folder.mkdir(parents=True, exist_ok=True)
        for old in [
            each for each in folder.iterdir() if each.is_file() and each.stat().st_mtime < time.time() - UNUSED_S
        ]:
            old.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            make(Path(scratch) / "made")
            (Path(scratch) / "made").replace(found)  # whole or not at all: another process may be making the same
    return found


def texts(*folders: Path) -> list[str]:
    """Names and contents of the CUDA C++ in those folders."""
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in (".cu", ".cuh", ".h")]
    return [word for path in files for word in (path.name, path.read_text())]


def included(source: str, *folders: Path) -> list[str]:
    """Names and contents of the files in those folders that a source includes, and that these include: another
    kernel's may change without it."""
    found, left = dict[str, str](), INCLUDED.findall(source)
    while left:
        name = left.pop()
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if name not in found and path is not None:
            found[name] = path.read_text()
            left += INCLUDED.findall(found[name])
    return [word for pair in sorted(found.items()) for word in pair]


@functools.cache
def _compiler() -> tuple[str, ...]:
    return tuple(map(importlib.metadata.version, ("nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cuda-crt")))


def hopper_code(source: str, expression: str) -> bytes:
    """The object code of one template instance by NVRTC, for sm_90a."""

    def make(path: Path) -> None:
        path.write_bytes(nvrtc.compiled("sm_90a", source, expression).code)

    made_of = (*_compiler(), *included(source, SOURCE.parent), source, expression)
    return kept("cubin", made_of, make).read_bytes()
