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
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.config import KernelConfig
from moelab.errors import ConfigError, JournalError
from moelab.tuner.evaluate import Outcome, Request, Result

SCHEMA = 1
"""Version of the lines that this code reads and writes."""

FSYNC_EVERY_S = 1.0
"""Longest time that a line may exist only in the machine's memory: what a power cut can cost. A killed process loses
nothing that was appended."""

LOCK_PATIENCE_S = 0.5
"""How long to ask for the lock: a process that a tuner was starting when it was killed shares its files until it runs its
own program, some milliseconds later."""

_HEADER_KEYS = ("provenance", "problem", "strategy", "space", "evaluator")


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
        """Start a journal. header: what `_HEADER_KEYS` names, as JSON values.

        Raises JournalError if one is there already, another tuner holds it, or the disk refuses. A file with no whole
        first line, left by a kill in the first instant, counts as none.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unmade(path, error) from error
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
            content = _parse(path, path.read_bytes())
            os.ftruncate(handle, content.whole_bytes)
        except BaseException:
            os.close(handle)
            raise
        return cls(path, handle, content)

    def append(self, result: Result) -> None:
        """Write one result. Raises JournalError where it cannot; the lines before stay whole and readable."""
        self._append(_encode(result))
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
        data = json.dumps(stamped, allow_nan=False, separators=(",", ":")).encode() + b"\n"
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
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _missing(path, error) from error
    return _parse(path, data)


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


def _unmade(path: Path, error: OSError) -> JournalError:
    return JournalError(
        f"Cannot begin a run's journal at {path}: {error.strerror}. Expected a folder that can be written to. Name another "
        "with --out."
    )


def _missing(path: Path, error: OSError) -> JournalError:
    return JournalError(
        f"Cannot read a run's journal at {path}: {error.strerror}. Expected the file that `moelab tune` wrote. Check the "
        "path, or tune without --resume."
    )


def _open_locked(path: Path, flags: int) -> int:
    try:
        handle = os.open(path, flags | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise (_unmade if flags & os.O_CREAT else _missing)(path, error) from error
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
    for number, line in _lines(path, data[:whole]):
        if header is None:
            header = _header(path, line)
        elif line.get("kind") == "result":
            try:
                results[line["key"]] = _decode(line)
                times[line["key"]] = line["at"]
            except (KeyError, TypeError, ValueError, ConfigError) as error:
                raise _damaged(path, number, error) from error
        else:
            notes.append(line)
    if header is None:
        raise JournalError(
            f"{path} holds no run yet. Expected a header in its first line. Tune without --resume; the file is taken over."
        )
    return Content(header, results, times, tuple(notes), whole)


def _lines(path: Path, data: bytes) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, text in enumerate(data.splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise _damaged(path, number, error) from error
        if not isinstance(line, dict):
            raise _damaged(path, number, TypeError("it holds no JSON object"))
        yield number, line


def _damaged(path: Path, number: int, error: Exception) -> JournalError:
    return JournalError(
        f"Line {number} of the journal {path} is damaged ({type(error).__name__}: {error}). Expected only the last line to "
        "be torn, as a kill leaves it. Restore the file from a backup, or tune again under another name."
    )


def _header(path: Path, line: Mapping[str, Any]) -> Mapping[str, Any]:
    missing = [key for key in _HEADER_KEYS if key not in line]
    if line.get("kind") != "header" or line.get("schema") != SCHEMA or missing:
        raise JournalError(
            f"The first line of {path} is not a run's header of schema {SCHEMA}"
            f"{' (no ' + ', '.join(missing) + ')' if missing else ''}. Expected a journal that this moelab's `tune` wrote. "
            "Check the path, or read it with the moelab that wrote it."
        )
    return line


def _encode(result: Result) -> dict[str, Any]:
    request = result.request
    line: dict[str, Any] = {"kind": "result", "key": request.key()}
    line |= {name: getattr(request, name) for name in ("stage", "num_tokens", "rounds", "interleaved")}
    line |= {name: getattr(request, name) for name in ("stop_above_us", "repeat") if getattr(request, name)}
    line["outcomes"] = [
        {"configs": [c.to_json() for c in contender], **_encode_outcome(outcome)}
        for contender, outcome in zip(request.contenders, result.outcomes, strict=True)
    ]
    return line


def _encode_outcome(outcome: Outcome) -> dict[str, Any]:
    line: dict[str, Any] = {"samples_us": list(outcome.samples_us)}
    if outcome.failure is not None:
        line = {"failure": outcome.failure, "message": outcome.message}
    return line | {k: v for k in ("compile_s", "measure_s") if (v := getattr(outcome, k))}


def _decode(line: Mapping[str, Any]) -> Result:
    contenders = tuple(tuple(map(_config, outcome["configs"])) for outcome in line["outcomes"])
    request = Request(
        line["stage"], line["num_tokens"], contenders, line["rounds"], line["interleaved"],
        line.get("stop_above_us"), line.get("repeat", 0),
    )  # fmt: skip
    if request.key() != line["key"]:
        raise ValueError("its key is not that of its request")
    outcomes = tuple(
        Outcome(
            tuple(o.get("samples_us", ())), o.get("failure"), o.get("message", ""),
            o.get("compile_s", 0.0), o.get("measure_s", 0.0),
        )
        for o in line["outcomes"]
    )  # fmt: skip
    return Result(request, outcomes)


_CONFIGS: dict[tuple[tuple[str, int], ...], KernelConfig] = {}


def _config(entry: Mapping[str, int]) -> KernelConfig:
    """KernelConfig.from_json, remembered: a journal names each of some thousand configs many times."""
    items = tuple(entry.items())
    found = _CONFIGS.get(items)
    if found is None:
        found = _CONFIGS[items] = KernelConfig.from_json(entry)
    return found
