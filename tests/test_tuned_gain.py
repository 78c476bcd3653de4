"""The study tuned_gain, whole, on small sizes with the clock replaced: whose configs, checked, timed, compared, summed up."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic import small_problem, synthetic_landscape

from moelab import config_files, recordings, runtime
from moelab.config import KernelConfig, default_config
from moelab.config_files import question
from moelab.config_files.shipped import write_shipped
from moelab.config_files.shipped_quantised import shipped_data
from moelab.errors import ConfigFileError, UnknownNameError
from moelab.formats import get_format
from moelab.measure import Measurement
from moelab.pipelines import quantised
from moelab.recordings import Recording
from moelab.shapes import MoEShape, load_model
from moelab.studies import fleet_gain, tuned_gain
from moelab.studies.targets import TARGETS, Target, target_of
from moelab.suites import layer_classic
from moelab.tuner import landscape
from moelab.tuner.evaluate import Outcome
from moelab.tuner.landscape import Row
from moelab.tuner.problem import Problem

SMALL = MoEShape.from_sizes(num_experts=4, top_k=2, hidden_size=64, moe_intermediate_size=32, dtype="float32")
DEVICE = "Tiny_GPU"
UP, DOWN, OTHER = (
    KernelConfig(16, 32, 32, 1, 4, 2),
    KernelConfig(16, 64, 32, 1, 4, 2),
    KernelConfig(16, 64, 64, 1, 4, 2),
)
ONE = Target("tiny", 1)
TIMES = {(UP, DOWN): 2.0, (OTHER, OTHER): 2.0, (UP, UP): 1.0}
WAVE = (1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.03, 0.97)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A target of SMALL whose tuned pair is (UP, DOWN) at 1 and 3 tokens, on a device with a made-up clock."""
    monkeypatch.setattr(runtime, "require_cuda", lambda what: None)
    monkeypatch.setattr(Target, "shape", lambda self: SMALL if self.model == "tiny" else pytest.fail("another model"))
    monkeypatch.setattr(tuned_gain, "measure", made_up)
    monkeypatch.setattr(tuned_gain, "PLACEMENTS", 1)
    names = [config_files.file_name(4, 32, DEVICE, "float32", down=down) for down in (False, True)]
    for name, config in zip(names, (UP, DOWN), strict=True):
        config_files.write_config_file(tmp_path / runtime.triton_key() / name, {1: config, 3: config})
    return tmp_path


def made_up(contenders: dict, protocol: object) -> dict:
    """What each label takes, the noise of each out of step with the others'."""
    for run in contenders.values():
        run(1)
    base = {"tuned": 2.0, "default": 3.0, "shipped": 2.0, "second": 1.5}
    waves = {label: WAVE[i:] + WAVE[:i] for i, label in enumerate(contenders)}
    return {label: Measurement(label, tuple(base[label] * w for w in waves[label])) for label in contenders}


def a_run(path: Path, shape: MoEShape, pair: tuple, device: str = "Tiny GPU") -> Path:
    """A landscape whose final at 3 tokens that pair has won."""
    problem = Problem(shape, device, "sm_90", "3.6.0", (3,))
    plain = synthetic_landscape(small_problem((1,)))
    row = Row("layer", 3, pair, Outcome((5.0, 5.0, 5.0)), True, "2026")
    return landscape.write(dataclasses.replace(plain, problem=problem, rows=(row,)), path)


def rows_by_label(rows: tuple, num_tokens: int) -> dict:
    return {row["config_name"]: row for row in rows if row["kind"] == "layer" and row["num_tokens"] == num_tokens}


