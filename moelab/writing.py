"""How moelab writes files: each whole or not at all, whatever ends the process or refuses the bytes.

One file (`write`, `replacing`): a temporary file in the same folder, fsync, rename. A reader sees the old file or the new one.

Files that belong together (`together`), as the up and the down file of a pair do: the new ones lie durably beside the old ones
before a record of both is, and the record goes when the last is in its place and found good. While the record is there, the
write has not happened: whoever of moelab next reads or writes in the folder puts everything back as it was (`settle`), or is
told where that cannot be done. A peer's loader knows of no record, so it must not meet a mixture: all files but the first are
taken away before the first is replaced, and come back after it. It sees the old up file alone, or the new one, and each serves
both GEMMs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moelab.errors import MoelabError, WriteError
from moelab.reading import read_json

LOCK = ".moelab.lock"
"""The file in a folder that its writer holds."""

RECORD = ".moelab.unfinished"
"""The record in a folder of files that are being replaced together."""

LOCK_LIMIT_S = 30.0
"""Until a folder that another process holds is given up: a write takes milliseconds."""

GLANCE_S = 1.0
"""Until a reader that may not write is told of an unfinished write: it may be one under way."""

STALE_S = 3600.0
"""Age from which a temporary file is taken for what a killed process left."""

_OLD, _NEW = ".moelab-old", ".moelab-new"
_here = threading.local()


def write(path: str | Path, content: str | bytes) -> Path:
    """Write `content` (text as UTF-8) to `path`, whole or not at all; the folder is made. Returns the path.

    A new file has the rights that the umask leaves it, an old one keeps its own; a link gives way to a file. An OSError
    names `path`, and nothing has changed then.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return Path(path)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """`write`, for who can only write to a path: fill the one given, which becomes `path` at the end of the block."""
    path = Path(path)
    with _naming(path), _temporary(path) as temporary:
        yield temporary
        os.replace(_durable(temporary, path), path)
        _sync_folder(path.parent)


@contextlib.contextmanager
def replacing_all(paths: Iterable[str | Path]) -> Iterator[list[Path]]:
    """`replacing` for files that are made at once: each whole or not at all."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(replacing(path)) for path in paths]


def copy(source: str | Path, path: str | Path) -> Path:
    """Copy a file's bytes to `path` as `write` does."""
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)
    return Path(path)


