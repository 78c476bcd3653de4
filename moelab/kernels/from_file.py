"""Kernels from a Python file that a notebook wrote: loaded whole and anew, whenever its text has changed."""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import hashlib  # noqa: E402
import linecache  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from types import ModuleType  # noqa: E402

from moelab.errors import UnknownNameError  # noqa: E402


def load_kernels(path: str | Path) -> ModuleType:
    """The module in that file, whose Triton kernels are compiled from the text that is there now.

    Triton reads a kernel's source from its file. It also keeps what it has compiled: a kernel whose helper was defined
    anew beside it goes on running the old one. Here all kernels of a file are made together; the same text gives the
    same module. What the file raises passes through. Raises UnknownNameError where there is no such file.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise UnknownNameError(
            f"There is no file {file}. Expected a Python file of kernels. Run the cells that write it."
        )
    text = file.read_text(encoding="utf-8")
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
