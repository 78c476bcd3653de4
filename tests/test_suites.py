"""Suites run whole on small sizes with the clock replaced, refuse what they must, and write what loads again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moelab import config, config_files, recordings, runtime, suites
from moelab.config import KernelConfig
from moelab.errors import PrecisionError, RecordingError, RuntimeModeError, UnknownNameError
from moelab.measure import Measurement
from moelab.shapes import MoEShape
from moelab.suites import layer_classic, split_k, stages, sum_reduce

SMALL = MoEShape.from_sizes(num_experts=4, top_k=2, hidden_size=64, moe_intermediate_size=32, dtype="float32")


def fake_measure(contenders: dict, protocol: object) -> dict:
    for run in contenders.values():
        run(0)
    return {name: Measurement(name, (1.0, 2.0, 3.0)) for name in contenders}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layer_classic, split_k, sum_reduce):
        monkeypatch.setattr(module, "measure", fake_measure)
    monkeypatch.setattr(runtime, "require_cuda", lambda what: None)
    monkeypatch.setattr(layer_classic, "shape_of", lambda name: SMALL)
    tuned = KernelConfig(16, 32, 64, 1).to_json()
    peers = [{"name": "qwen3-30b-a3b/tp1", "M": 3, "default": 1.0, "tuned_cfg": tuned}]
    monkeypatch.setattr(layer_classic, "peer_rows", lambda: peers)


def test_the_layer_suite_writes_what_loads(small: None, tmp_path: Path) -> None:
    kept: list[int] = []
    made = layer_classic.record(("qwen3-30b-a3b/tp1",), on_rows=lambda rows: kept.append(len(rows)))
    assert kept == [len(made.rows)]
    loaded = recordings.load(recordings.write(made, tmp_path / "layer_classic.json"))
    assert [row["config_name"] for row in loaded.rows] == ["default", "tuned", "tuned, with alignment"]
    assert all(row["samples_us"] == [1.0, 2.0, 3.0] and row["rel_error"] < 1e-6 for row in loaded.rows)


def test_the_speed_suite_times_what_it_has_checked(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    sizes, dtypes = [(3, 2, 33)], ("float32", "float64")
    rows = sum_reduce.record_speed(sizes, dtypes, on_rows=lambda rows: kept.append(len(rows))).rows
    assert kept[0] < kept[1] == len(rows) and len(kept) == 2
    assert {row["impl"] for row in rows if row["dtype"] == "float32"} == set(sum_reduce.available_sum_reduce())
    wrong = dict(sum_reduce.SUM_REDUCE)
    monkeypatch.setitem(sum_reduce.SUM_REDUCE, "triton", lambda x, s, out: wrong["torch"](x, s * 1.001, out))
    with pytest.raises(PrecisionError, match="sum_reduce triton"):
        sum_reduce.record_speed([(3, 2, 33)], ("float32",))


def test_precision_rows_reproduce_the_upstream_verdicts() -> None:
    rows = sum_reduce.precision_rows(("float64",), num_tokens=32, hidden=512)
    verdicts = {row["impl"]: row["upstream_passes"] for row in rows}
    assert verdicts.pop("triton_f32") is False and all(verdicts.values()) and "compiled" in verdicts


LONG = MoEShape.from_sizes(num_experts=4, top_k=2, hidden_size=192, moe_intermediate_size=96, dtype="float32")


def clock_only(contenders: dict, protocol: object) -> dict:
    """For what the suite has called already: in the interpreter every call more is a second."""
    return fake_measure(dict.fromkeys(contenders, lambda rotation: None), protocol)


@pytest.fixture
def short(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Split-K suite on LONG, with one tile, the widest, to choose from and two runs to tell apart."""
    monkeypatch.setattr(split_k, "measure", clock_only)
    for module in (stages, layer_classic):  # so small a stage gets 48 rotations, each with an alignment of its own
        monkeypatch.setattr(module, "rotations_for", lambda *args, **given: 2)
    every, spread = split_k.candidates, split_k.spread
    monkeypatch.setattr(split_k, "shape_of", lambda name: LONG)
    monkeypatch.setattr(split_k, "candidates", lambda rows, K, split: every(rows, K, split)[4:5])
    monkeypatch.setattr(split_k, "spread", lambda run: spread(run, runs=2))


