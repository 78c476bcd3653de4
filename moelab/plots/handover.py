"""Winners handed to a loader: the files in its naming, and what its own lookup then finds in them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from moelab.config_files import Exported, export_together, get_rules, question
from moelab.errors import LandscapeError
from moelab.plots.landscape import GEMM_NAMES
from moelab.plots.panel import Panel
from moelab.tuner.problem import GEMMS
from moelab.tuner.results import TuneResult


def write(result: TuneResult, rules: str, out: str | Path, *, overwrite: bool = False) -> list[Exported]:
    """Write the winners as the loader `rules` reads them; GEMM2's of its own where it can ask for them.

    Raises LandscapeError without a winner, and what config_files.export raises: ConfigFileError for the winners of a kernel
    beside the compatible kernel under a peer's rules, among it.
    """
    if not any(result.to_configs().values()):
        raise LandscapeError(
            "There is no winner to write. Expected one batch size at least that has one. Restore an excluded pair, or tune."
        )
    asked, items = question(result.problem.shape, rules), []
    for gemm, configs in result.to_configs().items():
        down = gemm == "down"
        if down and not get_rules(rules).names_down:
            continue
        name = asked.name(result.problem.device, down=down, kernel=result.problem.file_kernel)
        items.append((name, configs))
    version = result.problem.triton_version
    return list(export_together(items, rules=rules, out=out, triton_version=version, overwrite=overwrite))


def preview(result: TuneResult, rules: str) -> Panel:
    """Write into a throwaway folder, read back through the loader's rules, and show both."""
    with tempfile.TemporaryDirectory(prefix="moelab-export-") as folder:
        written = write(result, rules, folder)
        names = [str(each.path.relative_to(folder)) for each in written]
        first = json.dumps(json.loads(written[0].path.read_text()), indent=None)
    read_back = [
        {
            "GEMM": GEMM_NAMES[gemm], "batch": b, "found, key": found.key,
            "config that the loader runs": found.config.short() if found.config else "none",
            "from": found.path.name if found.path else "the default rule",
        }
        for gemm, each in zip(GEMMS, written, strict=False)
        for b, found in each.lookups.items()
    ]  # fmt: skip
    missing = ""
    if result.problem.separate_down and len(names) == 1:
        missing = f" {rules} has no file of GEMM2's own, so GEMM1's config serves both; `moelab tune --no-down` tunes for that."
    begins = first[:200] + (" …" if len(first) > 200 else "")
    said = (
        f"**For {rules}: {' and '.join(f'`{name}`' for name in names)}, {len(written[0].lookups)} batch sizes, each found again "
        f"through {rules}'s own rules.**{missing} The first file begins `{begins}`"
    )
    return Panel(None, read_back, said)
