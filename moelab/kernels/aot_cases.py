"""The instances of every Triton kernel that are claimed to compile, for `moelab.kernels.aot`; no Triton is imported here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moelab.chips import TARGETS
from moelab.config import KernelConfig
from moelab.dtypes import LAYER_DTYPES


@dataclass(frozen=True)
class Case:
    """One kernel instance: pointer and integer arguments by Triton's type names, constants, launch options.

    aligned: arguments known to be multiples of 16, as Triton finds them to be at launch.
    config: the config behind it, for kernels whose shared memory config.py predicts, and its dtype.
    tma: arguments are descriptors ("tensordesc<bf16[64, 64]>"): only for chips that have TMA, as their launchers ask.
    dots: products in a step of its loop.
    """

    label: str
    kernel: str
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    aligned: frozenset[str] = field(default_factory=frozenset)
    config: KernelConfig | None = None
    dtype: str = ""
    tma: bool = False
    dots: int = 1

    def runs_on(self, target: str) -> bool:
        """Whether its launcher takes this target at all."""
        return TARGETS[target].has_tma or not self.tma


# The shapes of a program that the shipped and default configs use; one per way the compiler takes (16 rows:
# mma.sync; 64 and more: wgmma on sm_90).
GEMM_CONFIGS = (
    KernelConfig(16, 32, 64, 1, 4, 3),
    KernelConfig(64, 64, 32, 8, 4, 3),
    KernelConfig(64, 128, 64, 16, 4, 3),
    KernelConfig(128, 128, 64, 16, 8, 2),
)
# Tiles whose Split-K forms take no stack anywhere; with 64 rows some others do: 64x64x32 in float32 output 40 bytes on
# sm_100, 64x128x64 added in bfloat16 72 bytes on sm_80. On sm_90 none of those tried does.
SPLIT_K_CONFIGS = (KernelConfig(16, 32, 64, 1, 4, 3, SPLIT_K=4), KernelConfig(64, 64, 64, 8, 4, 4, SPLIT_K=2))
_TYPES = {name: dtype.triton for name, dtype in LAYER_DTYPES.items()}
_GEMM_ALIGNED = frozenset(("a_ptr", "w_ptr", "c_ptr", "sorted_token_ids_ptr", "N", "K"))


def _gemm_parts(
    config: KernelConfig, dtype: str, *, bias: bool, even_k: bool, top_k: int = 1
) -> tuple[dict[str, str], dict[str, Any], str]:
    """Arguments and constants that every grouped GEMM has, and its label; the output is another matter."""
    pointer = "*" + _TYPES[dtype]
    arguments = {"a_ptr": pointer, "w_ptr": pointer} | ({"bias_ptr": pointer} if bias else {})
    arguments |= dict.fromkeys(("sorted_token_ids_ptr", "expert_ids_ptr", "num_tokens_post_padded_ptr"), "*i32")
    arguments |= dict.fromkeys(("N", "K", "num_pairs", "num_rows"), "i32")
    constants = {
        name: getattr(config, name) for name in ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M")
    }
    constants |= {"TOP_K": top_k, "EVEN_K": even_k} | ({} if bias else {"bias_ptr": None})
    notes = f"{f' top_k {top_k}' if top_k > 1 else ''}{' bias' if bias else ''}{'' if even_k else ' ragged K'}"
    return arguments, constants, f"{dtype} {config.short()}{notes}"


def gemm_case(config: KernelConfig, dtype: str, *, bias: bool = False, even_k: bool = True, top_k: int = 1) -> Case:
    """grouped_gemm with the routed weight in the epilogue; GEMM2 has top_k 1, GEMM1 the layer's."""
    arguments, constants, label = _gemm_parts(config, dtype, bias=bias, even_k=even_k, top_k=top_k)
    arguments |= {"c_ptr": "*" + _TYPES[dtype], "topk_weights_ptr": "*fp32"}
    return Case(
        f"grouped_gemm {label}", "moelab.kernels.grouped_gemm:_grouped_gemm_kernel", arguments, constants,
        config.num_warps, config.num_stages, _GEMM_ALIGNED, config, dtype,
    )  # fmt: skip


