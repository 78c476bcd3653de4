"""What is in a compiled NVIDIA kernel: registers, spills, instructions. By the cuobjdump in Triton's wheel; needs no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from moelab.errors import RuntimeModeError


def usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a thread; kernels here use their stack for spills only. Raises RuntimeModeError."""
    printed = _cuobjdump("-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    if found is None:
        raise RuntimeModeError(f"cuobjdump printed no usage: {printed[:200]!r}. Expected REG and STACK. Update triton.")
    return int(found[1]), int(found[2])


def disassembly(cubin: bytes) -> str:
    """Its SASS, an instruction a line."""
    return _cuobjdump("-sass", cubin)


def _cuobjdump(what: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True).stdout
