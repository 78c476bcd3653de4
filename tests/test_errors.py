"""Bad input: each a named exception that says what was wrong, what was expected, and what to do."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from moelab import (
    chips,
    config,
    config_files,
    errors,
    inputs,
    precision,
    recordings,
    reference,
    roofline,
    routers,
    routing,
    runtime,
    shapes,
    suites,
)
from moelab.cli import config_commands
from moelab.config import KernelConfig
from moelab.errors import (
    ConfigError,
    ConfigFileError,
    DeviceError,
    DtypeError,
    JournalError,
    LandscapeError,
    LayoutError,
    MoelabError,
    PrecisionError,
    RecordingError,
    RoutingError,
    RuntimeModeError,
    ShapeError,
    ShardError,
    SharedMemoryError,
    UnknownArchitectureError,
    UnknownModelError,
    UnknownNameError,
    WorkspaceError,
)
from moelab.fused_moe import IMPLEMENTATIONS, fused_moe
from moelab.kernels import fast_layer
from moelab.kernels.activation import activation
from moelab.kernels.align import align
from moelab.kernels.descriptors import check_tma, check_tma_config, weight_descriptor
from moelab.kernels.expert_order import expert_order, new_expert_order
from moelab.kernels.fast_instances import Instance
from moelab.kernels.from_file import load_kernels
from moelab.kernels.gated_gemm import gated_gemm
from moelab.kernels.grouped_gemm import grouped_gemm
from moelab.kernels.grouped_gemm_tma import grouped_gemm_tma
from moelab.kernels.route import new_routed, route
from moelab.kernels.sorted_gemm import sorted_gemm
from moelab.kernels.split_k_atomic import split_k_atomic_f32
from moelab.kernels.split_k_workspace import new_workspace, split_k_workspace
from moelab.kernels.sum_reduce import sum_reduce
from moelab.measure import measure, measure_eager, measure_host, median_interval
from moelab.plots import gallery, handover
from moelab.studies import fleet, tuner_regret
from moelab.suites import bench, fast_counters, your_kernel
from moelab.tuner import evaluators, export, journal, landscape, space, strategies
from moelab.tuner.finals import Finals
from moelab.tuner.problem import Problem
from moelab.tuner.results import TuneResult
from moelab.tuner.transfer import Transfer
from moelab.tuner.tuned_kernels import kernel_name, require_rules, require_tunable

DEVICE = runtime.current().device
SHAPE = shapes.MoEShape("tiny", num_experts=4, top_k=2, hidden_size=32, moe_intermediate_size=16, dtype="float32")
CONFIG = KernelConfig(16, 16, 16, 1)
SPLIT = KernelConfig(16, 32, 16, 1, SPLIT_K=2)
HUGE = KernelConfig(128, 256, 128, 1, 8, 4)


class Row(NamedTuple):
    """label; what to call with a folder; the exception; words its message must contain."""

    label: str
    call: Callable[[Path], object]
    error: type[MoelabError]
    words: tuple[str, ...]


def moe(impl: str = "triton", **changes: object) -> torch.Tensor:
    """fused_moe on good inputs, some of them replaced; a callable changes the good one."""
    good = dataclasses.asdict(inputs.make_inputs(SHAPE, 5, device=DEVICE))
    given = {name: change(good.get(name)) if callable(change) else change for name, change in changes.items()}
    return fused_moe(**(good | given), impl=impl)


def gemm(a=None, alignment_rows: int = 16, way: Callable = grouped_gemm, **changes: object) -> torch.Tensor:
    """A grouped GEMM on good inputs, some of them replaced."""
    good = inputs.make_inputs(SHAPE, 5, device=DEVICE)
    aligned = align(good.topk_ids, alignment_rows, 4)
    given = {"config": CONFIG, "num_pairs": 10, "top_k": 2, **changes}
    return way(good.hidden_states if a is None else a, good.w13, aligned, **given)


def plain(**changes: object) -> None:
    """A call of an implementation that takes plain layers only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(IMPLEMENTATIONS, "mine", lambda call: call.require_plain("mine"))
        moe("mine", **changes)


