"""sm90_fast_layer.cu with CLUSTER == 2: clusters of two CTAs, on an emulated chip, and what the launcher makes of it."""

from __future__ import annotations

from pathlib import Path

import emulated_gpu
import pytest
import torch
from cuda.bindings import driver
from fast_cases import MIDDLE, MIDDLE_PAIR, SMALL_PAIR, WIDE_PAIR, compare, needs_compiler, ordered
from sampling import whole

from moelab import recordings
from moelab.errors import RuntimeModeError
from moelab.kernels import fast_layer
from moelab.kernels.expert_order import expert_order
from moelab.kernels.fast_instances import ALL, SOURCE, Instance
from moelab.kernels.token_tiles import token_tiles_ref
from moelab.pipelines.fast import route_for, tiles_for


@needs_compiler
@pytest.mark.parametrize(
    "instance, sizes, blocks",
    [
        whole(SMALL_PAIR, (1, 4, 2, 128, 64), 2),  # one row an expert: nothing is shared
        (SMALL_PAIR, (7, 1, 1, 72, 40), 4),  # one tile, and one without rows
        (SMALL_PAIR, (45, 2, 2, 64, 64), 2),  # more pairs than clusters; the third tiles of both experts are a pair
        whole(MIDDLE_PAIR, (40, 3, 2, 136, 72), 4),
        whole(MIDDLE_PAIR, (150, 1, 1, 200, 136), 2),  # a pair, and a third tile beside one without rows
        (MIDDLE_PAIR, (9, 20, 3, 64, 8), 4),  # experts without a row, and w13's second half of rows outside of it
        whole(WIDE_PAIR, (190, 2, 1, 64, 104), 2),  # TOKENS is no multiple of GRAIN
    ],
)
def test_blocks_that_share_weights_are_right_and_end(instance: Instance, sizes: tuple[int, ...], blocks: int) -> None:
    compare(instance, *sizes, blocks=blocks)


