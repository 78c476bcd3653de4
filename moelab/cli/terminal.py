"""The way out to a terminal: in the characters that the stream has, and none that a terminal would take for a command."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_UNSAID = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and newline, DEL, C1: escape sequences begin with them
    "\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"  # what turns the direction of text round, or cannot be seen
    "\ud800-\udfff]"  # half of a pair: bytes of a file's name that are no UTF-8
)


def printable(text: str, encoding: str | None = None) -> str:
    """Text with what no terminal should be sent written out, as in \\x1b, and what `encoding` lacks too."""
    said = _UNSAID.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
    encoding = encoding or "utf-8"
    return said.encode(encoding, "backslashreplace").decode(encoding)


class _Plain:
    """A stream that writes `printable` text; else it is the stream itself."""

    def __init__(self, stream: TextIO) -> None:
        self.unfiltered = stream

    def write(self, text: str) -> int:
        self.unfiltered.write(printable(text, getattr(self.unfiltered, "encoding", None)))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unfiltered, name)


@contextlib.contextmanager
def plain_streams() -> Iterator[None]:
    """Whatever the block prints on stdout and stderr is `printable`: names of models and devices, paths, others' messages."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    plain = {name: _Plain(stream) for name, stream in before.items() if stream is not None}
    for name, stream in plain.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in plain.items():
            if getattr(sys, name) is stream:  # click puts another there once the reader of a pipe has gone
                setattr(sys, name, before[name])


def erase_line(stream: TextIO) -> None:
    """Empty the line of a terminal and go to its beginning: the one sequence that moelab sends on purpose."""
    getattr(stream, "unfiltered", stream).write("\r\x1b[2K")
