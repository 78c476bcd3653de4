"""Bad input: each a named exception that says what was wrong, what was expected, and what to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from error_rows import DEVICE, HUGE, SHAPE, Row, arguments, gemm, judge, moe, unhelpful, with_environment, x
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
from moelab.kernels.from_file import load_kernels
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
    Row(
        "hidden states of rank 3", lambda _: moe(hidden_states=x(1, 5, 32)), ShapeError, ("hidden_states", "(1, 5, 32)")
    ),
    Row("hidden states of rank 1", lambda _: moe(hidden_states=x(32)), ShapeError, ("hidden_states", "(32,)")),
    Row("weights of rank 2", lambda _: moe(w13=x(32, 32)), ShapeError, ("w13", "num_experts")),
    Row("weights of another model", lambda _: moe(w2=lambda w: w[:, :, :8].contiguous()), ShapeError, ("w2", "16")),
    Row("weights for other experts", lambda _: moe(w2=lambda w: w[:3]), ShapeError, ("w2", "(4, 32, 16)")),
    Row("gate and up rows that are odd", lambda _: moe(w13=x(4, 31, 32)), ShapeError, ("31 rows", "gated=False")),
    Row("ids for other tokens", lambda _: moe(topk_ids=lambda t: t[:3]), ShapeError, ("topk_ids", "(3, 2)", "(5, ")),
    Row("weights of another top_k", lambda _: moe(topk_weights=lambda t: t[:, :1]), ShapeError, ("topk_weights",)),
    Row("a bias of another size", lambda _: moe(b13=x(4, 31)), ShapeError, ("b13", "(4, 32)")),
    Row(
        "logits of rank 1 to a kernel",
        lambda _: route(x(4), 1),
        ShapeError,
        ("router_logits", "(num_tokens, num_experts)"),
    ),
    Row(
        "a bias for other experts",
        lambda _: route(x(3, 4), 1, correction_bias=x(5)),
        ShapeError,
        ("(5,)", "Expected (4,)"),
    ),
    Row(
        "a result for other tokens",
        lambda _: route(x(3, 4), 2, out=new_routed(2, 4, 2, DEVICE)),
        ShapeError,
        ("out.topk_weights", "(3, 2)"),
    ),
    Row("flat ids to order", lambda _: expert_order(x(4).int(), 4), ShapeError, ("topk_ids", "(num_tokens, top_k)")),
    Row("an order of no expert", lambda _: expert_order(x(4, 1).int(), 0), ShapeError, ("num_experts = 0",)),
    Row(
        "an order for other slots",
        lambda _: expert_order(x(4, 1).int(), 4, out=new_expert_order(3, 4, DEVICE)),
        ShapeError,
        ("out.sorted_slots", "(4)"),
    ),
    Row(
        "logits of rank 1", lambda _: routers.softmax_topk(x(4), 1), ShapeError, ("logits", "(num_tokens, num_experts)")
    ),
    Row("sum over rank 2", lambda _: sum_reduce(x(4, 8)), ShapeError, ("x has shape (4, 8)", "top_k")),
    Row("sum over no slot", lambda _: sum_reduce(x(4, 0, 8)), ShapeError, ("top_k >= 1",)),
    Row("an out of another size", lambda _: sum_reduce(x(4, 2, 8), out=x(4, 9)), ShapeError, ("out", "(4, 8)")),
    Row("an activation of odd width", lambda _: activation(x(4, 31)), ShapeError, ("31",)),
    Row("pairs that top_k does not divide", lambda _: gemm(num_pairs=9), ShapeError, ("9 pairs", "top_k = 2")),
    Row("a of other rows", lambda _: gemm(a=x(4, 32)), ShapeError, ("a has shape (4, 32)", "(5, 32)")),
    Row("results of another shape", lambda _: precision.error(x(2), x(3).double()), ShapeError, ("(2,)", "(3,)")),
    Row("weights in another dtype", lambda _: moe(w2=lambda w: w.half()), DtypeError, ("w2 is float16", "float32")),
    Row(
        "integer hidden states", lambda _: moe(hidden_states=lambda t: t.int()), DtypeError, ("hidden_states is int32",)
    ),
    Row(
        "float64 logits",
        lambda _: route(x(3, 4, dtype=torch.float64), 2),
        DtypeError,
        ("router_logits is float64", "float32"),
    ),
    Row(
        "integer bias",
        lambda _: route(x(3, 4), 2, correction_bias=x(4).int()),
        DtypeError,
        ("correction_bias is int32",),
    ),
    Row(
        "float ids to order", lambda _: expert_order(x(3, 2), 4), DtypeError, ("topk_ids is float32", "int32 or int64")
    ),
    Row("float ids", lambda _: moe(topk_ids=lambda t: t.float()), DtypeError, ("topk_ids is float32", "int32")),
    Row(
        "half routing weights", lambda _: moe(topk_weights=lambda t: t.half()), DtypeError, ("topk_weights is float16",)
    ),
    Row("an integer sum", lambda _: sum_reduce(x(4, 2, 8, dtype=torch.int32)), DtypeError, ("x is int32", "bfloat16")),
    Row(
        "an out of another dtype", lambda _: sum_reduce(x(4, 2, 8), out=x(4, 8).half()), DtypeError, ("out is float16",)
    ),
    Row("a dtype nobody knows", lambda _: dtypes.torch_dtype("float12"), DtypeError, ("float12", "bfloat16")),
    Row("a shape's dtype", lambda _: SHAPE.with_dtype("fp12"), DtypeError, ("fp12", "bfloat16")),
    Row("a reference in float32", lambda _: precision.error(x(2), x(2)), DtypeError, ("float32", "float64")),
    Row("everything on meta", lambda _: moe_on_meta(), DeviceError, ("meta", DEVICE)),
    Row("weights elsewhere", lambda _: moe(w13=lambda w: w.to("meta")), DeviceError, ("w13 is on meta", "one device")),
    Row(
        "an out elsewhere",
        lambda _: sum_reduce(x(4, 2, 8), out=x(4, 8, device="meta")),
        DeviceError,
        ("out is on meta",),
    ),
    Row("a sum on meta", lambda _: sum_reduce(x(4, 2, 8, device="meta")), DeviceError, ("x is on meta", DEVICE)),
    Row("logits on meta", lambda _: route(x(3, 4, device="meta"), 2), DeviceError, ("router_logits is on meta",)),
    Row(
        "a bias elsewhere",
        lambda _: route(x(3, 4), 2, correction_bias=x(4, device="meta")),
        DeviceError,
        ("correction_bias", "one device"),
    ),
    Row(
        "logits of every second expert",
        lambda _: route(x(3, 8)[:, ::2], 2),
        LayoutError,
        ("router_logits has strides",),
    ),
    Row("ids on meta", lambda _: align(x(4, 2, device="meta").int(), 16, 4), DeviceError, ("topk_ids is on meta",)),
    Row("transposed states", lambda _: moe(hidden_states=x(32, 5).T), LayoutError, ("hidden_states", "contiguous")),
    Row("transposed weights", lambda _: moe(w2=x(4, 16, 32).mT), LayoutError, ("w2 has strides", ".contiguous()")),
    Row("every second column", lambda _: sum_reduce(x(4, 2, 16)[:, :, ::2]), LayoutError, ("x has strides",)),
    Row("a strided activation", lambda _: activation(x(4, 64)[:, ::2]), LayoutError, ("x has strides",)),
]


TMA = [
    Row(
        "TMA on a chip without it",
        lambda _: check_tma("w13", x(4, 8, 16), (16, 16), chips.TARGETS["sm_80"]),
        DeviceError,
        ("TMA", "sm_80", "sm_90 or later"),
    ),
    Row(
        "TMA on AMD",
        lambda _: check_tma("w13", x(4, 8, 16), (16, 16), chips.TARGETS["gfx942"]),
        DeviceError,
        ("TMA", "gfx942"),
    ),
    Row("a strided weight for TMA", lambda _: descriptor(x(4, 16, 8).mT), LayoutError, ("w has strides", "contiguous")),
    Row(
        "a weight off 16 bytes",
        lambda _: descriptor(x(513)[1:].view(4, 8, 16)),
        LayoutError,
        ("w starts 4 bytes past", "16 bytes", ".clone()"),
    ),
    Row("rows off 16 bytes", lambda _: descriptor(x(4, 8, 15)), LayoutError, ("A row of w is 60 bytes", "16 bytes")),
    Row("a weight of rank 2 for TMA", lambda _: descriptor(x(8, 16)), ShapeError, ("w has shape (8, 16)",)),
    Row("an integer weight for TMA", lambda _: descriptor(x(4, 8, 16).int()), DtypeError, ("w is int32", "bfloat16")),
    Row("a box too high", lambda _: descriptor(x(4, 8, 16), (512, 16)), ConfigError, ("512 x 16", "at most 256")),
    Row(
        "a bound on descriptors that is no number",
        lambda _: with_environment("MOELAB_TMA_DESC_CACHE_MAX", "lots", lambda: descriptor(x(4, 8, 16))),
        ConfigError,
        ("MOELAB_TMA_DESC_CACHE_MAX", "'lots'", "0 to keep none"),
    ),
    Row(
        "barriers over shared memory",
        lambda _: check_tma_config(HUGE, torch.bfloat16, chips.TARGETS["sm_90"]),
        SharedMemoryError,
        ("with TMA", "232448"),
    ),
    Row("SPLIT_K by TMA", lambda _: gemm(way=grouped_gemm_tma, config=SPLIT), ConfigError, ("SPLIT_K = 2",)),
]


SORTED = [
    Row("SPLIT_K for gated_gemm", lambda _: gemm(way=gated_gemm, config=SPLIT), ConfigError, ("SPLIT_K = 2",)),
    Row("half a tile of 8 rows", lambda _: gemm(way=gated_gemm), ConfigError, ("BLOCK_SIZE_N = 16", "at least 32")),
    Row(
        "an activation that has no gate",
        lambda _: gemm(way=gated_gemm, activation="relu2"),
        UnknownNameError,
        ("gated activation 'relu2'", "silu"),
    ),
    Row(
        "rows that are not sorted",
        lambda _: gemm(way=sorted_gemm, top_k=1),
        ShapeError,
        ("a has shape (5, 32)", "Expected (96, 32)"),
    ),
    Row(
        "slots to scatter into one row",
        lambda _: gemm(x(96, 32), way=sorted_gemm),
        ShapeError,
        ("top_k = 2", "a row per pair", "sum_reduce"),
    ),
]


PLUGGED_IN = [
    Row(
        "a wait that was given up",
        lambda _: lost_wait(),
        KernelTimeoutError,
        ("CTA 33", "tile descriptor 0", "1 counts missing", "context is gone"),
    ),
    Row("kernels in no file", lambda p: load_kernels(p / "mine.py"), UnknownNameError, ("mine.py", "Run the cells")),
    Row("more than silu", lambda _: plain(activation="gelu", b2=x(4, 32)), ConfigError, ("'gelu', biases", "teach it")),
    Row("a gallery of nothing", lambda p: gallery.write_gallery([], p), RuntimeModeError, ("no notebook", "Name them")),
    Row("no tiles to try", lambda _: your_kernel.tune(None, "mine", []), ConfigError, ("No tiles", "mine")),
]


ROUTINGS = [
    Row("top_k over the experts", lambda _: routing.make_routing("uniform", 3, 4, 5), RoutingError, ("top_k = 5", "4")),
    Row("top_k of logits", lambda _: routers.softmax_topk(x(3, 4), 5), RoutingError, ("top_k = 5", "4 experts")),
    Row("top_k to a kernel", lambda _: route(x(3, 4), 5), RoutingError, ("top_k = 5", "4 experts")),
    Row("groups to a kernel", lambda _: route(x(3, 8), 2, num_groups=3), RoutingError, ("3 groups", "8 experts")),
    Row(
        "experts of a rank there is not",
        lambda _: route(x(3, 8), 2, local_experts=range(4, 12)),
        RoutingError,
        ("range(4, 12) of 8 experts",),
    ),
    Row(
        "every second expert of a rank",
        lambda _: routing.route_ref(x(3, 8), 2, local_experts=range(0, 8, 2)),
        RoutingError,
        ("range(0, 8, 2) of 8 experts",),
    ),
    Row("top_k of no expert", lambda _: routers.softmax_topk(x(3, 4), 0), RoutingError, ("top_k = 0",)),
    Row("a model's top_k", lambda _: dataclasses.replace(SHAPE, top_k=5), ShapeError, ("top_k is 5", "4 experts")),
    Row(
        "an id over the last",
        lambda _: moe(topk_ids=ids([0, 4]), check_routing=True),
        RoutingError,
        ("[0, 4]", "4 experts", "[0, 4)"),
    ),
    Row("an id under -1", lambda _: moe(topk_ids=ids([-2, 1]), check_routing=True), RoutingError, ("[-2, 1]", "-1")),
    Row(
        "an expert twice", lambda _: moe(topk_ids=ids([1, 1]), check_routing=True), RoutingError, ("same expert twice",)
    ),
    Row("no routing", lambda _: moe(topk_ids=None, topk_weights=None), RoutingError, ("router_logits", "topk_ids")),
    Row("two routings", lambda _: moe(router_logits=x(5, 4), top_k=2), RoutingError, ("router_logits", "alone")),
    Row("logits for other tokens", lambda _: logits(x(4, 4), 2), ShapeError, ("(4, 4)", "Expected (5, 4)")),
    Row("logits for other experts", lambda _: logits(x(5, 6), 2), ShapeError, ("(5, 6)", "Expected (5, 4)")),
    Row(
        "groups that do not divide",
        lambda _: routers.grouped_topk(x(3, 8), 2, num_groups=3),
        RoutingError,
        ("3 groups",),
    ),
    Row("a routing nobody knows", lambda _: routing.make_routing("zip", 3, 4, 2), UnknownNameError, ("'zip'", "zipf")),
    Row(
        "a routing file cut short",
        lambda p: routing.load_routing(a_routing(p, b"PK"), 4),
        RoutingError,
        ("topk_ids.pt",),
    ),
    Row(
        "a routing file of floats", lambda p: routing.load_routing(a_routing(p, x(3, 2)), 4), RoutingError, ("float32",)
    ),
    Row(
        "a routing file out of range",
        lambda p: routing.load_routing(a_routing(p, ids([0, 9])), 4),
        RoutingError,
        ("9",),
    ),
    Row("a routing file that is not there", lambda p: routing.load_routing(p / "no.npy", 4), RoutingError, ("no.npy",)),
]


NAMES = [
    Row(
        "a preset nobody knows",
        lambda _: shapes.preset("qwen3-30b"),
        UnknownModelError,
        ("Did you mean qwen3-30b-a3b",),
    ),
    Row(
        "a model nobody knows", lambda _: shapes.load_model("mixtral"), UnknownModelError, ("Did you mean mixtral-8x",)
    ),
    Row("an implementation", lambda _: moe(impl="tritn"), UnknownNameError, ("'tritn'", "Did you mean triton")),
    Row(
        "a sum's implementation",
        lambda _: sum_reduce(x(4, 2, 8), impl="cuda_f32"),
        UnknownNameError,
        ("'cuda_f32'", "cuda"),
    ),
    Row("an activation", lambda _: moe(activation="swish"), UnknownNameError, ("'swish'", "silu")),
    Row("a kernel's activation", lambda _: activation(x(4, 8), "relu2"), UnknownNameError, ("relu2", "gated")),
    Row("an oracle's activation", lambda _: reference.activation_ref(x(4, 8), "gelu2"), UnknownNameError, ("gelu2",)),
    Row("a score to a kernel", lambda _: route(x(3, 4), 2, score="sigmod"), UnknownNameError, ("sigmod", "'sigmoid'")),
    Row("a router's score", lambda _: routers.grouped_topk(x(3, 4), 2, score="sigmod"), UnknownNameError, ("sigmod",)),
    Row(
        "a bench's implementation",
        lambda _: bench.bench(SHAPE, [1], ["torch", "tritn"]),
        UnknownNameError,
        ("'tritn'", "Did you mean triton"),
    ),
    Row(
        "a bench's routing",
        lambda _: bench.bench(SHAPE, [1], ["torch"], routing="zipff"),
        UnknownNameError,
        ("'zipff'", "Did you mean zipf"),
    ),
    Row("a suite", lambda _: suites.record(["sum_redce"]), UnknownNameError, ("sum_redce", "Did you mean sum_reduce")),
    Row("a device", lambda _: roofline.load_ceilings("NVIDIA_H20"), UnknownNameError, ("NVIDIA_H20", "NVIDIA_H200")),
    Row(
        "a kind of ceiling",
        lambda _: roofline.load_ceilings(kind="guessed"),
        UnknownNameError,
        ("guessed", "datasheet"),
    ),
    Row(
        "a dtype without a ceiling",
        lambda _: roofline.load_ceilings(dtype="int3"),
        UnknownNameError,
        ("int3", "bfloat16"),
    ),
    Row("bytes of a dtype", lambda _: dtypes.dtype_bytes("bfloat61"), UnknownNameError, ("bfloat61", "bfloat16")),
    Row(
        "no torch among contenders",
        lambda _: precision.compare({"a": x(2)}, x(2).double()),
        UnknownNameError,
        ("'torch'",),
    ),
    Row(
        "a shard that does not divide",
        lambda _: shapes.preset("qwen3-30b-a3b").shard(5),
        ShardError,
        ("tp_size = 5", "768", "1, 2, 3, 4, 6, 8"),
    ),
    Row("experts that do not divide", lambda _: shapes.preset("grok-2").shard(16, 16), ShardError, ("ep_size = 16",)),
    Row("degrees that do not divide", lambda _: SHAPE.shard(4, 3), ShardError, ("ep_size = 3",)),
    Row("a degree of zero", lambda _: SHAPE.shard(0), ShapeError, ("tp_size is 0", "at least 1")),
    Row("no hidden size", lambda _: dataclasses.replace(SHAPE, hidden_size=0), ShapeError, ("hidden_size is 0",)),
    Row(
        "a wrong result",
        lambda _: precision.check(x(4) * 2, x(4), x(4).double()),
        PrecisionError,
        ("off by 1", "twice torch's"),
    ),
    Row(
        "a result of NaN", lambda _: precision.check(x(4) * float("nan"), x(4), x(4).double()), PrecisionError, ("NaN",)
    ),
]


WITHOUT_GPU = [
    Row(
        "bf16 under the interpreter", lambda _: moe_in(torch.bfloat16), RuntimeModeError, ("bfloat16", "float16", "GPU")
    ),
    Row(
        "a bf16 sum under the interpreter", lambda _: sum_reduce(x(4, 2, 8).bfloat16()), RuntimeModeError, ("bfloat16",)
    ),
    Row("timing", lambda _: measure({"a": lambda _: None}), RuntimeModeError, ("needs a GPU", "recording")),
    Row("eager timing", lambda _: measure_eager({"a": lambda _: None}), RuntimeModeError, ("needs a GPU",)),
    Row("a host's timing", lambda _: measure_host({"a": lambda _: None}), RuntimeModeError, ("needs a GPU",)),
    Row("a bench", lambda _: bench.bench(SHAPE, [1], ["triton"]), RuntimeModeError, ("needs a GPU", "split_k")),
    Row("a cuda kernel", lambda _: sum_reduce(x(4, 2, 8), impl="cuda"), RuntimeModeError, ("GPU", "or use 'triton'")),
    Row("recording", lambda _: suites.record(["layer_classic"]), RuntimeModeError, ("layer_classic", "GPU")),
    Row("counters", lambda _: suites.record(["fast_counters"]), RuntimeModeError, ("fast_counters", "GPU")),
]


ON_GPU = [
    Row("weights on the host", lambda _: moe(w13=lambda w: w.cpu()), DeviceError, ("w13 is on cpu",)),
    Row(
        "a config over this GPU",
        lambda _: moe_in(torch.bfloat16, KernelConfig(256, 256, 256, 1, 8, 5)),
        SharedMemoryError,
        ("shared memory",),
    ),
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


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_bad_input_is_named(row: Row, tmp_path: Path) -> None:
    complaint = unhelpful(judge(row, tmp_path))
    assert complaint is None, complaint


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="has a GPU")
@pytest.mark.parametrize("row", WITHOUT_GPU, ids=lambda row: row.label)
def test_bad_input_without_a_gpu(row: Row, tmp_path: Path) -> None:
    complaint = unhelpful(judge(row, tmp_path))
    assert complaint is None, complaint


@pytest.mark.gpu
@pytest.mark.parametrize("row", ON_GPU, ids=lambda row: row.label)
def test_bad_input_on_a_gpu(row: Row, tmp_path: Path) -> None:
    complaint = unhelpful(judge(row, tmp_path))
    assert complaint is None, complaint


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


def test_labels_are_unique() -> None:
    labels = [row.label for row in EVERY]
    assert len(labels) == len(set(labels))


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
