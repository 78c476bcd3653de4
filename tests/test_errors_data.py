"""Bad recordings, models, landscapes and runs of the tuner: each a named exception, as tests/test_errors.py says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from error_rows import SHAPE, Row, cut, every, judge, rows, with_environment

from moelab import config_files, recordings, roofline, runtime, shapes, writing
from moelab.cli import options
from moelab.config import KernelConfig
from moelab.errors import (
    ConfigError,
    ConfigFileError,
    DeviceError,
    DeviceFileError,
    FolderError,
    FormatError,
    JournalError,
    LandscapeError,
    LayoutError,
    OptionError,
    RecordingError,
    RuntimeModeError,
    ShapeError,
    UnknownArchitectureError,
    UnknownModelError,
    UnknownNameError,
    WriteError,
)
from moelab.formats import get_format
from moelab.kernels import fast_layer
from moelab.kernels.fast_instances import Instance
from moelab.measure import median_interval
from moelab.plots import handover
from moelab.studies import fleet, tuner_regret
from moelab.suites import fast_counters
from moelab.tuner import evaluators, export, journal, landscape, space, strategies
from moelab.tuner.finals import Finals
from moelab.tuner.problem import Problem
from moelab.tuner.results import TuneResult
from moelab.tuner.transfer import Transfer
from moelab.tuner.tuned_kernels import kernel_name, require_rules, require_tunable


def one_row(**changes: object) -> recordings.Recording:
    row = {"name": "a", "samples_us": [1.0, 2.0], **changes}
    return recordings.Recording("suite", runtime.provenance(seed=0), {"kind": "test"}, (row,))


def a_recording(folder: Path, change: Callable[[str], str]) -> Path:
    path = recordings.write(one_row(), folder / "suite.json")
    path.write_text(change(path.read_text()))
    return path


def a_model(folder: Path, change: Callable[[dict], object]) -> Path:
    content = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64}
    content = change({"architectures": ["MixtralForCausalLM"], **content, "intermediate_size": 96})
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def read(folder: Path, change: Callable[[str], str]) -> recordings.Recording:
    return recordings.load(a_recording(folder, change))


def write(folder: Path, **changes: object) -> Path:
    return recordings.write(one_row(**changes), folder / "s.json")


def sizes_of(folder: Path, change: Callable[[dict], object]) -> shapes.MoEShape:
    return shapes.MoEShape.from_config(a_model(folder, change))


def a_device(folder: Path, text: str) -> object:
    (folder / "devices").mkdir()
    (folder / "devices" / "NVIDIA_H200.json").write_text(text)
    return from_data(folder, lambda: roofline.load_ceilings("NVIDIA_H200"))


def unfinished(folder: Path) -> None:
    (folder / writing.RECORD).write_text("[5]")
    writing.settle(folder)


def from_data(folder: Path, call: Callable[[], object]) -> object:
    """With a folder of data that lacks what is asked for."""
    return with_environment("MOELAB_DATA_DIR", str(folder), call)


FILES = [
    *rows(
        RecordingError,
        ("NaN|Fetch the file", lambda p: read(p, lambda t: t.replace("2.0", "NaN"))),
        ("inf|row 0", lambda p: write(p, error=float("inf"))),
        ("nan|row 0", lambda p: write(p, samples_us=[float("nan")])),
        ("rows.0.samples_us|at least 1", lambda p: write(p, samples_us=[])),
        ("0.0|greater than 0", lambda p: write(p, samples_us=[0.0])),
        ("cut short|Fetch the file", lambda p: read(p, cut)),
        ("ERR_NVGPUCTRPERM|column ID|ncu --version", lambda _: fast_counters.rows_of("==ERROR== ERR_NVGPUCTRPERM", {})),
        (
            "0 launches of scout/tp4 with 8 tokens|Expected 4|the sum|fast_counters scout/tp4 8",
            lambda p: with_ncu(p, lambda: fast_counters.profiled("scout/tp4", 8, {})),
        ),
        ("2 at schema|schema 1", lambda p: read(p, lambda t: t.replace('"schema": 1', '"schema": 2'))),
        ("gpu|provenance", lambda p: read(p, lambda t: t.replace('"gpu"', '"cpu"'))),
        ("layer_clasic|Did you mean layer_classic", lambda _: recordings.load("layer_clasic")),
        ("sglang_shipped_configs.json|Restore", lambda p: from_data(p, config_files.shipped_files)),
        ("0 samples", lambda _: median_interval([])),
    ),
    *rows(
        RuntimeModeError,
        ("fast_counters|ncu", lambda p: with_environment("PATH", str(p), lambda: on_a_gpu(fast_counters.record))),
    ),
    Row(FolderError, "MOELAB_DATA_DIR|gone|models/", lambda p: from_data(p / "gone", shapes.preset_names)),
    Row(
        LandscapeError,
        "no finals for up, batch 1|--resume",
        lambda _: Transfer(landscape.Landscape(Problem(SHAPE, "NVIDIA H200", "sm_90", "3.6.0"), {}, {}, {}, ())),
    ),
    Row(ConfigFileError, "not strict JSON", lambda p: sizes_of(p, lambda c: json.dumps(c)[:-9])),
    Row(ConfigFileError, "list", lambda p: sizes_of(p, lambda c: [c])),
    *rows(
        UnknownModelError,
        ("/config.json does not exist|Give the path", lambda p: shapes.load_model(str(p / "config.json"))),
        ("is empty|mixtral-8x7b", lambda _: shapes.load_model(" ")),
        ("Presets: none", lambda p: from_data(p, lambda: shapes.load_model("mixtral"))),
    ),
    *rows(
        FormatError,
        (
            "mxfp8|--dtype bfloat16",
            lambda p: shapes.load_model(
                str(a_model(p, lambda c: c | {"quantization_config": {"quant_method": "mxfp8"}}))
            ),
        ),
        ("The test takes plain weights", lambda _: shapes.require_plain(shapes.preset("kimi-k2-thinking"), "The test")),
        ("fp8_w8a9|Did you mean", lambda _: get_format("fp8_w8a9")),
        ("fp8_w8a8_block|2 whole numbers", lambda _: get_format("fp8_w8a8_block_128")),
        ("mxfp4_w4a16_32|triton_kernels", lambda _: config_files.ask("openai/gpt-oss-20b").file_name("NVIDIA H200")),
    ),
    Row(UnknownArchitectureError, "Mystery|from_sizes", lambda p: sizes_of(p, unknown)),
    Row(UnknownArchitectureError, "Llama", lambda p: sizes_of(p, dense)),
    Row(UnknownArchitectureError, "num_local_experts", lambda p: sizes_of(p, lambda c: c | {"num_local_experts": "8"})),
]


TUNER = [
    Row(ShapeError, "batch size|at least 1", lambda _: a_problem(batch_sizes=())),
    Row(ShapeError, "batch size 0", lambda _: a_problem(batch_sizes=(4, 0))),
    Row(UnknownNameError, "sm_9|sm_90", lambda _: a_problem(target="sm_9")),
    Row(UnknownNameError, "'tam'|Did you mean tma|'triton'", lambda _: kernel_name("tam")),
    Row(UnknownNameError, "'gird'|Did you mean grid", lambda _: strategies.plan("gird", None)),
    Row(UnknownNameError, "repaly|Did you mean replay", lambda _: evaluators.load_evaluator("repaly")),
    Row(UnknownNameError, "'t5'|kernel_tuner", lambda f: export.export(None, f, "t5")),
    Row(UnknownNameError, "tp3|Did you mean", lambda _: fleet.chosen(["qwen3-30b-a3b/tp3"])),
    *rows(
        ConfigError,
        ("BLOCK_M|num_warps", lambda _: space.grid("sm_90", axes={"BLOCK_M": (16,)})),
        ("SPLIT_K = 2", lambda _: require_rules(KernelConfig(16, 64, 64, 1, SPLIT_K=2), "up", a_problem(kernel="tma"))),
    ),
    Row(DeviceError, "'tma'|sm_80|sm_90|--kernel", lambda _: require_tunable(a_problem(target="sm_80", kernel="tma"))),
    Row(
        LayoutError,
        "'tma'|302|16 bytes",
        lambda _: require_tunable(a_problem(shape=dataclasses.replace(SHAPE, hidden_size=302), kernel="tma")),
    ),
    Row(JournalError, "run.jsonl|No such file", lambda f: journal.read(f / "run.jsonl")),
    Row(JournalError, "Another tuner|run.jsonl", lambda f: two_tuners(f / "run.jsonl")),
    Row(JournalError, "already", lambda f: a_journal(a_journal(f / "run.jsonl"))),
    Row(JournalError, "holds no run", lambda f: journal.Journal.resume(a_file(f / "run.jsonl", b""))),
    Row(JournalError, "schema 1", lambda f: journal.read(a_file(f / "a", b'{"kind":"x"}\n'))),
    Row(JournalError, "Line 1", lambda f: journal.read(a_file(f / "a", b"nonsense\n{}\n"))),
    Row(JournalError, "is closed", lambda f: closed_journal(f / "a").note("phase")),
    Row(LandscapeError, "a.parquet|none yet", lambda f: landscape.load(f / "a.parquet")),
    Row(LandscapeError, "a.parquet", lambda f: landscape.load(a_file(f / "a.parquet", b"PAR1"))),
    Row(DeviceFileError, "NVIDIA_H200.json|a JSON list|Correct it", lambda p: a_device(p, "[]")),
    Row(OptionError, "--model|leave the option out", lambda _: options.refuse_empty(["shape", "--model", ""])),
    Row(WriteError, "cut short|moelab doctor", unfinished),
    Row(LandscapeError, "whole grid|make tuned", lambda f: from_data(f, tuner_regret.record)),
    Row(LandscapeError, "holds no finals", lambda _: Finals.of_landscape(no_rows())),
    Row(LandscapeError, "no winner to write", lambda f: handover.write(nothing_won(), "moelab", f)),
    Row(LandscapeError, "not a measurement", lambda f: landscape.freeze(a_journal(f / "a"))),
    *rows(
        RuntimeModeError,
        ("no cluster of 2 CTAs", lambda _: fast_layer.grid_of(Instance(2, 2, 4, 176, 16, 16, cluster=2), 132, 0)),
    ),
]


def a_problem(**changes: object) -> Problem:
    return Problem(**{"shape": SHAPE, "device": "D", "target": "sm_90", "triton_version": "3.6.0", **changes})


def a_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def on_a_gpu(run: Callable[[], object]) -> object:
    """As if a GPU were at hand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "require_cuda", lambda what: None)
        return run()


def with_ncu(folder: Path, run: Callable[[], object]) -> object:
    """With an ncu on PATH whose table is empty."""
    a_file(folder / "ncu", b"#!/bin/sh\necho '\"ID\"'\n").chmod(0o755)
    return with_environment("PATH", str(folder), run)


def closed_journal(path: Path) -> journal.Journal:
    names = ("provenance", "problem", "strategy", "space", "evaluator")
    opened = journal.Journal.create(path, {name: {} for name in names})
    opened.close()
    return opened


def a_journal(path: Path) -> Path:
    closed_journal(path)
    return path


def no_rows() -> landscape.Landscape:
    return landscape.Landscape(a_problem(), {}, {}, {}, ())


def nothing_won() -> TuneResult:
    return TuneResult(a_problem(), {}, "", 0.0, (), {})


def two_tuners(path: Path) -> object:
    _first = journal.Journal.resume(a_journal(path))
    return journal.Journal.resume(path)


def unknown(content: dict) -> dict:
    return content | {"architectures": ["MysteryForCausalLM"], "model_type": "mystery"}


def dense(_: dict) -> dict:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96}


@every(FILES + TUNER)
def test_bad_input_is_named(row: Row, tmp_path: Path) -> None:
    judge(row, tmp_path)