def test_what_is_written_loads_and_compares(tiny: Path, tmp_path: Path) -> None:
    second = a_run(tmp_path / "second.parquet", SMALL, (UP, UP))
    kept: list[int] = []
    keep = {"on_rows": lambda rows: kept.append(len(rows))}
    made = tuned_gain.record((ONE,), device=DEVICE, config_dir=tiny, second={"tiny/tp1": second}, **keep)
    assert kept == [len(made.rows)]
    loaded = recordings.load(recordings.write(made, tmp_path / "tuned_gain.json"))
    assert set(rows_by_label(loaded.rows, 1)) == {"tuned", "default"}
    at3 = rows_by_label(loaded.rows, 3)
    assert set(at3) == {"tuned", "default", "second"}
    assert (at3["tuned"]["up"], at3["tuned"]["down"]) == (UP.to_json(), DOWN.to_json())
    for row in at3.values():
        assert row["within_bound"], str(row)
        assert row["max_abs_error"] <= row["bound"], row
    assert at3["tuned"]["ratio"] == 1.0 and at3["tuned"]["tie"]
    assert at3["default"]["ratio"] == pytest.approx(1.5, abs=0.05) and at3["default"]["ratio_low"] > 1
    over = {row["over"]: row for row in loaded.select(kind="summary")}
    assert set(over) == {"default", "second"}
    assert over["default"]["geometric_mean"] == pytest.approx(1.5, abs=0.05)
    assert (over["default"]["slower_at"], over["default"]["faster"]) == ([], 2)
    assert over["second"]["slower_at"] == [3] and over["second"]["batch_sizes"] == 1


