"""07_your_kernel in a real JupyterLab: the kernel is written, loaded and judged; its figures follow the controls."""

from __future__ import annotations

import pytest
from browser import Tab


@pytest.mark.whole
@pytest.mark.browser
def test_your_kernel_follows_its_widgets(tab: Tab) -> None:
    tab.open("notebooks/07_your_kernel.ipynb")
    tab.run_all()
    assert (tab.folder / "build" / "kernels" / "pairwise.py").is_file()

    assert "" not in tab.names()
    check = tab.figure("Kernel")
    assert check.title() == "pairwise in float32, hidden size 64, inner size 64: within its bound"
    drawn = check.data()
    tab.select("Kernel", "no_tail")
    check.wait_for_title("no_tail in float32, hidden size 64", "within its bound")
    assert tab.step_slider("Hidden size") == "72"
    check.wait_for_title("no_tail in float32, hidden size 72", "refused")
    assert check.data() != drawn
    tab.select("Kernel", "pairwise")
    check.wait_for_title("pairwise in float32, hidden size 72", "within its bound")
    tab.select("Dtype", "float64")
    check.wait_for_title("pairwise in float64, hidden size 72", "refused")

    roof = tab.figure("Shape")
    title, drawn = roof.title(), roof.data()
    other = next(name for name in tab.options("Shape") if name not in title)
    tab.select("Shape", other)
    roof.wait_for_title(other)
    assert roof.data() != drawn

    assert tab.outside == [], "requests that would leave the machine"
    assert tab.console_errors == []
