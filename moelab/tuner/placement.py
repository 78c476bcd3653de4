"""Placement: which device measures which batch size, so that no comparison mixes devices.

GPUs of one machine differ in clocks by a per cent or two, as much as neighbouring configs do. All that is compared with each
other (the short looks at one GEMM and batch size, its finals, its layers) is therefore timed on one device, which keeps it
for the whole run, and makes its inputs alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from moelab.tuner.evaluate import Stage

STAGES: tuple[Stage, ...] = ("up", "down", "layer")

TOKENS_PER_UNIT = 1800
"""A batch size costs 1 + num_tokens / this: fitted to the seconds of a run of 19 batch sizes on an H200."""

Place = tuple[Stage | None, int]


class Placement:
    """Batch sizes on devices, the dearest first, each to the device with the least so far.

    With more devices than batch sizes a batch size's GEMMs are placed apart: pairs are then chosen by times of two devices,
    which shifts all of one GEMM's times alike, and finals and layers still run whole on one.
    """

    def __init__(self, batch_sizes: Iterable[int], devices: Iterable[int]) -> None:
        sizes, self._load = sorted(set(batch_sizes), reverse=True), dict.fromkeys(devices, 0.0)
        self._apart = len(sizes) < len(self._load)
        self._owner: dict[Place, int] = {}
        for num_tokens in sizes:
            for stage in STAGES:
                self.owner(stage, num_tokens)

    def owner(self, stage: Stage, num_tokens: int) -> int:
        """The device that measures it."""
        place = (stage if self._apart else None, num_tokens)
        if place not in self._owner:
            device = min(self._load, key=lambda d: (self._load[d], d))
            self._load[device] += 1 + num_tokens / TOKENS_PER_UNIT
            self._owner[place] = device
        return self._owner[place]

    def drop(self, device: int) -> None:
        """A device is gone for good: the others take over what it had, if there are others."""
        if device not in self._load or len(self._load) == 1:
            return
        del self._load[device]
        for place in [place for place, owner in self._owner.items() if owner == device]:
            del self._owner[place]
