"""fast_layer.cu under ThreadSanitizer, on the emulated chip: every pair of accesses is ordered by a barrier or a count."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moelab.kernels.fast_instances import SOURCE

CHILD = """
import sys
from pathlib import Path
import torch
import emulated_gpu
from moelab.kernels.fast_instances import Instance
from moelab.kernels.token_tiles import token_tiles_ref
torch.set_num_threads(1)
instance = Instance(2, 1, 2, 32, 16, 16)
library = emulated_gpu.built(instance, torch.float16, Path(sys.argv[1]), True)
x, w13, w2 = torch.rand(32, 264).half() / 16, torch.rand(2, 80, 264).half(), torch.rand(2, 264, 40).half()
ids = torch.tensor([[0, 1]] * 32, dtype=torch.int32)
slots = torch.cat([torch.arange(0, 64, 2), torch.arange(1, 64, 2)]).int()
offsets = torch.tensor([0, 32, 64], dtype=torch.int32)
tiles = token_tiles_ref(slots, offsets, 32, 16)
out, *_ = emulated_gpu.run_layer(x, w13, w2, torch.rand(32, 2), ids, tiles, instance, library=library)
print("finite" if out.isfinite().all() else "wrong")
"""


def races_of(source: Path) -> str:
    """What ThreadSanitizer says of a launch whose two blocks have three tiles of GEMM2 each.

    Experts have whole boxes of rows: TMA reads the rows past a tile's last as well, which another block may just be
    writing. They become columns of the product that nobody reads.
    """
    found = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True).stdout
    # Its shadow memory wants addresses that newer kernels' randomisation may have taken.
    command = [*(["setarch", "-R"] if shutil.which("setarch") else []), sys.executable, "-c"]
    environment = {
        **os.environ, "LD_PRELOAD": found.strip(), "TSAN_OPTIONS": "exitcode=0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }  # fmt: skip
    probe = subprocess.run([*command, "print('up')"], capture_output=True, text=True, env=environment, check=False)
    if probe.stdout != "up\n":
        pytest.skip(f"ThreadSanitizer does not start here: {(probe.stderr or 'no message')[:200]}")
    run = subprocess.run(
        [*command, CHILD, str(source)], capture_output=True, text=True, env=environment, check=True, timeout=300
    )
    return run.stdout + run.stderr


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++, which emulates the chip")
def test_no_two_threads_race() -> None:
    said = races_of(SOURCE)
    assert "data race" not in said and said.startswith("finite"), said[:4000]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++, which emulates the chip")
def test_a_barrier_that_is_missing_is_seen(tmp_path: Path) -> None:
    barrier = "    named_barrier(CONSUMERS + threadIdx.x / 128 - 1, 128);\n    if (threadIdx.x % 128 == 0) add_release"
    for path in [SOURCE, *SOURCE.parent.glob("*.cuh")]:
        (tmp_path / path.name).write_text(path.read_text())
    sums = tmp_path / "fast_sums.cuh"
    text = sums.read_text()
    assert text.count(barrier) == 1
    sums.write_text(text.replace(barrier, barrier.splitlines()[1]))
    assert "data race" in races_of(tmp_path / SOURCE.name)
