"""An emulated launch under ThreadSanitizer, in a process without torch, which loads slowly where every access is watched."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import emulated_gpu
import pytest
from torch import Tensor

# What it reads: the tensors in one piece; then the maps and the arguments, their addresses counted from where that piece starts.
CHILD = """
import ctypes, struct, sys
library, tensors, maps, arguments = sys.argv[1:]
data, maps, arguments = (ctypes.create_string_buffer(open(f, "rb").read()) for f in (tensors, maps, arguments))
def move(buffer, places):
    for place in places:
        struct.pack_into("Q", buffer, place, struct.unpack_from("Q", buffer, place)[0] + ctypes.addressof(data))
move(maps, range(0, MAPS * MAP, MAP))
move(arguments, range(0, 8 * POINTERS, 8))
ctypes.CDLL(library).run(maps if MAPS else None, arguments, BLOCKS, -1)
print("done")
"""


def launch_files(
    folder: Path,
    maps: Sequence[emulated_gpu.EmulatedMap],
    arguments: ctypes.Structure,
    pointers: int,
    tensors: list[Tensor],
) -> list[str]:
    """Files of a launch, whose arguments begin with so many pointers to those tensors."""
    piece, moved = b"", {}
    for tensor in tensors:
        moved[tensor.data_ptr()] = len(piece)
        content = ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.itemsize)
        piece += content + bytes(-len(content) % 64)
    packed = bytearray(bytes(arguments))
    for place in range(0, 8 * pointers, 8):
        struct.pack_into("Q", packed, place, moved[struct.unpack_from("Q", packed, place)[0]])
    for one in maps:
        one.address = moved[one.address]
    paths = []
    for name, content in (("tensors", piece), ("maps", b"".join(map(bytes, maps))), ("arguments", bytes(packed))):
        (folder / name).write_bytes(content)
        paths.append(str(folder / name))
    return paths


def watched(library: Path, files: list[str], *, blocks: int, maps: int, pointers: int) -> str:
    """What ThreadSanitizer says of that launch. library: built with `races`."""
    found = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True).stdout
    # Its shadow memory wants addresses that newer kernels' randomisation may have taken.
    command = [*(["setarch", "-R"] if shutil.which("setarch") else []), sys.executable, "-c"]
    environment = {**os.environ, "LD_PRELOAD": found.strip(), "TSAN_OPTIONS": "exitcode=0"}
    probe = subprocess.run([*command, "print('up')"], capture_output=True, text=True, env=environment, check=False)
    if probe.stdout != "up\n":
        pytest.skip(f"ThreadSanitizer does not start here: {(probe.stderr or 'no message')[:200]}")
    sizes: dict[str, Any] = {
        "MAPS": maps, "MAP": ctypes.sizeof(emulated_gpu.EmulatedMap), "POINTERS": pointers, "BLOCKS": blocks
    }  # fmt: skip
    child = CHILD
    for name, size in sizes.items():
        child = child.replace(name, str(size))
    run = subprocess.run(
        [*command, child, str(library), *files],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
        timeout=300,
    )
    return run.stdout + run.stderr