def _through_tma(case: Case, boxes: Mapping[str, tuple[int, int]]) -> Case:
    """The case with descriptors of these boxes in place of pointers; a TMA constant, where there is one, set."""
    types = {name: f"tensordesc<{_TYPES[case.dtype]}[{rows}, {columns}]>" for name, (rows, columns) in boxes.items()}
    return replace(
        case, label=case.label.replace(" ", " tma ", 1), arguments={**case.arguments, **types}, tma=True,
        constants={**case.constants, **({"TMA": True} if "TMA" in case.constants else {})},
        aligned=case.aligned - set(boxes),
    )  # fmt: skip


def _tma_case(config: KernelConfig, dtype: str, **more: Any) -> Case:
    """grouped_gemm_tma."""
    case = gemm_case(config, dtype, **more)
    arguments = {name: kind for name, kind in case.arguments.items() if name != "w_ptr"}
    case = replace(case, kernel="moelab.kernels.grouped_gemm_tma:_grouped_gemm_tma_kernel", arguments=arguments)
    return _through_tma(case, {"w_desc": (config.BLOCK_SIZE_N, config.BLOCK_SIZE_K)})


def gated_case(config: KernelConfig, dtype: str, *, gated: bool = True, tma: bool = False, **more: Any) -> Case:
    """gated_gemm, or its form without a gate."""
    case = gemm_case(config, dtype, **more)
    name = "gated_gemm" if gated else "activated_gemm"
    kernel, label = f"moelab.kernels.gated_gemm:_{name}_kernel", case.label.replace("grouped_gemm", name)
    constants = {**case.constants, "ACTIVATION": "silu", "TMA": False}
    case = replace(case, kernel=kernel, label=label, constants=constants, dots=2 if gated else 1)
    rows = config.BLOCK_SIZE_N // 2 if gated else config.BLOCK_SIZE_N
    return _through_tma(case, {"w_ptr": (rows, config.BLOCK_SIZE_K)}) if tma else case


def sorted_case(config: KernelConfig, dtype: str, combine: str, *, tma: bool = False, **more: Any) -> Case:
    """sorted_gemm; the atomic ways add 8 slots into a row."""
    atomic = combine != "scatter"
    case = gemm_case(config, dtype, **more)
    wide = {"c_ptr": "*fp32"} if combine == "atomic_f32" else {}
    case = replace(
        case, kernel="moelab.kernels.sorted_gemm:_sorted_gemm_kernel", arguments={**case.arguments, **wide},
        label=case.label.replace("grouped_gemm", f"sorted_gemm_{combine}"),
        constants={**case.constants, "ATOMIC": atomic, "TMA": False, "TOP_K": 8 if atomic else 1},
    )  # fmt: skip
    a_box, w_box = ((rows, config.BLOCK_SIZE_K) for rows in (config.BLOCK_SIZE_M, config.BLOCK_SIZE_N))
    return _through_tma(case, {"a_ptr": a_box, "w_ptr": w_box}) if tma else case


def _sorted_rows_cases() -> list[Case]:
    """The two GEMMs over sorted rows: every way at least once, and each with mma.sync and with wgmma."""
    small, middle, large = GEMM_CONFIGS[:3]
    return [
        gated_case(small, "bfloat16"),
        gated_case(large, "bfloat16"),
        gated_case(middle, "bfloat16", bias=True, even_k=False, top_k=8),
        gated_case(small, "float32"),
        gated_case(middle, "bfloat16", gated=False),
        gated_case(small, "bfloat16", tma=True),
        gated_case(large, "bfloat16", tma=True),
        gated_case(middle, "float16", gated=False, tma=True),
        sorted_case(small, "bfloat16", "scatter"),
        sorted_case(large, "bfloat16", "atomic_f32"),
        sorted_case(middle, "bfloat16", "atomic_out"),
        sorted_case(large, "bfloat16", "scatter", tma=True),
        sorted_case(small, "float16", "atomic_f32", tma=True),
    ]


def split_k_cases(config: KernelConfig, dtype: str, *, bias: bool = False, even_k: bool = True) -> list[Case]:
    """The Split-K GEMMs, adding into float32 and into `dtype` (GEMM2's sum over 8 slots with them), and by workspace."""
    arguments, constants, shape = _gemm_parts(config, dtype, bias=bias, even_k=even_k)
    constants |= {"SPLIT_K": config.SPLIT_K}
    atomic, room = "moelab.kernels.split_k_atomic:_split_k_atomic_kernel", "moelab.kernels.split_k_workspace:"
    found = [
        Case(
            f"split_k_atomic_{name} {shape}", atomic, arguments | {"c_ptr": "*" + _TYPES[out], "topk_weights_ptr": "*fp32"},
            constants | {"PAIRS_PER_ROW": 8}, config.num_warps, config.num_stages, _GEMM_ALIGNED, config, dtype,
        )
        for name, out in (("f32", "float32"), ("out", dtype))
    ]  # fmt: skip
    partial = Case(
        f"split_k_workspace {shape}", room + "_split_k_partial_kernel", arguments | {"workspace_ptr": "*fp32"},
        constants, config.num_warps, config.num_stages, _GEMM_ALIGNED | {"workspace_ptr"}, config, dtype,
    )  # fmt: skip
    return [*found, partial]


