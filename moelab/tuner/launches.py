"""How each tuned kernel's GEMMs are launched over buffers that are there: by the rig, and by the process that compiles.

The two launch by the same function, one over a device's tensors, the other over tensors on "meta": so what is compiled
ahead is what a launch looks for. Nothing is checked here: the rig does so once for each contender.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Protocol

from torch import Tensor

from moelab.config import KernelConfig
from moelab.kernels.gated_gemm import gated_gemm_unchecked
from moelab.kernels.grouped_gemm import grouped_gemm_unchecked
from moelab.kernels.grouped_gemm_tma import grouped_gemm_tma_unchecked
from moelab.kernels.sorted_gemm import sorted_gemm_unchecked
from moelab.kernels.split_k_workspace import split_k_workspace_unchecked
from moelab.routing import Alignment
from moelab.tuner.problem import Gemm, Problem
from moelab.tuner.tuned_kernels import TUNED


class Extra(NamedTuple):
    """What some kernels take beside operands. activation: of a GEMM1 that applies it, None otherwise; gated: whether that has
    a gate. workspace: room for the partial sums of the largest batch size and SPLIT_K, empty for a kernel without."""

    activation: str | None
    gated: bool
    workspace: Tensor


class GemmLaunch(Protocol):
    """Launches one GEMM of at least one pair, unchecked."""

    def __call__(
        self,
        a: Tensor,
        w: Tensor,
        out: Tensor,
        alignment: Alignment,
        config: KernelConfig,
        num_pairs: int,
        top_k: int,
        topk_weights: Tensor | None,
        extra: Extra,
        /,
    ) -> None:
        """a: (num_pairs / top_k, K), w: (E, columns, K), out: one row a pair; see `grouped_gemm`. Allocates nothing.

        With `TunedKernel.sorted_rows`, GEMM1's out and GEMM2's a are (rows, N), sorted by expert; see `gated_gemm`.
        """


def grouped_gemm(
    a: Tensor, w: Tensor, out: Tensor, alignment: Alignment, config: KernelConfig, num_pairs: int, top_k: int,
    topk_weights: Tensor | None, extra: Extra,
) -> None:  # fmt: skip
    """The exchange kernel: either GEMM."""
    grouped_gemm_unchecked(a, w, out, alignment, config, num_pairs, top_k, None, topk_weights)


def tma(
    a: Tensor, w: Tensor, out: Tensor, alignment: Alignment, config: KernelConfig, num_pairs: int, top_k: int,
    topk_weights: Tensor | None, extra: Extra,
) -> None:  # fmt: skip
    """Weights by TMA: either GEMM."""
    grouped_gemm_tma_unchecked(a, w, out, alignment, config, num_pairs, top_k, None, topk_weights)


def split_k_workspace(
    a: Tensor, w: Tensor, out: Tensor, alignment: Alignment, config: KernelConfig, num_pairs: int, top_k: int,
    topk_weights: Tensor | None, extra: Extra,
) -> None:  # fmt: skip
    """Split-K by workspace: GEMM1 with its activation, or GEMM2."""
    split_k_workspace_unchecked(a, w, out, alignment, config, num_pairs, top_k, None, topk_weights, *extra)


def gated(
    a: Tensor, w: Tensor, out: Tensor, alignment: Alignment, config: KernelConfig, num_pairs: int, top_k: int,
    topk_weights: Tensor | None, extra: Extra, *, tma: bool = False,
) -> None:  # fmt: skip
    """GEMM1 with its activation, its rows left sorted."""
    activation: str = extra.activation  # type: ignore[assignment]  # never None of a kernel that activates
    gated_gemm_unchecked(
        a, w, out, alignment, config, num_pairs, top_k, None, topk_weights, activation, extra.gated, tma
    )


def sorted_scatter(
    a: Tensor, w: Tensor, out: Tensor, alignment: Alignment, config: KernelConfig, num_pairs: int, top_k: int,
    topk_weights: Tensor | None, extra: Extra, *, tma: bool = False,
) -> None:  # fmt: skip
    """GEMM2 over sorted rows, each product put in its pair's place."""
    sorted_gemm_unchecked(a, w, out, alignment, config, num_pairs, None, topk_weights, "scatter", 1, tma)


gated_tma: GemmLaunch = partial(gated, tma=True)
"""`gated` with weights by TMA."""

sorted_scatter_tma: GemmLaunch = partial(sorted_scatter, tma=True)
"""`sorted_scatter` with both operands by TMA."""


def extra_of(problem: Problem, gemm: Gemm, workspace: Tensor) -> Extra:
    """What that GEMM of the problem's kernel takes beside operands."""
    activates = gemm == "up" and TUNED[problem.kernel].activates
    return Extra(problem.shape.activation if activates else None, activates and problem.shape.gated, workspace)
