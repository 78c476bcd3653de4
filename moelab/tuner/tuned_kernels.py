"""The kernels that can be tuned, by name: how their GEMMs are launched, and what their configs must keep to.

A kernel has the name of the implementation of `fused_moe` that runs it, and so have its config files (`kernel=NAME`). The
exchange kernel alone, of the implementation "triton", is "grouped_gemm": its files are the peers' and name no kernel. One
entry of TUNED makes a kernel tunable. No torch is loaded here: a search, or a replay, needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moelab.chips import get_target
from moelab.config import MIN_DOT_BLOCK, KernelConfig, tma_shared_memory_bytes
from moelab.dtypes import dtype_bytes
from moelab.errors import ConfigError, DeviceError, LayoutError, UnknownNameError, nearest_names
from moelab.tuner.problem import EXCHANGE, GEMMS, Gemm, Problem

Rule = Callable[[KernelConfig, Gemm, Problem], tuple[str, str] | None]
"""(the reason that a config is counted under, a sentence) for one that this kernel cannot run, beside `config.violations`."""

TMA_ROW_BYTES = 16
"""A descriptor takes rows of a multiple of 16 bytes (CUDA driver API, cuTensorMapEncodeTiled) ..."""

TMA_BOX = 256
"""... and boxes with sides of at most 256."""


@dataclass(frozen=True)
class TunedKernel:
    """How one kernel is tuned.

    implementation: the name in `fused_moe` of the layer that runs it. up, down: "module:function" of a
    `launches.GemmLaunch` for GEMM1 and GEMM2. rules: what its configs must keep to. needs_tma: only chips that have it,
    and inner sizes of whole 16 bytes. split_k: values of SPLIT_K to try; a workspace is made for the largest over 1.
    activates: GEMM1's result is activated already, N columns a row, and the layer launches no activation. sorted_rows: it
    lies sorted by expert, padded, and GEMM2 reads it so.
    """

    implementation: str
    up: str
    down: str
    rules: tuple[Rule, ...]
    needs_tma: bool = False
    split_k: tuple[int, ...] = (1,)
    activates: bool = False
    sorted_rows: bool = False


def _one_split(config: KernelConfig, gemm: Gemm, problem: Problem) -> tuple[str, str] | None:
    if config.SPLIT_K == 1:
        return None
    return "SPLIT_K", f"SPLIT_K = {config.SPLIT_K}, and the kernel {problem.kernel} sums K in one program"


def _halves(config: KernelConfig, gemm: Gemm, problem: Problem) -> tuple[str, str] | None:
    """Of the rows of weights that a program of a gated GEMM1 multiplies, half are gate and half up."""
    columns, least = config.BLOCK_SIZE_N, 2 * MIN_DOT_BLOCK
    if gemm == "down" or not problem.shape.gated or columns >= least:
        return None
    return "gate and up", f"BLOCK_SIZE_N = {columns}, under {least}: half of it is gate and half up"


def _fits_tma(config: KernelConfig, gemm: Gemm, problem: Problem) -> tuple[str, str] | None:
    """Weights by boxes of (BLOCK_SIZE_N, BLOCK_SIZE_K), and sorted rows by such of BLOCK_SIZE_M; barriers take shared memory."""
    longest = max(config.BLOCK_SIZE_N, config.BLOCK_SIZE_K, config.BLOCK_SIZE_M if _reads_sorted(gemm, problem) else 0)
    if longest > TMA_BOX:
        return "TMA boxes", f"a box of TMA with a side of {longest}, over {TMA_BOX}"
    needs = tma_shared_memory_bytes(config, problem.shape.dtype, problem.target)
    limit = get_target(problem.target).shared_memory_per_block
    if needs > limit:
        return (
            "shared memory",
            f"needs up to {needs} bytes of shared memory with TMA, {problem.target} gives a block {limit}",
        )
    return None


def _reads_sorted(gemm: Gemm, problem: Problem) -> bool:
    return gemm == "down" and TUNED[problem.kernel].sorted_rows


TUNED: Mapping[str, TunedKernel] = {
    EXCHANGE: TunedKernel(
        "triton", "moelab.tuner.launches:grouped_gemm", "moelab.tuner.launches:grouped_gemm", (_one_split,)
    ),
    "tma": TunedKernel(
        "tma", "moelab.tuner.launches:tma", "moelab.tuner.launches:tma", (_one_split, _fits_tma), needs_tma=True
    ),
    "split_k_workspace": TunedKernel(
        "split_k_workspace", "moelab.tuner.launches:split_k_workspace", "moelab.tuner.launches:split_k_workspace", (),
        split_k=(1, 2, 4, 8), activates=True,
    ),
    "gated": TunedKernel(
        "gated", "moelab.tuner.launches:gated", "moelab.tuner.launches:sorted_scatter", (_one_split, _halves),
        activates=True, sorted_rows=True,
    ),
    "gated_tma": TunedKernel(
        "gated_tma", "moelab.tuner.launches:gated_tma", "moelab.tuner.launches:sorted_scatter_tma",
        (_one_split, _halves, _fits_tma), needs_tma=True, activates=True, sorted_rows=True,
    ),
}  # fmt: skip
"""Name of the kernel -> how it is tuned."""


def kernel_name(asked: str) -> str:
    """The tuned kernel of that name, or of that implementation of `fused_moe`. Raises UnknownNameError."""
    names = {kernel.implementation: name for name, kernel in TUNED.items()} | {name: name for name in TUNED}
    if asked not in names:
        raise UnknownNameError(
            f"Cannot tune the kernel {asked!r}.{nearest_names(asked, names)} Expected one of {', '.join(TUNED)}: "
            "'grouped_gemm' is the kernel of fused_moe's 'triton', which sglang and vLLM run. Name one of them."
        )
    return names[asked]


def require_tunable(problem: Problem) -> TunedKernel:
    """How the problem's kernel is tuned.

    Raises UnknownNameError for a kernel that is not in TUNED, DeviceError where its target has no TMA and the kernel needs
    it, LayoutError where rows of the layer's inner sizes cannot go through TMA.
    """
    kernel = TUNED[kernel_name(problem.kernel)]
    if kernel.needs_tma:
        _require_tma(problem)
    return kernel


def _require_tma(problem: Problem) -> None:
    if not get_target(problem.target).has_tma:
        raise DeviceError(
            f"The kernel {problem.kernel!r} cannot be tuned on {problem.device}: {problem.target} has no TMA. Expected sm_90 or "
            f"later. Tune a kernel without TMA, such as {EXCHANGE!r} (--kernel)."
        )
    for gemm in GEMMS:
        K = problem.inner_size(gemm)
        row_bytes = K * dtype_bytes(problem.shape.dtype)
        if row_bytes % TMA_ROW_BYTES:
            raise LayoutError(
                f"The kernel {problem.kernel!r} cannot be tuned for {problem.shape.name}: a row of {K} in {problem.shape.dtype} "
                f"is {row_bytes} bytes. Expected a multiple of {TMA_ROW_BYTES} bytes for TMA. Tune a kernel without TMA, such as "
                f"{EXCHANGE!r} (--kernel), or split the layer otherwise."
            )


def result_columns(problem: Problem, gemm: Gemm) -> int:
    """Columns of what that GEMM writes: N after an activation, which makes one of gate and up."""
    activated = gemm == "up" and TUNED[problem.kernel].activates
    return problem.shape.moe_intermediate_size if activated else problem.columns(gemm)


def broken_rule(config: KernelConfig, gemm: Gemm, problem: Problem) -> tuple[str, str] | None:
    """(reason, sentence) of the first rule of the problem's kernel that the config breaks; None for a kernel without."""
    rules = TUNED[problem.kernel].rules if problem.kernel in TUNED else ()
    return next((found for rule in rules if (found := rule(config, gemm, problem))), None)


def require_rules(config: KernelConfig, gemm: Gemm, problem: Problem) -> None:
    """Raise ConfigError for a config that the problem's kernel cannot run."""
    if broken := broken_rule(config, gemm, problem):
        raise ConfigError(
            f"The config {config.short()} cannot run under {problem.kernel!r}: {broken[1]}. Expected one without that. Change "
            "those fields, or tune another kernel."
        )
