"""What moelab writes, at its own doors, on a disk that refuses and in processes that are killed: old files stay whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from cut_short import killed_at, with_room_for
from sampling import whole
from synthetic import small_problem, synthetic_landscape

from moelab import cli, recordings, runtime, writing
from moelab import config_files as cf
from moelab.config import KernelConfig
from moelab.errors import ConfigFileError
from moelab.plots import handover
from moelab.suites.partial import keeper
from moelab.tuner import export as tuner_export
from moelab.tuner import landscape, repro
from moelab.tuner.results import BatchResult, TuneResult

PROBLEM = small_problem((1, 64))
MEASURED = synthetic_landscape(PROBLEM, samples=3)
SIZES = (0, 1, 2, 64, 100, 512, 1000, 1500, 3000, 5000, 20_000, 40_000)
"""Bytes that a file may have on the disk that refuses the rest."""


def configs(rows: int, sizes: range) -> dict[int, KernelConfig]:
    return {b: KernelConfig(rows, 64, 64, 1) for b in sizes}


def result(rows: int, sizes: range = range(1, 9)) -> TuneResult:
    """A finished run whose winners have BLOCK_SIZE_M = rows in both GEMMs."""
    found = configs(rows, sizes)
    batches = {b: BatchResult(b, config, replace(config, num_stages=2)) for b, config in found.items()}
    return TuneResult(PROBLEM, batches, "made up", 1.0, (), {})


def recording(rows: int) -> recordings.Recording:
    made = tuple({"shape": "a", "samples_us": [1.0 + i] * 40} for i in range(rows))
    return recordings.Recording("slow", runtime.provenance(seed=0), {"kind": "test"}, made)


def exported(folder: Path, rows: int) -> None:
    handover.write(result(rows), "moelab", folder, overwrite=True)


WRITERS: dict[str, Callable[[Path, int], object]] = {
    "config file": lambda folder, n: cf.write_config_file(folder / "x.json", configs(n, range(1, n))),
    "exported pair": exported,
    "tuned pair": lambda folder, n: result(n, range(1, 17)).write(folder),
    "recording": lambda folder, n: recordings.write(recording(n), folder / "slow.json"),
    "partial": lambda folder, n: keeper("slow", folder / f"{n}" / "slow.json")(recording(n).rows),
    "landscape": lambda folder, n: landscape.write(
        replace(MEASURED, rows=MEASURED.rows[: 9 * n]), folder / "l.parquet"
    ),
    "Kernel Tuner": lambda folder, n: tuner_export.export(MEASURED, folder, "kernel_tuner"),
    "repro": lambda folder, n: repro.write(folder, PROBLEM, "up", 1, (KernelConfig(16, 64, 64, 1),), "crash", "x" * n),
}
"""Writes something of about the size given into a folder."""


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but those of its writers."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != writing.LOCK
    }


@pytest.mark.parametrize("every", [3, whole(1)])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_files_and_none_beside_them(name: str, every: int, tmp_path: Path) -> None:
    """Four sizes, or twelve: what was refused changed nothing, what was not is what it would be on any disk."""
    write = WRITERS[name]
    write(tmp_path / "new", 64)
    new, refused = content(tmp_path / "new"), 0
    for size in SIZES[::every]:
        folder = tmp_path / str(size)
        write(folder, 16)
        before = content(folder)
        status, said = with_room_for(size, lambda folder=folder: write(folder, 64))
        after = content(folder)
        if status == 0:
            assert set(after) == set(new) | set(before) and not any(".tmp" in path for path in after)
        else:
            assert after == before and "File too large" in said and str(folder) in said, said
            refused += 1
    assert refused >= 6 // every


MOUNTED = """
import errno, os, sys; from pathlib import Path
from test_files_whole import WRITERS, content
disk = Path(sys.argv[1])
tried = 0
for name, write in WRITERS.items():
    folder = disk / name
    write(folder, 16)
    before = content(folder)
    room = os.open(disk / "room", os.O_CREAT | os.O_WRONLY)
    try:
        while os.write(room, bytes(4096)): pass
    except OSError as error:
        assert error.errno == errno.ENOSPC
    for pages in range(6):  # of 4 KiB, given back one by one
        try:
            write(folder, 64)
        except OSError as error:
            assert error.errno == errno.ENOSPC and str(folder) in str(error), error
            assert content(folder) == before, name
            tried += 1
        else:
            before = content(folder)
        size = os.fstat(room).st_size
        os.truncate(room, size - 4096)
    os.close(room)
    os.unlink(disk / "room")
    write(folder, 64)
