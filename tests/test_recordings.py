"""recordings: strict, whole, sourced. What `load` would refuse, `write` refuses; nothing broken is left out."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab import recordings, studies
from moelab.errors import RecordingError
from moelab.recordings import Recording

PROVENANCE = {
    "gpu": "NVIDIA H200",
    "driver": "580.1",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cuda": "13.0",
    "python": "3.12.1",
    "git_commit": "0123abc",
    "date": "2026-11-21",
    "moelab": "0.1.0",
}
ROWS = (
    {"impl": "triton", "num_tokens": 1, "samples_us": [1.25, 1.5]},
    {"impl": "torch", "num_tokens": 1, "error": 0.0},
)
GOOD = Recording("sum_reduce", PROVENANCE, {"kind": "graph", "rotations": 8}, ROWS)


def test_round_trip(tmp_path: Path) -> None:
    path = recordings.write(GOOD, tmp_path / "sum_reduce.json")
    assert recordings.load(path) == replace(GOOD, path=path)
    assert recordings.load(str(path)).source() == "recorded on NVIDIA H200, triton 3.6.0, 2026-11-21"


def test_one_row_per_line_and_a_newline_at_the_end(tmp_path: Path) -> None:
    text = recordings.write(GOOD, tmp_path / "x.json").read_text()
    assert text.endswith("}\n")
    assert sum('"impl"' in line for line in text.splitlines()) == len(ROWS)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
json_rows = st.dictionaries(st.text().filter(lambda key: key != "samples_us"), json_values, max_size=4)


@given(st.lists(json_rows, min_size=1, max_size=4))
def test_any_row_of_json_values_comes_back(rows: list[dict]) -> None:
    text = recordings._text({"schema": 1, "suite": "s", "provenance": {}, "protocol": {}, "rows": rows})
    assert json.loads(text)["rows"] == rows


def test_select() -> None:
    assert GOOD.select(impl="triton", num_tokens=1) == [ROWS[0]]
    assert GOOD.select(error=None) == []  # a row without the field is no match for None
    assert GOOD.select() == list(ROWS)


BAD_ROWS = [
    ({"x": math.nan}, "nan in row 0"),
    ({"x": [1.0, {"y": math.inf}]}, "inf in row 0"),
    ({"x": object()}, "holds a object"),
    ({"samples_us": []}, "rows.0.samples_us, where it should have at least 1 item"),
    ({"samples_us": 3.0}, "holds 3.0 at rows.0.samples_us"),
    ({"samples_us": [1.0, 0.0]}, "holds 0.0 at rows.0.samples_us.1, where it should be greater than 0"),
    ({"samples_us": [-1.0]}, "greater than 0"),
    ({"samples_us": [1e30]}, "less than"),
    ({"samples_us": [10**400]}, "rows.0.samples_us.0"),
    ({"samples_us": [True]}, "should be a valid number"),
    ({"samples_us": ["1"]}, "should be a valid number"),
    ({"num_tokens": -1}, "num_tokens"),
    ({"compile_s": -1.0}, "compile_s"),
]


@pytest.mark.parametrize(("row", "named"), BAD_ROWS)
def test_bad_rows_are_not_written(row: dict, named: str, tmp_path: Path) -> None:
    path = recordings.write(GOOD, tmp_path / "sum_reduce.json")
    before = path.read_bytes()
    with pytest.raises(RecordingError, match=named):
        recordings.write(replace(GOOD, rows=(row,)), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["sum_reduce.json"]


@pytest.mark.parametrize("key", recordings.PROVENANCE_KEYS, ids="without_{}".format)
def test_provenance_must_be_whole(key: str, tmp_path: Path) -> None:
    provenance = {k: v for k, v in PROVENANCE.items() if k != key}
    with pytest.raises(RecordingError, match=f"has no {key} in its provenance"):
        recordings.write(replace(GOOD, provenance=provenance), tmp_path / "x.json")


def test_no_rows_and_odd_suite_names(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="at rows, where it should have at least 1 item"):
        recordings.write(replace(GOOD, rows=()), tmp_path / "x.json")
    with pytest.raises(RecordingError, match=r"'\.\./up' at suite"):
        recordings.write(replace(GOOD, suite="../up"), tmp_path / "x.json")


def _edited(**changes: object) -> str:
    content = {"schema": 1, **{k: getattr(GOOD, k) for k in ("suite", "provenance", "protocol")}, "rows": list(ROWS)}
    return json.dumps(content | {"digest": recordings._digest(content)} | changes)


def _sealed(**changes: object) -> str:
    content = json.loads(_edited(**changes))
    return json.dumps(content | {"digest": recordings._digest(content)})


BROKEN_FILES = [
    ("", "not strict JSON"),
    (_edited()[:-40], "not strict JSON"),
    (_edited().replace("1.25", "NaN"), "not strict JSON .*NaN"),
    (_edited().replace("1.25", "-Infinity"), "not strict JSON .*Infinity"),
    (_edited().replace("1.25", "1e999"), "holds 1e999, which is beyond a float"),
    (_edited().replace("1.25", "9" * 5000), "number out of range"),
    (_edited().replace("1.25", "[" * 300 + "]" * 300), "nested deeper than 200"),
    (_edited().replace("triton", "\\ud800", 1), "not strict JSON"),
    (_edited().replace('"rows": [', '"rows": [{"a": 1, "a": 2}, '), "the key 'a' twice"),
    (_edited().replace("1.25", "1.26"), "neither a hand nor the disk"),
    (_edited().replace("580.1", "580.2"), "neither a hand nor the disk"),
    (_edited(digest="0" * 64), "neither a hand nor the disk"),
    (_edited(digest="0"), "digest"),
    (_edited().replace("digest", "Digest"), "Digest|has no digest"),
    ("[]", "should be a valid dictionary"),
    (_sealed(schema=2), "holds 2 at schema, where it should be less than or equal to 1"),
    (_sealed(schema=True), "holds True at schema"),
    (_edited(rows={}), "holds a JSON object at rows"),
    (_edited(rows=[3]), "holds 3 at rows.0"),
    (_edited(rows=[]), "at least 1 item"),
    (_edited(more=1), "the field more, which nothing here knows"),
    (_edited(provenance=None), "provenance"),
    (_sealed(provenance=PROVENANCE | {"gpu": None}), "has no gpu"),
    (_sealed(rows=[{"samples_us": [-1.0]}]), "greater than 0"),
]


@pytest.mark.parametrize(("text", "named"), BROKEN_FILES)
def test_broken_files_are_refused_and_say_how_to_record_again(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "sum_reduce.json"
    path.write_text(text)
    with pytest.raises(RecordingError, match=named) as caught:
        recordings.load(path)
    assert "moelab record sum_reduce" in str(caught.value)


SPECIAL_FILES = {
    "a FIFO": os.mkfifo, "a device": lambda path: path.symlink_to("/dev/zero"), "Is a directory": Path.mkdir,
    "over the": lambda path: (path.touch(), os.truncate(path, 1 << 40)), "no recording": lambda path: path.symlink_to("gone"),
}  # fmt: skip


@pytest.mark.parametrize("words", SPECIAL_FILES)
def test_what_is_no_file_is_not_read(words: str, tmp_path: Path) -> None:
    SPECIAL_FILES[words](tmp_path / "sum_reduce.json")
    with pytest.raises(RecordingError, match=words):
        recordings.load(tmp_path / "sum_reduce.json")


def test_a_file_of_an_older_moelab_is_sealed_and_no_other(tmp_path: Path) -> None:
    path = recordings.write(GOOD, tmp_path / "sum_reduce.json")
    whole = path.read_text()
    with pytest.raises(RecordingError, match="without a digest"):
        recordings.seal(path)
    path.write_text("".join(line for line in whole.splitlines(keepends=True) if '"digest"' not in line))
    with pytest.raises(RecordingError, match=r"has no digest.* python -m moelab\.recordings"):
        recordings.load(path)
    assert recordings.seal(path).read_text() == whole


def test_how_a_file_is_laid_out_is_no_matter(tmp_path: Path) -> None:
    path = recordings.write(GOOD, tmp_path / "sum_reduce.json")
    path.write_bytes(json.dumps(json.loads(path.read_text()), indent=4).replace("\n", "\r\n").encode())
    assert recordings.load(path) == replace(GOOD, path=path)


def test_missing_files_offer_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_DATA_DIR", str(tmp_path))
    recordings.write(GOOD)
    assert (tmp_path / "recordings" / "sum_reduce.json").is_file()
    assert recordings.load("sum_reduce").rows == ROWS
    with pytest.raises(RecordingError, match="Did you mean sum_reduce") as caught:
        recordings.load("sum_reduced")
    assert "moelab record" not in str(caught.value) and "Name one of those" in str(caught.value)


def test_the_remedy_is_a_command_only_where_one_records_it(tmp_path: Path) -> None:
    for name, words in {
        "sum_reduce": "with `moelab record sum_reduce`", "tune_timeline": "with `make tuned`", "zzz": "no suite is called 'zzz'",
    }.items():  # fmt: skip
        for text in (None, "{", "[]"):
            path = tmp_path / f"{name}.json"
            if text:
                path.write_text(text)
            with pytest.raises(RecordingError) as caught:
                recordings.load(path)
            assert words in str(caught.value), caught.value
        assert ("`moelab record" in words) == (name in studies.known())


def test_every_suite_and_every_recording_here_has_its_command() -> None:
    suites = {name for name, command in recordings.MADE_BY.items() if command == f"moelab record {name}"}
    assert suites == set(studies.known())
    assert {entry.suite for entry in recordings.list_recordings()} <= set(recordings.MADE_BY)


def test_a_broken_file_is_listed_with_its_error(tmp_path: Path) -> None:
    recordings.write(GOOD, tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.json").write_bytes(b"\xff\xfe")
    sound, cut, binary = recordings.list_recordings(tmp_path)
    assert sound.recording is not None and sound.error is None
    assert cut.recording is None and "not strict JSON" in str(cut.error)
    assert binary.recording is None and "not strict JSON" in str(binary.error)
    assert recordings.list_recordings(tmp_path / "nowhere") == []


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recordings.write(GOOD, tmp_path / "x.json")
    before = path.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recordings.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        recordings.write(replace(GOOD, rows=(ROWS[0],)), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_every_recording_in_the_repository_is_sound() -> None:
    assert [(entry.suite, entry.error) for entry in recordings.list_recordings() if entry.error] == []
