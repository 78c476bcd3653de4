"""Suites run whole on small sizes with the clock replaced, refuse what they must, and write what loads again."""

from __future__ import annotations

from pathlib import Path

import pytest

from moelab import recordings, runtime, suites
from moelab.config import KernelConfig
from moelab.errors import PrecisionError, RuntimeModeError, UnknownNameError
from moelab.measure import Measurement
from moelab.shapes import MoEShape
from moelab.suites import layer_classic, sum_reduce

SMALL = MoEShape.from_sizes(num_experts=4, top_k=2, hidden_size=64, moe_intermediate_size=32, dtype="float32")


def fake_measure(contenders: dict, protocol: object) -> dict:
    for run in contenders.values():
        run(0)
    return {name: Measurement(name, (1.0, 2.0, 3.0)) for name in contenders}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (layer_classic, sum_reduce):
        monkeypatch.setattr(room, "measure", fake_measure)
    monkeypatch.setattr(runtime, "require_cuda", lambda what: None)
    monkeypatch.setattr(layer_classic, "shape_of", lambda name: SMALL)
    tuned = KernelConfig(16, 32, 64, 1).to_json()
    peers = [{"name": "qwen3-30b-a3b/tp1", "M": 3, "default": 1.0, "tuned_cfg": tuned}]
    monkeypatch.setattr(layer_classic, "peer_rows", lambda: peers)


def test_the_layer_suite_writes_what_loads(small: None, tmp_path: Path) -> None:
    made = layer_classic.record(("qwen3-30b-a3b/tp1",))
    loaded = recordings.load(recordings.write(made, tmp_path / "layer_classic.json"))
    assert [row["config_name"] for row in loaded.rows] == ["default", "tuned", "tuned, with alignment"]
    assert all(row["samples_us"] == [1.0, 2.0, 3.0] and row["rel_error"] < 1e-6 for row in loaded.rows)


def test_the_speed_suite_times_what_it_has_checked(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sum_reduce.record_speed([(3, 2, 33)], ("float32", "float64")).rows
    assert {row["impl"] for row in rows if row["dtype"] == "float32"} == set(sum_reduce.available_sum_reduce())
    wrong = dict(sum_reduce.SUM_REDUCE)
    monkeypatch.setitem(sum_reduce.SUM_REDUCE, "triton", lambda x, s, out: wrong["torch"](x, s * 1.001, out))
    with pytest.raises(PrecisionError, match="sum_reduce triton"):
        sum_reduce.record_speed([(3, 2, 33)], ("float32",))


def test_precision_rows_reproduce_the_upstream_verdicts() -> None:
    rows = sum_reduce.precision_rows(("float64",), num_tokens=32, hidden=512)
    verdicts = {row["impl"]: row["upstream_passes"] for row in rows}
    assert verdicts.pop("triton_f32") is False and all(verdicts.values()) and "compiled" in verdicts


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
@pytest.mark.parametrize("name", ["ceilings", "sum_reduce", "layer_classic"])
def test_suites_that_time_need_a_gpu(name: str) -> None:
    with pytest.raises(RuntimeModeError, match="NVIDIA GPU"):
        suites.record([name])


def test_the_shipped_configs_are_the_fastest_recorded(tmp_path: Path) -> None:
    written = layer_classic.write_configs(recordings.load("layer_classic"), tmp_path)
    assert len(written) == len(layer_classic.SHAPES)
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
