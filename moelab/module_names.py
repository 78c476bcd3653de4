"""Names of a checkpoint's modules, as lists of a `quantization_config` give them: by whole parts, wildcards and patterns."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import Any

from moelab.errors import FormatError

LONGEST = 1000
"""Characters of an entry: translating a pattern of 100,000 brackets takes minutes."""


_READ_OTHERWISE = ("{,", "[:")
"""What RE2 takes and means otherwise than Python: a repetition without a lower end is text to it, a class of POSIX one to it."""


class ModuleNames:
    """What a list of modules means; a checkpoint's may have thousands of entries, and an expert some hundred names a layer.

    Entries: whole parts of a dotted name ("lm_head", "layers.3.mlp"), one with a wildcard, which covers what is below it too, or
    "re:" and a pattern, which is held against a name's start. Raises FormatError for an entry over LONGEST and for a pattern that
    only backtracking can match, re.error for one that is none.
    """

    def __init__(self, entries: Iterable[object]) -> None:
        texts = [str(entry) for entry in entries]
        longest = max(map(len, texts), default=0)
        if longest > LONGEST:
            raise FormatError(
                f"A pattern of module names has {longest} characters. Expected {LONGEST} at most. Correct the checkpoint's "
                "quantization_config."
            )
        wild = [text for text in texts if not text.startswith("re:") and ("*" in text or "?" in text)]
        self._parts = {text.strip(".") for text in texts if not text.startswith("re:") and text not in wild}
        below = [fnmatch.translate(each) for text in wild for each in (text, f"{text}.*")]
        self._wild = re.compile("|".join(below)) if below else None
        self._patterns = [_linear(text[3:]) for text in texts if text.startswith("re:")]

    def covers(self, name: str) -> bool:
        """Whether an entry means the module of that name."""
        parts = name.split(".")
        runs = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
        return (
            bool(self._parts and not self._parts.isdisjoint(runs))
            or bool(self._wild and self._wild.match(name))
            or any(pattern.match(name) for pattern in self._patterns)
        )


def _linear(pattern: str) -> Any:
    """A checkpoint's pattern for an engine that takes time linear in a name: `(a+)+$` keeps Python's own busy for ever."""
    import re2

    options = re2.Options()
    options.log_errors = False
    try:
        if other := next((each for each in _READ_OTHERWISE if each in pattern), None):
            raise re2.error(f"{other} means something else to it")
        re.compile(pattern)  # what Python does not take is no pattern of a checkpoint's
        return re2.compile(pattern, options)
    except re2.error as error:
        raise FormatError(
            f"The pattern {pattern!r} of module names is none for RE2, a matcher that always comes to an end ({error.args[0]}). "
            "Expected one without lookarounds, back-references, and repetitions of many. Name the modules in the checkpoint's "
            "quantization_config otherwise, or pass dtype= (--dtype) for the format that its experts have."
        ) from None
