"""Lists of a checkpoint's modules: what an entry covers, entry by entry, and thousands of them at once."""

from __future__ import annotations

import fnmatch
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab.errors import FormatError
from moelab.module_names import LONGEST, ModuleNames
from moelab.quantization import read_quantisation

NAME = "model.layers.1.mlp.experts.0.gate_proj"


def covers(entry: str, name: str) -> bool:
    """What an entry means, said plainly: the whole parts of a dotted name, a wildcard for it or for what is below, a pattern."""
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    if "*" in entry or "?" in entry:
        return fnmatch.fnmatchcase(name, entry) or fnmatch.fnmatchcase(name, f"{entry}.*")
    return f".{entry.strip('.')}." in f".{name}."


@pytest.mark.parametrize(
    ("entry", "is_covered"),
    [
        (NAME, True), ("mlp.experts", True), ("experts", True), (".experts.", True), ("expert", False), ("layers.1", True),
        ("layers.11", False), ("lm_head", False), ("", False), ("model.*.mlp", True), ("*.experts", True), ("*experts*", True),
        ("layers.*.mlp", False), ("model.layers.?.mlp.experts", True), ("re:.*experts.*", True), ("re:experts", False),
        (r"re:model\.layers\.[02]\..*", False), ("re:.*(gate|up)_proj$", True), ("model.*.gate", False),
    ],
)  # fmt: skip
def test_what_an_entry_covers(entry: str, is_covered: bool) -> None:
    assert ModuleNames([entry]).covers(NAME) is covers(entry, NAME) is is_covered
    assert ModuleNames(["lm_head", entry, "model.*.norm", "re:.*router"]).covers(NAME) is is_covered


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("ab.*?", max_size=6), max_size=4), st.text("ab.", min_size=1, max_size=8))
def test_a_list_covers_what_one_of_its_entries_does(entries: list[str], name: str) -> None:
    assert ModuleNames(entries).covers(name) == any(covers(entry, name) for entry in entries)


def test_thousands_of_names_are_looked_up_and_not_gone_through() -> None:
    """Checkpoints name every linear layer of every block that they leave alone."""
    many = ModuleNames(f"model.layers.{i}.self_attn.q_proj" for i in range(100_000))
    assert many.covers("model.layers.99999.self_attn.q_proj") and not any(many.covers(NAME) for _ in range(10_000))


def test_a_long_entry_is_refused() -> None:
    with pytest.raises(FormatError, match=f"{LONGEST + 1} characters. Expected {LONGEST}"):
        ModuleNames(["lm_head", "[" * (LONGEST + 1)])


@pytest.mark.parametrize("pattern", ["(a+)+$", "(?:a|a)*b", "(.*)*x", ".*.*.*.*.*.*.*.*.*x", "a?" * 30 + "a" * 30])
def test_a_pattern_comes_to_an_end(pattern: str) -> None:
    """Python's own engine takes 2^60 steps for the first, and this test's limit of 300 s."""
    assert not ModuleNames([f"re:{pattern}"]).covers("a" * 29 + "!" + "a" * 30)


@pytest.mark.parametrize("pattern", ["^(?!.*experts).*$", r"(a)\1", "a{,5}", "[[:alpha:]]+", "(?:a{100}){100}", "x*+"])
def test_a_pattern_that_needs_backtracking_or_means_another_is_named(pattern: str) -> None:
    with pytest.raises(FormatError, match=r"is none for RE2.*Expected one without lookarounds"):
        ModuleNames([f"re:{pattern}"])


def test_a_pattern_is_named_through_the_reader() -> None:
    section = {"quant_method": "fp8", "ignored_layers": ["re:^(?!.*experts).*$"]}
    with pytest.raises(FormatError, match="RE2"):
        read_quantisation({"quantization_config": section}, {"num_hidden_layers": 2})
