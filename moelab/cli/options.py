"""What the values of options may be, where a type alone does not say it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import typer

from moelab.errors import OptionError

MOST_TOKENS = 2**31 - 1
"""Of a batch: an expert's id for each is an int32 tensor, and sizes of activations stay within int64."""

MOST_SEED = 2**63 - 1
"""What torch takes."""


def refuse_empty(argv: Sequence[str]) -> None:
    """An empty argument is most often a variable that is not set: as a folder it would be the one that one is in."""
    for before, argument in zip(["", *argv], argv, strict=False):
        name = argument[:-1] if re.fullmatch(r"--[a-z-]+=", argument) else before if argument == "" else None
        if name is not None:
            where = f"for {name} " if name.startswith("-") else ""
            raise OptionError(
                f"An argument {where}is empty. Expected a value; a variable of the shell may not be set. Give one, or leave the "
                "option out."
            )


def whole_version(version: str | None) -> str | None:
    """Folders are named by three numbers: "3.6" would silently match none of them."""
    from moelab import runtime

    if version is not None and not runtime.is_version(version):
        raise typer.BadParameter(f"{version!r} is not a whole version. Expected three numbers, such as 3.6.0.")
    return version


def gpus(text: str) -> tuple[int, ...]:
    """ "0,2" or "all"."""
    if text == "all":
        import torch

        return tuple(range(torch.cuda.device_count()))
    numbers = [int(number) for number in text.split(",")] if re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*", text) else []
    if not numbers or len(set(numbers)) < len(numbers):
        raise typer.BadParameter(
            f"{text!r} names no GPUs. Expected numbers with commas, each once, such as 0,1, or all."
        )
    return tuple(numbers)