def _split_k_reduce_case(dtype: str) -> Case:
    wide = {"float64": "*fp64"}.get(dtype, "*fp32")
    return Case(
        f"split_k_reduce {dtype}", "moelab.kernels.split_k_workspace:_split_k_reduce_kernel",
        {"workspace_ptr": wide, "out_ptr": "*" + _TYPES[dtype], "topk_weights_ptr": "*fp32",
         "num_pairs": "i32", "N": "i32"},
        {"SPLIT_K": 16, "ACTIVATION": "silu", "GATED": True, "BLOCK_ROWS": 1, "BLOCK_COLS": 512},
        4, aligned=frozenset(("workspace_ptr", "out_ptr", "N")),
    )  # fmt: skip


def _elementwise_cases(dtype: str) -> list[Case]:
    pointer = "*" + _TYPES[dtype]
    pair = {"x_ptr": pointer, "out_ptr": pointer}
    aligned = frozenset(("x_ptr", "out_ptr", "hidden", "N"))
    room = "moelab.kernels."
    tile = {"BLOCK_ROWS": 1, "BLOCK_COLS": 1024}
    swiglu = {"ACTIVATION": "silu", "GATED": True, **tile}
    wide = {"TOP_K": 8, "UNROLL": True, "BLOCK_COLS": 1024}
    upstream = {**pair, "scale": "fp32", "num_tokens": "i32", "top_k": "i32", "hidden": "i32"}
    return [
        Case(f"activation {dtype}", room + "activation:_activation_kernel", {**pair, "num_rows": "i32", "N": "i32"},
             swiglu, 4, aligned=aligned),
        Case(f"sum_reduce {dtype}", room + "sum_reduce:_sum_reduce_kernel",
             {**pair, "hidden": "i32", "scale": "fp64"}, wide, 4, aligned=aligned),
        Case(f"sum_reduce f32 {dtype}", room + "sum_reduce:_sum_reduce_f32_kernel", upstream, {"BLOCK_COLS": 2048},
             16, 1, aligned),
    ]  # fmt: skip


def _align_cases(id_type: str) -> list[Case]:
    outputs = dict.fromkeys(("sorted_ptr", "expert_ids_ptr", "total_ptr"), "*i32")
    sizes = {"num_pairs": "i32", "num_experts": "i32"}
    room, ids, counts = "moelab.kernels.align:", {"ids_ptr": f"*{id_type}"}, {"counts_ptr": "*i32"}
    chunked = "moelab.kernels.chunk_counts:"
    small = {"BLOCK_SIZE": 64, "BUCKETS": 256, "CHUNK": 2048}
    tables = {"before_ptr": "*i32", "totals_ptr": "*i32"}
    chunks = {"num_chunks": "i32"}
    return [
        Case(f"align small {id_type}", room + "_align_small_kernel", {**ids, **outputs, **sizes}, small, 8),
        Case(f"chunk count {id_type}", chunked + "_count_kernel", {**ids, **counts, **sizes}, {"BUCKETS": 256, "CHUNK": 128}, 4),
        Case(f"chunk scan {id_type}", chunked + "_scan_kernel", {**counts, "totals_ptr": "*i32", **chunks},
             {"BUCKETS": 256, "ROWS": 128}, 4),
        Case(f"align place {id_type}", room + "_place_kernel", {**ids, **tables, **outputs, **sizes, **chunks},
             {**small, "CHUNK": 128, "COLUMNS": 32}, 8),
        Case(f"align pairs {id_type}", room + "_align_pairs_kernel", {**ids, **outputs, **sizes}, {"BLOCK_SIZE": 64}, 1),
    ]  # fmt: skip


