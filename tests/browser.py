"""A real JupyterLab, driven in a real chromium: the helper of the browser tests, which take the fixture `tab` of conftest.py.

    def test_it(tab):
        tab.open("notebooks/01_roofline.ipynb")
        tab.run_all()
        tab.select("Model", "mixtral-8x7b")

One JupyterLab serves all test processes of a run, each test from a folder of its own. Nothing is slept for: every wait is for
something that can be seen in the page.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / "app"
TIMEOUT_S = 180
IDLE_S = 600  # more than a test may take
# In place of a route, which would have each of a page's hundreds of files pass through Python.
NO_OTHER_HOST = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
SETTINGS = {
    # no "would you like to get news" popup over the page, no look-up of newer versions
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    # cells out of sight stay in the page, so that every figure can be waited for
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
}
# The errors among the outputs of the open notebook, each as "NameError: ...".
CELL_ERRORS = """() => [...window.jupyterapp.shell.currentWidget.content.model.cells]
    .flatMap(cell => cell.toJSON().outputs ?? [])
    .filter(output => output.output_type === 'error')
    .map(output => `${output.ename}: ${output.evalue}`)"""
# A script that a notebook has put into the page goes too: the next one must bring its own.
OPEN = """async path => {
    const app = window.jupyterapp;
    await app.restored;
    const opened = await app.commands.execute('docmanager:open', { path });
    await opened.context.ready;
    app.shell.activateById(opened.id);
}"""
CLOSE = """async () => {
    const opened = window.jupyterapp?.shell.currentWidget;
    await opened?.sessionContext?.shutdown();
    opened?.dispose();
    window.moelabNames?.disconnect();
    delete window.moelabNames;
}"""
RUN_CELLS = """async texts => {
    const { content } = window.jupyterapp.shell.currentWidget;
    for (const [i, cell] of content.widgets.entries()) {
        if (!texts.some(text => cell.model.sharedModel.source.includes(text))) continue;
        content.activeCellIndex = i;
        await window.jupyterapp.commands.execute('notebook:run-cell');
    }
}"""
# The accessible name of every control that takes the focus, and of every figure; "" where it has none.
NAMES = """() => [...document.querySelectorAll('.jupyter-widgets :is(select, input, textarea, button, [tabindex="0"])'
    + ', .js-plotly-plot')]
    .filter(node => node.getClientRects().length && !node.closest('.modebar'))
    .map(node => (node.getAttribute('aria-label') || node.labels?.[0]?.textContent || node.textContent || '').trim())"""
# What a plotly figure draws, as text; calcdata holds plain numbers even where the data came as packed arrays.
DRAWN = "plot => JSON.stringify(plot.calcdata.map(trace => trace.map(point => [point.x, point.y])))"


def find_chromium() -> str | None:
    """The path of a chromium or Chrome on PATH, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Server:
    """A running Jupyter server: its address with no trailing slash, its token, and the folder that it serves."""

    url: str
    token: str
    root: str = ""


def chromium_or_skip() -> str:
    """The chromium on PATH; without one, skips the test, except under CI=true, where it fails."""
    found = find_chromium()
    if found is None:
        message = "no chromium on PATH; on Debian: apt-get install chromium fonts-dejavu-core"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    return found


def copy_of_the_checkout(folder: Path, checkout: Path = ROOT) -> Path:
    """A folder that looks like the checkout to a notebook, so that running one leaves the checkout clean."""
    shutil.copytree(checkout / "notebooks", folder / "notebooks")
    for name in ("moelab", "configs", "data"):
        (folder / name).symlink_to(checkout / name)
    return folder


def _settings(folder: Path) -> None:
    for name, values in SETTINGS.items():
        path = folder / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_up(server: Server, process: subprocess.Popen, log: Path) -> None:
    request = urllib.request.Request(f"{server.url}/api/status?token={server.token}")
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            urllib.request.urlopen(request, timeout=5).close()
            return
        time.sleep(0.2)
    process.kill()
    raise RuntimeError(f"JupyterLab did not come up within {TIMEOUT_S} s:\n{log.read_text()[-4000:]}")


