"""moelab.writing: the old file or the new one, whole, whatever ends the process or refuses the bytes; a pair of files as one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from itertools import count
from pathlib import Path

import pytest
from cut_short import as_another_user, killed_at, with_room_for

from moelab import writing
from moelab.errors import WriteError

OLD, NEW = "old\n" * 3000, "new\n" * 4000


def files_in(folder: Path) -> list[str]:
    """But for the one that its writer holds."""
    return sorted(name for name in os.listdir(folder) if name != writing.LOCK)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "configs"


# --- one file -----------------------------------------------------------------------------------------------------


def test_a_kill_before_any_act_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path, seen = tmp_path / "file", set()
    for act in count():
        path.write_text(OLD)
        done = killed_at(act, tmp_path, lambda: writing.write(path, NEW))
        seen.add(path.read_text())
        if done:
            break
    assert act >= 3 and seen == {OLD, NEW} and path.read_text() == NEW


@pytest.mark.parametrize("size", [0, 1, 4096, 12000])
def test_no_room_leaves_the_old_file_and_nothing_beside_it(size: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(OLD)
    status, said = with_room_for(size, lambda: writing.write(path, NEW))
    assert status == 1 and "File too large" in said
    assert path.read_text() == OLD and os.listdir(tmp_path) == ["file"]
    assert f"'{path}'" in said, "the error names the file that was to be written, not a temporary one"


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_a_new_file_has_what_the_umask_leaves_it_and_an_old_one_what_it_had(
    mask: int, mode: int, tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        path = writing.write(tmp_path / "file", "a")
        assert stat.S_IMODE(path.stat().st_mode) == mode
        path.chmod(0o640)
        writing.write(path, "b")
        with writing.locked(tmp_path), writing.together({path: "c", tmp_path / "new": "d"}):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and stat.S_IMODE((tmp_path / "new").stat().st_mode) == mode


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, told in ((tmp_path / "pipe", "Not a regular file"), (tmp_path, "directory")):
        with pytest.raises(OSError, match=told) as error:
            writing.write(path, NEW)
        assert error.value.filename == str(path)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    for name in ("x" * 255, "ü" * 127):
        assert writing.write(tmp_path / name, NEW).read_text() == NEW


def test_what_a_killed_process_left_goes_in_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert not killed_at(2, tmp_path, lambda: writing.write(path, NEW))
    (rest,) = tmp_path.iterdir()
    writing.write(path, OLD)
    assert rest.exists(), "it may be another's, under way"
    os.utime(rest, (0, 0))
    writing.write(path, OLD)
    assert files_in(tmp_path) == ["file"]


def test_files_made_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ZeroDivisionError), writing.replacing_all(paths) as files:
        files[0].write_text(NEW)
        raise ZeroDivisionError
    assert not os.listdir(tmp_path)
    with writing.replacing_all(paths) as files:
        for file in files:
            file.write_text(NEW)
    assert {path.read_text() for path in paths} == {NEW} and files_in(tmp_path) == ["a", "b"]


# --- a pair -------------------------------------------------------------------------------------------------------


def pair(folder: Path) -> tuple[str | None, ...]:
    """What a peer's loader sees of up and down, which knows of no record."""
    found: list[str | None] = []
    for path in (folder / "up.json", folder / "down.json"):
        try:
            found.append(path.read_text())
        except FileNotFoundError:
            found.append(None)
    return tuple(found)


def put(folder: Path, text: str) -> None:
    with writing.locked(folder), writing.together({folder / "up.json": text, folder / "down.json": text}):
        pass


