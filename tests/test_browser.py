"""01_roofline in a real JupyterLab: every cell runs, and the figure follows the widgets."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from browser import find_chromium, lab, page

ROOT = Path(__file__).resolve().parent.parent


def chromium_or_skip() -> str:
    """The chromium on PATH; without one, skips the test, except under CI=true, where it fails."""
    found = find_chromium()
    if found is None:
        message = "no chromium on PATH; on Debian: apt-get install chromium fonts-dejavu-core"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    return found


def copy_of_the_checkout(folder: Path) -> Path:
    """A folder that looks like the checkout to a notebook, so that running one leaves the checkout clean."""
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    for name in ("moelab", "configs", "data"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.browser
def test_roofline_follows_its_widgets(tmp_path: Path) -> None:
    chromium = chromium_or_skip()
    (tmp_path / "root").mkdir()
    root = copy_of_the_checkout(tmp_path / "root")
    with lab(root, tmp_path / "state") as server, page(server, chromium) as tab:
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
