"""Bad input: each a named exception that says what was wrong, what was expected, and what to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from error_rows import (
    DEVICE,
    HUGE,
    SHAPE,
    Row,
    arguments,
    every,
    gemm,
    judge,
    moe,
    rows,
    unhelpful,
    with_environment,
    x,
)
from test_errors_configs import CONFIGS
from test_errors_data import FILES, TUNER

from moelab import (
    chips,
    dtypes,
    errors,
    inputs,
    precision,
    reference,
    roofline,
    routers,
    routing,
    runtime,
    shapes,
    suites,
)
from moelab.config import KernelConfig
from moelab.errors import (
    ConfigError,
    DeviceError,
    DtypeError,
    KernelTimeoutError,
    LayoutError,
    MoelabError,
    PrecisionError,
    RoutingError,
    RuntimeModeError,
    ShapeError,
    ShardError,
    SharedMemoryError,
    UnknownModelError,
    UnknownNameError,
)
from moelab.fused_moe import available_implementations, fused_moe
from moelab.implementations import IMPLEMENTATIONS, Implementation
from moelab.kernels import residency
from moelab.kernels.activation import activation
from moelab.kernels.align import align
from moelab.kernels.descriptors import check_tma, check_tma_config, weight_descriptor
from moelab.kernels.expert_order import expert_order, new_expert_order
from moelab.kernels.from_file import CudaKernel, load_cuda, load_kernels
from moelab.kernels.gated_gemm import gated_gemm
from moelab.kernels.grouped_gemm_tma import grouped_gemm_tma
from moelab.kernels.route import new_routed, route
from moelab.kernels.sorted_gemm import sorted_gemm
from moelab.kernels.sum_reduce import sum_reduce
from moelab.measure import measure, measure_eager, measure_host
from moelab.plots import gallery
from moelab.suites import bench, your_kernel

SPLIT = KernelConfig(16, 32, 16, 1, SPLIT_K=2)


def plain(**changes: object) -> None:
    """A call of an implementation that takes plain layers only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(IMPLEMENTATIONS, "mine", Implementation(lambda call: call.require_plain("mine")))
        moe("mine", **changes)


def descriptor(w: torch.Tensor, block: tuple[int, int] = (16, 16)) -> object:
    return weight_descriptor(w, block)


def a_routing(folder: Path, ids: torch.Tensor | bytes) -> Path:
    path = folder / "topk_ids.pt"
    if isinstance(ids, bytes):
        path.write_bytes(ids)
    else:
        torch.save(ids, path)
    return path


