"""The one door through which files of others are read: regular files up to a stated size, and strict JSON.

What it refuses, and why:
- a FIFO, a device, a socket (a reader would wait, or never end), and a file over the limit;
- bytes that are no UTF-8, half of a surrogate pair, NaN, Infinity and numbers that overflow, integers of more than 4,300 digits;
- documents nested deeper than 200, which would end Python's own reader, or what walks through its result, in a RecursionError;
- a key that stands twice in an object: one of the two would be lost without a word.

What a document must hold is its reader's to say, by a schema (`moelab.schemas`, `moelab.tuner.schemas`).
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

MIB = 1 << 20
LARGEST = 64 * MIB
"""Bytes of the largest file that is read unless its reader says otherwise; the largest shipped one has 1.7 MB."""


class UnreadableError(ValueError):
    """Why a file is not read, as the end of a sentence that begins with its name: "is a FIFO, not a file"."""


def opened(path: str | Path) -> io.FileIO:
    """A regular file, open for reading. Raises OSError as the system does, UnreadableError for what is no file."""
    try:
        handle = os.open(
            path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        )  # a FIFO has no writer to wait for
    except ValueError as error:
        raise UnreadableError(f"is no path ({error})") from None
    kind = os.fstat(handle).st_mode
    if stat.S_ISREG(kind):
        return io.FileIO(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise UnreadableError(f"is {_KINDS.get(stat.S_IFMT(kind), 'a special file')}, not a file")


def read_bytes(path: str | Path, limit: int = LARGEST) -> bytes:
    """A regular file's bytes. Raises OSError as the system does, UnreadableError for what is no file or over `limit` bytes."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise UnreadableError(f"has {size:,} bytes, over the {limit:,} that are read of such a file")
        parts, missing = [], limit + 1
        while missing and (part := file.read(missing)):
            parts.append(part)
            missing -= len(part)
    if not missing:
        raise UnreadableError(f"goes on beyond the {limit:,} bytes that are read of such a file")
    return parts[0] if len(parts) == 1 else b"".join(parts)


_KINDS = {
    stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
}  # fmt: skip


def parse_json(data: bytes | str) -> Any:
    """Strict JSON as plain Python values. Raises UnreadableError, which says where the document ends to be one."""
    import pydantic_core  # 20 ms, and only who reads needs it

    try:
        value = pydantic_core.from_json(data, allow_inf_nan=False, cache_strings="keys")
        json.loads(data, object_pairs_hook=_once, parse_float=_finite)
    except UnreadableError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"is not strict JSON ({_reason(data, str(error))})") from None
    return value


def read_json(path: str | Path, limit: int = LARGEST) -> Any:
    """`parse_json` of `read_bytes`, with the errors of both."""
    return parse_json(read_bytes(path, limit))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UnreadableError(f"has the key {twice[:60]!r} twice in one object")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise UnreadableError(f"holds {text[:60]}, which is beyond a float")
    return value


def _reason(data: bytes | str, said: str) -> str:
    """The parser's reason in plain words, with what stands where it stopped."""
    place = re.search(r" at line (\d+) column (\d+)$", said)
    raw = data.encode("utf-8", "replace") if isinstance(data, str) else data
    lines = raw.split(b"\n", int(place[1])) if place else []
    near = lines[int(place[1]) - 1][max(0, int(place[2]) - 2) :][:12] if place and len(lines) >= int(place[1]) else b""
    said = said.replace("recursion limit exceeded", "nested deeper than 200")
    return said + (f", near {near.decode('utf-8', 'backslashreplace')!r}" if near else "")
