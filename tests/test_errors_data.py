"""Bad recordings, models, landscapes and runs of the tuner: each a named exception, as tests/test_errors.py says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from error_rows import SHAPE, Row, cut, judge, unhelpful, with_environment

from moelab import config_files, recordings, runtime, shapes
from moelab.config import KernelConfig
from moelab.errors import (
    ConfigError,
    ConfigFileError,
    DeviceError,
    FolderError,
    FormatError,
    JournalError,
    LandscapeError,
    LayoutError,
    RecordingError,
    RuntimeModeError,
    ShapeError,
    UnknownArchitectureError,
    UnknownModelError,
    UnknownNameError,
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


FILES = [
    Row(
        "NaN in a recording",
        lambda p: recordings.load(a_recording(p, lambda t: t.replace("2.0", "NaN"))),
        RecordingError,
        ("NaN", "Fetch the file"),
    ),
    Row(
        "infinity to be written",
        lambda p: recordings.write(one_row(error=float("inf")), p / "s.json"),
        RecordingError,
        ("inf", "row 0"),
    ),
    Row(
        "NaN samples",
        lambda p: recordings.write(one_row(samples_us=[float("nan")]), p / "s.json"),
        RecordingError,
        ("nan", "row 0"),
    ),
    Row(
        "no samples",
        lambda p: recordings.write(one_row(samples_us=[]), p / "s.json"),
        RecordingError,
        ("no samples", "row 0"),
    ),
    Row(
        "a time of zero",
        lambda p: recordings.write(one_row(samples_us=[0.0]), p / "s.json"),
        RecordingError,
        ("0.0", "positive"),
    ),
    Row(
        "a recording cut short",
        lambda p: recordings.load(a_recording(p, cut)),
        RecordingError,
        ("cut short", "Fetch the file"),
    ),
    Row(
        "counters without a table",
        lambda _: fast_counters.rows_of("==ERROR== ERR_NVGPUCTRPERM", {}),
        RecordingError,
        ("ERR_NVGPUCTRPERM", "column ID", "ncu --version"),
    ),
    Row(
        "counters of another number of launches",
        lambda p: with_ncu(p, lambda: fast_counters.profiled("scout/tp4", 8, {})),
        RecordingError,
        ("0 launches of scout/tp4 with 8 tokens", "Expected 4", "the sum", "fast_counters scout/tp4 8"),
    ),
    Row(
        "counters without ncu",
        lambda p: with_environment("PATH", str(p), lambda: on_a_gpu(fast_counters.record)),
        RuntimeModeError,
        ("fast_counters", "ncu", "not on PATH", "Nsight Compute"),
    ),
    Row(
        "a recording of tomorrow",
        lambda p: recordings.load(a_recording(p, lambda t: t.replace('"schema": 1', '"schema": 2'))),
        RecordingError,
        ("schema 2", "schema 1"),
    ),
    Row(
        "a recording without origin",
        lambda p: recordings.load(a_recording(p, lambda t: t.replace('"gpu"', '"cpu"'))),
        RecordingError,
        ("gpu", "provenance"),
    ),
    Row(
        "a recording that is not there",
        lambda _: recordings.load("layer_clasic"),
        RecordingError,
        ("layer_clasic", "Did you mean layer_classic"),
    ),
    Row(
        "sglang's files that are not there",
        lambda p: with_environment("MOELAB_DATA_DIR", str(p), config_files.shipped_files),
        RecordingError,
        ("sglang_shipped_configs.json", "Restore"),
    ),
    Row(
        "a variable that names no folder of data",
        lambda p: with_environment("MOELAB_DATA_DIR", str(p / "gone"), shapes.preset_names),
        FolderError,
        ("MOELAB_DATA_DIR", "gone", "models/"),
    ),
    Row(
        "transfer in a landscape without finals",
        lambda _: Transfer(landscape.Landscape(Problem(SHAPE, "NVIDIA H200", "sm_90", "3.6.0"), {}, {}, {}, ())),
        LandscapeError,
        ("no finals for up, batch 1", "--resume"),
    ),
    Row("an interval of no samples", lambda _: median_interval([]), RecordingError, ("0 samples",)),
    Row(
        "a config.json cut short",
        lambda p: shapes.MoEShape.from_config(a_model(p, lambda c: json.dumps(c)[:-9])),
        ConfigFileError,
        ("not valid JSON",),
    ),
    Row(
        "a config.json of a list",
        lambda p: shapes.MoEShape.from_config(a_model(p, lambda c: [c])),
        ConfigFileError,
        ("list",),
    ),
    Row(
        "a config.json that is not there",
        lambda p: shapes.load_model(str(p / "config.json")),
        UnknownModelError,
        ("/config.json does not exist", "Give the path"),
    ),
    Row(
        "a quantisation that nobody reads",
        lambda p: shapes.load_model(str(a_model(p, lambda c: c | {"quantization_config": {"quant_method": "mxfp8"}}))),
        FormatError,
        ("mxfp8", "--dtype bfloat16"),
    ),
    Row(
        "quantised weights where plain ones are taken",
        lambda _: shapes.require_plain(shapes.preset("kimi-k2-thinking"), "The test"),
        FormatError,
        ("The test takes plain weights", "int4_w4a16_group_32", "--dtype bfloat16"),
    ),
    Row("a format that nobody knows", lambda _: get_format("fp8_w8a9"), FormatError, ("fp8_w8a9", "Did you mean")),
    Row(
        "sizes that a format does not have",
        lambda _: get_format("fp8_w8a8_block_128"),
        FormatError,
        ("fp8_w8a8_block", "2 whole numbers"),
    ),
    Row(
        "a file that no server asks for",
        lambda _: config_files.ask("openai/gpt-oss-20b").file_name("NVIDIA H200"),
        FormatError,
        ("mxfp4_w4a16_32", "triton_kernels"),
    ),
    Row("a model without a name", lambda _: shapes.load_model(" "), UnknownModelError, ("is empty", "mixtral-8x7b")),
    Row(
        "a model where there is no preset",
        lambda p: with_environment("MOELAB_DATA_DIR", str(p), lambda: shapes.load_model("mixtral")),
        UnknownModelError,
        ("Presets: none",),
    ),
    Row(
        "sizes that could be the dense layers'",
        lambda p: shapes.MoEShape.from_config(a_model(p, unknown)),
        UnknownArchitectureError,
        ("Mystery", "from_sizes"),
    ),
    Row(
        "a model without experts",
        lambda p: shapes.MoEShape.from_config(a_model(p, dense)),
        UnknownArchitectureError,
        ("Llama",),
    ),
    Row(
        "experts that are text",
        lambda p: shapes.MoEShape.from_config(a_model(p, lambda c: c | {"num_local_experts": "8"})),
        UnknownArchitectureError,
        ("num_local_experts",),
    ),
]


TUNER = [
    Row("no batch sizes", lambda _: a_problem(batch_sizes=()), ShapeError, ("batch size", "at least 1")),
    Row("a batch of nothing", lambda _: a_problem(batch_sizes=(4, 0)), ShapeError, ("batch size 0",)),
    Row("a tuner's target", lambda _: a_problem(target="sm_9"), UnknownNameError, ("sm_9", "sm_90")),
    Row("a grid's axes", lambda _: space.grid("sm_90", axes={"BLOCK_M": (16,)}), ConfigError, ("BLOCK_M", "num_warps")),
    Row("a kernel to tune", lambda _: kernel_name("tam"), UnknownNameError, ("'tam'", "Did you mean tma", "'triton'")),
    Row(
        "a kernel by TMA on a chip without",
        lambda _: require_tunable(a_problem(target="sm_80", kernel="tma")),
        DeviceError,
        ("'tma'", "sm_80", "sm_90", "--kernel"),
    ),
    Row(
        "a kernel by TMA of ragged rows",
        lambda _: require_tunable(a_problem(shape=dataclasses.replace(SHAPE, hidden_size=302), kernel="tma")),
        LayoutError,
        ("'tma'", "302", "16 bytes"),
    ),
    Row(
        "a config that a tuned kernel cannot run",
        lambda _: require_rules(KernelConfig(16, 64, 64, 1, SPLIT_K=2), "up", a_problem(kernel="tma")),
        ConfigError,
        ("SPLIT_K = 2", "'tma'"),
    ),
    Row("a strategy", lambda _: strategies.plan("gird", None), UnknownNameError, ("'gird'", "Did you mean grid")),
    Row(
        "an evaluator",
        lambda _: evaluators.load_evaluator("repaly"),
        UnknownNameError,
        ("repaly", "Did you mean replay"),
    ),
    Row("a format", lambda f: export.export(None, f, "t5"), UnknownNameError, ("'t5'", "kernel_tuner")),
    Row("no journal", lambda f: journal.read(f / "run.jsonl"), JournalError, ("run.jsonl", "No such file")),
    Row("a journal in use", lambda f: two_tuners(f / "run.jsonl"), JournalError, ("Another tuner", "run.jsonl")),
    Row("a journal there already", lambda f: a_journal(a_journal(f / "run.jsonl")), JournalError, ("already",)),
    Row(
        "an empty journal",
        lambda f: journal.Journal.resume(a_file(f / "run.jsonl", b"")),
        JournalError,
        ("holds no run",),
    ),
    Row(
        "another file's header", lambda f: journal.read(a_file(f / "a", b'{"kind":"x"}\n')), JournalError, ("schema 1",)
    ),
    Row("a damaged journal", lambda f: journal.read(a_file(f / "a", b"nonsense\n{}\n")), JournalError, ("Line 1",)),
    Row("a closed journal", lambda f: closed_journal(f / "a").note("phase"), JournalError, ("is closed",)),
    Row("no landscape", lambda f: landscape.load(f / "a.parquet"), LandscapeError, ("a.parquet", "none yet")),
    Row("no Parquet", lambda f: landscape.load(a_file(f / "a.parquet", b"PAR1")), LandscapeError, ("a.parquet",)),
    Row("a fleet's target", lambda _: fleet.chosen(["qwen3-30b-a3b/tp3"]), UnknownNameError, ("tp3", "Did you mean")),
    Row(
        "regret on no landscape",
        lambda f: with_environment("MOELAB_DATA_DIR", str(f), tuner_regret.record),
        LandscapeError,
        ("whole grid", "make tuned"),
    ),
    Row("no finals", lambda _: Finals.of_landscape(no_rows()), LandscapeError, ("holds no finals",)),
    Row(
        "no winner to hand over",
        lambda f: handover.write(nothing_won(), "moelab", f),
        LandscapeError,
        ("no winner to write",),
    ),
    Row(
        "a cluster that fits nowhere",
        lambda _: fast_layer.grid_of(Instance(2, 2, 4, 176, 16, 16, cluster=2), 132, 0),
        RuntimeModeError,
        ("no cluster of 2 blocks", "cluster=1"),
    ),
    Row("a replay, frozen", lambda f: landscape.freeze(a_journal(f / "a")), LandscapeError, ("not a measurement",)),
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


@pytest.mark.parametrize("row", FILES + TUNER, ids=lambda row: row.label)
def test_bad_input_is_named(row: Row, tmp_path: Path) -> None:
    complaint = unhelpful(judge(row, tmp_path))
    assert complaint is None, complaint