def _token_tiles_case(rows: int, grain: int, for_clusters: bool = False) -> Case:
    pointers = ("slots_ptr", "offsets_ptr", "tiles_ptr", "num_tiles_ptr", "ready_ptr")
    arguments = {**dict.fromkeys(pointers, "*i32"), "num_experts": "i32", "room": "i32"}
    constants = {"ROWS": rows, "GRAIN": grain, "FOR_CLUSTERS": for_clusters, "EXPERTS": 256, "ROOM": 1024}
    name = f"token tiles {rows}{' in pairs' if for_clusters else ''}"
    return Case(name, "moelab.kernels.token_tiles:_token_tiles_kernel", arguments, constants, 4)


def _order_cases(id_type: str) -> list[Case]:
    outputs = dict.fromkeys(("sorted_ptr", "offsets_ptr"), "*i32")
    sizes = {"num_slots": "i32", "num_experts": "i32"}
    room, ids = "moelab.kernels.expert_order:", {"ids_ptr": f"*{id_type}"}
    return [
        Case(f"expert_order small {id_type}", room + "_order_small_kernel", {**ids, **outputs, **sizes}, {"CHUNK": 2048}, 8),
        Case(f"expert_order place {id_type}", room + "_order_place_kernel",
             {**ids, "before_ptr": "*i32", **outputs, **sizes, "num_chunks": "i32"},
             {"BUCKETS": 512, "CHUNK": 128, "COLUMNS": 32}, 8),
    ]  # fmt: skip


def route_case(
    name: str, rows: int, num_experts: int, top_k: int, dtype: str = "bfloat16", *, one_program: bool = True, bias: bool = False,
    num_groups: int = 1, top_k_groups: int = 1, score: str = "sigmoid", tiles: bool = False,
) -> Case:  # fmt: skip
    """A router's tile of `rows` tokens, by one program with the order, or one of many; sizes of groups are powers of two."""
    outputs = {"weights_ptr": "*fp32", "ids_ptr": "*i32"}
    outputs |= dict.fromkeys(("sorted_ptr", "offsets_ptr"), "*i32") if one_program else {}
    cut = ("tiles_ptr", "num_tiles_ptr", "ready_ptr")
    outputs |= dict.fromkeys(cut, "*i32") if tiles else {}
    biases = {"bias_ptr": "*fp32"} if bias else {}
    arguments = {"logits_ptr": "*" + _TYPES[dtype], **biases, **outputs, "scale": "fp32"}
    constants = {
        "TOP_K": top_k, "NUM_EXPERTS": num_experts, "SCORE": score, "RENORMALIZE": top_k > 1, "NUM_GROUPS": num_groups,
        "GROUPS": num_groups, "TOP_K_GROUPS": top_k_groups, "SUM_OF_TWO": bias, "ROWS": rows,
        "LANES": 1 << (num_experts - 1).bit_length(),
    }  # fmt: skip
    constants |= {} if bias else {"bias_ptr": None}
    constants |= dict.fromkeys(cut) if one_program and not tiles else {}
    constants |= {"SLOTS": 1 << (rows * top_k - 1).bit_length()} if one_program else {}
    sizes = ("num_tokens", "first_expert", "num_local", *(["room"] if one_program else []))
    kernel = "moelab.kernels.route:" + ("_route_order_kernel" if one_program else "_route_kernel")
    return Case(
        f"{'route_order' if one_program else 'route'} {name} {rows} {dtype}{' tiles' if tiles else ''}", kernel,
        arguments | dict.fromkeys(sizes, "i32"), constants, min(8, rows),
        aligned=frozenset(name for name in arguments if name.endswith("_ptr")),
    )  # fmt: skip


def _route_cases() -> list[Case]:
    """The routers that differ in kind, at every way of routing."""
    qwen3: dict[str, Any] = {"name": "qwen3", "num_experts": 128, "top_k": 8, "score": "softmax"}
    deepseek: dict[str, Any] = {
        "name": "deepseek-v3", "num_experts": 256, "top_k": 8, "bias": True, "num_groups": 8, "top_k_groups": 4,
    }  # fmt: skip
    return [
        route_case(rows=1, **qwen3),
        route_case(rows=1, tiles=True, **qwen3),
        route_case(rows=16, dtype="float32", **qwen3),
        route_case(rows=4, one_program=False, dtype="float16", **qwen3),
        *[route_case(rows=rows, tiles=True, **deepseek) for rows in (1, 16)],
        route_case(rows=4, one_program=False, **deepseek),
        route_case("scout", 64, 16, 1),
        route_case("60 experts", 64, 60, 4, score="softmax"),
        route_case("257 experts", 4, 257, 257, one_program=False, score="softmax"),
    ]


