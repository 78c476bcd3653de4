"""What several panels share: the finals at hand, and the pairs that the reader has excluded."""

from __future__ import annotations

from collections.abc import Callable

from moelab.tuner.finals import Finals
from moelab.tuner.problem import Pair
from moelab.tuner.results import TuneResult


class Choice:
    """Finals, less what was excluded. Panels `follow` it; what they raise passes through."""

    def __init__(self, finals: Finals) -> None:
        self.finals = finals
        self.excluded: set[tuple[int, Pair]] = set()
        self._followers: list[Callable[[], None]] = []

    def follow(self, redraw: Callable[[], None]) -> None:
        """Call redraw after every change."""
        self._followers.append(redraw)

    def take(self, finals: Finals) -> None:
        """Other finals, nothing excluded: a run has ended."""
        self.finals, self.excluded = finals, set()
        self._tell()

    def exclude(self, num_tokens: int, pair: Pair) -> None:
        """That pair may not win there."""
        self.excluded.add((num_tokens, pair))
        self._tell()

    def restore(self) -> None:
        """Nothing is excluded any more."""
        self.excluded.clear()
        self._tell()

    def result(self) -> TuneResult:
        """The winners now."""
        return self.finals.result(self.excluded)

    def _tell(self) -> None:
        for redraw in self._followers:
            redraw()
