"""Activations into fp8 codes in order of expert, and their scales tile by tile, as the one-launch layer's TMA loads them.

The codes and scales are those of `quantise_activations`, of each token as often as it has slots here.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.formats import Format  # noqa: E402
from moelab.kernels.launch import Launcher  # noqa: E402
from moelab.kernels.quantise_activations import CODE_LIMIT, quantise_rows  # noqa: E402
from moelab.kernels.tiles import start_next  # noqa: E402
from moelab.kernels.token_tiles import TokenTiles  # noqa: E402

ROWS, GROUPS = 8, 16
"""Rows and groups of a program."""


@triton.jit(do_not_specialize=["top_k"])
def _quantise_tiles_kernel(
    x_ptr, slots_ptr, tiles_ptr, num_tiles_ptr, out_ptr, scale_ptr, top_k, K,
    TOKENS: tl.constexpr, IN_ROWS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    LIMIT: tl.constexpr, POWER: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """GROUPS groups of ROWS rows of a tile."""
    start_next(PDL)
    groups = K // GROUP
    tile, across = tl.program_id(0), tl.cdiv(groups, GROUPS)
    begin = tl.program_id(1) // across * ROWS
    if tile >= tl.load(num_tiles_ptr):
        return
    first, rows = tl.load(tiles_ptr + 4 * tile), tl.load(tiles_ptr + 4 * tile + 1)
    if begin >= rows:
        return
    at = tl.arange(0, ROWS * GROUPS)
    row, group = begin + at // GROUPS, tl.program_id(1) % across * GROUPS + at % GROUPS
    real = (row < rows) & (group < groups)
    token = tl.load(slots_ptr + first + row, mask=real, other=0) // top_k
    columns = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + token.to(tl.int64)[:, None] * K + columns, mask=real[:, None], other=0.0).to(tl.float32)
    codes, scale = quantise_rows(x, out_ptr.dtype.element_ty, LIMIT, POWER)
    tl.store(out_ptr + (first + row).to(tl.int64)[:, None] * K + columns, codes, mask=real[:, None])
    place = row if IN_ROWS else (row & ~15) | ((row & 6) << 1) | ((row & 8) >> 2) | (row & 1)
    tl.store(scale_ptr + (tile.to(tl.int64) * groups + group) * TOKENS + place, scale, mask=real)


_launcher = Launcher(_quantise_tiles_kernel)


def quantise_tiles_unchecked(
    x: Tensor, tiles: TokenTiles, top_k: int, tokens: int, format: Format, *, in_rows: bool
) -> tuple[Tensor, Tensor]:
    """x (M, K) floating -> codes (S, K) in the order of tiles.sorted_slots, and float32 scales (tiles.most, K / g, tokens), each
    tile's as `fast_quantised.scale_place` orders them, or as rows lie; what no row of a tile has is not written.

    tiles: of slots token * top_k + j, at most `tokens` rows each. format: fp8 in blocks whose groups of g divide K.
    """
    group, K, limit = format.sizes[-1], x.shape[1], CODE_LIMIT[str(format.weight_dtype)]
    codes = torch.empty((tiles.sorted_slots.shape[0], K), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((tiles.most, K // group, tokens), dtype=torch.float32, device=x.device)
    _launcher(
        (format, x.dtype, K, tokens, in_rows),
        (tiles.most, -(-tokens // ROWS) * -(-(K // group) // GROUPS)),
        (x, tiles.sorted_slots, tiles.tiles, tiles.num_tiles, codes, scale),
        (top_k, K),
        lambda: (
            {"TOKENS": tokens, "IN_ROWS": in_rows, "GROUP": group, "ROWS": ROWS, "GROUPS": GROUPS, "LIMIT": limit,
             "POWER": format.power_of_two_scales},
            {"num_warps": 8},
        ),
    )  # fmt: skip
    return codes, scale
