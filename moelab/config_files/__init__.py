"""Tuned-config files: their names, their content, which of them a lookup uses and why, export, and a doctor.

A file holds batch size -> KernelConfig for one (E, N, device, dtype, ...), named as sglang and vLLM name it:
`E=128,N=768,device_name=NVIDIA_H200.json`, N being the last dimension of w2. Hidden size and top_k are not in
the name. Files lie in `triton_X_Y_Z/` folders, because what is fast under one Triton need not be under
another. A file `...,kernel=NAME.json` is for a kernel beside the vLLM/sglang-compatible one, and no peer can ask for it.

questions.py says which file a server asks for, for a model as it runs it. rules.py says how each loader searches; names.py,
content.py and search.py follow it; exporting.py writes for a loader and reads back; diagnosis.py finds the files that no
loader reaches, or no kernel takes; shipped.py has what sglang ships for a few models.
"""

from __future__ import annotations

from moelab.config_files.completing import Completed, complete, own_tree
from moelab.config_files.content import read_config_file, write_config_file
from moelab.config_files.devices import device_doubt
from moelab.config_files.diagnosis import doctor
from moelab.config_files.exporting import (
    Exported,
    Source,
    export,
    export_path,
    export_together,
    left_out,
    shared_name,
    sources,
)  # fmt: skip
from moelab.config_files.findings import Finding, Report
from moelab.config_files.names import FileName, file_name, parse_file_name
from moelab.config_files.near import Near, elsewhere, near, shipped_names
from moelab.config_files.places import kernels_with_files, version_folders
from moelab.config_files.questions import Question, ask, not_asked_for, platform_of, question
from moelab.config_files.rules import DTYPE_SELECTORS, RULES, Rules, get_rules, rules_table
from moelab.config_files.search import Lookup, Step, lookup, nearest_key
from moelab.config_files.serving import Action, as_markdown, as_text, to_serve, tune_to_serve
from moelab.config_files.shipped import files_below, shipped_files, write_shipped

__all__ = [
    "DTYPE_SELECTORS",
    "RULES",
    "Action",
    "Completed",
    "Exported",
    "FileName",
    "Finding",
    "Lookup",
    "Near",
    "Question",
    "Report",
    "Rules",
    "Source",
    "Step",
    "as_markdown",
    "as_text",
    "ask",
    "complete",
    "device_doubt",
    "doctor",
    "elsewhere",
    "export",
    "export_path",
    "export_together",
    "file_name",
    "files_below",
    "get_rules",
    "kernels_with_files",
    "left_out",
    "lookup",
    "near",
    "nearest_key",
    "not_asked_for",
    "own_tree",
    "parse_file_name",
    "platform_of",
    "question",
    "read_config_file",
    "rules_table",
    "shared_name",
    "shipped_files",
    "shipped_names",
    "sources",
    "to_serve",
    "tune_to_serve",
    "version_folders",
    "write_config_file",
    "write_shipped",
]
