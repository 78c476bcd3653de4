"""00_welcome in a real JupyterLab: every cell runs, and both pictures follow their controls."""

from __future__ import annotations

import pytest
from browser import Tab


@pytest.mark.whole
@pytest.mark.browser
def test_welcome_follows_its_widgets(tab: Tab) -> None:
    tab.open("notebooks/00_welcome.ipynb")
    tab.run_all()

    assert "" not in tab.names()
    blocks = tab.figure("Block rows")
    title = blocks.title()
    rows = tab.step_slider("Block rows")
    assert blocks.wait_for_title(f"BLOCK_SIZE_M = {rows}") != title

    figure = tab.figure("Step")
    assert "Step 1 of 7, tokens: all tokens" in figure.title()
    drawn = figure.data()
    assert tab.step_slider("Step") == "routing"
    figure.wait_for_title("Step 2 of 7, routing: all tokens")
    for name in ("alignment", "GEMM1", "activation", "GEMM2", "sum"):
        assert tab.step_slider("Step") == name
    figure.wait_for_title("Step 7 of 7, sum: all tokens")
    everyone = figure.data()
    assert everyone != drawn
    assert tab.options("Token") == ["all", "0", "1", "2", "3", "4", "5"]
    tab.select("Token", "3")
    figure.wait_for_title("Step 7 of 7, sum: token 3")
    assert figure.data() != everyone

    assert tab.outside == [], "requests that would leave the machine"
    assert tab.console_errors == []
