"""Expert-sorted slots cut into tiles: every slot once, in tiles that a kernel can hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab import runtime
from moelab.errors import ShapeError
from moelab.kernels.token_tiles import TokenTiles, most_tiles, token_tiles, token_tiles_ref

DEVICE = "cuda" if runtime.current().mode == "gpu" else "cpu"


def offsets_of(rows: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32)


def in_use(tiles: TokenTiles) -> list[list[int]]:
    return tiles.tiles[: int(tiles.num_tiles)].tolist()


@pytest.mark.parametrize("tile_rows, grain", [(8, 8), (16, 8), (48, 16), (5, 1)])
@pytest.mark.parametrize("rows", [[0, 3, 0, 100, 17, 48, 1], [0, 0], [9], [1] * 60, [200, 0, 0, 8, 8, 9]])
def test_the_kernel_makes_what_the_oracle_makes(rows: list[int], tile_rows: int, grain: int) -> None:
    slots = torch.randperm(sum(rows) + 3).int()  # three of other ranks, at the end
    made = token_tiles(slots.to(DEVICE), offsets_of(rows).to(DEVICE), tile_rows, grain)
    expected = token_tiles_ref(slots, offsets_of(rows), tile_rows, grain)
    assert in_use(made) == in_use(expected)
    assert made.most == expected.most and not made.ready.any() and made.ready.shape == expected.ready.shape


@given(
    rows=st.lists(st.integers(0, 300), min_size=1, max_size=40), tile=st.integers(1, 12), grain=st.sampled_from([1, 8, 16])
)  # fmt: skip
@settings(max_examples=100)
def test_every_row_is_in_one_tile(rows: list[int], tile: int, grain: int) -> None:
    slots = torch.arange(sum(rows)).int()
    tiles = token_tiles_ref(slots, offsets_of(rows), tile * grain, grain)
    records, offsets = in_use(tiles), offsets_of(rows).tolist()
    covered = [row for first, count, _, _ in records for row in range(first, first + count)]
    assert sorted(covered) == list(range(sum(rows)))
    assert len(records) <= most_tiles(sum(rows), len(rows), tile * grain) <= tiles.most
    for first, count, expert, slot in records:
        assert 0 < count <= tile * grain and slot == first
        assert offsets[expert] <= first and first + count <= offsets[expert + 1]
        assert first + count == offsets[expert + 1] or count % grain == 0


def test_what_is_no_order() -> None:
    slots, offsets = torch.arange(4).int(), offsets_of([4])
    for bad in (
        (slots[None], offsets, 8, 8),
        (slots, offsets[:1], 8, 8),
        (slots, offsets, 0, 1),
        (slots, offsets, 12, 8),
    ):
        with pytest.raises(ShapeError, match="expert_order"):
            token_tiles(*bad)
