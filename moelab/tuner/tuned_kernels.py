"""The kernels that can be tuned, by name, and what their configs must keep to.

A kernel has the name of the implementation of `fused_moe` that runs it, and so have its config files (`kernel=NAME`). The
compatible kernel alone, of the implementation "triton", is "grouped_gemm": its files are the peers' and name no kernel. The
field `tuning` of an entry of moelab.implementations makes a kernel tunable. No torch is loaded here: a search, or a replay,
needs none.
"""

from __future__ import annotations

from collections.abc import Mapping

from moelab.chips import get_target
from moelab.config import MIN_DOT_BLOCK, KernelConfig, tma_shared_memory_bytes
from moelab.config_files.form_entries import KERNEL as FORMS
from moelab.dtypes import dtype_bytes
from moelab.errors import (
    ConfigError,
    DeviceError,
    FormatError,
    LayoutError,
    ShardError,
    UnknownNameError,
    nearest_names,
)
from moelab.implementations import IMPLEMENTATIONS, Implementation, Tuning
from moelab.shapes import MoEShape
from moelab.tuner.problem import COMPATIBLE, GEMMS, Gemm, Problem

TUNED: Mapping[str, str] = {one.tuning.kernel: name for name, one in IMPLEMENTATIONS.items() if one.tuning}
"""Name of the kernel -> the implementation that runs it."""

Broken = tuple[str, str] | None
"""(the reason that a config is counted under, a sentence) for one that a kernel cannot run, beside `config.violations`."""

TMA_BOX = 256
"""A descriptor takes boxes with sides of at most 256 (CUDA driver API, cuTensorMapEncodeTiled)."""


def implementation_of(kernel: str) -> Implementation:
    """The entry of a tuned kernel's implementation."""
    return IMPLEMENTATIONS[TUNED[kernel]]


def tuning_of(kernel: str) -> Tuning:
    """How a tuned kernel's GEMMs are launched."""
    found = implementation_of(kernel).tuning
    assert found is not None  # TUNED holds no other
    return found


def _one_split(config: KernelConfig, gemm: Gemm, problem: Problem) -> Broken:
    if config.SPLIT_K == 1 or implementation_of(problem.kernel).splits:
        return None
    return "SPLIT_K", f"SPLIT_K = {config.SPLIT_K}, and the kernel {problem.kernel} sums K in one program"


def _whole_steps(config: KernelConfig, gemm: Gemm, problem: Problem) -> Broken:
    """A step of K lies in one group of scales, or holds whole ones where weights are widened."""
    refused = problem.shape.format.step_refused(config.BLOCK_SIZE_K)
    return ("steps of K over scales", refused) if refused else None


def _halves(config: KernelConfig, gemm: Gemm, problem: Problem) -> Broken:
    """Of the rows of weights that a program of a gated GEMM1 multiplies, half are gate and half up."""
    columns, least = config.BLOCK_SIZE_N, 2 * MIN_DOT_BLOCK
    if gemm == "down" or not tuning_of(problem.kernel).halves or not problem.shape.gated or columns >= least:
        return None
    return "gate and up", f"BLOCK_SIZE_N = {columns}, under {least}: half of it is gate and half up"


def _fits_tma(config: KernelConfig, gemm: Gemm, problem: Problem) -> Broken:
    """Weights by boxes of (BLOCK_SIZE_N, BLOCK_SIZE_K), and sorted rows by such of BLOCK_SIZE_M; barriers take shared memory."""
    if not implementation_of(problem.kernel).needs_tma:
        return None
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
    return gemm == "down" and tuning_of(problem.kernel).sorted_rows


def kernel_name(asked: str) -> str:
    """The tuned kernel of that name, or of that implementation of `fused_moe`. Raises UnknownNameError."""
    names = {implementation: name for name, implementation in TUNED.items()} | {name: name for name in TUNED}
    if asked not in names:
        raise UnknownNameError(
            f"Cannot tune the kernel {asked!r}.{nearest_names(asked, [*names, FORMS])} Expected one of {', '.join(TUNED)}: "
            "'grouped_gemm' is the kernel of fused_moe's 'triton', which sglang and vLLM run; or, in a shell, 'fast', its "
            "forms raced. Name one of them."
        )
    return names[asked]


