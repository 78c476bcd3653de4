"""kept: made once for what it is made of, whole or not at all, and gone when nobody has asked for it for long."""

from __future__ import annotations

import os
from pathlib import Path

import kept
import pytest


def test_a_file_is_made_once_for_what_it_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "BUILD", tmp_path)
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text("whole")

    first = kept.kept("kind", ["flags", "source"], make)
    assert first == kept.kept("kind", ["flags", "source"], make) and len(made) == 1 and first.read_text() == "whole"
    os.utime(first, (1, 1))
    other = kept.kept("kind", ["flags", "another source"], make)
    assert len(made) == 2 and os.listdir(tmp_path / "kind") == [other.name], "the first was last asked for in 1970"


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "BUILD", tmp_path)

    def fail(path: Path) -> None:
        path.write_text("half")
        raise ValueError("no compiler")

    with pytest.raises(ValueError, match="no compiler"):
        kept.kept("kind", ["source"], fail)
    assert os.listdir(tmp_path / "kind") == []