def _start(server: Server, state: Path) -> int:
    """Start a JupyterLab that serves server.root, and wait for it; settings, workspaces and logs go into `state`. Its process."""
    _settings(state / "settings")
    log = state / "lab.log"
    places = {
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={urlsplit(server.url).port}"]
    command += ["--ServerApp.port_retries=0", f"--ServerApp.root_dir={server.root}"]
    command += [f"--IdentityProvider.token={server.token}", "--LabApp.extension_manager=readonly"]
    command += [f"--ServerApp.shutdown_no_activity_timeout={IDLE_S}"]  # should no test process live to stop it
    environment = os.environ | {name: str(state / place) for name, place in places.items()}
    environment["JUPYTER_CONFIG_PATH"] = str(APP)  # as `make lab` does
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=server.root, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    _wait_until_up(server, process, log)
    return process.pid


@contextlib.contextmanager
def shared_lab(folder: Path) -> Iterator[Server]:
    """The JupyterLab of all test processes that share `folder`: the first one starts it, the last one to leave stops it."""
    folder.mkdir(exist_ok=True)
    record = folder / "server.json"

    @contextlib.contextmanager
    def locked() -> Iterator[dict]:
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kept = json.loads(record.read_text()) if record.exists() else {"users": 0}
            yield kept
            record.write_text(json.dumps(kept))

    with locked() as kept:
        if kept["users"] == 0:
            root, state = (folder / f"{part}{kept.get('starts', 0)}" for part in ("root", "state"))
            root.mkdir()
            server = Server(f"http://127.0.0.1:{free_port()}", secrets.token_hex(16), str(root))
            kept |= {"server": asdict(server), "starts": kept.get("starts", 0) + 1, "pid": _start(server, state)}
        kept["users"] += 1
        server = Server(**kept["server"])
    try:
        yield server
    finally:
        with locked() as kept:
            kept["users"] -= 1
            if kept["users"] == 0:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(kept["pid"], signal.SIGTERM)  # JupyterLab shuts its kernels down with it


@dataclass
class Tab:
    """One page of a JupyterLab, with its console's errors and the requests that would leave the machine.

    folder: what a test may write to, below the server's root; notebooks are opened from it.
    """

    page: Page
    server: Server
    folder: Path = Path()
    console_errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Record console errors, page errors, and every request to another host; `page` lets none of those through."""
        self.page.on("console", lambda m: self.console_errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.console_errors.append(str(error)))
        self.page.on("websocket", lambda socket: self._note(socket.url))
        self.page.on("request", lambda request: self._note(request.url))

    def _note(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob", "about") and parts.netloc != urlsplit(self.server.url).netloc:
            self.outside.append(url)

    def open(self, notebook: str) -> None:
        """Open a notebook, given relative to this tab's folder, and wait for its cells and an idle kernel. JupyterLab is
        loaded once for all tests of a page: that takes far longer than a notebook."""
        if not self.page.url.startswith(self.server.url):
            self.page.goto(f"{self.server.url}/lab/workspaces/{secrets.token_hex(4)}?token={self.server.token}&reset")
            self.page.wait_for_function("window.jupyterapp?.restored")
        self.page.evaluate(OPEN, f"{self.folder.relative_to(self.server.root)}/{notebook}")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        self.page.wait_for_function(
            "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        )

    def close(self) -> None:
        """Shut the open notebook's kernel down, and leave the page as an empty JupyterLab."""
        self.page.evaluate(CLOSE)

    def run_all(self) -> None:
        """Run every cell, wait until all are done; RuntimeError names the errors of the cells that failed."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self._wait_for_cells()

    def run_cells(self, *texts: str) -> None:
        """The same of the cells that hold one of those texts, in their order."""
        self.page.evaluate(RUN_CELLS, texts)
        self._wait_for_cells()

    def _wait_for_cells(self) -> None:
        self.page.wait_for_function(
            "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'"
        )
        errors = self.page.evaluate(CELL_ERRORS)
        if errors:
            raise RuntimeError(f"cells failed in the browser: {errors}")

    def names(self) -> list[str]:
        """What a screen reader calls each control and figure of the page, "" for nothing, once their script has run."""
        self.page.wait_for_function("window.moelabNames")
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return self.page.evaluate(NAMES)

    def control(self, description: str) -> Locator:
        """The widget with that description."""
        label = self.page.locator(".widget-label", has_text=re.compile(rf"^{re.escape(description)}:?$"))
        return label.first.locator("xpath=..")

    def options(self, description: str) -> list[str]:
        """The options of a dropdown."""
        return self.control(description).locator("select option").all_inner_texts()

    def select(self, description: str, option: str) -> None:
        """Choose an option of a dropdown."""
        self.control(description).locator("select").select_option(label=option)

    def step_slider(self, description: str) -> str:
        """Move a slider by one step, as the arrow key does; its readout afterwards."""
        control = self.control(description)
        readout = control.locator(".widget-readout")
        before = readout.inner_text()
        handle = control.locator(".noUi-handle").first
        at_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
        handle.press("ArrowLeft" if at_end else "ArrowRight")
        self.page.wait_for_function(
            "([node, before]) => node.innerText !== before", arg=[readout.element_handle(), before]
        )
        return readout.inner_text()

    def figure(self, near: str) -> Figure:
        """The figure that the widgets redraw: the last one in the cell that holds the control `near`."""
        cell = self.page.locator(".jp-Cell", has=self.control(near))
        return Figure(cell)


@dataclass(frozen=True)
class Figure:
    """The last plotly figure of a notebook cell."""

    cell: Locator

    def title(self) -> str:
        """The title; waits until the figure is drawn."""
        return self.cell.locator(".js-plotly-plot").last.locator(".gtitle").text_content() or ""

    def data(self) -> str:
        """The drawn traces as text, to be compared."""
        return self.cell.locator(".js-plotly-plot").last.evaluate(DRAWN)

    def wait_for_title(self, *parts: str) -> str:
        """Wait until the title holds every part, whatever its case; the title. Times out otherwise."""
        title = self.cell.locator(".js-plotly-plot .gtitle")
        for part in parts:
            title = title.filter(has_text=re.compile(rf"(?<![\w.]){re.escape(part)}(?![\w.])", re.I))
        title.last.wait_for()
        return title.last.text_content() or ""


@contextlib.contextmanager
def started(path: str) -> Iterator[Browser]:
    """A headless chromium. Playwright runs one at a time in a process."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", NO_OTHER_HOST])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def page(chromium: Browser, server: Server) -> Iterator[Tab]:
    """A page in that chromium, watched for errors and for requests that would leave the machine."""
    tab = Tab(chromium.new_page(viewport={"width": 1400, "height": 1000}), server)
    tab.page.set_default_timeout(TIMEOUT_S * 1000)
    tab.watch()
    try:
        yield tab
    finally:
        tab.page.close()
