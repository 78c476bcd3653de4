"""The journal of a run: one line of JSON for each thing that happened, appended, never rewritten.

The first line is the header (schema, provenance, problem, strategy, space, evaluator); then a line for each request
with the outcome of every contender; and notes: "resumed", "phase", "finished". A line is whole or absent: a kill leaves
at most one torn line at the end, which reading ignores and resuming cuts off. A lock on the file keeps a second tuner
out, and goes with the process that holds it.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.errors import JournalError
from moelab.reading import MIB, UnreadableError, read_bytes
from moelab.tuner.evaluate import Result
from moelab.tuner.journal_lines import decode, encode, has_digest, packed, parsed

SCHEMA = 1
"""Version of the lines that this code reads and writes."""

FSYNC_EVERY_S = 1.0
"""Longest time that a line may exist only in the machine's memory: what a power cut can cost. A killed process loses
nothing that was appended."""

LOCK_PATIENCE_S = 0.5
"""How long to ask for the lock: a process that a tuner was starting when it was killed shares its files until it runs its
own program, some milliseconds later."""

LARGEST = 512 * MIB
"""Bytes of the largest journal that is read: the grid of all batch sizes takes 30 MB."""


@dataclass(frozen=True)
class Content:
    """What a journal holds. header: its first line. results: key of the request -> result, in the order written; times:
    the same keys -> when (UTC, ISO 8601). notes: all other lines. whole_bytes: length without a torn last line."""

    header: Mapping[str, Any]
    results: Mapping[str, Result]
    times: Mapping[str, str]
    notes: tuple[Mapping[str, Any], ...]
    whole_bytes: int


class Journal:
    """A journal that is open for appending, locked against other tuners. `create` or `resume` makes one.

    Writing raises JournalError when the disk refuses, and when the file is no longer at its path, or not as it was left: a
    run that went on would end well, and leave nothing to take up.
    """

    def __init__(self, path: Path, handle: int, content: Content) -> None:
        self.path, self.content = path, content
        self._handle: int | None = handle
        self._end = content.whole_bytes
        self._synced = time.monotonic()

    @classmethod
    def create(cls, path: str | Path, header: Mapping[str, Any]) -> Journal:
        """Start a journal. header: provenance, problem, strategy, space, evaluator, as JSON values.

        Raises JournalError if one is there already, another tuner holds it, or the disk refuses. A file with no whole
        first line, left by a kill in the first instant, counts as none.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unmade(path, str(error.strerror)) from error
        handle = _open_locked(path, os.O_RDWR | os.O_CREAT)
        try:
            if b"\n" in os.pread(handle, 1 << 20, 0):
                raise JournalError(
                    f"There is a run at {path} already. Expected a name that is free. Take up that run with --resume "
                    f"{path}, or name another with --out."
                )
            os.ftruncate(handle, 0)
            journal = cls(path, handle, Content(dict(header), {}, {}, (), 0))
            journal._append({"kind": "header", "schema": SCHEMA, **header})
            journal.sync()
        except BaseException:
            os.close(handle)
            raise
        return journal

    @classmethod
    def resume(cls, path: str | Path) -> Journal:
        """Open a journal to go on with it; a torn last line is cut off. Raises JournalError as `read` and `create` do."""
        path = Path(path)
        handle = _open_locked(path, os.O_RDWR)
        try:
            content = _parse(path, _bytes(path))
            os.ftruncate(handle, content.whole_bytes)
        except BaseException:
            os.close(handle)
            raise
        return cls(path, handle, content)

    def append(self, result: Result) -> None:
        """Write one result. Raises JournalError where it cannot; the lines before stay whole and readable."""
        self._append(encode(result))
        if time.monotonic() - self._synced > FSYNC_EVERY_S:
            self.sync()

    def note(self, kind: str, **fields: Any) -> None:
        """Write something that is no result: "resumed", "phase", "finished"."""
        self._append({"kind": kind, **fields})
        self.sync()

    def sync(self) -> None:
        """Have the disk hold every line written so far."""
        if self._handle is not None:
            try:
                os.fsync(self._handle)
            except OSError as error:
                raise self._refused(error) from error
            self._synced = time.monotonic()

    def close(self) -> None:
        """Sync, unlock and close. May be called twice."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            try:
                os.fsync(handle)
            except OSError as error:
                raise self._refused(error) from error
            finally:
                os.close(handle)

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._handle is None:
            raise JournalError(
                f"The journal {self.path} is closed. Expected an open one. Take it up with Journal.resume."
            )
        self._must_stand(self._handle)
        stamped = {**line, "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")}
        data = packed(stamped)
        try:
            written = 0
            while written < len(data):  # a disk that fills up takes a part first, and refuses only the rest
                written += os.pwrite(self._handle, data[written:], self._end + written)
        except OSError as error:
            with contextlib.suppress(OSError):  # a torn line that stays is cut off by who takes the run up
                os.ftruncate(self._handle, self._end)
            raise self._refused(error) from error
        self._end += len(data)

    def _must_stand(self, handle: int) -> None:
        own = os.fstat(handle)
        try:
            there = os.stat(self.path)
        except OSError:
            raise self._gone("removed", handle) from None
        if (there.st_dev, there.st_ino) != (own.st_dev, own.st_ino):
            raise self._gone("replaced by another file", handle)
        if own.st_size != self._end:
            raise JournalError(
                f"The journal {self.path} was written to by another program: it has {own.st_size} bytes in place of "
                f"{self._end}. Expected to be the only one. What is still whole in it is taken up with --resume {self.path}."
            )

    def _gone(self, how: str, handle: int) -> JournalError:
        kept = _rescued(self.path, os.pread(handle, self._end, 0))
        then = (
            f"is in {kept}: take the run up with --resume {kept}"
            if kept
            else "is lost, for it cannot be written elsewhere"
        )
        return JournalError(
            f"The journal {self.path} was {how} while the run went on. Expected it to stay until the run ends. What was "
            f"measured {then}."
        )

    def _refused(self, error: OSError) -> JournalError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return JournalError(
            f"Cannot write to the journal {self.path}: {'the disk is full' if full else error.strerror}. Expected room for "
            "about 10 MB. What is in it can be read; "
            f"{'make room' if full else 'check the disk'}, then take the run up with --resume {self.path}."
        )


def read(path: str | Path) -> Content:
    """Read a journal, finished or not, without locking it; a torn last line is ignored.

    Raises JournalError if it is missing, has no header, is of another schema, or a line before the last is damaged.
    """
    path = Path(path)
    return _parse(path, _bytes(path))


def _bytes(path: Path) -> bytes:
    try:
        return read_bytes(path, LARGEST)
    except OSError as error:
        raise _missing(path, str(error.strerror)) from error
    except UnreadableError as error:
        raise _missing(path, f"it {error}") from None


def _rescued(path: Path, data: bytes) -> Path | None:
    """Write what a journal held beside it, or into the nearest folder above that is there; the file, None if none takes it."""
    for folder in path.absolute().parents:
        kept = folder / f"{path.stem}-kept-{secrets.token_hex(3)}.jsonl"
        try:
            with kept.open("xb") as file:
                file.write(data)
        except OSError:
            continue
        return kept
    return None


def _unmade(path: Path, why: str) -> JournalError:
    return JournalError(
        f"Cannot begin a run's journal at {path}: {why}. Expected a folder that can be written to. Name another "
        "with --out."
    )


def _missing(path: Path, why: str) -> JournalError:
    return JournalError(
        f"Cannot read a run's journal at {path}: {why}. Expected the file that `moelab tune` wrote. Check the "
        "path, or tune without --resume."
    )


def _open_locked(path: Path, flags: int) -> int:
    try:
        handle = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)  # a FIFO would be waited for
    except OSError as error:
        raise (_unmade if flags & os.O_CREAT else _missing)(path, str(error.strerror)) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise (_unmade if flags & os.O_CREAT else _missing)(path, "it is a special file")
    patience = time.monotonic() + LOCK_PATIENCE_S
    while not _locked(handle):
        if time.monotonic() > patience:
            os.close(handle)
            raise JournalError(
                f"Another tuner is writing to {path}. Expected to be the only one. Choose another file with --out, or wait "
                "until that run ends, then take it up with --resume."
            )
        time.sleep(0.02)
    return handle


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _parse(path: Path, data: bytes) -> Content:
    whole = data.rfind(b"\n") + 1
    header: Mapping[str, Any] | None = None
    results: dict[str, Result] = {}
    times: dict[str, str] = {}
    notes: list[Mapping[str, Any]] = []
    sealed = has_digest(data[: data.find(b"\n")]) if whole else False
    for number, text in enumerate(data[:whole].splitlines(), 1):
        try:
            line = parsed(text, header is None, sealed)
            if header is None:
                header = line
            elif line["kind"] == "result":
                results[line["key"]] = decode(line)
                times[line["key"]] = line["at"]
            else:
                notes.append(line)
        except UnreadableError as error:
            raise _foreign(path, error) if number == 1 else _damaged(path, number, error) from None
    if header is None:
        raise JournalError(
            f"{path} holds no run yet. Expected a header in its first line. Tune without --resume; the file is taken over."
        )
    return Content(header, results, times, tuple(notes), whole)


def _foreign(path: Path, error: UnreadableError) -> JournalError:
    return JournalError(
        f"Line 1 of {path} is not a run's header of schema {SCHEMA}: it {error}. Expected a journal that this moelab's `tune` "
        "wrote. Check the path, or read it with the moelab that wrote it."
    )


def _damaged(path: Path, number: int, error: UnreadableError) -> JournalError:
    return JournalError(
        f"Line {number} of the journal {path} is damaged: it {error}. Expected only the last line to be torn, as a kill leaves "
        "it. Restore the file from a backup, or tune again under another name."
    )
