"""The launches of every Triton kernel that are claimed to compile, for `moelab.kernels.aot`: through the kernels' own launchers.

A case calls a public launcher over tensors on "meta", inside `launch.compiling`: so the arguments, constants and options are
those of a real launch, and are said nowhere else.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.chips import Target  # noqa: E402
from moelab.config import KernelConfig  # noqa: E402
from moelab.dtypes import LAYER_DTYPES, torch_dtype  # noqa: E402
from moelab.formats import get_format  # noqa: E402
from moelab.kernels.activation import activation  # noqa: E402
from moelab.kernels.align import align_pairs, moe_align_block_size  # noqa: E402
from moelab.kernels.expert_order import expert_order  # noqa: E402
from moelab.kernels.few_tokens import FORMS, FewTokens, few_tokens  # noqa: E402
from moelab.kernels.gated_block_gemm import gated_block_gemm  # noqa: E402
from moelab.kernels.gated_gemm import gated_gemm  # noqa: E402
from moelab.kernels.gemm_call import GemmCall  # noqa: E402
from moelab.kernels.grouped_gemm import grouped_gemm  # noqa: E402
from moelab.kernels.grouped_gemm_tma import grouped_gemm_tma  # noqa: E402
from moelab.kernels.quantise_activations import quantise_activations  # noqa: E402
from moelab.kernels.quantise_tiles import quantise_tiles_unchecked  # noqa: E402
from moelab.kernels.quantised import GEMMS  # noqa: E402
from moelab.kernels.route import new_routed, route  # noqa: E402
from moelab.kernels.sorted_gemm import sorted_gemm  # noqa: E402
from moelab.kernels.split_k_atomic import split_k_atomic_f32, split_k_atomic_out  # noqa: E402
from moelab.kernels.split_k_workspace import split_k_workspace  # noqa: E402
from moelab.kernels.sum_reduce import sum_reduce  # noqa: E402
from moelab.kernels.token_tiles import new_token_tiles, token_tiles  # noqa: E402
from moelab.quantised_weights import empty_activations, empty_weights  # noqa: E402
from moelab.routing import Alignment  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One call of a launcher. family: cases of one family launch the same kernels, and need TMA or none of them does; note:
    what sets this one apart.

    launch: makes its tensors and calls the launcher, for a target. needs_tma: only for chips that have it, as the launcher
    asks. config, dtype: of a grouped product, whose shared memory config.py predicts.
    """

    family: str
    note: str
    launch: Callable[[Target], object]
    needs_tma: bool = False
    config: KernelConfig | None = None
    dtype: str = ""


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
TOP_K, NUM_EXPERTS, PAIRS = 8, 256, 64

FEW_TOKENS = (
    (1, "bfloat16", 128, 2048, 768, 8),  # Qwen3-30B-A3B
    (2, "float16", 32, 2048, 1792, 4),  # LFM2-8B-A1B
    (1, "bfloat16", 256, 7168, 256, 8),  # DeepSeek-V3 tp 8
    (1, "bfloat16", 16, 5120, 2048, 1),  # Llama-4-Scout tp 4
    (1, "bfloat16", 8, 4096, 7168, 2),  # Mixtral-8x7B tp 2
)
"""num_tokens, dtype, num_experts, hidden_size, moe_intermediate_size, top_k: one for each form that serves a few tokens."""


def empty(*size: int, of: str = "int32") -> Tensor:
    """A tensor that has no memory."""
    return torch.empty(size, dtype=getattr(torch, of), device="meta")


def by(launcher: Callable[..., object], *arguments: Any, **more: Any) -> Callable[[Target], object]:
    """The call of a launcher that is the same for every target."""
    return lambda _: launcher(*arguments, **more)


