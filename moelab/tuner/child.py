"""A Python process of our own: spawned, given one function to run, spoken to over one connection.

The standard library's spawn would import the caller's `__main__` again (a notebook has none, a script may start the
tuner anew), and give every child the parent's environment. A child ends when its parent does, even one that was killed
with -9 in the middle of a measurement: a thread of the child reads the connection, whose end is the parent's.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

_START = "from moelab.tuner.child import main; main()"
_GONE_S = 20.0
"""How long a killed process may take to go: the driver first takes its kernels off the GPU."""


class Child:
    """A child process that runs `target` ("module:function") with a `Channel` and the arguments, which are pickled.

    environment: variables to set, or with None to remove, besides the parent's. What the child prints is kept, for
    `last_words`. Its `connection` may be waited on with others.
    """

    def __init__(self, target: str, *arguments: Any, environment: Mapping[str, str | None] | None = None) -> None:
        ours, theirs = socket.socketpair()
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the child)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self._printed, stderr=subprocess.STDOUT,
                env=_environment(environment or {}), start_new_session=True,
            )  # fmt: skip
        self.connection = Connection(ours.detach())
        self.send((target, arguments))

    def send(self, message: Any) -> None:
        """Send a message; nothing happens if the child is gone, which its connection tells by ending."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def last_words(self, length: int = 400) -> str:
        """The end of what it printed, one line."""
        end = self._printed.seek(0, os.SEEK_END)
        self._printed.seek(max(0, end - length))
        return " ".join(self._printed.read().decode(errors="replace").split())

    def kill(self) -> int | None:
        """Kill it, and wait until it is gone: its exit status, negative for a signal, None if it will not go."""
        self.process.kill()
        self.connection.close()
        try:
            return self.process.wait(_GONE_S)
        except subprocess.TimeoutExpired:
            return None

    def status(self) -> int | None:
        """The exit status of a child whose connection has ended; one that lingers is killed."""
        try:
            self.process.wait(2.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return self.kill()


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    merged: dict[str, str | None] = {**os.environ, "PYTHONPATH": path, **changes}
    return {name: value for name, value in merged.items() if value is not None}


class Channel:
    """The child's end: messages from the parent in order, answers to it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                self._inbox.put(self._connection.recv())
            except (EOFError, OSError):
                os._exit(0)  # the parent has gone; whatever is under way is for nobody

    def receive(self) -> Any:
        """The next message; waits for it."""
        return self._inbox.get()

    def send(self, message: Any) -> None:
        """Send a message to the parent; without one the process ends."""
        try:
            self._connection.send(message)
        except OSError:
            os._exit(0)


def main() -> None:
    """What a child runs: its first message names a function and the arguments after its channel."""
    channel = Channel(Connection(int(sys.argv[1])))
    target, arguments = channel.receive()
    load(target)(channel, *arguments)


def load(target: str) -> Any:
    """What "module:name" names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
