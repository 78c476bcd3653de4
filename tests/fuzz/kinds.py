"""The kinds of input that are spoiled, by name."""

from __future__ import annotations

from collections.abc import Mapping

from fuzz import Kind, config_files

KINDS: Mapping[str, Kind] = {
    "config files": config_files.cases,
}