TENSORS = [
    *rows(
        ShapeError,
        ("hidden_states|(1, 5, 32)", lambda _: moe(hidden_states=x(1, 5, 32))),
        ("hidden_states|(32,)", lambda _: moe(hidden_states=x(32))),
        ("w13|num_experts", lambda _: moe(w13=x(32, 32))),
        ("w2|16", lambda _: moe(w2=lambda w: w[:, :, :8].contiguous())),
        ("w2|(4, 32, 16)", lambda _: moe(w2=lambda w: w[:3])),
        ("31 rows|gated=False", lambda _: moe(w13=x(4, 31, 32))),
        ("topk_ids|(3, 2)|(5, ", lambda _: moe(topk_ids=lambda t: t[:3])),
        ("topk_weights", lambda _: moe(topk_weights=lambda t: t[:, :1])),
        ("b13|(4, 32)", lambda _: moe(b13=x(4, 31))),
        ("router_logits|(num_tokens, num_experts)", lambda _: route(x(4), 1)),
        ("(5,)|Expected (4,)", lambda _: route(x(3, 4), 1, correction_bias=x(5))),
        ("out.topk_weights|(3, 2)", lambda _: route(x(3, 4), 2, out=new_routed(2, 4, 2, DEVICE))),
        ("topk_ids|(num_tokens, top_k)", lambda _: expert_order(x(4).int(), 4)),
        ("num_experts = 0", lambda _: expert_order(x(4, 1).int(), 0)),
        ("out.sorted_slots|(4)", lambda _: expert_order(x(4, 1).int(), 4, out=new_expert_order(3, 4, DEVICE))),
        ("logits|(num_tokens, num_experts)", lambda _: routers.softmax_topk(x(4), 1)),
        ("x has shape (4, 8)|top_k", lambda _: sum_reduce(x(4, 8))),
        ("top_k >= 1", lambda _: sum_reduce(x(4, 0, 8))),
        ("out|(4, 8)", lambda _: sum_reduce(x(4, 2, 8), out=x(4, 9))),
        ("31", lambda _: activation(x(4, 31))),
        ("9 pairs|top_k = 2", lambda _: gemm(num_pairs=9)),
        ("a has shape (4, 32)|(5, 32)", lambda _: gemm(a=x(4, 32))),
        ("(2,)|(3,)", lambda _: precision.error(x(2), x(3).double())),
    ),
    Row(DtypeError, "w2 is float16|float32", lambda _: moe(w2=lambda w: w.half())),
    Row(DtypeError, "hidden_states is int32", lambda _: moe(hidden_states=lambda t: t.int())),
    Row(DtypeError, "router_logits is float64|float32", lambda _: route(x(3, 4, dtype=torch.float64), 2)),
    Row(DtypeError, "correction_bias is int32", lambda _: route(x(3, 4), 2, correction_bias=x(4).int())),
    Row(DtypeError, "topk_ids is float32|int32 or int64", lambda _: expert_order(x(3, 2), 4)),
    Row(DtypeError, "topk_ids is float32|int32", lambda _: moe(topk_ids=lambda t: t.float())),
    Row(DtypeError, "topk_weights is float16", lambda _: moe(topk_weights=lambda t: t.half())),
    Row(DtypeError, "x is int32|bfloat16", lambda _: sum_reduce(x(4, 2, 8, dtype=torch.int32))),
    Row(DtypeError, "out is float16", lambda _: sum_reduce(x(4, 2, 8), out=x(4, 8).half())),
    Row(DtypeError, "float12|bfloat16", lambda _: dtypes.torch_dtype("float12")),
    Row(DtypeError, "fp12|bfloat16", lambda _: SHAPE.with_dtype("fp12")),
    Row(DtypeError, "float32|float64", lambda _: precision.error(x(2), x(2))),
    Row(DeviceError, f"meta|{DEVICE}", lambda _: moe_on_meta()),
    Row(DeviceError, "w13 is on meta|one device", lambda _: moe(w13=lambda w: w.to("meta"))),
    Row(DeviceError, "out is on meta", lambda _: sum_reduce(x(4, 2, 8), out=x(4, 8, device="meta"))),
    Row(DeviceError, f"x is on meta|{DEVICE}", lambda _: sum_reduce(x(4, 2, 8, device="meta"))),
    Row(DeviceError, "router_logits is on meta", lambda _: route(x(3, 4, device="meta"), 2)),
    Row(DeviceError, "correction_bias|one device", lambda _: route(x(3, 4), 2, correction_bias=x(4, device="meta"))),
    Row(DeviceError, "topk_ids is on meta", lambda _: align(x(4, 2, device="meta").int(), 16, 4)),
    Row(LayoutError, "router_logits has strides", lambda _: route(x(3, 8)[:, ::2], 2)),
    Row(LayoutError, "hidden_states|contiguous", lambda _: moe(hidden_states=x(32, 5).T)),
    Row(LayoutError, "w2 has strides|.contiguous()", lambda _: moe(w2=x(4, 16, 32).mT)),
    Row(LayoutError, "x has strides", lambda _: sum_reduce(x(4, 2, 16)[:, :, ::2])),
    Row(LayoutError, "x has strides", lambda _: activation(x(4, 64)[:, ::2])),
]