@needs_compiler
@pytest.mark.whole
def test_a_block_that_begins_before_the_other_is_there_is_seen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second block of a pair is a quarter of a second late, which the kernel as it is waits for."""
    start = "        for (int stage = 0; stage < S::STAGES; ++stage) {\n            barrier_init(&shared.operands_full"
    wait = "        if (cluster_rank()) std::this_thread::sleep_for(std::chrono::milliseconds(250));\n"
    begin = "        sync_cluster();  // nobody arrives at a barrier of the other CTA before it is there\n"
    sleeps = ("sm90_fast_layer.cu", start, wait + start)
    compare(SMALL_PAIR, 7, 2, 1, 64, 64, source=emulated_gpu.altered(tmp_path / "right", sleeps))
    source = emulated_gpu.altered(
        tmp_path / "wrong", sleeps, ("sm90_fast_layer.cu", begin, "        __syncthreads();\n")
    )
    with pytest.raises(RuntimeError, match="status 3"):
        compare(SMALL_PAIR, 7, 2, 1, 64, 64, source=source)
    assert "nobody has initialised" in capfd.readouterr().err


@needs_compiler
@pytest.mark.whole
def test_a_block_that_ends_while_the_other_may_reach_it_is_seen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """GEMM1 alone, after which no block waits for another: the last a consumer does is to release a stage of both. Where its
    producer waits for that, the end of the kernel need not."""
    x, ids, weights = torch.rand(20, 64).half(), torch.zeros(20, 1, dtype=torch.int32), torch.ones(20, 1)
    w13, w2 = torch.rand(1, 128, 64).half(), torch.rand(1, 64, 64).half()
    given = (x, w13, w2, weights, ids, ordered(ids, 1, SMALL_PAIR), SMALL_PAIR)
    emulated_gpu.run_layer(*given, parts=fast_layer.GEMM1, late=1)
    end = "    if constexpr (S::CLUSTER > 1) sync_cluster();  // the other CTA may yet arrive here\n"
    drain = "            drain(shared, layer, pipeline);\n"
    emulated_gpu.run_layer(
        *given,
        parts=fast_layer.GEMM1,
        source=emulated_gpu.altered(tmp_path / "right", ("sm90_fast_layer.cu", end, "")),
        late=1,
    )
    source = emulated_gpu.altered(
        tmp_path / "wrong", ("sm90_fast_layer.cu", end, ""), ("sm90_fast_layer.cu", drain, "")
    )
    with pytest.raises(RuntimeError, match="status 3"):
        emulated_gpu.run_layer(*given, parts=fast_layer.GEMM1, source=source, late=1)
    assert "a block that has ended" in capfd.readouterr().err


@needs_compiler
@pytest.mark.whole
def test_tiles_of_two_experts_load_their_own_weights(tmp_path: Path) -> None:
    """Five tiles of expert 0 and three of expert 1: the last pair is of both. Nothing is wrong where nobody shares."""
    ids = (torch.arange(128)[:, None] >= 80).int()
    of_one = "layer.tiles[tokens ^ 1].expert == tile.expert"
    never, always = (
        emulated_gpu.altered(tmp_path / name, ("sm90_fast_tiles.cuh", of_one, name)) for name in ("false", "true")
    )
    for source in (SOURCE, never):
        compare(SMALL_PAIR, 128, 2, 1, 64, 64, ids=ids, blocks=4, source=source)
    with pytest.raises(AssertionError):
        compare(SMALL_PAIR, 128, 2, 1, 64, 64, ids=ids, blocks=4, source=always)


LATE = [
    # GEMM2 waits for GEMM1
    ("sm90_fast_producers.cuh", "scheduler.across1 * S::WARPGROUPS", "0", (45, 2, 1, 64, 64), 4),
    # the sums wait for GEMM2
    whole("sm90_fast_sums.cuh", "scheduler.tiles1) * W::Tile::CLUSTER;", "scheduler.tiles1);", (45, 2, 2, 64, 64), 4),
]


@needs_compiler
@pytest.mark.parametrize(("file", "both", "one", "sizes", "blocks"), LATE)
def test_a_wait_for_one_block_of_two_is_seen(
    tmp_path: Path, file: str, both: str, one: str, sizes: tuple[int, ...], blocks: int
) -> None:
    """What the late block has yet to write is not-a-number; the kernel as it is waits for it."""
    ids = (torch.arange(sizes[0])[:, None] % sizes[1]).int().repeat(1, sizes[2])
    compare(SMALL_PAIR, *sizes, ids=ids, blocks=blocks, late=1)
    source = emulated_gpu.altered(tmp_path, (file, both, one))
    with pytest.raises(AssertionError, match="nan"):
        compare(SMALL_PAIR, *sizes, ids=ids, blocks=blocks, late=1, source=source)


def test_a_form_of_single_blocks_keeps_its_recorded_name() -> None:
    recorded = {row["instance"] for row in recordings.load("fast_choice").rows}
    assert {repr(each) for each in ALL} <= recorded
    assert repr(MIDDLE_PAIR) == repr(MIDDLE)[:-1] + ", cluster=2)"
    assert Instance.named(repr(MIDDLE_PAIR)) == MIDDLE_PAIR != MIDDLE == Instance.named(repr(MIDDLE))
    assert MIDDLE_PAIR.shape == "Shape<2, 1, 3, 64, 16, 16, 1, 2, 0, 0, 0>"


@pytest.mark.parametrize("instance", [MIDDLE, MIDDLE_PAIR])
def test_a_pair_takes_two_tiles(instance: Instance, device: str) -> None:
    """300 rows of expert 0: five tiles of 64 and less, and in pairs a sixth without rows."""
    ids = torch.zeros(300, 1, dtype=torch.int32, device=device)
    order = expert_order(ids, 2)
    tiles = tiles_for(order, instance)
    paired = instance.cluster > 1
    expected = token_tiles_ref(order.sorted_slots.cpu(), order.expert_offsets.cpu(), instance.tokens, 16, paired)
    used = int(expected.num_tiles)
    assert used == (6 if paired else 5) and tiles.most == expected.most and int(tiles.num_tiles) == used
    assert tiles.tiles[:used].cpu().equal(expected.tiles[:used])
    assert tiles.tiles[:used, 1].tolist() == [64, 64, 64, 64, 44, 0][:used]


@pytest.mark.parametrize(("num_tokens", "rows"), [(40, [40, 0]), (64, [64, 0]), (100, [64, 36])])
def test_routed_tiles_come_in_pairs(num_tokens: int, rows: list[int], device: str) -> None:
    """However few the tokens: the launch that routes and orders at once makes a tile an expert, and no pairs."""
    logits = torch.tensor([[1.0, 0.0]], device=device).repeat(num_tokens, 1)
    _, tiles = route_for(logits, 1, MIDDLE_PAIR)
    assert tiles.tiles[: int(tiles.num_tiles), 1].tolist() == rows


def test_a_launch_says_how_its_blocks_are_clustered() -> None:
    names = driver.CUlaunchAttributeID
    overlap, clusters = (
        names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
    )  # fmt: skip
    for instance, overlapped, expected in (
        (MIDDLE, False, []),
        (MIDDLE, True, [overlap]),
        (MIDDLE_PAIR, False, [clusters]),
        (MIDDLE_PAIR, True, [overlap, clusters]),
    ):
        config = fast_layer._instance_config(instance, 132, 0, overlapped)
        assert [each.id for each in config.attrs] == expected and config.numAttrs == len(expected)
        for each in config.attrs:
            if each.id == clusters:
                size = each.value.clusterDim
                assert (size.x, size.y, size.z) == (2, 1, 1)


def test_a_grid_is_of_whole_clusters_that_fit() -> None:
    assert fast_layer.grid_of(MIDDLE, 132, 132) == 132
    assert fast_layer.grid_of(MIDDLE_PAIR, 132, 66) == 132
    assert fast_layer.grid_of(MIDDLE_PAIR, 132, 60) == 120  # some SMs have no free neighbour
    assert fast_layer.grid_of(MIDDLE_PAIR, 133, 80) == 132


def test_the_driver_is_asked_how_many_clusters_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a launch of as many whole pairs as there are blocks; a refusal is not taken for a number."""
    asked = []

    def fit(function: object, config: driver.CUlaunchConfig) -> tuple[driver.CUresult, int]:
        asked.append((config.gridDimX, config.blockDimX, config.sharedMemBytes, len(config.attrs)))
        return driver.CUresult.CUDA_SUCCESS, 60

    monkeypatch.setattr(driver, "cuOccupancyMaxActiveClusters", fit)
    assert fast_layer._clusters_at_once(None, MIDDLE_PAIR, 135) == 60
    assert asked == [(134, MIDDLE_PAIR.threads, MIDDLE_PAIR.shared_bytes, 1)]
    assert fast_layer._clusters_at_once(None, MIDDLE, 135) == 135 and len(asked) == 1
    refused = driver.CUresult.CUDA_ERROR_INVALID_CLUSTER_SIZE
    monkeypatch.setattr(driver, "cuOccupancyMaxActiveClusters", lambda function, config: (refused, 0))
    with pytest.raises(RuntimeModeError, match="how many clusters"):
        fast_layer._clusters_at_once(None, MIDDLE_PAIR, 132)
