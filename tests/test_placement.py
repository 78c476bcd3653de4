"""placement: a batch size is measured on one device, the work is shared fairly, and who is lost is replaced."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moelab.tuner.placement import STAGES, TOKENS_PER_UNIT, Placement
from moelab.tuner.problem import BATCH_SIZES


def cost(num_tokens: int) -> float:
    return 1 + num_tokens / TOKENS_PER_UNIT


sizes = st.lists(st.integers(1, 16384), min_size=1, max_size=24, unique=True)


@given(sizes, st.integers(1, 8))
def test_each_batch_size_has_one_device_and_no_device_much_more(batch_sizes: list[int], count: int) -> None:
    """The bound is that of list scheduling (Graham, 1966): a fair share and one more, the dearest."""
    placement = Placement(batch_sizes, range(count))
    owners = {b: {placement.owner(stage, b) for stage in STAGES} for b in batch_sizes}
    assert all(owner <= set(range(count)) for owner in owners.values())
    if len(batch_sizes) >= count:
        assert all(len(owner) == 1 for owner in owners.values())
        loads = [sum(cost(b) for b, owner in owners.items() if owner == {d}) for d in range(count)]
        assert max(loads) <= sum(loads) / count + max(map(cost, batch_sizes)) and min(loads) > 0


@given(sizes, st.integers(2, 8), st.data())
def test_who_is_dropped_owns_nothing_and_the_others_keep_theirs(batch_sizes: list[int], count: int, data) -> None:
    placement = Placement(batch_sizes, range(count))
    before = {(stage, b): placement.owner(stage, b) for stage in STAGES for b in batch_sizes}
    gone = data.draw(st.integers(0, count - 1))
    placement.drop(gone)
    after = {place: placement.owner(*place) for place in before}
    assert gone not in after.values()
    assert all(after[place] == owner for place, owner in before.items() if owner != gone)


def test_the_last_device_stays() -> None:
    placement = Placement((1, 2), (3,))
    placement.drop(3)
    placement.drop(3)
    assert placement.owner("up", 1) == placement.owner("down", 2) == placement.owner("layer", 64) == 3


def test_four_gpus_share_the_usual_batch_sizes_evenly() -> None:
    placement = Placement((*BATCH_SIZES, 8192), range(4))
    loads = [0.0] * 4
    for b in (*BATCH_SIZES, 8192):
        loads[placement.owner("up", b)] += cost(b)
    assert max(loads) < 1.1 * sum(loads) / 4


def test_gemms_are_placed_apart_only_where_devices_would_stand_idle() -> None:
    one = Placement((64,), range(4))
    assert len({one.owner(stage, 64) for stage in STAGES}) == 3
    assert len({Placement((64, 1), range(2)).owner(stage, 64) for stage in STAGES}) == 1