def x(*size: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> torch.Tensor:
    return torch.ones(size, dtype=dtype, device=device)


def descriptor(w: torch.Tensor, block: tuple[int, int] = (16, 16)) -> object:
    return weight_descriptor(w, block)


def with_environment(name: str, value: str, call: Callable[[], object]) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        return call()


def one_row(**changes: object) -> recordings.Recording:
    row = {"name": "a", "samples_us": [1.0, 2.0], **changes}
    return recordings.Recording("suite", runtime.provenance(seed=0), {"kind": "test"}, (row,))


def a_recording(folder: Path, change: Callable[[str], str]) -> Path:
    path = recordings.write(one_row(), folder / "suite.json")
    path.write_text(change(path.read_text()))
    return path


def a_config_file(folder: Path, change: Callable[[str], str]) -> Path:
    path = folder / "E=8,N=14336,device_name=NVIDIA_H200.json"
    config_files.write_config_file(path, {1: CONFIG})
    path.write_text(change(path.read_text()))
    return path


def a_model(folder: Path, change: Callable[[dict], object]) -> Path:
    content = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64}
    content = change({"architectures": ["MixtralForCausalLM"], **content, "intermediate_size": 96})
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def a_routing(folder: Path, ids: torch.Tensor | bytes) -> Path:
    path = folder / "topk_ids.pt"
    if isinstance(ids, bytes):
        path.write_bytes(ids)
    else:
        torch.save(ids, path)
    return path


def exported(
    folder: Path,
    with_config: KernelConfig | None = None,
    rules: str = "moelab",
    version: str = "3.6.0",
    down: bool = False,
) -> object:
    name = config_files.FileName(8, 14336, "NVIDIA_H200", down=down)
    return config_files.export({1: with_config or CONFIG}, name, rules=rules, out=folder, triton_version=version)


def export_flat(folder: Path) -> None:
    """A file that says nowhere under which Triton version it was tuned, through the command itself."""
    config_commands.export(a_config_file(folder, str), rules="vllm", out=folder / "out")


def no_folder(rules: str) -> object:
    if importlib.util.find_spec(rules) or config_files.RULES[rules].environment in os.environ:
        pytest.skip(f"{rules} has a folder here")
    return config_files.lookup(8, 64, "X", num_tokens=1, triton_version="3.6.0", rules=rules)


def cut(text: str) -> str:
    return text[:-9]


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
    Row("a dtype nobody knows", lambda _: runtime.torch_dtype("float12"), DtypeError, ("float12", "bfloat16")),
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
        "a combine nobody knows",
        lambda _: gemm(way=sorted_gemm, combine="atomic_f23"),
        UnknownNameError,
        ("'atomic_f23'", "scatter", "Did you mean atomic_f32"),
    ),
    Row(
        "slots to scatter into one row",
        lambda _: gemm(x(96, 32), way=sorted_gemm),
        ShapeError,
        ("combine='scatter'", "top_k = 2", "sum_reduce"),
    ),
]