def test_the_split_k_suite_writes_what_loads(short: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(split_k, "compile_all", lambda contenders: None)  # errors() calls each; the tests below warm up
    kept: list[int] = []
    keep = {"on_rows": lambda rows: kept.append(len(rows))}
    parts = [split_k.record(("deepseek-v3/tp16",), (batch,), **keep) for batch in (1, 3)]
    assert kept == 2 * [len(parts[0].rows) // 2, len(parts[0].rows)], "after each GEMM"
    made = split_k.merge(parts)
    loaded = recordings.load(recordings.write(made, tmp_path / "split_k.json"))
    assert len(loaded.rows) == 2 * 2 * 16
    timed = [row for row in loaded.rows if "skipped" not in row]
    # K = 192 and 96 are 3 and 2 blocks of 64: classic, and three variants under SPLIT_K = 1 and 2.
    assert len(timed) == 2 * 2 * 7 and all(row["samples_us"] == [1.0, 2.0, 3.0] for row in timed)
    assert all("empty slices" in row["skipped"] for row in loaded.rows if "skipped" in row)
    assert {(row["variant"], row["split_k"]) for row in timed} == {
        ("classic", 1), *((v, s) for v in stages.VARIANTS[1:] for s in (1, 2)),
    }  # fmt: skip
    assert all(row["within_bound"] and row["distinct"] == 1 and row["spread_abs"] == 0 for row in timed)
    other = recordings.Recording("split_k", made.provenance | {"gpu": "another"}, {}, ())
    with pytest.raises(RecordingError, match="differ in gpu"):
        split_k.merge([made, other])


def test_the_split_k_suite_times_what_it_has_checked(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = stages.split_k_atomic_f32
    monkeypatch.setattr(stages, "split_k_atomic_f32", lambda *args, **given: right(*args, **given) * 1.001)
    with pytest.raises(PrecisionError, match="atomic_f32, SPLIT_K = "):
        split_k.record(("deepseek-v3/tp16",), (2,))


def test_the_split_k_suite_looks_at_the_last_tokens(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = stages.split_k_workspace

    def wrong_at_the_end(*args: object, **given: object) -> torch.Tensor:
        out = right(*args, **given)
        out[-1] *= 1.01
        return out

    monkeypatch.setattr(stages, "split_k_workspace", wrong_at_the_end)
    with pytest.raises(PrecisionError, match="workspace, SPLIT_K = "):
        split_k.record(("deepseek-v3/tp16",), (20,))


def test_runs_that_differ_are_counted(device: str) -> None:
    outs = iter([torch.ones(3, 4, device=device) + (i % 3) * 2**-20 for i in range(6)])
    assert split_k.spread(lambda _: next(outs), runs=6) == {"runs": 6, "distinct": 3, "spread_abs": 2**-19}


def test_the_split_k_map_covers_the_issue() -> None:
    for name in layer_classic.SHAPES:
        model = layer_classic.SHAPES[name][0]
        whole, fine = (split_k.shape_of(f"{model}/tp{tp}") for tp in (1, split_k.FINEST[model]))
        assert whole.moe_intermediate_size == fine.moe_intermediate_size * split_k.FINEST[model]
        assert fine.moe_intermediate_size >= 64 and fine.moe_intermediate_size % 16 == 0
    assert {split_k.shape_of(n).hidden_size for n in split_k.SHAPES if n.startswith("upstream")} == {4096, 8192}
    for rows, K in ((1, 7168), (32, 4096), (1024, 8192)):
        tiles = [tile for split in split_k.SPLITS for tile in split_k.candidates(rows, K, split)]
        assert {tile.SPLIT_K for tile in tiles} == set(split_k.SPLITS)
        for tile in tiles:
            config.check(tile, dtype="bfloat16", target="sm_90")
    with pytest.raises(UnknownNameError, match="deepseek-v3/tp16"):
        split_k.shape_of("deepseek-v3/tp17")


def test_the_issues_shapes_are_the_peers() -> None:
    sizes = {"qwen3-30b-a3b/tp1": (128, 8, 2048, 768), "scout/tp4": (16, 1, 5120, 2048)}
    sizes |= {"lfm2-8b/tp1": (32, 4, 2048, 1792), "deepseek-v3/tp8": (256, 8, 7168, 256)}
    for name, (experts, top_k, hidden, inner) in sizes.items():
        shape = layer_classic.shape_of(name)
        found = (shape.num_experts, shape.top_k, shape.hidden_size, shape.moe_intermediate_size)
        assert found == (experts, top_k, hidden, inner)
    assert {row["name"] for row in layer_classic.peer_rows()} == set(sizes)


def test_unknown_suites_run_nothing() -> None:
    with pytest.raises(UnknownNameError, match="sum_reduce"):
        suites.record(["ceilings", "sum_reduse"])
    with pytest.raises(UnknownNameError, match="sum_reduse"):
        suites.suite_names(["all", "sum_reduse"])
    assert suites.suite_names(["all"]) == list(suites.SUITES)


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="about machines without a GPU")
@pytest.mark.parametrize("name", ["ceilings", "sum_reduce", "layer_classic", "split_k"])
def test_suites_that_time_need_a_gpu(name: str) -> None:
    with pytest.raises(RuntimeModeError, match="NVIDIA GPU"):
        suites.record([name])


def test_the_shipped_configs_are_the_fastest_recorded(tmp_path: Path) -> None:
    """Those, that is, that the tuner has not replaced by a pair of files."""
    written = layer_classic.write_configs(recordings.load("layer_classic"), tmp_path)
    names = [config_files.parse_file_name(path.name) for path in written]
    assert not [n for n in names if (runtime.config_dir() / "triton_3_6_0" / replace(n, down=True).text()).exists()]
    tuned = [
        s
        for s in map(layer_classic.shape_of, layer_classic.SHAPES)
        if layer_classic.is_tuned(s, "NVIDIA_H200", "3.6.0")
    ]
    assert len(written) + len(tuned) == len(layer_classic.SHAPES) and tuned
    for path in written:
        shipped = runtime.config_dir() / path.relative_to(tmp_path)
        assert shipped.read_text() == path.read_text(), f"{path.name}: run `make configs`"


def test_the_fastest_config_is_the_lowest_median(small: None) -> None:
    rows = [
        {"shape": "s", "num_tokens": 1, "config_name": name, "config": KernelConfig(16, 32, 64, group).to_json(),
         "samples_us": samples}
        for name, group, samples in (
            ("default", 1, [3.0, 1.0, 9.0]), ("tuned", 2, [2.0, 2.0, 50.0]), ("tuned, with alignment", 3, [0.1]),
        )
    ]  # fmt: skip
    made = recordings.Recording("layer_classic", {}, {}, tuple(rows))
    assert layer_classic.fastest_configs(made)["s"][1].GROUP_SIZE_M == 2