def require_tunable(problem: Problem) -> Tuning:
    """How the problem's kernel is tuned.

    Raises UnknownNameError for a kernel that is not in TUNED, FormatError for weights in a format that it does not take, or
    that has no config files, DeviceError where its target has no TMA and the kernel needs it, LayoutError where rows of the
    layer's inner sizes cannot go through TMA.
    """
    kernel = kernel_name(problem.kernel)
    _require_format(kernel, problem.shape)
    if implementation_of(kernel).needs_tma:
        _require_tma(problem)
    return tuning_of(kernel)


def _require_format(kernel: str, shape: MoEShape) -> None:
    """A server's question, and an answer that a kernel can run."""
    format = shape.format
    if not format.file:
        raise FormatError(
            f"The experts of {shape.name} are stored as {format.name}, which has no config files: {format.served_by} run it. "
            "Expected a format of the Triton kernel that reads them. Pass --dtype bfloat16 for the same sizes in plain weights."
        )
    if format.family not in tuning_of(kernel).formats:
        takers = [name for name in TUNED if format.family in tuning_of(name).formats]
        raise FormatError(
            f"The kernel {kernel!r} takes no weights in the format {format.name}. Expected one of {', '.join(takers)}. Pass it "
            "as --kernel, or leave --kernel out."
        )
    if misfits := format.misfits(shape.hidden_size, shape.moe_intermediate_size):
        raise ShardError(f"{shape.name} in the format {format.name}: {'. '.join(misfits)}. Shard the layer otherwise.")


def _require_tma(problem: Problem) -> None:
    if not get_target(problem.target).has_tma:
        raise DeviceError(
            f"The kernel {problem.kernel!r} cannot be tuned on {problem.device}: {problem.target} has no TMA. Expected sm_90 or "
            f"later. Tune a kernel without TMA, such as {COMPATIBLE!r} (--kernel)."
        )
    whole = implementation_of(problem.kernel).row_bytes
    for gemm in GEMMS:
        K = problem.inner_size(gemm)
        row_bytes = K * dtype_bytes(problem.shape.dtype)
        if row_bytes % whole:
            raise LayoutError(
                f"The kernel {problem.kernel!r} cannot be tuned for {problem.shape.name}: a row of {K} in {problem.shape.dtype} "
                f"is {row_bytes} bytes. Expected a multiple of {whole} bytes for TMA. Tune a kernel without TMA, such as "
                f"{COMPATIBLE!r} (--kernel), or split the layer otherwise."
            )


def result_columns(problem: Problem, gemm: Gemm) -> int:
    """Columns of what that GEMM writes: N after an activation, which makes one of gate and up."""
    activated = gemm == "up" and tuning_of(problem.kernel).activates
    return problem.shape.moe_intermediate_size if activated else problem.columns(gemm)


def activation_of(problem: Problem, gemm: Gemm) -> tuple[str | None, bool]:
    """What that GEMM applies to its sums, and whether that has a gate: (None, False) for nothing."""
    activates = gemm == "up" and tuning_of(problem.kernel).activates
    return (problem.shape.activation, problem.shape.gated) if activates else (None, False)


def broken_rule(config: KernelConfig, gemm: Gemm, problem: Problem) -> Broken:
    """(reason, sentence) of the first rule of the problem's kernel that the config breaks; None for a kernel without."""
    rules = (_one_split, _whole_steps, _halves, _fits_tma) if problem.kernel in TUNED else ()
    return next((found for rule in rules if (found := rule(config, gemm, problem))), None)


def require_rules(config: KernelConfig, gemm: Gemm, problem: Problem) -> None:
    """Raise ConfigError for a config that the problem's kernel cannot run."""
    if broken := broken_rule(config, gemm, problem):
        raise ConfigError(
            f"The config {config.short()} cannot run under {problem.kernel!r}: {broken[1]}. Expected one without that. Change "
            "those fields, or tune another kernel."
        )