assert tried >= len(WRITERS), tried
"""


@pytest.mark.whole
def test_a_small_disk_that_is_full(tmp_path: Path) -> None:
    """A real one, of 4 MiB, in a name space of its own."""
    script = 'mount -t tmpfs -o size=4m tmpfs "$1" && shift && exec "$@"'
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here (unshare -rm)")
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, "-c", MOUNTED, str(tmp_path)]
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": here}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


# --- a pair -------------------------------------------------------------------------------------------------------


def block_m(folder: Path) -> tuple[set[int], set[int]]:
    """BLOCK_SIZE_M in the up and the down file, as a peer's loader reads them: nothing where there is no file."""
    found = [set(), set()]
    for path in folder.glob("triton_3_6_0/E=*.json"):
        entries = json.loads(path.read_text()).values()
        found["_down" in path.name].update(entry["BLOCK_SIZE_M"] for entry in entries)
    return found[0], found[1]


@pytest.mark.parametrize("how", [whole("export"), "tune"])
def test_a_killed_pair_is_the_old_one_or_the_new_one(how: str, tmp_path: Path) -> None:
    """Before: `export` and `tune` left the new up file beside the old down file, two BLOCK_SIZE_M for one sort by expert."""
    write = exported if how == "export" else lambda folder, rows: result(rows).write(folder)
    peers, ours = [], []
    for act in count():
        folder = tmp_path / str(act)
        write(folder, 16)
        done = killed_at(act, folder, lambda folder=folder: write(folder, 64))
        peers.append(block_m(folder))
        tree = cf.sources(folder)
        ours.append({row.BLOCK_SIZE_M for source in tree for row in source.configs.values()})
        assert len(tree) == 2
        if done:
            break
    assert act >= 15 and all(found in ({16}, {64}) for found in ours) and {16} in ours and ours[-1] == {64}
    assert all(up | down in ({16}, {64}) and up for up, down in peers), (
        "a loader may see one up file alone, but no mixture"
    )
    assert ({64}, set()) in peers, "it was killed between the two"


def test_a_lookup_reads_what_was_there_before_a_killed_write(tmp_path: Path) -> None:
    exported(tmp_path, 16)
    for act in count():
        assert not killed_at(act, tmp_path, lambda: exported(tmp_path, 64)), "it was never killed between the two"
        if block_m(tmp_path) == ({64}, set()):
            break
    found = cf.lookup(8, 512, PROBLEM.device, num_tokens=1, triton_version="3.6.0", down=True, config_dir=tmp_path)
    assert found.config is not None and (found.config.BLOCK_SIZE_M, found.config.num_stages) == (16, 2)
    assert "_down" in str(found.path)


def test_two_tuners_into_one_file_lose_no_batch_size(tmp_path: Path) -> None:
    """Each writes one batch size of its own at a time. Before: of 40, about half were left."""
    children = []
    for first in (1, 101):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for b in range(first, first + 20):
                    result(16, range(b, b + 1)).write(tmp_path)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    for source in cf.sources(tmp_path):
        assert sorted(source.configs) == [*range(1, 21), *range(101, 121)]


def test_an_up_file_alone_may_not_differ_from_the_down_file_that_stays(tmp_path: Path) -> None:
    """Before: it was replaced, and the two had two BLOCK_SIZE_M."""
    exported(tmp_path, 16)
    before = content(tmp_path)
    up = cf.sources(tmp_path)[0]
    new = configs(64, range(1, 9))
    with pytest.raises(ConfigFileError, match=r"_down.json, which stays, .*BLOCK_SIZE_M = 16.*has 64.*both at once"):
        cf.export(new, up.name, rules="moelab", out=tmp_path, triton_version="3.6.0", overwrite=True)
    assert content(tmp_path) == before


def test_export_writes_the_pairs_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over a pair of other blocks, which file by file was refused in either order."""
    exported(tmp_path / "new", 64)
    exported(tmp_path / "old", 16)
    arguments = ["export", str(tmp_path / "new"), "--rules", "moelab", "--out", str(tmp_path / "old"), "--overwrite"]
    assert cli.main(arguments) == 0
    assert block_m(tmp_path / "old") == ({64}, {64})
