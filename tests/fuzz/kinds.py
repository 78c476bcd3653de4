"""The kinds of input that are spoiled, by name."""

from __future__ import annotations

from collections.abc import Mapping

from fuzz import Kind, commands, config_files

KINDS: Mapping[str, Kind] = {
    "command lines": commands.cases,
    "config files": config_files.cases,
}