def product(
    launcher: Callable[..., object], config: KernelConfig, dtype: str, *, bias: bool = False, even_k: bool = True,
    sorted_rows: bool = False, family: str = "", **more: Any,
) -> Case:  # fmt: skip
    """A grouped product of PAIRS pairs with the routed weight in its epilogue, by a launcher that takes `grouped_gemm`'s
    arguments. sorted_rows: its rows lie sorted by expert, as `gated_gemm` leaves them. more: arguments of its own."""
    K, N, rows = 512 if even_k else 528, 512, config.BLOCK_SIZE_M
    padded = PAIRS * rows
    top_k = more.setdefault("top_k", 1)

    alignment = Alignment(empty(padded), empty(PAIRS), empty(1), rows, PAIRS, NUM_EXPERTS)
    launch = by(
        launcher, empty(padded if sorted_rows else PAIRS // top_k, K, of=dtype), empty(NUM_EXPERTS, N, K, of=dtype),
        alignment, config, num_pairs=PAIRS, bias=empty(NUM_EXPERTS, N, of=dtype) if bias else None,
        topk_weights=empty(PAIRS, of="float32"), **more,
    )  # fmt: skip
    own = [
        f"{name} {value}" for name, value in more.items() if name not in ("tma", "gated") and value not in (1, False)
    ]
    notes = [dtype, config.short(), *(["bias"] if bias else []), *([] if even_k else ["ragged K"]), *own]
    tma = launcher is grouped_gemm_tma or more.get("tma", False)
    notes += [launcher.__name__] if family else []
    return Case(f"{family or launcher.__name__}{' by TMA' if tma else ''}", " ".join(notes), launch, tma, config, dtype)


def _grouped_products() -> Iterator[Case]:
    """The classic kernel, with weights by pointers and by TMA."""
    small, middle = GEMM_CONFIGS[:2]
    odd: dict[str, Any] = {"bias": True, "even_k": False, "top_k": TOP_K}
    for config in GEMM_CONFIGS:
        yield from (product(grouped_gemm, config, dtype) for dtype in ("bfloat16", "float16"))
    yield product(grouped_gemm, small, "float32")
    yield product(grouped_gemm, middle, "bfloat16", **odd)
    yield from (product(grouped_gemm_tma, config, "bfloat16") for config in GEMM_CONFIGS[::2])
    yield product(grouped_gemm_tma, middle, "bfloat16", **odd)


def _products_of_sorted_rows() -> Iterator[Case]:
    """GEMM1 that leaves its rows sorted and GEMM2 over them: every way at least once, and each with mma.sync and with wgmma."""
    small, middle, large = GEMM_CONFIGS[:3]
    plain: dict[str, Any] = {"gated": False, "family": "activated_gemm"}
    yield product(gated_gemm, small, "bfloat16")
    yield product(gated_gemm, large, "bfloat16")
    yield product(gated_gemm, middle, "bfloat16", bias=True, even_k=False, top_k=TOP_K)
    yield product(gated_gemm, small, "float32")
    yield product(gated_gemm, middle, "bfloat16", **plain)
    yield product(gated_gemm, small, "bfloat16", tma=True)
    yield product(gated_gemm, large, "bfloat16", tma=True)
    yield product(gated_gemm, middle, "float16", tma=True, **plain)
    for config, dtype, atomic, tma in (
        (small, "bfloat16", False, False),
        (large, "bfloat16", True, False),
        (middle, "bfloat16", True, False),
        (large, "bfloat16", False, True),
        (small, "float16", True, True),
    ):
        top_k = TOP_K if atomic else 1
        yield product(sorted_gemm, config, dtype, sorted_rows=True, atomic=atomic, top_k=top_k, tma=tma)


def _split_products() -> Iterator[Case]:
    """The Split-K GEMMs, adding into float32 and into the dtype (GEMM2's sum over 8 slots with them), and by workspace."""
    ways: list[tuple[KernelConfig, str, dict[str, Any]]]
    ways = [(config, dtype, {}) for config in SPLIT_K_CONFIGS for dtype in ("bfloat16", "float16")]
    ways += [(SPLIT_K_CONFIGS[0], "float32", {}), (SPLIT_K_CONFIGS[0], "float16", {"bias": True, "even_k": False})]
    for config, dtype, more in ways:
        for launcher in (split_k_atomic_f32, split_k_atomic_out):
            yield product(launcher, config, dtype, family="split_k_atomic", pairs_per_row=TOP_K, **more)
        yield product(split_k_workspace, config, dtype, activation="silu", **more)
    yield product(split_k_workspace, SPLIT_K_CONFIGS[0], "float64")


def _quantised_call(name: str, config: KernelConfig, dtype: str, codes: bool = True, **more: Any) -> GemmCall:
    """A call over weights in that format, its activations as the format has them, or as they are."""
    format, (N, K), rows = get_format(name), (512, 1024), config.BLOCK_SIZE_M
    weights = empty_weights(format, NUM_EXPERTS, N, K, torch_dtype(dtype), "meta")
    a, a_scale = empty_activations(format, PAIRS, K, torch_dtype(dtype), "meta")
    if not codes:
        a, a_scale = empty(PAIRS, K, of=dtype), None
    alignment = Alignment(empty(PAIRS * rows), empty(PAIRS), empty(1), rows, PAIRS, NUM_EXPERTS)
    return GemmCall(a, weights, alignment, config, PAIRS, 1, empty(PAIRS, of="float32"), a_scale=a_scale, **more)


def quantised(name: str, config: KernelConfig, dtype: str = "bfloat16", codes: bool = True) -> Case:
    """A grouped product over weights in that format. Nothing before sm_90 that is compiled for here has fp8 of this kind."""
    call = _quantised_call(name, config, dtype, codes)
    format = call.weights.format
    check, launch = GEMMS[format.family]
    out = empty(PAIRS, call.sizes[0], of=dtype)

    def run(_: Target) -> None:
        check(call, out)
        launch(call, out)

    eight = format.weight_dtype == "float8_e4m3fn"
    family = f"{check.__name__.removeprefix('check_')} {'fp8' if eight else ''}"
    return Case(family, f"{name} {config.short()}{'' if codes else ' makes codes'}", run, eight)


def _gated_blocks() -> Iterator[Case]:
    """GEMM1 over blocks with its activation: codes made on the way, a group a tile, many rows."""
    for config, codes in (
        (KernelConfig(16, 64, 128, 1, 4, 4), False), (KernelConfig(16, 256, 128, 1, 8, 4), True),
        (KernelConfig(64, 256, 128, 16, 8, 3), True),
    ):  # fmt: skip
        for name in ("fp8_w8a8_block_128x128", "int8_w8a8_block_128x128"):
            eight = name.startswith("fp8")
            # int8, which all chips take: within the 64 KiB of AMD's, and the registers of sm_80's and sm_100's
            own = (
                config
                if eight
                else replace(config, num_stages=2, BLOCK_SIZE_N=128 if config.BLOCK_SIZE_M > 16 else 256)
            )
            call = _quantised_call(name, own, "bfloat16", codes, activation="silu", gated=True)
            note = f"{name} {own.short()}{'' if codes else ' makes codes'}"
            launch = by(gated_block_gemm, call, torch.bfloat16)
            yield Case(f"gated_block_gemm {'fp8' if eight else ''}", note, launch, eight)
        if not codes:
            yield quantised("fp8_w8a8_block_128x128", config, codes=False)


def _quantised_products() -> Iterator[Case]:
    """The compatible kernels of quantised weights, few rows and many."""
    for config in (KernelConfig(16, 64, 128, 1, 4, 4), KernelConfig(64, 128, 128, 16, 8, 3)):
        for name in (
            "fp8_w8a8_block_128x128", "fp8_w8a8_channel", "int8_w8a8_block_128x128", "int8_w8a8_channel", "int8_w8a16_channel",
            "int8_w8a16_group_128", "int4_w4a16_group_128", "int4_w4a16_group_32_zp", "mxfp4_w4a16",
        ):  # fmt: skip
            yield quantised(name, config)
    by_one = replace(get_format("int8_w8a8_channel"), granularity="tensor", activations="static")
    formats = [get_format(f"{of}_w8a8_{how}") for of in ("fp8", "int8") for how in ("block_128x128", "channel")]
    for format in (*formats, get_format("fp8_w8a8_tensor_static"), by_one):
        eight = format.weight_dtype == "float8_e4m3fn"
        static = empty(of="float32") if format.activations == "static" else None
        launch = by(quantise_activations, empty(64, 2048, of="bfloat16"), format, static)
        yield Case(f"{format.weight_dtype} codes by {format.activations}", format.name, launch, eight)
    blocks, tiles = (
        get_format("fp8_w8a8_block_128x128"),
        new_token_tiles(empty(64 * TOP_K, of="int32"), NUM_EXPERTS, 128),
    )
    for in_rows in (False, True):
        given = (empty(64, 2048, of="bfloat16"), tiles, TOP_K, 128, blocks)
        launch = by(quantise_tiles_unchecked, *given, in_rows=in_rows)
        yield Case("float8_e4m3fn codes of tiles", "in rows" if in_rows else "in columns", launch, True)


def _element_by_element() -> Iterator[Case]:
    for dtype in LAYER_DTYPES:
        yield Case("activation", dtype, by(activation, empty(64, 2048, of=dtype)))
        for impl in ("triton", "triton_f32"):
            x = empty(64, TOP_K, 2048, of=dtype)
            yield Case(f"sum_reduce {impl}", dtype, by(sum_reduce, x, 0.3, impl=impl))


def _orders() -> Iterator[Case]:
    """Pairs sorted by expert, up to 2048 of them by one launch, more by three; and sorted slots cut into tiles."""
    for of in ("int32", "int64"):
        yield Case("align_pairs", of, by(align_pairs, empty(2, TOP_K, of=of), 64, NUM_EXPERTS))
        for num_tokens, launches in ((256, "one launch"), (257, "three launches")):
            ids = empty(num_tokens, TOP_K, of=of)
            yield Case(f"align by {launches}", of, by(moe_align_block_size, ids, 64, NUM_EXPERTS))
            yield Case(f"expert_order by {launches}", of, by(expert_order, ids, NUM_EXPERTS))
    for rows, grain, for_clusters in ((8, 8, False), (176, 16, False), (176, 16, True)):
        note = f"{rows} rows{' in pairs' if for_clusters else ''}"
        offsets = empty(NUM_EXPERTS + 1)
        yield Case("token_tiles", note, by(token_tiles, empty(2048), offsets, rows, grain, for_clusters=for_clusters))


def router(name: str, num_tokens: int, num_experts: int, top_k: int, dtype: str = "bfloat16", tiles: bool = False,
           bias: bool = False, **rule: Any) -> Case:  # fmt: skip
    """A router's choice for a batch: by one program with the order, and a tile an expert where asked for, or by many."""
    out = new_routed(num_tokens, num_experts, top_k, "meta")
    correction = empty(num_experts, of="float32") if bias else None
    cut = new_token_tiles(out.order.sorted_slots, num_experts, num_tokens) if tiles else None
    logits = empty(num_tokens, num_experts, of=dtype)
    family = "route by many programs" if num_tokens > 64 else "route by one program"
    note = f"{name} {num_tokens} tokens {dtype}{' tiles' if tiles else ''}"
    return Case(family, note, by(route, logits, top_k, correction_bias=correction, out=out, tiles=cut, **rule))


def _routers() -> Iterator[Case]:
    """The routers that differ in kind, at every way of routing."""
    deepseek: dict[str, Any] = {"bias": True, "score": "sigmoid", "num_groups": 8, "top_k_groups": 4}
    for num_tokens, tiles, dtype in (
        (1, False, "bfloat16"), (1, True, "bfloat16"), (16, False, "float32"), (100, False, "float16")
    ):  # fmt: skip
        yield router("qwen3", num_tokens, 128, 8, dtype, tiles)
    for num_tokens in (1, 16, 100):
        yield router("deepseek-v3", num_tokens, 256, 8, tiles=num_tokens < 100, **deepseek)
    yield router("scout", 64, 16, 1, score="sigmoid")
    yield router("60 experts", 64, 60, 4)
    yield router("257 experts", 100, 257, 257)


def _few_tokens(
    form: FewTokens, num_tokens: int, dtype: str, num_experts: int, hidden: int, size: int, top_k: int
) -> Case:
    """The layer for a few tokens at the sizes of a model, by one of its forms, as its target launches it."""

    def launch(target: Target) -> None:
        few_tokens(
            empty(num_tokens, hidden, of=dtype), empty(num_experts, 2 * size, hidden, of=dtype),
            empty(num_experts, hidden, size, of=dtype), empty(num_tokens, top_k, of="float32"),
            empty(num_tokens, top_k), form, overlap=target.has_tma,
        )  # fmt: skip

    return Case("few_tokens", f"{dtype} H {hidden} N {size} top_k {top_k}", launch)


def cases() -> list[Case]:
    """Every Triton kernel, in the dtypes and configs that are claimed to compile everywhere."""
    return [
        *_grouped_products(), *_products_of_sorted_rows(), *_split_products(), *_quantised_products(), *_gated_blocks(),
        *_element_by_element(), *_orders(), *_routers(),
        *(_few_tokens(FORMS[i % len(FORMS)], *sizes) for i, sizes in enumerate(FEW_TOKENS)),
    ]  # fmt: skip
