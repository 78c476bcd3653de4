"""The landscapes in data/landscapes, each read once a test process: a large one takes a second or two. They are frozen."""

from __future__ import annotations

import functools

from moelab.tuner import landscape


@functools.cache
def shipped(name: str) -> landscape.Landscape:
    """The shipped landscape of that name."""
    return landscape.load(name)
