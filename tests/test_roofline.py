"""roofline: the recorded floors to the last digit, expectations against enumeration, laws."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab import roofline, runtime
from moelab.errors import RoutingError, ShapeError, UnknownNameError
from moelab.roofline import Ceilings, Cost
from moelab.shapes import MoEShape, load_model

FLOORS = Ceilings(4.3e12, 790e12, "NVIDIA H200", "the round figures of the recorded floors")
SHAPES = {
    "qwen3-30b-a3b/tp1": MoEShape("qwen3", 128, 8, 2048, 768),
    "scout/tp4": MoEShape("scout", 16, 1, 5120, 2048),
    "lfm2-8b/tp1": MoEShape("lfm2", 32, 4, 2048, 1792),
    "deepseek-v3/tp8": MoEShape("deepseek", 256, 8, 7168, 256),
}
# sglang 0.5.23 measured on NVIDIA H200, torch 2.11.0+cu130, triton 3.6.0, 2026-11-20: shape, M, experts
# touched, floor us
ROWS = [
    ("qwen3-30b-a3b/tp1", 1, 8.0, 17.559456744186047, "memory"),
    ("qwen3-30b-a3b/tp1", 4, 28.875, 63.379408372093025, "memory"),
    ("qwen3-30b-a3b/tp1", 4096, 128.0, 391.44005735696203, "compute"),
    ("scout/tp4", 1, 1.0, 14.636055813953488, "memory"),
    ("scout/tp4", 8192, 16.0, 652.4000955949367, "compute"),
    ("lfm2-8b/tp1", 64, 32.0, 163.99240930232557, "memory"),
    ("deepseek-v3/tp8", 4096, 256.0, 682.7936744186046, "memory"),
    ("deepseek-v3/tp8", 8192, 256.0, 913.3601338329114, "compute"),
]

shapes = st.builds(
    MoEShape,
    st.just("x"),
    st.integers(4, 64),
    st.integers(1, 4),
    st.integers(1, 4096),
    st.integers(1, 2048),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    gated=st.booleans(),
)


# --- floors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "num_tokens", "touched", "us", "side"), ROWS)
def test_recorded_floors(name: str, num_tokens: int, touched: float, us: float, side: str) -> None:
    floor = roofline.floor_us(roofline.layer_cost(SHAPES[name], num_tokens, touched), FLOORS)
    assert floor.us == pytest.approx(us, rel=1e-14)
    assert floor.side == side


def test_every_recorded_floor() -> None:
    data = json.loads((runtime.data_dir() / "upstream" / "h200_sglang.json").read_text())
    ceilings = roofline.load_ceilings("NVIDIA H200", kind="floors")
    assert len(data["rows"]) == 32
    for row in data["rows"]:
        shape = SHAPES[row["name"]]
        assert data["shapes"][row["name"]] == {
            "num_experts": shape.num_experts,
            "top_k": shape.top_k,
            "hidden_size": shape.hidden_size,
            "moe_intermediate_size": shape.moe_intermediate_size,
        }
        floor = roofline.floor_us(roofline.layer_cost(shape, row["M"], row["uniq"]), ceilings)
        assert floor.us == pytest.approx(row["floor"], rel=1e-14)
        assert floor.side == {"mem": "memory", "flop": "compute"}[row["side"]]


def test_every_recorded_sum_reduce_floor() -> None:
    data = json.loads((runtime.data_dir() / "upstream" / "h200_sum_reduce.json").read_text())
    ceilings = Ceilings(4.25e12, math.inf, "NVIDIA H200", data["floor"])
    assert len(data["rows"]) == 48
    for row in data["rows"]:
        cost = roofline.sum_reduce_cost(row["T"], row["k"], row["H"], row["dt"])
        assert roofline.floor_us(cost, ceilings).us == pytest.approx(row["floor"], rel=1e-14)


@given(shapes, st.integers(0, 5000), st.integers(1, 1000))
def test_more_tokens_never_have_a_lower_floor(shape: MoEShape, num_tokens: int, more: int) -> None:
    few = roofline.floor_us(roofline.layer_cost(shape, num_tokens), FLOORS)
    many = roofline.floor_us(roofline.layer_cost(shape, num_tokens + more), FLOORS)
    assert many.us >= few.us
    assert few.us == max(few.memory_us, few.compute_us)


@given(shapes, st.integers(1, 5000))
def test_launches_apart_cost_what_the_layer_costs_and_more(shape: MoEShape, num_tokens: int) -> None:
    layer, parts = roofline.layer_cost(shape, num_tokens), roofline.layer_breakdown(shape, num_tokens)
    assert list(parts) == ["gemm1", "activation", "gemm2", "sum_reduce"]
    gemms = parts["gemm1"] + parts["gemm2"]
    assert gemms.flops == pytest.approx(layer.flops)
    assert gemms.bytes_weights == pytest.approx(layer.bytes_weights)
    assert sum(p.bytes for p in parts.values()) > layer.bytes
    assert parts["activation"].bytes_weights == parts["sum_reduce"].bytes_weights == 0


def test_breakdown_by_hand() -> None:
    """2 tokens, k 2, 3 experts touched, H 8, N 4, bfloat16."""
    parts = roofline.layer_breakdown(MoEShape("tiny", 4, 2, 8, 4), 2, experts_touched=3)
    assert parts["gemm1"] == Cost(2 * 4 * 8 * 8, 3 * 8 * 8 * 2, (2 * 8 + 4 * 8) * 2)
    assert parts["activation"] == Cost(4 * 4, 0, 4 * (8 + 4) * 2)
    assert parts["gemm2"] == Cost(2 * 4 * 4 * 8, 3 * 4 * 8 * 2, 4 * (4 + 8) * 2)
    assert parts["sum_reduce"] == Cost(2 * 2 * 8, 0, (4 + 2) * 8 * 2)


def test_ridge_and_intensity() -> None:
    assert FLOORS.ridge_flop_per_byte == pytest.approx(183.72, rel=1e-4)
    at_ridge = Cost(790e12, 4.0e12, 0.3e12)
    assert at_ridge.intensity == pytest.approx(FLOORS.ridge_flop_per_byte)
    assert roofline.floor_us(at_ridge, FLOORS).side == "memory"
    assert Cost(0.0, 0.0, 0.0).intensity == 0.0


def test_expert_parallelism_divides_work_not_tokens() -> None:
    """Two ranks of 64 experts do together what one of 128 does: weights and FLOPs; each reads every token."""
    whole = MoEShape("qwen3", 128, 8, 2048, 768)
    rank = whole.shard(2, 2)
    one, half = roofline.layer_cost(whole, 100), roofline.layer_cost(rank, 100)
    assert 2 * half.flops == pytest.approx(one.flops)
    assert 2 * half.bytes_weights == pytest.approx(one.bytes_weights)
    assert half.bytes_activations == one.bytes_activations


# --- expectations -------------------------------------------------------------------------------------------


def _routings(num_experts: int, top_k: int, num_tokens: int) -> list[list[int]]:
    """Counts per expert of every possible routing, all equally likely."""
    sets = list(itertools.combinations(range(num_experts), top_k))
    found = []
    for choice in itertools.product(sets, repeat=num_tokens):
        chosen = list(itertools.chain.from_iterable(choice))
        found.append([chosen.count(e) for e in range(num_experts)])
    return found


TINY = [(1, 1, 3), (2, 1, 4), (4, 2, 3), (4, 4, 2), (5, 3, 2), (3, 2, 5)]  # (E, k, M); k = E and E = 1 among them


@pytest.mark.parametrize(("num_experts", "top_k", "num_tokens"), TINY)
def test_expectations_equal_enumeration(num_experts: int, top_k: int, num_tokens: int) -> None:
    routings = _routings(num_experts, top_k, num_tokens)
    touched = sum(sum(c > 0 for c in counts) for counts in routings) / len(routings)
    assert roofline.experts_touched(num_experts, top_k, num_tokens) == pytest.approx(touched, rel=1e-12)
    shape = MoEShape("tiny", num_experts, top_k, 8, 8)
    for block in (1, 2, 3, 16):
        padded = [roofline.realised_padding(counts, block).padded_rows for counts in routings]
        expected = roofline.padding_waste(shape, num_tokens, block)
        assert expected.padded_rows == pytest.approx(sum(padded) / len(padded), rel=1e-12)
        assert expected.useful_rows == num_tokens * top_k


@given(shapes, st.integers(1, 2000), st.sampled_from([1, 16, 64, 256]))
def test_padding_bounds(shape: MoEShape, num_tokens: int, block: int) -> None:
    padding = roofline.padding_waste(shape, num_tokens, block)
    touched = roofline.experts_touched(shape.num_experts, shape.top_k, num_tokens)
    assert padding.waste >= 1 - 1e-9
    assert padding.padded_rows >= touched * block * (1 - 1e-9)
    assert padding.padded_rows <= padding.useful_rows + touched * (block - 1) + 1e-6
    if block == 1:
        assert padding.waste == pytest.approx(1.0, rel=1e-9)


def test_fused_shared_experts_see_every_token() -> None:
    shape = MoEShape("ds", 257, 9, 64, 64, num_shared_experts_fused=1)
    assert roofline.layer_cost(shape, 1).bytes_weights == pytest.approx(9 * 3 * 64 * 64 * 2)
    alone = roofline.padding_waste(MoEShape("ds", 256, 8, 64, 64), 100, 64)
    assert roofline.padding_waste(shape, 100, 64).padded_rows == pytest.approx(alone.padded_rows + 128)


def test_realised_padding() -> None:
    padding = roofline.realised_padding([0, 1, 16, 17], 16)
    assert (padding.useful_rows, padding.padded_rows) == (34, 16 + 16 + 32)
    assert roofline.realised_padding([], 16).waste == 1.0
    with pytest.raises(RoutingError, match="-1"):
        roofline.realised_padding([-1], 16)


# --- devices and bad input ----------------------------------------------------------------------------------


def test_ceilings_of_the_h200() -> None:
    data = roofline.load_ceilings("NVIDIA_H200", kind="datasheet")
    assert (data.copy_bytes_per_s, data.flops_per_s) == (4.8e12, 989e12)
    measured = roofline.load_ceilings()
    assert measured.copy_bytes_per_s < data.copy_bytes_per_s
    assert "2026-11-20" in measured.source


@pytest.mark.parametrize("device", roofline.device_names())
def test_every_device_has_a_sourced_datasheet(device: str) -> None:
    from moelab.chips import TARGETS

    data = roofline.device_data(device)
    assert runtime.device_key(data["device"]) == device
    assert TARGETS[data["target"]].shared_memory_per_block == data["shared_memory_per_block"]
    assert data["l2_bytes"] % 2**20 == 0 and data["l2_bytes"] >= 40 * 2**20
    assert "datasheet" in roofline.load_ceilings(device, kind="datasheet").source


@pytest.mark.parametrize("device", ["NVIDIA_H100_80GB_HBM3", "NVIDIA_H200"])
def test_flops_of_a_clock_are_those_of_the_datasheet(device: str) -> None:
    """At 1.83 GHz, the boost clock behind Hopper's datasheets (SXM)."""
    data = roofline.device_data(device)
    per_clock = data["SMs"] * data["SM_flops_per_clock"]["bfloat16"]
    assert per_clock * 1.83e9 == pytest.approx(data["ceilings"]["datasheet"]["flops_per_s"]["bfloat16"], rel=1e-3)