TMA = [
    *rows(
        DeviceError,
        ("TMA|sm_80|sm_90 or later", lambda _: check_tma("w13", x(4, 8, 16), (16, 16), chips.TARGETS["sm_80"])),
        ("TMA|gfx942", lambda _: check_tma("w13", x(4, 8, 16), (16, 16), chips.TARGETS["gfx942"])),
    ),
    Row(LayoutError, "w has strides|contiguous", lambda _: descriptor(x(4, 16, 8).mT)),
    Row(LayoutError, "w starts 4 bytes past|16 bytes|.clone()", lambda _: descriptor(x(513)[1:].view(4, 8, 16))),
    Row(LayoutError, "A row of w is 60 bytes|16 bytes", lambda _: descriptor(x(4, 8, 15))),
    Row(ShapeError, "w has shape (8, 16)", lambda _: descriptor(x(8, 16))),
    Row(DtypeError, "w is int32|bfloat16", lambda _: descriptor(x(4, 8, 16).int())),
    Row(ConfigError, "512 x 16|at most 256", lambda _: descriptor(x(4, 8, 16), (512, 16))),
    Row(
        ConfigError,
        "MOELAB_TMA_DESC_CACHE_MAX|'lots'|0 to keep none",
        lambda _: with_environment("MOELAB_TMA_DESC_CACHE_MAX", "lots", lambda: descriptor(x(4, 8, 16))),
    ),
    Row(ConfigError, "SPLIT_K = 2", lambda _: gemm(way=grouped_gemm_tma, config=SPLIT)),
    Row(SharedMemoryError, "with TMA|232448", lambda _: check_tma_config(HUGE, torch.bfloat16, chips.TARGETS["sm_90"])),
]


SORTED = [
    Row(ConfigError, "SPLIT_K = 2", lambda _: gemm(way=gated_gemm, config=SPLIT)),
    Row(ConfigError, "BLOCK_SIZE_N = 16|at least 32", lambda _: gemm(way=gated_gemm)),
    Row(UnknownNameError, "gated activation 'relu2'|silu", lambda _: gemm(way=gated_gemm, activation="relu2")),
    Row(ShapeError, "a has shape (5, 32)|Expected (96, 32)", lambda _: gemm(way=sorted_gemm, top_k=1)),
    Row(ShapeError, "top_k = 2|a row per pair|sum_reduce", lambda _: gemm(x(96, 32), way=sorted_gemm)),
]


PLUGGED_IN = [
    Row(KernelTimeoutError, "CTA 33|tile descriptor 0|1 counts missing|context is gone", lambda _: lost_wait()),
    Row(UnknownNameError, "mine.py|Run the cells", lambda p: load_kernels(p / "mine.py")),
    Row(UnknownNameError, "mine.cu|CUDA C++|Run the cells", lambda p: load_cuda(p / "mine.cu", "down")),
    Row(ShapeError, f"Argument 1 is {2**31}|c_longlong", lambda _: CudaKernel("", "f")((1,), (1,), x(2, 2), 2**31)),
    Row(LayoutError, "Argument 0 has strides|x.contiguous()", lambda _: CudaKernel("", "f")((1,), (1,), x(2, 3).T)),
    Row(ConfigError, "'gelu', biases|teach it", lambda _: plain(activation="gelu", b2=x(4, 32))),
    Row(ConfigError, "No tiles|mine", lambda _: your_kernel.tune(None, "mine", [])),
    Row(RuntimeModeError, "no notebook|Name them", lambda p: gallery.write_gallery([], p)),
]


ROUTINGS = [
    *rows(
        RoutingError,
        ("top_k = 5|4", lambda _: routing.make_routing("uniform", 3, 4, 5)),
        ("top_k = 5|4 experts", lambda _: routers.softmax_topk(x(3, 4), 5)),
        ("top_k = 5|4 experts", lambda _: route(x(3, 4), 5)),
        ("3 groups|8 experts", lambda _: route(x(3, 8), 2, num_groups=3)),
        ("range(4, 12) of 8 experts", lambda _: route(x(3, 8), 2, local_experts=range(4, 12))),
        ("range(0, 8, 2) of 8 experts", lambda _: routing.route_ref(x(3, 8), 2, local_experts=range(0, 8, 2))),
        ("top_k = 0", lambda _: routers.softmax_topk(x(3, 4), 0)),
        ("[0, 4]|4 experts|[0, 4)", lambda _: moe(topk_ids=ids([0, 4]), check_routing=True)),
        ("[-2, 1]|-1", lambda _: moe(topk_ids=ids([-2, 1]), check_routing=True)),
        ("same expert twice", lambda _: moe(topk_ids=ids([1, 1]), check_routing=True)),
        ("router_logits|topk_ids", lambda _: moe(topk_ids=None, topk_weights=None)),
        ("router_logits|alone", lambda _: moe(router_logits=x(5, 4), top_k=2)),
        ("3 groups", lambda _: routers.grouped_topk(x(3, 8), 2, num_groups=3)),
        ("topk_ids.pt", lambda p: routing.load_routing(a_routing(p, b"PK"), 4)),
        ("float32", lambda p: routing.load_routing(a_routing(p, x(3, 2)), 4)),
        ("9", lambda p: routing.load_routing(a_routing(p, ids([0, 9])), 4)),
        ("no.npy", lambda p: routing.load_routing(p / "no.npy", 4)),
    ),
    Row(ShapeError, "top_k is 5|4 experts", lambda _: dataclasses.replace(SHAPE, top_k=5)),
    Row(ShapeError, "(4, 4)|Expected (5, 4)", lambda _: logits(x(4, 4), 2)),
    Row(ShapeError, "(5, 6)|Expected (5, 4)", lambda _: logits(x(5, 6), 2)),
    Row(UnknownNameError, "'zip'|zipf", lambda _: routing.make_routing("zip", 3, 4, 2)),
]


