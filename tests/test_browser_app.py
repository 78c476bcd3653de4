"""`make app`: Voila serves a notebook's controls without its code, and asks no other host."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from browser import Server, free_port, page
from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 180


def recipe() -> str:
    """The lines of the Makefile that serve the app."""
    return (ROOT / "Makefile").read_text().split("\napp:")[1].split("\n\n")[0]


def test_the_app_has_a_token_and_a_folder_to_write_below() -> None:
    """Before: whoever reached its port had the page, and a button that wrote wherever its owner may."""
    assert "--Voila.auto_token=True" in recipe() and "MOELAB_APP_FOLDER=$(APP_FOLDER)" in recipe()
    assert "JUPYTER_PATH=$(CURDIR)/app" in recipe()


def test_without_its_token_there_is_no_page(tmp_path: Path) -> None:
    pytest.importorskip("voila", reason="voila is not installed: `make setup` installs it")
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "app.ipynb")

    def answer(path: str) -> str:
        with urllib.request.urlopen(server.url + path, timeout=60) as found:
            return urllib.parse.urlsplit(found.url).path

    with app(tmp_path / "app.ipynb", tmp_path) as server:
        assert [answer(path) for path in ("/", "/?token=0", "/api/kernels")] == ["/login"] * 3
        assert answer(f"/?token={server.token}") == "/"


@contextlib.contextmanager
def app(notebook: Path, state: Path) -> Iterator[Server]:
    """Serve one notebook as the Makefile does; logs and settings go into the throwaway folder `state`."""
    server = Server(f"http://127.0.0.1:{free_port()}", secrets.token_hex(16))
    paths = [str(ROOT / "app"), *filter(None, [os.environ.get("JUPYTER_PATH")])]
    environment = {**os.environ, "JUPYTER_PATH": os.pathsep.join(paths), "JUPYTER_CONFIG_PATH": str(ROOT / "app")}
    environment |= {name: str(state / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    command = [sys.executable, "-m", "voila", str(notebook), "--template=moelab", "--no-browser"]
    command += [f"--port={server.url.rpartition(':')[2]}", f"--Voila.token={server.token}"]
    log = state / "voila.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{server.url}/voila/static/voila.js", timeout=5).close()
                break
            time.sleep(0.2)
        else:
            raise RuntimeError(f"Voila did not come up:\n{log.read_text()[-4000:]}")
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.browser
def test_the_app_follows_its_controls(tmp_path: Path, chromium: Browser, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("voila", reason="voila is not installed: `make setup` installs it")
    assert "--template=moelab" in recipe()
    assert all(f"{name}=$(CURDIR)/app" in recipe() for name in ("JUPYTER_PATH", "JUPYTER_CONFIG_PATH"))
    v4 = nbformat.v4
    code = "from moelab import widgets\nfrom moelab.roofline import load_ceilings\n"
    code += 'widgets.explorer(load_ceilings("NVIDIA_H200", "floors"))'
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [v4.new_markdown_cell("# An app\n\n[a source](../moelab/config.py)"), v4.new_code_cell(code)]
    folder = ROOT / "build" / tmp_path.name  # in the checkout, whose sources it links to
    request.addfinalizer(lambda: shutil.rmtree(folder))
    folder.mkdir(parents=True)
    nbformat.write(v4.new_notebook(cells=cells, metadata=kernel), folder / "app.ipynb")
    with app(folder / "app.ipynb", tmp_path) as server, page(chromium, server) as tab:
        tab.page.goto(f"{server.url}/?token={server.token}")
        figure = tab.figure("Model")
        title = figure.title()
        drawn = figure.data()
        assert tab.page.get_by_text("load_ceilings").count() == 0, "the app shows its code"
        other = next(name for name in tab.options("Model") if name not in title)
        tab.select("Model", other)
        figure.wait_for_title(other)
        assert figure.data() != drawn
        batch = tab.step_slider("Batch")
        figure.wait_for_title(other, f"batch {batch}")
        assert tab.outside == [], "requests that would leave the machine"
        assert tab.console_errors == []
        tab.page.get_by_text("a source").click()
        tab.page.wait_for_url("**/voila/files/moelab/config.py")
        assert "class KernelConfig" in tab.page.content()
        for path in ("pyproject.toml", "moelab/../pyproject.toml", "app/voila.json"):
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen(f"{server.url}/voila/files/{path}?token={server.token}", timeout=5)
