"""What every test stands on: threads, Triton's mode, hypothesis, and who is skipped and why."""

from __future__ import annotations

import os

# Two test processes on two cores: more threads each would only fight, and numpy (Triton's interpreter) and
# torch both read this once, while they are imported.
THREADS = 1 if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1 else 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("OPENBLAS_NUM_THREADS", str(THREADS))

from moelab import runtime  # noqa: E402

RUNTIME = runtime.prepare_triton()

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if TYPE_CHECKING:
    from browser import Server, Tab
    from playwright.sync_api import Browser

torch.set_num_threads(THREADS)

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


WHOLE_LIMIT_S = 900
"""Seconds for one of `make whole`: some take a minute on two cores, and a machine may be three times as slow and busy."""


@pytest.hookimpl(trylast=True)  # what is left out is gone by then
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip gpu tests, with the runtime's own reason, where kernels do not run on a GPU. The browser's tests, the longest after
    the notebooks, are the first of the second process, which begins where the first one's share ends; so one page serves all."""
    browsing = [item for item in items if item.get_closest_marker("browser")]
    others = [item for item in items if not item.get_closest_marker("browser")]
    second = len(items) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "2")) + 1
    items[:] = [*others[:second], *browsing, *others[second:]]
    for item in items:
        if item.get_closest_marker("whole") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(WHOLE_LIMIT_S))
    if RUNTIME.mode == "gpu":
        return
    skip = pytest.mark.skip(reason=f"needs a GPU: {RUNTIME.reason}")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers for a test whatever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors must lie for kernels to run in this process: "cuda" or "cpu"."""
    return RUNTIME.device


@pytest.fixture(scope="session")
def jupyterlab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The one JupyterLab of the browser tests, whichever test process they run in."""
    from browser import shared_lab

    mine = tmp_path_factory.getbasetemp()  # pytest-xdist gives each of its processes a folder in the run's own
    with shared_lab((mine.parent if os.environ.get("PYTEST_XDIST_WORKER") else mine) / "jupyterlab") as server:
        yield server


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """The real chromium of the browser tests of a process."""
    from browser import chromium_or_skip, started

    with started(chromium_or_skip()) as found:
        yield found


@pytest.fixture(scope="session")
def one_page(chromium: Browser, jupyterlab: Server) -> Iterator[Tab]:
    """One page on JupyterLab, for all of them."""
    from browser import page

    with page(chromium, jupyterlab) as opened:
        yield opened


@pytest.fixture
def tab(request: pytest.FixtureRequest, one_page: Tab) -> Iterator[Tab]:
    """That page on JupyterLab, nothing seen yet, with a folder of its own that looks like the checkout."""
    from browser import copy_of_the_checkout

    one_page.folder = copy_of_the_checkout(Path(one_page.server.root) / request.node.name)
    one_page.console_errors.clear()
    one_page.outside.clear()
    yield one_page
    one_page.close()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """The command line: run(*arguments) -> (exit status, stdout, stderr)."""
    from moelab import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call
