"""A suite by name: its module, and torch with it, is imported when it is run, so that a list of suites shows at once."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moelab.recordings import Recording


@dataclass(frozen=True)
class Later:
    """The function `name` of `module`, to be called as it is, and inspected: its signature is that function's."""

    module: str
    name: str = "record"

    def function(self) -> Callable[..., Recording]:
        """The function itself."""
        return getattr(importlib.import_module(self.module), self.name)

    def __call__(self, *given: Any, **named: Any) -> Recording:
        return self.function()(*given, **named)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.function())
