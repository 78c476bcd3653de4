"""Which kernel computes the grouped product of a family of weight formats: a new one is its file and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from moelab.kernels.block_scaled_gemm import block_scaled_gemm_unchecked, check_block_scaled_gemm
from moelab.kernels.channel_scaled_gemm import FAMILIES as BY_CHANNEL
from moelab.kernels.channel_scaled_gemm import channel_scaled_gemm_unchecked, check_channel_scaled_gemm
from moelab.kernels.gemm_call import GemmCall
from moelab.kernels.packed_gemm import FAMILIES as PACKED
from moelab.kernels.packed_gemm import check_packed_gemm, packed_gemm_unchecked

Gemm = tuple[Callable[[GemmCall, Tensor], None], Callable[[GemmCall, Tensor], None]]

GEMMS: Mapping[str, Gemm] = {
    **dict.fromkeys(("fp8_w8a8_block", "int8_w8a8_block"), (check_block_scaled_gemm, block_scaled_gemm_unchecked)),
    **dict.fromkeys(BY_CHANNEL, (check_channel_scaled_gemm, channel_scaled_gemm_unchecked)),
    **dict.fromkeys(PACKED, (check_packed_gemm, packed_gemm_unchecked)),
}
"""Family of formats -> how its grouped product is checked and launched."""
