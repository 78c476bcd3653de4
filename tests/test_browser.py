"""01_roofline in a real JupyterLab: every cell runs, and the figure follows the widgets."""

from __future__ import annotations

import pytest
from browser import Tab


@pytest.mark.browser
def test_roofline_follows_its_widgets(tab: Tab) -> None:
    tab.open("notebooks/01_roofline.ipynb")
    tab.run_all()
    figure = tab.figure("Model")
    title, data = figure.title(), figure.data()
    assert len(tab.options("TP")) > 1
    other = next(name for name in tab.options("Model") if name.lower() not in title.lower())

    tab.select("Model", other)
    title_of_other = figure.wait_for_title(other)
    data_of_other = figure.data()
    assert title_of_other != title and data_of_other != data

    batch = tab.step_slider("Batch")
    assert figure.wait_for_title(other, batch) != title_of_other
    assert figure.data() != data_of_other

    assert tab.outside == [], "requests that would leave the machine"
    assert tab.console_errors == []