NAMES = [
    Row(UnknownModelError, "Did you mean qwen3-30b-a3b", lambda _: shapes.preset("qwen3-30b")),
    Row(UnknownModelError, "Did you mean mixtral-8x", lambda _: shapes.load_model("mixtral")),
    Row(UnknownNameError, "'tritn'|Did you mean triton", lambda _: moe(impl="tritn")),
    Row(UnknownNameError, "'cuda_f32'|cuda", lambda _: sum_reduce(x(4, 2, 8), impl="cuda_f32")),
    Row(UnknownNameError, "'swish'|silu", lambda _: moe(activation="swish")),
    Row(UnknownNameError, "relu2|gated", lambda _: activation(x(4, 8), "relu2")),
    Row(UnknownNameError, "gelu2", lambda _: reference.activation_ref(x(4, 8), "gelu2")),
    Row(UnknownNameError, "sigmod|'sigmoid'", lambda _: route(x(3, 4), 2, score="sigmod")),
    Row(UnknownNameError, "sigmod", lambda _: routers.grouped_topk(x(3, 4), 2, score="sigmod")),
    Row(UnknownNameError, "'tritn'|Did you mean triton", lambda _: bench.bench(SHAPE, [1], ["torch", "tritn"])),
    Row(UnknownNameError, "'zipff'|Did you mean zipf", lambda _: bench.bench(SHAPE, [1], ["torch"], routing="zipff")),
    Row(UnknownNameError, "sum_redce|Did you mean sum_reduce", lambda _: suites.record(["sum_redce"])),
    Row(UnknownNameError, "NVIDIA_H20|NVIDIA_H200", lambda _: roofline.load_ceilings("NVIDIA_H20")),
    Row(UnknownNameError, "guessed|datasheet", lambda _: roofline.load_ceilings(kind="guessed")),
    Row(UnknownNameError, "int3|bfloat16", lambda _: roofline.load_ceilings(dtype="int3")),
    Row(UnknownNameError, "bfloat61|bfloat16", lambda _: dtypes.dtype_bytes("bfloat61")),
    Row(UnknownNameError, "'torch'", lambda _: precision.compare({"a": x(2)}, x(2).double())),
    Row(ShardError, "tp_size = 5|768|1, 2, 3, 4, 6, 8", lambda _: shapes.preset("qwen3-30b-a3b").shard(5)),
    Row(ShardError, "ep_size = 16", lambda _: shapes.preset("grok-2").shard(16, 16)),
    Row(ShardError, "ep_size = 3", lambda _: SHAPE.shard(4, 3)),
    Row(ShapeError, "tp_size is 0|at least 1", lambda _: SHAPE.shard(0)),
    Row(ShapeError, "hidden_size is 0", lambda _: dataclasses.replace(SHAPE, hidden_size=0)),
    Row(PrecisionError, "off by 1|twice torch's", lambda _: precision.check(x(4) * 2, x(4), x(4).double())),
    Row(PrecisionError, "NaN", lambda _: precision.check(x(4) * float("nan"), x(4), x(4).double())),
]


