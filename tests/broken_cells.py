"""A notebook whose drawing functions are replaced by one that raises: each cell that draws must fail, none hides it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient

BROKEN = 'def broken(*args, **kwargs):\n    raise RuntimeError("the drawing function is broken")\n'


def assert_each_fails(setup: str, breaks: str, cases: Mapping[str, str], *, sound_first: bool = True) -> None:
    """Run every case, in one kernel, once as it is (but for calls on None) and once after `breaks`, the
    lines that put `broken` in place of the drawing functions. Each must then fail, by that exception."""
    cell = nbformat.v4.new_code_cell
    sound = [cell(source) for source in cases.values() if "(None)" not in source] if sound_first else []
    broken = [cell(source, metadata={"tags": ["raises-exception"]}) for source in cases.values()]
    again = [cell(setup)] if sound_first else []
    notebook = nbformat.v4.new_notebook(cells=[cell(setup), *sound, *again, cell(BROKEN + breaks), *broken])
    here = {"metadata": {"path": str(Path(__file__).parent)}}
    NotebookClient(notebook, timeout=60, kernel_name="python3", resources=here).execute()
    found = zip(cases, notebook.cells[-len(cases) :], strict=True)
    failed = {name: [o.evalue for o in ran.outputs if o.output_type == "error"] for name, ran in found}
    assert failed == {name: ["the drawing function is broken"] for name in cases}
