"""A doctor's report as a picture: how many files have which kind of finding, with every finding in the table beside it."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from moelab.config_files.findings import SEVERITIES, Report
from moelab.plots.literal import literal
from moelab.plots.panel import Panel
from moelab.plots.style import BETTER, BLUE, WORSE, WRONG, grid, text_on

SOUND = "nothing to repair"
COLORS: Mapping[str, str] = {"error": WRONG, "warning": WORSE, "note": BLUE, SOUND: BETTER}
"""One colour for each severity, and for files without an error or a warning; the legend says the same in words."""


def findings(
    report: Report, severities: Sequence[str] = SEVERITIES, planted: Mapping[str, tuple[str, str]] | None = None
) -> Panel:
    """Files by kind of finding, as bars; the findings as the table: severity, kind, file, reason, remedy.

    severities: those to show. planted: path -> (kind, what was done) of a specimen; then the table says what was done to
    each file, and the sentence whether all of it was found.
    """
    shown = [finding for finding in report.findings if finding.severity in severities]
    sick = {finding.path for finding in report.findings if finding.severity != "note"}
    sound = len([path for path in report.files if path not in sick])
    counts = Counter((finding.severity, finding.problem) for finding in shown)
    kinds = [
        SOUND,
        *(problem for _, problem in sorted(counts, key=lambda k: (SEVERITIES.index(k[0]), -counts[k], k[1]))),
    ]
    names = list(dict.fromkeys(kinds))
    figure = grid(
        f"{report.rules}: {len(report.files)} config files, {sound} with nothing to repair",
        f"read now from {html.escape(_short(report.folder), quote=False)}, by {report.rules}’s rules; a file counts once for "
        "each of its findings",
        height=max(270, 170 + 22 * len(names)),
    )
    bars = {SOUND: {SOUND: sound}} | {
        severity: {problem: n for (found, problem), n in counts.items() if found == severity} for severity in SEVERITIES
    }
    for severity, numbers in bars.items():
        if not numbers:
            continue
        figure.add_bar(
            x=list(numbers.values()), y=list(numbers), orientation="h", name=severity, marker={"color": COLORS[severity]},
            text=[str(n) for n in numbers.values()],
            textposition="inside", insidetextfont={"color": text_on(COLORS[severity])}, insidetextanchor="end",
            textangle=0, constraintext="none", cliponaxis=False,
            hovertemplate="%{y}: %{x}<extra>" + severity + "</extra>",
        )  # fmt: skip
    top = max([sound, *counts.values(), 1])
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title="files", range=[0, 1.08 * top], dtick=math.ceil(top / 10))
    figure.update_yaxes(
        title="kind of finding", categoryorder="array", categoryarray=names[::-1], showgrid=False, automargin=True
    )
    rows = []
    for finding in shown:
        file = report.shown(finding.path)
        row = {"severity": finding.severity, "kind": finding.problem, "file": file}
        row |= {"what was done": planted[file][1] if file in planted else ""} if planted else {}
        rows.append(row | {"reason": _below(report, finding.reason), "remedy": _below(report, finding.remedy)})
    table = rows
    return Panel(figure, table, _said(report, sound, planted))


def _below(report: Report, text: str) -> str:
    """A sentence with the walked folder's path left out, which the figure names once."""
    return text.replace(f"{report.folder}/", "").replace(str(report.folder), ".")


def _said(report: Report, sound: int, planted: Mapping[str, tuple[str, str]] | None) -> str:
    numbers = {severity: len(report.of(severity)) for severity in SEVERITIES}
    each = ", ".join(f"{n} {severity}{'' if n == 1 else 's'}" for severity, n in numbers.items())
    place = "this folder" if report.root == report.folder else f"{literal(_below(report, str(report.root)))} below it"
    said = f"**{each}; {sound} of {len(report.files)} files have nothing to repair.** {report.rules} reads {place}."
    if not planted:
        return said + (" The table has the remedies." if numbers["error"] + numbers["warning"] else " Nothing to do.")
    found = {(report.shown(finding.path), finding.problem) for finding in report.findings}
    missed = [path for path, (problem, _) in planted.items() if (path, problem) not in found]
    if missed:
        return f"{said} Of {len(planted)} planted mistakes {len(missed)} were missed: {literal(', '.join(missed))}."
    folders = len({path for path in planted if (report.folder / path).is_dir()})
    where = (
        f"{len(planted) - folders} each in its own file, {folders} in folders" if folders else "each in its own file"
    )
    return f"{said} All {len(planted)} planted mistakes were found, {where}."


def _short(folder: Path, parts: int = 3) -> str:
    """The end of a path, which is the part that says something."""
    return str(folder) if len(folder.parts) <= parts + 1 else "…/" + "/".join(folder.parts[-parts:])
