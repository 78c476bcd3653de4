"""Journals: as `moelab tune --resume` and `--freeze` read them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from synthetic import small_problem, synthetic_landscape

from fuzz import Case, spoil
from moelab.tuner import header, journal, journal_lines
from moelab.tuner.replay import ReplayEvaluator
from moelab.tuner.search import Settings
from moelab.tuner.session import TuneSession

SETTINGS = Settings(scouts=4, finalists=2, pairs=1, final=3, layer=3, chunk=8)


def cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """Values of lines, sealed again as if moelab had written them; bytes; special files; lines in another order."""
    folder.mkdir(parents=True, exist_ok=True)
    good, path = written(folder / "good.jsonl"), folder / "run.jsonl"
    lines = good.read_bytes().splitlines()
    whole = _all(good)
    while True:
        how = rng.choice(("value", "value", "value", "unknown", "bytes", "flip", "special"))
        spoil.cleared(path)
        if how == "special":
            what, make = rng.choice(list(spoil.SPECIAL.items()))
            make(path)
            yield Case(what, lambda: _all(path), lambda _: False)
            continue
        if how in ("bytes", "flip"):
            change = spoil.flipped if how == "flip" else spoil.spoiled_bytes
            what, data = change(rng, good.read_bytes())
            path.write_bytes(data)
            yield Case(what, lambda: _all(path), lambda found: _is_part(found, whole))
            continue
        number = rng.choice((0, rng.randrange(len(lines))))
        what, line = _spoiled(rng, how, json.loads(lines[number]))
        path.write_bytes(b"\n".join([*lines[:number], line, *lines[number + 1 :]]) + b"\n")
        yield Case(f"line {number + 1}: {what}", lambda: _all(path), lambda _: False)


def written(path: Path) -> Path:
    """A small run's journal, of a replay."""
    problem = small_problem((1, 64))
    evaluator = ReplayEvaluator(synthetic_landscape(problem, samples=3))
    TuneSession(problem, evaluator, strategy="race", settings=SETTINGS, run=path).run()
    return path


def _all(path: Path) -> tuple[Any, ...]:
    """Whatever a run is asked for when it is taken up."""
    content = journal.read(path)
    problem, settings = header.read_header(path, content.header)
    return dict(content.header), problem, settings, dict(content.results), list(content.notes)


def _is_part(found: tuple[Any, ...], whole: tuple[Any, ...]) -> bool:
    """Whether what was read is the run, or its beginning: a torn line at the end is a kill's, and left out."""
    return (
        found[:3] == whole[:3] and found[3].items() <= whole[3].items() and all(note in whole[4] for note in found[4])
    )


def _spoiled(rng: random.Random, how: str, line: dict[str, Any]) -> tuple[str, bytes]:
    line.pop("digest")
    if how == "unknown":
        changed = line | {"wholly_unknown": 1}
        if line["kind"] not in ("header", "result"):
            changed = line | {"kind": "lunch"}
        return "an unknown field, or kind", _sealed(json.dumps(changed, separators=(",", ":")))
    places = [place for place in spoil.paths(line) if _is_checked(place)]
    place = rng.choice(places)
    there = spoil.at(line, place)
    # an `extra` field may hold any JSON value; what is read by name may not
    values = [v for v in spoil.HOSTILE if spoil.is_hostile_to(there, v) and not (there is None and v is None)]
    values = [v for v in values if isinstance(v, spoil.Raw) or not (isinstance(there, str) and isinstance(v, str))]
    value = rng.choice([v for v in values if v is not None or there is not None] or list(spoil.UNREADABLE))
    return f"{'.'.join(map(str, place))} = {str(value)[:40]!r}", _sealed(
        spoil.dumps(spoil.replaced(line, place, value))
    )


FREE = ("provenance", "space", "winners", "protocol", "evaluator", "source", "landscape")
"""What is said in a journal for people: any JSON value."""


def _is_checked(place: tuple[Any, ...]) -> bool:
    return not (len(place) > 1 and place[0] in FREE) and place[0] not in ("winners",)


def _sealed(text: str) -> bytes:
    body = text.encode("utf-8", "surrogatepass")[:-1]
    return body + b',"digest":"%s"}' % journal_lines._digest(body)