# --- files that belong together -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """Names in the folder: the file's, its new content's, and its old content's, None where there was no file."""

    name: str
    new: str
    old: str | None


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """The folder to oneself among moelab's writers: made if need be, with no write left half done in it.

    Not twice in a thread. Raises WriteError where another process holds it for LOCK_LIMIT_S, OSError from the disk.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=LOCK_LIMIT_S)
    try:
        lock.acquire()
    except Timeout:
        raise WriteError(
            f"Another process has been writing into {folder} for {LOCK_LIMIT_S:.0f} s: it holds {folder / LOCK}. Expected a "
            "write to take milliseconds. End that process, or name another folder."
        ) from None
    _holding().add(folder.resolve())
    try:
        _undo(folder)
        yield
    finally:
        _holding().discard(folder.resolve())
        lock.release()


@contextlib.contextmanager
def together(texts: Mapping[Path, str]) -> Iterator[None]:
    """Replace files of one folder, which is `locked`, as one. In the block they are in their places, to be looked at: if it
    raises, or the process ends before it does, all are as they were. The first must be right to read without the others.

    An OSError names a file, and nothing has changed then.
    """
    paths, made = list(texts), list[_Entry]()
    folder = paths[0].parent
    _remove_rest(folder)
    try:
        for path in paths:
            made.append(_prepared(path, texts[path]))
        _sync_folder(folder)
        write(folder / RECORD, json.dumps([asdict(entry) for entry in made]))
        for path in reversed(paths[1:]):
            path.unlink(missing_ok=True)
        for path, entry in zip(paths, made, strict=True):
            with _naming(path):
                os.replace(folder / entry.new, path)
        _sync_folder(folder)
        yield
    except BaseException:
        _put_back(folder, made)
        raise
    (folder / RECORD).unlink()
    _sync_folder(folder)
    _remove_rest(folder)


def settle(folder: str | Path) -> None:
    """Before files are read that are written `together`: put back what a killed write has left half done in their folder.

    Raises WriteError where that cannot be done, for what lies there then is of two writes.
    """
    folder, until = Path(folder), time.monotonic() + GLANCE_S
    while os.path.lexists(folder / RECORD) and folder.resolve() not in _holding():
        try:
            with locked(folder):
                return
        except WriteError:
            raise
        except OSError as error:
            if time.monotonic() > until:
                raise _cut_short(folder, error.strerror or str(error)) from error
            time.sleep(0.02)  # it may be under way, in a process that may write


def _prepared(path: Path, text: str) -> _Entry:
    """The new content and the old, each durable under a name of its own."""
    old = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}{_OLD}") if os.path.lexists(path) else None
    with _naming(path), _temporary(path, _NEW) as new:
        new.write_text(text, encoding="utf-8", newline="\n")
        _durable(new, path)
        if old is not None:
            _keep(path, old)
    return _Entry(path.name, new.name, old.name if old else None)


def _keep(path: Path, old: Path) -> None:
    """The file at `path` under a second name."""
    if path.is_symlink():
        old.symlink_to(os.readlink(path))
        return
    try:
        os.link(path, old)
    except OSError:  # a file system without links, or another user's file
        shutil.copy2(path, old)
        _durable(old, path)


def _put_back(folder: Path, made: Sequence[_Entry]) -> None:
    """As it was before `together`, by steps of which any number may have been done before, and no mixture between them."""
    if os.path.lexists(folder / RECORD):
        for entry in reversed(made[1:]):
            if entry.old is None or os.path.lexists(folder / entry.old):
                (folder / entry.name).unlink(missing_ok=True)
        for entry in made:
            if entry.old is None:
                (folder / entry.name).unlink(missing_ok=True)
            elif os.path.lexists(folder / entry.old):
                os.replace(folder / entry.old, folder / entry.name)
                (folder / entry.old).unlink(missing_ok=True)  # renaming a file onto itself leaves both names
        _sync_folder(folder)
        (folder / RECORD).unlink()
    _remove_rest(folder)


def _undo(folder: Path) -> None:
    """Put back what a killed write left, by its record."""
    record = folder / RECORD
    if not os.path.lexists(record):
        return
    try:
        made = [_Entry(**entry) for entry in read_json(record)]
    except (ValueError, TypeError) as error:
        raise _cut_short(folder, f"{record} is none of moelab's: {error}") from error
    names = [(entry.name, "") for entry in made] + [(entry.new, _NEW) for entry in made]
    names += [(entry.old, _OLD) for entry in made if entry.old is not None]
    for name, end in names:
        if (
            not isinstance(name, str)
            or name in ("", ".", "..")
            or "/" in name
            or "\0" in name
            or not name.endswith(end)
        ):
            raise _cut_short(folder, f"{record} names {name!r}, which is no file of this folder's")
    _put_back(folder, made)


def _cut_short(folder: Path, why: str) -> WriteError:
    return WriteError(
        f"A write into {folder} was cut short, and what it left cannot be put back: {why}. Expected a folder that may be "
        f"written to. Run `moelab doctor {folder}` as a user who may, or restore its files and remove {folder / RECORD}."
    )


def _remove_rest(folder: Path) -> None:
    """What writes have left in the folder, which is `locked`, once no record names it."""
    with contextlib.suppress(OSError):
        for found in os.scandir(folder):
            record = found.name.startswith(f".{RECORD}.") and found.name.endswith(".tmp")
            if record or (found.name.startswith(".") and found.name.endswith((_OLD, _NEW))):
                os.unlink(found.path)


# --- what both do -------------------------------------------------------------------------------------------------


def _holding() -> set[Path]:
    """The folders that this thread holds."""
    if not hasattr(_here, "folders"):
        _here.folders = set()
    return _here.folders


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An OSError of the block names `path` if it names nothing, or a temporary file."""
    try:
        yield
    except OSError as error:
        told = error.filename is not None and not str(error.filename).endswith((".tmp", _NEW))
        if told or error.errno is None or isinstance(error, MoelabError):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def _temporary(path: Path, ending: str = ".tmp") -> Iterator[Path]:
    """An empty file beside `path`, removed if the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
    _remove_stale(path)
    temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}{ending}")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    try:
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _prefix(path: Path) -> str:
    return f".{path.name[:40]}."  # a name may have 255 bytes, and a temporary file's is longer than its file's


def _remove_stale(path: Path) -> None:
    """Temporary files of `path` that a killed process has left."""
    with contextlib.suppress(OSError):
        for found in os.scandir(path.parent):
            ours = found.name.startswith(_prefix(path)) and found.name.endswith(".tmp")
            if ours and time.time() - found.stat(follow_symlinks=False).st_mtime > STALE_S:
                os.unlink(found.path)


def _durable(temporary: Path, path: Path) -> Path:
    """Bytes on disk, and the rights of the file that is at `path` now, if there is one."""
    handle = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
        with contextlib.suppress(FileNotFoundError):
            os.fchmod(handle, stat.S_IMODE(path.stat().st_mode) & 0o777)
    finally:
        os.close(handle)
    return temporary


def _sync_folder(folder: Path) -> None:
    """Names on disk, where the file system has that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
