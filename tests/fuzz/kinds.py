"""The kinds of input that are spoiled, by name."""

from __future__ import annotations

from collections.abc import Mapping

from fuzz import Kind, commands, config_files, journals, measured, models

KINDS: Mapping[str, Kind] = {
    "command lines": commands.cases,
    "config files": config_files.cases,
    "model configs": models.cases,
    "device files": measured.devices,
    "journals": journals.cases,
    "landscapes": measured.landscapes,
    "landscapes, one bit": measured.landscape_bits,
    "recordings": measured.recorded,
    "recordings, one bit": measured.recording_bits,
    "routing files": measured.routings,
}
