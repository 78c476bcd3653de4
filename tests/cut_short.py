"""What may happen to a process that writes: killed before its n-th act on a folder, no room beyond n bytes, another user."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

ACTS = ("open", "os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir")
"""Python's audit events for what changes names, or opens a file to write or to sync it."""


def in_child(action: Callable[[], object]) -> tuple[int, str]:
    """Run `action` in a forked process: 0 if it returned, 1 if it raised, -n if signal n ended it; and what it raised."""
    sys.stdout.flush()
    sys.stderr.flush()
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException as error:
            os.write(said, f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace"))
        finally:
            os._exit(status)
    os.close(said)
    with open(heard, encoding="utf-8") as pipe:
        message = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), message


def killed_at(act: int, folder: Path, action: Callable[[], object]) -> bool:
    """Run `action` in a process that is killed (-9) before its act number `act` on something below `folder`, from 0. Whether it
    had fewer."""

    def run() -> None:
        left = [act]

        def watch(event: str, arguments: tuple) -> None:
            if event in ACTS and str(arguments[0]).startswith(str(folder)):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1

        sys.addaudithook(watch)
        action()

    status, message = in_child(run)
    assert status in (0, -signal.SIGKILL), message
    return status == 0


def with_room_for(size: int, action: Callable[[], object]) -> tuple[int, str]:
    """`in_child`, where no file may grow over `size` bytes: each write beyond is refused, as on a full disk."""

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        action()

    return in_child(run)


def as_another_user(action: Callable[[], object]) -> tuple[int, str]:
    """`in_child` without root's rights, for who is root: as the user 65534."""

    def run() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        action()

    return in_child(run)