def test_merged_gains_keep_the_run_that_each_is_of(tmp_path: Path) -> None:
    def of(commit: str, target: str) -> Recording:
        rows = ({"kind": "layer", "target": target}, {"kind": "summary", "target": target})
        return Recording("tuned_gain", runtime.provenance(seed=0) | {"git_commit": commit}, {"kind": "test"}, rows)

    path = tmp_path / "tuned_gain.json"
    for commit, target in (("one", "a"), ("two", "b"), ("three", "a")):
        fleet_gain.merge(of(commit, target), path)
    found = recordings.load(path)
    assert {row["target"]: row["recorded"]["git_commit"] for row in found.select(kind="summary")} == {
        "b": "two",
        "a": "three",
    }
    assert len(found.rows) == 4 and found.provenance["git_commit"] == "three"


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="fp16 carriers in the interpreter")
@pytest.mark.parametrize("name", ["int8_w8a8_block_64x64", "int8_w8a8_channel", "int4_w4a16_group_32"])
def test_a_quantised_target_is_timed_in_its_format(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the file of its format, codes made inside what is timed; the plain file of the same sizes is not read."""
    shape = replace(SMALL, moe_intermediate_size=64, dtype="float16", format=get_format(name))
    monkeypatch.setattr(Target, "shape", lambda self: shape)
    with pytest.raises(ConfigFileError, match="tiny/tp1"):
        tuned_gain.record((ONE,), device=DEVICE, config_dir=tiny)
    for down, config in ((False, UP), (True, DOWN)):
        path = tiny / runtime.triton_key() / question(shape).file_name(DEVICE, down=down)
        config_files.write_config_file(path, {3: config})
    made: list[object] = []
    real = quantised.quantise_activations_unchecked
    monkeypatch.setattr(
        quantised, "quantise_activations_unchecked", lambda *given: made.append(given[1]) or real(*given)
    )
    rows = rows_by_label(tuned_gain.record((ONE,), device=DEVICE, config_dir=tiny).rows, 3)
    assert {label: row["format"] for label, row in rows.items()} == dict.fromkeys(
        ("tuned", "default"), shape.format.name
    )
    assert all(row["within_bound"] and row["samples_us"] for row in rows.values()), rows
    assert bool(made) == (shape.format.activations != "none")
    with pytest.raises(UnknownNameError, match="tiny/tp1"):  # a second run of the same sizes in plain weights
        second = a_run(tmp_path / "plain.parquet", replace(shape, format=get_format("plain")), (UP, UP))
        tuned_gain.second_pairs(ONE, DEVICE, {"tiny/tp1": second})


def test_equal_pairs_are_timed_once(tiny: Path, tmp_path: Path) -> None:
    second = a_run(tmp_path / "second.parquet", SMALL, (UP, DOWN))
    rows = rows_by_label(tuned_gain.record((ONE,), device=DEVICE, config_dir=tiny, second={"tiny/tp1": second}).rows, 3)
    assert rows["second"]["same_as"] == "tuned" and "samples_us" not in rows["second"]
    assert rows["second"]["ratio"] == 1.0 and rows["second"]["tie"]


def test_placements_that_disagree_are_a_tie(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair that is faster where the weights lie once, and slower where they lie next, is no faster pair."""
    looks: list[int] = []

    def moved(contenders: dict, protocol: object) -> dict:
        looks.append(len(looks))
        found = made_up(contenders, protocol)
        factor = (0.62, 0.67, 0.72)[looks[-1] // 2] if len(looks) <= 6 else 1.0
        return {
            label: Measurement(label, tuple(s * (factor if label == "default" else 1.0) for s in each.samples_us))
            for label, each in found.items()
        }

    monkeypatch.setattr(tuned_gain, "measure", moved)
    monkeypatch.setattr(tuned_gain, "PLACEMENTS", 3)
    made = tuned_gain.record((ONE,), device=DEVICE, config_dir=tiny)
    assert len(looks) == 2 * tuned_gain.PLACEMENTS
    row = rows_by_label(made.rows, 3)["default"]
    assert len(row["ratios"]) == tuned_gain.PLACEMENTS and row["ratios"][0] < 1 < row["ratios"][2] and row["tie"]
    assert len(row["samples_us"]) == len(WAVE) * tuned_gain.PLACEMENTS
    assert made.select(kind="summary")[0]["slower_at"] == []


def test_a_wrong_pair_is_a_row_without_times(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tuned_gain.Layer.contender

    def wrong(self: object, up: KernelConfig, down: KernelConfig):
        run = real(self, up, down)
        default = default_config(self.num_tokens, 4, "float32")
        return (lambda i: run(i) * 1.01) if up == default else run

    monkeypatch.setattr(tuned_gain.Layer, "contender", wrong)
    made = tuned_gain.record((ONE,), device=DEVICE, config_dir=tiny)
    row = rows_by_label(made.rows, 3)["default"]
    assert row["within_bound"] is False and "samples_us" not in row and "ratio" not in row
    (summary,) = made.select(kind="summary")
    assert summary["not_compared"] == [1, 3] and summary["batch_sizes"] == 0 and "geometric_mean" not in summary


def test_gemm2_runs_under_its_own_config(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = layer_classic.grouped_gemm
    monkeypatch.setattr(layer_classic, "grouped_gemm", lambda *a, **k: seen.append(a[3]) or real(*a, **k))
    layer = layer_classic.Layer(SMALL, 3, 1, layer_classic.weight_sets(SMALL))
    both, alone = layer.contender(UP, DOWN)(0), layer.contender(UP)(0)
    assert seen == [UP, DOWN, UP, UP] and torch.allclose(both, alone, atol=1e-5)


def test_no_file_of_this_device_is_an_error(tiny: Path) -> None:
    with pytest.raises(ConfigFileError, match="make tuned"):
        tuned_gain.record((ONE,), device="Another_GPU", config_dir=tiny)
    (tiny / runtime.triton_key()).rename(tiny / "triton_3_1_0")  # a fallback to another Triton is no file of its own
    with pytest.raises(ConfigFileError, match="tiny/tp1"):
        tuned_gain.record((ONE,), device=DEVICE, config_dir=tiny)


def test_a_second_run_of_another_layer_is_refused(tiny: Path, tmp_path: Path) -> None:
    for name, shape, device in (("a", replace(SMALL, top_k=1), "Tiny GPU"), ("b", SMALL, "Other GPU")):
        path = a_run(tmp_path / f"{name}.parquet", shape, (UP, UP), device)
        with pytest.raises(UnknownNameError, match="tiny/tp1"):
            tuned_gain.record((ONE,), device=DEVICE, config_dir=tiny, second={"tiny/tp1": path})


# --- the real targets -------------------------------------------------------------------------------------------------


def test_the_targets_have_files_and_landscapes_of_their_own() -> None:
    """Two of one name would overwrite each other."""
    for named in (
        {question(target.shape()).file_name("NVIDIA H200") for target in TARGETS},
        {target.landscape("NVIDIA_H200") for target in TARGETS},
        {target.name for target in TARGETS},
    ):
        assert len(named) == len(TARGETS)
    assert all(target.shape().dtype == "bfloat16" for target in TARGETS)


FP8, PER_CHANNEL = "dtype=fp8_w8a8", "per_channel_quant=True"
BLOCKS = f"{FP8},block_shape=[128, 128]"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("deepseek-v3/tp8", "E=256,N=256,device_name=X.json"),
        ("deepseek-v3-fp8/tp8", f"E=256,N=256,device_name=X,{BLOCKS}.json"),
        ("deepseek-v3-fp8/tp8/fused", f"E=257,N=256,device_name=X,{BLOCKS}.json"),
        ("qwen3-30b-a3b-fp8/tp1", f"E=128,N=768,device_name=X,{BLOCKS}.json"),
        ("qwen3-235b-a22b-fp8/tp4", f"E=128,N=384,device_name=X,{BLOCKS}.json"),
        ("glm-4.5-air-fp8/tp2", f"E=128,N=704,device_name=X,{FP8},{PER_CHANNEL}.json"),
        ("glm-4.5-air-fp8/tp2/fused", f"E=129,N=704,device_name=X,{FP8},{PER_CHANNEL}.json"),
        ("llama-4-maverick-fp8/tp8", f"E=128,N=1024,device_name=X,{FP8},{PER_CHANNEL}.json"),
        ("kimi-k2-thinking/tp8", "E=384,N=128,device_name=X,dtype=int4_w4a16.json"),  # N: two values a byte
    ],
)
def test_a_targets_format_is_its_models(name: str, file: str) -> None:
    assert question(target_of(name).shape(), "sglang").file_name("X") == file


def test_a_landscape_is_called_as_its_layer() -> None:
    """A preset's own format says nothing new, nor does what its server fuses; anything else is another layer."""
    fused, routed = (target_of(f"deepseek-v3-fp8/tp8{end}") for end in ("/fused", ""))
    assert fused.landscape("NVIDIA_H200") == "deepseek-v3-fp8-tp8-NVIDIA_H200" in landscape.landscape_names()
    assert landscape.load(fused.landscape("NVIDIA_H200")).problem.shape == fused.shape()
    assert routed.landscape("H", 1) == "deepseek-v3-fp8-tp8-shared0-H-seed1"
    other = load_model("qwen3-30b-a3b", dtype="fp8_w8a8_block_128x128")
    assert landscape.layer_name(other, "H") == "qwen3-30b-a3b-tp1-fp8_w8a8_block_128x128-H"


def test_sglangs_file_is_found_by_sglangs_rules(tmp_path: Path) -> None:
    qwen, scout = (next(t for t in TARGETS if t.model == name) for name in ("qwen3-30b-a3b", "llama-4-scout"))
    sglang = write_shipped(tmp_path)
    pairs = tuned_gain.shipped_pairs(qwen.shape(), "NVIDIA_H200", sglang, (1, 64))
    assert set(pairs) == {1, 64} and all(up != default_config(b, 128) for b, (up, _) in pairs.items())
    assert tuned_gain.shipped_pairs(scout.shape(), "NVIDIA_H200", sglang, (1,)) == {}


@pytest.mark.parametrize(
    ("name", "shipped"),
    [
        ("deepseek-v3-fp8/tp8", True),
        ("deepseek-v3-fp8/tp8/fused", True),
        ("qwen3-30b-a3b-fp8/tp1", True),
        ("qwen3-235b-a22b-fp8/tp4", True),
        ("glm-4.5-air-fp8/tp2", False),
        ("llama-4-maverick-fp8/tp8", False),
        ("kimi-k2-thinking/tp8", False),
    ],
)
def test_sglangs_quantised_file_is_found_where_it_ships_one(name: str, shipped: bool, tmp_path: Path) -> None:
    """By its own list of names, and never the plain file of the same sizes."""
    shape, sglang = target_of(name).shape(), write_shipped(tmp_path)
    assert set(tuned_gain.shipped_pairs(shape, "NVIDIA_H200", sglang, (1, 64))) == ({1, 64} if shipped else set())
    asked = question(shape, "sglang").file_name("NVIDIA_H200")
    assert shipped == (asked in {row["name"] for peer in shipped_data()["peers"] for row in peer["quantised"]})


@pytest.mark.parametrize(
    ("name", "batch"), [("deepseek-v3/tp8", 1), ("deepseek-v3/tp8", 4096), ("qwen3-30b-a3b-fp8/tp1", 64)]
)
def test_the_shipped_fp8_entries_are_those_that_were_timed(name: str, batch: int, tmp_path: Path) -> None:
    """h200_fp8_sglang.json was measured under the files themselves."""
    data = json.loads((runtime.data_dir() / "upstream" / "h200_fp8_sglang.json").read_text())
    (row,) = (row for row in data["rows"] if (row["name"], row["M"]) == (name, batch))
    target = target_of(name.replace("v3/", "v3-fp8/"))
    ((up, down),) = tuned_gain.shipped_pairs(target.shape(), "NVIDIA_H200", write_shipped(tmp_path), (batch,)).values()
    assert up.to_json() == down.to_json() == row["shipped_cfg"]


def test_second_runs_are_found_where_there_are_any() -> None:
    runs = {t: f"{t.landscape('NVIDIA_H200', seed=1)}" in landscape.landscape_names() for t in TARGETS if t.keep}
    assert runs[target_of("qwen3-30b-a3b/tp1")]
    for target, recorded in runs.items():
        pairs = tuned_gain.second_pairs(target, "NVIDIA_H200", None)
        assert len(pairs) == 19 * recorded and all(up.BLOCK_SIZE_M == down.BLOCK_SIZE_M for up, down in pairs.values())
    assert tuned_gain.second_pairs(next(t for t in TARGETS if not t.keep), "NVIDIA_H200", None) == {}


RECORDED = recordings.recordings_dir() / "tuned_gain.json"


@pytest.mark.skipif(not RECORDED.is_file(), reason="not recorded yet: make tuned, on a GPU")
def test_the_recorded_files_are_the_ones_shipped_and_lose_nowhere() -> None:
    found = recordings.load(RECORDED)
    assert all(row["within_bound"] for row in found.select(kind="layer"))
    device, version = runtime.device_key(found.provenance["gpu"]), found.provenance["triton"]
    for row in found.select(kind="layer", config_name="tuned"):
        asked = question(target_of(row["target"]).shape())
        for side in ("up", "down"):
            of = {"num_tokens": row["num_tokens"], "triton_version": version, "down": side == "down"}
            answer = asked.lookup(device, **of)
            assert answer.config is not None and answer.config.to_json() == row[side], (
                row["target"],
                row["num_tokens"],
            )
    for summary in found.select(kind="summary"):
        assert summary["slower_at"] == [] or summary["over"] == "second", summary
        assert summary["geometric_mean"] > 0.99, summary


@pytest.mark.gpu
def test_on_a_gpu_the_tuned_pair_is_right_and_timed(tmp_path: Path) -> None:
    """Qwen3-30B-A3B at two batch sizes, under made-up files: nothing is said of who is faster."""
    target, device = TARGETS[0], runtime.device_key()
    for down, block_n in ((False, 64), (True, 128)):
        name = config_files.file_name(128, 768, device, down=down)
        configs = {b: KernelConfig(16, block_n, 64, 1, 4, 3) for b in (1, 64)}
        config_files.write_config_file(tmp_path / runtime.triton_key() / name, configs)
    made = tuned_gain.record((target,), config_dir=tmp_path, second={})
    for b in (1, 64):
        rows = rows_by_label(made.rows, b)
        assert {"tuned", "default"} <= set(rows) and all(row["within_bound"] for row in rows.values()), rows
        assert {len(row["samples_us"]) for row in rows.values()} == {25 * tuned_gain.PLACEMENTS}
        assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows.values())
        print(
            b, {label: (round(row["median_us"], 2), round(row["ratio"], 3), row["tie"]) for label, row in rows.items()}
        )
    print([dict(row) for row in made.select(kind="summary")])
