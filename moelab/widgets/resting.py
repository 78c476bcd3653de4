"""Work that waits until a control rests.

A slider that is dragged sends value after value, as fast as they are taken in. What is quick answers each of them; what is
slow is done once, a moment after the last. Only changes from the page wait: one made by code is done at once, so that what it
raises leaves through the assignment.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

REST_S = 0.12
"""Without a change for that long, a control rests: longer than the page takes from one value of a drag to the next."""


class Resting:
    """One piece of work at a time, the last that was asked for."""

    def __init__(self) -> None:
        self._due: asyncio.TimerHandle | None = None

    def then(self, work: Callable[[], None], failed: Callable[[Exception], None]) -> None:
        """Do it now, or, for a change from the page, once nothing was asked for REST_S. failed: told what it raised then, which
        would reach nobody."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if not _from_the_page():
            work()
            return

        def later() -> None:
            self._due = None
            try:
                work()
            except Exception as error:
                failed(error)
                raise

        self._due = asyncio.get_running_loop().call_later(REST_S, later)


def _from_the_page() -> bool:
    """Whether the kernel handles a widget's message now, not a cell."""
    ipython = sys.modules.get("IPython")
    kernel = getattr(ipython.get_ipython(), "kernel", None) if ipython else None
    if kernel is None:
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # another thread
        return False
    parent = kernel.get_parent("shell")
    return bool(parent) and parent.get("header", {}).get("msg_type") == "comm_msg"
