"""Two things that Triton's interpreter does for every operation, and need not: a fifth of what a kernel takes there."""

from __future__ import annotations

import dataclasses

import numpy as np
from triton.runtime import interpreter

its_dtype = interpreter._get_np_dtype
_dtypes: dict[str, np.dtype] = {}


def kept_dtype(of):
    """numpy's type for one of Triton's, which makes a table of all of them for each question."""
    found = _dtypes.get(of.name)
    if found is None:
        found = _dtypes[of.name] = its_dtype(of)
    return found


def install() -> None:
    """For this process. Whether integers overflow is computed by six operations for each and then dropped, unless debug is set:
    here it is not computed."""
    interpreter._get_np_dtype = kept_dtype
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