PLUGGED_IN = [
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

CONFIGS = [
    Row(
        "SPLIT_K for grouped_gemm",
        lambda _: gemm(config=KernelConfig(16, 16, 16, 1, SPLIT_K=2)),
        ConfigError,
        ("SPLIT_K = 2",),
    ),
    Row(
        "SPLIT_K with empty slices",
        lambda _: gemm(way=split_k_atomic_f32, config=KernelConfig(16, 16, 16, 1, SPLIT_K=4)),
        ConfigError,
        ("SPLIT_K = 4", "empty slices", "K = 32 has 2 blocks"),
    ),
    Row(
        "SPLIT_K with empty slices of GEMM2",
        lambda _: moe("split_k_workspace", config=KernelConfig(16, 16, 16, 1, SPLIT_K=2)),
        ConfigError,
        ("SPLIT_K = 2", "K = 16 has 1 block of"),
    ),
    Row(
        "SPLIT_K under one",
        lambda _: gemm(way=split_k_workspace, config=KernelConfig(16, 16, 16, 1, SPLIT_K=-2)),
        ConfigError,
        ("SPLIT_K = -2", "positive power of two"),
    ),
    Row(
        "SPLIT_K of three",
        lambda _: gemm(way=split_k_atomic_f32, config=KernelConfig(16, 16, 16, 1, SPLIT_K=3)),
        ConfigError,
        ("SPLIT_K = 3",),
    ),
    Row(
        "SPLIT_K in int16",
        lambda _: gemm(way=split_k_workspace, config=KernelConfig(16, 16, 16, 1, SPLIT_K=torch.tensor(2).short())),
        ConfigError,
        ("SPLIT_K is tensor(2, dtype=torch.int16)", "not an integer"),
    ),
    Row(
        "a workspace that does not fit",
        lambda _: new_workspace(16, 2**40, 4096, torch.float32, DEVICE),
        WorkspaceError,
        (str(16 * 2**40 * 4096 * 4), "16 slices"),
    ),
    Row(
        "a workspace too small",
        lambda _: gemm(way=split_k_workspace, workspace=x(3)),
        WorkspaceError,
        ("12 bytes", "1280 bytes"),
    ),
    Row(
        "a workspace in another dtype",
        lambda _: gemm(way=split_k_workspace, workspace=x(999, dtype=torch.float64)),
        DtypeError,
        ("workspace is float64", "float32"),
    ),
    Row("rows aligned for another config", lambda _: gemm(alignment_rows=32), ConfigError, ("aligned to 32", "is 16")),
    Row(
        "two BLOCK_SIZE_M",
        lambda _: moe(config=CONFIG, down_config=KernelConfig(32, 16, 16, 1)),
        ConfigError,
        ("16", "32", "both GEMMs"),
    ),
    Row(
        "a block of 24",
        lambda _: gemm(config=KernelConfig(16, 24, 16, 1)),
        ConfigError,
        ("BLOCK_SIZE_N = 24", "power of two"),
    ),
    Row(
        "a block of 8", lambda _: moe(config=KernelConfig(16, 16, 8, 1)), ConfigError, ("BLOCK_SIZE_K = 8", "under 16")
    ),
    Row(
        "three warps", lambda _: config.check(KernelConfig(16, 16, 16, 1, num_warps=3)), ConfigError, ("num_warps = 3",)
    ),
    Row(
        "a field that is text",
        lambda _: config.check(KernelConfig("16", 16, 16, 1)),
        ConfigError,
        ("BLOCK_SIZE_M", "integer"),
    ),
    Row(
        "over shared memory",
        lambda _: config.check(HUGE, target="sm_90"),
        SharedMemoryError,
        ("393216", "232448", "num_stages"),
    ),
    Row("a target nobody knows", lambda _: config.check(CONFIG, target="sm_9"), UnknownNameError, ("sm_9", "sm_90")),
    Row(
        "a key that is misspelt",
        lambda _: KernelConfig.from_json(CONFIG.to_json() | {"num_warp": 4}),
        ConfigError,
        ("num_warp", "num_warps"),
    ),
    Row(
        "a key that is missing",
        lambda _: KernelConfig.from_json({"BLOCK_SIZE_M": 16}),
        ConfigError,
        ("missing key 'BLOCK_SIZE_N'",),
    ),
    Row("an empty batch", lambda _: config.default_config(0, 8), ConfigError, ("num_tokens = 0",)),
    Row(
        "a config file cut short",
        lambda p: config_files.read_config_file(a_config_file(p, cut)),
        ConfigFileError,
        ("not JSON", "cut short"),
    ),
    Row(
        "a config file that is not there",
        lambda p: config_files.read_config_file(p / "E=1"),
        ConfigFileError,
        ("E=1", "Cannot read"),
    ),
    Row(
        "a config file of a list",
        lambda p: config_files.read_config_file(a_config_file(p, lambda _: "[]")),
        ConfigFileError,
        ("list",),
    ),
    Row(
        "a config file without batches",
        lambda p: config_files.read_config_file(a_config_file(p, lambda _: "{}")),
        ConfigFileError,
        ("no batch size",),
    ),
    Row(
        "a batch size of -1",
        lambda p: config_files.read_config_file(a_config_file(p, lambda t: t.replace('"1"', '"-1"'))),
        ConfigFileError,
        ("'-1'",),
    ),
    Row(
        "a config file's name",
        lambda _: config_files.parse_file_name("E=8.json"),
        ConfigFileError,
        ("E=8.json", "device_name"),
    ),
    Row(
        "a device name with a comma",
        lambda _: config_files.file_name(8, 64, "a,b"),
        ConfigFileError,
        ("a,b", "NVIDIA H200"),
    ),
    Row(
        "a dtype selector", lambda _: config_files.file_name(8, 64, "X", "fp8"), UnknownNameError, ("'fp8'", "fp8_w8a8")
    ),
    Row("rules nobody knows", lambda p: look_up(p, rules="vllmm"), UnknownNameError, ("vllmm", "moelab")),
    Row("a broken file is not skipped", lambda p: look_up(p, change=cut), ConfigFileError, ("not JSON",)),
    Row(
        "a kernel's name in a file name",
        lambda _: config_files.file_name(8, 64, "X", kernel="Split-K"),
        ConfigFileError,
        ("'Split-K'", "split_k_workspace"),
    ),
    Row(
        "a kernel that a peer does not look up",
        lambda p: look_up(p, rules="vllm", kernel="split_k_workspace"),
        ConfigFileError,
        ("split_k_workspace", "rules='moelab'"),
    ),
    Row(
        "sglang without configs/ below its folder",
        lambda p: look_up(p, rules="sglang"),
        ConfigFileError,
        ("FileNotFoundError", "SGLANG_MOE_CONFIG_DIR", "configs/"),
    ),
    Row(
        "a folder that ends sglang's search",
        lambda p: look_up(
            make(p / "configs"), rules="sglang", config_dir=p, more=("triton_old",), triton_version="3.7.1"
        ),
        ConfigFileError,
        ("triton_old", "ValueError"),
    ),
    Row(
        "vLLM's format in sglang's tree",
        lambda p: config_files.read_config_file(
            a_config_file(p, lambda t: t.replace("{", '{"triton_version": "3.6.0",', 1)), "sglang"
        ),
        ConfigFileError,
        ("'triton_version'", "moelab export"),
    ),
    Row("a peer that is not installed", lambda _: no_folder("vllm"), ConfigFileError, ("VLLM_TUNED_CONFIG_FOLDER",)),
    Row(
        "an export over a file that is there",
        lambda p: [exported(p) for _ in range(2)],
        ConfigFileError,
        ("exists already", "--overwrite"),
    ),
    Row(
        "an export that no lookup would find",
        lambda p: exported(p, rules="vllm", down=True),
        ConfigFileError,
        ("_down", "vllm", "one config serves both"),
    ),
    Row(
        "an export of what the device cannot run",
        lambda p: exported(p, HUGE),
        ConfigError,
        ("batch size 1", "NVIDIA_H200", "shared memory"),
    ),
    Row(
        "an export of SPLIT_K to a peer",
        lambda p: exported(p, dataclasses.replace(CONFIG, SPLIT_K=2), rules="vllm"),
        ConfigError,
        ("SPLIT_K = 2", "vllm"),
    ),
    Row(
        "an export of a down config with another BLOCK_SIZE_M",
        lambda p: exported(p, KernelConfig(64, 64, 64, 1), down=True),
        ConfigFileError,
        ("BLOCK_SIZE_M = 64", "has 16", "up file first"),
    ),
    Row("an export's Triton version", lambda p: exported(p, version="3.6"), ConfigFileError, ("'3.6'", "3.6.0")),
    Row(
        "an export of a folder that a peer has no names for",
        lambda p: exported(p, down=True) and config_commands.export(p, rules="vllm", out=p / "out"),
        ConfigFileError,
        ("vllm", "Nothing of"),
    ),
    Row(
        "an odd N in vLLM's int4 names",
        lambda _: config_files.parse_file_name("E=8,N=5,device_name=X,dtype=int4_w4a16.json", "vllm"),
        ConfigFileError,
        ("odd N", "even"),
    ),
    Row("an export of nothing", config_files.sources, ConfigFileError, ("no config file",)),
    Row("an export of an unknown version", export_flat, ConfigFileError, ("--triton-version",)),
    Row("a doctor with no folder", lambda p: config_files.doctor(p / "gone"), ConfigFileError, ("gone",)),
    Row("a doctor with no files", config_files.doctor, ConfigFileError, ("no config file", "device_name")),
    Row(
        "a doctor between two trees",
        lambda p: [exported(p / name) for name in "ab"] and config_files.doctor(p),
        ConfigFileError,
        ("2 trees", "/a", "/b"),
    ),
    Row(
        "a doctor's rules",
        lambda p: exported(p) and config_files.doctor(p, "vlm"),
        UnknownNameError,
        ("'vlm'", "Did you mean vllm"),
    ),
]

FILES = [
    Row(
        "NaN in a recording",
        lambda p: recordings.load(a_recording(p, lambda t: t.replace("2.0", "NaN"))),
        RecordingError,
        ("NaN", "record suite"),
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
        ("cut short", "moelab record"),
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
        lambda p: with_environment("MOELAB_DATA_DIR", str(p), config_files.specimen.shipped_files),
        RecordingError,
        ("sglang_shipped_configs.json", "Restore"),
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
        ("config.json",),
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
    Row("bytes of a dtype", lambda _: chips.dtype_bytes("bfloat61"), UnknownNameError, ("bfloat61", "bfloat16")),
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
    Row("a cuda kernel", lambda _: sum_reduce(x(4, 2, 8), impl="cuda"), RuntimeModeError, ("GPU", "triton")),
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

ROWS = TENSORS + TMA + SORTED + PLUGGED_IN + ROUTINGS + CONFIGS + FILES + NAMES + TUNER


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


def ids(row: list[int]) -> torch.Tensor:
    return torch.tensor([row] * 5, dtype=torch.int32, device=DEVICE)


def moe_on_meta() -> torch.Tensor:
    tensors = dataclasses.asdict(inputs.make_inputs(SHAPE, 5, device=DEVICE))
    on_meta = {name: None if t is None else t.to("meta") for name, t in tensors.items()}
    return fused_moe(**on_meta, check_routing=False)


def moe_in(dtype: torch.dtype, with_config: KernelConfig | None = None) -> torch.Tensor:
    tensors = inputs.make_inputs(SHAPE, 5, device=DEVICE, dtype=dtype)
    return fused_moe(**dataclasses.asdict(tensors), config=with_config)


def logits(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    good = inputs.make_inputs(SHAPE, 5, device=DEVICE)
    return fused_moe(good.hidden_states, good.w13, good.w2, router_logits=router_logits, top_k=top_k)


def look_up(
    folder: Path,
    *,
    change: Callable[[str], str] = str,
    more: tuple[str, ...] = (),
    config_dir: Path | None = None,
    triton_version: str = "3.6.0",
    **given: object,
) -> object:
    """Look up a file that lies in folder/triton_3_6_0, beside folders named `more`."""
    a_config_file(folder, change).rename(make(folder / "triton_3_6_0") / "E=8,N=14336,device_name=NVIDIA_H200.json")
    for name in more:
        make(folder / name)
    return config_files.lookup(
        8, 14336, "NVIDIA H200", num_tokens=1, triton_version=triton_version, config_dir=config_dir or folder, **given
    )


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def unknown(content: dict) -> dict:
    return content | {"architectures": ["MysteryForCausalLM"], "model_type": "mystery"}


def dense(_: dict) -> dict:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96}


def judge(row: Row, folder: Path) -> str:
    """Run a row; its message. Fails if nothing is raised, or another class, or words are missing."""
    with pytest.raises(MoelabError) as caught:
        row.call(folder)
    message = str(caught.value)
    assert type(caught.value) is row.error, f"{type(caught.value).__name__}: {message}"
    missing = [word for word in row.words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    return message


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


# --- what every message has ------------------------------------------------------------------------------------

INSTRUCTIONS = """
    Add Align Build Call Cast Change Check Choose Compare Compute Correct Count Draw Fetch Flatten Give
    Install Look Lower Make Map Measure Move Name Pass Raise Read Record Rename Reshape Restore Route Run Save
    Skip Take Tune Use
""".split()  # noqa: SIM905
EITHER = "|".join([*INSTRUCTIONS, *(word.lower() for word in INSTRUCTIONS)])
INSTRUCTION = re.compile(rf"(^|[,;:] (or )?)({EITHER})\b")


def unhelpful(message: str) -> str | None:
    """What a message lacks: the word "expected", or a last sentence that says what to do. None if it has both."""
    if "expected" not in message.lower():
        return f"does not say what was expected: {message}"
    if not INSTRUCTION.search(re.split(r"(?<=[.?])\s", message)[-1]):
        return f"does not end with what to do: {message}"
    return None


def test_unhelpful_messages_are_seen() -> None:
    assert "expected" in str(unhelpful("w13 is float16. Cast it."))
    assert "what to do" in str(unhelpful("w13 is float16. Cast it. Expected float32."))
    assert "what to do" in str(unhelpful("Expected float32. That is what we pass on."))
    assert unhelpful("w13 is float16. Expected float32. Cast it.") is None


def test_every_class_of_error_is_in_the_table() -> None:
    def below(cls: type) -> set[type]:
        return {cls} | {grandchild for child in cls.__subclasses__() for grandchild in below(child)}

    mine = {cls for cls in below(MoelabError) if cls.__module__ == errors.__name__} - {MoelabError}
    assert mine == {row.error for row in ROWS + WITHOUT_GPU}


def test_labels_are_unique() -> None:
    labels = [row.label for row in ROWS + WITHOUT_GPU + ON_GPU]
    assert len(labels) == len(set(labels))


def test_errors_are_also_the_builtin_ones() -> None:
    """Someone who never read errors.py catches them too."""
    for cls, builtin in {ShapeError: ValueError, DtypeError: TypeError, UnknownNameError: LookupError}.items():
        assert issubclass(cls, builtin)
    assert str(UnknownNameError("two\nlines")) == "two\nlines"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ids_are_always_checked_on_the_cpu(impl: str) -> None:
    cpu = inputs.make_inputs(SHAPE, 5, device="cpu")
    with pytest.raises(RoutingError):
        fused_moe(**dataclasses.asdict(cpu) | {"topk_ids": cpu.topk_ids + 4}, impl=impl)