def _few_tokens_cases(
    dtype: str, hidden: int, size: int, top_k: int, up_tile: Sequence[int], down_tile: Sequence[int], early: int
) -> list[Case]:
    """few_tokens at the sizes of a model, by the form that serves it. Without programmatic launch, which is for Hopper and later
    alone."""
    pointer, room = "*" + _TYPES[dtype], "moelab.kernels.few_tokens"
    lists = {"ids_ptr": "*i32", "routed_ptr": "*fp32", "num_experts": "i32"}
    sizes = {"N": size, "H": hidden, "TOP_K": top_k, "ON_INPUT": False, "PDL": False, "SIDE_BY_SIDE": True}
    notes = f"{dtype} H {hidden} N {size} top_k {top_k}"
    up = {**dict.fromkeys(("x_ptr", "w_ptr", "inner_ptr"), pointer), **lists}
    down = {**dict.fromkeys(("inner_ptr", "w_ptr", "out_ptr"), pointer), **lists, "scale": "fp32"}
    aligned = frozenset(("x_ptr", "w_ptr", "inner_ptr", "out_ptr", "ids_ptr", "routed_ptr"))
    return [
        Case(f"few_tokens {which} {notes}", f"{room}:_{which}_kernel", arguments, constants, warps, aligned=aligned)
        for which, arguments, constants, warps in (
            ("up", up, {**sizes, "ROWS": up_tile[0], "COLUMNS": up_tile[1]}, up_tile[2]),
            ("down", down, {**sizes, "ROWS": down_tile[0], "COLUMNS": down_tile[1], "EARLY": early}, down_tile[2]),
        )
    ]


FEW_TOKENS = (
    ("bfloat16", 2048, 768, 8, (1, 1024, 2), (2, 512, 2), 3),  # Qwen3-30B-A3B
    ("float16", 2048, 1792, 4, (1, 1024, 2), (2, 256, 1), 4),  # LFM2-8B-A1B
    ("bfloat16", 7168, 256, 8, (1, 1024, 2), (4, 256, 1), 4),  # DeepSeek-V3 tp 8
    ("bfloat16", 5120, 2048, 1, (1, 512, 2), (4, 256, 1), 4),  # Llama-4-Scout tp 4
    ("bfloat16", 4096, 7168, 2, (1, 2048, 4), (2, 256, 1), 4),  # Mixtral-8x7B tp 2
)
"""dtype, hidden_size, moe_intermediate_size, top_k; GEMM1's and GEMM2's tile: rows, columns, warps; GEMM2's early tiles."""


def cases() -> list[Case]:
    """Every Triton kernel, in the dtypes and configs that are claimed to compile everywhere."""
    gemms = [gemm_case(config, dtype) for config in GEMM_CONFIGS for dtype in ("bfloat16", "float16")]
    gemms += [
        gemm_case(GEMM_CONFIGS[0], "float32"),
        gemm_case(GEMM_CONFIGS[1], "bfloat16", bias=True, even_k=False, top_k=8),
    ]
    gemms += [_tma_case(config, "bfloat16") for config in GEMM_CONFIGS[::2]]
    gemms += [_tma_case(GEMM_CONFIGS[1], "bfloat16", bias=True, even_k=False, top_k=8)]
    splits = [
        case for config in SPLIT_K_CONFIGS for dtype in ("bfloat16", "float16") for case in split_k_cases(config, dtype)
    ]
    splits += split_k_cases(SPLIT_K_CONFIGS[0], "float32") + split_k_cases(
        SPLIT_K_CONFIGS[0], "float16", bias=True, even_k=False
    )
    plain = [case for dtype in _TYPES for case in _elementwise_cases(dtype)]
    plain += [_split_k_reduce_case(dtype) for dtype in _TYPES]
    plain += [_token_tiles_case(8, 8), _token_tiles_case(176, 16), _token_tiles_case(176, 16, True)]
    sorts = [case for ids in ("i32", "i64") for case in (*_align_cases(ids), *_order_cases(ids))]
    few = [case for sizes in FEW_TOKENS for case in _few_tokens_cases(*sizes)]
    return gemms + _sorted_rows_cases() + splits + plain + sorts + _route_cases() + few
