"""Expert-sorted slots cut into tiles: every slot once, in tiles that a kernel can hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import sampled

from moelab import runtime
from moelab.errors import ShapeError
from moelab.kernels.token_tiles import TokenTiles, most_tiles, token_tiles, token_tiles_ref

DEVICE = "cuda" if runtime.current().mode == "gpu" else "cpu"


def offsets_of(rows: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32)


def in_use(tiles: TokenTiles) -> list[list[int]]:
    return tiles.tiles[: int(tiles.num_tiles)].tolist()


@pytest.mark.parametrize(
    ("rows", "sizes", "for_clusters"),
    sampled(
        [[0, 3, 0, 100, 17, 48, 1], [0, 0], [9], [1] * 60, [200, 0, 0, 8, 8, 9]],
        [(8, 8), (16, 8), (48, 16), (5, 1)],
        [False, True],
        together=1,
    ),
)
def test_the_kernel_makes_what_the_oracle_makes(rows: list[int], sizes: tuple[int, int], for_clusters: bool) -> None:
    tile_rows, grain = sizes
    slots = torch.randperm(sum(rows) + 3).int()  # three of other ranks, at the end
    made = token_tiles(slots.to(DEVICE), offsets_of(rows).to(DEVICE), tile_rows, grain, for_clusters)
    expected = token_tiles_ref(slots, offsets_of(rows), tile_rows, grain, for_clusters)
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


@given(
    rows=st.lists(st.integers(0, 300), min_size=1, max_size=40), tile=st.integers(1, 12), grain=st.sampled_from([1, 8, 16])
)  # fmt: skip
@settings(max_examples=100)
def test_pairs_are_the_same_tiles_and_share_where_they_can(rows: list[int], tile: int, grain: int) -> None:
    """Of an expert's n tiles n // 2 pairs are its own; a tile without rows is alone, last, and of its neighbour's expert."""
    given = torch.arange(sum(rows)).int(), offsets_of(rows), tile * grain, grain
    paired = token_tiles_ref(*given, for_clusters=True)
    records, singles = in_use(paired), in_use(token_tiles_ref(*given))
    assert len(records) % 2 == 0 and len(records) <= paired.most and paired.most % 2 == 0
    assert sorted(record for record in records if record[1]) == sorted(singles)
    empty = [record for record in records if not record[1]]
    assert empty == (records[-1:] if len(singles) % 2 else [])
    pairs = list(zip(records[::2], records[1::2], strict=True))
    for expert in range(len(rows)):
        own = sum(one[2] == other[2] == expert and other[1] > 0 for one, other in pairs)
        assert own == sum(record[2] == expert for record in singles) // 2
    assert not empty or pairs[-1][0][2] == pairs[-1][1][2]


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
