"""The kernel of notebooks/07_your_kernel.ipynb, as its cells write it to a file."""

from __future__ import annotations

from pathlib import Path

import nbformat

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "07_your_kernel.ipynb"


def write_kernel(path: Path) -> Path:
    """Write the file that the notebook's %%writefile cells make; the path."""
    cells = [c.source for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.source.startswith("%%writefile")]
    assert len(cells) > 2 and all(cell.splitlines()[0].endswith("{FILE}") for cell in cells)
    path.write_text("".join(cell.partition("\n")[2] + "\n" for cell in cells))
    return path