def test_unknown_devices_kinds_and_dtypes() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean .*NVIDIA_H200"):
        roofline.load_ceilings("NVIDIA_H20O")
    with pytest.raises(UnknownNameError, match="Expected one of datasheet"):
        roofline.load_ceilings("NVIDIA_B200", kind="measured")
    with pytest.raises(UnknownNameError, match="FLOP rate in float64"):
        roofline.load_ceilings("NVIDIA_H200", dtype="float64")


def test_bad_sizes() -> None:
    shape = SHAPES["scout/tp4"]
    with pytest.raises(ShapeError, match="num_tokens is -1"):
        roofline.layer_cost(shape, -1)
    with pytest.raises(RoutingError, match="17 of 16"):
        roofline.layer_cost(shape, 4, experts_touched=17)
    with pytest.raises(ShapeError, match="top_k is 3"):
        roofline.experts_touched(2, 3, 1)
    with pytest.raises(ShapeError, match="block_size_m is 0"):
        roofline.padding_waste(shape, 1, 0)


def test_reported_tables_say_that_they_are_reported() -> None:
    for name, pull in (("split_k_h20", "9486"), ("tma_host_overhead", "18782"), ("sum_reduce_precision", "10654")):
        data = json.loads((runtime.data_dir() / "upstream" / f"{name}.json").read_text())
        assert data["reported"] is True
        assert pull in data["source"]
        assert data["rows"]


def test_what_quantising_moves_is_counted() -> None:
    """Codes and scales are written once and read by the GEMM in the place of 16-bit rows; plain layers have no such launch."""
    shape = replace(load_model("deepseek-v3", tp_size=8, dtype="bfloat16"), format="fp8_w8a8_block_128x128")
    found = roofline.layer_breakdown(shape, 16)
    plain = roofline.layer_breakdown(replace(shape, format="plain"), 16)
    assert set(found) - set(plain) == {"quantise1", "quantise2"}
    H, N, k = shape.hidden_size, shape.moe_intermediate_size, shape.top_k
    codes = {1: 16 * (H + 4 * H // 128), 2: 16 * k * (N + 4 * N // 128)}
    rows = {1: 16 * H * 2, 2: 16 * k * N * 2}
    for which in (1, 2):
        assert found[f"quantise{which}"].bytes == rows[which] + codes[which]
        less = plain[f"gemm{which}"].bytes_activations - found[f"gemm{which}"].bytes_activations
        assert less == rows[which] - codes[which]
    widened = replace(shape, format="int4_w4a16_group_128")
    assert roofline.quantise_cost(widened, 16, 1).bytes == 0 and set(roofline.layer_breakdown(widened, 16)) == set(
        plain
    )
