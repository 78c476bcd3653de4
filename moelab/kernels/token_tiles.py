"""Which tokens a kernel multiplies together: the expert-sorted slots, cut into tiles of at most so many rows of one expert.

Where `moe_align_block_size` pads each expert to whole blocks in memory, this pads nothing: rows lie densely, and a tile
says where it starts and how many rows it has.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

from itertools import pairwise  # noqa: E402
from typing import NamedTuple  # noqa: E402

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.errors import ShapeError  # noqa: E402
from moelab.kernels import checks  # noqa: E402
from moelab.kernels.launch import Launcher  # noqa: E402
from moelab.kernels.tiles import start_next  # noqa: E402


class TokenTiles(NamedTuple):
    """Tiles of expert-sorted slots: those of an expert are of equal size but for the last, and the largest come first.

    In pairs, tiles 2 i and 2 i + 1 are for two CTAs that share what they read: first all pairs of one expert, then the tile
    that an expert may have left, two experts a pair, and where their number is odd a tile without rows.
    sorted_slots: (S,) int32, flat slots token * top_k + j; those of ids outside the experts are left out at the end.
    tiles: (most, 4) int32: first row, rows, expert, slot of the first row; num_tiles: (1,) int32 of them in use.
    ready: (most + 2,) int32 zeros, which a kernel counts in and leaves as zeros: one launch at a time.
    Tensors of int32 on the device of the slots.
    """

    sorted_slots: Tensor
    tiles: Tensor
    num_tiles: Tensor
    ready: Tensor

    @property
    def most(self) -> int:
        """Tiles that there is room for."""
        return self.tiles.shape[0]


def most_tiles(num_slots: int, num_experts: int, tile_rows: int, for_clusters: bool = False) -> int:
    """The most tiles that any routing of so many slots can need; for_clusters: with one more where their number is odd."""
    most = min(num_experts, num_slots) + num_slots // tile_rows
    return most + most % 2 if for_clusters else most


def new_token_tiles(sorted_slots: Tensor, num_experts: int, tile_rows: int, for_clusters: bool = False) -> TokenTiles:
    """Tiles to write to, with room for any routing. One allocation, records and counters on 16 bytes."""
    most = max(most_tiles(sorted_slots.shape[0], num_experts, tile_rows, for_clusters), 2 if for_clusters else 1)
    buffer = sorted_slots.new_empty(5 * most + 6)
    tiles, num_tiles, ready = buffer[: 4 * most].view(most, 4), buffer[4 * most : 4 * most + 1], buffer[4 * most + 4 :]
    return TokenTiles(sorted_slots, tiles, num_tiles, ready)


@triton.jit
def _rows_of_a_tile(rows, ROWS: tl.constexpr, GRAIN: tl.constexpr):
    """Of an expert with so many rows: as many in each tile, but for the last, in whole GRAINs."""
    tiles = tl.maximum((rows + ROWS - 1) // ROWS, 1)
    return (rows + tiles * GRAIN - 1) // (tiles * GRAIN) * GRAIN


@triton.jit(do_not_specialize=["num_experts", "room"])
def _token_tiles_kernel(
    slots_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, ready_ptr, num_experts, room,
    ROWS: tl.constexpr, GRAIN: tl.constexpr, FOR_CLUSTERS: tl.constexpr, EXPERTS: tl.constexpr, ROOM: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """One program."""
    start_next(PDL)
    expert = tl.arange(0, EXPERTS)
    real = expert < num_experts
    first = tl.load(offsets_ptr + expert, mask=real, other=0)
    rows = tl.load(offsets_ptr + expert + 1, mask=real, other=0) - first
    each = _rows_of_a_tile(rows, ROWS, GRAIN)
    # Longest tiles first (LPT), lower experts before higher: CTAs that take every 132nd then have nearly the same to do.
    order = tl.sort(each.to(tl.int64) * EXPERTS + (EXPERTS - 1 - expert), descending=True)
    expert = (EXPERTS - 1 - order % EXPERTS).to(tl.int32)
    real = expert < num_experts
    first = tl.load(offsets_ptr + expert, mask=real, other=0)
    rows = tl.load(offsets_ptr + expert + 1, mask=real, other=0) - first
    each = _rows_of_a_tile(rows, ROWS, GRAIN)
    tiles = (rows + ROWS - 1) // ROWS
    # Whole pairs, or of single tiles all, lie one expert after another; what is left of an expert lies behind them.
    whole = tiles // 2 * 2 if FOR_CLUSTERS else tiles
    begin = tl.cumsum(whole, axis=0) - whole
    count = tl.sum(tiles, axis=0)
    left = tl.sum(whole, axis=0) + tl.cumsum(tiles - whole, axis=0) - 1
    for i in range(tl.max(tiles, axis=0)):
        record = tiles_ptr + 4 * tl.where(i < whole, begin + i, left)
        used = i < tiles
        tl.store(record, first + i * each, mask=used)
        tl.store(record + 1, tl.minimum(each, rows - i * each), mask=used)
        tl.store(record + 2, expert, mask=used)
        tl.store(record + 3, tl.load(slots_ptr + first + i * each, mask=used, other=0), mask=used)
    if FOR_CLUSTERS:
        last = (tiles > whole) & (left == count - 1) & (count % 2 == 1)
        record = tiles_ptr + 4 * count + 0 * left
        tl.store(record, first + rows, mask=last)
        tl.store(record + 1, 0 * rows, mask=last)
        tl.store(record + 2, expert, mask=last)
        tl.store(record + 3, 0 * rows, mask=last)
        count += count % 2
    tl.store(num_tiles_ptr, count)
    for start in range(0, room, ROOM):
        place = start + tl.arange(0, ROOM)
        tl.store(ready_ptr + place, 0 * place, mask=place < room)


def token_tiles(
    sorted_slots: Tensor, expert_offsets: Tensor, tile_rows: int, grain: int = 1, for_clusters: bool = False
) -> TokenTiles:
    """Cut expert-sorted slots into tiles of at most `tile_rows` rows. No host synchronisation.

    grain: divides tile_rows; all tiles of an expert but its last are a multiple of it, where there are several. for_clusters: see
    `TokenTiles`.

    sorted_slots: (S,) int32; expert_offsets: (E + 1,) int32, first row of each expert, then the end of the last.
    Raises ShapeError, DeviceError, RuntimeModeError.
    """
    checks.check_kernel_device("sorted_slots", sorted_slots)
    if (
        sorted_slots.ndim != 1
        or expert_offsets.ndim != 1
        or expert_offsets.shape[0] < 2
        or tile_rows < 1
        or tile_rows % grain
    ):
        raise ShapeError(
            f"sorted_slots is {tuple(sorted_slots.shape)}, expert_offsets {tuple(expert_offsets.shape)}, tile_rows {tile_rows}, "
            f"grain {grain}. "
            "Expected (S,), (E + 1,), at least one row, and a grain that divides them. Pass what expert_order returns."
        )
    return token_tiles_unchecked(sorted_slots, expert_offsets, tile_rows, grain, for_clusters)


_launcher = Launcher(_token_tiles_kernel)


def token_tiles_unchecked(
    sorted_slots: Tensor, expert_offsets: Tensor, tile_rows: int, grain: int, for_clusters: bool = False
) -> TokenTiles:
    """`token_tiles`, for callers that have checked the call as a whole."""
    num_experts = expert_offsets.shape[0] - 1
    found = new_token_tiles(sorted_slots, num_experts, tile_rows, for_clusters)
    experts = max(16, triton.next_power_of_2(num_experts))
    constants = {"ROWS": tile_rows, "GRAIN": grain, "FOR_CLUSTERS": for_clusters, "EXPERTS": experts, "ROOM": 1024}
    _launcher(
        (tile_rows, grain, for_clusters, experts),
        (1, 1),
        (sorted_slots, expert_offsets, found.tiles, found.num_tiles, found.ready),
        (num_experts, found.ready.shape[0]),
        lambda: (constants, {"num_warps": 4}),
    )
    return found


def token_tiles_ref(
    sorted_slots: Tensor, expert_offsets: Tensor, tile_rows: int, grain: int = 1, for_clusters: bool = False
) -> TokenTiles:
    """The same in plain Python, as the oracle."""
    ends = expert_offsets.tolist()
    of_experts = []
    for expert, (first, end) in enumerate(pairwise(ends)):
        count = -(-(end - first) // tile_rows)
        each = -(-(end - first) // (max(count, 1) * grain)) * grain
        starts = [first + i * each for i in range(count)]
        of_experts.append(
            (each, [(start, min(each, end - start), expert, int(sorted_slots[start])) for start in starts])
        )
    of_experts.sort(key=lambda pair: -pair[0])
    records = [record for _, of_expert in of_experts for record in of_expert]
    if for_clusters and records:
        left = [of_expert[-1] for _, of_expert in of_experts if len(of_expert) % 2]
        records = [record for record in records if record not in left] + left
        records += [(sum(records[-1][:2]), 0, records[-1][2], 0)] * (len(records) % 2)
    room = max(most_tiles(sorted_slots.shape[0], len(ends) - 1, tile_rows, for_clusters), 2 if for_clusters else 1)
    tiles = torch.zeros((room, 4), dtype=torch.int32)
    if records:
        tiles[: len(records)] = torch.tensor(records, dtype=torch.int32)
    return TokenTiles(
        sorted_slots,
        tiles,
        torch.tensor([len(records)], dtype=torch.int32),
        torch.zeros(room + 2, dtype=torch.int32),
    )
