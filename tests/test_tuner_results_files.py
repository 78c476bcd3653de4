"""What a run leaves of config files that are there already: `moelab.tuner.results.beside`."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moelab.config import KernelConfig
from moelab.tuner.results import beside

CONFIGS = st.builds(KernelConfig, st.just(16), st.sampled_from([32, 64, 128]), st.sampled_from([32, 64]), st.just(1))
ENTRIES = st.dictionaries(st.sampled_from([1, 2, 8, 64, 512]), CONFIGS)


def reads(entries: dict[int, KernelConfig], b: int) -> KernelConfig:
    """As the loaders do: the nearest entry, the first of equals."""
    return entries[min(entries, key=lambda key: abs(key - b))]


@given(up=ENTRIES, down=ENTRIES, new_up=ENTRIES.filter(bool), with_down=st.booleans(), others=CONFIGS)
def test_what_was_there_is_read_as_before_and_what_is_new_as_told(up, down, new_up, with_down, others) -> None:
    """Of both GEMMs, at every batch size that a file names."""
    old = {"up": up, "down": down}
    new = {"up": new_up} | ({"down": dict.fromkeys(new_up, others)} if with_down else {})
    made = beside(old, new)
    for b in new_up:
        assert made["up"][b] == new_up[b]
        assert reads(made.get("down", made["up"]), b) == (others if with_down else new_up[b])
    for b in set(up) - set(new_up):
        assert made["up"][b] == up[b]
        assert reads(made.get("down", made["up"]), b) == reads(old["down"] or up, b)
    for b in set(down) - set(new_up):
        assert made["down"][b] == down[b]
    assert list(made["up"]) == sorted(made["up"])
