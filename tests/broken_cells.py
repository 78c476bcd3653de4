"""Cells whose drawing functions are replaced by one that raises: each cell that draws must fail, none hides it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

import torch

BROKEN = 'def broken(*args, **kwargs):\n    raise RuntimeError("the drawing function is broken")\n'


def in_a_kernel(cells: Sequence[str]) -> list[str | None]:
    """What each of the cells ends with, one after the other in one Jupyter kernel: None, or the exception's words. The kernel
    is a fork of this process, in which nothing needs to be imported anew, and whose changes stay its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # the others were not forked
            from ipykernel.inprocess.manager import InProcessKernelManager

            manager = InProcessKernelManager()
            manager.start_kernel()
            ran = [manager.kernel.shell.run_cell(cell) for cell in cells]
            errors = [one.error_before_exec or one.error_in_exec for one in ran]
            with os.fdopen(writing, "w") as told:
                json.dump([None if error is None else str(error) for error in errors], told)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        text = told.read()
    os.waitpid(child, 0)
    return json.loads(text)  # of a child that failed: nothing, which is no JSON


def assert_each_fails(setup: str, breaks: str, cases: Mapping[str, str], *, sound_first: bool = True) -> None:
    """Run every case, in one kernel, once as it is (but for calls on None) and once after `breaks`, the
    lines that put `broken` in place of the drawing functions. Each must then fail, by that exception."""
    sound = [source for source in cases.values() if "(None)" not in source] if sound_first else []
    again = [setup] if sound_first else []
    ends = in_a_kernel([setup, *sound, *again, BROKEN + breaks, *cases.values()])
    first, found = ends[: -len(cases)], ends[-len(cases) :]
    assert first == [None] * len(first)
    assert dict(zip(cases, found, strict=True)) == {name: "the drawing function is broken" for name in cases}