WITHOUT_GPU = [
    Row(RuntimeModeError, "bfloat16|float16|GPU", lambda _: moe_in(torch.bfloat16)),
    Row(RuntimeModeError, "bfloat16", lambda _: sum_reduce(x(4, 2, 8).bfloat16())),
    Row(RuntimeModeError, "needs a GPU|recording", lambda _: measure({"a": lambda _: None})),
    Row(RuntimeModeError, "needs a GPU", lambda _: measure_eager({"a": lambda _: None})),
    Row(RuntimeModeError, "needs a GPU", lambda _: measure_host({"a": lambda _: None})),
    Row(RuntimeModeError, "needs a GPU|split_k", lambda _: bench.bench(SHAPE, [1], ["triton"])),
    Row(RuntimeModeError, "GPU|or use 'triton'", lambda _: sum_reduce(x(4, 2, 8), impl="cuda")),
    Row(RuntimeModeError, "layer_classic|GPU", lambda _: suites.record(["layer_classic"])),
    Row(RuntimeModeError, "fast_counters|GPU", lambda _: suites.record(["fast_counters"])),
]


ON_GPU = [
    Row(DeviceError, "w13 is on cpu", lambda _: moe(w13=lambda w: w.cpu())),
    Row(SharedMemoryError, "shared memory", lambda _: moe_in(torch.bfloat16, KernelConfig(256, 256, 256, 1, 8, 5))),
]


ROWS = TENSORS + TMA + SORTED + PLUGGED_IN + ROUTINGS + NAMES

EVERY = ROWS + CONFIGS + FILES + TUNER + WITHOUT_GPU + ON_GPU
"""Those of the other files too."""


def lost_wait() -> None:
    """A launch after a kernel of this process has given up waiting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residency, "_reports", {0: torch.tensor([3 | 64 << 8, 33, 0, 1], dtype=torch.int32)})
        patch.setattr(residency, "_told", [])
        residency.raise_if_lost()


def ids(row: list[int]) -> torch.Tensor:
    return torch.tensor([row] * 5, dtype=torch.int32, device=DEVICE)


def moe_on_meta() -> torch.Tensor:
    tensors = arguments(inputs.make_inputs(SHAPE, 5, device=DEVICE))
    on_meta = {name: None if t is None else t.to("meta") for name, t in tensors.items()}
    return fused_moe(**on_meta, check_routing=False)


def moe_in(dtype: torch.dtype, with_config: KernelConfig | None = None) -> torch.Tensor:
    tensors = inputs.make_inputs(SHAPE, 5, device=DEVICE, dtype=dtype)
    return fused_moe(**arguments(tensors), config=with_config)


def logits(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    good = inputs.make_inputs(SHAPE, 5, device=DEVICE)
    return fused_moe(good.hidden_states, good.w13, good.w2, router_logits=router_logits, top_k=top_k)


@every(ROWS)
def test_bad_input_is_named(row: Row, tmp_path: Path) -> None:
    judge(row, tmp_path)


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="has a GPU")
@every(WITHOUT_GPU)
def test_bad_input_without_a_gpu(row: Row, tmp_path: Path) -> None:
    judge(row, tmp_path)


@pytest.mark.gpu
@every(ON_GPU)
def test_bad_input_on_a_gpu(row: Row, tmp_path: Path) -> None:
    judge(row, tmp_path)


def test_unhelpful_messages_are_seen() -> None:
    assert "expected" in str(unhelpful("w13 is float16. Cast it."))
    assert "what to do" in str(unhelpful("w13 is float16. Cast it. Expected float32."))
    assert "what to do" in str(unhelpful("Expected float32. That is what we pass on."))
    assert unhelpful("w13 is float16. Expected float32. Cast it.") is None


def test_every_class_of_error_is_in_the_table() -> None:
    def below(cls: type) -> set[type]:
        return {cls} | {grandchild for child in cls.__subclasses__() for grandchild in below(child)}

    mine = {cls for cls in below(MoelabError) if cls.__module__ == errors.__name__} - {MoelabError}
    assert mine == {row.error for row in EVERY if row not in ON_GPU}


def test_errors_are_also_the_builtin_ones() -> None:
    """Someone who never read errors.py catches them too."""
    for cls, builtin in {ShapeError: ValueError, DtypeError: TypeError, UnknownNameError: LookupError}.items():
        assert issubclass(cls, builtin)
    assert str(UnknownNameError("two\nlines")) == "two\nlines"


@pytest.mark.parametrize("impl", available_implementations())
def test_ids_are_always_checked_on_the_cpu(impl: str) -> None:
    cpu = inputs.make_inputs(SHAPE, 5, device="cpu")
    with pytest.raises(RoutingError):
        fused_moe(**arguments(cpu) | {"topk_ids": cpu.topk_ids + 4}, impl=impl)
