"""The journal: whole lines or none, one writer, and a disk that may be full."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moelab.config import KernelConfig
from moelab.errors import JournalError
from moelab.tuner.evaluate import Outcome, Request, Result
from moelab.tuner.journal import Journal, read
from moelab.tuner.journal_lines import encode, packed

HEADER = {"provenance": {}, "problem": {}, "strategy": {}, "space": {}, "evaluator": {}}
CONFIG = KernelConfig(16, 32, 64, 1)


def result(i: int = 1, failure: str | None = None) -> Result:
    pair = (CONFIG, KernelConfig(16, 64, 128, 16, 8, 4, SPLIT_K=2))
    outcomes = (
        Outcome((1.25, 2.5), measure_s=0.001),
        Outcome((), failure, "why") if failure else Outcome((0.1 + 0.2,)),
    )
    return Result(Request("layer", i, (pair, pair[:1] * 2), 2, True, None, i), outcomes)


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "run.jsonl", HEADER)
    given = [result(1), result(2, "timeout"), Result(Request("up", 1, ((CONFIG,),), 0), (Outcome(compile_s=0.25),))]
    given.append(Result(Request("down", 8, ((CONFIG,),), 3, stop_above_us=12.3456), (Outcome((12.4,)),)))
    for one in given:
        journal.append(one)
    journal.note("phase", name="screen", clock_s=1.5)
    journal.close()
    content = read(tmp_path / "run.jsonl")
    assert list(content.results.values()) == given and list(content.results) == [r.request.key() for r in given]
    assert [(n["kind"], n["name"]) for n in content.notes] == [("phase", "screen")]
    assert all(at.endswith("+00:00") for at in content.times.values())


def test_keys_tell_requests_apart() -> None:
    base = Request("up", 1, ((CONFIG,),), 3)
    others = [
        Request("down", 1, ((CONFIG,),), 3),
        Request("up", 2, ((CONFIG,),), 3),
        Request("up", 1, ((KernelConfig(16, 32, 64, 16),),), 3),
        Request("up", 1, ((CONFIG,), (CONFIG,)), 3),
        Request("layer", 1, ((CONFIG, CONFIG),), 3),
        Request("up", 1, ((CONFIG,),), 4),
        Request("up", 1, ((CONFIG,),), 3, True),
        Request("up", 1, ((CONFIG,),), 3, False, 5.0),
        Request("up", 1, ((CONFIG,),), 3, repeat=1),
    ]
    assert len({r.key() for r in [base, *others]}) == 10
    assert base.key() == Request("up", 1, ((KernelConfig(16, 32, 64, 1),),), 3).key()


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_torn_last_line_is_ignored_then_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal.create(path, HEADER)
    journal.append(result(1))
    journal.append(result(2))
    journal.close()
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(read(path).results) == 1
    journal = Journal.resume(path)
    journal.append(result(3))
    journal.close()
    assert [r.request.num_tokens for r in read(path).results.values()] == [1, 3]


def test_a_torn_line_leaves_nothing_behind_a_shorter_one(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal.create(path, HEADER)
    journal.append(result(1))
    journal.close()
    path.write_bytes(path.read_bytes()[:-1])
    journal = Journal.resume(path)
    journal.note("phase", name="screen")
    journal.close()
    assert [note["kind"] for note in read(path).notes] == ["phase"] and not read(path).results
    assert path.read_bytes().endswith(b"}\n") and read(path).whole_bytes == path.stat().st_size


def test_a_torn_header_counts_as_no_run(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"kind":"hea')
    with pytest.raises(JournalError, match="holds no run yet"):
        Journal.resume(path)
    Journal.create(path, HEADER).close()
    assert read(path).header["schema"] == 1


def test_two_tuners_on_one_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    first = Journal.create(path, HEADER)
    for way in (lambda: Journal.resume(path), lambda: Journal.create(path, HEADER)):
        with pytest.raises(JournalError, match="Another tuner"):
            way()
    first.append(result())  # the one that was first goes on
    first.close()
    Journal.resume(path).close()
    with pytest.raises(JournalError, match="already"):
        Journal.create(path, HEADER)
    assert len(read(path).results) == 1


@pytest.mark.parametrize("bad", ['{"kind":"result"}', "not json", "[1]", '{"kind":"result","key":"00","outcomes":[]}'])
def test_damage_before_the_end_is_named_by_its_line(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal.create(path, HEADER)
    journal.append(result())
    journal.close()
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], bad, lines[1], ""]))
    with pytest.raises(JournalError, match="Line 2 "):
        read(path)


def test_a_result_that_was_tampered_with_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal.create(path, HEADER)
    journal.append(result())
    journal.close()
    path.write_text(path.read_text().replace('"BLOCK_SIZE_N":32', '"BLOCK_SIZE_N":64'))
    with pytest.raises(JournalError, match=r"Line 2 .* its digest is of something else"):
        read(path)


LINE = {
    "kind": "result", "key": result().request.key(), "stage": "layer", "num_tokens": 1, "rounds": 2, "interleaved": True,
    "repeat": 1, "outcomes": encode(result())["outcomes"], "at": "2026-11-30T00:00:00.000+00:00",
}  # fmt: skip


def changed(**fields: object) -> dict:
    return LINE | {"outcomes": [LINE["outcomes"][0] | fields, LINE["outcomes"][1]]}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (changed(samples_us=[-1.0, 2.0]), "holds -1.0 at outcomes.0.samples_us.0"),
        (changed(samples_us=[0, 2.0]), "greater than 0"),
        (changed(samples_us="x"), "samples_us"),
        (changed(samples_us=None), "samples_us"),
        (changed(samples_us=["x"]), "samples_us.0"),
        (changed(samples_us=[10**400]), "samples_us.0"),
        (changed(samples_us=[True]), "samples_us.0"),
        (changed(samples_us=[1.0] * 3), "3 samples where none, or 2, can be"),
        (changed(failure="timeout"), "2 samples where none"),
        (changed(samples_us=[], failure="tired"), "no class of failure"),
        (changed(compile_s=-1.0), "compile_s"),
        (changed(measure_s="1"), "measure_s"),
        (changed(configs=LINE["outcomes"][0]["configs"][:1]), "key"),
        (changed(configs=[]), "at least 1 item"),
        (changed(more=1), "the field outcomes.0.more, which nothing here knows"),
        (LINE | {"more": 1}, "the field more"),
        (LINE | {"num_tokens": -1}, "num_tokens"),
        (LINE | {"rounds": 3}, "key"),
        (LINE | {"at": 5}, "holds 5 at at"),
        ({"kind": "lunch", "at": LINE["at"]}, "'lunch' at kind"),
        ({"kind": "phase", "clock_s": -1, "at": LINE["at"]}, "clock_s"),
        ({"kind": "resumed", "budget_s": "5m", "at": LINE["at"]}, "budget_s"),
    ],
)
@pytest.mark.parametrize("sealed", [True, False])
def test_a_line_keeps_to_its_schema(tmp_path: Path, line: dict, words: str, sealed: bool) -> None:
    """With a right digest, and as an older moelab wrote it, with none."""
    lines = [{"kind": "header", "schema": 1, **HEADER, "at": LINE["at"]}, line]
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"".join(packed(one) if sealed else json.dumps(one).encode() + b"\n" for one in lines))
    with pytest.raises(JournalError, match=f"Line 2 .*{words}"):
        read(path)
    path.write_bytes(b"".join(packed(one) if sealed else json.dumps(one).encode() + b"\n" for one in [lines[0], LINE]))
    assert list(read(path).results.values()) == [result()]


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b'"\\ud800"', b"\xff", b"NaN", b"[]", b"5"]
)
@pytest.mark.parametrize("first", [True, False])
def test_what_is_no_line_is_refused(tmp_path: Path, text: bytes, first: bool) -> None:
    path = tmp_path / "run.jsonl"
    Journal.create(path, HEADER).close()
    path.write_bytes(text + b"\n" if first else path.read_bytes() + text + b"\n")
    with pytest.raises(JournalError, match="Line 1 " if first else "Line 2 "):
        read(path)


def test_one_flipped_bit_of_a_journal_is_found(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal.create(path, HEADER)
    journal.append(result())
    journal.close()
    data, whole = path.read_bytes(), read(path)
    for at in range(len(data) - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        try:
            assert read(path).header == whole.header and not whole.results.keys() - read(path).results.keys()
        except JournalError:
            continue
        raise AssertionError(f"byte {at} was believed")


@pytest.mark.parametrize("way", [read, Journal.resume])
def test_what_is_no_file_is_no_journal(tmp_path: Path, way: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("fifo", "zeros", "."):
        with pytest.raises(JournalError, match=r"special file|FIFO|device|directory"):
            way(tmp_path / name)


def test_a_full_disk_leaves_a_readable_run(tmp_path: Path) -> None:
    """In a child, because a limit on the size of files cannot be taken back."""
    path = tmp_path / "run.jsonl"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            journal = Journal.create(path, HEADER)
            for i in range(1, 100):
                journal.append(result(i))
        except JournalError as error:
            status = 0 if "full" in str(error) and "--resume" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    kept = read(path)
    assert 0 < len(kept.results) < 99 and kept.whole_bytes == path.stat().st_size <= 2000
    journal = Journal.resume(path)
    journal.append(result(500))
    journal.close()
    assert len(read(path).results) == len(kept.results) + 1
    json.loads(path.read_text().splitlines()[-1])


def begun(path: Path) -> Journal:
    journal = Journal.create(path, HEADER)
    journal.append(result(1))
    return journal


@pytest.mark.parametrize("how", ["removed", "folder", "folders", "replaced", "moved"])
def test_a_journal_that_is_gone_ends_the_run_and_is_kept_elsewhere(tmp_path: Path, how: str) -> None:
    path = tmp_path / "tuned" / "runs" / "run.jsonl"
    journal = begun(path)
    whole = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "moved":
        path.rename(path.with_name("other.jsonl"))
    elif how == "replaced":
        path.with_name("new").write_text("{}\n")
        path.with_name("new").replace(path)
    else:
        shutil.rmtree(path.parent if how == "folder" else path.parent.parent)
    with pytest.raises(JournalError, match="replaced by another" if how == "replaced" else "was removed") as caught:
        journal.append(result(2))
    journal.close()
    kept = Path(str(caught.value).rpartition("--resume ")[2].removesuffix("."))
    assert tmp_path in kept.parents and kept.read_bytes() == whole
    again = Journal.resume(kept)
    again.append(result(2))
    again.close()
    assert len(read(kept).results) == 2
    assert how != "replaced" or path.read_text() == "{}\n"


@pytest.mark.parametrize("how", ["emptied", "shortened", "written to"])
def test_a_journal_that_another_program_wrote_to_ends_the_run(tmp_path: Path, how: str) -> None:
    """To write on where it ended would leave a hole, or a line amid another one."""
    path = tmp_path / "run.jsonl"
    journal = begun(path)
    whole = path.read_bytes()
    changed = {"emptied": b"", "shortened": whole[:-7], "written to": whole + b"# looked at\n"}[how]
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(changed)
    for call in (lambda: journal.append(result(2)), lambda: journal.note("finished")):
        with pytest.raises(JournalError, match="another program"):
            call()
    journal.close()
    assert path.read_bytes() == changed


def test_a_disk_that_refuses_at_the_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some disks say that they are full only when they are asked to hold what they took."""
    journal = begun(tmp_path / "run.jsonl")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JournalError, match="full"):
        journal.close()
    journal.close()


def test_a_disk_that_takes_a_part_and_then_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even that what it took be cut off again: the line stays torn, as after a kill."""
    path = tmp_path / "run.jsonl"
    journal, real = begun(path), os.pwrite
    end = path.stat().st_size

    def failing(handle: int, data: bytes, offset: int) -> int:
        if offset > end:
            raise OSError(5, "Input/output error")
        return real(handle, data[:9], offset)

    def refused(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pwrite", failing)
    monkeypatch.setattr(os, "ftruncate", refused)
    with pytest.raises(JournalError, match="Input/output"):
        journal.append(result(2))
    monkeypatch.undo()
    journal.close()
    assert path.stat().st_size == end + 9 and len(read(path).results) == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "run.jsonl", tmp_path / "file" / "runs" / "run.jsonl", tmp_path):
        with pytest.raises(JournalError, match="Cannot begin"):
            Journal.create(path, HEADER)
