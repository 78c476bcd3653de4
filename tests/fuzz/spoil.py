"""Ways to spoil a document: its bytes, one of its values, or the file that it lies in."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Path_ = tuple[Any, ...]
"""Keys and indices that lead to a value."""

DIGITS = "9" * 5000


class Raw(str):
    """JSON text that stands for itself: what `json.dumps` would not write."""


HOSTILE: tuple[Any, ...] = (
    "x", "", None, True, False, [], {}, [[1]], {"a": 1}, -1, -1.5, 10**30, 10**400, Raw(DIGITS), Raw("NaN"), Raw("Infinity"),
    Raw("-Infinity"), Raw("1e999"), Raw('"\\ud800"'), Raw("[" * 300 + "]" * 300), "1", 2.5, "\x1b[31m", "a\u0000b",
)  # fmt: skip
"""Values that hardly any field may hold."""

UNREADABLE = tuple(value for value in HOSTILE if isinstance(value, Raw))
"""Of them, those that no document may hold anywhere."""


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON text with `Raw` values as they stand."""
    raws: list[str] = []

    def marked(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(str(value))
            return f"\ue000{len(raws) - 1}\ue000"
        if isinstance(value, dict):
            return {key: marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, list | tuple) else value

    text = json.dumps(marked(value), indent=indent, ensure_ascii=False)
    for index, raw in enumerate(raws):
        text = text.replace(f'"\ue000{index}\ue000"', raw)
    return text


def paths(value: Any, here: Path_ = ()) -> Iterator[Path_]:
    """Every place in a document."""
    if here:
        yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, (*here, key))


def at(content: Any, path: Path_) -> Any:
    """The value at a place."""
    for key in path:
        content = content[key]
    return content


def replaced(content: Any, path: Path_, value: Any) -> Any:
    """A copy of a document with another value at a place."""
    content = copy.deepcopy(content)
    at(content, path[:-1])[path[-1]] = value
    return content


def is_hostile_to(good: Any, value: Any) -> bool:
    """Whether a value is of another kind than the one that stood there: no int for an int, no text for a text."""
    if isinstance(value, Raw) or good is None:
        return True
    if isinstance(good, bool) or isinstance(value, bool):
        return type(good) is not type(value)
    if isinstance(good, int | float) and isinstance(value, int | float):
        return (isinstance(good, int) and isinstance(value, float)) or value < 0 or value > 1e18
    return type(good) is not type(value)


# --- bytes -----------------------------------------------------------------------------------------------------------


def _cut(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    at = rng.randrange(len(data))
    return f"cut after {at} bytes", data[:at]


def _flipped(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    return f"bit {bit} of byte {at} flipped", data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def _inserted(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    at = rng.randrange(len(data))
    what = rng.choice((b"\xff", b"\x00", b"\xed\xa0\x80", b"[", b"}", b'"', b",", b"\\ud800", b"[" * 100_000, b"-"))
    return f"{what[:8]!r} ({len(what)} bytes) put in at {at}", data[:at] + what + data[at:]


def _whole(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    what, content = rng.choice((
        ("nothing", b""), ("100,000 brackets", b"[" * 100_000), ("100,000 braces", b'{"a":' * 100_000), ("null", b"null"),
        ("5,000 digits", DIGITS.encode()), ("a list", b"[]"), ("a number", b"5"), ("a surrogate", b'"\\ud800"'),
        ("a mark of byte order", b"\xef\xbb\xbf" + data), ("UTF-16", data.decode("utf-8", "replace").encode("utf-16")),
        ("it twice", data + data), ("zeros", bytes(len(data))),
    ))  # fmt: skip
    return f"{what} in its place", content


def spoiled_bytes(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """(what was done, the bytes)."""
    return rng.choice((_cut, _flipped, _inserted, _whole))(rng, data)


flipped = _flipped


# --- files -----------------------------------------------------------------------------------------------------------


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.mkdir()


def _gone(path: Path) -> None:
    path.symlink_to("gone")


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _vast(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: takes no room


SPECIAL: dict[str, Callable[[Path], None]] = {
    "a FIFO": _fifo, "a link to /dev/zero": _zeros, "a folder": _folder, "a link to nothing": _gone, "a link to itself": _loop,
    "a terabyte of zeros": _vast,
}  # fmt: skip
"""Files that hold no document, each with what makes one."""


def cleared(path: Path) -> Path:
    """The path, with nothing there."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    return path