def lay(folder: Path, up: str | None, down: str | None) -> None:
    """The folder with these files and nothing else."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, text in (("up.json", up), ("down.json", down)):
        if text is not None:
            (folder / name).write_text(text)


@pytest.mark.parametrize("before", [(OLD, OLD), (OLD, None), (None, None)])
def test_a_kill_before_any_act_leaves_both_old_files_or_both_new_ones(before: tuple, folder: Path) -> None:
    seen, peers = set(), set()
    for act in count():
        lay(folder, *before)
        done = killed_at(act, folder, lambda: put(folder, NEW))
        peers.add(pair(folder))
        writing.settle(folder)
        seen.add(pair(folder))
        assert not os.path.lexists(folder / writing.RECORD)
        put(folder, OLD)
        assert files_in(folder) == ["down.json", "up.json"] and pair(folder) == (OLD, OLD)
        if done:
            break
    assert act >= 15 and seen == {before, (NEW, NEW)}
    assert peers <= {before, (before[0], None), (NEW, None), (NEW, NEW)}, "no loader may see a mixture"
    assert (NEW, None) in peers, "it was killed between the two"


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.whole)])
def test_a_kill_while_it_is_put_back(step: int, folder: Path) -> None:
    """From each state that a kill can leave, at each act of putting back: no mixture, and the next one ends it."""
    tried = 0
    for first in count(step=step):
        lay(folder, OLD, OLD)
        if killed_at(first, folder, lambda: put(folder, NEW)):
            break
        if not (folder / writing.RECORD).exists():
            continue
        for act in count():
            if killed_at(act, folder, lambda: writing.settle(folder)):
                break
            tried += 1
            assert pair(folder) in {(OLD, OLD), (OLD, None), (NEW, None), (NEW, NEW)}
        writing.settle(folder)
        assert pair(folder) == (OLD, OLD)
    assert tried > 24 / step


@pytest.mark.parametrize("size", [0, 1, 100, 4096, 12000])
def test_no_room_leaves_both(size: int, folder: Path) -> None:
    lay(folder, OLD, OLD)
    status, said = with_room_for(size, lambda: put(folder, NEW))
    assert status == 1 and "File too large" in said and str(folder / "up.json") in said
    assert pair(folder) == (OLD, OLD) and files_in(folder) == ["down.json", "up.json"]


def test_a_file_system_without_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    test_a_kill_before_any_act_leaves_both_old_files_or_both_new_ones((OLD, OLD), folder)


def test_what_is_not_found_good_is_put_back(folder: Path) -> None:
    put(folder, OLD)
    texts = {folder / "up.json": NEW, folder / "down.json": NEW}
    with pytest.raises(ZeroDivisionError), writing.locked(folder), writing.together(texts):
        assert pair(folder) == (NEW, NEW)
        writing.settle(folder)  # by who looks whether it is good
        assert pair(folder) == (NEW, NEW)
        raise ZeroDivisionError
    assert pair(folder) == (OLD, OLD) and files_in(folder) == ["down.json", "up.json"]


def test_a_reader_who_may_not_write_is_told(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    folder = Path(tempfile.mkdtemp())  # pytest's own are closed to other users
    request.addfinalizer(lambda: shutil.rmtree(folder))
    monkeypatch.setattr(writing, "GLANCE_S", 0.1)
    put(folder, OLD)
    (folder / writing.RECORD).write_text("[]")
    folder.chmod(0o555)
    status, said = as_another_user(lambda: writing.settle(folder))
    assert status == 1 and f"WriteError: A write into {folder} was cut short" in said
    writing.settle(folder)


@pytest.mark.parametrize(
    "record",
    [
        "", "{", "[" * 100_000, "1", '["a"]', '[{"name": "up.json"}]',
        '[{"name": "../up.json", "new": ".a.moelab-new", "old": null}]',
        '[{"name": "up.json", "new": "down.json", "old": null}]',
        '[{"name": "up.json", "new": ".a.moelab-new", "old": "down.json"}]',
        '[{"name": 5, "new": ".a.moelab-new", "old": null}]', '[{"name": ["a"], "new": ".a.moelab-new", "old": null}]',
    ],
)  # fmt: skip
def test_a_record_of_no_ones_is_not_followed(record: str, folder: Path) -> None:
    put(folder, OLD)
    (folder / writing.RECORD).write_text(record)
    with pytest.raises(WriteError, match=r"cut short.*Expected a folder.*moelab doctor"):
        writing.settle(folder)
    with pytest.raises(WriteError, match="cut short"):
        put(folder, NEW)
    assert pair(folder) == (OLD, OLD)


def test_a_record_that_is_a_pipe_or_a_link(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "GLANCE_S", 0.1)
    put(folder, OLD)
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        make(folder / writing.RECORD)
        with pytest.raises(WriteError, match="cut short"):
            writing.settle(folder)
        (folder / writing.RECORD).unlink()


def test_writers_wait_for_each_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = folder / "total"
    folder.mkdir()
    writing.write(total, "0")

    def add() -> None:
        for _ in range(20):
            with writing.locked(folder):
                writing.write(total, str(int(total.read_text()) + 1))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total.read_text() == "80"
    monkeypatch.setattr(writing, "LOCK_LIMIT_S", 0.05)
    told: list[Exception] = []

    def late() -> None:
        try:
            with writing.locked(folder):
                raise AssertionError("two hold it")
        except WriteError as error:
            told.append(error)

    with writing.locked(folder):
        thread = threading.Thread(target=late)
        thread.start()
        thread.join()
    assert "Another process has been writing" in str(told[0])


LOOP = """
import sys; from pathlib import Path; from test_writing import put
for number in range(10**6):
    put(Path(sys.argv[1]), f"{number:06d} " * 3000)
"""


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.whole)])
def test_kills_at_random_moments(kills: int, folder: Path) -> None:
    """Of a process that replaces a pair again and again; each moment from a seed."""
    moments, last = random.Random(22), set()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    for _ in range(kills):
        child = subprocess.Popen([sys.executable, "-c", LOOP, str(folder)], env=environment)
        begun = pair(folder)
        while pair(folder) == begun:
            assert child.poll() is None
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.wait()
        up, down = pair(folder)
        assert up is not None and down in (None, up) and len(up) == 21000
        writing.settle(folder)
        up, down = pair(folder)
        assert up == down and len(set(up.split())) == 1
        assert not (folder / writing.RECORD).exists()
        last.add(int(up[:6]))
        put(folder, "-00001 " * 3000)
    assert max(last) >= 0, "it had written"


def test_the_package_writes_by_no_other_way() -> None:
    """Every module but `writing`, and what appends (a journal) or fills a temporary file of its own."""
    import ast

    allowed = {"moelab/writing.py", "moelab/tuner/journal.py"}
    calls = ("write_text", "write_bytes", "mkstemp", "copyfile", "copy2", "rename", "savefig", "to_csv", "to_parquet")
    root = Path(writing.__file__).parent.parent
    found = []
    for path in sorted((root / "moelab").rglob("*.py")):
        name = str(path.relative_to(root))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and name not in allowed and "temporary." not in ast.unparse(node.func):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                mode = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
                opens = called == "open" and any(
                    isinstance(m, str) and set(m) & set("wax+") and len(m) < 4 for m in mode
                )
                found += [f"{name}:{node.lineno} {called}"] if called in calls or opens else []
    assert found == []
