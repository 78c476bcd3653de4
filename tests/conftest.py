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

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(THREADS)

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip gpu tests, with the runtime's own reason, where kernels do not run on a GPU."""
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


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """The command line: run(*arguments) -> (exit status, stdout, stderr)."""
    from moelab import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call
