"""The widgets of 06_config_health follow their controls, and a broken drawing function fails the notebook's cell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import specimen
from broken_cells import assert_each_fails
from test_transfer import made
from test_widgets import control, shown, title

from moelab import config_files, runtime, widgets
from moelab.formats import get_format
from moelab.tuner.transfer import Transfer

SETUP = """
import tempfile
from pathlib import Path
from moelab import runtime, widgets
from moelab.plots import config_health, lookup_path, transfer
from moelab.plots.panel import Panel
from test_transfer import made
from moelab.tuner.transfer import Transfer
ours = {"ours": runtime.config_dir().parent, "again": runtime.config_dir().parent}
runs = {"a": Transfer(made()), "b": Transfer(made(seed=1))}
doctor, path, matrix = widgets.config_doctor(ours), widgets.config_path(ours), widgets.config_transfer(runs, [])
def turn(box, name, value):
    next(each for each in box.children[0].children if each.description == name).value = value
"""
BREAK = "config_health.findings = lookup_path.explain = transfer.by_batch = transfer.choices = broken\n"
CASES = {
    "the doctor's plain call": "config_health.findings(None)",
    "the doctor is made": "widgets.config_doctor(ours)",
    "its tree changes": 'turn(doctor, "Tree", "again")',
    "its folder changes": 'turn(doctor, "Folder", str(ours["ours"]))',
    "its rules change": 'turn(doctor, "Rules", "sglang")',
    "what it shows changes": 'turn(doctor, "Show", "errors")',
    "the path's plain call": "lookup_path.explain(None)",
    "the path is made": "widgets.config_path(ours)",
    "its batch changes": 'turn(path, "Batch", 3)',
    "its device changes": 'turn(path, "Device", "NVIDIA B200")',
    "its GEMM changes": 'turn(path, "GEMM", True)',
    "the matrix's plain call": "transfer.by_batch(None)",
    "the matrix is made": "widgets.config_transfer(runs, [])",
    "the matrix changes": 'turn(matrix, "Matrix", "shortcuts")',
    "its run changes": 'turn(matrix, "Run", "b")',
    "its part changes": 'turn(matrix, "GEMM", "up")',
}


def test_a_broken_drawing_function_fails_the_cell() -> None:
    assert_each_fails(SETUP, BREAK, CASES)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    ill = specimen.write_specimen(tmp_path_factory.mktemp("specimen"))
    return {"ours": runtime.config_dir(), "ill": ill}


def test_the_doctor_follows_its_controls(trees: dict[str, Path]) -> None:
    box = widgets.config_doctor(trees, {"ill": specimen.planted})
    assert "moelab: " in title(box)
    control(box, "Tree").value = "ill"
    assert title(box).startswith("sglang: 37") and "planted mistakes were found" in str(shown(box))
    control(box, "Show").value = "errors"
    assert "unknown_device" not in str(shown(box)[0])
    control(box, "Rules").value = "vllm"
    assert title(box).startswith("vllm: ")


def test_a_typed_folder_is_examined(trees: dict[str, Path], tmp_path: Path) -> None:
    box = widgets.config_doctor({"ours": trees["ours"]})
    control(box, "Folder").value = str(trees["ill"])
    assert control(box, "Tree").value == "another folder" and title(box).startswith("sglang: 37")
    control(box, "Folder").value = str(tmp_path / "nowhere")
    assert "There is no folder" in str(shown(box)) and "Expected" in str(shown(box))
    control(box, "Folder").value = ""
    assert "Type a folder" in str(shown(box))


def test_the_path_follows_its_controls(trees: dict[str, Path]) -> None:
    box = widgets.config_path({"ours": trees["ours"].parent, "ill": trees["ill"]})
    control(box, "Model").value = "mixtral-8x7b"
    control(box, "TP").value = 2
    control(box, "Batch").value = 100
    control(box, "Device").value = "AMD Instinct MI325X"
    control(box, "GEMM").value = True
    assert control(box, "Format").value == "" and ", bfloat16, Triton" in str(shown(box)[0])
    control(box, "Format").value = "float16"
    assert ", float16, Triton" in str(shown(box)[0])
    assert title(box).startswith("mixtral-8x7b, TP 2, batch 100, GEMM2 on AMD Instinct MI325X: ")
    control(box, "Rules").value = "sglang"
    control(box, "Triton").value = "3.2.0"
    assert "Triton 3.2.0" in str(shown(box)[0])
    control(box, "Tree").value = "ill"
    assert title(box).endswith("an error")


def test_the_matrix_follows_its_controls() -> None:
    runs = {"a": Transfer(made()), "b": Transfer(made(seed=1))}
    box = widgets.config_transfer(runs, config_files.shipped_files())
    assert title(box).endswith("GEMM1 + GEMM2")
    control(box, "Matrix").value = "shortcuts"
    control(box, "GEMM").value = "down"
    assert title(box) == "What a shortcut costs: GEMM2" and "another run" in str(shown(box)[0])
    control(box, "Run").value = "b"
    assert "another run" in str(shown(box)[0])
    control(box, "Matrix").value = "other formats’ files"
    assert "No file of another format is at hand" in str(shown(box))


def test_another_run_is_one_of_the_same_layer() -> None:
    coded = made(seed=1)
    shape = replace(coded.problem.shape, format=get_format("int4_w4a16_group_32"))
    other = replace(coded, problem=replace(coded.problem, shape=shape))
    box = widgets.config_transfer({"a": Transfer(made()), "fp8": Transfer(other)}, [])
    control(box, "Matrix").value = "shortcuts"
    assert "another run" not in str(shown(box)[0])


BAD = {
    "empty": (" ", "No folder is named"),
    "missing": ("nowhere", "There is no folder"),
    "a file": ("file", "is a file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_folder_that_cannot_be_read_is_said_beside_the_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    box = widgets.config_doctor({"ours": runtime.config_dir()})
    field = box.children[0].children[1]
    field.field.value = "."
    before = box.children[1].outputs
    typed, sentence = BAD[kind]
    field.field.value = typed
    assert sentence in field.note.value and box.children[1].outputs == before, "what is shown stays"


@pytest.mark.parametrize("number", [0, -5, (1 << 20) + 1])
def test_a_batch_out_of_range_is_said_beside_the_field(number: int) -> None:
    box = widgets.config_path({"ours": runtime.config_dir().parent})
    field = next(each for each in box.children[0].children if each.description == "Batch")
    before = box.children[1].outputs
    field.field.value = number
    assert "out of range" in field.note.value and field.value == 64 and box.children[1].outputs == before
    field.field.value = 65
    assert field.note.value == "" and box.children[1].outputs != before
