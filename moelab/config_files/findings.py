"""What a doctor reports: findings, each with its file, severity, reason and remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""error: the file is not read, or what it holds cannot run as written; warning: it is read, and does less than it
could; note: worth knowing, nothing to repair."""


@dataclass(frozen=True)
class Finding:
    """One thing wrong with one file. problem: its kind, a word for programs; reason, remedy: a sentence each."""

    path: Path
    severity: Severity
    problem: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """What a doctor found. folder: what was walked; rules: whose; root: the folder that this loader reads;
    files: every config file looked at; findings: errors first, then by file."""

    folder: Path
    rules: str
    root: Path
    files: tuple[Path, ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings of severity "error"."""
        return self.of("error")

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of that severity."""
        return tuple(finding for finding in self.findings if finding.severity == severity)

    def shown(self, path: Path) -> str:
        """A path as the report shows it: below the folder that was walked."""
        return str(path.relative_to(self.folder)) if path.is_relative_to(self.folder) else str(path)

    def rows(self) -> list[dict[str, str]]:
        """The findings as rows of a table: severity, problem, file, reason, remedy."""
        return [
            {
                "severity": finding.severity,
                "problem": finding.problem,
                "file": self.shown(finding.path),
                "reason": finding.reason,
                "remedy": finding.remedy,
            }
            for finding in self.findings
        ]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON has it."""
        counts: Mapping[str, int] = {f"{severity}s": len(self.of(severity)) for severity in SEVERITIES}
        return {
            "folder": str(self.folder), "rules": self.rules, "reads": str(self.root), "files": len(self.files),
            **counts, "findings": self.rows(),
        }  # fmt: skip


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first, then by kind, then by file."""
    return tuple(sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), f.problem, str(f.path))))
